"""More prompts than there is memory for: whether each still answers as it does alone, and what is kept of them.

    python -m benchmarks.serve_shelf --base FOLDER --json FILE [--prompts 500] [--room 50] [--asked 2] [--at-once 16] [--tokens 8]

The prompts are random rows, and keys and values that such rows give, of five lengths. The engine has memory for `--room` of them. Every one
is asked `--asked` times, in random order, with one of few texts, so that another prompt's answer would be another. Each answer is compared
with that of `generate`, given this prompt and text alone.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measuring import machine
from benchmarks.serve_speed import LENGTHS, random_prompt, texts_of
from softprompt.artifact import load_prompt
from softprompt.atomic import write_text
from softprompt.config import ModelConfig
from softprompt.data import Message
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase
from softprompt.generation import generate
from softprompt.sampling import Sampling
from softprompt.serve.asking import Ask, Begun
from softprompt.serve.own import start

NUM_TEXTS, WORDS = 5, 6
KINDS = 2 * len(LENGTHS)  # prompts, after which they are alike again


@dataclass(frozen=True)
class Wanted:
    """`text`: what the prompt `name` is asked; `answer`: what it says alone."""

    name: str
    text: str
    answer: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--json", required=True, type=Path)
    for name, default in {"prompts": 500, "room": 50, "asked": 2, "at-once": 16, "tokens": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    base, sampling = load_base(ModelConfig(name=given.base, dtype="float32")), Sampling(given.tokens)
    with tempfile.TemporaryDirectory() as folder:
        prompts = {
            f"p{number}": random_prompt(base, Path(folder) / f"p{number}", number, "float32", deep=number % 2 == 1)
            for number in range(given.prompts)
        }
        alone = answered_alone(base, prompts, sampling)
        room = given.room * size_of_one(base, prompts)
        asked = random.Random(1).sample(alone * given.asked, len(alone) * given.asked)
        result = asyncio.run(answered(base, prompts, asked, room, sampling, given.at_once))
    result |= {"machine": machine(), "base": given.base, "prompts": given.prompts, "of them there is room for": given.room}
    result |= {"MB of all prompts": given.prompts * room / given.room / 2**20, "different answers": len({one.answer for one in alone})}
    print(json.dumps(result, indent=1))
    write_text(given.json, json.dumps(result, indent=1) + "\n")


def answered_alone(base: FrozenBase, prompts: Mapping[str, Path], sampling: Sampling) -> list[Wanted]:
    texts = [" ".join(text.split()[:WORDS]) for text in texts_of(NUM_TEXTS)]
    found = []
    for number, (name, folder) in enumerate(prompts.items()):
        text = texts[number % NUM_TEXTS]
        found.append(Wanted(name, text, *generate(base, load_prompt(folder, base), [text], sampling)))
    return found


def size_of_one(base: FrozenBase, prompts: Mapping[str, Path]) -> int:
    """Bytes that a prompt takes on the shelf, on average."""
    sizes = []
    for folder in list(prompts.values())[:KINDS]:
        soft = load_prompt(folder, base).soft
        base.shelf.take(soft, (), lambda soft=soft: soft.prefix(base))  # type: ignore[misc]
        sizes.append(base.shelf.num_bytes)
        del soft  # and so it leaves the shelf
    return sum(sizes) // len(sizes)


async def answered(
    base: FrozenBase, prompts: Mapping[str, Path], asked: list[Wanted], memory: int, sampling: Sampling, at_once: int
) -> dict[str, Any]:
    process, room = psutil.Process(), asyncio.Semaphore(at_once)
    before = process.memory_info().rss
    engine = start(base, prompts, memory_bytes=memory)
    kept, resident, computed, wrong = [0], [before], 0, []

    async def one(wanted: Wanted) -> None:
        nonlocal computed
        async with room:
            said = ""
            async for event in engine.ask(Ask(wanted.name, (Message("user", wanted.text),), sampling)):
                if isinstance(event, Begun):
                    computed += event.num_cached == 0
                else:
                    said += event.text
            kept.append(engine.load().kept_bytes)
            resident.append(process.memory_info().rss)
            if said != wanted.answer:
                wrong.append((wanted.name, wanted.answer, said))

    try:
        began = time.perf_counter()
        await asyncio.gather(*map(one, asked))
        seconds = time.perf_counter() - began
    finally:
        await engine.close(60)
    return {
        "seconds": seconds,
        "answers": len(asked),
        "wrong": wrong,
        "prefixes computed": computed,
        "MB of room": memory / 2**20,
        "MB kept at most": max(kept) / 2**20,
        "MB of the process, before and at most": [before / 2**20, max(resident) / 2**20],
    }


if __name__ == "__main__":
    main()
