"""What is wrong with rows before anything is trained. Knows texts alone, no tokens.

Rows are compared with runs of white space as single blanks. Near rows have most of their pieces of three characters in common, which
needs no words and so works for Chinese; they must do so too without the pieces that many rows have, for rows of one template are not
near for its sake. Candidates come from MinHash (Broder 1997) with locality-sensitive hashing, which misses one in a hundred pairs at
the threshold; their likeness is then counted.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from softprompt.data import Example
from softprompt.extras import has
from softprompt.flat import turn_hashes
from softprompt.rows import sampled

NEAR, PIECE, NEAR_ROWS = 0.7, 3, 20_000
COMMON, COMMON_ROWS = 0.05, 20  # a piece in more than this share of the rows, and in more than so many, tells nothing
MEASURE = f"the Jaccard index of their {PIECE}-character pieces is {NEAR} or more, also without the pieces of over {COMMON:.0%} of the rows"
BANDS, HASHES = 16, 4  # finds a pair of likeness 0.7 with probability 0.988, of 0.8 with 0.9998

Pieces = NDArray[np.int32]
Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Duplicates:
    """Rows of one split (train or eval) that are the same, question and answer, in order."""

    split: str
    rows: tuple[str, ...]


@dataclass(frozen=True)
class NearDuplicate:
    """A row whose question and answer are nearly those of an earlier row of its split. `likeness`: Jaccard index of their pieces."""

    split: str
    row: str
    like: str
    likeness: float


@dataclass(frozen=True)
class InBoth:
    """A held-out row that a training row gives away: the same row, the same question with another answer, or nearly the question."""

    row: str
    train_row: str
    same: Literal["row", "question", "near question"]
    likeness: float


@dataclass(frozen=True)
class OneAnswer:
    """One of several answers to a question, and where it stands first."""

    row: str
    answer: str


@dataclass(frozen=True)
class Contradiction:
    """A question with different answers, wherever they stand."""

    question: str
    answers: tuple[OneAnswer, ...]


@dataclass(frozen=True)
class Findings:
    """What is wrong, each kind in the order of the rows. Empty for sound rows. `sampled`: how many rows the larger
    split has, where NEAR_ROWS of it were compared for being near. `near_compared`: False without scikit-learn, where none were."""

    duplicates: tuple[Duplicates, ...]
    near_duplicates: tuple[NearDuplicate, ...]
    in_both_splits: tuple[InBoth, ...]
    contradictions: tuple[Contradiction, ...]
    sampled: int | None = None
    near_compared: bool = True


@dataclass(frozen=True)
class Split:
    """Rows to compare. `turns` and `asked`: a hash of all turns of every row, and of those before the answer (flat.turn_hashes)."""

    name: str
    examples: Sequence[Example]
    turns: Hashes
    asked: Hashes

    @classmethod
    def of(cls, name: str, examples: Sequence[Example]) -> "Split":
        hashes = np.array([turn_hashes(example) for example in examples], np.uint64).reshape(-1, 2)
        return cls(name, examples, hashes[:, 0], hashes[:, 1])

    def place(self, number: int) -> str:
        return self.examples[number].source

    @property
    def looked_at(self) -> Sequence[int]:
        """The numbers of the rows that are compared for being near."""
        return sampled(len(self.examples), NEAR_ROWS)


def compare(train: Split, held: Split | None = None) -> Findings:
    """Every row with every other; for being near only NEAR_ROWS of a split, spread evenly: 10,000 rows of 250 characters take about ten
    seconds on a core."""
    held = held or Split.of("eval", ())
    splits = (train, held)
    return Findings(
        tuple(group for split in splits for group in _duplicates(split)),
        tuple(pair for split in splits for pair in _near_duplicates(split)),
        tuple(_in_both(train, held)),
        tuple(_contradictions(train, held)),
        max((len(split.examples) for split in splits if len(split.examples) > NEAR_ROWS), default=None),
        has("sklearn"),
    )


def _groups(hashes: Hashes) -> list[list[int]]:
    """The numbers of rows that share a hash, of every hash that several have, in the order of their first rows."""
    order = np.argsort(hashes, kind="stable")
    starts = np.flatnonzero(np.r_[True, hashes[order][1:] != hashes[order][:-1]]) if len(hashes) else np.zeros(0, np.int64)
    ends = np.r_[starts[1:], len(hashes)]
    several = np.flatnonzero(ends - starts > 1)
    return sorted(order[starts[group] : ends[group]].tolist() for group in several)


def _duplicates(split: Split) -> Iterator[Duplicates]:
    for group in _groups(split.turns):
        yield Duplicates(split.name, tuple(map(split.place, group)))


def _contradictions(train: Split, held: Split) -> Iterator[Contradiction]:
    turns, border = np.concatenate([train.turns, held.turns]), len(train.examples)
    for group in _groups(np.concatenate([train.asked, held.asked])):
        first: dict[int, int] = {}
        for number in group:
            first.setdefault(int(turns[number]), number)
        if len(first) > 1:
            rows = [train.examples[number] if number < border else held.examples[number - border] for number in first.values()]
            yield Contradiction(rows[0].turns[-2], tuple(OneAnswer(row.source, row.turns[-1]) for row in rows))


def _near_duplicates(split: Split) -> Iterator[NearDuplicate]:
    first = _first(split.looked_at, split.turns)
    rows = [split.examples[number] for number in first]
    for row, (like, likeness) in _near([" ".join(one.turns) for one in rows], len(rows)).items():
        yield NearDuplicate(split.name, rows[row].source, rows[like].source, likeness)


def _in_both(train: Split, held: Split) -> Iterator[InBoth]:
    whole, questions = _known(train.turns, held.turns), _known(train.asked, held.asked)
    known = [train.examples[number] for number in _first(train.looked_at, train.asked)] if len(held.examples) else []
    looked_at = list(held.looked_at)
    asked = [" ".join(row.turns[:-1]) for row in [*known, *(held.examples[number] for number in looked_at)]]
    found = _near(asked, len(known)) if known else {}
    near = {looked_at[at - len(known)]: like for at, like in found.items() if at >= len(known)}
    for number, (row, question) in enumerate(zip(whole, questions, strict=True)):
        if row is not None:
            yield InBoth(held.place(number), train.place(row), "row", 1.0)
        elif question is not None:
            yield InBoth(held.place(number), train.place(question), "question", 1.0)
        elif number in near:
            like, likeness = near[number]
            yield InBoth(held.place(number), known[like].source, "near question", likeness)


def _first(numbers: Iterable[int], hashes: Hashes) -> list[int]:
    """Of rows with the same hash the first."""
    first: dict[int, int] = {}
    for number in numbers:
        first.setdefault(int(hashes[number]), number)
    return list(first.values())


def _known(hashes: Hashes, wanted: Hashes) -> list[int | None]:
    """Where each wanted hash stands first, or None."""
    different, first = np.unique(hashes, return_index=True)
    at = np.searchsorted(different, wanted)
    return [
        int(first[place]) if place < len(different) and different[place] == one else None
        for place, one in zip(at.tolist(), wanted, strict=True)
    ]


def _near(texts: Sequence[str], num_kept: int) -> dict[int, tuple[int, float]]:
    """(the text that it is most like, their likeness) of every text that is near an earlier one.

    Empty without scikit-learn. Of the first `num_kept` texts, those near no earlier one are kept to be compared with; of many near texts,
    one stands for all.
    """
    if not texts or not has("sklearn"):
        return {}
    from sklearn.feature_extraction.text import HashingVectorizer

    pieces = HashingVectorizer(analyzer="char", ngram_range=(PIECE, PIECE), n_features=2**22, norm=None, alternate_sign=False, binary=True)
    counts_TF = pieces.transform(f" {text} " for text in texts)
    often_F = np.bincount(counts_TF.indices, minlength=counts_TF.shape[1]) > max(COMMON_ROWS, COMMON * len(texts))
    own = [np.sort(row) for row in np.split(counts_TF.indices, counts_TF.indptr[1:-1])]
    buckets: defaultdict[bytes, list[int]] = defaultdict(list)
    found = {}
    for number, keys in _bands([row[~often_F[row]] for row in own]):
        candidates = {other for key in keys for other in buckets.get(key, ())}
        alike = ((_likeness(own[number], own[other], often_F), -other) for other in candidates)
        likeness, other = max(alike, default=(0.0, 0))
        if likeness >= NEAR:
            found[number] = (-other, round(likeness, 3))
        elif number < num_kept:
            for key in keys:
                buckets[key].append(number)
    return found


def _bands(rows: Sequence[Pieces]) -> Iterator[tuple[int, list[bytes]]]:
    """(number, keys) of every row that has pieces; rows that share a key are likely alike. A key is a band of the row's MinHash."""
    full = [number for number, row in enumerate(rows) if len(row)]
    if not full:
        return
    flat = np.concatenate([rows[number] for number in full]).astype(np.uint32)
    starts = np.cumsum([0, *(len(rows[number]) for number in full[:-1])])
    factors, shifts = np.random.default_rng(0).integers(2**32, size=(2, BANDS * HASHES), dtype=np.uint32)
    smallest = [np.minimum.reduceat(flat * (factor | 1) + shift, starts) for factor, shift in zip(factors, shifts, strict=True)]
    bands = np.stack(smallest, axis=1).reshape(len(full), BANDS, HASHES)
    for number, row in zip(full, bands, strict=True):
        yield number, [bytes([index]) + band.tobytes() for index, band in enumerate(row)]


def _likeness(first: Pieces, second: Pieces, often_F: NDArray[np.bool_]) -> float:
    """Jaccard index of two sets of pieces: of all, or of those that are not frequent, whichever is less."""
    shared = np.intersect1d(first, second, assume_unique=True)
    rare = [own[~often_F[own]] for own in (shared, first, second)]
    return min(len(common) / (len(one) + len(other) - len(common)) for common, one, other in ((shared, first, second), rare))
