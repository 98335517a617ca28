"""What serving costs: many prompts mixed against the bare base, many requests at once against one, and against PEFT answering the same mix.

    python -m benchmarks.serve_speed --base FOLDER --json FILE [--prompts 20] [--requests 64] [--tokens 64] [--rounds 3] [--dtype float32]

The prompts are random rows of five lengths: what is answered plays no part, how long it takes does; every answer has all its tokens. The
requests come at once, to the engine itself (no HTTP). PEFT has all adapters over one model and answers by adapter, in batches of `generate`
with padding on the left; a request's first token is there when its batch's is. The sides take turns in one process; the ratios are medians
of the rounds; `--peft-rounds`: PEFT takes part in the first ones alone, being slow. Every prompt has answered once before: its prefix is
on the shelf. PEFT's answers are not compared with ours: it gives other positions to rows that it pads on the left.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from peft import PeftModel
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.measuring import machine
from softprompt.artifact import make_card, write_prompt
from softprompt.atomic import write_text
from softprompt.card import DataCard
from softprompt.config import ModelConfig, load_config
from softprompt.encode import make_encoder
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import SoftPrompt, deepened
from softprompt.sampling import Sampling
from softprompt.serve.asking import Ask, Said
from softprompt.serve.own import OwnEngine, start

LENGTHS = (8, 16, 20, 24, 32)
WORDS = ("where", "is", "my", "parcel", "the", "shoes", "came", "too", "small", "can", "I", "return", "them", "please", "send", "a", "bill")
AT_ONCE = 16
BATCH = 16  # rows that PEFT answers together at most
NO_ROWS = DataCard(train="random", num_train=0, train_fingerprint="", num_eval=0, eval_fingerprint=None, labels=(), label_words={})


@dataclass(frozen=True)
class Served:
    """`first`: seconds to the first token of every request, on average."""

    tokens_per_second: float
    first: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    for name, default in {"prompts": 20, "requests": 64, "tokens": 64, "rounds": 3, "peft-rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    base = load_base(ModelConfig(name=given.base, dtype=given.dtype))
    with tempfile.TemporaryDirectory() as folder:
        prompts = {f"p{number}": random_prompt(base, Path(folder) / f"p{number}", number, given.dtype) for number in range(given.prompts)}
        result = measured(base, prompts, texts_of(given.requests), given.tokens, (given.rounds, given.peft_rounds))
    result |= {"machine": machine(), "base": given.base, "dtype": given.dtype, "requests": given.requests, "tokens": given.tokens}
    print(json.dumps(result, indent=1))
    write_text(given.json, json.dumps(result, indent=1) + "\n")


def random_prompt(base: FrozenBase, folder: Path, number: int, dtype: str, *, deep: bool = False) -> Path:
    """A prompt's folder, before the text as PEFT has it: rows, or (`deep`) the keys and values that such rows give."""
    encoder, rows_PH = make_encoder(base.tokenizer, "human-assistant"), base.drawn_rows(LENGTHS[number % len(LENGTHS)], number)
    soft = deepened(base, rows_PH, "start", encoder.bos_id) if deep else SoftPrompt(rows_PH, "start", encoder.bos_id)
    method = f"prompt.method={soft.method}"
    config = load_config(None, [f"model.name={base.name}", f"model.dtype={dtype}", "data.train=random", method])
    write_prompt(folder, soft, make_card(config, base, soft, encoder, NO_ROWS, "random", {}), base)
    return folder


def texts_of(number: int) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(20, 60))) for _ in range(number)]


