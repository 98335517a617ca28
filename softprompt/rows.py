"""The rows of a run: loaded, encoded, counted."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from softprompt.config import Config
from softprompt.data import Example, Loaded, Rejected, hold_out, load_examples
from softprompt.encode import Encoder, shared_system
from softprompt.engine.tokens import Encoded
from softprompt.errors import ConfigError, DataError
from softprompt.scripts import scripts


@dataclass(frozen=True)
class Rows:
    """The rows of one split: what the model sees, the examples behind it in the same order, and what was rejected. `num_unlearned`:
    answers of conversations that are read and not learned."""

    encoded: tuple[Encoded, ...]
    examples: tuple[Example, ...]
    rejected: tuple[Rejected, ...]
    fingerprint: str
    labels: tuple[str, ...]
    num_unlearned: int = 0
    notes: tuple[str, ...] = ()

    @property
    def num_supervised(self) -> int:
        return sum(row.num_supervised for row in self.encoded)


def encode_rows(encoder: Encoder, loaded: Loaded, max_length: int) -> Rows:
    """Encodes every example; those that cannot be used join the rejected ones."""
    kept: list[tuple[Encoded, Example]] = []
    rejected = list(loaded.rejected)
    for example in loaded.examples:
        try:
            kept.append((encoder.encode(example, max_length), example))
        except DataError as error:
            rejected.append(Rejected(example.source, error.reason))
    encoded, examples = zip(*kept, strict=True) if kept else ((), ())
    num_unlearned = sum(map(encoder.num_unlearned, examples, encoded))
    return Rows(encoded, examples, tuple(rejected), loaded.fingerprint, loaded.labels, num_unlearned, loaded.notes)


def load_splits(config: Config) -> tuple[Loaded, Loaded | None]:
    """(training rows, held-out rows or None) of a configuration, before they are encoded."""
    if config.data.train is None:
        raise ConfigError("data.train is not set: name a file, a folder or a hub data set")
    words = config.data.label_words
    train = load_examples(config.data.train, limit=config.data.limit, label_words=words, columns=config.data.columns)
    if config.data.eval is not None:
        return train, load_examples(config.data.eval, label_words=words, columns=config.data.columns)
    if config.data.eval_fraction:
        return hold_out(train, config.data.eval_fraction, config.train.seed)
    return train, None


def load_held(config: Config) -> Loaded | None:
    """The held-out rows of `load_splits`, the training rows read only where these are a share of them."""
    if config.data.eval is not None:
        return load_examples(config.data.eval, label_words=config.data.label_words, columns=config.data.columns)
    return load_splits(config)[1] if config.data.eval_fraction else None


def load_rows(config: Config, encoder: Encoder) -> tuple[Encoder, Rows, Rows | None]:
    """The rows of `load_splits`, encoded, and the encoder, which also knows the system turn that all training rows share: held-out rows
    without one get it, as every question does. Does not judge how many were rejected."""
    train, held = load_splits(config)
    encoder = encoder.told(shared_system(train.examples))
    rows = encode_rows(encoder, train, config.data.max_length)
    return encoder, rows, None if held is None else encode_rows(encoder, held, config.data.max_length)


def check_rejected(rejected: Sequence[Rejected], max_rejected: int) -> None:
    """Raises DataError when more rows were rejected than allowed."""
    if len(rejected) > max_rejected:
        shown = "; ".join(f"{item.source}: {item.reason}" for item in rejected[:3])
        more = f"; and {len(rejected) - 3} more" if len(rejected) > 3 else ""
        raise DataError(f"{len(rejected)} rows rejected, data.max_rejected allows {max_rejected}: {shown}{more}")


# ---- counted -------------------------------------------------------------------------------------------------------


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


def labels(rows: Sequence[Example]) -> dict[str, int]:
    """Rows by label, the most frequent first; empty for rows without labels."""
    return dict(Counter(row.label for row in rows if row.label is not None).most_common())
