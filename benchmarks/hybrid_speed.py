"""A training step over small hybrid bases: from a shared prefix of keys, values and states, against rows that are read whole.

Random weights, sizes of the real layers' shapes but fewer and narrower ones; the ways alternate, medians. "row by row" reads one
[prompt][text] at a time, in chunks of the base's own length, as recurrent bases went before; "whole" reads them in batches.

    python -m benchmarks.hybrid_speed --rounds 5
"""

import argparse
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks.measuring import machine
from softprompt.engine.family import shorten_chunks
from softprompt.engine.model import FrozenBase, head_of
from softprompt.engine.prompt import SoftPrompt
from softprompt.engine.step import StepSettings, step_gradients
from softprompt.engine.tokens import Encoded
from softprompt.engine.trial import Sharing, check

SIZES = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
LAYERS = {"qwen3_5_text": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]}
LAYERS |= {"granitemoehybrid": ["mamba", "mamba", "mamba", "attention"]}
OWN: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {"head_dim": 64, "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 64},
    "granitemoehybrid": {"num_local_experts": 4, "num_experts_per_tok": 2, "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 32},
}
WAYS = {"shared": (Sharing(), 4096), "whole": (Sharing(prefix=False), 4096), "row by row": (Sharing(prefix=False), 1)}


def small_base(family: str, *, own_chunks: bool = False) -> FrozenBase:
    """A base with random weights and no tokenizer. `own_chunks`: Mamba 2 layers read as many tokens at a time as the family's do."""
    torch.manual_seed(0)
    settings = CONFIG_MAPPING[family](**SIZES, num_key_value_heads=2, layer_types=LAYERS[family], **OWN[family])
    model = AutoModelForCausalLM.from_config(settings).eval().requires_grad_(False)
    if not own_chunks:
        shorten_chunks(model)
    head, mean_H = head_of(model), torch.zeros(settings.hidden_size)
    return FrozenBase(family, model, None, torch.device("cpu"), head, mean_H, mean_H, sharing=check(model, head, family))


def seconds(base: FrozenBase, way: str, num_rows: int, length: int, virtual: int) -> float:
    """Of one step."""
    sharing, budget = WAYS[way]
    rows = [
        Encoded(tuple(torch.randint(3, 2048, (length,)).tolist()), (False,) * (length // 2) + (True,) * (length - length // 2))
    ] * num_rows
    prompt = SoftPrompt(torch.randn(virtual, base.hidden_size).mul_(0.02).requires_grad_(), "start", None)
    started = time.perf_counter()
    step_gradients(replace(base, sharing=sharing), [prompt], [rows], StepSettings(budget))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"rounds": 5, "rows": 16, "length": 32, "virtual": 100}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    print(machine())
    for family in OWN:
        base, as_before = small_base(family), small_base(family, own_chunks=True)
        assert base.shares_prefix
        rounds = [
            [seconds(as_before if way == "row by row" else base, way, given.rows, given.length, given.virtual) for way in WAYS]
            for _ in range(1 + given.rounds)
        ]
        times = {way: median(own) for way, own in zip(WAYS, zip(*rounds[1:], strict=True), strict=True)}  # the first round warms up
        said = ", ".join(f"{way} {value * 1000:.0f} ms ({value / times['shared']:.1f}x)" for way, value in times.items())
        print(f"{family}, {given.virtual} virtual tokens, {given.rows} rows of {given.length}: {said}")


if __name__ == "__main__":
    main()
