"""Our server against others on the bare base, and what a thousand requests of all sorts leave of it.

    python -m benchmarks.serve_load --base FOLDER --json FILE [--gguf FILE] [--requests 48] [--at-once 16] [--tokens 48] [--rounds 3]
                                    [--soak 1000]

Each server gets the same greedy completions over HTTP, `--at-once` of them at a time: ours, `transformers serve --continuous-batching` on
the same folder, and with `--gguf` llama.cpp (the server inside xllamacpp, called in its process, without HTTP) on a copy of that file whose
weights are all float32. The servers take turns, one of them alive at a time. `--soak N`: so many requests to ours, 64 at once, a third of
them broken off, malformed or oversized; every whole answer is compared with the one of its text alone, and memory is read after each tenth.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import httpx
import psutil
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, Keys
from gguf.quants import dequantize

from benchmarks.measuring import machine
from benchmarks.serve_speed import texts_of
from softprompt.atomic import write_text

START_SECONDS = 600
SOAK_AT_ONCE = 64
BLOCKS = ("--cb-block-size", "32", "--cb-num-blocks", "512")  # as many positions as ours has, instead of nearly all memory
BAD = (b"{", b'{"model": 1}', b'{"model": "none", "prompt": "x"}', b'{"model": "M", "prompt": "x", "temperature": NaN}', b"\xff\xfe")


@dataclass(frozen=True)
class Loaded:
    """`first`: seconds to the first token, on average, where answers are streamed. `per_cpu_second`: tokens for a second that a processor
    spent on the server: what other programs beside it change least."""

    tokens_per_second: float
    per_cpu_second: float
    first: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, type=Path, help="a folder")
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--gguf", type=Path)
    for name, default in {"requests": 48, "at-once": 16, "tokens": 48, "rounds": 3, "soak": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "requests": given.requests, "at once": given.at_once, "tokens": given.tokens}
    if given.rounds:
        result |= against_others(given)
    if given.soak:
        result["soak"] = asyncio.run(soaked(given.base, given.soak))
    print(json.dumps(result, indent=1))
    write_text(given.json, json.dumps(result, indent=1) + "\n")


def against_others(given: argparse.Namespace) -> dict[str, Any]:
    texts = texts_of(given.requests)
    sides: dict[str, Callable[[], Loaded]] = {
        "softprompt": lambda: by_server(ours, given.base, texts, given.at_once, given.tokens),
        "transformers": lambda: by_server(theirs, given.base, texts, given.at_once, given.tokens),
    }
    found: dict[str, list[Loaded]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        if given.gguf:
            file = as_float32(given.gguf, Path(folder) / "float32.gguf")
            sides["llama.cpp"], found["llama.cpp"] = lambda: by_llama(file, texts, given.at_once, given.tokens), []
        for _ in range(given.rounds):
            for side, run in sides.items():
                found[side].append(run())
                print(side, found[side][-1], flush=True)
    own, others = found["softprompt"], [side for side in sides if side != "softprompt"]
    return {
        "loaded": {side: [asdict(one) for one in several] for side, several in found.items()},
        "softprompt over": {side: over(own, found[side], lambda one: one.tokens_per_second) for side in others},
        "softprompt over, per cpu second": {side: over(own, found[side], lambda one: one.per_cpu_second) for side in others},
    }


def over(ours: Sequence[Loaded], theirs: Sequence[Loaded], of: Callable[[Loaded], float]) -> float:
    return median(of(one) / of(other) for one, other in zip(ours, theirs, strict=True))


# ---- servers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """`model`: the name that requests give; `more`: fields that keep an answer from ending early, where the server has one."""

    address: str
    model: str
    process: psutil.Process
    more: dict[str, Any]


@contextmanager
def started(*command: str) -> Iterator[tuple[str, psutil.Process]]:
    """A server on a port that is free: (its address, its process)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        began = time.monotonic()
        while True:
            try:
                if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            if process.poll() is not None or time.monotonic() - began > START_SECONDS:
                raise SystemExit(f"{' '.join(command)} does not start")
            time.sleep(0.2)
        yield address, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def ours(base: Path) -> Iterator[Server]:
    with started(sys.executable, "-m", "softprompt", "serve", f"model.name={base}", "model.dtype=float32") as (address, process):
        ends = json.loads((base / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
        bias = {str(token): -100 for token in (ends if isinstance(ends, list) else [ends])}
        yield Server(address, base.name, process, {"logit_bias": bias})


@contextmanager
def theirs(base: Path) -> Iterator[Server]:
    program = str(Path(sys.executable).with_name("transformers"))
    how = ("--dtype", "float32", "--device", "cpu", "--continuous-batching", *BLOCKS, "--host", "127.0.0.1")
    with started(program, "serve", str(base), *how) as (address, process):
        yield Server(address, str(base), process, {})


def by_server(server: Callable[[Path], Any], base: Path, texts: Sequence[str], at_once: int, tokens: int) -> Loaded:
    with server(base) as running:
        asyncio.run(loaded(running, texts[:2], 2, tokens))
        return asyncio.run(loaded(running, texts, at_once, tokens))


@asynccontextmanager
async def client_of(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=server.address, timeout=600, limits=limits) as client:
        yield client


async def loaded(server: Server, texts: Sequence[str], at_once: int, tokens: int) -> Loaded:
    """Every answer streamed. One that its tokens ran out on has all of them; of one that ended before, its chunks are counted."""
    room = asyncio.Semaphore(at_once)

    async def one(client: httpx.AsyncClient, text: str) -> tuple[int, float]:
        asked = {"model": server.model, "prompt": text, "max_tokens": tokens, "temperature": 0, "stream": True, **server.more}
        async with room:
            count, first, finish, began = 0, 0.0, None, time.perf_counter()
            async with client.stream("POST", "/v1/completions", json=asked) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        for choice in json.loads(line[6:])["choices"]:
                            count, finish = count + bool(choice["text"]), choice.get("finish_reason") or finish
                            first = first or (time.perf_counter() - began if count else 0.0)
            assert finish is not None, "an answer has an end"
            return tokens if finish == "length" else count, first

    async with client_of(server) as client:
        began, spent = time.perf_counter(), cpu_seconds(server.process)
        found = await asyncio.gather(*(one(client, text) for text in texts))
        seconds, spent, count = time.perf_counter() - began, cpu_seconds(server.process) - spent, sum(count for count, _ in found)
        return Loaded(count / seconds, count / spent, fmean(first for _, first in found))


def cpu_seconds(process: psutil.Process) -> float:
    return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children(recursive=True)))


