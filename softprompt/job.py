"""What a run works with, put together and checked before its first step."""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from softprompt.artifact import DataCard
from softprompt.checkpoint import BEST, Checkpoint, Progress, Scores, latest_checkpoint
from softprompt.config import Config
from softprompt.data import RANGE, Rejected
from softprompt.encode import Encoder, Rows, check_rejected, load_rows, make_encoder
from softprompt.errors import ConfigError, DataError, RunError
from softprompt.init import Material, start_rows
from softprompt.memory import token_budget
from softprompt.model import FrozenBase, load_base
from softprompt.optim import RowOptimizer
from softprompt.prompt import SoftPrompt, deepened
from softprompt.runlog import RunFolder
from softprompt.show import summarize
from softprompt.step import Engine

USUAL_STEPS, MOST_EPOCHS = 200, 10  # where epochs is not set: a prompt needs steps, however few rows there are (LOG.md)
EVALUATIONS, EVAL_APART = 4, 10  # over a run where eval_every is not set, and the fewest steps between two


@dataclass
class Trainee:
    """One prompt of a run. `config` is the configuration that would train it alone; `best_PH` the rows with the lowest loss
    on the held-out rows so far."""

    name: str
    config: Config
    start: SoftPrompt
    optimizer: RowOptimizer
    best_PH: Tensor | None

    @property
    def soft(self) -> SoftPrompt:
        """The prompt in training, its rows with gradient."""
        return replace(self.start, rows_PH=self.optimizer.rows_PH)

    @property
    def shown(self) -> SoftPrompt:
        """The prompt as it is evaluated and saved now."""
        return replace(self.start, rows_PH=self.optimizer.shown_PH)

    @property
    def best(self) -> SoftPrompt:
        """The prompt with the lowest held-out loss; without held-out rows, as it is now."""
        return self.shown if self.best_PH is None else replace(self.start, rows_PH=self.best_PH)

    def movement(self, base: FrozenBase) -> float:
        """RMS distance of the rows from where they started, as a share of what they are relative to."""
        return (self.soft.rows_PH.detach() - self.start.rows_PH).square().mean().sqrt().item() / self.start.rms(base)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return {**self.optimizer.state(), **({} if self.best_PH is None else {BEST: self.best_PH})}


@dataclass(frozen=True)
class Entrant:
    """One prompt of a run before it has a folder: its own configuration, what it starts as, and a sentence about that."""

    config: Config
    start: SoftPrompt
    note: str


@dataclass(frozen=True)
class Setup:
    """A run before it has a folder: everything is loaded and checked, nothing is written."""

    config: Config
    base: FrozenBase
    engine: Engine
    encoder: Encoder
    rows: Rows
    held: Rows | None
    entrants: dict[str, Entrant]

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        return self.rows.rejected + (self.held.rejected if self.held else ())


