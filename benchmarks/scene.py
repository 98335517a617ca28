"""What both sides share: the loaded base with the job's rows, the rows a prompt starts from, and how results are written.

Shapes: K prompts, P virtual tokens, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jobs import Job, Measured
from rows import read_rows
from torch import Tensor

from softprompt.config import Config, ModelConfig, load_config
from softprompt.encode import Encoder, make_encoder
from softprompt.engine.batch import order_of_rows
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase
from softprompt.engine.tokens import Encoded
from softprompt.init import Material, start_rows

POSITION = "start"  # PEFT's own layout: soft prompt, BOS, text


@dataclass(frozen=True)
class Scene:
    """The loaded base with the job's rows."""

    base: FrozenBase
    encoder: Encoder
    rows: tuple[Encoded, ...]

    def rows_of(self, count: int, seed: int) -> list[Encoded]:
        """The first rows of a run with this seed, in the order in which ours takes them."""
        return [self.rows[number] for number in order_of_rows([None] * len(self.rows), 0, count, seed)]


def set_scene(job: Job, dtype: str) -> Scene:
    base = load_base(ModelConfig(name=job.model, dtype=dtype))  # type: ignore[arg-type]
    encoder = make_encoder(base.tokenizer, Config().data.template)
    return Scene(base, encoder, read_rows(job.rows, encoder, job.max_length))


def run_config(job: Job, base: FrozenBase, out: str, seed: int, num_prompts: int) -> Config:
    """A run of ours: no evaluation, no checkpoint before its end."""
    sections = {
        "model": {"name": job.model, "dtype": job.dtype},
        "data": {"train": job.rows, "max_length": job.max_length},
        "prompt": {
            "length": job.virtual_tokens,
            "text": job.prompt_text,
            "init": "random" if job.random_start else "text",
            "position": POSITION,
        },
        "optim": {"lr": base.rms / 10},
        "train": {
            "steps": job.steps + 1,
            "examples_per_step": job.examples_per_step,
            "save_every": job.steps + 2,
            "seed": seed,
            "out": out,
        },
    }
    count = [f"prompt.count={num_prompts}"] if num_prompts > 1 else []
    tolerance = [f"train.head_tolerance={job.head_tolerance}"] if job.head_tolerance is not None else []
    return load_config(sections, count + tolerance)


def start_of(job: Job, scene: Scene, seed: int) -> Tensor:
    prompt = run_config(job, scene.base, "unused", seed, 1).prompt
    return start_rows(Material(prompt, scene.base, scene.rows, (), seed)).rows_PH


def measured(job: Job, scene: Scene, seconds: float, peak_bytes: int) -> Measured:
    samples = job.steps * job.examples_per_step * job.num_prompts
    dtype = str(scene.base.dtype).removeprefix("torch.")
    return Measured(samples, seconds, samples / seconds, peak_bytes, scene.base.device.type, dtype)


def write_arrays(path: str, loss_K: Tensor, starts: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    loss, start, gradient = (tensor.float().cpu().numpy() for tensor in (loss_K, torch.stack(list(starts)), torch.stack(list(grads))))
    np.savez(path, loss=loss, start=start, gradient=gradient)
