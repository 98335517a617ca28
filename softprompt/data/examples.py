"""Values: one turn, one row, the rows of a source."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Message:
    """One turn: role is system, user, assistant or tool. `learned`: whether an answer is learned, or only read. `more`: what else a chat
    template is given of the turn: the calls of tools, and which of them a tool's turn answers."""

    role: str
    content: str
    learned: bool = True
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Example:
    """One row: turns that end with the response to learn, the tools that they may call, and where it came from."""

    messages: tuple[Message, ...]
    source: str
    label: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Any, ...] = ()

    @property
    def has_tools(self) -> bool:
        """Whether any of it has to do with tools."""
        return bool(self.tools) or any([message.more or message.role == "tool" for message in self.messages])

    @property
    def response(self) -> str:
        return self.messages[-1].content

    @property
    def turns(self) -> tuple[str, ...]:
        """The texts of all turns with runs of white space as single blanks, and calls of tools: what rows are compared by."""
        texts = [message.content + _as_json(message.more) if message.more else message.content for message in self.messages]
        return tuple([" ".join(text.split()) for text in texts])

    def answered(self, response: str) -> "Example":
        """The same row with another response."""
        return replace(self, messages=(*self.messages[:-1], Message("assistant", response)))


@dataclass(frozen=True)
class Rejected:
    """A row that is not used, and why. `length`: its tokens, where it is too long."""

    source: str
    reason: str
    length: int | None = None


@dataclass(frozen=True)
class Loaded:
    """The rows of one source. `labels`: the label words seen, in order of appearance (text/label rows only);
    `notes`: what was assumed about the file, and columns that are not used."""

    examples: Sequence[Example]
    rejected: tuple[Rejected, ...]
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(example.label for example in self.examples if example.label is not None))

    @property
    def fingerprint(self) -> str:
        """sha256 over the turns of all examples, in order."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(turns_text(example).encode() + b"\n")
        return digest.hexdigest()


def turns_text(example: Example) -> str:
    """The turns of an example, and its tools, as one line of JSON."""
    turns: list[Any] = [
        [message.role, message.content, *([] if message.learned else [False]), *([message.more] if message.more else [])]
        for message in example.messages
    ]
    return _as_json([*turns, example.tools] if example.tools else turns)


def fields_text(example: Example) -> str:
    """A row's columns as JSON; what JSON does not know, as text."""
    return _as_json(dict(example.fields))


_as_json = json.JSONEncoder(ensure_ascii=False, default=str).encode


class Unusable(Exception):
    """The reason why a row cannot be used."""


class ClassName(str):
    """The name of a class of a data set, with its `number` there as text."""

    number: str

    def __new__(cls, name: str, number: int) -> "ClassName":
        made = super().__new__(cls, name)
        made.number = str(number)
        return made
