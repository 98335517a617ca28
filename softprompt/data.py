"""Rows in a file, folder or hub data set -> Example. What cannot be used is rejected with its place and the reason.

Four shapes are understood, by their fields: `messages` (a chat), `instruction`/`input`/`output`,
`prompt`/`completion`, and `text`/`label`. This module does not import torch.
"""

import csv
import hashlib
import io
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from softprompt.config import RANGE
from softprompt.errors import DataError
from softprompt.hub import hub


@dataclass(frozen=True)
class Message:
    """One turn: role is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One row: turns that end with the response to learn, and where it came from."""

    messages: tuple[Message, ...]
    source: str
    label: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def response(self) -> str:
        return self.messages[-1].content

    @property
    def turns(self) -> tuple[str, ...]:
        """The texts of all turns with runs of white space as single blanks: what rows are compared by."""
        return tuple(" ".join(message.content.split()) for message in self.messages)

    def answered(self, response: str) -> "Example":
        """The same row with another response."""
        return replace(self, messages=(*self.messages[:-1], Message("assistant", response)))


@dataclass(frozen=True)
class Rejected:
    """A row that is not used, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class Loaded:
    """The rows of one source. `labels`: the label words seen, in order of appearance (text/label rows only)."""

    examples: tuple[Example, ...]
    rejected: tuple[Rejected, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(example.label for example in self.examples if example.label is not None))

    @property
    def fingerprint(self) -> str:
        """sha256 over the turns of all examples, in order."""
        digest = hashlib.sha256()
        for example in self.examples:
            turns = [[message.role, message.content] for message in example.messages]
            digest.update(json.dumps(turns, ensure_ascii=False).encode() + b"\n")
        return digest.hexdigest()


class _Unusable(Exception):
    """The reason why a row cannot be used."""


def load_examples(source: str, *, limit: int | None = None, label_words: Mapping[str, str] | None = None) -> Loaded:
    """Reads `source` (see `data.train` in the configuration) into examples and rejected rows.

    Raises DataError when the source cannot be read at all or holds no row.
    """
    examples: list[Example] = []
    rejected: list[Rejected] = []
    num_rows = 0
    for place, row in _rows(source):
        if num_rows == limit:
            break
        num_rows += 1
        try:
            if isinstance(row, _Unusable):
                raise row
            examples.append(_example(row, place, label_words or {}))
        except _Unusable as reason:
            rejected.append(Rejected(place, str(reason)))
    if num_rows == 0:
        raise DataError(f"{source}: no rows")
    return Loaded(tuple(examples), tuple(rejected))


def first_rows(source: str, count: int) -> list[Mapping[str, Any]]:
    """Up to `count` rows of a source as they are, those that have fields, whatever their shape. Raises DataError as `load_examples`."""
    return [row for _, row in islice(_rows(source), count) if isinstance(row, Mapping)]


def hold_out(loaded: Loaded, fraction: float, seed: int) -> tuple[Loaded, Loaded]:
    """Splits off `fraction` of the different examples (at least one), chosen by `seed`; both parts keep the file's order. Copies of a
    row, up to white space, stay on one side."""
    different = list(dict.fromkeys(example.turns for example in loaded.examples))
    num_held = max(1, round(fraction * len(different)))
    if num_held >= len(different):
        raise DataError(f"data.eval_fraction = {fraction} of {len(different)} different rows leaves nothing to train on")
    held = {different[index] for index in random.Random(seed).sample(range(len(different)), num_held)}
    train = tuple(example for example in loaded.examples if example.turns not in held)
    evaluation = tuple(example for example in loaded.examples if example.turns in held)
    return Loaded(train, loaded.rejected), Loaded(evaluation, ())


# ---- one row -------------------------------------------------------------------------------------------------------


def _example(row: Any, place: str, label_words: Mapping[str, str]) -> Example:
    if not isinstance(row, Mapping):
        raise _Unusable(f"a row must be an object with fields, this is {type(row).__name__}")
    for needed, build in SHAPES.items():
        if needed in row:
            return build(row, place, label_words)
    raise _Unusable(f"fields {', '.join(map(str, row)) or '(none)'} fit no known shape: {', '.join(FIELDS)}")


def _from_messages(row: Mapping[str, Any], place: str, label_words: Mapping[str, str]) -> Example:
    turns = row["messages"]
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not all(isinstance(turn, Mapping) for turn in turns):
        raise _Unusable('messages must be a list of {"role": ..., "content": ...}')
    messages = [Message(_text(turn, "role"), _text(turn, "content")) for turn in turns]
    spoken = messages[1:] if messages and messages[0].role == "system" else messages
    expected = ["user", "assistant"] * (len(spoken) // 2)
    if not spoken or [message.role for message in spoken] != expected:
        roles = ", ".join(message.role for message in messages) or "none"
        raise _Unusable(f"turns must alternate user, assistant and end with assistant (a system turn may come first); here: {roles}")
    for message in spoken[1::2]:
        _not_empty(message.content, "an assistant turn")
    return Example(tuple(messages), place, fields={"prompt": spoken[-2].content})


def _from_instruction(row: Mapping[str, Any], place: str, label_words: Mapping[str, str]) -> Example:
    instruction, given, output = _text(row, "instruction"), _text(row, "input", ""), _text(row, "output")
    _not_empty(output, "output")
    question = "\n".join([instruction, given])
    turns = (Message("user", question), Message("assistant", output))
    return Example(turns, place, fields={"instruction": instruction, "input": given, "prompt": question.strip()})


def _from_prompt(row: Mapping[str, Any], place: str, label_words: Mapping[str, str]) -> Example:
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    _not_empty(completion, "completion")
    return Example((Message("user", prompt), Message("assistant", completion)), place, fields={"prompt": prompt})


def _from_text(row: Mapping[str, Any], place: str, label_words: Mapping[str, str]) -> Example:
    text, label = _text(row, "text"), row.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise _Unusable("label is missing" if label is None else f"label must be text or a whole number, this is {label!r}")
    if label_words and str(label) not in label_words:
        raise _Unusable(f"label {label!r} has no word in data.label_words")
    word = _whole_characters(label_words.get(str(label), str(label)), "label")
    _not_empty(word, "label")
    return Example((Message("user", text), Message("assistant", word)), place, label=word, fields={"text": text, "prompt": text})


SHAPES: dict[str, Callable[[Mapping[str, Any], str, Mapping[str, str]], Example]] = {
    "messages": _from_messages,
    "instruction": _from_instruction,
    "prompt": _from_prompt,
    "text": _from_text,
}
FIELDS = ("messages", "instruction/input/output", "prompt/completion", "text/label")


def _text(row: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = row.get(key)
    if value is None:
        if default is None:
            raise _Unusable(f"field {key} is missing")
        return default
    if not isinstance(value, str):
        raise _Unusable(f"field {key} must be text, this is {type(value).__name__}")
    return _whole_characters(value, key)


def _whole_characters(value: str, key: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Unusable(f"field {key} holds half of a surrogate pair, which is no text") from None
    return value


def _not_empty(response: str, name: str) -> None:
    if not response.strip():
        raise _Unusable(f"{name} is empty: there is nothing to learn from")


# ---- where rows come from ------------------------------------------------------------------------------------------


def _rows(source: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of a source; an unreadable line comes as an _Unusable instead of a row."""
    match = RANGE.match(source)
    if match is None or Path(source).exists():
        yield from _whole(source)
        return
    start, stop = int(match["start"] or 0), int(match["stop"]) if match["stop"] else None
    for index, item in enumerate(_whole(match["source"])):
        if stop is not None and index >= stop:
            return
        if index >= start:
            yield item


