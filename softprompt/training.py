"""The training loop, read top to bottom. It yields events; whoever loops over them prints, plots or streams them.

A run trains one prompt, or a bank of them that share every forward of the frozen base. The gradient of a step is
step.py's, what a run works with is put together in job.py; here are the rows of each step, evaluation, checkpoints and the end.
"""

import math
import resource
import signal
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from softprompt.answers import limit_of
from softprompt.artifact import Card, StoredPrompt, load_prompt, make_card, write_prompt
from softprompt.atomic import new_folder
from softprompt.batch import order_of_rows
from softprompt.checkpoint import Progress, prompt_folder, save_checkpoint
from softprompt.config import Config, Member
from softprompt.decode import Question, Sampling, decode_whole
from softprompt.doctor import case_of, examine, warnings
from softprompt.errors import ConfigError, RunError
from softprompt.evaluation import held_out_loss
from softprompt.events import Evaluated, Event, Finished, Found, Saved, Searching, Started, Step, Warned
from softprompt.inspection import inspect
from softprompt.job import Job, Trainee, count_examples, data_card, data_facts, prepare, start_job, with_absolute_paths
from softprompt.model import FrozenBase, load_base
from softprompt.prompt import SoftPrompt, prefix_of
from softprompt.runlog import RunFolder
from softprompt.step import step_gradients
from softprompt.trackers import Sheet, check_trackers, tracking

NUM_SAMPLES = 4  # answers that trackers are shown
RATES, SEARCH_STEPS = (0.02, 0.05, 0.1, 0.2, 0.5), 20  # optim.relative_lr = "find"


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
        config = with_absolute_paths(config)
    check_trackers(config.train.trackers)
    if config.optim.relative_lr == "find":
        base = base or load_base(config.model)
        config = yield from _find_rate(config, base)
    setup = prepare(config, base)
    if not resume:
        run = RunFolder.create(setup.config)
        run.write_rejected(setup.rejected)
        run.write("data.json", data_facts(setup))
    with run.locked():
        yield from _run(*start_job(setup, run))


def _find_rate(config: Config, base: FrozenBase) -> Generator[Event, None, Config]:
    """Trains the prompt for a few steps at all of RATES, as one bank; returns the configuration with the best of them."""
    if config.prompt.bank or config.prompt.count > 1 or config.optim.lr is not None:
        raise ConfigError('optim.relative_lr = "find" is for one prompt without optim.lr: a bank may name a rate for each of its prompts')
    bank = tuple(Member(name=f"rate-{rate}", optim={"relative_lr": rate}) for rate in RATES)
    with tempfile.TemporaryDirectory() as folder:
        short = {name: SEARCH_STEPS for name in ("steps", "eval_every", "save_every")}
        endless = {"patience": None, "minutes": None, "trackers": ()}
        of_all = {
            "prompt": config.prompt.model_copy(update={"bank": bank}),
            "optim": config.optim.model_copy(update={"relative_lr": RATES[0]}),  # each of the bank has its own
            "train": config.train.model_copy(update={**short, **endless, "out": f"{folder}/search"}),
        }
        for event in train(config.model_copy(update=of_all), base=base):
            if isinstance(event, Step):
                yield Searching(event.step, SEARCH_STEPS)
    assert isinstance(event, Finished), "a run ends with its result"
    measured = "train_loss" if event.result["eval_loss_after"] is None else "eval_loss_after"
    losses = {rate: event.result["prompts"][f"rate-{rate}"][measured] for rate in RATES}
    found = min(RATES, key=lambda rate: losses[rate])
    yield Found(found, losses)
    return config.model_copy(update={"optim": config.optim.model_copy(update={"relative_lr": found})})


