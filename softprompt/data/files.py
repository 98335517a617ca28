"""The rows of a file, a folder or a hub data set, one by one, each with its place."""

import codecs
import csv
import gzip
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from softprompt.config import RANGE
from softprompt.data.examples import ClassName, Unusable
from softprompt.data.json_array import elements
from softprompt.errors import DataError, first_line
from softprompt.extras import need
from softprompt.hub import hub

PARQUET_ROWS = 1_000  # that are in memory at once
CHINESE = 0.9  # of the letters beyond ASCII, those in GB 2312, from which a file is taken for GB 18030


@dataclass(frozen=True)
class Note:
    """What was assumed about a file."""

    text: str


def rows_of(source: str, *, stream: bool = False) -> Iterator[tuple[str, Any]]:
    """(place, row) of a source; an unreadable line comes as Unusable instead of a row, what was assumed as a Note. `stream`: a hub data
    set is read as it comes."""
    match = RANGE.match(source)
    if match is None or Path(source).exists():
        yield from _whole(source, stream)
        return
    start, stop = int(match["start"] or 0), int(match["stop"]) if match["stop"] else None
    index = 0
    for item in _whole(match["source"], stream):
        if isinstance(item[1], Note):
            yield item
            continue
        if stop is not None and index >= stop:
            return
        if index >= start:
            yield item
        index += 1


def _whole(source: str, stream: bool) -> Iterator[tuple[str, Any]]:
    if "://" in source:
        return _remote(source)
    path = Path(source)
    if path.is_file():
        return _file(path)
    if path.is_dir():
        return _folder(path)
    folder, _, split = source.rpartition(":")
    if folder and Path(folder).is_dir():
        return _saved_dataset(Path(folder), split)
    if any(sign in source for sign in "*?["):
        found = sorted(glob(source, recursive=True))
        if not found:
            raise DataError(f"{source}: no such file")
        return chain.from_iterable(_file(Path(name)) for name in found)
    if _kind(path) in READERS or path.is_absolute() or source.startswith(("./", "../", "~")):
        raise DataError(f"{source}: no such file or folder")
    return _hub_dataset(source, stream)


def _folder(path: Path) -> Iterator[tuple[str, Any]]:
    """What datasets' save_to_disk wrote, or all files in it and below that can be read, by name."""
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _saved_dataset(path, None)
    found = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) in READERS)
    if not found:
        raise DataError(f"{path}: not a folder that datasets' save_to_disk wrote, and no {', '.join(READERS)} in it")
    return chain.from_iterable(map(_file, found))


def _kind(path: Path) -> str:
    """The ending that says what is inside, without that of a compression."""
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def _file(path: Path) -> Iterator[tuple[str, Any]]:
    reader = READERS.get(_kind(path))
    if reader is None:
        ending = _kind(path) or "a file without ending"
        raise DataError(f"{path}: cannot read {ending}; known are {', '.join(READERS)}, each also as {', '.join(COMPRESSED)}")
    return reader(path)


def _remote(source: str) -> Iterator[tuple[str, Any]]:
    """A file of any file system that fsspec knows, copied here and read."""
    import fsspec

    with tempfile.TemporaryDirectory() as folder:
        try:
            files = fsspec.open_files(source, "rb")
            if not files:
                raise DataError(f"{source}: no such file")
            for number, file in enumerate(files):
                copy = Path(folder) / f"{number}-{Path(file.path).name}"
                with file as remote, copy.open("wb") as local:
                    shutil.copyfileobj(remote, local)
                address = source if len(files) == 1 else f"{source.partition('://')[0]}://{file.path.lstrip('/')}"
                for place, row in _file(copy):
                    yield place.replace(str(copy), address), row
                copy.unlink()
        except (OSError, ValueError, ImportError) as error:
            raise DataError(f"{source}: cannot be read: {first_line(error)}") from None


def _binary(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix.lower() == ".zst":
        need("pyarrow", str(path))
        import pyarrow

        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))
    return path.open("rb")


def _encoding(path: Path) -> str:
    """utf-8-sig, utf-16 where the file begins with its mark, or gb18030 where all of it is that and looks Chinese. Raises DataError."""
    with _binary(path) as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
    try:
        for _ in _decoded(path, "utf-8-sig"):
            pass
        return "utf-8-sig"
    except UnicodeDecodeError as error:
        refusal = DataError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8")
    foreign = common = 0
    try:
        for text in _decoded(path, "gb18030"):
            letters = "".join(letter for letter in text if not letter.isascii())
            foreign += len(letters)
            common += len(letters.encode("gb2312", errors="ignore")) // 2
    except UnicodeDecodeError:
        raise refusal from None
    if common < CHINESE * foreign:  # Latin-1 often decodes too, to characters that nobody writes
        raise refusal
    return "gb18030"


def _decoded(path: Path, encoding: str) -> Iterator[str]:
    """The text in pieces."""
    decoder = codecs.getincrementaldecoder(encoding)()
    with _binary(path) as file:
        while piece := file.read(1 << 20):
            yield decoder.decode(piece)
        yield decoder.decode(b"", final=True)


@contextmanager
def _text_of(path: Path, encoding: str, newline: str | None = "\n") -> Iterator[TextIO]:
    with _binary(path) as file, io.TextIOWrapper(file, encoding=encoding, newline=newline) as text:
        yield text


