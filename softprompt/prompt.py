"""The prompts that are learned, and how they become the prefix that texts continue from.

Shapes: P virtual tokens, H hidden size, S prefix positions (BOS included), L layers, D = all keys and values of one position.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.encode import Encoded, shared_beginning
from softprompt.errors import ModelError
from softprompt.model import FrozenBase
from softprompt.prefix import Layers, Prefix, assemble

ENOUGH = 8  # rows of each prompt from which on one reading in float32 is cheaper than one of each row in half precision


@dataclass(frozen=True)
class SoftPrompt:
    """Learned rows [P, H] in float32, whatever the base's precision, and where they stand (Lester et al. 2021).

    `bos_id`: the BOS token that belongs to the prefix, or None for a base whose texts have none.
    """

    rows_PH: Tensor
    position: str
    bos_id: int | None

    @property
    def length(self) -> int:
        return self.rows_PH.shape[0]

    def rms(self, base: FrozenBase) -> float:
        """What learning rates and movements are relative to: the size of numbers like those of the rows."""
        return base.rms

    def embeds(self, base: FrozenBase) -> Tensor:
        """[S, H] float32: [BOS][rows] for position "after_bos", [rows][BOS] for "start"; no BOS where `bos_id` is None."""
        bos = _bos(base, self.bos_id)
        rows_PH = self.rows_PH.to(base.device)
        return torch.cat([bos, rows_PH] if self.position == "after_bos" else [rows_PH, bos])

    def rows_like(self, other: "SoftPrompt") -> Tensor:
        """The rows in the units of another prompt's."""
        return self.rows_PH

    def stored(self, base: FrozenBase) -> Tensor:
        """What lies on disk: for "after_bos" the BOS row comes first."""
        rows_PH = self.rows_PH.detach().to(base.device)
        return torch.cat([_bos(base, self.bos_id), rows_PH]) if self.position == "after_bos" else rows_PH


@dataclass(frozen=True)
class DeepPrompt(SoftPrompt):
    """Learned keys and values of P positions in every layer (prefix tuning, Li & Liang 2021), behind BOS, or before it as PEFT has it.

    `rows_PH` is [P, D]: keys and values of layer 0, of layer 1 ..., each divided by its scale in `scale_D`, so that one learning
    rate fits all of them. `shapes`: (heads, head size) of each of these 2 L parts.
    """

    scale_D: Tensor
    shapes: tuple[tuple[int, int], ...]

    def rms(self, base: FrozenBase) -> float:
        """1: they are divided by their scale."""
        return 1.0

    def embeds(self, base: FrozenBase) -> Tensor:
        raise AssertionError("a deep prompt has no embeddings")

    def rows_like(self, other: SoftPrompt) -> Tensor:
        """The rows in the units of another deep prompt's."""
        assert isinstance(other, DeepPrompt)
        return self.rows_PH * self.scale_D / other.scale_D

    def stored(self, base: FrozenBase) -> Tensor:
        """Keys and values as they are, those of a BOS that stands before them first."""
        rows_PD = (self.rows_PH.detach() * self.scale_D).to(base.device)
        if self.bos_id is None or self.position == "start":
            return rows_PD
        return torch.cat([flat(base.prefill([_bos(base, self.bos_id)]).layers), rows_PD])

    def layers(self, base: FrozenBase) -> Layers:
        """Keys and values per layer, each [heads, S, head size]."""
        parts = (self.rows_PH * self.scale_D).to(base.device).split([heads * size for heads, size in self.shapes], dim=1)
        states = [part.reshape(self.length, *shape).transpose(0, 1) for part, shape in zip(parts, self.shapes, strict=True)]
        if self.bos_id is not None and self.position == "after_bos":
            first = [state[0] for layer in base.prefill([_bos(base, self.bos_id)]).layers for state in layer]
            states = [torch.cat([one, state], dim=1) for one, state in zip(first, states, strict=True)]
        layers = tuple(zip(states[::2], states[1::2], strict=True))
        return layers if self.bos_id is None or self.position == "after_bos" else _followed(base, layers, (self.bos_id,))


