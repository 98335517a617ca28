"""What is wrong with rows before anything is trained. Knows texts alone, no tokens.

Rows are compared with runs of white space as single blanks. Near rows have most of their pieces of three characters in common, which
needs no words and so works for Chinese; they must do so too without the pieces that many rows have, for rows of one template are not
near for its sake. Candidates come from MinHash (Broder 1997) with locality-sensitive hashing, which misses one in a hundred pairs at
the threshold; their likeness is then counted.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from softprompt.data import Example

NEAR, PIECE = 0.7, 3
COMMON, COMMON_ROWS = 0.05, 20  # a piece in more than this share of the rows, and in more than so many, tells nothing
MEASURE = f"the Jaccard index of their {PIECE}-character pieces is {NEAR} or more, also without the pieces of over {COMMON:.0%} of the rows"
BANDS, HASHES = 16, 4  # finds a pair of likeness 0.7 with probability 0.988, of 0.8 with 0.9998

Pieces = NDArray[np.int32]


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
    """What is wrong, each kind in the order of the rows. Empty for sound rows."""

    duplicates: tuple[Duplicates, ...]
    near_duplicates: tuple[NearDuplicate, ...]
    in_both_splits: tuple[InBoth, ...]
    contradictions: tuple[Contradiction, ...]


def compare(train: Sequence[Example], held: Sequence[Example] = ()) -> Findings:
    """Every row with every other: 10,000 rows of 250 characters take about ten seconds on a core."""
    splits = {"train": train, "eval": held}
    return Findings(
        tuple(group for split, rows in splits.items() for group in _duplicates(split, rows)),
        tuple(pair for split, rows in splits.items() for pair in _near_duplicates(split, rows)),
        tuple(_in_both(train, held)),
        tuple(_contradictions([*train, *held])),
    )


def _duplicates(split: str, rows: Sequence[Example]) -> Iterable[Duplicates]:
    groups = defaultdict(list)
    for row in rows:
        groups[row.turns].append(row.source)
    return (Duplicates(split, tuple(places)) for places in groups.values() if len(places) > 1)


def _contradictions(rows: Sequence[Example]) -> Iterable[Contradiction]:
    groups: defaultdict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for row in rows:
        groups[row.turns[:-1]].setdefault(row.turns[-1], row.source)
    for question, answers in groups.items():
        if len(answers) > 1:
            yield Contradiction(question[-1], tuple(OneAnswer(place, answer) for answer, place in answers.items()))


def _near_duplicates(split: str, rows: Sequence[Example]) -> Iterable[NearDuplicate]:
    first = _places({row.source: row.turns for row in rows})
    places = list(first.values())
    for row, (like, likeness) in _near([" ".join(turns) for turns in first], len(first)).items():
        yield NearDuplicate(split, places[row], places[like], likeness)


def _in_both(train: Sequence[Example], held: Sequence[Example]) -> Iterable[InBoth]:
    whole = _places({row.source: row.turns for row in train})
    questions = _places({row.source: row.turns[:-1] for row in train})
    places = list(questions.values())
    asked = [" ".join(turns) for turns in [*questions, *(row.turns[:-1] for row in held)]]
    near = _near(asked, len(questions)) if held else {}
    for number, row in enumerate(held, len(questions)):
        question = row.turns[:-1]
        if row.turns in whole:
            yield InBoth(row.source, whole[row.turns], "row", 1.0)
        elif question in questions:
            yield InBoth(row.source, questions[question], "question", 1.0)
        elif number in near:
            like, likeness = near[number]
            yield InBoth(row.source, places[like], "near question", likeness)


def _places(texts: Mapping[str, tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Where each text stands first."""
    first: dict[tuple[str, ...], str] = {}
    for place, text in texts.items():
        first.setdefault(text, place)
    return first


def _near(texts: Sequence[str], num_kept: int) -> dict[int, tuple[int, float]]:
    """(the text that it is most like, their likeness) of every text that is near an earlier one.

    Of the first `num_kept` texts, those near no earlier one are kept to be compared with; of many near texts, one stands for all.
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    if not texts:
        return {}
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
