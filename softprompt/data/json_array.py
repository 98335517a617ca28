"""A JSON array of any length, read element by element."""

import json
import re
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TextIO

from softprompt.errors import DataError

PIECE = 1 << 20  # characters that are read at a time; more where an element is longer
BLANKS = re.compile(r"[ \t\n\r]*")
CUT = 16  # characters: an error so near to the end of what was read may be one of a word that goes on


class _Text:
    """What was read of a file and is not used up: `text` from `at` on."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self._file = path, file
        self.text, self.at, self.ended = "", 0, False
        self._lines = self._lead = 0  # line ends before `text`, characters of its first line before it

    def more(self) -> None:
        piece = self._file.read(max(PIECE, len(self.text) - self.at))
        line_begins = self.text.rfind("\n", 0, self.at) + 1
        self._lead = self.at - line_begins + (0 if line_begins else self._lead)
        self._lines += self.text.count("\n", 0, self.at)
        self.text, self.at, self.ended = self.text[self.at :] + piece, 0, not piece

    def sign(self) -> str:
        """The next character that is no blank; nothing at the end of the file."""
        while True:
            blanks = BLANKS.match(self.text, self.at)
            self.at = blanks.end() if blanks else self.at
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def element(self) -> Any:
        """The value that begins here. Raises DataError."""
        self.sign()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except JSONDecodeError as error:
                goes_on = error.pos > len(self.text) - CUT or error.msg.startswith("Unterminated")
                if self.ended or not goes_on:
                    raise self.wrong(error.msg, error.pos) from None
            except (RecursionError, ValueError) as error:
                raise DataError(f"{self.path}: not usable JSON: {error}") from None
            else:
                if end < len(self.text) or self.ended:  # a number may go on
                    self.at = end
                    return value
            self.more()

    def wrong(self, reason: str, at: int) -> DataError:
        line_begins = self.text.rfind("\n", 0, at) + 1
        column = at - line_begins + 1 + (0 if line_begins else self._lead)
        line = self._lines + self.text.count("\n", 0, at) + 1
        return DataError(f"{self.path}:{line}: not valid JSON: {reason} (column {column})")


def elements(path: Path, file: TextIO) -> Iterator[Any]:
    """Those of the array that the file holds, of which only one is in memory. Raises DataError with the line where it is none."""
    text = _Text(path, file)
    assert text.sign() == "[", "an array begins"
    text.at += 1
    if text.sign() == "]":
        text.at += 1
    else:
        while True:
            yield text.element()
            sign = text.sign()
            if sign not in (",", "]") or not sign:
                raise text.wrong("Expecting ',' delimiter", text.at)
            text.at += 1
            if sign == "]":
                break
    if text.sign():
        raise text.wrong("Extra data", text.at)
