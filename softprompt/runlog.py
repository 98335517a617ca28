"""The run folder: what was asked for, what it ran with, and what happened.

config.toml      the resolved configuration          rejected.jsonl   rows that were not used, with reasons
run.json         versions and start time             checkpoints/     what the run needs to go on
data.json        lengths and cuts of the rows        prompt/          the finished prompt; of a bank prompts/NAME/
metrics.jsonl    one event a line                    inspection.json  what the rows of each prompt are
evaluations/     what softprompt eval measured       result.json      the finished run in numbers
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from softprompt.atomic import new_folder, write_text
from softprompt.config import Config, load_config
from softprompt.data import Rejected
from softprompt.errors import RunError

PACKAGES = ("softprompt", "torch", "transformers", "peft", "tokenizers")


def package_versions() -> dict[str, str]:
    """Versions of what decides about numbers."""
    return {package: version(package) for package in PACKAGES}


class RunFolder:
    """One run's folder. `create` makes a new one, `reopen` goes on with an old one; neither overwrites anything."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.prompt = path / "prompt"
        self.prompts = path / "prompts"
        self.checkpoints = path / "checkpoints"

    @classmethod
    def create(cls, config: Config) -> "RunFolder":
        """Raises RunError when the folder exists or cannot be written."""
        path = Path(config.train.out)
        try:
            with new_folder(path) as draft:
                (draft / "config.toml").write_text(config.to_toml(), encoding="utf-8")
                started = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "versions": package_versions()}
                (draft / "run.json").write_text(json.dumps(started, indent=2) + "\n", encoding="utf-8")
                (draft / "metrics.jsonl").touch()
        except FileExistsError:
            raise RunError(_in_the_way(path)) from None
        except OSError as error:
            raise RunError(f"train.out = {path}: cannot write there: {error.strerror}") from None
        return cls(path)

    @classmethod
    def check_free(cls, path: Path) -> None:
        """Raises RunError early when `create` would, before anything slow is done."""
        if path.exists():
            raise RunError(_in_the_way(path))
        parent = next(folder for folder in [path, *path.absolute().parents] if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise RunError(f"train.out = {path}: cannot write in {parent}")

    @classmethod
    def reopen(cls, path: Path) -> "RunFolder":
        """Raises RunError when there is no run to go on with."""
        if not (path / "config.toml").is_file():
            raise RunError(f"{path} is not a run folder (no config.toml)")
        return cls(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second process out of the same run. Raises RunError when one is in it."""
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(f"{self.path}: another process is running this run") from None
            for draft in (*self.path.glob(".*.draft"), *self.checkpoints.glob(".*.draft")):  # left half-written by a kill
                shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
            yield

    def config(self) -> Config:
        """The configuration as it was resolved, with the folder's present place."""
        config = load_config(self.path / "config.toml")
        return config.model_copy(update={"train": config.train.model_copy(update={"out": str(self.path)})})

    def write_rejected(self, rejected: Sequence[Rejected]) -> None:
        lines = [json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in rejected]
        write_text(self.path / "rejected.jsonl", "".join(lines))

    def log(self, event: str, step: int, **values: Any) -> None:
        """Adds one line to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "step": step, **values}, ensure_ascii=False) + "\n")

    def events(self) -> list[dict[str, Any]]:
        """What happened so far, the lines of metrics.jsonl; a last one that was cut off by a kill is left out.

        Raises RunError for a damaged one before it.
        """
        file = self.path / "metrics.jsonl"
        lines, events = file.read_bytes().split(b"\n")[:-1] if file.is_file() else [], []
        for number, line in enumerate(lines, 1):
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if not isinstance(event, dict):
                raise RunError(f"{file}:{number}: the line is damaged")
            events.append(event)
        return events

    def forget_after(self, step: int) -> None:
        """Drops the lines of what will happen again, and a last line that was cut off by a kill."""
        kept = []
        for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                break
            if event["step"] <= step and event["event"] != "finished":
                kept.append(line + "\n")
        write_text(self.path / "metrics.jsonl", "".join(kept))

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


def run_of(path: Path) -> RunFolder | None:
    """The run that a prompt or checkpoint lies in, or None."""
    above = (folder for folder in (path, *path.absolute().parents[:3]) if (folder / "config.toml").is_file())
    return next((RunFolder(folder) for folder in above), None)


def _in_the_way(path: Path) -> str:
    if (path / "result.json").is_file():
        return f"{path} holds a finished run: choose another train.out"
    if (path / "config.toml").is_file():
        return f"{path} holds an unfinished run: softprompt train --resume {path}, or choose another train.out"
    return f"{path} exists and is not a run: choose another train.out"
