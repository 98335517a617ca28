"""The questions of a file that is to be answered: lines of text, or rows of any shape, whose own answers play no part."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.data.examples import Message, Unusable
from softprompt.data.files import Note, rows_of, text_lines
from softprompt.data.shapes import example_of
from softprompt.errors import DataError

ANY = "?"  # stands where a row has its answer


@dataclass(frozen=True)
class Unanswered:
    """A question: its turns, none where it cannot be used, and then why."""

    turns: tuple[Message, ...]
    reason: str = ""

    @property
    def text(self) -> str:
        return self.turns[-1].content if self.turns else ""


def load_questions(source: str, columns: Mapping[str, str]) -> list[Unanswered]:
    """A .txt file holds one question a line, blank lines left out; all else is read as `load_examples` reads it. Raises DataError."""
    path = Path(source)
    if path.suffix.lower() == ".txt":
        if not path.is_file():
            raise DataError(f"{source}: no such file")
        found = [Unanswered((Message("user", line),)) for line in text_lines(path) if line.strip()]
    else:
        found = [_question(row, place, columns) for place, row in rows_of(source) if not isinstance(row, Note)]
    if not found:
        raise DataError(f"{source}: nothing to answer")
    return found


def _question(row: Any, place: str, columns: Mapping[str, str]) -> Unanswered:
    asked = {name: wanted for name, wanted in columns.items() if name not in ("completion", "output", "label")}
    try:
        if isinstance(row, Unusable):
            raise row
        whole = {**row, "completion": ANY, "output": ANY, "label": ANY} if isinstance(row, Mapping) else row
        for name in ("messages", "conversations"):
            if isinstance(whole, Mapping) and isinstance(whole.get(name), list):
                whole = {**whole, name: _open(whole[name])}
        example = example_of(whole, place, {}, asked)
        if example.tools:
            raise Unusable("the row has tools, which are not given to the base here")
        return Unanswered(example.messages[:-1])
    except Unusable as reason:
        return Unanswered((), f"{place}: {reason}")


def _open(turns: list[Any]) -> list[Any]:
    """The turns with any answer in place of the last one, or after a question that has none."""
    last = turns[-1] if turns and isinstance(turns[-1], Mapping) else {}
    answered = (last.get("role") or last.get("from")) in ("assistant", "gpt", "bot", "model")
    return [*(turns[:-1] if answered else turns), {"role": "assistant", "content": ANY}]
