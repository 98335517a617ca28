"""AdamW on the rows of a prompt, and its learning rate over the run. Its state is plain tensors: nothing is pickled."""

import math

import torch
from torch import Tensor

from softprompt.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class RowOptimizer:
    """AdamW without weight decay on `rows_PH`, which must require a gradient.

    The rate rises over the warm-up and then decays to zero as `optim.schedule` says.
    """

    def __init__(self, rows_PH: Tensor, config: OptimConfig, num_steps: int) -> None:
        assert config.lr is not None, "checked before the run starts"
        self.rows_PH = rows_PH
        self.config = config
        self.num_steps = num_steps
        self.adam = torch.optim.AdamW([rows_PH], lr=config.lr, weight_decay=0.0)

    def lr_at(self, step: int) -> float:
        """Rate of step number `step`, counted from 0."""
        assert self.config.lr is not None
        warmup = math.ceil(self.config.warmup_fraction * self.num_steps)
        if step < warmup:
            return self.config.lr * (step + 1) / warmup
        done = (step - warmup) / max(1, self.num_steps - warmup)
        return (
            self.config.lr * {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[self.config.schedule]
        )

    def step(self, step: int) -> tuple[float, float]:
        """Applies the collected gradient and clears it. Returns (gradient norm before clipping, learning rate)."""
        norm = torch.nn.utils.clip_grad_norm_([self.rows_PH], self.config.clip_norm).item()
        lr = self.lr_at(step)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.adam.zero_grad()
        return norm, lr

    def state(self) -> dict[str, Tensor]:
        """Adam's moments; empty before the first step."""
        return {name: tensor for name, tensor in self.adam.state[self.rows_PH].items()} if self.adam.state else {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Puts back what `state` returned."""
        if state:
            self.adam.state[self.rows_PH] = {name: state[name].clone() for name in MOMENTS}
