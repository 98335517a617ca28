"""Questions with the teacher's answers, as rows for the student and as the teacher reads the same rows behind its text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from softprompt.contestants import Contestant
from softprompt.data import Example, Loaded, Rejected
from softprompt.data.examples import turns_text
from softprompt.encode import Encoder
from softprompt.engine.model import FrozenBase
from softprompt.engine.reading import Context
from softprompt.engine.teacher import Teacher
from softprompt.engine.tokens import Encoded, shared_beginning
from softprompt.errors import DataError
from softprompt.flat import FlatWriter
from softprompt.rows import Rows


@dataclass(frozen=True)
class Answered:
    """A question with the answer of teacher number `teacher`. `ended`: it came to its end before its tokens ran out."""

    example: Example
    ended: bool
    teacher: int


@dataclass(frozen=True)
class Lessons:
    """Rows as the student reads them, and the teacher that reads the same rows."""

    rows: Rows
    teacher: Teacher


def lessons_of(
    base: FrozenBase,
    encoder: Encoder,
    teachers: Sequence[Contestant],
    answered: Sequence[Answered | Rejected],
    max_length: int,
) -> Lessons:
    """Lessons from answers, of at most `max_length` tokens; what cannot be read is rejected. Raises DataError where nothing is left."""
    kept: list[tuple[Answered, Encoded, Encoded]] = []
    refused: list[Rejected] = []
    for one in answered:
        if isinstance(one, Rejected):
            refused.append(one)
            continue
        try:
            own = _as_said(encoder.encode(one.example, max_length), one, encoder)
            theirs = teachers[one.teacher].full(encoder, one.example, own)
        except DataError as error:
            refused.append(Rejected(one.example.source, error.reason))
            continue
        if base.context_length is not None and len(theirs) >= base.context_length:
            refused.append(Rejected(one.example.source, f"{len(theirs)} tokens with the text, the base's context is {base.context_length}"))
            continue
        kept.append((one, own, theirs))
    if not kept:
        raise DataError(f"no question can be used: {refused[0].source}: {refused[0].reason}" if refused else "there are no questions")
    return Lessons(_rows(kept, refused), _teacher(base, encoder, teachers, kept))


def _as_said(row: Encoded, one: Answered, encoder: Encoder) -> Encoded:
    """The row without the end that an answer did not come to."""
    if one.ended or row.num_cut:
        return row
    end = len(row) - 1 - row.supervised[::-1].index(True)
    cut = replace(row, ids=row.ids[:end], supervised=row.supervised[:end], num_cut=len(row) - end, num_lost=1)
    if not any(cut.supervised):
        raise DataError("the teacher's answer is empty", one.example.source)
    return cut


def _rows(kept: Sequence[tuple[Answered, Encoded, Encoded]], rejected: Sequence[Rejected]) -> Rows:
    writer, examples = FlatWriter(), tuple(one.example for one, _, _ in kept)
    for one, own, _ in kept:
        writer.add(own, one.example, turns_text(one.example), label=-1)
    writer.close()
    return Rows(writer.in_memory(), examples, tuple(rejected), Loaded(examples, ()).fingerprint, ())


def _teacher(
    base: FrozenBase, encoder: Encoder, teachers: Sequence[Contestant], kept: Sequence[tuple[Answered, Encoded, Encoded]]
) -> Teacher:
    """What all rows of one text begin with is read once, behind the text."""
    contexts: list[Context] = []
    rows: list[Encoded] = [theirs for _, _, theirs in kept]
    which = [0] * len(kept)
    for teacher, contestant in enumerate(teachers):
        own = [number for number, (one, _, _) in enumerate(kept) if one.teacher == teacher]
        if not own:
            continue
        shared = shared_beginning([rows[number] for number in own])
        for number in own:
            rows[number], which[number] = rows[number].after(len(shared)), len(contexts)
        contexts.append((contestant.members[0].soft, shared))
    return Teacher(tuple(contexts), tuple(rows), tuple(which))