def _followed(base: FrozenBase, layers: Layers, ids: Sequence[int]) -> Layers:
    """Keys and values of a prompt, then those of tokens that read it, if any."""
    if not ids:
        return layers
    ids_1T = torch.tensor([ids], dtype=torch.long, device=base.device)
    read = base.continue_from(assemble([layers]), torch.zeros_like(ids_1T[:, 0]), ids_1T, torch.ones_like(ids_1T), keep=True)
    pairs = [(mine, both[0]) for own, also in zip(layers, read.layers, strict=True) for mine, both in zip(own, also, strict=True)]
    states = [torch.cat([mine, both[:, mine.shape[1] :].float()], dim=1) for mine, both in pairs]
    return tuple(zip(states[::2], states[1::2], strict=True))


def deepened(base: FrozenBase, rows_PH: Tensor, position: str, bos_id: int | None) -> DeepPrompt:
    """The keys and values of rows: the same function as the rows, before it is trained.

    The scale of a part is the RMS of its numbers, and at most the median of all parts': where a layer's are large (the values of
    Gemma's first are ten times the usual ones) a step in proportion keeps the others from learning (LOG.md).
    Raises ModelError for a base whose prefix is no keys and values.
    """
    if not base.shares_prefix:
        raise ModelError(f'{base.name} keeps a recurrent state, no keys and values: prompt.method = "prefix" cannot be used with it')
    with torch.no_grad():
        layers = base.prefill([SoftPrompt(rows_PH, position, bos_id if position == "after_bos" else None).embeds(base)]).layers
    rows_PD, shapes = flat(layers)[-len(rows_PH) :], shapes_of(layers)
    parts = rows_PD.split([heads * size for heads, size in shapes], dim=1)
    rms = torch.stack([part.square().mean().sqrt() for part in parts])
    scale_D = torch.cat([size.expand(part.shape[1]) for size, part in zip(rms.clamp(max=rms.median()), parts, strict=True)])
    return DeepPrompt(rows_PD / scale_D, position, bos_id, scale_D, shapes)


def shapes_of(layers: Layers) -> tuple[tuple[int, int], ...]:
    """(heads, head size) of the keys and the values of every layer."""
    return tuple((state.shape[1], state.shape[3]) for layer in layers for state in layer)


def flat(layers: Layers) -> Tensor:
    """[S, D] of the keys and values of one prefix."""
    return torch.cat([state[0].transpose(0, 1).flatten(1) for layer in layers for state in layer], dim=1)


def prefix_of(base: FrozenBase, prompts: Sequence[SoftPrompt], ids: Sequence[int] = ()) -> Prefix:
    """BOS and rows of every prompt, and the text `ids` behind each, run through the base once; the keys and values of deep prompts
    as they are."""
    text_SH = base.embed_ids(ids)
    embeds = [torch.cat([prompt.embeds(base), text_SH]) for prompt in prompts if not isinstance(prompt, DeepPrompt)]
    if len(embeds) == len(prompts):
        return base.prefill(embeds)
    shallow = iter(base.prefill(embeds).separate() if embeds else [])
    return assemble([_followed(base, one.layers(base), ids) if isinstance(one, DeepPrompt) else next(shallow) for one in prompts])


def read_together(
    base: FrozenBase, prompts: Sequence[SoftPrompt], rows: Sequence[Encoded], room: int | None = None
) -> tuple[Prefix, list[Encoded]]:
    """The prefixes that rows of text continue from, and what is left of each row: what all rows begin with is read once, behind every
    prompt. The function stays the same. Few rows are left whole, since prefixes are computed in float32.

    `room`: positions read so at most, over all prompts; they are computed at once, whatever a micro-batch may hold.
    """
    worth = base.shares_prefix and len(rows) >= ENOUGH * len(prompts)
    ids = shared_beginning(rows)[: room and room // len(prompts)] if worth else ()
    return prefix_of(base, prompts, ids), [row.after(len(ids)) for row in rows]


def no_prompt(base: FrozenBase, bos_id: int | None) -> SoftPrompt:
    """The bare base, as a prompt of no rows."""
    return SoftPrompt(base.row_mean_H.new_zeros(0, base.hidden_size), "after_bos", bos_id)


def _bos(base: FrozenBase, bos_id: int | None) -> Tensor:
    return base.embed_ids([] if bos_id is None else [bos_id])
