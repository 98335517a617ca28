"""Keys and values of few positions that do what a text's many do: Attention Matching (Zweiger et al. 2026, https://arxiv.org/abs/2602.16284)
without its bias, so that attention stays what it is.

Rows that are read behind the text say which of its keys every key/value head looks at most; these are kept, turned so that they are as far
from the rows as they were. Their values are solved for, layer after layer in one reading of the rows behind the prompt, so that attention
gives what it gave behind the text: by least squares, held to the tokens' own values where the rows do not say.

Shapes: S positions of a text, P of the prompt, B rows, T tokens, N queries, K key/value heads, each of which A / K of the A query heads
read, D numbers of a head.
"""

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from softprompt.engine.batch import collate
from softprompt.engine.layers import Layer, Layers, merged
from softprompt.engine.model import FrozenBase
from softprompt.engine.prefix import Prefix
from softprompt.engine.prompt import flat
from softprompt.engine.teacher import Teacher
from softprompt.engine.tokens import Encoded, num_shared
from softprompt.errors import ModelError

WATCHED = "softprompt-watched"  # what transformers knows our attention by
TOKENS, ROW = 2048, 256  # of the rows that are matched, padding included, and of each of them, at most
RIDGE = 1e-4  # how firmly values are held to the tokens' own, as a share of a key's mean square weight: measured (LOG.md)

Watch = Callable[[int, Tensor, Tensor], Tensor]
"""(number of a layer, what its attention gives [B, T, A, D], its weights [B, A, T, S]) -> what the layer goes on with."""


@dataclass(frozen=True)
class Matched:
    """What the layers keep of the prompt, behind BOS where that stands before it. `error`: what is off in the attention of `num_queries`
    tokens, as a share of what it gave behind the text, both as norms over all layers."""

    layers: Layers
    error: float
    num_queries: int


@dataclass(frozen=True)
class _Both:
    """A row as the student reads it, and as the teacher does behind text number `which`; supervised are, in both, the tokens that follow
    the queries to match. `num_text`: ids of the text that the student does not read itself; `shift`: tokens that its row has more than
    text and teacher's row together."""

    own: Encoded
    theirs: Encoded
    which: int
    num_text: int
    shift: int


@torch.no_grad()
def matched(
    base: FrozenBase, teacher: Teacher, own: Sequence[Encoded], length: int, position: str, bos_id: int | None, seed: int
) -> Matched:
    """Keys and values of `length` positions, fewer where the text has fewer, for a prompt that stands at `position`. `own[r]`: row r of the
    teacher as the student reads it; `seed`: which rows are matched, where not all are.

    Raises ModelError for a base that keeps more than keys and values, or whose attention cannot be watched.
    """
    flat(base.prefill([base.embed_ids([0])]).layers)  # raises for one that keeps more
    rows = _rows(teacher, own, seed)
    wanted, looks = _heard(base, teacher, rows)
    before = [] if bos_id is None else [bos_id]
    first = len(before) if position == "after_bos" else 0  # BOS itself is then no part of the prompt
    start = _picked(base, teacher, rows, looks, length, before, first)
    return _solved(base, start, first, [] if first else before, rows, wanted)


# ---- rows ----------------------------------------------------------------------------------------------------------


def _rows(teacher: Teacher, own: Sequence[Encoded], seed: int) -> list[_Both]:
    """As many as TOKENS allows, drawn by the seed."""
    found: list[_Both] = []
    widest = 0
    for number in random.Random(seed).sample(range(len(own)), len(own)):
        one = _both(teacher, number, own[number])
        widest = max(widest, len(one.own))
        if found and widest * (len(found) + 1) > TOKENS:
            break
        found.append(one)
    return found


def _both(teacher: Teacher, number: int, own: Encoded) -> _Both:
    which, theirs = teacher.which[number], teacher.rows[number]
    cut = max(0, min(len(own) - ROW, len(theirs) - 2))
    ours, read = own.ids[: len(own) - cut], theirs.ids[: len(theirs) - cut]
    text = teacher.contexts[which][1]
    whole = (*text, *read)
    alike = num_shared([ours[::-1], whole[::-1]])
    count = max(0, min(alike, len(read)) - 1)
    shift = len(ours) - len(whole)
    return _Both(_marked(ours, count), _marked(read, count), which, min(len(whole) - alike, len(text)), shift)


