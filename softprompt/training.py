"""The training loop, read top to bottom. It yields events; whoever loops over them prints, plots or streams them.

A run trains one prompt, or a bank of them that share every forward of the frozen base. The gradient of a step is
step.py's; here are the rows of each step, the optimizers, evaluation, checkpoints and the end.
"""

import math
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from softprompt.artifact import Card, DataCard, make_card, write_prompt
from softprompt.atomic import new_folder
from softprompt.batch import order_of_rows
from softprompt.checkpoint import Checkpoint, Progress, Scores, latest_checkpoint, prompt_folder, save_checkpoint
from softprompt.config import Config
from softprompt.data import RANGE, Rejected
from softprompt.encode import Encoder, Rows, check_rejected, load_rows, make_encoder
from softprompt.errors import ConfigError, DataError, RunError
from softprompt.evaluation import held_out_loss
from softprompt.events import Evaluated, Event, Finished, Saved, Started, Step
from softprompt.init import Start, start_rows
from softprompt.memory import token_budget
from softprompt.model import FrozenBase, load_base
from softprompt.optim import RowOptimizer
from softprompt.prompt import SoftPrompt
from softprompt.runlog import RunFolder, check_trackers, trackers
from softprompt.step import Engine, step_gradients


@dataclass(frozen=True)
class Trainee:
    """One prompt of a run. `config` is the configuration that would train it alone."""

    name: str
    config: Config
    soft: SoftPrompt
    optimizer: RowOptimizer
    note: str


@dataclass(frozen=True)
class Job:
    """Everything a run works with."""

    config: Config
    run: RunFolder
    base: FrozenBase
    engine: Engine
    encoder: Encoder
    rows: Rows
    held: Rows | None
    trainees: tuple[Trainee, ...]

    @property
    def num_steps(self) -> int:
        return count_steps(self.config, len(self.rows.encoded))


def train(config: Config, *, resume: bool = False, base: FrozenBase | None = None) -> Iterator[Event]:
    """Trains the prompt, or the bank of prompts, of a configuration into the run folder `config.train.out`, yielding events.

    With `resume`, goes on from the run's last checkpoint. `base` spares loading one that is loaded already. Ctrl-C
    finishes the step, writes a checkpoint and raises KeyboardInterrupt; a second one stops at once.
    Raises an Error of errors.py before anything is written when the set-up is wrong.
    """
    folder = Path(config.train.out)
    if resume:
        run = RunFolder.reopen(folder)
        finished = run.result()
        if finished is not None:
            yield Finished(finished)
            return
    else:
        RunFolder.check_free(folder)
        config = _with_absolute_paths(config)
    check_trackers(config)
    members = config.members()
    base = base or load_base(config.model)
    _check_rates(members, base)
    encoder = make_encoder(base.tokenizer, config.data.template)
    rows, held = load_rows(config, encoder)
    _check_rows(config, rows, held)
    starts = {name: start_rows(own.prompt, base, own.train.seed) for name, own in members.items()}
    check_context(base.context_length, max(len(start.rows_PH) for start in starts.values()), config.data.max_length)
    positions = {name: resolve_position(own, encoder) for name, own in members.items()}
    engine = make_engine(config, base)
    if not resume:
        config = _with_token_budget(config, engine.tokens_per_batch)
        run = RunFolder.create(config)
        run.write_rejected(_rejected(rows, held))
    with run.locked():
        checkpoint, progress = _where_it_stands(run, rows, base, members)
        num_steps = count_steps(config, len(rows.encoded))
        trainees = tuple(
            _trainee(name, own, starts[name], positions[name], encoder, base, checkpoint, num_steps) for name, own in members.items()
        )
        yield from _run(Job(config, run, base, engine, encoder, rows, held, trainees), progress)


