"""A prompt in an archive, unpacked with suspicion: only known files, no more bytes than allowed, whole or not at all."""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from softprompt.atomic import new_folder
from softprompt.serve.refusals import Refused

NEEDED = ("card.json", "adapter_model.safetensors")
FILES = (*NEEDED, "adapter_config.json", "README.md")
MOST_ENTRIES = 16
DAMAGED = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, UnicodeError, ValueError)


class Bounded(io.RawIOBase):
    """Reads on until so many bytes were read: a small archive may unpack to anything, names and headers too."""

    def __init__(self, source: gzip.GzipFile, most: int) -> None:
        self.source, self.left = source, most

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self.source.read(self.left + 1 if size < 0 else min(size, self.left + 1))
        self.left -= len(data)
        if self.left < 0:
            raise _refused("it unpacks to more than this server takes")
        return data


def unpack(archive: bytes, place: Path, most: int) -> None:
    """Makes `place` the folder of the prompt in a .tar.gz file. Raises Refused, FileExistsError, and OSError where there is no room."""
    with new_folder(place) as draft, gzip.open(io.BytesIO(archive)) as unzipped:
        found = set()
        try:
            with tarfile.open(fileobj=Bounded(unzipped, most), mode="r|") as tar:
                for name, content in _members(tar):
                    if name in found:
                        raise _refused(f"it holds {name} twice")
                    found.add(name)
                    (draft / name).write_bytes(content)
        except DAMAGED as error:
            raise _refused(f"it is no .tar.gz file, or a damaged one: {error}") from None
        missing = [name for name in NEEDED if name not in found]
        if missing:
            raise _refused(f"{missing[0]} is missing")


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """The files of an archive, which may lie in one folder."""
    folders = set()
    for number, member in enumerate(tar):
        if number == MOST_ENTRIES:
            raise _refused(f"it holds more than {MOST_ENTRIES} entries")
        path = PurePosixPath(member.name.removeprefix("./"))
        if member.isdir() and len(path.parts) <= 1 and path.parts != ("..",) and not path.is_absolute():
            continue
        if not member.isreg() or path.name not in FILES or len(path.parts) > 2 or path.is_absolute() or path.parts[0] == "..":
            raise _refused(f"it holds {member.name[:100]!r}: only {', '.join(FILES)} are taken, at its top or in one folder")
        folders.add(path.parent)
        if len(folders) > 1:
            raise _refused("its files lie in different folders")
        content = tar.extractfile(member)
        assert content is not None
        yield path.name, content.read()


def _refused(reason: str) -> Refused:
    return Refused(f"the archive is refused: {reason}", code="invalid_archive")
