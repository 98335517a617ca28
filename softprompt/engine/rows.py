"""What an open batch is computed by: rows that read texts and go on by a token. The base itself (reading.py), or another engine over a
base that it holds in its own form.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from softprompt.engine.choose import Likelihood
from softprompt.engine.prompt import Prompt

Context = tuple[Prompt, tuple[int, ...]]  # what a text continues from: a prompt, and the ids behind it


@dataclass(eq=False)
class Text:
    """A text that is being read. `keep`: of its first tokens so many are worth keeping, for others that begin with them. `top`: its
    tokens' likelihoods are wanted, with so many of the likeliest beside each.

    `num_read`: tokens so far, of which `num_cached`, with what is before them, were at hand.
    """

    context: Context
    ids: tuple[int, ...]
    keep: int = 0
    top: int | None = None
    num_read: int = 0
    num_cached: int = 0
    scores: list[Likelihood] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        return len(self.ids) - self.num_read

    def next_count(self, most: int) -> int:
        """Tokens to read next, `most` at most; it stops where its beginning is worth keeping."""
        to_keep = self.keep - self.num_read
        return min(most, self.num_left, to_keep if to_keep > 0 else most)


class Rows(Protocol):
    """The rows of one open batch."""

    @property
    def most_positions(self) -> int:
        """That all of them together may have."""

    @property
    def num_bytes(self) -> int:
        """What the layers keep of them."""

    @property
    def kept_bytes(self) -> int:
        """What the layers keep of prompts, and of beginnings of texts, that nobody has to ask for."""

    def text(self, context: Context, ids: tuple[int, ...], keep: int, top: int | None) -> Text:
        """A text to be read, of which nothing is read."""

    def begin(self, text: Text) -> None:
        """What is at hand of a text counts as read; once."""

    def read_on(self, text: Text, most: int) -> None:
        """The next tokens of a text, `most` at most; it stops where its beginning is worth keeping, and keeps it."""

    def join(self, texts: Sequence[Text]) -> None:
        """Reads all that is left of these texts; each is a row then, behind those that are."""

    def next(self, ids: Sequence[int]) -> None:
        """One more token of every row."""

    def logits(self) -> Tensor:
        """[B, V]: of every row's next token."""

    def keep(self, rows: Sequence[int]) -> None:
        """Leaves the rows of these numbers, in this order."""

    def forget(self, texts: Sequence[Text]) -> None:
        """These are not read any further."""


class Base(Protocol):
    """What answers are made over, as far as tokens and texts are concerned."""

    @property
    def name(self) -> str: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def stop_ids(self) -> frozenset[int]: ...
    @property
    def context_length(self) -> int | None: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def tokenizer_fingerprint(self) -> str: ...


class Held(Base, Protocol):
    """A base that another engine holds, in its own form."""

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]: ...

    def other_than(self, fingerprint: str, model_type: str, bos: Tensor | None, bos_id: int | None) -> bool:
        """Whether a prompt was trained on other weights: of this fingerprint, on a base of this type. `bos`: what its file holds of the BOS
        in front of it, if anything."""

    def rows(self) -> Rows: ...
