"""The run folder: what was asked for, what it ran with, and what happened.

config.toml      the resolved configuration          rejected.jsonl     rows that were not used, with reasons
run.json         versions and start time             start.safetensors  what the prompts started from
data.json        lengths and cuts of the rows        checkpoints/       what the run needs to go on
metrics.jsonl    one event a line (events.py)        prompt/            the finished prompt; of a bank prompts/NAME/
evaluations/     what softprompt eval measured       inspection.json    what the rows of each prompt are
study.jsonl      what a distillation was taught     result.json        the finished run in numbers
"""

import errno
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from softprompt.atomic import locked, new_file, new_folder, write_text
from softprompt.config import Config, ModelConfig, load_config
from softprompt.data import Rejected
from softprompt.errors import RunError
from softprompt.events import Event, Finished, Found, Preparing, Saved, Searching, Started, Studying, from_line, to_line
from softprompt.formats import RUN, newer
from softprompt.locations import PLACE

T = TypeVar("T")
POLL_SECONDS = 0.2
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # a full disk, a full quota
RETRY_SECONDS, WAIT_SECONDS = 5.0, 600.0  # between two tries, and in all, where there is no room
PACKAGES = ("softprompt", "torch", "transformers", "peft", "tokenizers")


def package_versions() -> dict[str, str]:
    """Versions of what decides about numbers."""
    return {package: version(package) for package in PACKAGES}


