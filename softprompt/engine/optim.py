"""The optimizer of a prompt's rows, and its learning rate over the run. Its state is plain tensors: nothing is pickled."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from softprompt.config import OptimConfig

ROWS, AVERAGE = "rows", "average"


def relative_rate(config: OptimConfig, unit: float) -> float:
    """The peak rate as a share of `unit`, whichever way it is given."""
    if config.lr is not None:
        return config.lr / unit
    assert isinstance(config.relative_lr, float), "filled in, or found, before a run begins"
    return config.relative_lr


class PromptOptimizer:
    """AdamW without weight decay on `learned_PD`, a copy of the numbers to start from, with gradient.

    Its peak rate is `unit` times `optim.relative_lr`, or `optim.lr`: AdamW moves every number by about the rate, so a share of the RMS
    of the base's embedding rows means the same whatever their scale. It rises over the warm-up and then decays to zero as
    `optim.schedule` says. Other optimizers, and other things to train in the place of the rows, have gained nothing (LOG.md).
    """

    def __init__(self, start_PD: Tensor, config: OptimConfig, num_steps: int, unit: float) -> None:
        self.config = config
        self.num_steps = num_steps
        self.unit = unit
        self.relative_peak = relative_rate(config, unit)
        self.learned_PD = start_PD.detach().clone().requires_grad_()
        self.average_PD = start_PD.detach().clone()
        self.optimizer = torch.optim.AdamW([self.learned_PD], weight_decay=0.0)

    @property
    def shown_PD(self) -> Tensor:
        """The rows to evaluate and to save: the moving average where `optim.ema` is set, else the rows themselves."""
        return self.learned_PD.detach() if self.config.ema is None else self.average_PD

    def relative_lr_at(self, step: int) -> float:
        """Rate of step number `step`, counted from 0, as a share of the rows' RMS."""
        warmup = math.ceil(self.config.warmup_fraction * self.num_steps)
        if step < warmup:
            return self.relative_peak * (step + 1) / warmup
        done = (step - warmup) / max(1, self.num_steps - warmup)
        decay = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
        return self.relative_peak * decay[self.config.schedule]

    def step(self, step: int) -> tuple[float, float]:
        """Applies the collected gradient and clears it. Returns (gradient norm before clipping, learning rate)."""
        if self.config.frozen and self.learned_PD.grad is not None:
            self.learned_PD.grad[: self.config.frozen] = 0
        norm = torch.nn.utils.clip_grad_norm_([self.learned_PD], self.config.clip_norm).item()
        rate = self.relative_lr_at(step) * self.unit
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.config.ema is not None:
            self.average_PD.lerp_(self.learned_PD.detach(), 1 - self.config.ema)
        return norm, rate

    def state(self) -> dict[str, Tensor]:
        """The rows, AdamW's own tensors (none before the first step), and the moving average where there is one."""
        state = {ROWS: self.learned_PD.detach(), **self.optimizer.state.get(self.learned_PD, {})}
        return state if self.config.ema is None else {**state, AVERAGE: self.average_PD}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state` returned."""
        with torch.no_grad():
            self.learned_PD.copy_(state[ROWS])
        if own := {key: state[key] for key in ("step", "exp_avg", "exp_avg_sq") if key in state}:
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": {0: own}})
        if AVERAGE in state:
            self.average_PD = state[AVERAGE].to(self.average_PD.device).clone()