@dataclass(frozen=True)
class Job(Setup):
    """A set-up with its run folder and its prompts in training."""

    run: RunFolder
    trainees: tuple[Trainee, ...]

    @property
    def num_steps(self) -> int:
        return count_steps(self.config, len(self.rows.encoded))

    @property
    def eval_every(self) -> int:
        """Steps between evaluations."""
        return self.config.train.eval_every or max(EVAL_APART, -(-self.num_steps // EVALUATIONS))


def prepare(config: Config, base: FrozenBase | None) -> Setup:
    """Loads and checks all that a configuration names. Raises an Error of errors.py when something is wrong with it."""
    alone = config.members()
    base = base or load_base(config.model)
    encoder = make_encoder(base.tokenizer, config.data.template)
    rows, held = load_rows(config, encoder)
    _check_rows(config, rows, held)
    entrants = {name: _entrant(own, base, encoder, rows) for name, own in alone.items()}
    check_context(base.context_length, max(entrant.start.length for entrant in entrants.values()), config.data.max_length)
    engine = make_engine(config, base)
    return Setup(_with_token_budget(config, engine.tokens_per_batch), base, engine, encoder, rows, held, entrants)


def _entrant(own: Config, base: FrozenBase, encoder: Encoder, rows: Rows) -> Entrant:
    start = start_rows(Material(own.prompt, base, rows.encoded, rows.labels, own.train.seed))
    check_position(own.prompt.position, encoder)
    if own.prompt.method == "prefix":
        deep = deepened(base, start.rows_PH, own.prompt.position, encoder.bos_id)
        return Entrant(own, deep, f"{start.note}; as keys and values of every layer")
    return Entrant(own, SoftPrompt(start.rows_PH, own.prompt.position, encoder.bos_id), start.note)


def start_job(setup: Setup, run: RunFolder) -> tuple[Job, Progress]:
    """The job, and the counters to go on from: those of the last checkpoint, if any. The run folder must be locked.

    Raises RunError when rows or base have changed since the run started.
    """
    checkpoint, progress = _where_it_stands(run, setup)
    num_steps = count_steps(setup.config, len(setup.rows.encoded))
    trainees = tuple(_trainee(name, entrant, setup, checkpoint, num_steps) for name, entrant in setup.entrants.items())
    return Job(**vars(setup), run=run, trainees=trainees), progress


def _where_it_stands(run: RunFolder, setup: Setup) -> tuple[Checkpoint | None, Progress]:
    base, rows = setup.base, setup.rows
    fresh = Progress(
        data_fingerprint=rows.fingerprint, base_fingerprint=base.fingerprint, scores={name: Scores() for name in setup.entrants}
    )
    checkpoint = latest_checkpoint(run.checkpoints)
    progress = checkpoint.progress if checkpoint else fresh
    if progress.data_fingerprint != fresh.data_fingerprint:
        raise RunError(f"the training rows have changed since {run.path} started: they must be the same to resume")
    if progress.base_fingerprint != fresh.base_fingerprint:
        raise RunError(f"{base.name} has other weights than when {run.path} started: they must be the same to resume")
    run.forget_after(progress.step if checkpoint else -1)
    return checkpoint, progress


def _trainee(name: str, entrant: Entrant, setup: Setup, checkpoint: Checkpoint | None, num_steps: int) -> Trainee:
    base, state, start = setup.base, checkpoint.states[name] if checkpoint else {}, entrant.start
    optimizer = RowOptimizer(start.rows_PH, entrant.config.optim, num_steps, start.rms(base))
    if state:
        optimizer.restore(state)
    best_PH = state[BEST].to(base.device) if BEST in state else None
    return Trainee(name, entrant.config, start, optimizer, best_PH)


# ---- small decisions -----------------------------------------------------------------------------------------------


def count_steps(config: Config, num_rows: int) -> int:
    """Optimizer steps of a run; the last one of an epoch-counted run may be smaller."""
    return config.train.steps or -(-count_examples(config, num_rows) // config.train.examples_per_step)


def count_examples(config: Config, num_rows: int) -> int:
    """Examples of an epoch-counted run."""
    usual = round(USUAL_STEPS * config.train.examples_per_step / num_rows)
    return num_rows * (config.train.epochs or min(max(1, usual), MOST_EPOCHS))


def check_position(position: str, encoder: Encoder) -> None:
    """Raises ConfigError for "after_bos" without a BOS token."""
    if position == "after_bos" and encoder.bos_id is None:
        raise ConfigError('prompt.position = "after_bos": this tokenizer adds no BOS token; use "start"')


def check_context(context_length: int | None, num_virtual_tokens: int, max_length: int) -> None:
    """Raises ConfigError when prompt and text together are longer than the base's context."""
    if context_length is not None and num_virtual_tokens + max_length > context_length:
        raise ConfigError(
            f"{num_virtual_tokens} virtual tokens and data.max_length = {max_length} exceed the base's context of {context_length} tokens: "
            "lower prompt.length (shorten prompt.text) or data.max_length"
        )


def with_absolute_paths(config: Config) -> Config:
    """Local paths made absolute, so that the run can be resumed and the prompt used from any folder."""

    def absolute(source: str | None) -> str | None:
        match = RANGE.match(source or "")
        path, rest = (match["source"], (source or "")[len(match["source"]) :]) if match else (source, "")
        return f"{Path(path).absolute()}{rest}" if path and Path(path.partition(":")[0]).exists() else source

    def moved(prompt: dict[str, Any]) -> dict[str, Any]:
        return {**prompt, "file": absolute(prompt["file"])} if prompt.get("file") else prompt

    name, gguf_file = config.model.location
    bank = tuple(member.model_copy(update={"prompt": moved(member.prompt)}) for member in config.prompt.bank)
    prompt = config.prompt.model_copy(update={"bank": bank, "file": absolute(config.prompt.file)})
    model = config.model.model_copy(update={"name": absolute(name), "gguf_file": gguf_file})
    data = config.data.model_copy(update={"train": absolute(config.data.train), "eval": absolute(config.data.eval)})
    return config.model_copy(update={"model": model, "data": data, "prompt": prompt})


def make_engine(config: Config, base: FrozenBase) -> Engine:
    """How the steps of a configuration are computed on this machine."""
    how = config.train
    return Engine(token_budget(base.model.base_model, base.device, how.tokens_per_batch), how.head_tolerance, how.checkpoint_activations)


def _with_token_budget(config: Config, tokens: int) -> Config:
    """The budget that was found becomes part of the run: resumed on another day, it is cut into the same micro-batches."""
    return config.model_copy(update={"train": config.train.model_copy(update={"tokens_per_batch": tokens})})


def _check_rows(config: Config, rows: Rows, held: Rows | None) -> None:
    check_rejected(rows.rejected + (held.rejected if held else ()), config.data.max_rejected)
    for name, split in (("data.train", rows), ("data.eval", held)):
        if split is not None and not split.encoded:
            raise DataError(f"{name}: no usable row is left ({len(split.rejected)} rejected)")
    if held is None and config.train.patience is not None:
        raise ConfigError("train.patience needs held-out rows: set data.eval or data.eval_fraction")


def data_facts(setup: Setup) -> dict[str, Any]:
    """The steps of the run, and lengths and cuts of its rows; `counts`: how many rows have each length in tokens, BOS included."""
    bos = int(setup.encoder.bos_id is not None)

    def facts(rows: Rows) -> dict[str, Any]:
        counts = Counter(len(row) + bos for row in rows.encoded)
        return {**asdict(summarize(rows, setup.encoder)), "counts": sorted(counts.items())}

    steps = count_steps(setup.config, len(setup.rows.encoded))
    return {"steps": steps, "train": facts(setup.rows), "eval": facts(setup.held) if setup.held else None}


def data_card(config: Config, rows: Rows, held: Rows | None) -> DataCard:
    assert config.data.train is not None
    return DataCard(
        train=Path(config.data.train).name if config.data.train.startswith("/") else config.data.train,
        num_train=len(rows.encoded),
        train_fingerprint=rows.fingerprint,
        num_eval=len(held.encoded) if held else 0,
        eval_fingerprint=held.fingerprint if held else None,
        labels=rows.labels,
        label_words=config.data.label_words,
    )
