"""What a prompt's rows are: their size, what they lie near, how far they moved, and what each is worth.

Shapes: P virtual tokens, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from softprompt.artifact import StoredPrompt
from softprompt.card import Card
from softprompt.engine.likelihood import row_losses
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import Prompt, SoftPrompt, no_prompt, read_together
from softprompt.engine.tokens import Encoded
from softprompt.errors import ConfigError

IDS, NEAR, PROMPTS = 8192, 3, 16  # vocabulary rows at a time, neighbours shown, prompts at a time
DRAWN = 4096  # vocabulary rows whose sizes are measured
UNIMPORTANT = 0.01  # share of the prompt's gain that a row may be worth and still be left out
CAUTION = (
    "The nearest tokens of a row do not say what the prompt does: prompts that solve a task can lie next to any text, of the same "
    "meaning or not (Khashabi et al. 2022)."
)


@dataclass(frozen=True)
class RowFacts:
    """One row. `size`: its RMS, as a share of the base's embedding rows'. `near`: tokens with their cosine, the nearest first.
    `drift`: the RMS of what it moved from its start, in the same units. `worth`: what the loss rises by without it."""

    size: float
    near: list[tuple[str, float]]
    drift: float | None
    worth: float | None


@dataclass(frozen=True)
class Inspection:
    """A prompt's facts. `cosines` [P, P] between its rows, `alike` their mean and the largest. `vocabulary`: the size of the base's
    own rows, as the 5th, 50th and 95th of a hundred; None for a deep prompt. `loss` and `bare_loss` on `num_rows` rows."""

    card: Card
    rows: list[RowFacts]
    cosines: list[list[float]]
    alike: tuple[float, float] | None
    vocabulary: tuple[float, float, float] | None
    loss: float | None = None
    bare_loss: float | None = None
    num_rows: int = 0

    @property
    def expendable(self) -> list[int]:
        """Rows that are worth less than UNIMPORTANT of what the whole prompt gains, counted from 0."""
        if self.loss is None or self.bare_loss is None:
            return []
        gain = max(0.0, self.bare_loss - self.loss)
        return [index for index, row in enumerate(self.rows) if row.worth is not None and row.worth < UNIMPORTANT * gain]

    def as_dict(self) -> dict[str, Any]:
        """The documented JSON of `softprompt inspect`."""
        return {
            "base": self.card.base.name,
            "method": self.card.method,
            "position": self.card.position,
            "init": self.card.init,
            "rows": [asdict(row) for row in self.rows],
            "cosine_between_rows": None if self.alike is None else {"mean": self.alike[0], "largest": self.alike[1]},
            "cosines": [[round(cosine, 3) for cosine in row] for row in self.cosines],
            "vocabulary_sizes": self.vocabulary,
            "loss": self.loss,
            "bare_loss": self.bare_loss,
            "held_out_rows": self.num_rows,
            "expendable": self.expendable,
        }


@torch.no_grad()
def inspect(
    base: FrozenBase, prompt: StoredPrompt, held: Sequence[Encoded] = (), start: Prompt | None = None, tokens_per_batch: int = 256
) -> Inspection:
    """The facts of a prompt; what its rows are worth is measured on `held`, how far they moved from `start`, where these are given."""
    soft, learned_PD = prompt.soft, prompt.soft.learned_PD
    scale = base.rms if soft.method == "prompt" else learned_PD.square().mean().sqrt().item()  # layers have no scale in common
    sizes = (learned_PD.square().mean(dim=1).sqrt() / scale).tolist()
    drifts: Sequence[float | None] = [None] * soft.length
    if start is not None and start.learned_PD.shape == learned_PD.shape:
        moved_PD = soft.learned_like(start) - start.learned_PD.to(learned_PD.device)
        drifts = (moved_PD.square().mean(dim=1).sqrt() / start.unit(base)).tolist()
    near = nearest_tokens(base, soft.rows_PH) if isinstance(soft, SoftPrompt) else [[] for _ in sizes]
    loss, bare_loss = None, None
    worth: Sequence[float | None] = [None] * soft.length
    if held:
        (bare_loss,) = leave_out_losses(base, no_prompt(base, prompt.encoder.bos_id), held, [()], tokens_per_batch)
        loss, *shortened = leave_out_losses(base, soft, held, [(), *((index,) for index in range(soft.length))], tokens_per_batch)
        worth = [one - loss for one in shortened]
    rows = [RowFacts(*facts) for facts in zip(sizes, near, drifts, worth, strict=True)]
    unit_PD = normalize(learned_PD, dim=1)
    cosines_PP = unit_PD @ unit_PD.T
    vocabulary = _vocabulary_sizes(base) if soft.method == "prompt" else None
    return Inspection(prompt.card, rows, cosines_PP.tolist(), _alike(cosines_PP), vocabulary, loss, bare_loss, len(held))


def _vocabulary_sizes(base: FrozenBase) -> tuple[float, float, float]:
    """Of tokens drawn from the vocabulary, the small, the usual and the large."""
    sizes = base.drawn_rows(DRAWN, 0).square().mean(dim=1).sqrt() / base.rms
    low, usual, high = sizes.quantile(torch.tensor([0.05, 0.5, 0.95], device=sizes.device)).tolist()
    return low, usual, high


def _alike(cosines_PP: Tensor) -> tuple[float, float] | None:
    if len(cosines_PP) < 2:
        return None
    pairs = cosines_PP[tuple(torch.triu_indices(len(cosines_PP), len(cosines_PP), 1))]
    return pairs.mean().item(), pairs.max().item()


def nearest_tokens(base: FrozenBase, rows_PH: Tensor) -> list[list[tuple[str, float]]]:
    """Of every row the NEAR tokens of the vocabulary with the largest cosine."""
    unit_PH = normalize(rows_PH.to(base.device), dim=1)
    best, ids = torch.full((len(rows_PH), 0), -1.0), torch.zeros(len(rows_PH), 0, dtype=torch.long)
    for first in range(0, base.num_tokens, IDS):
        some = torch.arange(first, min(first + IDS, base.num_tokens))
        cosines = (unit_PH @ normalize(base.embed_ids(some.tolist()), dim=1).T).cpu()
        every, numbers = torch.cat([best, cosines], dim=1), torch.cat([ids, some.expand(len(rows_PH), -1)], dim=1)
        best, order = every.topk(min(NEAR, every.shape[1]), dim=1)
        ids = numbers.gather(1, order)
    return [
        [(base.tokenizer.decode([token]), cosine) for token, cosine in zip(own, near, strict=True)]
        for own, near in zip(ids.tolist(), best.tolist(), strict=True)
    ]


def without(soft: Prompt, left_out: Sequence[int]) -> Prompt:
    """The prompt without some of its rows."""
    return soft.with_learned(soft.learned_PD[[index for index in range(soft.length) if index not in set(left_out)]])


def leave_out_losses(
    base: FrozenBase, soft: Prompt, held: Sequence[Encoded], choices: Sequence[Sequence[int]], tokens_per_batch: int
) -> list[float]:
    """Mean loss per supervised token without the rows of every choice; many shortened prompts share a forward."""
    losses = []
    for first in range(0, len(choices), PROMPTS):
        some = [without(soft, choice) for choice in choices[first : first + PROMPTS]]
        which = [index for index in range(len(some)) for _ in held]
        prefix, rows = read_together(base, some, list(held) * len(some), tokens_per_batch)
        sums = row_losses(base, prefix, rows, tokens_per_batch, which).view(len(some), -1).sum(dim=1)
        losses += (sums / sum(row.num_supervised for row in held)).tolist()
    return losses


@torch.no_grad()
def prune(
    base: FrozenBase, prompt: StoredPrompt, held: Sequence[Encoded], keep: int, tokens_per_batch: int = 256
) -> tuple[StoredPrompt, float, float]:
    """(the prompt with `keep` of its rows, loss before, loss after): the row that is missed least goes first, then the next one.

    Raises ConfigError where that is no shorter prompt, or there are no rows to measure on.
    """
    soft = prompt.soft
    if not 0 < keep < soft.length:
        raise ConfigError(f"--keep {keep}: the prompt has {soft.length} rows, keep fewer of them and at least one")
    if not held:
        raise ConfigError("which rows are missed least is measured on held-out rows: give --data FILE")
    (before,) = leave_out_losses(base, soft, held, [()], tokens_per_batch)
    after = before
    while soft.length > keep:
        losses = leave_out_losses(base, soft, held, [(index,) for index in range(soft.length)], tokens_per_batch)
        after = min(losses)
        soft = without(soft, (losses.index(after),))
    note = f"{keep} of the {prompt.soft.length} rows of a prompt that was started with: {prompt.card.init}"
    metrics = {**prompt.card.metrics, "eval_loss_before": before, "eval_loss": after}
    card = prompt.card.model_copy(update={"num_virtual_tokens": keep, "init": note, "metrics": metrics})
    return replace(prompt, soft=soft, card=card), before, after