def measured(base: FrozenBase, prompts: Mapping[str, Path], texts: Sequence[str], tokens: int, rounds: tuple[int, int]) -> dict[str, Any]:
    names = list(prompts)
    mixed = [names[number % len(names)] for number in range(len(texts))]
    peft = loaded_by_peft(base, prompts)

    async def ours(do: Callable[[OwnEngine, str], Any]) -> Served:
        engine = start(base, prompts)
        try:
            every = [model.name for model in engine.models()]
            await served(base, engine, every, ["hello"] * len(every), 1, len(every))
            return await do(engine, every[0])
        finally:
            await engine.close(60)

    sides: dict[str, Callable[[], Served]] = {
        "mixed": lambda: asyncio.run(ours(lambda engine, _: served(base, engine, mixed, texts, tokens, len(texts)))),
        "base": lambda: asyncio.run(ours(lambda engine, name: served(base, engine, [name] * len(texts), texts, tokens, len(texts)))),
        "mixed, 16 at once": lambda: asyncio.run(ours(lambda engine, _: served(base, engine, mixed, texts[:AT_ONCE], tokens, AT_ONCE))),
        "mixed, 1 at once": lambda: asyncio.run(ours(lambda engine, _: served(base, engine, mixed, texts[:AT_ONCE], tokens, 1))),
        "peft": lambda: by_peft(base, peft, mixed, texts, tokens),
    }
    found: dict[str, list[Served]] = {side: [] for side in sides}
    for number in range(rounds[0]):
        for side, run in sides.items():
            if side == "peft" and number >= rounds[1]:
                continue
            found[side].append(run())
            print(side, found[side][-1], flush=True)

    def ratio(first: str, second: str, of: Callable[[Served], float]) -> float:
        return median(of(one) / of(other) for one, other in zip(found[first], found[second], strict=False))

    return {
        "served": {side: [asdict(one) for one in several] for side, several in found.items()},
        "mixed over base": ratio("mixed", "base", lambda one: one.tokens_per_second),
        "16 at once over 1": ratio("mixed, 16 at once", "mixed, 1 at once", lambda one: one.tokens_per_second),
        "mixed over peft": ratio("mixed", "peft", lambda one: one.tokens_per_second),
        "first token over peft's": ratio("mixed", "peft", lambda one: one.first),
    }


async def served(base: FrozenBase, engine: OwnEngine, models: Sequence[str], texts: Sequence[str], tokens: int, at_once: int) -> Served:
    """All texts, so many of them at a time; an answer ends with its last token alone."""
    sampling, room = Sampling(tokens, logit_bias=dict.fromkeys(base.stop_ids, -100.0)), asyncio.Semaphore(at_once)

    async def one(model: str, text: str) -> tuple[int, float]:
        async with room:
            count, first, began = 0, 0.0, time.perf_counter()
            async for event in engine.ask(Ask(model, text, sampling)):
                if isinstance(event, Said):
                    count, first = count + event.num_tokens, first or time.perf_counter() - began
            return count, first

    began = time.perf_counter()
    found = await asyncio.gather(*(one(model, text) for model, text in zip(models, texts, strict=False)))
    seconds = time.perf_counter() - began
    assert all(count == tokens for count, _ in found)
    return Served(sum(count for count, _ in found) / seconds, fmean(first for _, first in found))


# ---- PEFT ----------------------------------------------------------------------------------------------------------


def loaded_by_peft(base: FrozenBase, prompts: Mapping[str, Path]) -> PeftModel:
    (first, folder), *others = prompts.items()
    model = PeftModel.from_pretrained(base.model, str(folder), adapter_name=first)
    for name, path in others:
        model.load_adapter(str(path), adapter_name=name)
    return model.eval()


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes when the first token is there, and stops nothing."""

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **how: Any) -> torch.Tensor:
        self.first = self.first or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def by_peft(base: FrozenBase, model: PeftModel, names: Sequence[str], texts: Sequence[str], tokens: int) -> Served:
    tokenizer, firsts, count = base.tokenizer, [], 0
    began = time.perf_counter()
    for name in dict.fromkeys(names):
        own = [text for text, other in zip(texts, names, strict=True) if other == name]
        model.set_adapter(name)
        for first in range(0, len(own), BATCH):
            batch = tokenizer(own[first : first + BATCH], return_tensors="pt", padding=True, padding_side="left").to(base.device)
            clock = Clock()
            with torch.inference_mode():
                said = model.generate(
                    **batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, stopping_criteria=StoppingCriteriaList([clock])
                )
            assert clock.first is not None
            firsts += [clock.first - began] * len(said)
            count += len(said) * tokens
    return Served(count / (time.perf_counter() - began), fmean(firsts))


if __name__ == "__main__":
    main()
