"""Rows made ready for training: read in one pass, tokenized in batches, and kept for the next time.

What is kept lies in the cache, a folder for each set of rows, named by all that decides about its content: the bytes of the files and
where they lie, the settings of [data], the template, the tokenizer, and the code that makes rows. Fewer rows than SMALL are made anew
each time.
"""

import gc
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from softprompt.atomic import new_folder, remove_folder
from softprompt.config import Sources
from softprompt.data import Example, Reading, Rejected
from softprompt.data.content import Content, content_of
from softprompt.data.examples import fields_text, turns_text
from softprompt.encode import Draft, Encoder
from softprompt.engine.unpack import cache_root
from softprompt.errors import DataError, TooLong
from softprompt.events import Preparing
from softprompt.flat import Flat, FlatWriter, StoredExamples, map_folder

BATCH, SMALL = 2_000, 2_000  # rows that are tokenized together; rows below which nothing is kept
EARLY = 10_000  # rows after which it is judged for the first time how many cannot be used
CACHE_BYTES = 20 * 2**30  # what was not used for longest goes when there is more
SHOWN_KINDS = 3
PACKAGES = ("tokenizers", "transformers", "jinja2", "datasets", "pyarrow")
CODE = ("data", "encode.py", "templates.py", "literal.py", "thinking.py", "flat.py", "prepared.py")


@dataclass(frozen=True)
class Wanted:
    """Which rows, and how: the settings of [data]. `cache`: whether they may be kept. `allowed`: rows that may be unusable before the
    pass ends with an error; None: any number."""

    source: Sources
    max_length: int
    limit: int | None = None
    label_words: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    stream: bool = False
    cache: bool = True
    allowed: int | None = None


@dataclass(frozen=True)
class Prepared:
    """The rows of a source. In `flat` every example has its line, those that cannot be used with length 0; `examples` has as many.
    `stubborn`: (place, control tokens) of rows that hold such in spite of everything. `fingerprint`: see data.Loaded."""

    flat: Flat
    examples: Sequence[Example]
    labels: tuple[str, ...]
    rejected: tuple[Rejected, ...]
    notes: tuple[str, ...]
    stubborn: tuple[tuple[str, tuple[str, ...]], ...]
    fingerprint: str


Pass = Generator[Preparing, None, Prepared]


def preparing(encoder: Encoder, wanted: Wanted) -> Pass:
    """The rows, from the cache where they are there. Yields how far it is.

    Raises DataError when the source cannot be read, changes while it is read, or holds more unusable rows than `wanted` allows.
    """
    content = content_of(wanted.source)
    place = _place(content, encoder, wanted)
    if place is None:
        return (yield from _made(encoder, wanted, content, None))
    with _alone(place):
        found = _kept(place)
        if found is None:
            found = yield from _made(encoder, wanted, content, place)
            _trim(place)
    if wanted.allowed is not None:
        check_rejected(found.rejected, wanted.allowed)
    return found


def check_rejected(rejected: "tuple[Rejected, ...] | list[Rejected]", max_rejected: int, seen: int | None = None) -> None:
    """Raises DataError when more rows were rejected than allowed, with the kinds of reasons counted. `seen`: of so many rows, where there
    are more."""
    if len(rejected) <= max_rejected:
        return
    kinds: dict[str, list[Rejected]] = {}
    for item in rejected:
        kinds.setdefault(item.reason, []).append(item)
    most_first = sorted(kinds.values(), key=len, reverse=True)
    shown = "; ".join(map(_kind, most_first[:SHOWN_KINDS]))
    others = sum(map(len, most_first[SHOWN_KINDS:]))
    more = f"; and {others} more" if others else ""
    number = f"{len(rejected)} rows" if seen is None else f"{len(rejected):,} of the first {seen:,} rows"
    raise DataError(f"{number} rejected, data.max_rejected allows {max_rejected}: {shown}{more}")


def _kind(items: list[Rejected]) -> str:
    """A reason, the first row that it is about and how many more there are."""
    lengths = [item.length for item in items if item.length is not None]
    keeps = f"; data.max_length = {max(lengths)} keeps {'it' if len(items) == 1 else 'them'} whole" if lengths else ""
    others = f" (and {len(items) - 1:,} more)" if len(items) > 1 else ""
    return f"{items[0].source}{others}: {items[0].reason}{keeps}"


# ---- one pass ------------------------------------------------------------------------------------------------------