def _whole(source: str) -> Iterator[tuple[str, Any]]:
    path = Path(source)
    if path.is_file():
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise DataError(f"{source}: cannot read {path.suffix or 'a file without ending'}; known are {', '.join(READERS)}")
        return reader(path)
    if path.is_dir():
        return _saved_dataset(path, None)
    folder, _, split = source.rpartition(":")
    if folder and Path(folder).is_dir():
        return _saved_dataset(Path(folder), split)
    if path.suffix.lower() in READERS or path.is_absolute() or source.startswith(("./", "../", "~")):
        raise DataError(f"{source}: no such file or folder")
    return _hub_dataset(source)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    text = _read_text(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if not text.lstrip().startswith("["):
            yield from _json_lines(path)
            return
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: not usable JSON: {error}") from None
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield f"{path}: row {number}", row


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            row = _Unusable(f"not valid JSON: {error.msg} (column {error.colno})")
        except (RecursionError, ValueError) as error:  # nested too deep, or a number of thousands of digits
            row = _Unusable(f"not usable JSON: {error}")
        yield f"{path}:{number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(_read_text(path)), strict=True)
    try:
        for row in reader:
            place = f"{path}:{reader.line_num}"
            yield place, _Unusable("more cells than the header has columns") if None in row else row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num + 1}: not valid CSV: {error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None
    yield from _numbered(str(path), table.to_pylist())


def _saved_dataset(path: Path, split: str | None) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (FileNotFoundError, OSError) as error:
        raise DataError(f"{path}: not a folder that datasets' save_to_disk wrote: {error}") from None
    if isinstance(loaded, datasets.DatasetDict):
        wanted = split or "train"
        if wanted not in loaded:
            raise DataError(f"{path} has no split {wanted!r}: name one, e.g. {path}:{next(iter(loaded), 'train')}")
        loaded = loaded[wanted]
    elif split is not None:
        raise DataError(f"{path} has no splits: leave out :{split}")
    yield from _numbered(str(path), loaded)


def _hub_dataset(source: str) -> Iterator[tuple[str, Any]]:
    import datasets

    name, _, split = source.partition(":")
    with hub() as address:
        try:
            loaded = datasets.load_dataset(name, split=split or "train")
        except Exception as error:  # datasets raises many kinds; each means that the rows are not to be had
            raise DataError(
                f"{source}: no such file or folder here, and as a hub data set it cannot be loaded from "
                f"{address} ({_first_line(error)}); set HF_ENDPOINT to use a mirror"
            ) from None
    yield from _numbered(name, loaded)


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, 1):
        yield f"{name}: row {number}", row


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".json": _json_rows,
    ".jsonl": _json_lines,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