# ---- llama.cpp -----------------------------------------------------------------------------------------------------


def as_float32(source: Path, target: Path) -> Path:
    """The same GGUF file with all its weights in float32."""
    reader = GGUFReader(source)
    fields = reader.fields
    writer = GGUFWriter(target, fields[Keys.General.ARCHITECTURE].contents())
    for name, field in fields.items():
        if name.startswith("GGUF.") or name == Keys.General.ARCHITECTURE:
            continue
        kind = field.types[0]
        writer.add_key_value(name, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def by_llama(file: Path, texts: Sequence[str], at_once: int, tokens: int) -> Loaded:
    """In a process of its own, whose threads do not stand in the way of the next server's."""
    command = [sys.executable, "-m", "benchmarks.serve_llama", str(file), str(at_once), str(tokens), "F32"]
    said = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=True, env=dict(os.environ))
    return Loaded(**json.loads(said.stdout.strip().splitlines()[-1]))


# ---- a thousand requests -------------------------------------------------------------------------------------------


async def soaked(base: Path, number: int) -> dict[str, Any]:
    """Counts of what came back, answers that were not those of their text alone, and memory in MB before and after each tenth."""
    texts = texts_of(20)
    with ours(base) as server:
        async with client_of(server) as client:
            alone = [(await whole(client, server, text)) for text in texts]
            await asyncio.gather(*(whole(client, server, text) for text in texts * 3))
            memory, room, draw = [server.process.memory_info().rss >> 20], asyncio.Semaphore(SOAK_AT_ONCE), random.Random(0)
            kinds = [draw.choice(("gone", "malformed", "oversized")) if draw.random() < 1 / 3 else "whole" for _ in range(number)]
            found: dict[str, int] = dict.fromkeys((*kinds, "wrong"), 0)

            async def one(index: int, kind: str) -> None:
                async with room:
                    if kind == "whole":
                        found["wrong"] += await whole(client, server, texts[index % len(texts)]) != alone[index % len(texts)]
                    elif kind == "gone":
                        await broken_off(client, server, texts[index % len(texts)])
                    else:
                        body = BAD[index % len(BAD)] if kind == "malformed" else b'{"prompt": "' + b"x" * 3_000_000
                        response = await client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
                        found["wrong"] += not 400 <= response.status_code < 500
                    found[kind] += 1
                    if sum(found[kind] for kind in set(kinds)) % (number // 10) == 0:
                        memory.append(server.process.memory_info().rss >> 20)

            began = time.perf_counter()
            await asyncio.gather(*(one(index, kind) for index, kind in enumerate(kinds)))
            seconds = time.perf_counter() - began
            again = [(await whole(client, server, text)) for text in texts] == alone
            memory.append(server.process.memory_info().rss >> 20)
    return {"seconds": seconds, "found": found, "the same afterwards": again, "MB": memory}


async def whole(client: httpx.AsyncClient, server: Server, text: str) -> str:
    asked = {"model": server.model, "prompt": text, "max_tokens": 16, "temperature": 0}
    response = await client.post("/v1/completions", json=asked)
    response.raise_for_status()
    return str(response.json()["choices"][0]["text"])


async def broken_off(client: httpx.AsyncClient, server: Server, text: str) -> None:
    asked = {"model": server.model, "prompt": text, "max_tokens": 200, "stream": True, **server.more}
    async with client.stream("POST", "/v1/completions", json=asked) as response:
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                return


if __name__ == "__main__":
    main()
