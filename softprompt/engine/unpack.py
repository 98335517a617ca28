"""GGUF files as Hugging Face folders: unpacked once, kept in the cache.

transformers reads a GGUF file's vocabulary three times over, element by element: a minute for Gemma's 262,144 tokens, at
every start. The unpacked folder holds the same numbers and loads in seconds.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from softprompt.atomic import new_folder, write_text
from softprompt.spellings import settings_in_both, tokenizer_in_both

FINGERPRINT = "fingerprint.txt"  # of the weights
NUM_SAMPLES, SAMPLE_BYTES = 256, 65536


def cache_root() -> Path:
    """Where files are kept that can be made again: SOFTPROMPT_CACHE, else a folder of the user's cache, else, where there is no home that
    can be written, one among the system's temporary files."""
    if os.environ.get("SOFTPROMPT_CACHE"):
        return Path(os.environ["SOFTPROMPT_CACHE"])
    return _writable_or_temporary(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(os.path.join("~", ".cache")))


@cache
def _writable_or_temporary(caches: str) -> Path:
    folder = Path(caches) / "softprompt"
    try:
        if not folder.is_absolute():  # a user without a home
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        reason = error.strerror
    user = os.getuid() if hasattr(os, "getuid") else None  # Windows has a folder of temporary files for each user
    found = Path(tempfile.gettempdir()) / ("softprompt" if user is None else f"softprompt-{user}")
    found.mkdir(mode=0o700, exist_ok=True)
    if user is not None and (found.is_symlink() or found.stat().st_uid != user):  # somebody else's
        found = Path(tempfile.mkdtemp(prefix="softprompt-"))
    logging.getLogger(__name__).warning("%s: %s: caches lie in %s; SOFTPROMPT_CACHE names another folder", folder, reason, found)
    return found


def unpacked_folder(gguf_file: Path, dtype: str) -> Path:
    """Where the unpacked form of a GGUF file lies, or would lie; decided by its content, not by its place."""

    return cache_root() / "unpacked" / f"{gguf_file.stem}-{dtype}-{content_hash(gguf_file)}"


def keep_unpacked(model: Any, tokenizer: Any, folder: Path) -> None:
    """Saves a model that was read from GGUF, if the disk has room for twice its size; without room, nothing happens."""
    needed = 2 * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder.parent).free < needed:
            return
        with new_folder(folder) as draft:
            model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
            spell_for_others(draft)
    except OSError:  # a cache that cannot be written costs time, not the run
        return


def note_fingerprint(folder: Path, fingerprint: str) -> None:
    """Keeps with an unpacked file which weights are in it, for those who do not load them."""
    file = folder / FINGERPRINT
    if folder.is_dir() and not file.is_file():
        with suppress(OSError):
            write_text(file, fingerprint)


def known_fingerprints(gguf_file: Path) -> frozenset[str]:
    """Of the weights of a GGUF file, where it has been unpacked here and loaded before; decided by its content."""
    found = (cache_root() / "unpacked").glob(f"*-{content_hash(gguf_file)}/{FINGERPRINT}")
    return frozenset(file.read_text(encoding="utf-8") for file in found)


def spell_for_others(folder: Path) -> None:
    """Its settings in both spellings: other engines read such a folder too."""
    for name, in_both in (("config.json", settings_in_both), ("tokenizer_config.json", tokenizer_in_both)):
        before = json.loads((folder / name).read_text(encoding="utf-8"))
        both = in_both(before)
        if both != before:
            write_text(folder / name, json.dumps(both, indent=2, ensure_ascii=False) + "\n")


def content_hash(path: Path) -> str:
    """sha256 of the size and of evenly spread samples, 16 MB at most."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for index in range(NUM_SAMPLES):
            file.seek(index * max(0, size - SAMPLE_BYTES) // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
