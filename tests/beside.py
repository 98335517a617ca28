"""Real processes beside a test, as a launcher would start them: they talk over gloo, one thread each. They are forked from a server that
has imported torch once."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from softprompt import cli
from softprompt.errors import Error

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["softprompt.cli", "softprompt.training", "transformers.models.llama.modeling_llama"])
PATIENCE = 90.0  # seconds that a test waits for them: whatever hangs fails it


class Beside:
    """`size` processes that run `work(*arguments)`, each with what it says in a file of its own. `patches`: values of our modules."""

    def __init__(
        self,
        folder: Path,
        size: int,
        work: Callable[..., object],
        *arguments: Any,
        launcher: str = "torchrun",
        patches: Mapping[str, Any] = {},
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / f"said-{rank}.txt" for rank in range(size)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        for rank, file in enumerate(self.files):
            told = LAUNCHERS[launcher](rank, size, port) if size > 1 else {}
            how = (told, str(file), dict(patches), work, arguments)
            self.processes.append(CONTEXT.Process(target=_run, args=how, daemon=True))
        for process in self.processes:
            process.start()

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.processes[rank].pid, number)

    def ended(self, seconds: float = PATIENCE) -> list[int]:
        """Their exit codes, of all. Raises AssertionError where they take longer."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in late:
            self.kill(rank)
        assert not late, f"after {seconds} s these still run: {late}; they said {self.said}"
        return [process.exitcode for process in self.processes]

    @property
    def said(self) -> list[str]:
        return [file.read_text() if file.exists() else "" for file in self.files]


def _torchrun(rank: int, size: int, port: int) -> dict[str, str]:
    here = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in here.items()}


def _slurm(rank: int, size: int, port: int) -> dict[str, str]:
    step = {"PROCID": rank, "STEP_NUM_TASKS": size, "LOCALID": rank, "NODEID": 0, "JOB_ID": port - 29_500, "STEP_TASKS_PER_NODE": size}
    return {f"SLURM_{name}": str(value) for name, value in step.items()} | {"SLURM_STEP_NODELIST": "localhost"}


LAUNCHERS = {"torchrun": _torchrun, "slurm": _slurm}


def _run(told: dict[str, str], file: str, patches: dict[str, Any], work: Callable[..., object], arguments: Sequence[Any]) -> None:
    os.environ.update(told)
    torch.set_num_threads(1)
    with open(file, "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    for name, value in patches.items():
        module, _, attribute = name.rpartition(".")
        setattr(import_module(module), attribute, value)
    try:
        work(*arguments)
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def command(*line: str) -> None:
    """The command line."""
    sys.argv = ["softprompt", *line]
    cli.main()
