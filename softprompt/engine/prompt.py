"""The prompts that are learned, and how they become the prefix that texts continue from.

Shapes: P virtual tokens, H hidden size, S prefix positions (BOS included), L layers, D = numbers of one position: H of a row, or
all keys and values.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor

from softprompt.engine.layers import Attention, Layer, Layers, merged
from softprompt.engine.model import FrozenBase
from softprompt.engine.prefix import Prefix, assemble
from softprompt.engine.tokens import Encoded, shared_beginning
from softprompt.errors import ModelError

ENOUGH = 8  # rows of each prompt from which on one reading in float32 is cheaper than one of each row in half precision


class Prompt(ABC):
    """What is learned, and where it stands: rows, or keys and values. Float32, whatever the base's precision.

    `bos_id`: the BOS token that belongs to the prefix, or None for a base whose texts have none. `shapes`: (heads, head size) of the
    keys and the values of every layer; empty for rows. Compared by identity.
    """

    method: ClassVar[Literal["prompt", "prefix"]]
    position: str
    bos_id: int | None
    shapes: tuple[tuple[int, int], ...]

    @property
    @abstractmethod
    def learned_PD(self) -> Tensor:
        """The numbers that training moves, in units in which one learning rate fits all of them."""

    @abstractmethod
    def with_learned(self, learned_PD: Tensor) -> Self:
        """The same kind of prompt with other numbers."""

    @abstractmethod
    def unit(self, base: FrozenBase) -> float:
        """What learning rates and movements are relative to: the size of numbers like `learned_PD`."""

    @abstractmethod
    def stored(self, base: FrozenBase) -> Tensor:
        """What lies on disk."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that makes it different from another of its kind, shape and place."""
        return {"learned": self.learned_PD}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """A prompt like this one, from what another's `tensors` returned."""
        return self.with_learned(tensors["learned"].to(self.learned_PD.device))

    @property
    def length(self) -> int:
        return self.learned_PD.shape[0]

    @property
    def num_positions(self) -> int:
        """Positions of its prefix, BOS included."""
        return self.length + (self.bos_id is not None)

    def learned_like(self, other: "Prompt") -> Tensor:
        """The numbers in the units of another prompt of this kind."""
        return self.learned_PD

    def prefix(self, base: FrozenBase, ids: Sequence[int] = ()) -> Prefix:
        """BOS and the prompt, and the text `ids` behind it."""
        return prefix_of(base, [(self, ids)])


@dataclass(frozen=True, eq=False)
class SoftPrompt(Prompt):
    """Learned rows [P, H] that stand where embeddings of tokens stand (Lester et al. 2021)."""

    method = "prompt"
    shapes = ()
    rows_PH: Tensor
    position: str
    bos_id: int | None

    @property
    def learned_PD(self) -> Tensor:
        return self.rows_PH

    def with_learned(self, learned_PD: Tensor) -> Self:
        return replace(self, rows_PH=learned_PD)

    def unit(self, base: FrozenBase) -> float:
        """The RMS of the base's embedding rows."""
        return base.rms

    def stored(self, base: FrozenBase) -> Tensor:
        """[P, H]; for "after_bos" the BOS row comes first."""
        rows_PH = self.rows_PH.detach().to(base.device)
        return torch.cat([_bos(base, self.bos_id), rows_PH]) if self.position == "after_bos" else rows_PH

    def embeds(self, base: FrozenBase) -> Tensor:
        """[S, H] float32: [BOS][rows] for position "after_bos", [rows][BOS] for "start"; no BOS where `bos_id` is None."""
        bos = _bos(base, self.bos_id)
        rows_PH = self.rows_PH.to(base.device)
        return torch.cat([bos, rows_PH] if self.position == "after_bos" else [rows_PH, bos])


