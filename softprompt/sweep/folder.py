"""The folder of a sweep:

sweep.json    what is tried, and on which rows    journal.log    the trials, as Optuna keeps them
banks/NAME/   the run of each bank                evaluations/   the best prompt on rows that did not choose it
result.json   the finished sweep                  report.html    the trials compared
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, ValidationError

from softprompt.atomic import new_folder, write_text
from softprompt.config import RANGE, Config, Member, Sources, load_config
from softprompt.data import load_examples
from softprompt.errors import ConfigError, DataError, RunError
from softprompt.formats import SWEEP, newer
from softprompt.locations import with_absolute_paths
from softprompt.runlog import RunFolder
from softprompt.sweep.space import Bank, Dimension, banks_of, check_swept, draw, of_trial, read_space

USUAL_BANK = 8  # trials that share a run, where nothing is said
PIECES = 10  # of a source, each of which gives rows that judge
JUDGING = 0.5  # share of the held-out rows that judge


class Spec(BaseModel):
    """sweep.json. `config`: what all trials share; `trials`: the settings of each; `judge`: the rows that judge the best prompt; `id`:
    the sweep's name in its storage, an address or file where that is not journal.log."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: int = SWEEP
    id: str
    started: str
    config: dict[str, Any]
    dimensions: tuple[Dimension, ...]
    trials: tuple[dict[str, Any], ...]
    most: int
    prune: bool
    judge: tuple[str, ...]
    storage: str | None


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder, wherever it lies now, and what is tried in it."""

    path: Path
    spec: Spec

    @property
    def storage(self) -> str:
        """File or address of the trials."""
        return self.spec.storage or str(self.path / "journal.log")

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(one.key for one in self.spec.dimensions)

    @cached_property
    def config(self) -> Config:
        return load_config(self.spec.config, where=str(self.path / "sweep.json"))

    @cached_property
    def configs(self) -> list[Config]:
        """That of every trial."""
        return [of_trial(self.config, values) for values in self.spec.trials]

    @cached_property
    def banks(self) -> list[Bank]:
        return banks_of(self.configs, self.spec.most)

    def run_of(self, bank: int, trials: Sequence[int]) -> Path:
        """Where the run of a bank lies, whose trials are now `trials`: without those whose loss was not finite, it begins anew."""
        lost = len(self.banks[bank]) - len(trials)
        return self.path / "banks" / (f"bank-{bank:03d}" + (f"-without-{lost}" if lost else ""))

    def config_of(self, bank: int, trials: Sequence[int]) -> Config:
        """The configuration that trains these trials at once; its held-out rows are those of the sweep, whatever seeds differ."""
        shared = {key: value for key, value in self.spec.trials[trials[0]].items() if key.partition(".")[0] in ("train", "data")}
        shared.pop("train.seed", None)
        config = of_trial(self.config, shared)
        prompt = config.prompt.model_copy(update={"bank": tuple(self._member(number) for number in trials)})
        train = config.train.model_copy(update={"out": str(self.run_of(bank, trials)), "trackers": ()})
        return config.model_copy(update={"prompt": prompt, "train": train})

    def _member(self, number: int) -> Member:
        values = self.spec.trials[number]
        own = {section: {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{section}.")} for section in OWN}
        return Member(name=name_of(number), prompt=own["prompt"], optim=own["optim"], seed=values.get("train.seed"))


OWN = ("prompt", "optim")  # sections that prompts of a bank may differ in


def name_of(trial: int) -> str:
    """A trial's prompt in the run of its bank."""
    return f"trial-{trial:03d}"


def open_sweep(path: Path) -> Sweep:
    """Raises RunError for what is no sweep, is damaged, or of a newer softprompt."""
    file = path / "sweep.json"
    if not file.is_file():
        raise RunError(f"{path} is not a sweep (no sweep.json)")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if refusal := newer(path, values, SWEEP):
            raise RunError(refusal)
        return Sweep(path, Spec.model_validate(values))
    except (ValueError, ValidationError):
        raise RunError(f"{file} is damaged") from None