def _assumed(path: Path) -> tuple[str, list[tuple[str, Any]]]:
    """(the file's encoding, what to say about it)."""
    try:
        encoding = _encoding(path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return encoding, [(str(path), Note("not UTF-8, read as GB18030 (GBK)"))] if encoding == "gb18030" else []


def _read_text(path: Path, encoding: str) -> str:
    with _text_of(path, encoding) as file:
        return file.read()


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, without their ends. Raises DataError."""
    encoding, _ = _assumed(path)
    with _text_of(path, encoding, newline=None) as file:
        yield from (line.rstrip("\n") for line in file)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The elements of an array, one object, or lines of JSON in a file with this ending."""
    encoding, notes = _assumed(path)
    with _text_of(path, encoding) as file:
        if _first_sign(file) == "[":
            yield from notes
            yield from ((f"{path}: row {number}", row) for number, row in enumerate(elements(path, file), 1))
            return
        try:
            row = json.load(file)
        except (RecursionError, ValueError):
            yield from _json_lines(path)
            return
    yield from notes
    yield f"{path}: row 1", row


def _first_sign(file: TextIO) -> str:
    """The first character that is no blank; the file stands at its beginning again."""
    while (sign := file.read(1)).isspace():
        pass
    file.seek(0)
    return sign


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    encoding, notes = _assumed(path)
    yield from notes
    with _text_of(path, encoding) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip("\n"))
            except json.JSONDecodeError as error:
                row = Unusable(f"not valid JSON: {error.msg} (column {error.colno})")
            except (RecursionError, ValueError) as error:  # nested too deep, or a number of thousands of digits
                row = Unusable(f"not usable JSON: {error}")
            yield f"{path}:{number}", row


class _Lines:
    """Lines with a way back to the second line of a record that is none: its open quote may have swallowed the rest of the file."""

    def __init__(self, file: Iterable[str]) -> None:
        self.number = 0  # of the last line that was read
        self._file, self._record = iter(file), [""]

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._file)
        self.number += 1
        self._record.append(line)
        return line

    def begin(self) -> None:
        """A record begins with the next line."""
        self._record = []

    def go_back(self) -> int:
        """Reads on behind the first line of the record, which has this number; blank lines before it are none."""
        first = next((index for index, line in enumerate(self._record) if line.strip()), 0)
        again = self._record[first + 1 :]
        self._file, self.number = chain(again, self._file), self.number - len(again)
        return self.number


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    encoding, notes = _assumed(path)
    yield from notes
    csv.field_size_limit(2**31 - 1)
    with _text_of(path, encoding, newline="") as file:
        header = file.readline()
    tabs = _kind(path) == ".tsv" or ("\t" in header and "," not in header)
    delimiter = "\t" if tabs else ";" if header.count(";") > header.count(",") else ","
    with _text_of(path, encoding, newline="") as file:
        lines = _Lines(file)
        reader = csv.DictReader(lines, strict=True, delimiter=delimiter)
        try:
            _ = reader.fieldnames
        except csv.Error as error:
            raise DataError(f"{path}:1: the header is not valid CSV: {error}") from None
        while True:
            lines.begin()
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"{path}:{lines.go_back()}", Unusable(f"not valid CSV: {error}")
            else:
                yield f"{path}:{lines.number}", Unusable("more cells than the header has columns") if None in row else row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    need("pyarrow", str(path))
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(PARQUET_ROWS))
            yield from _numbered(str(path), rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {first_line(error)}") from None


def _saved_dataset(path: Path, split: str | None) -> Iterator[tuple[str, Any]]:
    need("datasets", str(path))
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
    yield from _numbered(str(path), _with_class_names(loaded))


def _hub_dataset(source: str, stream: bool) -> Iterator[tuple[str, Any]]:
    need("datasets", f"{source}: no such file or folder here; a data set of the hub")
    import datasets

    name, *rest = source.split(":")
    configuration, split = (rest[0] or None, rest[1]) if len(rest) == 2 else (None, rest[0] if rest else None)
    with hub() as address:
        try:
            loaded = datasets.load_dataset(name, configuration, split=split or "train", streaming=stream)
        except Exception as error:  # datasets raises many kinds; each means that the rows are not to be had
            raise DataError(
                f"{source}: no such file or folder here, and as a hub data set it cannot be loaded from "
                f"{address} ({first_line(error)}); set HF_ENDPOINT to use a mirror"
            ) from None
    yield from _numbered(name, _with_class_names(loaded))


def _with_class_names(rows: Any) -> Iterator[Any]:
    """The rows, numbers of classes as their names; -1, which stands for no class, as None."""
    import datasets

    classes = {name: kind for name, kind in (rows.features or {}).items() if isinstance(kind, datasets.ClassLabel)}
    for row in rows:
        named = {name: (name, kind, row[name]) for name, kind in classes.items() if isinstance(row[name], int)}
        yield {**row, **{name: ClassName(kind.int2str(at), at) if at >= 0 else None for name, kind, at in named.values()}}


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, 1):
        yield f"{name}: row {number}", row


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".json": _json_rows,
    ".jsonl": _json_lines,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
COMPRESSED = (".gz", ".zst")