def _marked(ids: tuple[int, ...], count: int) -> Encoded:
    return Encoded(ids, (False,) * (len(ids) - count) + (True,) * count)


# ---- behind the text -----------------------------------------------------------------------------------------------


def _heard(base: FrozenBase, teacher: Teacher, rows: Sequence[_Both]) -> tuple[list[Tensor], dict[int, list[Tensor]]]:
    """(what attention gives the queries, [N, A, D] of every layer; how much they look at every position before their row, for every text
    [K, S] of every layer). A row at a time: all of its tokens look at all of a long text."""
    outputs: dict[int, list[Tensor]] = {}
    looks: dict[int, dict[int, Tensor]] = {}
    for row in rows:
        prefix = teacher.prefix(base, row.which)
        batch = collate([row.theirs], [0], [0], base.device)
        hear = _hearing(prefix, batch.scored_N, outputs, looks.setdefault(row.which, {}))
        with watched(base, hear):
            base.continue_from(prefix, batch.which_B, batch.ids_BT, batch.mask_BT)
    every = range(len(prefix.layers))
    if set(outputs) != set(every):
        raise ModelError(f"{base.name}: the attention of {len(outputs)} of {len(every)} layers can be watched: start from states")
    return [torch.cat(outputs[layer]) for layer in every], {which: [seen[layer] for layer in every] for which, seen in looks.items()}


def _hearing(prefix: Prefix, queries_N: Tensor, outputs: dict[int, list[Tensor]], looks: dict[int, Tensor]) -> Watch:
    """Adds to `outputs` and `looks` what the attention of one row gives and looks at."""

    def hear(layer: int, output: Tensor, weights: Tensor) -> Tensor:
        places_N, heads = queries_N.to(output.device), prefix.layers[layer].parts["keys"].shape[1]
        outputs.setdefault(layer, []).append(output[0, places_N].float())
        looked_AS = weights[0, :, places_N, : prefix.lengths[0]].float().square().sum(dim=1)
        looks[layer] = looks.get(layer, 0) + looked_AS.unflatten(0, (heads, -1)).sum(dim=1)
        return output

    return hear


