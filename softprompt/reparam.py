"""What is trained in the place of a prompt's rows; when the prompt is saved, only its rows are left.

Every one of them starts as exactly the rows it is given. Each tensor has a scale, what one is in its units, so that one relative
learning rate fits all.

Shapes: P virtual tokens, H numbers of a row, R rank or width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

RANK, WIDTH, MIXED = 8, 128, 128


@dataclass(frozen=True)
class Trainable:
    """`tensors` require gradients; `build` makes the rows [P, H] from them."""

    tensors: dict[str, Tensor]
    scales: Mapping[str, float]
    build: Callable[[dict[str, Tensor]], Tensor]

    def rows(self) -> Tensor:
        """The rows as they are now, with gradient."""
        return self.build(self.tensors)


@dataclass(frozen=True)
class Ground:
    """What a reparametrisation starts from: the rows, the size `rms` of numbers like theirs, rows of the vocabulary, a seed."""

    rows_PH: Tensor
    rms: float
    vocabulary: Callable[[int], Tensor]
    seed: int

    def noise(self, *shape: int) -> Tensor:
        """Standard normal, a function of seed and shape."""
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed)).to(self.rows_PH.device)


def plain(ground: Ground) -> Trainable:
    """The rows themselves."""
    return _trainable({"rows": (ground.rows_PH, ground.rms)}, lambda tensors: tensors["rows"])


def residual_mlp(ground: Ground) -> Trainable:
    """rows + MLP(rows) with one MLP for all rows (Razdaibiedina et al. 2023); its last layer starts at zero."""
    width, rms = ground.rows_PH.shape[1], ground.rms
    parts = {
        "rows": (ground.rows_PH, rms),
        "down": (ground.noise(width, WIDTH) / width**0.5, width**-0.5),
        "up": (torch.zeros(WIDTH, width, device=ground.rows_PH.device), rms * WIDTH**-0.5),
    }

    def build(tensors: dict[str, Tensor]) -> Tensor:
        hidden_PR = torch.relu(layer_norm(tensors["rows"], (width,)) @ tensors["down"])
        return tensors["rows"] + hidden_PR @ tensors["up"]

    return _trainable(parts, build)


def low_rank(ground: Ground) -> Trainable:
    """The start rows, which stand still, and a product of two thin matrices; the second starts at zero."""
    length, width = ground.rows_PH.shape
    parts = {
        "left": (ground.noise(length, RANK), 1.0),
        "right": (torch.zeros(RANK, width, device=ground.rows_PH.device), ground.rms * RANK**-0.5),
    }
    return _trainable(parts, lambda tensors: ground.rows_PH + tensors["left"] @ tensors["right"])


def superposition(ground: Ground) -> Trainable:
    """Every row a mixture of the start rows and of rows of the vocabulary (SuperPos-Prompt, Ali Sadraei Javaheri et al. 2024)."""
    rows_PH = ground.rows_PH
    basis_RH = torch.cat([rows_PH, ground.vocabulary(MIXED)])
    weights_PR = torch.eye(len(rows_PH), len(basis_RH), device=rows_PH.device)
    return _trainable({"weights": (weights_PR, len(basis_RH) ** -0.5)}, lambda tensors: tensors["weights"] @ basis_RH)


REPARAMS: dict[str, Callable[[Ground], Trainable]] = {
    "none": plain,
    "residual-mlp": residual_mlp,
    "low-rank": low_rank,
    "superpos": superposition,
}


def _trainable(parts: Mapping[str, tuple[Tensor, float]], build: Callable[[dict[str, Tensor]], Tensor]) -> Trainable:
    tensors = {name: tensor.detach().clone().requires_grad_() for name, (tensor, _) in parts.items()}
    return Trainable(tensors, {name: scale for name, (_, scale) in parts.items()}, build)