class RunFolder:
    """One run's folder. `creating` makes a new one, `reopen` goes on with an old one; neither overwrites anything."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.prompt = path / "prompt"
        self.prompts = path / "prompts"
        self.checkpoints = path / "checkpoints"
        self.events_file = path / "metrics.jsonl"
        self.start = path / "start.safetensors"

    @classmethod
    @contextmanager
    def creating(cls, config: Config) -> Iterator["RunFolder"]:
        """Yields a draft of a new run's folder to fill; it takes its place when the block ends well.

        Raises RunError when the folder exists or cannot be written.
        """
        path = Path(config.train.out)
        try:
            with new_folder(path) as draft:
                run = cls(draft)
                run.write_config(config)
                now = datetime.now(UTC).isoformat(timespec="seconds")
                run.write("run.json", {"format": RUN, "started": now, "versions": package_versions()})
                run.events_file.touch()
                yield run
        except FileExistsError:
            raise RunError(_in_the_way(path)) from None
        except OSError as error:
            raise RunError(f"train.out = {path}: cannot write there: {error.strerror}") from None

    @classmethod
    def check_free(cls, path: Path) -> None:
        """Raises RunError early when `creating` would, before anything slow is done."""
        if path.exists():
            raise RunError(_in_the_way(path))
        parent = next(folder for folder in [path, *path.absolute().parents] if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise RunError(f"train.out = {path}: cannot write in {parent}")

    @classmethod
    def reopen(cls, path: Path) -> "RunFolder":
        """Raises RunError when there is no run to go on with, or one of a newer softprompt."""
        if not (path / "config.toml").is_file():
            raise RunError(f"{path} is not a run folder (no config.toml)")
        run = cls(path)
        if refusal := newer(path, run.read("run.json"), RUN):
            raise RunError(refusal)
        return run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second process out of the same run. Raises RunError when one is in it. A file system that knows no locks, some
        network shares, is said, and the run goes on."""
        with locked(self.path / ".lock", wait=False, unlocked="start no second process on this run") as ours:
            if not ours:
                raise RunError(f"{self.path}: another process is running this run")
            for draft in (*self.path.glob(".*.draft"), *self.checkpoints.glob(".*.draft")):  # left half-written by a kill
                shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
            yield

    def config(self) -> Config:
        """The configuration as it was resolved, with the folder's present place. Remote code stays off, whatever the folder says."""
        config = load_config(self.path / "config.toml")
        train, model = config.train.model_copy(update={"out": str(self.path)}), config.model.model_copy(update={"trust_remote_code": False})
        return config.model_copy(update={"train": train, "model": model})

    def note_place(self, model: ModelConfig) -> None:
        """Keeps where the run's base lies now, and in which precision the run goes on, where that was not kept."""
        config, place = load_config(self.path / "config.toml"), {key: getattr(model, key) for key in (*PLACE, "dtype")}
        if config.model.model_copy(update=place) != config.model:
            moved = config.model_copy(update={"model": config.model.model_copy(update=place)})
            write_text(self.path / "config.toml", moved.to_toml())

    def write_config(self, config: Config) -> None:
        write_text(self.path / "config.toml", config.to_toml())

    def write_rejected(self, rejected: Sequence[Rejected]) -> None:
        lines = [json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in rejected]
        write_text(self.path / "rejected.jsonl", "".join(lines))

    def append(self, event: Event) -> None:
        """Adds an event to the stream, whole or not at all. Raises OSError, also where the stream has vanished."""
        line = to_line(event).encode("utf-8") + b"\n"
        with open(self.events_file, "r+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(end)  # half a line would run into the next one
                raise

    def patiently(self, write: Callable[[], T]) -> T:
        """What `write` returns. On a full disk or quota the run waits and tries again.

        Raises RunError when no room comes, and at once when something else keeps it from writing.
        """
        began, waiting = time.monotonic(), False
        while True:
            try:
                return write()
            except (OSError, SafetensorError) as error:
                number, reason, place = _cause(error)
            if number not in NO_ROOM or time.monotonic() - began >= WAIT_SECONDS:
                raise RunError(self._stopped(number, reason, place))
            if not waiting:
                logging.getLogger(__name__).warning("%s: %s: the run waits for room, %g s at most", self.path, reason, WAIT_SECONDS)
            waiting = True
            time.sleep(RETRY_SECONDS)

    def _stopped(self, number: int | None, reason: str, place: str | None) -> str:
        if not self.path.is_dir():
            return f"{self.path} has vanished while its run was writing there: bring it back, then softprompt train --resume {self.path}"
        rest = f"the last checkpoint is kept: softprompt train --resume {self.path}"
        if number in NO_ROOM:
            return f"{self.path}: {reason}, for {WAIT_SECONDS:g} s: make room; {rest}"
        return f"{place or self.path} cannot be written: {reason}; {rest}"

    def events(self) -> list[Event]:
        """What happened so far; a last line that was cut off by a kill is left out. Raises RunError for a damaged one before it."""
        return list(self.stream())

    def stream(self) -> Iterator[Event]:
        """The same one by one: those of a million steps would fill the memory."""
        for _, event in self._read():
            yield event

    def follow(self, offset: int = 0) -> Iterator[tuple[int, Event]]:
        """Events as they are appended, also while another process writes, each with the place in the stream behind it, where another
        call goes on; to the end of the run. Where the run is resumed from an earlier step, its Started event says from which.

        Raises RunError for a damaged line.
        """
        begin, last = offset, b""
        seen: list[int] = []  # a hash of every line that was read
        while True:
            with open(self.events_file, "rb") as stream:
                stream.seek(offset - len(last))
                new = stream.read()
            if new.startswith(last):
                lines = new[len(last) :].split(b"\n")[:-1]
            else:
                kept, lines = self._after_a_cut(begin, seen)
                offset = kept if lines else offset
            for line in lines:
                event = self._event(line, f"byte {offset}")
                last = line + b"\n"
                offset += len(last)
                seen.append(hash(line))
                yield offset, event
                if isinstance(event, Finished):
                    return
            time.sleep(POLL_SECONDS)

    def _after_a_cut(self, begin: int, seen: list[int]) -> tuple[int, list[bytes]]:
        """Where the stream goes on after it was cut back to a checkpoint, and the lines from there; none before it has grown again.
        Leaves in `seen` what still stands."""
        lines = self.events_file.read_bytes()[begin:].split(b"\n")[:-1]
        kept = next((index for index, (line, old) in enumerate(zip(lines, seen, strict=False)) if hash(line) != old), len(lines))
        if kept == len(lines):
            return begin + sum(len(line) + 1 for line in lines), []
        while kept and not lines[kept].startswith(b'{"event": "started"'):  # resumed from the beginning, which looks as it did
            kept -= 1
        del seen[kept:]
        return begin + sum(len(line) + 1 for line in lines[:kept]), lines[kept:]

    def _read(self) -> Iterator[tuple[bytes, Event]]:
        """Whole lines with their events."""
        if not self.events_file.is_file():
            return
        with open(self.events_file, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    yield line, self._event(line, number)

    def _event(self, line: bytes, place: int | str) -> Event:
        try:
            return from_line(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise RunError(f"{self.events_file}:{place}: the line is damaged") from None
        except ValueError as error:
            raise RunError(f"{self.events_file}:{place}: the line is damaged, or of another version of softprompt: {error}") from None

    def forget_after(self, step: int) -> None:
        """Drops what will happen again after a checkpoint of this step (-1: from the beginning), and a last line that was cut off."""
        told = False
        with new_file(self.events_file) as file:
            for line, event in self._read():
                if _stays(event, step):
                    file.write(line)
                    told |= isinstance(event, Saved) and event.step == step
            if step >= 0 and not told:  # killed before it could say so
                file.write(to_line(Saved(step, self.checkpoint(step))).encode("utf-8") + b"\n")

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint after so many steps lies."""
        return self.checkpoints / f"step-{step:06d}"

    def write(self, name: str, facts: dict[str, Any]) -> None:
        """Writes a JSON file of the folder."""
        write_text(self.path / name, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder, or None where it is not there. Raises RunError for a damaged one."""
        file = self.path / name
        if not file.is_file():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError):
            raise RunError(f"{file} is damaged") from None

    def result(self) -> dict[str, Any] | None:
        """The numbers of a finished run, or None."""
        return self.read("result.json")


def _cause(error: OSError | SafetensorError) -> tuple[int | None, str, str | None]:
    """Number, reason and place of what keeps something from being written; safetensors says its number in words."""
    if isinstance(error, OSError):
        return error.errno, error.strerror or str(error), error.filename
    found = re.search(r"\(os error (\d+)\)", str(error))
    return (int(found[1]), os.strerror(int(found[1])), None) if found else (None, str(error), None)


def _stays(event: Event, step: int) -> bool:
    """Whether an event was before a checkpoint of this step."""
    if isinstance(event, Finished):
        return False
    if isinstance(event, Started):
        return event.first_step <= step
    return isinstance(event, Preparing | Studying | Searching | Found) or event.step <= step


def run_of(path: Path) -> RunFolder | None:
    """The run that a prompt or checkpoint lies in, or None. Raises RunError for one of a newer softprompt."""
    above = (folder for folder in (path, *path.absolute().parents[:3]) if (folder / "config.toml").is_file())
    return next((RunFolder.reopen(folder) for folder in above), None)


def _in_the_way(path: Path) -> str:
    if (path / "result.json").is_file():
        return f"{path} holds a finished run: choose another train.out"
    if (path / "config.toml").is_file():
        return f"{path} holds an unfinished run: softprompt train --resume {path}, or choose another train.out"
    return f"{path} exists and is not a run: choose another train.out"