def _where_it_stands(run: RunFolder, rows: Rows, base: FrozenBase, members: dict[str, Config]) -> tuple[Checkpoint | None, Progress]:
    """The last checkpoint, if any, and the counters to go on from. Raises RunError when rows or base have changed since."""
    fresh = Progress(data_fingerprint=rows.fingerprint, base_fingerprint=base.fingerprint, scores={name: Scores() for name in members})
    checkpoint = latest_checkpoint(run.checkpoints)
    progress = checkpoint.progress if checkpoint else fresh
    if progress.data_fingerprint != fresh.data_fingerprint:
        raise RunError(f"the training rows have changed since {run.path} started: they must be the same to resume")
    if progress.base_fingerprint != fresh.base_fingerprint:
        raise RunError(f"{base.name} has other weights than when {run.path} started: they must be the same to resume")
    run.forget_after(progress.step if checkpoint else -1)
    return checkpoint, progress


def _trainee(
    name: str,
    config: Config,
    start: Start,
    position: str,
    encoder: Encoder,
    base: FrozenBase,
    checkpoint: Checkpoint | None,
    num_steps: int,
) -> Trainee:
    rows_PH = (checkpoint.rows[name].to(base.device) if checkpoint else start.rows_PH).clone().requires_grad_()
    optimizer = RowOptimizer(rows_PH, config.optim, num_steps)
    optimizer.restore(checkpoint.moments[name] if checkpoint else {})
    return Trainee(name, config, SoftPrompt(rows_PH, position, encoder.bos_id), optimizer, start.note)


