"""What a sweep tries: `prompt.length=8,16,32`, `optim.relative_lr=0.05..0.5:log`; drawn before the first step, so that the same seed and
space are the same trials, however many processes there are and whichever of them are killed."""

import itertools
import math
import random
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from softprompt.config import Config, load_config
from softprompt.errors import ConfigError

LIST = re.compile(r"[^\s,]+(,[^\s,]+)+")  # words without quotes
MAY_DIFFER = ("prompt", "optim", "train", "data.train", "data.limit", "data.weights")
OF_A_BANK = ("prompt.bank", "prompt.count", "train.out", "train.trackers")
USUAL_TRIALS = 30


@dataclass(frozen=True)
class Dimension:
    """A setting and what it may be: `choices`, or from `low` to `high`."""

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def at(self, share: float) -> float | int:
        """The value at a share, from 0 to 1, of the way from `low` to `high`."""
        if self.whole:  # every whole number has the same part of the way
            low, high = self.low - 0.5, self.high + 0.5
            return min(int(self.high), max(int(self.low), round(_between(low, high, share, self.log))))
        return min(self.high, max(self.low, float(f"{_between(self.low, self.high, share, self.log):.6g}")))


def _between(low: float, high: float, share: float, log: bool) -> float:
    return low * (high / low) ** share if log else low + (high - low) * share


def read_space(settings: Sequence[str]) -> tuple[list[str], list[Dimension]]:
    """Settings that are the same for all trials, and those that differ. Raises ConfigError."""
    plain, dimensions = [], list[Dimension]()
    for setting in settings:
        key, equals, raw = (part.strip() for part in setting.partition("="))
        found = _dimension(key, raw) if equals else None
        if found is None:
            plain.append(setting)
        elif key in (one.key for one in dimensions):
            raise ConfigError(f"{setting!r}: {key} is in the sweep twice")
        else:
            dimensions.append(found)
    if not dimensions:
        raise ConfigError("nothing differs between trials: name what does, e.g. prompt.length=8,16,32 or optim.relative_lr=0.05..0.5:log")
    return plain, dimensions


def _dimension(key: str, raw: str) -> Dimension | None:
    """What a setting may be, or None where it is one value. A text with a blank is one text: several stand in quotes."""
    kinds = _kinds(key)
    if ".." in raw and kinds & {int, float}:
        return _range(key, raw, whole=float not in kinds)
    try:
        choices = tomllib.loads(f"value = [{raw}]")["value"]
    except tomllib.TOMLDecodeError:
        choices = raw.split(",") if LIST.fullmatch(raw) else [raw]
    if re.fullmatch(r"(,\S*|\S*,|\S*,,\S*)", raw):
        raise ConfigError(f"{key}={raw}: an empty value in the list: write e.g. {key}=8,16")
    if len(choices) < 2:
        return None
    different = [value for place, value in enumerate(choices) if value not in choices[:place]]
    return Dimension(key, tuple(different))


def _range(key: str, raw: str, *, whole: bool) -> Dimension:
    span, _, how = raw.partition(":")
    try:
        low, high = (float(end) for end in span.split(".."))
    except ValueError:
        raise ConfigError(f"{key}={raw}: a range goes from a number to a number, e.g. {key}=0.05..0.5 or {key}=0.05..0.5:log") from None
    if how not in ("", "log"):
        raise ConfigError(f"{key}={raw}: behind a range stands :log or nothing, not :{how}")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{key}={raw}: a range goes from the smaller number to the larger one")
    if how and low <= 0:
        raise ConfigError(f"{key}={raw}: a logarithmic range begins above 0")
    if whole and not (low.is_integer() and high.is_integer()):
        raise ConfigError(f"{key}={raw}: {key} is a whole number, and so are the ends of its range")
    return Dimension(key, low=low, high=high, log=bool(how), whole=whole)


def _kinds(key: str) -> set[Any]:
    """The types that a key's value may have; none of a key that is not known, which the configuration will say."""
    section, _, name = key.partition(".")
    fields = Config.model_fields[section].annotation.model_fields if section in Config.model_fields else {}  # type: ignore[union-attr]
    return set(_types(fields[name].annotation)) if name in fields else set()


