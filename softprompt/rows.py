"""The rows of a run: loaded, encoded, counted."""

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softprompt.config import Config, Sources
from softprompt.data import Example, Loaded, Rejected, held_of
from softprompt.data.examples import turns_text
from softprompt.encode import Encoder, make_encoder
from softprompt.engine.tokens import Encoded
from softprompt.errors import ConfigError, DataError
from softprompt.events import Preparing, returned
from softprompt.flat import EncodedRows, Flat, FlatWriter, StoredExamples
from softprompt.prepared import Prepared, Wanted, preparing, rejected_by
from softprompt.scripts import scripts

SAMPLE = 2_000  # rows whose texts are looked at for their scripts; spread evenly where there are more
LISTED = 1_000  # rows that are named of those that were cut


@dataclass(frozen=True)
class Rows:
    """The rows of one split: their arrays, the examples behind them in the same order, and what was rejected. `stubborn`: see Prepared."""

    flat: Flat
    examples: Sequence[Example]
    rejected: tuple[Rejected, ...]
    fingerprint: str
    labels: tuple[str, ...]
    notes: tuple[str, ...] = ()
    stubborn: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def encoded(self) -> EncodedRows:
        """What the model sees, each row made when it is asked for."""
        return EncodedRows(self.flat)

    def column(self, name: str) -> NDArray[Any]:
        """One number of every row (flat.ROW)."""
        found: NDArray[Any] = self.flat.rows[name]
        return found

    @cached_property
    def num_questions(self) -> tuple[int, int]:
        """How many different questions were asked, and how many of them look different to the model."""
        asked, seen = (len(np.unique(self.column(name))) for name in ("asked", "seen"))
        return asked, seen

    @property
    def num_supervised(self) -> int:
        return int(self.column("supervised").sum(dtype=np.int64))

    @property
    def num_unlearned(self) -> int:
        """Answers of conversations that are read and not learned."""
        return int(self.column("unlearned").sum(dtype=np.int64))

    @property
    def system(self) -> str | None:
        """The system turn that all rows begin with, or None."""
        hashes = self.column("system")
        same = len(hashes) > 0 and hashes[0] != 0 and bool((hashes == hashes[0]).all())
        return self.examples[0].messages[0].content if same else None


def encode_rows(encoder: Encoder, loaded: Loaded, max_length: int) -> Rows:
    """Encodes every example; those that cannot be used join the rejected ones."""
    writer, kept, rejected, labels = FlatWriter(), list[Example](), list(loaded.rejected), loaded.labels
    for example in loaded.examples:
        try:
            row = encoder.encode(example, max_length)
        except DataError as error:
            rejected.append(rejected_by(error, example))
            continue
        kept.append(example)
        label = -1 if example.label is None else labels.index(example.label)
        writer.add(row, example, turns_text(example), label=label, unlearned=encoder.num_unlearned(example, row))
    writer.close()
    stubborn = tuple((example.source, found) for example in kept if (found := encoder.stubborn(example)))
    return Rows(writer.in_memory(), tuple(kept), tuple(rejected), loaded.fingerprint, labels, loaded.notes, stubborn)


def encoder_of(config: Config) -> Encoder:
    """That of a configuration, without the base's weights. Raises an Error of errors.py."""
    from softprompt.engine.loading import load_settings, load_tokenizer  # torch comes with it, and `softprompt init` goes without

    tokenizer, table = load_tokenizer(config.model), getattr(load_settings(config.model).get_text_config(decoder=True), "vocab_size", None)
    num_tokens = None if table is None else min(len(tokenizer), table)  # that of FrozenBase
    return make_encoder(tokenizer, config.data.template, date=config.data.date, num_tokens=num_tokens)


def load_splits(config: Config, encoder: Encoder) -> tuple[Loaded, Loaded | None]:
    """(training rows, held-out rows or None) of a configuration, those that can be used, for whoever encodes them otherwise."""
    _, train, held = load_rows(config, encoder)
    return _loaded(train), None if held is None else _loaded(held)


def _loaded(rows: Rows) -> Loaded:
    return Loaded(rows.examples, rows.rejected, rows.notes)


def load_held(config: Config, encoder: Encoder) -> Rows | None:
    """The held-out rows, encoded. `encoder`: that of the finished prompt, with its system turn. Training rows are read only where the
    held-out ones are a share of them."""
    if config.data.eval is not None:
        return _rows(returned(preparing(encoder, _wanted(config, config.data.eval, None))), None)
    return load_rows(config, encoder.told(None))[2] if config.data.eval_fraction else None


def _wanted(config: Config, source: Sources, limit: int | None, allowed: int | None = None) -> Wanted:
    data = config.data
    return Wanted(source, data.max_length, limit, data.label_words, data.columns, data.stream, data.cache, allowed)


def _source(config: Config) -> Sources:
    if config.data.train is None:
        raise ConfigError("data.train is not set: name a file, a folder or a hub data set")
    return config.data.train


