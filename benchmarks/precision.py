"""How true is the gradient? bfloat16 and the head's tolerance against float32, over the steps of a real training.

    python -m benchmarks.precision --model FOLDER_OR_GGUF --json OUT [--data FILE] [--steps 100] [--rows 2] [--max-length 96] [--emulate]

The prompt is trained in float32 without approximation. At every step the same rows give the gradient again:

    tolerance   float32, train.head_tolerance as it is by default
    bfloat16    a bfloat16 base as softprompt uses it: the prompt's own positions in float32, the rest in bfloat16
    all-half    the same with the prompt's own positions in bfloat16 too

Written for each: cosine with the exact gradient and the ratio of their norms, by step, with median and worst. --emulate is
for machines that do not multiply in bfloat16: inputs and outputs of every product are rounded to bfloat16 and the product is
summed in float32, as such hardware does.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from benchmarks.compare import cosine
from benchmarks.measuring import machine
from benchmarks.workloads import PROMPT_TEXT, WORKLOADS, make_rows, read_rows, write_rows
from softprompt.config import Config, ModelConfig, OptimConfig
from softprompt.encode import Encoder, make_encoder
from softprompt.engine.batch import Order
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase
from softprompt.engine.optim import PromptOptimizer
from softprompt.engine.precise import wide
from softprompt.engine.prompt import SoftPrompt
from softprompt.engine.step import StepSettings, step_gradients
from softprompt.engine.tokens import Encoded
from softprompt.engine.trial import Sharing

TOKENS_PER_BATCH = 512
TOLERANCE = Config().train.head_tolerance


class RoundedProducts(TorchDispatchMode):
    """Products of bfloat16 tensors, computed in float32 and rounded: bfloat16 arithmetic on any machine."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        half = any(isinstance(arg, Tensor) and arg.dtype == torch.bfloat16 for arg in args)
        if not half or not (name in ("mm", "addmm", "bmm", "baddbmm") or name.startswith("_scaled_dot_product")):
            return func(*args, **kwargs)
        made = func(*tree_map(wide, args), **tree_map(wide, kwargs))
        if isinstance(made, Tensor):
            return made.to(torch.bfloat16)
        keeps = {1} if name.endswith("for_cpu") else set()  # the log-sum-exp of attention stays float32
        return tuple(
            one.to(torch.bfloat16) if isinstance(one, Tensor) and one.is_floating_point() and index not in keeps else one
            for index, one in enumerate(made)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--data")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=2, help="rows of a step")
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--emulate", action="store_true")
    given = parser.parse_args()
    full, half = (load_base(ModelConfig(name=given.model, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    steps = list(follow(full, half, given))
    summary = {kind: summarize([step[kind] for step in steps]) for kind in steps[0]}
    result = {"summary": summary, "steps": steps, "rows": given.rows, "emulated": given.emulate, "machine": machine()}
    given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for kind, found in summary.items():
        print(f"{kind:10} " + "  ".join(f"{name} {value:.5f}" for name, value in found.items()))


def follow(full: FrozenBase, half: FrozenBase, given: argparse.Namespace) -> Iterator[dict[str, dict[str, float]]]:
    """Trains in float32 and compares the gradients of every step."""
    encoder = make_encoder(full.tokenizer, Config().data.template)
    rows = encoded_rows(given, encoder)
    ids = full.tokenizer(PROMPT_TEXT, add_special_tokens=False)["input_ids"]
    soft = SoftPrompt(full.embed_ids(ids), "after_bos" if encoder.bos_id is not None else "start", encoder.bos_id)
    optimizer = PromptOptimizer(soft.rows_PH, OptimConfig(relative_lr=0.1), given.steps, full.rms)
    for number in range(given.steps):
        own = [rows[index] for index in Order(np.zeros(len(rows))).rows(number * given.rows, given.rows, 0)]

        def gradient(base: FrozenBase, tolerance: float, own: list[Encoded] = own) -> Tensor:
            leaf = soft.with_learned(optimizer.learned_PD.detach().clone().requires_grad_())
            step_gradients(base, [leaf], [own], StepSettings(TOKENS_PER_BATCH, tolerance))
            assert leaf.rows_PH.grad is not None
            return leaf.rows_PH.grad

        exact = gradient(full, 0.0)
        found = {"tolerance": gradient(full, TOLERANCE)}
        with RoundedProducts() if given.emulate else nullcontext():  # type: ignore[no-untyped-call]
            found["bfloat16"] = gradient(half, TOLERANCE)
            found["all-half"] = gradient(replace(half, sharing=Sharing(exact=False)), TOLERANCE)
        compared = {kind: against(grad, exact) for kind, grad in found.items()}
        print(number + 1, {kind: round(one["cosine"], 5) for kind, one in compared.items()}, flush=True)
        yield compared
        optimizer.learned_PD.grad = exact
        optimizer.step(number)


def encoded_rows(given: argparse.Namespace, encoder: Encoder) -> tuple[Encoded, ...]:
    file = given.json.with_suffix(".rows.jsonl")
    like = WORKLOADS["tutorial"]
    short = replace(like, profile=replace(like.profile, mean=given.max_length * 2 // 3, longest=given.max_length))
    write_rows(file, make_rows(short, given.steps * given.rows, encoder, given.data, 0))
    try:
        return read_rows(str(file), encoder, given.max_length)
    finally:
        file.unlink()


def against(grad_PH: Tensor, exact_PH: Tensor) -> dict[str, float]:
    return {"cosine": cosine(grad_PH.numpy(), exact_PH.numpy()), "norm_ratio": float(grad_PH.norm() / exact_PH.norm())}


def summarize(steps: list[dict[str, float]]) -> dict[str, float]:
    cosines, ratios = [step["cosine"] for step in steps], [step["norm_ratio"] for step in steps]
    return {
        "cosine_median": median(cosines),
        "cosine_worst": min(cosines),
        "norm_ratio_median": median(ratios),
        "norm_ratio_worst": max(ratios, key=lambda ratio: abs(ratio - 1)),
    }


if __name__ == "__main__":
    main()
