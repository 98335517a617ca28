"""What a launcher says of this process: the variables of torchrun and accelerate, or of a SLURM step. The command line asks: no torch."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

PORT = 29_500  # where SLURM's processes meet, or behind it


@dataclass(frozen=True)
class Launched:
    """This process is number `rank` of `size`, and number `local` of the `beside` on its machine. All of them meet at `address`, where the
    first one is."""

    rank: int = 0
    size: int = 1
    local: int = 0
    beside: int = 1
    address: str = "localhost"
    port: int = PORT


def launched(told: Mapping[str, str] = os.environ) -> Launched:
    """A process alone, where the variables of neither are all there."""
    with suppress(KeyError, ValueError):
        if int(told["WORLD_SIZE"]) > 1:
            local, beside = int(told.get("LOCAL_RANK", "0")), int(told.get("LOCAL_WORLD_SIZE", "1"))
            return Launched(int(told["RANK"]), int(told["WORLD_SIZE"]), local, beside, told["MASTER_ADDR"], int(told["MASTER_PORT"]))
    with suppress(KeyError, ValueError, IndexError):
        if int(told["SLURM_STEP_NUM_TASKS"]) > 1:
            return _of_slurm(told)
    return Launched()


def _of_slurm(step: Mapping[str, str]) -> Launched:
    """A task of srun's. Lists of nodes look like n1,n[03-05,7], numbers of tasks on them like 4(x2),3."""
    first = re.sub(r"\[(\w+).*", r"\1", step["SLURM_STEP_NODELIST"].split(",")[0])
    pairs = re.findall(r"(\d+)(?:\(x(\d+)\))?", step["SLURM_STEP_TASKS_PER_NODE"])
    tasks = [int(number) for number, times in pairs for _ in range(int(times or 1))]
    rank, size, local, node = (int(step[f"SLURM_{name}"]) for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID", "NODEID"))
    port = int(step.get("MASTER_PORT", PORT + int(step["SLURM_JOB_ID"]) % 10_000))
    return Launched(rank, size, local, tasks[node], step.get("MASTER_ADDR", first), port)