def encode_file(
    source: Sources,
    tokenizer: Any,
    *,
    template: str = "human-assistant",
    max_length: int = 256,
    limit: int | None = None,
    label_words: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
    cache: bool = True,
) -> Rows:
    """The rows of a file, or of whatever `data.train` takes, as arrays for a training loop of one's own.

    With R rows and T tokens: `rows.flat.ids` int32 [T], `rows.flat.supervised` bool [T], and `rows.column("start")` int64 [R] and
    `rows.column("length")` int32 [R], so that the ids of row r are `ids[start[r] : start[r] + length[r]]`, without BOS; a token is scored
    where it is supervised. `rows.encoded[r]` is a row as a value, `rows.examples[r]` its turns, `rows.rejected` what cannot be used and
    why. From 2,000 rows on the arrays are mapped from files, kept in the cache. `tokenizer`: of transformers; the other arguments are
    those of [data] in a configuration. Raises ConfigError for a template that does not fit, DataError for a source that cannot be read.
    """
    wanted = Wanted(source, max_length, limit, label_words or {}, columns or {}, cache=cache)
    return _rows(returned(preparing(make_encoder(tokenizer, template), wanted)), None)


Loading = Generator[Preparing, None, tuple[Encoder, Rows, Rows | None]]


def load_rows(config: Config, encoder: Encoder) -> tuple[Encoder, Rows, Rows | None]:
    """What `loading_rows` returns. Does not judge how many were rejected."""
    return returned(loading_rows(config, encoder, judged=False))


def loading_rows(config: Config, encoder: Encoder, *, judged: bool = True) -> Loading:
    """The training and the held-out rows of a configuration, encoded, and the encoder, which also knows the system turn that all
    training rows share: held-out rows without one get it, as every question does. Yields how far it is.

    Raises DataError; where it is `judged`, also when more rows are rejected than `data.max_rejected` allows.
    """
    data, allowed = config.data, config.data.max_rejected if judged else None
    wanted = _wanted(config, _source(config), data.limit, allowed)
    found = yield from preparing(encoder, wanted)
    if data.eval is not None:
        train = _rows(found, None)
        encoder = encoder.told(train.system)
        held = yield from preparing(encoder, _wanted(config, data.eval, None, allowed))
        return encoder, train, _rows(held, None)
    if not data.eval_fraction:
        train = _rows(found, None)
        return encoder.told(train.system), train, None
    sides = np.array(held_of(found.flat.rows["turns"].tolist(), data.eval_fraction, config.train.seed), np.bool_)
    train, held_rows = _rows(found, ~sides), replace(_rows(found, sides), rejected=())
    encoder = encoder.told(train.system)
    if encoder.system is not None and not held_rows.column("system").all():
        told = yield from preparing(encoder, wanted)
        held_rows = _rows(told, np.isin(told.flat.rows["turns"], np.unique(found.flat.rows["turns"][sides])))
        held_rows = replace(held_rows, rejected=tuple(one for one in told.rejected if one not in found.rejected))
    return encoder, train, replace(held_rows, notes=(), stubborn=())


def _rows(found: Prepared, which: NDArray[np.bool_] | None) -> Rows:
    """The usable rows of a source, all or those of a mask."""
    mask = np.ones(len(found.flat.rows), np.bool_) if which is None else which
    fingerprint = found.fingerprint if which is None else found.flat.picked(mask).fingerprint()
    codes, first = np.unique(found.flat.rows["label"][mask], return_index=True)
    labels = tuple(found.labels[code] for _, code in sorted(zip(first.tolist(), codes.tolist(), strict=True)) if code >= 0)
    usable = mask & (found.flat.rows["length"] > 0)
    flat = found.flat if usable.all() else found.flat.picked(usable)
    stored = isinstance(found.examples, StoredExamples)
    examples = StoredExamples(flat, found.labels) if stored else tuple(compress(found.examples, usable))
    return Rows(flat, examples, found.rejected, fingerprint, labels, found.notes, found.stubborn)


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
    lost = int(rows.column("lost").sum(dtype=np.int64))
    cut = np.flatnonzero(rows.column("cut"))
    looked_at = [rows.examples[number] for number in sampled(len(rows.examples), SAMPLE)]
    texts = {"questions": (row.messages[-2].content for row in looked_at), "answers": (row.response for row in looked_at)}
    return Summary(
        num_rows=len(rows.encoded),
        num_rejected=len(rows.rejected),
        num_cut=len(cut),
        num_supervised=rows.num_supervised,
        lengths=_lengths(rows.column("length") + bos),
        supervised=_lengths(rows.column("supervised")),
        share_lost=lost / max(1, lost + rows.num_supervised),
        cut=tuple(_cut(rows.encoded[int(number)]) for number in cut[:LISTED]),
        labels=label_counts(rows),
        scripts={part: scripts(own) for part, own in texts.items()},
    )


def sampled(count: int, most: int) -> range | list[int]:
    """The numbers of all rows, or of `most` that are spread evenly."""
    return range(count) if count <= most else [index * count // most for index in range(most)]


def _cut(row: Encoded) -> Cut:
    return Cut(row.source, row.num_lost, row.num_supervised + row.num_lost)


def _lengths(counts: NDArray[Any]) -> Lengths | None:
    if not len(counts):
        return None
    middle = float(np.median(counts))
    return Lengths(int(counts.min()), int(middle) if middle.is_integer() else middle, int(counts.max()))


def label_counts(rows: Rows) -> dict[str, int]:
    """Rows by label, the most frequent first; empty for rows without labels."""
    names = dict(zip(*np.unique(rows.column("label"), return_counts=True), strict=True))
    first = {int(code): rows.examples[int(np.argmax(rows.column("label") == code))].label for code in names if code >= 0}
    return dict(Counter({str(name): int(names[code]) for code, name in first.items()}).most_common())