def create_sweep(
    settings: Sequence[str],
    *,
    trials: int | None = None,
    most: int = USUAL_BANK,
    prune: bool = True,
    test: str | None = None,
    storage: str | None = None,
) -> Sweep:
    """Makes the folder `train.out` of a new sweep. `settings`: a TOML file, settings, and those that differ; `trials`: how many; `most`:
    how many share a run; `test`: rows that judge the best prompt, instead of a part of the held-out ones.

    Raises an Error of errors.py before anything is written when something is wrong with it.
    """
    first = [settings[0]] if settings and "=" not in settings[0] else []
    plain, dimensions = read_space(settings[len(first) :])
    config = with_absolute_paths(load_config(first[0] if first else None, plain))
    check_swept(config, dimensions)
    path = Path(config.train.out)
    _check_free(path)
    config, judge = rows_apart(config, test)
    spec = Spec(
        id=uuid4().hex[:12],
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        config=config.model_dump(mode="json", exclude_none=True),
        dimensions=tuple(dimensions),
        trials=tuple(draw(dimensions, trials, config.train.seed)),
        most=most,
        prune=prune,
        judge=judge,
        storage=str(Path(storage).absolute()) if storage and "://" not in storage else storage,
    )
    sweep = Sweep(path, spec)
    for bank, numbers in enumerate(sweep.banks):
        sweep.config_of(bank, numbers).members()  # which raises for what cannot be trained
    try:
        with new_folder(path) as draft:
            write_text(draft / "sweep.json", sweep.spec.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise RunError(f"train.out = {path}: cannot write there: {error.strerror or error}") from None
    return sweep


def _check_free(path: Path) -> None:
    if (path / "sweep.json").is_file():
        raise RunError(f"{path} holds a sweep: softprompt sweep --resume {path}, or choose another train.out")
    RunFolder.check_free(path)


# ---- rows that choose, rows that judge -----------------------------------------------------------------------------


def rows_apart(config: Config, test: str | None) -> tuple[Config, tuple[str, ...]]:
    """The configuration without the rows that are to judge, and these: `test`, half of data.eval, or as large a share of data.train as is
    held out besides. They come in pieces from all over a source, so that its order does not matter. Raises DataError, ConfigError."""
    if test is not None:
        here = with_absolute_paths(config.model_copy(update={"data": config.data.model_copy(update={"eval": test})})).data.eval
        load_examples(here or test, label_words=config.data.label_words, columns=config.data.columns, limit=1)
        return config, (str(here),)
    key, share = ("eval", JUDGING) if config.data.eval is not None else ("train", config.data.eval_fraction)
    sources: Sources | None = getattr(config.data, key)
    if sources is None:
        raise ConfigError("data.train is not set: name a file, a folder or a hub data set")
    if config.data.stream or (key == "train" and config.data.weights):
        raise ConfigError(f"data.{key} is streamed or weighted: name the rows that are to judge the best prompt with --test")
    kept, judge = list[str](), list[str]()
    for source in (sources,) if isinstance(sources, str) else sources:
        for piece, judging in _pieces(source, _count(config, source), share):
            (judge if judging else kept).append(piece)
    if not judge or not kept:
        raise DataError(f"data.{key} has too few rows to choose a prompt and to judge it: name rows that judge with --test")
    return config.model_copy(update={"data": config.data.model_copy(update={key: tuple(kept)})}), tuple(judge)


def _count(config: Config, source: str) -> int:
    found = load_examples(source, label_words=config.data.label_words, columns=config.data.columns)
    return len(found.examples) + len(found.rejected)


def _pieces(source: str, count: int, share: float) -> Iterator[tuple[str, bool]]:
    """Ranges of a source, and whether their rows judge."""
    found = RANGE.match(source)
    name, offset = (found["source"], int(found["start"] or 0)) if found else (source, 0)
    number = max(1, min(PIECES, int(count * share)))
    edges = [round(count * place / number) for place in range(number + 1)]
    for start, stop in pairwise(edges):
        middle = start + round(stop * share) - round(start * share)
        for begin, end, judging in ((start, middle, True), (middle, stop, False)):
            if begin < end:
                yield f"{name}[{offset + begin}:{offset + end}]", judging