def _made(encoder: Encoder, wanted: Wanted, content: Content, place: Path | None) -> Pass:
    """The rows, read and tokenized; into the folder `place`, or where that is None into files that vanish. Few rows stay in memory."""
    work = _Work(encoder, wanted)
    try:
        with ExitStack() as drafts:
            folder: Path | None = None
            drafts.callback(work.writer.release)
            for now in work.run(content.num_rows):
                if folder is None and len(work.writer) >= SMALL:
                    folder = drafts.enter_context(_vanishing() if place is None else new_folder(place))
                    work.writer.to_folder(folder)
                    work.examples = None
                if folder is not None:  # nobody need wait for fewer
                    yield now
            work.writer.close()
            if content.name is not None and content_of(wanted.source).name != content.name:
                raise DataError(f"{_named(wanted.source)} changed while it was read: start again")
            if folder is None:
                return work.prepared(work.writer.in_memory(), work.examples)
            if place is None:
                return work.prepared(map_folder(folder))
            _write_facts(folder, work.prepared(map_folder(folder)))
    except OSError as error:
        found = _kept(place) if place else None
        if found is not None:  # without locks another process may have been faster
            return found
        where = place.parent if place else tempfile.gettempdir()
        raise DataError(f"tokenized rows cannot be written to {where}: {error.strerror}; SOFTPROMPT_CACHE names another folder") from None
    found = _kept(place) if place else None
    assert found is not None, "it has just been written"
    return found


def _named(source: Sources) -> str:
    return source if isinstance(source, str) else ", ".join(source)


class _Work:
    """The pass over a source: while a batch of rows is tokenized in a thread, the one before it is stored and the next one read."""

    def __init__(self, encoder: Encoder, wanted: Wanted) -> None:
        self.encoder, self.wanted = encoder, wanted
        self.reading = Reading(wanted.source, wanted.limit, wanted.label_words, wanted.columns, wanted.stream)
        self.writer = FlatWriter()
        self.labels: dict[str, int] = {}
        self.rejected: list[Rejected] = []
        self.stubborn: list[tuple[str, tuple[str, ...]]] = []
        self.digest = hashlib.sha256()
        self.num_seen = 0
        self.examples: list[Example] | None = []  # as long as they are few

    def run(self, total: int | None) -> Iterator[Preparing]:
        began = time.perf_counter()
        self.encoder.warm_up()
        waiting: deque[tuple[list[Any], list[Draft], Future[list[list[int]]]]] = deque()
        with ThreadPoolExecutor(1) as thread, _old_objects_at_rest():
            for batch in _batches((self.reading.part, row) for row in self.reading):
                drafts = self.encoder.drafts([row for _, row in batch if isinstance(row, Example)])
                waiting.append((batch, drafts, thread.submit(self.encoder.tokenized, drafts)))
                if len(waiting) > 1:
                    yield self._store(waiting, total, began)
            while waiting:
                yield self._store(waiting, total, began)

    def _store(self, waiting: Any, total: int | None, began: float) -> Preparing:
        batch, drafts, pieces = waiting.popleft()
        encoded = self.encoder.finished(drafts, pieces.result(), self.wanted.max_length)
        for part, row in batch:
            if isinstance(row, Rejected):
                self.rejected.append(row)
            else:
                self._add(part, row, next(encoded))
        self.num_seen += len(batch)
        self.writer.end_batch()
        if self.wanted.allowed is not None and self.num_seen >= EARLY:
            check_rejected(self.rejected, self.wanted.allowed, self.num_seen)
        if self.wanted.limit is not None:
            total = self.wanted.limit if total is None else min(total, self.wanted.limit)
        return Preparing(self.num_seen, total, time.perf_counter() - began)

    def _add(self, part: int, example: Example, row: Any) -> None:
        text = turns_text(example)
        fields = fields_text(example) if self.encoder.template.reads_fields else ""
        if self.examples is not None:
            self.examples.append(example)
        self.digest.update(text.encode() + b"\n")
        label = -1 if example.label is None else self.labels.setdefault(example.label, len(self.labels))
        if isinstance(row, DataError):
            self.rejected.append(rejected_by(row, example))
            self.writer.add(None, example, text, label=label, part=part, fields=fields)
            return
        if found := self.encoder.stubborn(example):
            self.stubborn.append((example.source, found))
        unlearned = self.encoder.num_unlearned(example, row)
        self.writer.add(row, example, text, label=label, part=part, unlearned=unlearned, fields=fields)

    def prepared(self, flat: Flat, examples: Sequence[Example] | None = None) -> Prepared:
        if not len(flat.rows):
            first = self.rejected[0]
            self.rejected[0] = Rejected(first.source, first.reason + self.reading.hint())
        labels, kept = tuple(self.labels), examples if examples is not None else StoredExamples(flat, tuple(self.labels))
        return Prepared(flat, kept, labels, tuple(self.rejected), self.reading.notes, tuple(self.stubborn), self.digest.hexdigest())


def rejected_by(error: DataError, example: Example) -> Rejected:
    return Rejected(example.source, error.reason, error.length if isinstance(error, TooLong) else None)


def _batches(rows: Iterable[Any]) -> Iterator[list[Any]]:
    rows = iter(rows)
    while batch := list(islice(rows, BATCH)):
        yield batch


