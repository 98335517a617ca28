"""A few tokens through a base in every way that matters: whether a soft prompt can stand before its texts, and how they continue from it.

Better no prompt than one that trains a different function: what differs is refused.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from softprompt.engine.family import backbone_of
from softprompt.engine.head import Head
from softprompt.engine.precise import float32_products
from softprompt.engine.prefix import Continued, Prefix, continue_plain, continue_shared, embedded, prefill, read_whole
from softprompt.errors import ModelError, first_line

EXACT, ROUNDED = 1e-3, 0.1  # relative errors of sums in float32, and of what half precision or few bits have rounded
LOST = {"half": 0.05, "few": 0.5}  # errors as shares of what a prefix does to the states: a lost state was 0.1 and more (LOG.md)


@dataclass(frozen=True)
class Sharing:
    """How texts continue from a prefix over a base. `prefix`: from what its layers keep; else every row is read whole. `exact`: see
    prefix.prefill."""

    prefix: bool = True
    exact: bool = True


WELL = Sharing()


def embed_scale(model: Any) -> float:
    """What a family multiplies the embeddings of its own ids by, and not those from outside."""
    text = model.config.get_text_config(decoder=True)
    return float(text.embedding_multiplier) if text.model_type == "falcon_h1" else 1.0


@torch.no_grad()
def check(model: Any, head: Head, name: str) -> Sharing:
    """How texts continue from a prefix over this base.

    Raises ModelError when the base treats embeddings from outside differently from its own, looks ahead, has logits that are not
    understood, or gives a row other states beside others.
    """
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(model.get_input_embeddings().weight.shape[0], (2, 7), generator=generator).to(model.device)
    rounded = getattr(model, "is_quantized", False) or (model.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32)
    tolerance = ROUNDED if rounded or model.dtype != torch.float32 else EXACT
    backbone, embed = backbone_of(model), model.get_input_embeddings()
    try:
        embeds_BTH = embed(ids_BT) * embed_scale(model)
        own = model(input_ids=ids_BT, use_cache=False).logits
        given = model(inputs_embeds=embeds_BTH.clone(), use_cache=False).logits  # some families write into what they are given
        hidden_BTH = read_whole(backbone, embeds_BTH.clone())
        shorter_BTH = read_whole(backbone, embeds_BTH[:, :5].clone())
        logits = head.logits(hidden_BTH)
    except Exception as error:  # a family's own code may raise anything
        raise ModelError(
            f"{name} does not take embeddings from outside, so a soft prompt cannot be used with it: {first_line(error)}"
        ) from None
    if model.dtype == torch.float16 and not (own.isfinite().all() and given.isfinite().all()):
        raise ModelError(f'{name}: float16 overflows with this base: use model.dtype = "bfloat16" or "float32"')
    if not _close(given, own, tolerance):
        raise ModelError(f"{name}: the same text gives other logits when its embeddings come from outside: this family is not supported")
    if not _close(shorter_BTH, hidden_BTH[:, :5], tolerance):
        raise ModelError(f"{name} looks ahead: a token's state depends on tokens after it; softprompt works with causal language models")
    if logits.shape != own.shape or not _close(logits, own, tolerance):
        raise ModelError(f"{name}: its logits are more than its output matrix times the last states: this family is not supported")
    few_bits = getattr(model, "is_quantized", False)
    return _sharing(backbone, embeds_BTH, "few" if few_bits else "half" if tolerance == ROUNDED else "float32", name)


def _sharing(backbone: Any, embeds_BTH: Tensor, weights: Literal["float32", "half", "few"], name: str) -> Sharing:
    """Asked in float32 first, over half-precision weights too, then in the weights' precision: some families' own code knows no
    float32 beside half precision."""
    reasons = []
    for exact in (True, False):
        trial = _Trial(backbone, embeds_BTH.float() if exact else embeds_BTH)
        with float32_products() if exact else nullcontext():
            try:
                whole, alone_NH, without_NH = trial.learned(embedded, continue_plain), trial.alone(), trial.without()
            except Exception as error:
                reasons.append(first_line(error))
                continue
            influence = (without_NH - whole.states_NH).norm()
            limit = EXACT * whole.states_NH.norm() if weights == "float32" else LOST[weights] * influence
            if (whole.states_NH - alone_NH).norm() > limit:
                raise ModelError(f"{name}: a row has other states beside a longer one: this family is not supported")
            try:
                shared = trial.learned(lambda starts: prefill(backbone, starts, exact), continue_shared)  # noqa: B023
            except Exception:  # layers that keep something else, that autograd cannot go through, or that know no float32
                continue
            steeper = 5 * (EXACT if weights == "float32" else ROUNDED)  # gradients are rounded more often
            alike = all(_close(*pair, steeper) for pair in zip(shared.gradients, whole.gradients, strict=True))
            if alike and (shared.states_NH - whole.states_NH).norm() < min(limit, LOST["few"] * influence):
                return Sharing(True, exact)
    if len(reasons) == 2:
        raise ModelError(f"{name}: nothing can be learned through its layers: {reasons[-1]}")
    return Sharing(False)


@dataclass(frozen=True)
class _Learned:
    """States [N, H] of real tokens, and the gradients of a sum of them by the prefixes' embeddings."""

    states_NH: Tensor
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Trial:
    """Two texts, one of them padded, behind prefixes of two lengths."""

    backbone: Any
    embeds_BTH: Tensor

    @property
    def mask_BT(self) -> Tensor:
        mask_BT = torch.ones(self.embeds_BTH.shape[:2], dtype=torch.long, device=self.embeds_BTH.device)
        mask_BT[1, 5:] = 0
        return mask_BT

    @property
    def starts(self) -> list[Tensor]:
        return [self.embeds_BTH[0, :4].clone(), self.embeds_BTH[1, :2].clone()]

    @torch.enable_grad()
    def learned(self, prefix_of: Callable[[list[Tensor]], Prefix], go_on: Callable[..., Continued]) -> _Learned:
        starts, mask_BT = [start.requires_grad_() for start in self.starts], self.mask_BT
        which_B = torch.arange(2, device=mask_BT.device)
        read = go_on(self.backbone, self.embeds_BTH.clone(), prefix_of(starts), which_B, mask_BT, keep=False)
        states_NH = read.hidden_BTH[mask_BT.bool()].float()
        some_NH = torch.linspace(-1, 1, states_NH.numel(), device=states_NH.device).cos().view_as(states_NH)
        return _Learned(states_NH.detach(), torch.autograd.grad((some_NH * states_NH).sum(), starts))

    def alone(self) -> Tensor:
        """The states of each [prefix][text] in a batch of its own."""
        rows = zip(self.starts, self.embeds_BTH, self.mask_BT.bool(), strict=True)
        parts = [(len(start), torch.cat([start, row[on]])[None]) for start, row, on in rows]
        return torch.cat([read_whole(self.backbone, whole)[0, start:] for start, whole in parts]).float()

    def without(self) -> Tensor:
        """The states of the texts with nothing before them."""
        return read_whole(self.backbone, self.embeds_BTH.clone())[self.mask_BT.bool()].float()


def _close(value: Tensor, reference: Tensor, tolerance: float) -> bool:
    return bool((value - reference).float().norm() <= tolerance * reference.float().norm())
