"""Files and folders that are there whole or not at all: written beside their place, flushed to disk, then renamed; and locks."""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

PAUSES = (0.01, 0.05, 0.2, 1.0)  # seconds


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `path` when the block ends well and vanishes when it does not.

    Raises FileExistsError when `path` is there already.
    """
    if path.exists():
        raise FileExistsError(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f".{path.name}.{os.getpid()}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        for file in draft.rglob("*"):
            if file.is_file():
                _flush(file)
        _patiently(draft.rename, path)
        _flush_folder(path.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Takes a folder away in one motion. One that somebody holds open, on a system that minds, stays as it is."""
    draft = path.parent / f".{path.name}.{os.getpid()}.draft"
    with suppress(OSError):
        path.rename(draft)
    shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yields an empty file that takes the place of `path` when the block ends well and vanishes when it does not."""
    draft = path.parent / f".{path.name}.{os.getpid()}.draft"
    try:
        with open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _patiently(draft.replace, path)
        _flush_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def _patiently(move: Callable[[Path], object], path: Path) -> None:
    """Windows moves nothing that somebody has open, if only for a moment: another process that follows a run, a virus scanner."""
    for pause in PAUSES if os.name == "nt" else ():
        try:
            move(path)
            return
        except PermissionError:
            time.sleep(pause)
    move(path)


def write_text(path: Path, text: str) -> None:
    """Replaces a file's text in one motion; line ends stay as they are."""
    with new_file(path) as file:
        file.write(text.encode("utf-8"))


def _flush(path: Path, how: int = os.O_RDWR) -> None:
    descriptor = os.open(path, how)  # Windows flushes only what may be written to
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: Path) -> None:
    """Makes a renaming last. Windows opens no folders, and some network shares flush none: the file itself is flushed by then."""
    with suppress(OSError):
        _flush(path, os.O_RDONLY)


@contextmanager
def locked(path: Path, *, wait: bool, unlocked: str) -> Iterator[bool]:
    """Yields whether the lock of this file is held here; a kill gives it back. `wait`: until it is. A file system that knows no locks,
    some network shares, is said with `unlocked`, and taken for one where nobody else is."""
    lock, ours = FileLock(path, blocking=wait), True
    try:
        lock.acquire()
    except Timeout:
        ours = False
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        logging.getLogger(__name__).warning("%s: no locks here (%s): %s", path.parent, reason, unlocked)
    try:
        yield ours
    finally:
        lock.release()
