"""Answers beside each other, and where they differ from the reference."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

from softprompt.metrics import CJK, UNTRAINED, called
from softprompt.report.reading import Run

APART = 0.4  # likeness below which marks would say less than a word
PIECE = re.compile(rf"{CJK.pattern}|\s+|(?:(?!{CJK.pattern})\w)+|.", re.DOTALL)

Kind = Literal["same", "added", "missing"]


@dataclass(frozen=True)
class Said:
    """One answer in pieces. `how`: "as the reference", "with differences", or "different throughout", where none are marked."""

    name: str
    how: str
    pieces: list[tuple[Kind, str]]
    ended: bool


@dataclass(frozen=True)
class Sample:
    question: str
    reference: str
    answers: list[Said]


def samples(runs: Sequence[Run], num_rows: int) -> list[Sample]:
    """The first rows that every run's newest evaluation with answers has, each with the answers of all runs to it."""
    found: dict[tuple[str, str], dict[tuple[str, str], Said]] = {}
    for run in runs:
        evaluation = next((one for one in run.evaluations if one.answers), None)
        if evaluation is None:
            continue
        order = {name: number for number, name in enumerate(evaluation.contestants)}
        shown = [one for one in evaluation.answers if one.row < num_rows and one.contestant in order]
        for answer in sorted(shown, key=lambda one: (one.row, order[one.contestant])):
            shots = int(evaluation.contestants[answer.contestant].get("shots") or 0)
            known = called(answer.contestant, shots)
            name = known if len(runs) == 1 or answer.contestant in ("base", *UNTRAINED) else f"{run.name}: {known}"
            said = Said(name, *compared(answer.text, answer.reference), answer.ended)
            found.setdefault((answer.question, answer.reference), {})[name, answer.text] = said
    return [Sample(question, reference, list(own.values())) for (question, reference), own in found.items()]


def compared(answer: str, reference: str) -> tuple[str, list[tuple[Kind, str]]]:
    """How an answer stands to its reference, and its pieces: Chinese by characters, other text by words; none of white space alone."""
    if answer.strip() == reference.strip():
        return "as the reference", [("same", answer)]
    said, wanted = PIECE.findall(answer), PIECE.findall(reference)
    matcher = SequenceMatcher(None, wanted, said, autojunk=False)
    if matcher.ratio() < APART:
        return "different throughout", [("same", answer)] if answer.strip() else []
    pieces: list[tuple[Kind, str]] = []
    for tag, first, last, begin, end in matcher.get_opcodes():
        if tag == "equal":
            pieces.append(("same", "".join(said[begin:end])))
            continue
        parts: tuple[tuple[Kind, str], ...] = (("missing", "".join(wanted[first:last])), ("added", "".join(said[begin:end])))
        pieces += [(kind, text) for kind, text in parts if text]
    return "with differences", pieces
