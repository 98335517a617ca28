"""The optimizer of what a prompt trains, and its learning rate over the run. Its state is plain tensors: nothing is pickled."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from softprompt.config import OptimConfig
from softprompt.reparam import Trainable

AVERAGE = "average"
Groups = list[dict[str, Any]]


class Momentum(torch.optim.Optimizer):
    """An average of the gradients whose direction alone counts: every step moves the tensor by about the rate.

    `direction` says how: the sign of every number (Lion, Chen et al. 2023), or every row divided by its RMS.
    """

    def __init__(self, groups: Groups, direction: Callable[[Tensor], Tensor], beta: float, decay: float) -> None:
        super().__init__(groups, {"direction": direction, "beta": beta, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; a closure is not called."""
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is None:
                    continue
                average = self.state[tensor].setdefault("exp_avg", torch.zeros_like(tensor))
                tensor.sub_(group["lr"] * group["direction"](average.lerp(tensor.grad, 1 - group["beta"])))
                average.lerp_(tensor.grad, 1 - group["decay"])


def _by_row(average: Tensor) -> Tensor:
    return average / average.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-30)


OPTIMIZERS: dict[str, Callable[[Groups], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, weight_decay=0.0),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, weight_decay=0.0),
    "lion": lambda groups: Momentum(groups, torch.sign, beta=0.9, decay=0.99),
    "row-normalized": lambda groups: Momentum(groups, _by_row, beta=0.9, decay=0.9),
}


def relative_rate(config: OptimConfig, rms: float) -> float:
    """The peak rate as a share of `rms`, whichever way it is given."""
    if config.lr is not None:
        return config.lr / rms
    assert isinstance(config.relative_lr, float), "filled in, or found, before a run begins"
    return config.relative_lr


class RowOptimizer:
    """An optimizer without weight decay on the tensors of a Trainable.

    The peak rate of a tensor is its scale times `optim.relative_lr`, or times what makes it `optim.lr` for the rows: AdamW moves
    every number by about the rate, so a share of the RMS of the base's embedding rows means the same whatever their scale. It
    rises over the warm-up and then decays to zero as `optim.schedule` says.
    """

    def __init__(self, trained: Trainable, config: OptimConfig, num_steps: int, rms: float) -> None:
        self.trained = trained
        self.config = config
        self.num_steps = num_steps
        self.rms = rms
        self.relative_peak = relative_rate(config, rms)
        scaled = config.name != "adafactor"  # which multiplies the rate by the RMS of the tensor itself
        groups: Groups = [
            {"params": [tensor], "lr": self.relative_peak, "scale": trained.scales[name] if scaled else 1.0}
            for name, tensor in trained.tensors.items()
        ]
        self.optimizer = OPTIMIZERS[config.name](groups)
        self.average_PH = trained.rows().detach().clone()

    @property
    def shown_PH(self) -> Tensor:
        """The rows to evaluate and to save: the moving average where `optim.ema` is set, else the rows themselves."""
        return self.trained.rows().detach() if self.config.ema is None else self.average_PH

    def relative_lr_at(self, step: int) -> float:
        """Rate of step number `step`, counted from 0, as a share of each tensor's scale."""
        warmup = math.ceil(self.config.warmup_fraction * self.num_steps)
        if step < warmup:
            return self.relative_peak * (step + 1) / warmup
        done = (step - warmup) / max(1, self.num_steps - warmup)
        decay = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
        return self.relative_peak * decay[self.config.schedule]

    def step(self, step: int) -> tuple[float, float]:
        """Applies the collected gradient and clears it. Returns (gradient norm before clipping, learning rate of the rows)."""
        norm = torch.nn.utils.clip_grad_norm_(list(self.trained.tensors.values()), self.config.clip_norm).item()
        relative = self.relative_lr_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = relative * group["scale"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.config.ema is not None:
            self.average_PH.lerp_(self.trained.rows().detach(), 1 - self.config.ema)
        return norm, relative * self.rms

    def state(self) -> dict[str, Tensor]:
        """The tensors, the optimizer's own of each (none before the first step), and the moving average where there is one."""
        state = {name: tensor.detach() for name, tensor in self.trained.tensors.items()}
        for name, tensor in self.trained.tensors.items():
            state |= {f"{name}.{key}": value for key, value in self.optimizer.state.get(tensor, {}).items()}
        return state if self.config.ema is None else {**state, AVERAGE: self.average_PH}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state` returned."""
        for name, tensor in self.trained.tensors.items():
            with torch.no_grad():
                tensor.copy_(state[name])
            own = {key.removeprefix(f"{name}."): value.clone() for key, value in state.items() if key.startswith(f"{name}.")}
            if own:
                self.optimizer.state[tensor] = own
        if AVERAGE in state:
            self.average_PH = state[AVERAGE].to(self.average_PH.device).clone()
