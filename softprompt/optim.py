"""AdamW on the rows of a prompt, and its learning rate over the run. Its state is plain tensors: nothing is pickled."""

import math

import torch
from torch import Tensor

from softprompt.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
AVERAGE = "average"


class RowOptimizer:
    """AdamW without weight decay on `rows_PH`, which must require a gradient.

    The peak rate is `optim.lr`, or the share `optim.relative_lr` of `rms`, that of the base's embedding rows: Adam moves
    every number by about the rate, so a share means the same whatever the scale of a base's embeddings. It rises over the
    warm-up and then decays to zero as `optim.schedule` says.
    """

    def __init__(self, rows_PH: Tensor, config: OptimConfig, num_steps: int, rms: float) -> None:
        self.rows_PH = rows_PH
        self.config = config
        self.num_steps = num_steps
        assert config.relative_lr != "find", "found before the run begins"
        self.peak = config.lr if config.lr is not None else config.relative_lr * rms
        self.adam = torch.optim.AdamW([rows_PH], lr=self.peak, weight_decay=0.0)
        self.average_PH = rows_PH.detach().clone()

    @property
    def shown_PH(self) -> Tensor:
        """The rows to evaluate and to save: the moving average where `optim.ema` is set, else the rows themselves."""
        return self.rows_PH.detach() if self.config.ema is None else self.average_PH

    def lr_at(self, step: int) -> float:
        """Rate of step number `step`, counted from 0."""
        warmup = math.ceil(self.config.warmup_fraction * self.num_steps)
        if step < warmup:
            return self.peak * (step + 1) / warmup
        done = (step - warmup) / max(1, self.num_steps - warmup)
        return self.peak * {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[self.config.schedule]

    def step(self, step: int) -> tuple[float, float]:
        """Applies the collected gradient and clears it. Returns (gradient norm before clipping, learning rate)."""
        norm = torch.nn.utils.clip_grad_norm_([self.rows_PH], self.config.clip_norm).item()
        lr = self.lr_at(step)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.adam.zero_grad()
        if self.config.ema is not None:
            self.average_PH.lerp_(self.rows_PH.detach(), 1 - self.config.ema)
        return norm, lr

    def state(self) -> dict[str, Tensor]:
        """Adam's moments, none before the first step, and the moving average where there is one."""
        moments = dict(self.adam.state[self.rows_PH]) if self.adam.state else {}
        return moments if self.config.ema is None else {**moments, AVERAGE: self.average_PH}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Puts back what `state` returned."""
        if all(name in state for name in MOMENTS):
            self.adam.state[self.rows_PH] = {name: state[name].clone() for name in MOMENTS}
        if AVERAGE in state:
            self.average_PH = state[AVERAGE].to(self.average_PH.device).clone()
