"""Questions of a prompt's task that somebody can try, from what its run's folder keeps. Without torch."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from softprompt.errors import Error
from softprompt.events import Sampled, from_line
from softprompt.report.reading import Prediction

NUM_SAMPLES = 6
LONGEST = 4_000  # characters of a question
LOOKED_AT = 200  # lines of an evaluation's answers
TAIL = 1 << 18  # bytes of a run's stream; what was sampled stands near its end


@dataclass(frozen=True)
class Sample:
    """A held-out row: what it asks, and the answer that it wants."""

    question: str
    wanted: str


def samples_of(run: Path) -> tuple[Sample, ...]:
    """Held-out rows of the newest evaluation with answers, else those that the run answered itself; none where there are neither, or
    what is there is damaged."""
    found: dict[str, Sample] = {}
    for read in (_evaluated, _sampled):
        with suppress(OSError, ValueError, Error):
            for sample in read(run):
                if len(sample.question) <= LONGEST:
                    found.setdefault(sample.question, sample)
        if found:
            break
    return tuple(islice(found.values(), NUM_SAMPLES))


def changed(run: Path) -> int:
    """When something in the run's folder last changed, in nanoseconds."""
    files = chain([run], run.glob("*.json*"), run.glob("evaluations/*/*"))
    return max((file.stat().st_mtime_ns for file in files if file.exists()), default=0)


def _evaluated(run: Path) -> Iterator[Sample]:
    files = sorted(run.glob("evaluations/*/predictions.jsonl"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[:1]:
        with open(file, "rb") as lines:
            whole = [line for line in islice(lines, 1, LOOKED_AT) if line.endswith(b"\n")]  # the first names the evaluation
        said = [Prediction.model_validate_json(line) for line in whole]
        for one in sorted(said, key=lambda one: one.row):
            yield Sample(one.question, one.reference)


def _sampled(run: Path) -> Iterator[Sample]:
    with open(run / "metrics.jsonl", "rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL))
        lines = stream.read().split(b"\n")
    for line in lines:
        if line.startswith(b'{"event": "sampled", '):
            event = from_line(line)
            if isinstance(event, Sampled):
                yield from (Sample(question, wanted) for question, wanted, _ in event.rows)
