"""A prompt against what costs nothing: the bare base, and the same wish written as text.

All contestants see the same rows with the same supervised tokens; each is a prefix that is computed once.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from softprompt.artifact import StoredPrompt
from softprompt.batch import batches
from softprompt.data import Example, Loaded, Message
from softprompt.encode import Encoded, Encoder, Rows, encode_rows
from softprompt.errors import DataError
from softprompt.loss import token_losses
from softprompt.memory import token_budget
from softprompt.model import FrozenBase
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
        loss = _mean(losses_by_row(base, soft, encoded, budget), encoded)
        return Score(loss, math.exp(loss), label_accuracy(base, soft, prompt.encoder, rows, labels, budget, wish) if labels else None)

    return Evaluation(
        base=score(bare, None),
        text=score(bare, text) if text else None,
        prompt=score(prompt.soft, None),
        num_rows=len(rows.encoded),
        num_supervised=rows.num_supervised,
        num_rejected=len(rows.rejected),
    )


def held_out_loss(base: FrozenBase, soft: SoftPrompt, rows: Rows, tokens_per_batch: int) -> float:
    """Mean loss per supervised token over all rows."""
    return _mean(losses_by_row(base, soft, rows.encoded, tokens_per_batch), rows.encoded)


def text_loss(base: FrozenBase, encoder: Encoder, rows: Rows, text: str, tokens_per_batch: int) -> float:
    """Mean loss per supervised token of the bare base that is told `text`."""
    encoded = _with_wishes(encoder, rows, text)
    return _mean(losses_by_row(base, no_prompt(base, encoder.bos_id), encoded, tokens_per_batch), encoded)


@torch.no_grad()
def losses_by_row(base: FrozenBase, soft: SoftPrompt, rows: Sequence[Encoded], tokens_per_batch: int) -> Tensor:
    """[len(rows)] summed loss of every row's supervised tokens, float64 on the CPU."""
    prefix = prefix_of(base, [soft])
    sums = torch.zeros(len(rows), dtype=torch.float64)
    for batch in batches(rows, [0] * len(rows), tokens_per_batch, base.device):
        continued = base.continue_from(prefix, batch.which_B, batch.ids_BT, batch.mask_BT)
        losses = token_losses(base, continued, batch).double().cpu()
        sums.index_add_(0, torch.tensor(batch.rows)[batch.row_N.cpu()], losses)
    return sums


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


def label_accuracy(
    base: FrozenBase,
    soft: SoftPrompt,
    encoder: Encoder,
    rows: Rows,
    labels: Sequence[str],
    tokens_per_batch: int,
    wish: str | None = None,
) -> float:
    """Share of rows whose own label word (with EOS) is the likeliest of all label words, each of them whole, never cut.

    `wish`: a text prompt that stands before every row.
    """
    sums_by_label = []
    for label in labels:
        encoded = []
        for example in rows.examples:
            guess = replace(example, messages=(*example.messages[:-1], Message("assistant", label)))
            encoded.append(_with_wish(encoder, guess, encoder.encode(guess), wish))
        sums_by_label.append(losses_by_row(base, soft, encoded, tokens_per_batch))
    chosen = torch.stack(sums_by_label).argmin(dim=0)
    return sum(labels[index] == example.label for index, example in zip(chosen.tolist(), rows.examples, strict=True)) / len(rows.examples)