@contextmanager
def _old_objects_at_rest() -> Iterator[None]:
    """Python's collector leaves out what was there before: rows are many small objects, and for each generation of them it would look at
    all of torch and transformers, a third of the time (LOG.md)."""
    if gc.get_freeze_count():  # somebody else's
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _vanishing() -> Iterator[Path]:
    """A folder that is gone when the block ends: what is mapped from it stays until the process ends. On Windows, which removes no file
    that is mapped, the system's cleaning takes it."""
    folder = Path(tempfile.mkdtemp(prefix="softprompt-rows-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- the cache -----------------------------------------------------------------------------------------------------


def _place(content: Content, encoder: Encoder, wanted: Wanted) -> Path | None:
    """Where the rows lie, or would lie; None where they are not to be kept, cannot be told from others, or are too few."""
    few = content.num_rows is not None and content.num_rows < SMALL
    root = cache_root() / "rows"
    if content.name is None or few or not wanted.cache or not _writable(root):
        return None
    tokenizer = _tokenizer_name(encoder)  # a third of a second for the largest vocabularies
    return None if tokenizer is None else root / _name(content.name, tokenizer, encoder, wanted)


def _name(content: str, tokenizer: str, encoder: Encoder, wanted: Wanted) -> str:
    """sha256 over everything that decides about the arrays and the facts beside them."""
    told = {name: value for name, value in vars(wanted).items() if name not in ("cache", "allowed")}
    template = encoder.template
    chat = encoder.tokenizer.chat_template if template.writes_bos else None
    read_as = (template.name, chat, template.date, encoder.system, encoder.bos_id, encoder.num_tokens)
    versions = [version(package) for package in PACKAGES]
    return hashlib.sha256(repr((content, tokenizer, sorted(told.items()), read_as, versions, _code())).encode()).hexdigest()[:32]


def _tokenizer_name(encoder: Encoder) -> str | None:
    """sha256 over the tokenizer; None for one that is written in Python, which cannot be known by its settings."""
    tokenizer = encoder.tokenizer
    if not tokenizer.is_fast:
        return None
    own = (type(tokenizer).__qualname__, tokenizer.special_tokens_map, sorted(encoder.end_ids))
    return hashlib.sha256((tokenizer.backend_tokenizer.to_str() + repr(own)).encode()).hexdigest()


def _code() -> str:
    """sha256 over the modules that make rows of files."""
    digest = hashlib.sha256()
    for name in CODE:
        found = files("softprompt") / name
        for file in [found] if found.is_file() else sorted(found.iterdir(), key=lambda one: one.name):
            if file.name.endswith(".py"):
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """One process at a time makes these rows; the others wait, and find them. Without locks each makes its own, and one is kept."""
    lock = FileLock(place.with_name(f"{place.name}.lock"))
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            logging.getLogger(__name__).warning("another process prepares the same rows: waiting for it")
            lock.acquire()
    except (OSError, NotImplementedError):
        yield
        return
    try:
        _clear(place)
        yield
    finally:
        lock.release()


def _clear(place: Path) -> None:
    """Removes what a kill has left half-written; the lock of these rows must be held."""
    for draft in place.parent.glob(f".{place.name}.*.draft"):
        shutil.rmtree(draft, ignore_errors=True)


def _write_facts(folder: Path, found: Prepared) -> None:
    facts = {name: value for name, value in vars(found).items() if name not in ("flat", "examples")}
    text = json.dumps({**facts, "rejected": [asdict(one) for one in found.rejected]})
    (folder / "facts.json").write_text(text, encoding="utf-8", newline="\n")


def _writable(root: Path) -> bool:
    """Whether anything can be kept: a cache that cannot be written costs time, not the run."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(root, os.W_OK)


def _kept(place: Path) -> Prepared | None:
    """What lies in the cache; a damaged folder is removed."""
    if not place.is_dir():
        return None
    try:
        facts = json.loads((place / "facts.json").read_text(encoding="utf-8"))
        flat = map_folder(place)
        os.utime(place)
    except (OSError, ValueError):
        remove_folder(place)
        return None
    rejected = tuple(Rejected(**one) for one in facts["rejected"])
    stubborn = tuple((row, tuple(tokens)) for row, tokens in facts["stubborn"])
    labels = tuple(facts["labels"])
    return Prepared(flat, StoredExamples(flat, labels), labels, rejected, tuple(facts["notes"]), stubborn, facts["fingerprint"])


def _trim(newest: Path) -> None:
    """Removes what was not used for longest until the rest is within CACHE_BYTES, and the drafts of processes that are gone. What another
    process has mapped stays its own until it ends."""
    root = newest.parent
    for draft in root.glob(".*.draft"):
        name = draft.name[1:].partition(".")[0]
        if name != newest.name:
            _remove(root, name, draft)
    folders = [(folder.stat().st_mtime, folder) for folder in root.iterdir() if folder.is_dir() and folder.name[0] != "."]
    room = CACHE_BYTES
    for _, folder in sorted(folders, key=lambda one: (one[1] != newest, -one[0])):
        room -= sum(file.stat().st_size for file in folder.iterdir())
        if room < 0 and folder != newest:
            _remove(root, folder.name, folder)


def _remove(root: Path, name: str, folder: Path) -> None:
    """Unless somebody works on the rows of this name."""
    with suppress(OSError, NotImplementedError, Timeout), FileLock(root / f"{name}.lock", blocking=False):
        remove_folder(folder)
