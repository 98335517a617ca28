"""What a run works with, put together and checked before its first step."""

import logging
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from softprompt.card import DataCard
from softprompt.checkpoint import BEST, Checkpoint, Counters, Scores, latest_checkpoint
from softprompt.config import Config
from softprompt.data import Rejected
from softprompt.distil.onpolicy import own_answers
from softprompt.distil.study import Studied, studying
from softprompt.encode import Encoder, check_position, make_encoder
from softprompt.engine.batch import Order
from softprompt.engine.loading import load_base, load_dtype, multiplies_in
from softprompt.engine.loss import Loss, next_tokens
from softprompt.engine.model import FrozenBase, check_context
from softprompt.engine.optim import PromptOptimizer
from softprompt.engine.prompt import Prompt, SoftPrompt, deepened
from softprompt.engine.step import StepSettings
from softprompt.engine.teacher import Teaching
from softprompt.engine.tokens import Encoded
from softprompt.engine.world import World
from softprompt.errors import ConfigError, DataError, RunError
from softprompt.evaluation import held_out_loss
from softprompt.events import Preparing, Studying
from softprompt.init import SOURCES, Material, Source, from_states, initial_rows
from softprompt.prepared import check_rejected
from softprompt.rows import Rows, loading_rows, summarize
from softprompt.runlog import RunFolder

USUAL_STEPS, MOST_EPOCHS = 200, 10  # where epochs is not set: a prompt needs steps, however few rows there are (LOG.md)
EVALUATIONS, EVAL_APART = 4, 10  # over a run where eval_every is not set, and the fewest steps between two


@dataclass(frozen=True)
class Untrained:
    """One prompt of a run before it has a folder: the configuration that would train it alone, what it starts as, and a sentence
    about that."""

    config: Config
    prompt: Prompt
    note: str


@dataclass(frozen=True)
class Measured:
    """A prompt after `step` steps, and its loss on the held-out rows where that was measured."""

    prompt: Prompt
    step: int
    eval_loss: float | None


@dataclass
class Trainee:
    """One prompt of a run in training. `best_PD`: its numbers with the lowest loss on the held-out rows so far."""

    name: str
    untrained: Untrained
    optimizer: PromptOptimizer
    best_PD: Tensor | None

    @property
    def config(self) -> Config:
        return self.untrained.config

    @property
    def start(self) -> Prompt:
        return self.untrained.prompt

    @property
    def training(self) -> Prompt:
        """The prompt in training, its numbers with gradient."""
        return self.start.with_learned(self.optimizer.learned_PD)

    @property
    def shown(self) -> Prompt:
        """The prompt as it is evaluated and saved now."""
        return self.start.with_learned(self.optimizer.shown_PD)

    def best(self, counters: Counters) -> Measured:
        """The prompt with the lowest held-out loss; without held-out rows, as it is now."""
        scores = counters.scores[self.name]
        if self.best_PD is None or scores.best_step is None:
            return Measured(self.shown, counters.step, None)
        return Measured(self.start.with_learned(self.best_PD), scores.best_step, scores.best_loss)

    def movement(self, base: FrozenBase) -> float:
        """RMS distance of the numbers from where they started, as a share of what they are relative to."""
        moved_PD = self.optimizer.learned_PD.detach() - self.start.learned_PD
        return moved_PD.square().mean().sqrt().item() / self.start.unit(base)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return {**self.optimizer.state(), **({} if self.best_PD is None else {BEST: self.best_PD})}


