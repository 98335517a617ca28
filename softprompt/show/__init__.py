"""What the model will see of the data: counts over all rows, what is wrong with them, and single rows token by token."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import median
from typing import Any

from softprompt.config import Config
from softprompt.data import Rejected
from softprompt.encode import Encoded, Encoder, Rows, load_rows, make_encoder
from softprompt.model import load_tokenizer
from softprompt.show.findings import MEASURE, Findings, compare, labels, scripts


@dataclass(frozen=True)
class Lengths:
    """Smallest, median and largest count."""

    smallest: int
    median: float
    largest: int


@dataclass(frozen=True)
class Cut:
    """A row whose end lies beyond data.max_length: how many of its `supervised` tokens are `lost`."""

    row: str
    lost: int
    supervised: int


@dataclass(frozen=True)
class Summary:
    """Counts over the rows of one split; lengths in tokens, BOS included. `share_lost`: of the supervised tokens, by cutting;
    `labels`: rows by label, empty where there are none; `scripts`: rows by the script of their question and of their answer."""

    num_rows: int
    num_rejected: int
    num_cut: int
    num_supervised: int
    lengths: Lengths | None
    supervised: Lengths | None
    share_lost: float
    cut: tuple[Cut, ...]
    labels: dict[str, int]
    scripts: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Shown:
    """The data of a configuration, encoded, with its summaries."""

    encoder: Encoder
    train: Rows
    held: Rows | None

    @cached_property
    def findings(self) -> Findings:
        """What is wrong with the rows; computed when it is first asked for."""
        return compare(self.train.examples, self.held.examples if self.held else ())

    @cached_property
    def summaries(self) -> dict[str, Summary]:
        """By split, train and, where there is one, eval."""
        splits = {"train": self.train, **({"eval": self.held} if self.held else {})}
        return {name: summarize(rows, self.encoder) for name, rows in splits.items()}

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        """The rows that cannot be used: without an answer, with an answer that is cut away as a whole, and others."""
        return self.train.rejected + (self.held.rejected if self.held else ())

    def as_dict(self, num_rows: int) -> dict[str, Any]:
        """The documented JSON of `softprompt show`."""
        summaries = {name: asdict(summary) for name, summary in self.summaries.items()}
        parts = {part: {name: summary.pop(part) for name, summary in summaries.items()} for part in ("cut", "labels", "scripts")}
        return {
            "train": summaries["train"],
            "eval": summaries.get("eval"),
            "rows": [self.row(row) for row in self.train.encoded[:num_rows]],
            "rejected": [asdict(item) for item in self.rejected],
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
    """Loads the tokenizer and the rows of a configuration. Raises what `train` would raise about them."""
    encoder = make_encoder(load_tokenizer(config.model), config.data.template)
    return Shown(encoder, *load_rows(config, encoder))


def summarize(rows: Rows, encoder: Encoder) -> Summary:
    """Counts over one split."""
    bos = int(encoder.bos_id is not None)
    cut = tuple(_cut(rows, encoder))
    lost = sum(row.lost for row in cut)
    texts = {"questions": (row.messages[-2].content for row in rows.examples), "answers": (row.response for row in rows.examples)}
    return Summary(
        num_rows=len(rows.encoded),
        num_rejected=len(rows.rejected),
        num_cut=len(cut),
        num_supervised=rows.num_supervised,
        lengths=_lengths([len(row) + bos for row in rows.encoded]),
        supervised=_lengths([row.num_supervised for row in rows.encoded]),
        share_lost=lost / max(1, lost + rows.num_supervised),
        cut=cut,
        labels=labels(rows.examples),
        scripts={part: scripts(own) for part, own in texts.items()},
    )


def _cut(rows: Rows, encoder: Encoder) -> Iterator[Cut]:
    for example, row in zip(rows.examples, rows.encoded, strict=True):
        if row.num_cut:
            whole = encoder.encode(example).num_supervised
            yield Cut(row.source, whole - row.num_supervised, whole)


def _lengths(counts: Sequence[int]) -> Lengths | None:
    return Lengths(min(counts), median(counts), max(counts)) if counts else None
