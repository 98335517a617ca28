"""A file of questions becomes a file of answers: each answer stands beside its row's own fields, is written as it comes and in the
file's order. What was stopped goes on, and several processes may share a file.

The rows are answered in windows. A window is one batch that nothing else joins, so its answers are the same whoever makes them and
however often: a kill costs at most one window, and the bytes of the file are those of a run that nobody stopped. Beside the answers lie
what they were made with (`answers.jsonl.settings.json`) and, until the end, a folder `answers.jsonl.parts`: a lock for every window that
somebody works on, and windows that are complete while one before them is not.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softprompt.atomic import locked, write_text
from softprompt.data import Questions, Unanswered
from softprompt.engine.decode import Question
from softprompt.engine.model import FrozenBase
from softprompt.engine.rows import Held
from softprompt.errors import ConfigError, DataError
from softprompt.formats import ANSWERS, newer
from softprompt.generation import Answerer, Ensemble, pieces_of, prepared
from softprompt.sampling import Sampling

WINDOW = 1024  # rows: what a kill may cost, and how far answers may come out of order; at its end the batch runs empty
PAUSE = 0.05  # seconds between two writings: with every answer, the lock would be a tenth of the work on the smallest bases
ALONE = "start no second process on this file"  # where there are no locks
PATIENCE = 0.2  # seconds until a process that finds all windows taken looks again


@dataclass(frozen=True)
class Named:
    """The fields of a line that are not the row's own."""

    answer: str = "answer"

    @property
    def error(self) -> str:
        return "error" if self.answer == "answer" else f"{self.answer}_error"


@dataclass(frozen=True)
class Task:
    """What is to be answered, by whom and how."""

    base: FrozenBase | Held
    prompt: Answerer
    questions: Questions
    num_rows: int
    sampling: Sampling
    named: Named = Named()


@dataclass(frozen=True)
class Answered:
    """How many of the questions have an answer, or an error in its place."""

    done: int
    total: int


def check_out(out: Path, resume: bool) -> None:
    """Raises ConfigError where `out` is there already and not to be gone on with."""
    if not os.path.exists(out):
        return
    if not _record(out).is_file():
        raise ConfigError(f"--out {out} exists and is not of this command ({_record(out).name} is missing): choose another file")
    if not resume:
        with out.open("rb") as file:
            there = sum(line.endswith(b"\n") for line in file)
        raise ConfigError(f"--out {out} exists and has {there} answers: --resume goes on with it, or choose another file")
    if refusal := newer(_record(out), _made_with(out), ANSWERS):
        raise ConfigError(refusal)


def _record(out: Path) -> Path:
    """Where it is written what the answers were made with."""
    return out.with_name(out.name + ".settings.json")


def _made_with(out: Path) -> Any:
    """What is written there; nothing where it is damaged."""
    try:
        return json.loads(_record(out).read_text(encoding="utf-8"))
    except ValueError:
        return {}


def answer_file(task: Task, out: Path, settings: Mapping[str, Any], *, resume: bool = False) -> Iterator[Answered]:
    """Writes a line for every row to `out`: its fields, and its answer; where that cannot be given, null and what is wrong. Yields where it
    stands at the start and whenever that changes. Ends when the file is whole, whoever has answered the last row.

    `settings`: what the answers depend on. Raises ConfigError where `out` is there already and `resume` is not set, where it was begun
    with other settings, or cannot be written; DataError where the questions change meanwhile.
    """
    check_out(out, resume)
    try:
        shared = Shared(out, task.num_rows)
        shared.begin({"format": ANSWERS, **settings, "window": WINDOW})
        yield Answered(shared.num_done(), task.num_rows)
        while missing := shared.missing():
            for number in missing:
                with locked(shared.folder / f"{number}.lock", wait=False, unlocked=ALONE) as ours:
                    if ours and number in shared.missing():
                        yield from _answer_window(task, shared, number)
                        break
            else:
                time.sleep(PATIENCE)
                yield Answered(shared.num_done(), task.num_rows)
        shared.end()
        yield Answered(task.num_rows, task.num_rows)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from None


def failures(out: Path, named: Named, most: int) -> tuple[int, list[str]]:
    """(how many rows have an error, what the first of them say)."""
    number, first, mark = 0, list[str](), json.dumps(named.error).encode() + b": "
    with out.open("rb") as file:
        for line in file:
            error = json.loads(line).get(named.error) if mark in line else None
            number += error is not None
            if error is not None and len(first) < most:
                first.append(error)
    return number, first


# ---- the files ---------------------------------------------------------------------------------------------------


