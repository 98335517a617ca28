"""A file of questions answered in groups: every answer is written as it comes, and a file that was stopped goes on.

Beside the answers lies what they were made with (`answers.jsonl.settings.json`); only the same prompt, sampling and questions go on.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from softprompt.atomic import write_text
from softprompt.data import Unanswered
from softprompt.engine.decode import Sampling
from softprompt.engine.model import FrozenBase
from softprompt.errors import ConfigError, DataError
from softprompt.generation import Answerer, Asked, check_question, stream

GROUP = 256  # texts that are answered together


@dataclass(frozen=True)
class Answered:
    """How many of the questions have an answer, and how many of those could not be given."""

    done: int
    total: int
    failed: int


def answer_file(
    base: FrozenBase,
    prompt: Answerer,
    questions: Sequence[Unanswered],
    sampling: Sampling,
    out: Path,
    settings: Mapping[str, Any],
) -> Iterator[Answered]:
    """Writes {"number", "text", "answer"} a line to `out`, in the order of the questions; one that cannot be answered has the answer
    null and an "error". Yields where it stands at the start and after every group.

    `settings`: what the answers depend on. Raises ConfigError where `out` was begun with others or cannot be written.
    """
    try:
        done, failed = _begun(out, settings)
        yield Answered(done, len(questions), failed)
        with out.open("a", encoding="utf-8", newline="\n") as file:
            for start in range(done, len(questions), GROUP):
                part = questions[start : start + GROUP]
                failed += _answer_group(base, prompt, part, sampling, _InOrder(file, start, [one.text for one in part]))
                yield Answered(start + len(part), len(questions), failed)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from None


def _begun(out: Path, settings: Mapping[str, Any]) -> tuple[int, int]:
    """(answers that are there, those of them that could not be given); a half last line is cut away."""
    record = out.with_name(out.name + ".settings.json")
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(record, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        return 0, 0
    if not record.is_file():
        raise ConfigError(f"--out {out} exists and is not of this command ({record.name} is missing): choose another file")
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        known = {}
    other = [name for name, value in settings.items() if known.get(name) != value]
    if other:
        raise ConfigError(f"--out {out} was begun with another {', '.join(other)}: choose another file, or remove it")
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with out.open("r+b") as file:
            file.truncate(len(whole))
    lines = whole.splitlines()
    return len(lines), sum(b'"error": ' in line and "error" in json.loads(line) for line in lines)


@dataclass
class _InOrder:
    """Answers of a group, each written as soon as those before it are."""

    file: TextIO
    start: int
    texts: Sequence[str]
    waiting: dict[int, dict[str, Any]] = field(default_factory=dict)
    written: int = 0

    def add(self, index: int, answer: dict[str, Any]) -> None:
        self.waiting[index] = answer
        while self.written in self.waiting:
            line = {"number": self.start + self.written, "text": self.texts[self.written], **self.waiting.pop(self.written)}
            self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self.file.flush()
            self.written += 1


def _answer_group(base: FrozenBase, prompt: Answerer, part: Sequence[Unanswered], sampling: Sampling, lines: _InOrder) -> int:
    """Answers and writes a group; how many of it cannot be answered."""
    asked: dict[int, Asked] = {}
    for index, question in enumerate(part):
        try:
            if not question.turns:
                raise DataError(question.reason)
            check_question(base, prompt, question.turns, sampling)
            asked[index] = question.turns
        except DataError as error:
            lines.add(index, {"answer": None, "error": error.reason})
    texts = dict.fromkeys(asked, "")
    numbers = list(asked)
    for piece in stream(base, prompt, list(asked.values()), sampling):
        texts[numbers[piece.row]] += piece.text
        if piece.last:
            lines.add(numbers[piece.row], {"answer": texts[numbers[piece.row]]})
    return len(part) - len(asked)
