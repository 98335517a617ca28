"""predictions.jsonl: what every contestant answered to every row, written row by row, so that an evaluation can go on.

The first line names the evaluation and its format; the file is read again only by the same one.
"""

import json
from pathlib import Path
from typing import Any

from softprompt.atomic import write_text
from softprompt.engine.world import World
from softprompt.errors import RunError
from softprompt.formats import EVALUATION, newer


class Predictions:
    """Answers by contestant and row number. Without a path they are kept in memory alone; of several processes the first one alone reads
    and writes the file."""

    def __init__(self, path: Path | None, key: str, world: World = World(), of: str = "evaluation", out: str = "--out") -> None:
        """`of`, `out`: what the file belongs to, and what names its folder. Raises RunError when the file is another's or cannot be
        written."""
        self.path = path if world.first else None
        self._other = f"{path} is not of this {of}: remove it, or choose another {out}"
        kept = world.told(lambda: [] if path is None else self._begun(path, key))
        self.answers: dict[tuple[str, int], dict[str, Any]] = {(one["contestant"], one["row"]): one for one in map(json.loads, kept)}

    def _begun(self, path: Path, key: str) -> list[str]:
        """The lines of an earlier try, which alone are left in the file."""
        try:
            whole = self._read(path, key) if path.exists() else []
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, "".join(line + "\n" for line in [json.dumps({"format": EVALUATION, "evaluation": key}), *whole]))
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error.strerror}") from None
        return whole

    def _read(self, path: Path, key: str) -> list[str]:
        """The whole lines of an earlier try; a last one that was cut off by a kill is dropped."""
        first, *lines = path.read_text(encoding="utf-8").split("\n")
        try:
            named = json.loads(first)
        except ValueError:
            named = None
        if refusal := newer(path, named, EVALUATION):
            raise RunError(refusal)
        if not isinstance(named, dict) or named.get("evaluation") != key:
            raise RunError(self._other)
        return lines[:-1]

    def add(self, answer: dict[str, Any]) -> None:
        """Keeps and writes one answer."""
        self.answers[answer["contestant"], answer["row"]] = answer
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(answer, ensure_ascii=False) + "\n")
