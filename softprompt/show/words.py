"""What is wrong with the rows, in sentences: how many, why it matters, which rows."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from softprompt.extras import install_line
from softprompt.rows import SAMPLE
from softprompt.show import Shown
from softprompt.show.findings import MEASURE, NEAR_ROWS, InBoth, OneAnswer

QUOTED = 60  # characters
ONLY_LAST = "the chat template writes earlier answers otherwise than the last one; rows with one answer each teach all of them"
SPLITS = {"train": "training rows", "eval": "held-out rows"}
LIKE = {"row": "the same row", "question": "the same question, another answer", "near question": "nearly the question"}


@dataclass(frozen=True)
class Said:
    """A sentence, and a line for each of the rows that it is about."""

    sentence: str
    rows: tuple[str, ...]


def said_of(shown: Shown) -> list[Said]:
    """One for each kind of finding; empty for sound rows."""
    kinds = (_unusable, _cut, _unlearned, _control_tokens, _duplicates, _near_duplicates, _contradictions, _in_both_splits)
    return [said for kind in kinds for said in kind(shown) if said.rows] + [Said(note, ()) for note in _notes(shown)]


def _notes(shown: Shown) -> Iterator[str]:
    yield from shown.notes
    if max(summary.num_rows for summary in shown.summaries.values()) > SAMPLE:
        yield f"scripts are those of {SAMPLE:,} rows of a split, spread evenly"
    if not shown.findings.near_compared:
        yield f"rows that are nearly the same were not looked for, scikit-learn is not installed: {install_line('sklearn')}"
    elif shown.findings.sampled is not None:
        yield f"near rows were looked for among {NEAR_ROWS:,} of {shown.findings.sampled:,} rows, spread evenly; all else among all"


def _unusable(shown: Shown) -> Iterator[Said]:
    places: dict[str, list[str]] = {}
    for item in shown.rejected:
        places.setdefault(item.reason, []).append(item.source)
    for reason, rows in places.items():
        yield Said(f"{_rows(len(rows))} cannot be used: {reason}", tuple(rows))


def _cut(shown: Shown) -> Iterator[Said]:
    for split, summary in shown.summaries.items():
        rows = tuple(f"{row.row}: {row.lost} of {row.supervised} supervised tokens" for row in summary.cut)
        lost = (
            f"cut at data.max_length, {summary.share_lost:.1%} of all supervised tokens lost: raise data.max_length or shorten the answers"
        )
        yield Said(f"{len(rows)} {SPLITS[split]} {lost}", rows)


def _unlearned(shown: Shown) -> Iterator[Said]:
    sentence = f"{_rows(len(shown.unlearned))} of several answers, of which only the last is learned: {ONLY_LAST}"
    yield Said(sentence, tuple(f"{row.row}: {row.number} answer{_s(row.number)} not learned" for row in shown.unlearned))


def _control_tokens(shown: Shown) -> Iterator[Said]:
    sentence = (
        f"{_rows(len(shown.control_tokens))} that the tokenizer reads as more than text: it makes control tokens of these words wherever "
        "they stand; take them out"
    )
    yield Said(sentence, tuple(f"{row.row}: {' '.join(row.tokens)}" for row in shown.control_tokens))


def _duplicates(shown: Shown) -> Iterator[Said]:
    groups = shown.findings.duplicates
    number = sum(len(group.rows) - 1 for group in groups)
    sentence = f"{_rows(number)} too many, the same question and answer as an earlier row: leave one of each"
    yield Said(sentence, tuple(" = ".join(group.rows) for group in groups))


def _near_duplicates(shown: Shown) -> Iterator[Said]:
    pairs = shown.findings.near_duplicates
    sentence = f"{_rows(len(pairs))} nearly the same as an earlier row of the split: {MEASURE}"
    yield Said(sentence, tuple(f"{pair.row} is like {pair.like} ({pair.likeness:.2f})" for pair in pairs))


def _contradictions(shown: Shown) -> Iterator[Said]:
    found = shown.findings.contradictions
    sentence = f"{len(found)} question{_s(len(found))} with different answers: the prompt learns something between them"
    yield Said(sentence, tuple(f"{_quote(one.question)}: {_answers(one.answers)}" for one in found))


def _answers(answers: tuple[OneAnswer, ...]) -> str:
    return "; ".join(f"{answer.row} says {_quote(answer.answer)}" for answer in answers)


def _in_both_splits(shown: Shown) -> Iterator[Said]:
    found = shown.findings.in_both_splits
    kinds = Counter[str](pair.same for pair in found)
    how = ", ".join(f"{kinds[kind]} {name}" for kind, name in LIKE.items() if kinds[kind])
    held = len(shown.held.encoded) if shown.held else 0
    sentence = f"{len(found)} of {held} held-out rows given away by training rows ({how}): the held-out loss flatters the prompt"
    yield Said(f"{sentence}; take them out of one of the two", tuple(map(_pair, found)))


def _pair(pair: InBoth) -> str:
    near = f" ({pair.likeness:.2f})" if pair.likeness < 1 else ""
    return f"{pair.row}, training row {pair.train_row}: {LIKE[pair.same]}{near}"


def _rows(number: int) -> str:
    return f"{number} row{_s(number)}"


def _s(number: int) -> str:
    return "" if number == 1 else "s"


def _quote(text: str) -> str:
    return f"“{text[:QUOTED]}{'…' if len(text) > QUOTED else ''}”"
