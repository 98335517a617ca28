"""The training loop, read top to bottom. It yields events; whoever loops over them prints, plots or streams them.

A step: the prompt's prefix is computed once, with gradient; the micro-batches of the step continue from a leaf copy of
it and add up their gradients there; one backward through the prompt's own positions ends the step. The loss is the sum
over supervised tokens divided by the number of them in the whole step.
"""

import math
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompt.artifact import Card, DataCard, make_card, write_prompt
from softprompt.atomic import new_folder
from softprompt.batch import batches, order_of_rows
from softprompt.checkpoint import Progress, latest_checkpoint, save_checkpoint
from softprompt.config import Config
from softprompt.data import RANGE, Rejected
from softprompt.encode import Encoder, Rows, check_rejected, load_rows, make_encoder
from softprompt.errors import ConfigError, DataError, RunError
from softprompt.evaluation import held_out_loss
from softprompt.init import start_rows
from softprompt.loss import token_losses
from softprompt.model import FrozenBase, load_base
from softprompt.optim import RowOptimizer
from softprompt.prompt import SoftPrompt
from softprompt.runlog import RunFolder, check_trackers, trackers


@dataclass(frozen=True)
class Started:
    """The run is set up. `first_step` is not 0 when it goes on from a checkpoint."""

    run: Path
    base: FrozenBase
    num_steps: int
    first_step: int
    num_train: int
    num_eval: int
    num_rejected: int
    note: str
    num_trainable: int
    num_parameters: int
    row_rms: float


@dataclass(frozen=True)
class Step:
    """An optimizer step was taken. `loss` per supervised token of the step; `num_tokens` real tokens of its rows."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    num_tokens: int
    seconds: float


@dataclass(frozen=True)
class Evaluated:
    """Loss per supervised token on the held-out rows after `step` steps."""

    step: int
    loss: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written."""

    step: int
    path: Path


@dataclass(frozen=True)
class Finished:
    """The run is done; `result` is what `softprompt train --json` writes."""

    result: dict[str, Any]


Event = Started | Step | Evaluated | Saved | Finished


