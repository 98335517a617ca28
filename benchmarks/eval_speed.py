"""How fast an evaluation is: answers in batches against one by one and against PEFT's generate; labels that share one reading.

    python -m benchmarks.eval_speed --base FOLDER --prompt RUN --json FILE [--rows 64] [--labelled 1000] [--joined 1 4] [--pairs 3]

The prompt is one that `softprompt demo prompt.method=prompt prompt.init=text prompt.position=start` has trained, which PEFT can read;
the rows that are answered are the demo's last test messages, with the
limit of tokens and the stop texts of an evaluation. Three labels are scored for texts of so many of the demo's messages, joined, every
text once by each side. The sides take turns in one process, with all answers or a block of labelled rows at a time; the ratios are
medians of the pairs. Our greedy texts and losses must agree, or nothing is written; of
PEFT's answers the share that agrees is written down, since rows that it pads on the left get other positions. Where PEFT's generate
loses a prompt (docs/peft.md), it is left out, and the file says why.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel

import softprompt
from benchmarks.measuring import machine
from softprompt.answers import answer, first_answer, limit_of, stops_of
from softprompt.artifact import StoredPrompt, find_prompt, load_prompt
from softprompt.atomic import write_text
from softprompt.config import ModelConfig
from softprompt.contestants import Reading
from softprompt.data import Example, Message, load_examples
from softprompt.engine.decode import ROWS
from softprompt.engine.likelihood import candidate_losses, row_losses
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase
from softprompt.engine.tokens import Encoded
from softprompt.peft_here import fault_of_generate

BLOCK = 100  # labelled rows of one turn
LABELS = ("delivery problem", "wrong article", "praise")
DEMO = Path(softprompt.__file__).parent / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--prompt", required=True, type=Path, help="a run folder or a prompt folder")
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--joined", type=int, nargs="+", default=[1, 4], help="messages of a text to score labels of")
    parser.add_argument("--labelled", type=int, default=1000, help="rows to score labels of")
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()
    base = load_base(ModelConfig(name=given.base, dtype="float32"))
    stored = load_prompt(given.prompt, base)
    result = {"machine": machine(), "virtual_tokens": stored.soft.length}
    messages = [example.messages[0].content for example in load_examples(str(DEMO / "train.jsonl")).examples]
    texts = [
        ["\n".join(messages[(row * joined + index) % len(messages)] for index in range(joined)) for row in range(given.labelled)]
        for joined in given.joined
    ]
    result["labels"] = [labels(base, stored, some) for some in texts]
    result |= answers(base, stored, load_examples(str(DEMO / "test.jsonl")).examples[-given.rows :], find_prompt(given.prompt), given.pairs)
    write_text(given.json, json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "machine"}, indent=1))


def answers(base: FrozenBase, stored: StoredPrompt, examples: Sequence[Example], folder: Path, pairs: int) -> dict[str, Any]:
    """Our texts must be the same in a batch and alone, row by row."""
    encoder = stored.encoder
    rows = [encoder.encode(example) for example in examples]
    limit, stops = limit_of(rows), stops_of([encoder], examples)
    readings = {"prompt": [Reading(stored.soft, [], (stored.soft, ()), [row.question for row in rows], 0.0)]}
    wanted = [("prompt", number) for number in range(len(rows))]
    texts = [encoder.tokenizer.decode(row.question) for row in rows]
    base.tokenizer.padding_side = "left"

    def batched() -> list[str]:
        said = {one.row: one.text for one in answer(base, readings, wanted, limit, stops)}
        return [said[number] for number in range(len(rows))]

    def one_by_one() -> list[str]:
        return [next(answer(base, readings, [pair], limit, stops)).text for pair in wanted]

    def by_peft() -> list[str]:
        said = []
        for first in range(0, len(texts), ROWS):
            batch = base.tokenizer(texts[first : first + ROWS], return_tensors="pt", padding=True)
            out = model.generate(**batch, max_new_tokens=limit, do_sample=False)
            said += base.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return said

    model = PeftModel.from_pretrained(base.model, str(folder)).eval()
    fault = fault_of_generate()
    sides: dict[str, Callable[[], list[str]]] = {"batched": batched, "one by one": one_by_one}
    timed = take_turns(sides if fault else {**sides, "PEFT": by_peft}, pairs)
    seconds, told = timed["seconds"], timed["values"]
    assert told["batched"] == told["one by one"], "a batch must not change an answer"
    return {
        "answers": len(rows),
        "tokens": limit,
        "seconds": seconds,
        "answers_one_by_one_over_batched": ratio(seconds["one by one"], seconds["batched"]),
    } | ({"without_peft": fault} if fault else beside_peft(seconds, told, stops))


def beside_peft(seconds: dict[str, list[float]], told: dict[str, list[str]], stops: Sequence[str]) -> dict[str, Any]:
    """Our answers in a batch against PEFT's."""
    theirs = [first_answer(text, stops) for text in told["PEFT"]]
    return {
        "answers_peft_over_batched": ratio(seconds["PEFT"], seconds["batched"]),
        "answers_equal_to_peft": sum(a == b for a, (b, _) in zip(told["batched"], theirs, strict=True)) / len(theirs),
        "answers_of_peft_that_a_stop_text_would_end": sum(stopped for _, stopped in theirs),
    }


def labels(base: FrozenBase, stored: StoredPrompt, texts: Sequence[str]) -> dict[str, Any]:
    """Three labels of every text: one reading of it for all, against each pair of text and label alone."""
    rows = [[Example((Message("user", text), Message("assistant", label)), "") for label in LABELS] for text in texts]
    candidates = [[stored.encoder.encode(one) for one in own] for own in rows]
    budget = base.budget(None)
    with torch.no_grad():
        prefix = stored.soft.prefix(base)

    def shared(block: list[list[Encoded]]) -> torch.Tensor:
        return candidate_losses(base, prefix, block, budget)

    def alone(block: list[list[Encoded]]) -> torch.Tensor:
        return torch.stack([row_losses(base, prefix, column, budget) for column in zip(*block, strict=True)], dim=1)

    seconds: dict[str, list[float]] = {"shared": [], "alone": []}
    difference = 0.0
    for first in range(0, len(candidates), BLOCK):
        block = candidates[first : first + BLOCK]
        timed = take_turns({"shared": partial(shared, block), "alone": partial(alone, block)}, 1)
        for name, spent in timed["seconds"].items():
            seconds[name] += spent
        difference = max(difference, (timed["values"]["shared"] - timed["values"]["alone"]).abs().max().item())
    assert difference < 1e-3, difference
    return {
        "rows": len(texts),
        "tokens_of_a_question": sum(len(own[0].question) for own in candidates) / len(candidates),
        "seconds": seconds,
        "alone_over_shared": ratio(seconds["alone"], seconds["shared"]),
        "largest_difference_of_a_loss": difference,
    }


def take_turns(sides: dict[str, Callable[[], Any]], pairs: int) -> dict[str, Any]:
    """Seconds of every side, `pairs` times in turn, and what each returned last."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    values = {}
    for _ in range(pairs):
        for name, run in sides.items():
            began = time.perf_counter()
            values[name] = run()
            seconds[name].append(time.perf_counter() - began)
    return {"seconds": seconds, "values": values}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    return median(one / other for one, other in zip(slow, fast, strict=True))


if __name__ == "__main__":
    main()