@dataclass(frozen=True, eq=False)
class DeepPrompt(Prompt):
    """Learned keys and values of P positions in every layer (prefix tuning, Li & Liang 2021), behind BOS, or before it as PEFT has it.

    `scaled_PD`: keys and values of layer 0, of layer 1 ..., each divided by its scale in `scale_D`, so that one learning rate fits
    all of them. `shapes`: (heads, head size) of each of these 2 L parts.
    """

    method = "prefix"
    scaled_PD: Tensor
    position: str
    bos_id: int | None
    scale_D: Tensor
    shapes: tuple[tuple[int, int], ...]

    @property
    def learned_PD(self) -> Tensor:
        return self.scaled_PD

    def with_learned(self, learned_PD: Tensor) -> Self:
        return replace(self, scaled_PD=learned_PD)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"learned": self.scaled_PD, "scale": self.scale_D}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        learned_PD, scale_D = (tensors[name].to(self.scaled_PD.device) for name in ("learned", "scale"))
        return replace(self, scaled_PD=learned_PD, scale_D=scale_D)

    def unit(self, base: FrozenBase) -> float:
        """1: they are divided by their scale."""
        return 1.0

    def learned_like(self, other: Prompt) -> Tensor:
        assert isinstance(other, DeepPrompt)
        return self.scaled_PD * self.scale_D / other.scale_D

    def stored(self, base: FrozenBase) -> Tensor:
        """[P, D] keys and values as they are, those of a BOS that stands before them first."""
        states_PD = (self.scaled_PD.detach() * self.scale_D).to(base.device)
        if self.bos_id is None or self.position == "start":
            return states_PD
        return torch.cat([flat(base.prefill([_bos(base, self.bos_id)]).layers), states_PD])

    def prefix(self, base: FrozenBase, ids: Sequence[int] = ()) -> Prefix:
        """The keys and values as they are, and those of BOS and of the text `ids`, which read them."""
        parts = (self.scaled_PD * self.scale_D).to(base.device).split([heads * size for heads, size in self.shapes], dim=1)
        states = [part.reshape(self.length, *shape).transpose(0, 1)[None] for part, shape in zip(parts, self.shapes, strict=True)]
        if self.bos_id is not None and self.position == "after_bos":
            first = base.prefill([_bos(base, self.bos_id)]).tensors
            states = [torch.cat([one, state], dim=2) for one, state in zip(first, states, strict=True)]
        pairs = zip(states[::2], states[1::2], strict=True)
        own = Prefix(tuple(Layer(Attention, {"keys": keys, "values": values}) for keys, values in pairs), (states[0].shape[2],))
        before = [self.bos_id] if self.bos_id is not None and self.position == "start" else []
        return _followed(base, _followed(base, own, before), ids)


def _followed(base: FrozenBase, prefix: Prefix, ids: Sequence[int]) -> Prefix:
    """One prefix, then the keys and values of tokens that read it, if any."""
    if not ids:
        return prefix
    ids_1T = torch.tensor([list(ids)], dtype=torch.long, device=base.device)
    read = base.continue_from(prefix, torch.zeros_like(ids_1T[:, 0]), ids_1T, torch.ones_like(ids_1T), keep=True)

    def behind(parts: Sequence[Tensor]) -> Tensor:
        mine, both = parts
        return torch.cat([mine, both[:, :, mine.shape[2] :].float()], dim=2)

    return Prefix(merged([prefix.layers, read.layers], behind, behind), (prefix.lengths[0] + len(ids),))


def deepened(base: FrozenBase, rows_PH: Tensor, position: str, bos_id: int | None, values: float = 1.0) -> DeepPrompt:
    """The keys and values of rows: the same function as the rows, before it is trained. `values`: how far they move beside the keys. Raises
    ModelError for a base whose prefix is no keys and values."""
    with torch.no_grad():
        layers = base.prefill([SoftPrompt(rows_PH, position, bos_id if position == "after_bos" else None).embeds(base)]).layers
    return _scaled(flat(layers)[-len(rows_PH) :], shapes_of(layers), position, bos_id, values)