def train(config: Config, *, resume: bool = False, base: FrozenBase | None = None) -> Iterator[Event]:
    """Trains one prompt into the run folder `config.train.out`, yielding events.

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
    base = base or load_base(config.model)
    if config.optim.lr is None:
        raise ConfigError(
            f"optim.lr is not set: around 10% of the RMS of the base's embedding rows learns, here optim.lr={base.rms / 10:.2g}"
        )
    encoder = make_encoder(base.tokenizer, config.data.template)
    rows, held = load_rows(config, encoder)
    _check_rows(config, rows, held)
    position = resolve_position(config, encoder)
    start = start_rows(config.prompt, base, config.train.seed)
    check_context(base.context_length, len(start.rows_PH), config.data.max_length)
    if not resume:
        run = RunFolder.create(config)
        run.write_rejected(_rejected(rows, held))
    with run.locked():
        yield from _run(config, run, base, encoder, rows, held, start.rows_PH, start.note, position)


def _run(
    config: Config,
    run: RunFolder,
    base: FrozenBase,
    encoder: Encoder,
    rows: Rows,
    held: Rows | None,
    start_PH: Tensor,
    note: str,
    position: str,
) -> Iterator[Event]:
    num_steps = count_steps(config, len(rows.encoded))
    checkpoint = latest_checkpoint(run.checkpoints)
    fresh = Progress(data_fingerprint=rows.fingerprint, base_fingerprint=base.fingerprint)
    progress = checkpoint.progress if checkpoint else fresh
    if progress.data_fingerprint != fresh.data_fingerprint:
        raise RunError(f"{config.data.train} has changed since {run.path} started: its rows must be the same to resume")
    if progress.base_fingerprint != fresh.base_fingerprint:
        raise RunError(f"{base.name} has other weights than when {run.path} started: they must be the same to resume")
    run.forget_after(progress.step if checkpoint else -1)
    rows_PH = (checkpoint.rows_PH.to(base.device) if checkpoint else start_PH).clone().requires_grad_()
    soft = SoftPrompt(rows_PH, position, encoder.bos_id)
    optimizer = RowOptimizer(rows_PH, config.optim, num_steps)
    optimizer.restore(checkpoint.moments if checkpoint else {})
    data = _data_card(config, rows, held)

    def card() -> Card:
        metrics = {"steps": progress.step, "eval_loss_before": progress.eval_loss_before, "eval_loss": progress.eval_loss}
        return make_card(config, base, soft, encoder, data, note, metrics)

    def save() -> Saved:
        path = save_checkpoint(run.checkpoints, progress, soft, optimizer.state(), card(), base)
        return Saved(progress.step, path)

    def evaluated() -> Evaluated:
        nonlocal progress
        assert held is not None
        loss = held_out_loss(base, soft, held, config.train.tokens_per_batch)
        before = loss if progress.step == 0 else progress.eval_loss_before
        progress = replace(progress, eval_loss=loss, eval_loss_before=before)
        run.log("evaluated", progress.step, loss=loss)
        track({"eval_loss": loss}, progress.step)
        return Evaluated(progress.step, loss)

    with trackers(config, run.path) as track, _interrupt_after_step() as interrupted:
        yield Started(
            run=run.path,
            base=base,
            num_steps=num_steps,
            first_step=progress.step,
            num_train=len(rows.encoded),
            num_eval=len(held.encoded) if held else 0,
            num_rejected=len(_rejected(rows, held)),
            note=note,
            num_trainable=rows_PH.numel(),
            num_parameters=base.num_parameters,
            row_rms=base.rms,
        )
        if held and progress.eval_loss_before is None:
            yield evaluated()
        while progress.step < num_steps:
            step, progress = _step(config, base, soft, rows, optimizer, progress)
            run.log("step", **asdict(step))
            track({"loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm}, step.step)
            yield step
            last = progress.step == num_steps
            if held and (last or (config.train.eval_every and progress.step % config.train.eval_every == 0)):
                yield evaluated()
            if last or progress.step % config.train.save_every == 0 or interrupted():
                yield save()
            if interrupted() and not last:
                raise KeyboardInterrupt
        if not run.prompt.exists():
            with new_folder(run.prompt) as draft:
                write_prompt(draft, soft, card(), base)
        result = _result(progress, run.prompt)
        run.log("finished", progress.step, **result)
        run.write_result(result)
        yield Finished(result)


def _step(
    config: Config, base: FrozenBase, soft: SoftPrompt, rows: Rows, optimizer: RowOptimizer, progress: Progress
) -> tuple[Step, Progress]:
    """One optimizer step over the next `examples_per_step` rows."""
    began = time.perf_counter()
    count = _examples_of_step(config, len(rows.encoded), progress.step)
    numbers = order_of_rows(len(rows.encoded), progress.step * config.train.examples_per_step, count, config.train.seed)
    num_supervised = sum(rows.encoded[number].num_supervised for number in numbers)
    num_tokens = sum(len(rows.encoded[number]) for number in numbers)
    prefix = soft.prefix(base)
    leaf = prefix.leaf()
    loss_sum = 0.0
    for batch in batches(rows.encoded, numbers, config.train.tokens_per_batch, base.device):
        continued = base.continue_from([leaf], [0] * len(batch.rows), batch.ids_BT, batch.mask_BT)
        loss = token_losses(base, continued, batch).sum()
        (loss / num_supervised).backward()
        loss_sum += loss.item()
    if not math.isfinite(loss_sum):
        raise RunError(f"the loss of step {progress.step + 1} is not finite: lower optim.lr; the last checkpoint is kept")
    prefix.backward_from(leaf)
    norm, lr = optimizer.step(progress.step)
    seconds = time.perf_counter() - began
    progress = replace(
        progress,
        step=progress.step + 1,
        loss_sum=progress.loss_sum + loss_sum,
        num_supervised=progress.num_supervised + num_supervised,
        num_examples=progress.num_examples + len(numbers),
        seconds=progress.seconds + seconds,
        peak_bytes=max(progress.peak_bytes, peak_bytes(base.device)),
    )
    return Step(progress.step, loss_sum / num_supervised, lr, norm, num_tokens, seconds), progress


# ---- small decisions -----------------------------------------------------------------------------------------------


def count_steps(config: Config, num_rows: int) -> int:
    """Optimizer steps of a run; the last one of an epoch-counted run may be smaller."""
    return config.train.steps or -(-num_rows * config.train.epochs // config.train.examples_per_step)


def _examples_of_step(config: Config, num_rows: int, step: int) -> int:
    size = config.train.examples_per_step
    return size if config.train.steps else min(size, num_rows * config.train.epochs - step * size)


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


def _result(progress: Progress, prompt: Path) -> dict[str, Any]:
    return {
        "steps": progress.step,
        "train_loss": progress.loss_sum / progress.num_supervised,
        "eval_loss_before": progress.eval_loss_before,
        "eval_loss_after": progress.eval_loss,
        "seconds": progress.seconds,
        "samples_per_second": progress.num_examples / progress.seconds,
        "peak_bytes": progress.peak_bytes,
        "prompt": str(prompt),
    }


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
