"""What a source holds, known by a hash without reading its rows."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from softprompt.config import RANGE
from softprompt.data.files import COMPRESSED
from softprompt.extras import need

LINES = (".jsonl", ".csv", ".tsv")  # kinds of files with a row a line, nearly
PIECE = 1 << 22


@dataclass(frozen=True)
class Content:
    """`name`: sha256 of all bytes of the files, with their places; None where that cannot be known, as of a hub data set. `num_rows`:
    how many rows there are, about; None where only reading tells."""

    name: str | None
    num_rows: int | None


def content_of(sources: str | Sequence[str]) -> Content:
    """Of a source, or of several (see `data.train` in the configuration)."""
    digest, total = hashlib.sha256(), 0
    known, counted = True, True
    for source in (sources,) if isinstance(sources, str) else sources:
        found = _files(source)
        known = known and found is not None
        for file in found or ():
            own, count = _read(file)
            digest.update(json.dumps([source, str(file), own]).encode())
            counted, total = counted and count is not None, total + (count or 0)
    return Content(digest.hexdigest() if known else None, total if known and counted else None)


def _files(source: str) -> list[Path] | None:
    """The files that the rows of a source lie in; None for what lies elsewhere."""
    if "://" in source:
        return None
    match = RANGE.match(source)
    if match is not None and not Path(source).exists():
        source = match["source"]
    for path in (Path(source), Path(source.rpartition(":")[0] or source)):
        if path.is_file():
            return [path]
        if path.is_dir():
            return sorted(file for file in path.rglob("*") if file.is_file())
    return [Path(name) for name in sorted(glob(source, recursive=True))] or None


def _read(file: Path) -> tuple[str, int | None]:
    """(sha256 of a file, its rows)."""
    digest, num_lines = hashlib.sha256(), 0
    lines = file.suffix.lower() in LINES
    try:
        with file.open("rb") as content:
            while piece := content.read(PIECE):
                digest.update(piece)
                num_lines += piece.count(b"\n") if lines else 0
    except OSError:  # reading the rows will say so
        return "", None
    if file.suffix.lower() == ".parquet":
        return digest.hexdigest(), _rows_of_parquet(file)
    return digest.hexdigest(), num_lines if lines and file.suffix.lower() not in COMPRESSED else None


def _rows_of_parquet(file: Path) -> int | None:
    need("pyarrow", str(file))
    import pyarrow.parquet

    try:
        count: int = pyarrow.parquet.read_metadata(file).num_rows
    except (pyarrow.ArrowInvalid, OSError):
        return None
    return count