def _run(job: Job, progress: Progress) -> Iterator[Event]:
    config, run, held, num_steps = job.config, job.run, job.held, job.num_steps
    with trackers(config, run.path) as track, _interrupt_after_step() as interrupted:
        yield _started(job, progress)
        if held and progress.step == 0 and all(scores.eval_loss_before is None for scores in progress.scores.values()):
            evaluated, progress = _evaluate(job, progress)
            track({"eval_loss": evaluated.loss}, 0)
            yield evaluated
        while progress.step < num_steps:
            step, progress = _step(job, progress)
            run.log("step", **asdict(step))
            track({"loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm}, step.step)
            yield step
            last = progress.step == num_steps
            if held and (last or (config.train.eval_every and progress.step % config.train.eval_every == 0)):
                evaluated, progress = _evaluate(job, progress)
                track({"eval_loss": evaluated.loss}, progress.step)
                yield evaluated
            if last or progress.step % config.train.save_every == 0 or interrupted():
                prompts = {one.name: (one.soft, one.optimizer.state(), _card(job, one, progress)) for one in job.trainees}
                yield Saved(progress.step, save_checkpoint(run.checkpoints, progress, prompts, job.base))
            if interrupted() and not last:
                raise KeyboardInterrupt
        places = _write_prompts(job, progress)
        result = _result(job, progress, places)
        run.log("finished", progress.step, **result)
        run.write_result(result)
        yield Finished(result)


def _step(job: Job, progress: Progress) -> tuple[Step, Progress]:
    """One optimizer step of every prompt over its next `examples_per_step` rows."""
    began = time.perf_counter()
    encoded, size = job.rows.encoded, job.config.train.examples_per_step
    count = _examples_of_step(job.config, len(encoded), progress.step)
    first = progress.step * size
    numbers = [order_of_rows(len(encoded), first, count, one.config.train.seed) for one in job.trainees]
    rows = [[encoded[number] for number in own] for own in numbers]
    losses = step_gradients(job.base, [one.soft for one in job.trainees], rows, job.engine).tolist()
    for one, loss in zip(job.trainees, losses, strict=True):
        if not math.isfinite(loss):
            raise RunError(f"{one.name}: the loss of step {progress.step + 1} is not finite: lower optim.lr; the last checkpoint is kept")
    norms, rates = zip(*(one.optimizer.step(progress.step) for one in job.trainees), strict=True)
    seconds = time.perf_counter() - began
    supervised = [sum(row.num_supervised for row in own) for own in rows]
    scores = {
        one.name: progress.scores[one.name].trained(loss, number)
        for one, loss, number in zip(job.trainees, losses, supervised, strict=True)
    }
    progress = replace(
        progress,
        step=progress.step + 1,
        scores=scores,
        num_examples=progress.num_examples + sum(len(own) for own in rows),
        seconds=progress.seconds + seconds,
        peak_bytes=max(progress.peak_bytes, peak_bytes(job.base.device)),
    )
    num_tokens = sum(len(row) for own in rows for row in own)
    return Step(progress.step, _mean(losses), _mean(rates), _mean(norms), tuple(losses), num_tokens, seconds), progress


def _evaluate(job: Job, progress: Progress) -> tuple[Evaluated, Progress]:
    assert job.held is not None
    losses = [held_out_loss(job.base, one.soft, job.held, job.engine.tokens_per_batch) for one in job.trainees]
    scores = {
        one.name: progress.scores[one.name].evaluated(loss, first=progress.step == 0)
        for one, loss in zip(job.trainees, losses, strict=True)
    }
    evaluated = Evaluated(progress.step, _mean(losses), tuple(losses))
    job.run.log("evaluated", **asdict(evaluated))
    return evaluated, replace(progress, scores=scores)


def _started(job: Job, progress: Progress) -> Started:
    return Started(
        run=job.run.path,
        base=job.base,
        num_steps=job.num_steps,
        first_step=progress.step,
        num_train=len(job.rows.encoded),
        num_eval=len(job.held.encoded) if job.held else 0,
        num_rejected=len(_rejected(job.rows, job.held)),
        notes={one.name: one.note for one in job.trainees},
        num_trainable=sum(one.soft.rows_PH.numel() for one in job.trainees),
        num_parameters=job.base.num_parameters,
        row_rms=job.base.rms,
    )


# ---- what a run leaves ---------------------------------------------------------------------------------------------


def _card(job: Job, one: Trainee, progress: Progress) -> Card:
    scores = progress.scores[one.name]
    metrics = {"steps": progress.step, "eval_loss_before": scores.eval_loss_before, "eval_loss": scores.eval_loss}
    return make_card(one.config, job.base, one.soft, job.encoder, _data_card(job.config, job.rows, job.held), one.note, metrics)


def _write_prompts(job: Job, progress: Progress) -> dict[str, Path]:
    """Writes the finished prompts, `prompt` or `prompts/NAME`, unless they are there already. Returns their places."""
    count = len(job.trainees)
    whole = job.run.prompt if count == 1 else job.run.prompts
    if not whole.exists():
        with new_folder(whole) as draft:
            for one in job.trainees:
                write_prompt(prompt_folder(draft, one.name, count), one.soft, _card(job, one, progress), job.base)
    return {one.name: prompt_folder(whole, one.name, count) for one in job.trainees}


def _result(job: Job, progress: Progress, places: dict[str, Path]) -> dict[str, Any]:
    """The run in numbers; the losses are those of `prompt`, the best of a bank on the held-out rows, else in training."""
    prompts: dict[str, dict[str, Any]] = {
        one.name: {
            "seed": one.config.train.seed,
            "train_loss": progress.scores[one.name].train_loss,
            "eval_loss_before": progress.scores[one.name].eval_loss_before,
            "eval_loss_after": progress.scores[one.name].eval_loss,
            "prompt": str(places[one.name]),
        }
        for one in job.trainees
    }
    best = min(prompts.values(), key=lambda found: found["train_loss"] if found["eval_loss_after"] is None else found["eval_loss_after"])
    return {
        "steps": progress.step,
        **{key: value for key, value in best.items() if key != "seed"},
        "seconds": progress.seconds,
        "samples_per_second": progress.num_examples / progress.seconds,
        "peak_bytes": progress.peak_bytes,
        "prompts": prompts,
    }


# ---- small decisions -----------------------------------------------------------------------------------------------


def count_steps(config: Config, num_rows: int) -> int:
    """Optimizer steps of a run; the last one of an epoch-counted run may be smaller."""
    return config.train.steps or -(-num_rows * config.train.epochs // config.train.examples_per_step)


def _examples_of_step(config: Config, num_rows: int, step: int) -> int:
    size = config.train.examples_per_step
    return size if config.train.steps else min(size, num_rows * config.train.epochs - step * size)


def _check_rates(members: dict[str, Config], base: FrozenBase) -> None:
    if any(own.optim.lr is None for own in members.values()):
        raise ConfigError(
            f"optim.lr is not set: around 10% of the RMS of the base's embedding rows learns, here optim.lr={base.rms / 10:.2g}"
        )


def resolve_position(config: Config, encoder: Encoder) -> str:
    """ "after_bos" or "start". Raises ConfigError for "after_bos" without a BOS token."""
    if config.prompt.position == "auto":
        return "start" if encoder.bos_id is None else "after_bos"
    if config.prompt.position == "after_bos" and encoder.bos_id is None:
        raise ConfigError('prompt.position = "after_bos": this tokenizer adds no BOS token; use "start" or "auto"')
    return config.prompt.position


def check_context(context_length: int | None, num_virtual_tokens: int, max_length: int) -> None:
    """Raises ConfigError when prompt and text together are longer than the base's context."""
    if context_length is not None and num_virtual_tokens + max_length > context_length:
        raise ConfigError(
            f"{num_virtual_tokens} virtual tokens and data.max_length = {max_length} exceed the base's context of {context_length} tokens: "
            "lower prompt.length (shorten prompt.text) or data.max_length"
        )


def peak_bytes(device: torch.device) -> int:
    """Most memory used so far: of the process on a CPU, of the allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _rejected(rows: Rows, held: Rows | None) -> tuple[Rejected, ...]:
    return rows.rejected + (held.rejected if held else ())


def _check_rows(config: Config, rows: Rows, held: Rows | None) -> None:
    check_rejected(_rejected(rows, held), config.data.max_rejected)
    for name, split in (("data.train", rows), ("data.eval", held)):
        if split is not None and not split.encoded:
            raise DataError(f"{name}: no usable row is left ({len(split.rejected)} rejected)")


def _data_card(config: Config, rows: Rows, held: Rows | None) -> DataCard:
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


def _with_absolute_paths(config: Config) -> Config:
    """Local paths made absolute, so that the run can be resumed and the prompt used from any folder."""

    def absolute(source: str | None) -> str | None:
        match = RANGE.match(source or "")
        path, rest = (match["source"], (source or "")[len(match["source"]) :]) if match else (source, "")
        return f"{Path(path).absolute()}{rest}" if path and Path(path.partition(":")[0]).exists() else source

    name, gguf_file = config.model.location
    model = config.model.model_copy(update={"name": absolute(name), "gguf_file": gguf_file})
    data = config.data.model_copy(update={"train": absolute(config.data.train), "eval": absolute(config.data.eval)})
    return config.model_copy(update={"model": model, "data": data})


@contextmanager
def _interrupt_after_step() -> Iterator[Any]:
    """Yields a function that tells whether Ctrl-C was pressed; a second Ctrl-C stops at once."""
    pressed = False

    def remember(signum: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    try:
        before = signal.signal(signal.SIGINT, remember)
    except ValueError:  # not in the main thread: Ctrl-C does not arrive here
        yield lambda: False
        return
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def make_engine(config: Config, base: FrozenBase) -> Engine:
    """How the steps of a configuration are computed on this machine."""
    how = config.train
    return Engine(token_budget(base.model.base_model, base.device, how.tokens_per_batch), how.head_tolerance, how.checkpoint_activations)


def _with_token_budget(config: Config, tokens: int) -> Config:
    """The budget that was found becomes part of the run: resumed on another day, it is cut into the same micro-batches."""
    return config.model_copy(update={"train": config.train.model_copy(update={"tokens_per_batch": tokens})})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
