"""The questions of a file that is to be answered: lines of text, or rows of any shape, whose own answers play no part.

A file may be larger than memory: its rows are read once to know what they are (`survey`), and again, lazily, to be answered.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from softprompt.data.examples import Message, Unusable
from softprompt.data.files import Note, rows_of, text_lines
from softprompt.data.shapes import example_of
from softprompt.errors import DataError

ANY = "?"  # stands where a row has its answer


@dataclass(frozen=True)
class Unanswered:
    """A question: its place, the row's own fields, and its turns; none where it cannot be used, and then why."""

    place: str
    fields: Mapping[str, Any]
    turns: tuple[Message, ...]
    reason: str = ""


@dataclass(frozen=True)
class Survey:
    """How many rows a source has, and a digest of what is in them."""

    num_rows: int
    digest: str


@dataclass
class Questions:
    """The rows of a source, read lazily: a .txt file holds one question a line, blank lines left out; all else is read as
    `load_examples` reads it."""

    source: str
    columns: Mapping[str, str]
    _at: int = field(default=0, init=False)  # rows read so far
    _rows: Iterator[tuple[str, Any]] = field(default_factory=lambda: iter(()), init=False)

    def survey(self, reserved: Collection[str]) -> Survey:
        """Raises DataError where the source cannot be read or a row has a field of a `reserved` name, ConfigError for columns that are
        no expressions."""
        digest, num_rows = hashlib.sha256(), 0
        for place, row in self._read():
            taken = next((name for name in reserved if isinstance(row, Mapping) and name in row), None)
            if taken is not None:
                raise DataError(f"{place}: the row has a field {taken} of its own: name the answer's with --answer-field NAME")
            if num_rows == 0:
                self._question(place, row)
            digest.update(json.dumps(str(row) if isinstance(row, Unusable) else row, default=str).encode() + b"\n")
            num_rows += 1
        if num_rows == 0:
            raise DataError(f"{self.source}: nothing to answer")
        return Survey(num_rows, digest.hexdigest())

    def part(self, start: int, stop: int) -> list[Unanswered]:
        """The rows from number `start` on, `stop` not included; it is cheap to go on behind the last one that was read. Raises DataError
        where they are fewer."""
        if start < self._at or self._at == 0:
            self._at, self._rows = 0, self._read()
        found = [self._question(place, row) for place, row in islice(self._rows, start - self._at, stop - self._at)]
        self._at = stop
        if len(found) < stop - start:
            raise DataError(f"{self.source} has changed while it was answered")
        return found

    @property
    def _is_text(self) -> bool:
        return Path(self.source).suffix.lower() == ".txt"

    def _read(self) -> Iterator[tuple[str, Any]]:
        path = Path(self.source)
        if not self._is_text:
            yield from (item for item in rows_of(self.source) if not isinstance(item[1], Note))
        elif not path.is_file():
            raise DataError(f"{self.source}: no such file")
        else:
            yield from ((f"{path}:{number}", {"text": line}) for number, line in enumerate(text_lines(path), 1) if line.strip())

    def _question(self, place: str, row: Any) -> Unanswered:
        columns = {} if self._is_text else self.columns
        asked = {name: wanted for name, wanted in columns.items() if name not in ("completion", "output", "label")}
        fields = row if isinstance(row, Mapping) else {"row": place}
        try:
            if isinstance(row, Unusable):
                raise row
            example = example_of(_open(row), place, {}, asked)
            if example.tools:
                raise Unusable("the row has tools, which are not given to the base here")
            return Unanswered(place, fields, example.messages[:-1])
        except Unusable as reason:
            return Unanswered(place, fields, (), str(reason))


def _open(row: Any) -> Any:
    """The row with any answer in place of its own one."""
    if not isinstance(row, Mapping):
        return row
    whole = {**row, "completion": ANY, "output": ANY, "label": ANY}
    return whole | {name: _open_turns(whole[name]) for name in ("messages", "conversations") if isinstance(whole.get(name), list)}


def _open_turns(turns: list[Any]) -> list[Any]:
    """The turns with any answer in place of the last one, or after a question that has none."""
    last = turns[-1] if turns and isinstance(turns[-1], Mapping) else {}
    answered = (last.get("role") or last.get("from")) in ("assistant", "gpt", "bot", "model")
    return [*(turns[:-1] if answered else turns), {"role": "assistant", "content": ANY}]
