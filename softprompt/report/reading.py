"""What lies in a run folder, read back and checked. Knows JSON and TOML alone: a report needs neither the base nor torch."""

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from softprompt.config import Config
from softprompt.errors import RunError
from softprompt.events import Evaluated, Event, Step
from softprompt.formats import EVALUATION, newer
from softprompt.metrics import Verdict
from softprompt.runlog import RunFolder


class Facts(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Started(Facts):
    """run.json"""

    started: str
    versions: dict[str, str]


class Lengths(Facts):
    smallest: int
    median: float
    largest: int


class Split(Facts):
    """Rows of one split; lengths in tokens. `counts`: (length, how many rows have it)."""

    num_rows: int
    num_rejected: int
    num_cut: int
    num_supervised: int
    lengths: Lengths | None
    supervised: Lengths | None
    counts: list[tuple[int, int]]


class Data(Facts):
    """data.json"""

    steps: int
    train: Split
    eval: Split | None


class End(Facts):
    """One prompt in result.json."""

    train_loss: float
    findings: list[str]


class Result(Facts):
    """result.json"""

    steps: int
    ended: str | None
    seconds: float
    samples_per_second: float
    peak_bytes: int
    prompts: dict[str, End]


class Row(Facts):
    size: float
    near: list[tuple[str, float]]
    drift: float | None
    worth: float | None


class Alike(Facts):
    mean: float
    largest: float


class Inspection(Facts):
    """One prompt in inspection.json, what `softprompt inspect --json` writes."""

    base: str
    method: str
    position: str
    init: str
    rows: list[Row]
    cosines: list[list[float]]
    cosine_between_rows: Alike | None
    vocabulary_sizes: tuple[float, float, float] | None
    held_out_rows: int


class Prediction(Facts):
    """A line of predictions.jsonl."""

    contestant: str
    row: int
    text: str
    ended: bool
    question: str
    reference: str


class Evaluation(Facts):
    """evaluation.json, what `softprompt eval --json` writes, with the answers that lie beside it."""

    contestants: dict[str, dict[str, float | None]]
    intervals: dict[str, dict[str, tuple[float, float]]]
    metric: str
    verdicts: list[Verdict]
    labels: list[str]
    confusion: dict[str, list[list[int]]] | None
    calibration: dict[str, list[tuple[float, float, int]]] | None
    rows: int
    supervised_tokens: int
    lost: dict[str, list[str]] = {}
    answers: list[Prediction] = []

    @model_validator(mode="after")
    def whole(self) -> "Evaluation":
        named = {side for one in self.verdicts for side in (one.first, one.second)}
        for by_name in (self.intervals, self.confusion or {}, self.calibration or {}):
            named |= set(by_name)
        named |= set(self.lost)
        if not named <= set(self.contestants) or not any(self.metric in own for own in self.intervals.values()):
            raise ValueError("there are contestants or a metric without scores")
        tables: list[list[list[int]]] = list((self.confusion or {}).values())
        sizes = {len(table) for table in tables} | {len(row) for table in tables for row in table}
        if sizes - {len(self.labels)}:
            raise ValueError("the confusion has another size than the labels")
        return self


@dataclass(frozen=True)
class Prompt:
    """One prompt of a run, `name` for people. `losses` and what follows: one for each of `steps`; `held_out` by step."""

    name: str
    config: Config
    steps: Sequence[int]
    losses: Sequence[float]
    grad_norms: Sequence[float]
    lrs: Sequence[float]
    movements: Sequence[float]
    held_out: dict[int, float]
    end: End | None
    inspection: Inspection | None

    @property
    def best_step(self) -> int | None:
        """The evaluation with the lowest loss after training began, so far."""
        return min((step for step in self.held_out if step), key=lambda step: self.held_out[step], default=None)


@dataclass(frozen=True)
class Run:
    """A run as far as it is. `evaluations`: the newest first."""

    name: str
    config: Config
    started: Started
    data: Data | None
    result: Result | None
    prompts: list[Prompt]
    evaluations: list[Evaluation]


class Columns:
    """The numbers of a stream: its `steps`, and what the prompts had at each of them, step by step, prompt by prompt. As plain numbers,
    since the events of a million steps would fill the memory."""

    def __init__(self, num_prompts: int) -> None:
        self.num_prompts = num_prompts
        self.steps = array("q")
        self.losses, self.grad_norms, self.lrs, self.movements = (array("d") for _ in range(4))
        self.held_out: list[dict[int, float]] = [{} for _ in range(num_prompts)]

    def hear(self, event: Event) -> None:
        """Takes an event in. Raises ValueError for one of another number of prompts."""
        match event:
            case Step():
                self.steps.append(event.step)
                self.losses.extend(event.losses)
                self.grad_norms.extend(event.grad_norms)
                self.lrs.extend(event.lrs)
                self.movements.extend(event.movements)
                together = len(self.steps) * self.num_prompts
                if not len(self.losses) == len(self.grad_norms) == len(self.lrs) == len(self.movements) == together:
                    raise ValueError("a step of another number of prompts")
            case Evaluated():
                for held_out, loss in zip(self.held_out, event.losses, strict=True):
                    held_out[event.step] = loss


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these folders. Raises RunError for what is no run, or damaged."""
    names = [path.absolute().name for path in paths]
    return [_read_run(path, name if names.count(name) == 1 else str(path), len(paths)) for path, name in zip(paths, names, strict=True)]


def _read_run(path: Path, name: str, count: int) -> Run:
    folder = RunFolder.reopen(path)
    config = folder.config()
    members = config.members()
    columns = _read_stream(folder, len(members))
    result = _read(Result, folder, "result.json")
    inspected = folder.read("inspection.json") or {}
    prompts = []
    for index, (own, alone) in enumerate(members.items()):
        called = own if count == 1 else f"{name} / {own}"
        prompts.append(
            Prompt(
                name=name if len(members) == 1 else called,
                config=alone,
                steps=columns.steps,
                losses=columns.losses[index :: len(members)],
                grad_norms=columns.grad_norms[index :: len(members)],
                lrs=columns.lrs[index :: len(members)],
                movements=columns.movements[index :: len(members)],
                held_out=columns.held_out[index],
                end=result.prompts.get(own) if result else None,
                inspection=_checked(Inspection, inspected[own], path / "inspection.json") if own in inspected else None,
            )
        )
    started = _read(Started, folder, "run.json") or Started(started="", versions={})
    return Run(name, config, started, _read(Data, folder, "data.json"), result, prompts, _evaluations(path / "evaluations"))


def _read_stream(folder: RunFolder, num_prompts: int) -> Columns:
    columns = Columns(num_prompts)
    for event in folder.stream():
        try:
            columns.hear(event)
        except ValueError:
            raise RunError(f"{folder.events_file} is damaged: its steps are not of {num_prompts} prompts, as config.toml says") from None
    return columns


def _evaluations(folder: Path) -> list[Evaluation]:
    files = sorted(folder.glob("*/evaluation.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    return [_read_evaluation(file) for file in files]


def _read_evaluation(file: Path) -> Evaluation:
    answers = file.parent / "predictions.jsonl"
    values = _parsed(file.read_bytes(), file)
    if refusal := newer(file, values, EVALUATION):
        raise RunError(refusal)
    lines = answers.read_bytes().split(b"\n")[1:-1] if answers.is_file() else []  # the first names the evaluation
    said = [_checked(Prediction, _parsed(line, answers), answers) for line in lines]
    return _checked(Evaluation, values, file).model_copy(update={"answers": said})


def _parsed(text: bytes, file: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise RunError(f"{file} is damaged") from None


Model = TypeVar("Model", bound=BaseModel)


def _read(model: type[Model], folder: RunFolder, name: str) -> Model | None:
    values = folder.read(name)
    return None if values is None else _checked(model, values, folder.path / name)


def _checked(model: type[Model], values: Any, file: Path) -> Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        told = ": ".join(part for part in (".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")) if part)
        raise RunError(f"{file} is damaged, or of another version of softprompt: {told}") from None
