"""What the model will see of the data: counts over all rows, what is wrong with them, and single rows token by token."""

from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from softprompt.config import Config
from softprompt.data import Rejected
from softprompt.encode import Encoder
from softprompt.engine.tokens import Encoded
from softprompt.errors import DataError
from softprompt.events import Preparing, returned
from softprompt.rows import Rows, Summary, encoder_of, loading_rows, summarize
from softprompt.show.findings import MEASURE, Findings, Split, compare


@dataclass(frozen=True)
class Unlearned:
    """A conversation of which `number` answers are read and not learned."""

    row: str
    number: int


@dataclass(frozen=True)
class ControlTokens:
    """A row whose text holds what this tokenizer makes control tokens of."""

    row: str
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class Shown:
    """The data of a configuration, encoded, with its summaries."""

    encoder: Encoder
    train: Rows
    held: Rows | None

    @cached_property
    def findings(self) -> Findings:
        """What is wrong with the rows; computed when it is first asked for."""
        train, held = (
            None if rows is None else Split(name, rows.examples, rows.column("turns"), rows.column("asked"))
            for name, rows in (("train", self.train), ("eval", self.held))
        )
        assert train is not None
        return compare(train, held)

    @cached_property
    def summaries(self) -> dict[str, Summary]:
        """By split, train and, where there is one, eval."""
        splits = {"train": self.train, **({"eval": self.held} if self.held else {})}
        return {name: summarize(rows, self.encoder) for name, rows in splits.items()}

    @property
    def _splits(self) -> tuple[Rows, ...]:
        return (self.train,) if self.held is None else (self.train, self.held)

    @cached_property
    def unlearned(self) -> tuple[Unlearned, ...]:
        """Conversations of which the template lets the last answer alone be learned."""
        return tuple(
            Unlearned(rows.flat.place(int(number)), int(rows.column("unlearned")[number]))
            for rows in self._splits
            for number in np.flatnonzero(rows.column("unlearned"))
        )

    @property
    def control_tokens(self) -> tuple[ControlTokens, ...]:
        """Rows that hold control tokens, in spite of everything."""
        return tuple(ControlTokens(row, tokens) for rows in self._splits for row, tokens in rows.stubborn)

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        """The rows that cannot be used: without an answer, with an answer that is cut away as a whole, and others."""
        return self.train.rejected + (self.held.rejected if self.held else ())

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed about the files, and columns that are not used."""
        return tuple(dict.fromkeys(self.train.notes + (self.held.notes if self.held else ())))

    def as_dict(self, num_rows: int) -> dict[str, Any]:
        """The documented JSON of `softprompt show`."""
        summaries = {name: asdict(summary) for name, summary in self.summaries.items()}
        parts = {part: {name: summary.pop(part) for name, summary in summaries.items()} for part in ("cut", "labels", "scripts")}
        return {
            "train": summaries["train"],
            "eval": summaries.get("eval"),
            "rows": [self.row(row) for row in self.train.encoded[:num_rows]],
            "rejected": [asdict(item) for item in self.rejected],
            "unlearned": [asdict(row) for row in self.unlearned],
            "control_tokens": [asdict(row) for row in self.control_tokens],
            "system": self.encoder.system,
            "notes": list(self.notes),
            **asdict(self.findings),
            **parts,
            "measure": MEASURE,
        }

    def row(self, row: Encoded) -> dict[str, Any]:
        """One row: ids with BOS, labels with -100 where nothing is supervised, and the supervised text."""
        bos = [] if self.encoder.bos_id is None else [self.encoder.bos_id]
        labels = [-100] * len(bos) + [token if on else -100 for token, on in zip(row.ids, row.supervised, strict=True)]
        supervised = [token for token in labels if token != -100]
        return {
            "source": row.source,
            "input_ids": [*bos, *row.ids],
            "labels": labels,
            "num_cut": row.num_cut,
            "supervised_text": self.encoder.tokenizer.decode(supervised),
        }

    def pieces(self, row: Encoded) -> Iterator[tuple[str, bool]]:
        """A row's text in pieces, each supervised or not. Neighbouring tokens of one kind are decoded together, so that characters of
        several tokens stay whole."""
        facts = self.row(row)
        ids, on = facts["input_ids"], [label != -100 for label in facts["labels"]]
        start = 0
        for end in range(1, len(ids) + 1):
            if end == len(ids) or on[end] != on[start]:
                yield self.encoder.tokenizer.decode(ids[start:end]), on[start]
                start = end


def show(config: Config) -> Shown:
    """What `showing` returns."""
    return returned(showing(config))


def showing(config: Config) -> Generator[Preparing, None, Shown]:
    """Loads the tokenizer and the rows of a configuration, and yields how far it is. Raises what `train` would raise about them,
    DataError where no row is left."""
    shown = Shown(*(yield from loading_rows(config, encoder_of(config), judged=False)))
    if not shown.train.encoded:
        first = shown.train.rejected[0]
        raise DataError(f"none of the {len(shown.train.rejected)} rows can be used: {first.reason}", first.source)
    return shown