@contextmanager
def watched(base: FrozenBase, watch: Watch) -> Iterator[None]:
    """Inside, every attention of the base is computed in its family's plain way, and goes on with what `watch` makes of it."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **how: Any) -> tuple[Tensor, None]:
        plain = sys.modules[type(module).__module__].eager_attention_forward
        return watch(module.layer_idx, *plain(module, query, key, value, mask, **how)), None

    AttentionInterface.register(WATCHED, attention)
    AttentionMaskInterface.register(WATCHED, eager_mask)
    settings = base.backbone.config
    before = settings._attn_implementation
    settings._attn_implementation = WATCHED
    try:
        yield
    finally:
        settings._attn_implementation = before
        del AttentionInterface._global_mapping[WATCHED]  # which would keep all that `watch` knows


# ---- which keys ----------------------------------------------------------------------------------------------------


def _picked(
    base: FrozenBase,
    teacher: Teacher,
    rows: Sequence[_Both],
    looks: Mapping[int, Sequence[Tensor]],
    length: int,
    before: Sequence[int],
    first: int,
) -> Prefix:
    """Of every head the positions that are looked at most, in order, with their own values; of several texts as many of each. The first
    `first` positions of a text are none of these, and stand before them as they are."""
    some = {row.which: row for row in rows}  # the template writes the same around all rows of a text
    texts = {which: [*before, *teacher.contexts[which][1][: row.num_text]] for which, row in some.items()}
    shares = (length // len(some) + (index < length % len(some)) for index in range(len(some)))
    counts = [min(share, len(ids) - first) for share, ids in zip(shares, texts.values(), strict=True)]
    parts = [base.prefill([base.embed_ids(before[:first])]).layers] if first else []
    turns = any("Rotary" in type(module).__name__ for module in base.backbone.modules())
    for (which, ids), count in zip(texts.items(), counts, strict=True):
        whole = base.prefill([base.embed_ids(ids)], sum(counts) + some[which].shift if turns else 0).layers
        looked_at = (seen_KS[:, first : len(ids)] for seen_KS in looks[which])
        parts.append(tuple(_most_looked_at(layer, own_KS, first, count) for layer, own_KS in zip(whole, looked_at, strict=True)))
    return Prefix(merged(parts, _behind, _behind), (first + sum(counts),))


def _most_looked_at(layer: Layer, looks_KS: Tensor, first: int, count: int) -> Layer:
    """Of positions that are looked at alike, the later ones."""
    order_KS = looks_KS.shape[1] - 1 - looks_KS.flip(1).argsort(dim=1, descending=True, stable=True)
    picked_KP = order_KS[:, :count].sort(dim=1).values + first

    def taken(part: Tensor) -> Tensor:
        return part.gather(2, picked_KP[None, :, :, None].expand(1, -1, -1, part.shape[3]))

    return layer.changed(taken, taken)


def _behind(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), dim=2)


# ---- their values --------------------------------------------------------------------------------------------------


def _solved(base: FrozenBase, start: Prefix, first: int, before: Sequence[int], rows: Sequence[_Both], wanted: Sequence[Tensor]) -> Matched:
    """The prompt, behind `first` positions of `start`, with values that give its readers what is wanted. Its rows begin with `before`."""
    own = [Encoded((*before, *row.own.ids), ((False,) * len(before) + row.own.supervised)) for row in rows]
    batch = collate(own, range(len(own)), [0] * len(own), base.device)
    values: dict[int, Tensor] = {}
    squares: list[tuple[float, float]] = []

    def solve(layer: int, output: Tensor, weights: Tensor) -> Tensor:
        values_1KSD = start.layers[layer].parts["values"]
        prompt_BTAP = weights[..., first : start.lengths[0]].transpose(1, 2).float()
        places_N, heads = batch.scored_N.to(output.device), values_1KSD.shape[1]
        missing = wanted[layer] - output.flatten(0, 1)[places_N].float()
        change_KPD = _least_squares(_by_head(prompt_BTAP.flatten(0, 1)[places_N], heads), _by_head(missing, heads))
        change_BTAD = torch.einsum("btkqp,kpd->btkqd", prompt_BTAP.unflatten(2, (heads, -1)), change_KPD).flatten(2, 3)
        values[layer] = torch.cat([values_1KSD[:, :, :first], values_1KSD[:, :, first:] + change_KPD], dim=2)
        left = missing - change_BTAD.flatten(0, 1)[places_N]
        squares.append((left.square().sum().item(), wanted[layer].square().sum().item()))
        return output + change_BTAD.to(output.dtype)

    with watched(base, solve):
        base.continue_from(start, batch.which_B, batch.ids_BT, batch.mask_BT)
    layers = tuple(Layer(one.kind, {**one.parts, "values": values[number]}) for number, one in enumerate(start.layers))
    off, whole = (sum(ones) for ones in zip(*squares, strict=True))
    return Matched(layers, (off / whole) ** 0.5, len(batch.scored_N))


def _by_head(numbers: Tensor, heads: int) -> Tensor:
    """[N, A, ...] as [K, N times A / K, ...]: all queries that read a key/value head."""
    return numbers.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)


def _least_squares(weights: Tensor, missing: Tensor) -> Tensor:
    """[K, P, D]: what to add to the values, weighted by `weights` [K, M, P], for as much of `missing` [K, M, D] as small changes can."""
    products, sides = (weights.mT @ other for other in (weights, missing))
    products, sides = products.cpu().double(), sides.cpu().double()
    diagonal = products.diagonal(dim1=1, dim2=2)
    diagonal += (RIDGE * diagonal.mean(dim=1, keepdim=True)).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.linalg.solve(products, sides).to(weights)
