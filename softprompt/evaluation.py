"""A prompt against what costs nothing: the bare base, and the same wish written as text.

All contestants see the same rows with the same supervised tokens; each is a prefix that is computed once.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from softprompt.artifact import StoredPrompt
from softprompt.batch import Batch, batches
from softprompt.data import Example, Loaded, Message
from softprompt.encode import Encoded, Encoder, Rows, encode_rows
from softprompt.errors import DataError
from softprompt.loss import token_losses
from softprompt.memory import token_budget
from softprompt.model import FrozenBase
from softprompt.prefix import Continued, Prefix, as_prefixes
from softprompt.prompt import SoftPrompt, no_prompt, prefix_of


@dataclass(frozen=True)
class Score:
    """`loss` per supervised token (natural log), `perplexity` = exp(loss), `accuracy` by likelihood of the label words
    (None for rows without labels)."""

    loss: float
    perplexity: float
    accuracy: float | None


@dataclass(frozen=True)
class Evaluation:
    """Scores of the contestants on the same rows. `text` is None when there is no text to compare with."""

    base: Score
    text: Score | None
    prompt: Score
    num_rows: int
    num_supervised: int
    num_rejected: int

    def as_dict(self) -> dict[str, Any]:
        """The documented JSON of `softprompt eval`."""
        contestants = {
            name: asdict(score) if score else None for name, score in (("base", self.base), ("text", self.text), ("prompt", self.prompt))
        }
        return {
            "contestants": contestants,
            "rows": self.num_rows,
            "supervised_tokens": self.num_supervised,
            "rejected": self.num_rejected,
        }


@torch.no_grad()
def evaluate(
    base: FrozenBase, prompt: StoredPrompt, loaded: Loaded, *, text: str | None = None, tokens_per_batch: int | None = None
) -> Evaluation:
    """Held-out loss, perplexity and, for label data, accuracy of base, text prompt and soft prompt.

    `text` stands in for the prompt's own init text as the hard prompt. Raises DataError when no row can be used.
    """
    rows = encode_rows(prompt.encoder, loaded, prompt.card.max_length)
    if not rows.encoded:
        raise DataError(f"no usable row: {rows.rejected[0].source}: {rows.rejected[0].reason}")
    text = text if text is not None else prompt.card.text
    bare = no_prompt(base, prompt.encoder.bos_id)
    budget = token_budget(base.model.base_model, base.device, tokens_per_batch)
    labels = tuple(dict.fromkeys(prompt.card.data.labels + rows.labels)) if rows.labels else ()

    def score(soft: SoftPrompt, wish: str | None) -> Score:
        encoded = _with_wishes(prompt.encoder, rows, wish)
        prefix = prefix_of(base, [soft])
        if not labels:
            loss = _mean(row_losses(base, prefix, encoded, budget), encoded)
            return Score(loss, math.exp(loss), None)
        guesses = with_labels(prompt.encoder, rows, labels, wish)
        losses_RC = candidate_losses(base, prefix, [[row, *own] for row, own in zip(encoded, guesses, strict=True)], budget)
        loss = _mean(losses_RC[:, 0], encoded)
        return Score(loss, math.exp(loss), _accuracy(losses_RC[:, 1:], labels, rows))

    return Evaluation(
        base=score(bare, None),
        text=score(bare, text) if text else None,
        prompt=score(prompt.soft, None),
        num_rows=len(rows.encoded),
        num_supervised=rows.num_supervised,
        num_rejected=len(rows.rejected),
    )


def _accuracy(losses_RC: Tensor, labels: Sequence[str], rows: Rows) -> float:
    """Share of rows whose own label word is the likeliest of all label words."""
    chosen = losses_RC.argmin(dim=1).tolist()
    return sum(labels[index] == example.label for index, example in zip(chosen, rows.examples, strict=True)) / len(rows.examples)


@torch.no_grad()
def held_out_loss(base: FrozenBase, soft: SoftPrompt, rows: Rows, tokens_per_batch: int) -> float:
    """Mean loss per supervised token over all rows."""
    return _mean(row_losses(base, prefix_of(base, [soft]), rows.encoded, tokens_per_batch), rows.encoded)


@torch.no_grad()
def text_loss(base: FrozenBase, encoder: Encoder, rows: Rows, text: str, tokens_per_batch: int) -> float:
    """Mean loss per supervised token of the bare base that is told `text`."""
    encoded = _with_wishes(encoder, rows, text)
    return _mean(row_losses(base, prefix_of(base, [no_prompt(base, encoder.bos_id)]), encoded, tokens_per_batch), encoded)


@torch.no_grad()
def row_losses(
    base: FrozenBase, prefix: Prefix, rows: Sequence[Encoded], tokens_per_batch: int, which: Sequence[int] | None = None
) -> Tensor:
    """[len(rows)] summed loss of every row's supervised tokens, float64 on the CPU. Row i continues from prefix number `which[i]`,
    all of them from the first where nothing is said."""
    sums = torch.zeros(len(rows), dtype=torch.float64)
    for batch in batches(rows, which or [0] * len(rows), tokens_per_batch, base.device):
        continued = base.continue_from(prefix, batch.which_B, batch.ids_BT, batch.mask_BT)
        _add_losses(sums, base, continued, batch)
    return sums


def _add_losses(sums: Tensor, base: FrozenBase, continued: Continued, batch: Batch) -> None:
    if not len(batch.targets_N):
        return
    losses = token_losses(base, continued, batch).double().cpu()
    sums.index_add_(0, torch.tensor(batch.rows)[batch.row_N.cpu()], losses)


@torch.no_grad()
def candidate_losses(base: FrozenBase, prefix: Prefix, rows: Sequence[Sequence[Encoded]], tokens_per_batch: int) -> Tensor:
    """[rows, candidates] summed loss of every row's supervised tokens with each of its candidates, float64 on the CPU.

    `rows[r][c]` is row r with candidate c. What a row's candidates have in common is read once, and each goes on from there.
    """
    shared = [_num_shared(candidates) for candidates in rows]
    if not base.shares_prefix or min(shared) < 2:
        columns = [row_losses(base, prefix, candidates, tokens_per_batch) for candidates in zip(*rows, strict=True)]
        return torch.stack(columns, dim=1)
    texts = [Encoded(row[0].ids[:count], row[0].supervised[:count]) for row, count in zip(rows, shared, strict=True)]
    of_texts, of_tails = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), len(rows[0]), dtype=torch.float64)
    for batch in batches(texts, [0] * len(texts), tokens_per_batch, base.device):
        read = base.continue_from(prefix, batch.which_B, batch.ids_BT, batch.mask_BT, keep=True)
        _add_losses(of_texts, base, read, batch)
        tails = [_from(candidate, shared[row] - 1) for row in batch.rows for candidate in rows[row]]
        which = [index for index in range(len(batch.rows)) for _ in rows[0]]
        of_tails[list(batch.rows)] = row_losses(base, as_prefixes(read), tails, tokens_per_batch, which).view(len(batch.rows), -1)
    return of_texts[:, None] + of_tails


def _num_shared(candidates: Sequence[Encoded]) -> int:
    """Tokens at the beginning that all candidates of a row have, less than any of them has in all."""
    columns = zip(*(candidate.ids[:-1] for candidate in candidates), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _from(row: Encoded, first: int) -> Encoded:
    return Encoded(row.ids[first:], row.supervised[first:])


def _mean(sums: Tensor, rows: Sequence[Encoded]) -> float:
    return sums.sum().item() / sum(row.num_supervised for row in rows)


def _with_wishes(encoder: Encoder, rows: Rows, wish: str | None) -> list[Encoded]:
    return [_with_wish(encoder, example, row, wish) for example, row in zip(rows.examples, rows.encoded, strict=True)]


def _with_wish(encoder: Encoder, example: Example, row: Encoded, wish: str | None) -> Encoded:
    """The row with a text prompt as its system turn; cut where the plain row was cut, so that the same tokens are scored."""
    if wish is None:
        return row
    system = [message.content for message in example.messages if message.role == "system"]
    spoken = tuple(message for message in example.messages if message.role != "system")
    for turns in ((Message("system", "\n".join([wish, *system])), *spoken), _in_first_turn(wish, system, spoken)):
        try:
            full = encoder.encode(replace(example, messages=turns))
            break
        except DataError as error:  # some chat templates know no system turn
            refused = error
    else:
        raise refused
    keep = len(full) - row.num_cut
    return Encoded(full.ids[:keep], full.supervised[:keep], row.source, row.num_cut)


def _in_first_turn(wish: str, system: Sequence[str], spoken: Sequence[Message]) -> tuple[Message, ...]:
    return (Message("user", "\n".join([wish, *system, spoken[0].content])), *spoken[1:])


def with_labels(encoder: Encoder, rows: Rows, labels: Sequence[str], wish: str | None = None) -> list[list[Encoded]]:
    """Every row with each of the label words (and EOS) as its answer, whole, never cut. `wish`: a text prompt before every row."""

    def guessed(example: Example, label: str) -> Encoded:
        guess = replace(example, messages=(*example.messages[:-1], Message("assistant", label)))
        return _with_wish(encoder, guess, encoder.encode(guess), wish)

    return [[guessed(example, label) for label in labels] for example in rows.examples]