@dataclass
class Shared:
    """The file of answers and the folder beside it, as several processes write them: only its first `num_lines` are known for sure."""

    out: Path
    num_rows: int
    num_lines: int = 0
    num_bytes: int = 0

    @property
    def folder(self) -> Path:
        return self.out.with_name(self.out.name + ".parts")

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Makes the files, or sees that those that are there are of the same settings. Raises ConfigError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            if not self.out.exists():
                for part in self.folder.glob("*.jsonl"):  # of a file that somebody has removed
                    part.unlink()
                write_text(_record(self.out), json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
                self.out.touch()
        known = _made_with(self.out)
        other = [name for name, value in settings.items() if known.get(name) != value]
        if other:
            raise ConfigError(f"--out {self.out} was begun with another {', '.join(other)}: choose another file, or remove it")

    def span(self, number: int) -> tuple[int, int]:
        """The rows of a window."""
        return number * WINDOW, min((number + 1) * WINDOW, self.num_rows)

    def missing(self) -> list[int]:
        """The windows that are not complete, once all that can be is in the file."""
        with self._alone():
            self._look()
            while (part := self._part(self._head())).exists():
                start, _ = self.span(self._head())  # a kill may have left some of it in the file
                self._append(part.read_bytes().splitlines(keepends=True)[self.num_lines - start :])
                part.unlink()
            parts = {path.stem for path in self.folder.glob("*.jsonl")}
            return [number for number in range(self._head(), math.ceil(self.num_rows / WINDOW)) if str(number) not in parts]

    def num_done(self) -> int:
        missing = self.missing()
        begun = self.num_lines - missing[0] * WINDOW if missing else 0  # of the first that is missing
        return self.num_rows - sum(stop - start for start, stop in map(self.span, missing)) + begun

    def put(self, number: int, lines: list[bytes]) -> None:
        """Appends those of a window's first lines that the file lacks, if it is this window's turn; a whole window is kept for its turn."""
        start, stop = self.span(number)
        with self._alone():
            self._look()
            if self.num_lines >= start:
                self._append(lines[self.num_lines - start :])
            elif len(lines) == stop - start:
                write_text(self._part(number), b"".join(lines).decode())

    def end(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _head(self) -> int:
        """The first window that is not all in the file; where there is none, the one behind the last."""
        return self.num_lines // WINDOW if self.num_lines < self.num_rows else math.ceil(self.num_rows / WINDOW)

    def _part(self, number: int) -> Path:
        return self.folder / f"{number}.jsonl"

    def _alone(self) -> Any:
        return locked(self.folder / "out.lock", wait=True, unlocked=ALONE)

    def _look(self) -> None:
        """Counts what others have written; a half line at the end is what a kill left, and is cut away."""
        size = self.out.stat().st_size
        if size == self.num_bytes:
            return
        with self.out.open("r+b") as file:
            file.seek(self.num_bytes)
            for line in file:
                if line.endswith(b"\n"):
                    self.num_lines, self.num_bytes = self.num_lines + 1, self.num_bytes + len(line)
            if size > self.num_bytes:
                file.truncate(self.num_bytes)

    def _append(self, lines: list[bytes]) -> None:
        if lines:
            with self.out.open("ab") as file:
                self.num_bytes += file.write(b"".join(lines))
            self.num_lines += len(lines)


# ---- a window ----------------------------------------------------------------------------------------------------


@dataclass
class _InOrder:
    """Lines of a window, those in front that are whole apart from those that wait for them."""

    ready: list[bytes] = field(default_factory=list)
    waiting: dict[int, bytes] = field(default_factory=dict)

    def add(self, index: int, line: bytes) -> bool:
        """Whether more are ready now."""
        self.waiting[index] = line
        before = len(self.ready)
        while len(self.ready) in self.waiting:
            self.ready.append(self.waiting.pop(len(self.ready)))
        return len(self.ready) > before

    def __len__(self) -> int:
        return len(self.ready) + len(self.waiting)


def _answer_window(task: Task, shared: Shared, number: int) -> Iterator[Answered]:
    start, stop = shared.span(number)
    in_file = max(shared.num_lines - start, 0)  # of an earlier try, which is made again
    others = shared.num_done() - in_file
    lines, due = _InOrder(), 0.0
    for index, line in _lines(task, task.questions.part(start, stop)):
        if lines.add(index, line) and (time.monotonic() >= due or len(lines.ready) == stop - start):
            shared.put(number, lines.ready)
            due = time.monotonic() + PAUSE
        yield Answered(others + max(len(lines), in_file), task.num_rows)


def _lines(task: Task, rows: list[Unanswered]) -> Iterator[tuple[int, bytes]]:
    """(number of the row, its line) as the answers are complete."""
    one = task.prompt if isinstance(task.prompt, Ensemble) else Ensemble((task.prompt,))
    asked: dict[int, Question] = {}
    for index, row in enumerate(rows):
        try:
            if not row.turns:
                raise DataError(row.reason)
            asked[index] = prepared(task.base, one, row.turns, task.sampling)
        except DataError as error:
            yield index, _line(row, {task.named.answer: None, task.named.error: f"{row.place}: {error.reason}"})
    numbers, texts = list(asked), dict.fromkeys(asked, "")
    for piece in pieces_of(task.base, [one] * len(asked), list(asked.values())):
        index = numbers[piece.row]
        texts[index] += piece.text
        if piece.last:
            yield index, _line(rows[index], {task.named.answer: texts[index]})


def _line(row: Unanswered, answer: Mapping[str, str | None]) -> bytes:
    whole = _plain({**row.fields, **answer})
    try:
        return json.dumps(whole, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can spell
        return json.dumps(whole).encode() + b"\n"


def _plain(value: Any) -> Any:
    """What JSON knows, as it is; all else as text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