def as_prompt(layers: Layers, position: str, bos_id: int | None, values: float = 1.0) -> DeepPrompt:
    """The keys and values of one prefix as a prompt; a BOS that they begin with, and that stands before the prompt, is left out. `values`:
    as for `deepened`. Raises ModelError as that does."""
    return _scaled(flat(layers)[int(bos_id is not None and position == "after_bos") :], shapes_of(layers), position, bos_id, values)


def _scaled(states_PD: Tensor, shapes: tuple[tuple[int, int], ...], position: str, bos_id: int | None, values: float = 1.0) -> DeepPrompt:
    """The scale of a part is the RMS of its numbers, and at most the median of all parts': where a layer's are large (the values of
    Gemma's first are ten times the usual ones) a step in proportion keeps the others from learning (LOG.md)."""
    parts = states_PD.split([heads * size for heads, size in shapes], dim=1)
    rms = torch.stack([part.square().mean().sqrt() for part in parts])
    sizes = rms.clamp(max=rms.median())
    sizes[1::2] *= values
    scale_D = torch.cat([size.expand(part.shape[1]) for size, part in zip(sizes, parts, strict=True)])
    return DeepPrompt(states_PD / scale_D, position, bos_id, scale_D, shapes)


def shapes_of(layers: Layers) -> tuple[tuple[int, int], ...]:
    """(heads, head size) of the keys and the values of every layer; empty where a layer keeps anything else."""
    if any(set(layer.parts) != {"keys", "values"} for layer in layers):
        return ()
    return tuple((part.shape[1], part.shape[3]) for layer in layers for part in layer.parts.values())


def flat(layers: Layers) -> Tensor:
    """[S, D] of the keys and values of one prefix. Raises ModelError where a layer keeps anything else."""
    if not shapes_of(layers):
        raise ModelError(
            'prompt.method = "prefix" needs a base whose layers keep keys and values and nothing else: use "prompt" with this one'
        )
    return torch.cat([part[0].transpose(0, 1).flatten(1) for layer in layers for part in layer.parts.values()], dim=1)


def prefix_of(base: FrozenBase, starts: Sequence[tuple[Prompt, Sequence[int]]]) -> Prefix:
    """The prefixes of (prompt, ids): BOS and the prompt, and the text `ids` behind it, run through the base once; the keys and values
    of deep prompts as they are."""
    embeds = [torch.cat([prompt.embeds(base), base.embed_ids(ids)]) for prompt, ids in starts if isinstance(prompt, SoftPrompt)]
    if len(embeds) == len(starts):
        return base.prefill(embeds)
    shallow = iter(base.prefill(embeds).separate() if embeds else [])
    return assemble([prompt.prefix(base, ids) if isinstance(prompt, DeepPrompt) else next(shallow) for prompt, ids in starts])


def read_together(
    base: FrozenBase, prompts: Sequence[Prompt], rows: Sequence[Encoded], room: int | None = None
) -> tuple[Prefix, list[Encoded]]:
    """The prefixes that rows of text continue from, and what is left of each row: what all rows begin with is read once, behind every
    prompt. The function stays the same. Few rows are left whole, since prefixes are computed in float32.

    `room`: positions read so at most, over all prompts; they are computed at once, whatever a micro-batch may hold.
    """
    worth = base.shares_prefix and len(rows) >= ENOUGH * len(prompts)
    ids = shared_beginning(rows)[: room and room // len(prompts)] if worth else ()
    return prefix_of(base, [(prompt, ids) for prompt in prompts]), [row.after(len(ids)) for row in rows]


class Sized(Protocol):
    """A base, as far as rows of no length need one."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...


def no_prompt(base: Sized, bos_id: int | None) -> SoftPrompt:
    """The bare base, as a prompt of no rows."""
    return SoftPrompt(torch.zeros(0, base.hidden_size, device=base.device), "after_bos", bos_id)


def _bos(base: FrozenBase, bos_id: int | None) -> Tensor:
    return base.embed_ids([] if bos_id is None else [bos_id])
