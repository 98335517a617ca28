"""Questions with answers, as rows for the student and as the teacher reads the same rows behind its text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from softprompt.contestants import Contestant
from softprompt.data import Example, Loaded, Rejected
from softprompt.data.examples import turns_text
from softprompt.encode import Encoder
from softprompt.engine.model import FrozenBase
from softprompt.engine.rows import Context
from softprompt.engine.shelf import Shelf
from softprompt.engine.teacher import ROOM, Teacher, Teaching
from softprompt.engine.tokens import Encoded, shared_beginning
from softprompt.errors import DataError
from softprompt.flat import FlatWriter
from softprompt.rows import Rows


@dataclass(frozen=True)
class Answered:
    """A question with its answer, which teacher number `teacher` judges. `ended`: it came to its end before its tokens ran out.
    `number`: its line in study.jsonl."""

    example: Example
    ended: bool
    teacher: int
    number: int = -1


@dataclass(frozen=True)
class Read:
    """An answered question as the student reads it, and as the teacher does, its text included; `sure`: see Teacher."""

    answered: Answered
    own: Encoded
    theirs: Encoded
    sure: tuple[int, ...]


@dataclass(frozen=True)
class Lessons:
    """Rows as the student reads them, and the teacher that reads the same rows."""

    rows: Rows
    teacher: Teaching


class Classroom:
    """How answered questions become lessons, of at most `max_length` tokens. What the teacher reads before all of them is read once."""

    def __init__(self, base: FrozenBase, encoder: Encoder, teachers: Sequence[Contestant], max_length: int) -> None:
        self.base, self.encoder, self.teachers, self.max_length = base, encoder, tuple(teachers), max_length
        self.contexts: tuple[Context, ...] = ()
        self._shelf = Shelf(ROOM)

    def read(self, answered: Sequence[Answered | Rejected]) -> tuple[list[Read], list[Rejected]]:
        """What can be read, and what cannot, with the reason."""
        found: list[Read] = []
        refused: list[Rejected] = []
        for one in answered:
            try:
                if isinstance(one, Rejected):
                    refused.append(one)
                else:
                    found.append(self._read(one))
            except DataError as error:
                refused.append(Rejected(one.example.source if isinstance(one, Answered) else one.source, error.reason))
        return found, refused

    def begin(self, read: Sequence[Read]) -> None:
        """Finds out what each teacher reads before everything that is asked of it."""
        of_teacher = [[one.theirs for one in read if one.answered.teacher == number] for number in range(len(self.teachers))]
        shared = [shared_beginning(rows) if rows else () for rows in of_teacher]
        self.contexts = tuple((one.members[0].soft, ids) for one, ids in zip(self.teachers, shared, strict=True))

    def lessons(self, read: Sequence[Read], refused: Sequence[Rejected] = ()) -> Lessons:
        """Raises DataError where nothing is left."""
        rows = rows_of([(one.own, one.answered.example) for one in read], refused)
        return Lessons(rows, self.teacher(read))

    def teacher(self, read: Sequence[Read]) -> Teacher:
        """The base with its texts, which reads these rows behind them."""
        which = tuple(one.answered.teacher for one in read)
        theirs = tuple(one.theirs.after(len(self.contexts[one.answered.teacher][1])) for one in read)
        return Teacher(self.contexts, theirs, which, tuple(one.sure for one in read), self._shelf)

    def _read(self, one: Answered) -> Read:
        own = _as_said(self.encoder.encode(one.example, self.max_length), one)
        theirs, sure = self.teachers[one.teacher].as_text(self.encoder, one.example, own)
        longest = self.base.context_length
        if longest is not None and len(theirs) >= longest:
            raise DataError(f"{len(theirs)} tokens with the text, the base's context is {longest}", one.example.source)
        return Read(one, own, theirs, sure)


def rows_of(read: Sequence[tuple[Encoded, Example]], refused: Sequence[Rejected]) -> Rows:
    """Rows as the student reads them. Raises DataError where there are none."""
    if not read:
        raise DataError(f"no question can be used: {refused[0].source}: {refused[0].reason}" if refused else "there are no questions")
    writer, examples = FlatWriter(), tuple(example for _, example in read)
    for own, example in read:
        writer.add(own, example, turns_text(example), label=-1)
    writer.close()
    return Rows(writer.in_memory(), examples, tuple(refused), Loaded(examples, ()).fingerprint, ())


def _as_said(row: Encoded, one: Answered) -> Encoded:
    """The row without the end that an answer did not come to."""
    if one.ended or row.num_cut:
        return row
    end = len(row) - 1 - row.supervised[::-1].index(True)
    cut = replace(row, ids=row.ids[:end], supervised=row.supervised[:end], num_cut=len(row) - end, num_lost=1)
    if not any(cut.supervised):
        raise DataError("the answer is empty", one.example.source)
    return cut
