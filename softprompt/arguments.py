"""Which prompts, adapters, rows and results folder the paths of a command mean."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softprompt.artifact import StoredPrompt, find_prompt, find_prompts, load_prompt, read_card
from softprompt.checkpoint import load_start
from softprompt.config import Config, load_config
from softprompt.data import Loaded, load_examples
from softprompt.distil.study import Studied, study_of
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import Prompt
from softprompt.engine.tokens import Encoded
from softprompt.errors import ArtifactError, ConfigError, DataError
from softprompt.rows import encode_rows, encoder_of, load_splits
from softprompt.runlog import RunFolder, run_of


@dataclass(frozen=True)
class Arguments:
    """`config`: the first prompt's base, and what the command says. `run`: the run that the first prompt lies in, with its settings."""

    config: Config
    prompts: dict[str, Path]
    adapters: tuple[Path, ...]
    shots: str | None
    run: RunFolder | None
    of_run: Config | None

    @property
    def source(self) -> str | tuple[str, ...] | None:
        """Where the held-out rows come from: the command's file, else the run's; None where neither has any."""
        if self.config.data.eval is not None or self.of_run is None:
            return self.config.data.eval
        return self.of_run.data.eval or (self.of_run.data.train if self.of_run.data.eval_fraction else None)

    def rows(self) -> tuple[Loaded, Loaded | None]:
        """(held-out rows, rows to take examples from or None). Raises ConfigError where there are no held-out rows."""
        if self.source is None:
            raise ConfigError("which rows? give --data FILE")
        data = self.config.data
        shots = load_examples(self.shots, label_words=data.label_words, columns=data.columns) if self.shots else None
        if data.eval is not None:
            held = load_examples(data.eval, limit=data.limit, label_words=data.label_words, columns=data.columns)
            return held, shots or self._training_rows()
        assert self.of_run is not None
        train, of_run = self._splits(self.of_run)
        assert of_run is not None
        return replace(of_run, examples=of_run.examples[: data.limit]), shots or train

    @property
    def is_distilled(self) -> bool:
        return self.of_run is not None and self.of_run.distil.wanted

    def study(self, base: FrozenBase) -> Studied | None:
        """What the run's prompt was distilled of, and on what; None for one that was trained on answers."""
        if self.of_run is None or not self.is_distilled:
            return None
        return study_of(self.of_run.model_copy(update={"model": self.config.model}), base)

    def rows_beside(self, study: Studied) -> Loaded:
        """Held-out rows to compare a distilled prompt with its teacher on: with answers of their own where they have some, else with the
        teacher's."""
        if self.source is not None:
            with suppress(DataError):
                return self.rows()[0]
        return Loaded(study.held.rows.examples[: self.config.data.limit], ())

    def _training_rows(self) -> Loaded | None:
        """The run's, or None where they are no longer at hand: nobody asked for examples."""
        try:
            return None if self.of_run is None else self._splits(self.of_run)[0]
        except DataError:
            return None

    def _splits(self, of_run: Config) -> tuple[Loaded, Loaded | None]:
        """The run's rows, read by the tokenizer of the base where it lies now: those that the run has kept are found again."""
        config = of_run.model_copy(update={"model": self.config.model})
        return load_splits(config, encoder_of(config))

    @property
    def trackers(self) -> tuple[str, ...]:
        """Those that the command names, else the run's."""
        said = self.config.train
        return said.trackers if self.of_run is None or "trackers" in said.model_fields_set else self.of_run.train.trackers

    @property
    def results(self) -> Path | None:
        """The run's folder for evaluations."""
        return None if self.run is None else self.run.path / "evaluations"


def read_arguments(prompt: Path, others: Sequence[Path], data: str | None, shots: str | None, overrides: Sequence[str]) -> Arguments:
    """Raises ArtifactError where there is no prompt, ConfigError for a wrong override."""
    first, *more = find_prompts(prompt)
    prompts = {"prompt" if not more else first.name: first, **{path.name: path for path in more}}
    adapters = tuple(path for path in others if _is_adapter(path))
    for place in (place for place in others if place not in adapters):
        for path in find_prompts(place):
            prompts[_free(path.parent.name if path.name == "prompt" else path.name, prompts)] = path
    card = read_card(first)
    own: dict[str, Any] = {
        "model": card.base_here(overrides).model_dump(exclude_none=True),
        "data": {"label_words": card.data.label_words, **({} if data is None else {"eval": data})},
    }
    run = run_of(first)
    return Arguments(load_config(own, overrides), prompts, adapters, shots, run, None if run is None else run.config())


@dataclass(frozen=True)
class Opened:
    """One prompt on its base, with encoded held-out rows; without any, `held` is empty."""

    given: Arguments
    base: FrozenBase
    prompt: StoredPrompt
    held: tuple[Encoded, ...]
    tokens_per_batch: int

    def start(self) -> Prompt | None:
        """What the prompt was before training, or None where its run is not at hand or has not kept it."""
        if self.given.run is None:
            return None
        (place,) = self.given.prompts.values()
        return load_start(self.given.run.start, place.name, self.prompt.soft)

    def keep(self, facts: dict[str, Any]) -> None:
        """Puts the facts of a run's finished prompt in the place of those that training left in the run's folder."""
        run, (place,) = self.given.run, self.given.prompts.values()
        known = None if run is None else run.read("inspection.json")
        name = place.name if run is not None and place.parent == run.prompts else next(iter(known or {}), None)
        if run is not None and known is not None and name in known and place in (run.prompt, run.prompts / str(name)):
            run.write("inspection.json", {**known, name: facts})


def opened(prompt: Path, data: str | None, num_rows: int, overrides: Sequence[str], allow_other_base: bool) -> Opened:
    """Loads a prompt, its base and at most `num_rows` held-out rows, of `data` or of its run."""
    given = read_arguments(find_prompt(prompt), (), data, None, overrides)
    base = load_base(given.config.model)
    stored = load_prompt(prompt, base, allow_other_base=allow_other_base)
    held: tuple[Encoded, ...] = ()
    if num_rows and given.source is not None:
        held = encode_rows(stored.encoder, given.rows()[0], stored.card.max_length).encoded[:num_rows]
    return Opened(given, base, stored, held, base.budget(given.config.train.tokens_per_batch))


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
