"""Which prompts, adapters, rows and results folder the paths of a command mean."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.artifact import StoredPrompt, find_prompt, find_prompts, load_prompt, read_card
from softprompt.config import Config, load_config
from softprompt.data import Loaded, hold_out, load_examples
from softprompt.encode import Encoded, encode_rows
from softprompt.errors import ArtifactError, ConfigError
from softprompt.job import prepare
from softprompt.memory import token_budget
from softprompt.model import FrozenBase, load_base
from softprompt.prompt import SoftPrompt
from softprompt.runlog import RunFolder, run_of


@dataclass(frozen=True)
class Entered:
    """`config`: of the first prompt's base and rows, with the command's overrides. `run`: of the first prompt, where it is one's."""

    config: Config
    prompts: dict[str, Path]
    adapters: tuple[Path, ...]
    shots: str | None
    run: RunFolder | None

    def rows(self) -> tuple[Loaded, Loaded | None]:
        """(held-out rows, rows to take examples from or None). Without an own file, those of the run. Raises ConfigError."""
        data, words = self.config.data, self.config.data.label_words
        train = load_examples(self.shots, label_words=words) if self.shots else None
        if data.eval is not None:
            return load_examples(data.eval, limit=data.limit, label_words=words), train
        if data.train is None or not data.eval_fraction:
            raise ConfigError("which rows? give --data FILE")
        rest, held = hold_out(load_examples(data.train, limit=data.limit, label_words=words), data.eval_fraction, self.config.train.seed)
        return held, rest

    @property
    def results(self) -> Path | None:
        """The run's folder for evaluations."""
        return None if self.run is None else self.run.path / "evaluations"


def entered(prompt: Path, others: Sequence[Path], data: str | None, shots: str | None, overrides: Sequence[str]) -> Entered:
    """Raises ArtifactError where there is no prompt, ConfigError for a wrong override."""
    first, *more = find_prompts(prompt)
    run = run_of(first)
    prompts = {"prompt" if not more else first.name: first, **{path.name: path for path in more}}
    adapters = tuple(path for path in others if _is_adapter(path))
    for place in (place for place in others if place not in adapters):
        for path in find_prompts(place):
            prompts[_free(path.parent.name if path.name == "prompt" else path.name, prompts)] = path
    own = _own_settings(first, run)
    if data is not None:
        own["data"] = {**own["data"], "eval": data}
    config = load_config(own, overrides)
    return Entered(config, prompts, adapters, shots or (config.data.train if run and config.data.eval else None), run)


@dataclass(frozen=True)
class Opened:
    """One prompt on its base. `held`: encoded held-out rows; `start`: what it was before training, where its run is at hand."""

    base: FrozenBase
    prompt: StoredPrompt
    held: tuple[Encoded, ...]
    start: SoftPrompt | None
    tokens_per_batch: int


def opened(prompt: Path, data: str | None, num_rows: int, overrides: Sequence[str], allow_other_base: bool) -> Opened:
    """Loads a prompt, its base and at most `num_rows` held-out rows, of `data` or of its run; without any, `held` is empty."""
    given = entered(find_prompt(prompt), (), data, None, overrides)
    base = load_base(given.config.model)
    stored = load_prompt(prompt, base, allow_other_base=allow_other_base)
    held: tuple[Encoded, ...] = ()
    if num_rows and (given.config.data.eval or given.config.data.eval_fraction):
        held = encode_rows(stored.encoder, given.rows()[0], stored.card.max_length).encoded[:num_rows]
    start = None
    if given.run is not None and Path(str(given.run.config().data.train)).exists():
        entrants = prepare(given.run.config(), base).entrants
        place = find_prompt(prompt)
        entrant = entrants.get(place.name) or (next(iter(entrants.values())) if len(entrants) == 1 else None)
        start = None if entrant is None else entrant.start
    budget = token_budget(base.model.base_model, base.device, given.config.train.tokens_per_batch)
    return Opened(base, stored, held, start, budget)


def _own_settings(prompt: Path, run: RunFolder | None) -> dict[str, Any]:
    """Base and rows of a stored prompt; the rows' files are known to its run alone."""
    card = read_card(prompt)
    rows: dict[str, Any] = {"label_words": card.data.label_words}
    if run is not None:
        rows |= run.config().data.model_dump(exclude_none=True, include={"train", "eval", "eval_fraction", "limit"})
    seed = {} if run is None else {"train": {"seed": run.config().train.seed}}
    return {"model": card.model_config_of_base.model_dump(exclude_none=True), "data": rows, **seed}


def _is_adapter(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter that changes the base's layers."""
    file = path / "adapter_config.json"
    if (path / "card.json").is_file() or not file.is_file():
        return False
    try:
        kind = json.loads(file.read_text(encoding="utf-8"))["peft_type"]
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(f"{file} is damaged") from None
    if kind in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING"):
        find_prompt(path)  # which says that it has no card
    return True


def _free(name: str, taken: dict[str, Path]) -> str:
    number, free = 2, name
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free
