"""What the model will see of the data: counts over all rows, and single rows token by token."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from softprompt.config import Config
from softprompt.encode import Encoded, Encoder, Rows, load_rows, make_encoder
from softprompt.model import load_tokenizer


@dataclass(frozen=True)
class Lengths:
    """Smallest, median and largest count."""

    smallest: int
    median: float
    largest: int


@dataclass(frozen=True)
class Summary:
    """Counts over the rows of one split; lengths in tokens, BOS included."""

    num_rows: int
    num_rejected: int
    num_cut: int
    num_supervised: int
    lengths: Lengths | None
    supervised: Lengths | None


@dataclass(frozen=True)
class Shown:
    """The data of a configuration, encoded, with its summaries."""

    encoder: Encoder
    train: Rows
    held: Rows | None

    def as_dict(self, num_rows: int) -> dict[str, Any]:
        """The documented JSON of `softprompt show`."""
        rows = [self.row(row) for row in self.train.encoded[:num_rows]]
        rejected = self.train.rejected + (self.held.rejected if self.held else ())
        return {
            "train": asdict(summarize(self.train, self.encoder)),
            "eval": asdict(summarize(self.held, self.encoder)) if self.held else None,
            "rows": rows,
            "rejected": [asdict(item) for item in rejected],
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


def show(config: Config) -> Shown:
    """Loads the tokenizer and the rows of a configuration. Raises what `train` would raise about them."""
    encoder = make_encoder(load_tokenizer(config.model), config.data.template)
    return Shown(encoder, *load_rows(config, encoder))


def summarize(rows: Rows, encoder: Encoder) -> Summary:
    """Counts over one split."""
    bos = int(encoder.bos_id is not None)
    return Summary(
        num_rows=len(rows.encoded),
        num_rejected=len(rows.rejected),
        num_cut=sum(row.num_cut > 0 for row in rows.encoded),
        num_supervised=rows.num_supervised,
        lengths=_lengths([len(row) + bos for row in rows.encoded]),
        supervised=_lengths([row.num_supervised for row in rows.encoded]),
    )


def _lengths(counts: Sequence[int]) -> Lengths | None:
    return Lengths(min(counts), median(counts), max(counts)) if counts else None
