"""How fast an evaluation is: answers in batches against one by one and against PEFT's generate; labels that share one reading.

    python benchmarks/eval_speed.py --base FOLDER --json FILE [--rows 32] [--labelled 1000] [--pairs 3]

The sides take turns in one process; the ratios are medians of the pairs. Our greedy texts and losses must agree, or nothing is
written; of PEFT's answers the share that agrees is written down, since rows that it pads on the left get other positions.
Rows are the demo's held-out messages; labelled rows are made from them.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
from meters import machine

import softprompt
from softprompt.answers import ROWS, answer
from softprompt.atomic import write_text
from softprompt.config import ModelConfig
from softprompt.contestants import Entry
from softprompt.data import Example, load_examples
from softprompt.encode import make_encoder
from softprompt.likelihood import candidate_losses, row_losses
from softprompt.memory import token_budget
from softprompt.model import FrozenBase, load_base
from softprompt.prompt import SoftPrompt, prefix_of

LABELS = ("delivery problem", "wrong article", "praise")
DEMO = Path(softprompt.__file__).parent / "demo" / "eval.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--labelled", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24, help="of an answer at most")
    given = parser.parse_args()
    base = load_base(ModelConfig(name=given.base))
    encoder = make_encoder(base.tokenizer, "human-assistant")
    soft = SoftPrompt(base.embed_ids(encoder.question("Say what the customer wants, as JSON.")), "start", encoder.bos_id)
    examples = load_examples(str(DEMO)).examples
    result = {"machine": machine(), **answers(base, soft, encoder, examples[: given.rows], given.tokens, given.pairs)}
    result |= labels(base, soft, encoder, [examples[number % len(examples)] for number in range(given.labelled)], given.pairs)
    write_text(given.json, json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "machine"}, indent=1))


def answers(base: FrozenBase, soft: SoftPrompt, encoder: Any, examples: Sequence[Example], limit: int, pairs: int) -> dict[str, Any]:
    """Texts of both sides must be the same, row by row."""
    rows = [encoder.encode(example) for example in examples]
    entries = {"prompt": [Entry(soft, [[row] for row in rows], 0.0)]}
    wanted = [("prompt", number) for number in range(len(rows))]
    model = as_peft(base, soft)

    def batched() -> list[str]:
        said = {one.row: one.text for one in answer(base, entries, wanted, limit)}
        return [said[number] for number in range(len(rows))]

    def one_by_one() -> list[str]:
        return [next(answer(base, entries, [pair], limit)).text for pair in wanted]

    def by_peft() -> list[str]:
        texts = [encoder.tokenizer.decode(encoder.question(example.messages[-2].content)) for example in examples]
        base.tokenizer.padding_side = "left"
        said = []
        for first in range(0, len(texts), ROWS):
            batch = base.tokenizer(texts[first : first + ROWS], return_tensors="pt", padding=True)
            out = model.generate(**batch, max_new_tokens=limit, do_sample=False)
            said += base.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return said

    timed = take_turns({"batched": batched, "one by one": one_by_one, "PEFT": by_peft}, pairs)
    seconds, texts = timed["seconds"], timed["values"]
    assert texts["batched"] == texts["one by one"], "a batch must not change an answer"
    return {
        "answers": len(rows),
        "tokens": limit,
        "seconds": seconds,
        "answers_one_by_one_over_batched": ratio(seconds["one by one"], seconds["batched"]),
        "answers_peft_over_batched": ratio(seconds["PEFT"], seconds["batched"]),
        "answers_equal_to_peft": sum(a == b for a, b in zip(texts["batched"], texts["PEFT"], strict=True)) / len(rows),
    }


def as_peft(base: FrozenBase, soft: SoftPrompt) -> Any:
    settings = base.model.config.get_text_config(decoder=True)
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=soft.length, token_dim=base.hidden_size, num_transformer_submodules=1,
        num_attention_heads=settings.num_attention_heads, num_layers=settings.num_hidden_layers,
    )  # fmt: skip
    model = peft.get_peft_model(base.model, config).eval()
    model.prompt_encoder["default"].embedding.weight.data = soft.rows_PH.clone()
    return model


def labels(base: FrozenBase, soft: SoftPrompt, encoder: Any, examples: Sequence[Example], pairs: int) -> dict[str, Any]:
    """Three labels of every row: one reading of its text for all, against each pair of text and label alone."""

    candidates = [[encoder.encode(example.answered(label)) for label in LABELS] for example in examples]
    budget = token_budget(base.model.base_model, base.device, None)
    with torch.no_grad():
        prefix = prefix_of(base, [soft])

    def alone() -> torch.Tensor:
        columns = [row_losses(base, prefix, column, budget) for column in zip(*candidates, strict=True)]
        return torch.stack(columns, dim=1)

    timed = take_turns({"shared": lambda: candidate_losses(base, prefix, candidates, budget), "alone": alone}, pairs)
    seconds, losses = timed["seconds"], timed["values"]
    difference = (losses["shared"] - losses["alone"]).abs().max().item()
    assert difference < 1e-3, difference
    return {
        "labelled_rows": len(examples),
        "label_seconds": seconds,
        "labels_alone_over_shared": ratio(seconds["alone"], seconds["shared"]),
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