def _types(kind: Any) -> list[Any]:
    if get_origin(kind) in (Union, UnionType):
        return [found for part in get_args(kind) for found in _types(part)]
    return _types(get_args(kind)[0]) if hasattr(kind, "__metadata__") else [get_origin(kind) or kind]


def draw(dimensions: Sequence[Dimension], count: int | None, seed: int) -> list[dict[str, Any]]:
    """The settings of every trial by key. Lists alone are a grid: all of it, or `count` of it, in an order of the seed. A range is cut into
    as many parts as there are trials, with a trial in each (a Latin hypercube; McKay et al. 1979), and the grid of the lists beside it
    comes around evenly."""
    chance = random.Random(f"sweep {seed}")
    lists, ranges = [one for one in dimensions if one.choices], [one for one in dimensions if not one.choices]
    grid = [dict(zip((one.key for one in lists), values, strict=True)) for values in itertools.product(*(one.choices for one in lists))]
    total = (count or USUAL_TRIALS) if ranges else min(count or len(grid), len(grid))
    picked = list[dict[str, Any]]()
    while len(picked) < total:
        picked += chance.sample(grid, len(grid)) if total != len(grid) or ranges else grid
    trials = [dict(one) for one in picked[:total]]
    for one in ranges:
        for trial, part in zip(trials, chance.sample(range(total), total), strict=True):
            trial[one.key] = one.at((part + chance.random()) / total)
    return [{one.key: trial[one.key] for one in dimensions} for trial in trials]


def check_swept(config: Config, dimensions: Sequence[Dimension]) -> None:
    """Raises ConfigError for what cannot differ between trials that are to be compared, and for a configuration that is no run of a
    sweep."""
    for key in (one.key for one in dimensions):
        section = key.partition(".")[0]
        if key in OF_A_BANK:
            raise ConfigError(f"{key} cannot be swept: the sweep itself sets it")
        if section not in MAY_DIFFER and key not in MAY_DIFFER:
            raise ConfigError(f"{key} cannot be swept: it changes what the held-out loss is of, and trials would not compare")
        if section == "data" and config.data.eval_fraction:
            raise ConfigError(f"{key} cannot be swept beside data.eval_fraction: the held-out rows would change with it: set data.eval")
    if config.prompt.bank or config.prompt.count > 1:
        raise ConfigError("a sweep makes its own banks: leave out prompt.bank and prompt.count")
    if config.optim.relative_lr == "find":
        raise ConfigError('optim.relative_lr = "find" tries rates for one prompt: sweep them, e.g. optim.relative_lr=0.02..0.5:log')
    if config.distil.wanted:
        raise ConfigError("a sweep trains on rows with answers; leave out distil")
    if config.data.eval is None and not config.data.eval_fraction:
        raise ConfigError("a sweep chooses by the held-out loss: set data.eval or data.eval_fraction")


def of_trial(config: Config, values: dict[str, Any]) -> Config:
    """The configuration with a trial's settings. Raises ConfigError, with the trial's values."""
    tree = config.model_dump(mode="json", exclude_none=True)
    for key, value in values.items():
        place = tree
        *sections, name = key.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return load_config(tree, where=", ".join(f"{key}={shown(value)}" for key, value in values.items()))


def shown(value: Any) -> str | int | float | bool:
    """A value as tables show it and Optuna keeps it."""
    return value if isinstance(value, str | int | float | bool) else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


Bank = tuple[int, ...]  # the numbers of its trials
State = Literal["waiting", "running", "finished", "pruned", "failed"]


def banks_of(configs: Sequence[Config], most: int) -> list[Bank]:
    """Trials that can share a run, `most` of them at most: those that differ in [prompt], [optim] and the seed alone."""
    groups: dict[str, list[int]] = {}
    for number, config in enumerate(configs):
        groups.setdefault(run_key(config), []).append(number)
    return [tuple(group[start : start + most]) for group in groups.values() for start in range(0, len(group), most)]


def run_key(config: Config) -> str:
    """What trials of one bank have in common, as text."""
    train = config.train.model_copy(update={"seed": 0})
    return config.model_copy(update={"train": train}).model_dump_json(exclude={"prompt", "optim"})