def _run(job: Job, progress: Progress) -> Iterator[Event]:
    config, folder = job.config, job.run.path
    with tracking(config.train.trackers, config, folder, folder.name) as track, _interrupt_after_step() as interrupted:
        yield _started(job, progress)
        if job.held and progress.step == 0 and all(scores.eval_loss_before is None for scores in progress.scores.values()):
            evaluated, progress = _evaluate(job, progress)
            track.numbers({"eval_loss": evaluated.loss}, 0)
            yield evaluated
        if progress.step == 0:
            yield from _warnings(job, progress)
        while not _ended(job, progress):
            step, progress = _step(job, progress)
            job.run.log("step", **asdict(step))
            track.numbers({"loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm, "movement": step.movement}, step.step)
            yield step
            if job.held and (_ended(job, progress) or progress.step % job.eval_every == 0):
                evaluated, progress = _evaluate(job, progress)
                track.numbers({"eval_loss": evaluated.loss}, progress.step)
                yield evaluated
            ended = _ended(job, progress)
            if not ended and progress.step % job.eval_every == 0:
                yield from _warnings(job, progress)
            if ended or progress.step % job.config.train.save_every == 0 or interrupted():
                prompts = {one.name: (one.shown, one.state(), _card(job, one, one.shown, progress)) for one in job.trainees}
                yield Saved(progress.step, save_checkpoint(job.run.checkpoints, progress, prompts, job.base))
            if interrupted() and not ended:
                raise KeyboardInterrupt
        places = _write_prompts(job, progress)
        job.run.write("inspection.json", {one.name: _inspected(job, one, progress) for one in job.trainees})
        result = _result(job, progress, places)
        job.run.log("finished", progress.step, **result)
        job.run.write("result.json", result)
        if track.trackers:
            track.table(_scores(result), progress.step)
            if job.held:
                track.table(_samples(job, result["prompt"]), progress.step)
        yield Finished(result)


def _ended(job: Job, progress: Progress) -> str | None:
    """Why the run is over, or None: all its steps are taken, its minutes are over, or no prompt has improved for too long."""
    limits = job.config.train
    if progress.step >= job.num_steps:
        return "steps"
    if limits.minutes is not None and progress.seconds >= 60 * limits.minutes:
        return "minutes"
    if limits.patience is not None and all(scores.num_worse >= limits.patience for scores in progress.scores.values()):
        return "patience"
    return None


def _step(job: Job, progress: Progress) -> tuple[Step, Progress]:
    """One optimizer step of every prompt over its next `examples_per_step` rows."""
    began = time.perf_counter()
    encoded, size = job.rows.encoded, job.config.train.examples_per_step
    count = _examples_of_step(job.config, len(encoded), progress.step)
    first = progress.step * size
    labels = [example.label for example in job.rows.examples]
    numbers = [order_of_rows(labels, first, count, one.config.train.seed) for one in job.trainees]
    rows = [[encoded[number] for number in own] for own in numbers]
    losses = step_gradients(job.base, [one.soft for one in job.trainees], rows, job.engine).tolist()
    for one, loss in zip(job.trainees, losses, strict=True):
        if not math.isfinite(loss):
            raise RunError(
                f"{one.name}: the loss of step {progress.step + 1} is not finite: lower optim.relative_lr; the last checkpoint is kept"
            )
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
    movements = tuple(one.movement(job.base) for one in job.trainees)
    num_tokens = sum(len(row) for own in rows for row in own)
    return Step(progress.step, tuple(losses), rates, norms, movements, num_tokens, seconds), progress


def _evaluate(job: Job, progress: Progress) -> tuple[Evaluated, Progress]:
    assert job.held is not None
    losses = [held_out_loss(job.base, one.shown, job.held, job.engine.tokens_per_batch) for one in job.trainees]
    scores = {one.name: progress.scores[one.name].evaluated(loss, progress.step) for one, loss in zip(job.trainees, losses, strict=True)}
    for one in job.trainees:
        if progress.step and scores[one.name].best_step == progress.step:
            one.best_PH = one.shown.rows_PH.clone()
    evaluated = Evaluated(progress.step, fmean(losses), tuple(losses))
    job.run.log("evaluated", **asdict(evaluated))
    return evaluated, replace(progress, scores=scores)


def _warnings(job: Job, progress: Progress) -> Iterator[Warned]:
    """What the doctor finds at this step and has not said before; the run's log remembers it, also over a resume."""
    events = job.run.events()
    known = {(prompt, event["check"]) for event in events if event["event"] == "warned" for prompt in event["prompts"]}
    of_whom: dict[tuple[str, str], list[str]] = {}  # the data is that of every prompt of a bank
    for index, one in enumerate(job.trainees):
        case = case_of(events, index, job.entrants[one.name], job, one.shown.rows_PH)
        for check, finding in warnings(case).items():
            if (one.name, check) not in known:
                of_whom.setdefault((check, finding), []).append(one.name)
    for (check, finding), prompts in of_whom.items():
        job.run.log("warned", progress.step, prompts=prompts, check=check, finding=finding)
        yield Warned(progress.step, tuple(prompts), finding)


def _started(job: Job, progress: Progress) -> Started:
    return Started(
        run=job.run.path,
        base=job.base,
        num_steps=job.num_steps,
        first_step=progress.step,
        num_train=len(job.rows.encoded),
        num_eval=len(job.held.encoded) if job.held else 0,
        num_rejected=len(job.rejected),
        notes={one.name: job.entrants[one.name].note for one in job.trainees},
        num_trainable=sum(one.optimizer.rows_PH.numel() for one in job.trainees),
        num_parameters=job.base.num_parameters,
        row_rms=job.base.rms,
    )


# ---- what a run leaves ---------------------------------------------------------------------------------------------


def _card(job: Job, one: Trainee, soft: SoftPrompt, progress: Progress) -> Card:
    """The card of `soft`: of the prompt as it is now, or of its best rows."""
    scores = progress.scores[one.name]
    is_best = soft.rows_PH is one.best_PH
    metrics = {
        "steps": scores.best_step if is_best else progress.step,
        "eval_loss_before": scores.eval_loss_before,
        "eval_loss": scores.best_loss if is_best else None,
    }
    return make_card(
        one.config, job.base, soft, job.encoder, data_card(job.config, job.rows, job.held), job.entrants[one.name].note, metrics
    )


def _write_prompts(job: Job, progress: Progress) -> dict[str, Path]:
    """Writes the finished prompts, `prompt` or `prompts/NAME`, unless they are there already. Returns their places."""
    count = len(job.trainees)
    whole = job.run.prompt if count == 1 else job.run.prompts
    if not whole.exists():
        with new_folder(whole) as draft:
            for one in job.trainees:
                write_prompt(prompt_folder(draft, one.name, count), one.best, _card(job, one, one.best, progress), job.base)
    return {one.name: prompt_folder(whole, one.name, count) for one in job.trainees}


def _inspected(job: Job, one: Trainee, progress: Progress) -> dict[str, Any]:
    """What the rows of a finished prompt are, for the report; what each is worth takes `softprompt inspect`."""
    return inspect(job.base, StoredPrompt(one.best, _card(job, one, one.best, progress), job.encoder), start=one.start).as_dict()


def _result(job: Job, progress: Progress, places: dict[str, Path]) -> dict[str, Any]:
    """The run in numbers; the losses are those of `prompt`, the best of a bank on the held-out rows, else in training."""
    events = job.run.events()
    prompts: dict[str, dict[str, Any]] = {
        one.name: {
            "seed": one.config.train.seed,
            "train_loss": progress.scores[one.name].train_loss,
            "eval_loss_before": progress.scores[one.name].eval_loss_before,
            "eval_loss_after": progress.scores[one.name].best_loss,
            "best_step": progress.scores[one.name].best_step,
            "findings": examine(case_of(events, index, job.entrants[one.name], job, one.best.rows_PH)),
            "prompt": str(places[one.name]),
        }
        for index, one in enumerate(job.trainees)
    }
    best = min(prompts.values(), key=lambda found: found["train_loss"] if found["eval_loss_after"] is None else found["eval_loss_after"])
    return {
        "steps": progress.step,
        "ended": _ended(job, progress),
        **{key: value for key, value in best.items() if key != "seed"},
        "seconds": progress.seconds,
        "samples_per_second": progress.num_examples / progress.seconds,
        "peak_bytes": progress.peak_bytes,
        "prompts": prompts,
    }


def _scores(result: dict[str, Any]) -> Sheet:
    """For trackers: the losses of every prompt of the run."""
    columns = ("train_loss", "eval_loss_before", "eval_loss_after", "best_step")
    rows = tuple((name, *(found[key] for key in columns)) for name, found in result["prompts"].items())
    return Sheet("prompts", ("prompt", *columns), rows)


@torch.inference_mode()
def _samples(job: Job, best: str) -> Sheet:
    """For trackers: what the run's best prompt answers to the first held-out rows."""
    assert job.held is not None
    rows, examples = job.held.encoded[:NUM_SAMPLES], job.held.examples[:NUM_SAMPLES]
    prefix = prefix_of(job.base, [load_prompt(best, job.base).soft])
    questions = [Question((0,), (row.question,)) for row in rows]
    said = {row: ids for row, ids, _ in decode_whole(job.base, prefix, questions, Sampling(max_new_tokens=limit_of(rows)))}
    answers = [job.base.tokenizer.decode(said[row], skip_special_tokens=True) for row in range(len(rows))]
    lines = ((row.messages[-2].content, row.response, answer) for row, answer in zip(examples, answers, strict=True))
    return Sheet("samples", ("question", "wanted", "answer"), tuple(lines))


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


def _examples_of_step(config: Config, num_rows: int, step: int) -> int:
    size = config.train.examples_per_step
    return size if config.train.steps else min(size, count_examples(config, num_rows) - step * size)


def peak_bytes(device: torch.device) -> int:
    """Most memory used so far: of the process on a CPU, of the allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