@dataclass(frozen=True)
class Setup:
    """A run before it has a folder: everything is loaded and checked, nothing is written. `config` holds the budget that was found."""

    config: Config
    base: FrozenBase
    encoder: Encoder
    rows: Rows
    held: Rows | None
    untrained: dict[str, Untrained]
    study: Studied | None

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        return self.rows.rejected + (self.held.rejected if self.held else ())

    @property
    def budget(self) -> int:
        """Tokens of a micro-batch at most, in training and evaluation."""
        assert self.config.train.tokens_per_batch is not None, "filled in by prepare"
        return self.config.train.tokens_per_batch

    @property
    def num_steps(self) -> int:
        return count_steps(self.config, len(self.rows.encoded))

    @property
    def eval_every(self) -> int:
        """Steps between evaluations."""
        return self.config.train.eval_every or max(EVAL_APART, -(-self.num_steps // EVALUATIONS))

    def numbers_of(self, step: int) -> list[list[int]]:
        """The numbers of the rows of step number `step`, counted from 0, for every prompt of the run; a function of configuration and step
        alone."""
        size = self.config.train.examples_per_step
        count = size if self.config.train.steps else min(size, count_examples(self.config, len(self.rows.encoded)) - step * size)
        return [self.order.rows(step * size, count, one.config.train.seed) for one in self.untrained.values()]

    def rows_of(self, step: int) -> list[list[Encoded]]:
        """The rows of these numbers."""
        return [[self.rows.encoded[number] for number in own] for own in self.numbers_of(step)]

    def held_out_loss(self, soft: Prompt) -> float:
        """Mean loss of a prompt per supervised token of the held-out rows, which there must be: what its steps lower on the training
        rows."""
        assert self.held is not None, "asked for where rows are held out"
        return held_out_loss(self.base, soft, self.held, self.budget, None if self.study is None else self.study.held.teacher)

    @cached_property
    def order(self) -> Order:
        """In which the rows come."""
        return Order(self.rows.column("label"), self.rows.column("part"), self.config.data.weights)


@dataclass(frozen=True)
class Job(Setup):
    """A set-up with its run folder and its prompts in training."""

    run: RunFolder
    trainees: tuple[Trainee, ...]
    world: World

    def step_of(self, counters: Counters) -> tuple[list[list[Encoded]], StepSettings]:
        """The rows of the next step for every prompt, and how it is computed; a micro-batch that memory has cut once stays cut."""
        how, rows = self.config.train, self.rows_of(counters.step)
        loss: Loss = next_tokens
        if self.study is not None:
            numbers = self.numbers_of(counters.step)
            teacher, places = self.study.lessons.teacher, [number for own in numbers for number in own]
            if counters.step >= round(self.num_steps * (1 - self.config.distil.on_policy)):
                rows, teacher = self._own_answers(self.study, numbers, counters.step)
                places = list(range(sum(map(len, rows))))
            loss = teacher.loss(places)
        return rows, StepSettings(counters.tokens_per_batch or self.budget, how.head_tolerance, how.checkpoint_activations, loss)

    def _own_answers(self, study: Studied, numbers: list[list[int]], step: int) -> tuple[list[list[Encoded]], Teaching]:
        """The rows of a step with what its prompts answer themselves, and the teacher that reads them all."""
        limit = self.config.distil.max_new_tokens
        read = [
            own_answers(self.base, study, one.shown, own, limit, one.config.train.seed * 1_000_003 + step)
            for one, own in zip(self.trainees, numbers, strict=True)
        ]
        lessons = study.classroom.lessons([one for own in read for one in own])
        return [[one.own for one in own] for own in read], lessons.teacher


def with_precision(config: Config, base: FrozenBase | None, begun: RunFolder | None = None) -> Config:
    """The configuration of a run with the precision that it computes in, which "auto" leaves open: that of `base`, else what the machine
    multiplies in; of a run that was `begun`, the precision of then. Raises RunError where another one is asked for to go on."""
    began_in = "auto" if begun is None else begun.config().model.dtype  # a run of an earlier version has left it open
    if begun is None or began_in == "auto":
        dtype = str(load_dtype(config.model)).removeprefix("torch.") if base is None else base.precision
        return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    asked = config.model.dtype if base is None else base.precision
    if asked not in ("auto", began_in):
        raise RunError(f"{begun.path} began in {began_in}, and the base is asked for in {asked}: it must be the same to resume")
    if not multiplies_in(began_in, config.model.device):
        logging.getLogger(__name__).warning(
            "%s goes on in %s, as it began: this machine does not multiply in it and is slow", begun.path, began_in
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": began_in})})


def prepare(
    config: Config, base: FrozenBase | None, sources: Mapping[str, Source] = SOURCES
) -> Generator[Preparing | Studying, None, Setup]:
    """Loads and checks all that a configuration names. `sources`: what the names in `prompt.init` mean. Yields how far it is.

    Raises an Error of errors.py when something is wrong with it.
    """
    alone = config.members()
    base = base or load_base(config.model)
    plain = make_encoder(base.tokenizer, config.data.template, date=config.data.date, num_tokens=base.num_tokens)
    study: Studied | None = None
    held: Rows | None
    if config.distil.wanted:
        study = yield from studying(config, base, plain)
        encoder, rows, held = study.encoder, study.lessons.rows, study.held.rows
    else:
        encoder, rows, held = yield from loading_rows(config, plain)
    _check_rows(config, rows, held)
    context = study.context_ids if study is not None else ()
    materials = {
        name: Material(own.prompt, base, rows.encoded, rows.labels, own.train.seed, sources, context) for name, own in alone.items()
    }
    untrained = {name: _untrained(alone[name], material, encoder) for name, material in materials.items()}
    check_context(base.context_length, max(one.prompt.length for one in untrained.values()), config.data.max_length)
    # the budget that was found and the day become part of the run: resumed on another day, it has the same texts and micro-batches
    how = config.train.model_copy(update={"tokens_per_batch": base.budget(config.train.tokens_per_batch)})
    data = config.data.model_copy(update={"date": encoder.template.date or config.data.date})
    return Setup(config.model_copy(update={"train": how, "data": data}), base, encoder, rows, held, untrained, study)


def _untrained(own: Config, material: Material, encoder: Encoder) -> Untrained:
    check_position(own.prompt.position, encoder)
    if own.prompt.sources == ("states",) and own.prompt.method == "prefix":
        return Untrained(own, *from_states(material, own.prompt.position, encoder.bos_id, own.optim.values))
    initial = initial_rows(material)
    if own.prompt.method == "prefix":
        deep = deepened(material.base, initial.rows_PH, own.prompt.position, encoder.bos_id, own.optim.values)
        return Untrained(own, deep, f"{initial.note}; as keys and values of every layer")
    return Untrained(own, SoftPrompt(initial.rows_PH, own.prompt.position, encoder.bos_id), initial.note)


def start_job(setup: Setup, run: RunFolder) -> tuple[Job, Counters]:
    """The job, and the counters to go on from: those of the last checkpoint, if any. The run folder must be locked.

    Raises RunError when rows or base have changed since the run started.
    """
    checkpoint, counters = _where_it_stands(run, setup)
    trainees = tuple(_trainee(name, one, setup, checkpoint) for name, one in setup.untrained.items())
    parts = {part.name: getattr(setup, part.name) for part in fields(setup)}
    return Job(**parts, run=run, trainees=trainees, world=World()), counters


def _where_it_stands(run: RunFolder, setup: Setup) -> tuple[Checkpoint | None, Counters]:
    base, rows = setup.base, setup.rows
    fresh = Counters(
        data_fingerprint=rows.fingerprint, base_fingerprint=base.fingerprint, scores={name: Scores() for name in setup.untrained}
    )
    checkpoint = latest_checkpoint(run.checkpoints)
    counters = checkpoint.counters if checkpoint else fresh
    if counters.data_fingerprint != fresh.data_fingerprint:
        raise RunError(f"the training rows have changed since {run.path} started: they must be the same to resume")
    began_with = run.read("run.json") or {}
    if {counters.base_fingerprint, began_with.get("base_fingerprint", base.fingerprint)} != {base.fingerprint}:
        raise RunError(f"{base.name} has other weights than when {run.path} started: they must be the same to resume")
    if began_with.get("tokenizer_fingerprint", base.tokenizer_fingerprint) != base.tokenizer_fingerprint:
        raise RunError(f"{base.name} has another tokenizer than when {run.path} started: it must be the same to resume")
    run.patiently(lambda: run.note_place(setup.config.model))
    run.patiently(lambda: run.forget_after(counters.step if checkpoint else -1))
    return checkpoint, counters


def _trainee(name: str, one: Untrained, setup: Setup, checkpoint: Checkpoint | None) -> Trainee:
    base, state = setup.base, checkpoint.states[name] if checkpoint else {}
    optimizer = PromptOptimizer(one.prompt.learned_PD, one.config.optim, setup.num_steps, one.prompt.unit(base))
    if state:
        optimizer.restore(state)
    return Trainee(name, one, optimizer, state[BEST].to(base.device) if BEST in state else None)


# ---- small decisions -----------------------------------------------------------------------------------------------


def count_steps(config: Config, num_rows: int) -> int:
    """Optimizer steps of a run; the last one of an epoch-counted run may be smaller."""
    return config.train.steps or -(-count_examples(config, num_rows) // config.train.examples_per_step)


def count_examples(config: Config, num_rows: int) -> int:
    """Examples of an epoch-counted run."""
    usual = round(USUAL_STEPS * config.train.examples_per_step / num_rows)
    return num_rows * (config.train.epochs or min(max(1, usual), MOST_EPOCHS))


def _check_rows(config: Config, rows: Rows, held: Rows | None) -> None:
    check_rejected(rows.rejected + (held.rejected if held else ()), config.data.max_rejected)
    for name, split in (("data.train", rows), ("data.eval", held)):
        if split is not None and not split.encoded:
            raise DataError(f"{name}: no usable row is left ({len(split.rejected)} rejected)")
    for source, weight in enumerate(config.data.weights):
        if weight and source not in rows.column("part"):
            raise DataError(f"data.weights: no usable training row is left of source {source + 1}, whose weight is {weight:g}")
    if held is None and config.train.patience is not None:
        raise ConfigError("train.patience needs held-out rows: set data.eval or data.eval_fraction")


def data_facts(setup: Setup) -> dict[str, Any]:
    """The steps of the run, and lengths and cuts of its rows; `counts`: how many rows have each length in tokens, BOS included."""
    bos = int(setup.encoder.bos_id is not None)

    def facts(rows: Rows) -> dict[str, Any]:
        lengths, counts = np.unique(rows.column("length") + bos, return_counts=True)
        return {**asdict(summarize(rows, setup.encoder)), "counts": list(zip(lengths.tolist(), counts.tolist(), strict=True))}

    return {"steps": setup.num_steps, "train": facts(setup.rows), "eval": facts(setup.held) if setup.held else None}


def data_card(config: Config, rows: Rows, held: Rows | None) -> DataCard:
    named = config.distil.questions or config.data.train or "self-study"
    sources = (named,) if isinstance(named, str) else named
    return DataCard(
        train=", ".join(Path(one).name if Path(one).is_absolute() else one for one in sources),
        num_train=len(rows.encoded),
        train_fingerprint=rows.fingerprint,
        num_eval=len(held.encoded) if held else 0,
        eval_fingerprint=held.fingerprint if held else None,
        labels=rows.labels,
        label_words=config.data.label_words,
    )
