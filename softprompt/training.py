"""The training loop, read top to bottom. It yields events; whoever loops over them prints, plots or streams them.

A run trains one prompt, or a bank of them that share every forward of the frozen base. The gradient of a step is
engine/step.py's, what a run works with is put together in job.py; here are steps, evaluation, checkpoints and the end.
"""

import math
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import torch

from softprompt.answers import limit_of
from softprompt.artifact import StoredPrompt, load_prompt, make_card, write_prompt
from softprompt.atomic import new_folder
from softprompt.card import Card
from softprompt.checkpoint import Counters, Scores, Snapshot, Writer, drop_checkpoints, prompt_folder, save_checkpoint, save_start
from softprompt.config import Config, Member
from softprompt.distil.outcome import distilled_card, outcome
from softprompt.doctor import Case, History, case_of, examine, history_of, warnings
from softprompt.engine.decode import Question, decode_whole
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase
from softprompt.engine.processes import joined
from softprompt.engine.prompt import Prompt
from softprompt.engine.step import step_gradients
from softprompt.engine.world import World
from softprompt.errors import ConfigError, Diverged
from softprompt.events import Evaluated, Event, Finished, Found, Sampled, Saved, Searching, Started, Step, Warned
from softprompt.init import SOURCES, Source
from softprompt.inspection import inspect
from softprompt.job import Job, Measured, Setup, Trainee, data_card, data_facts, in_precision, prepare, start_job
from softprompt.locations import with_absolute_paths
from softprompt.runlog import RunFolder
from softprompt.sampling import Sampling
from softprompt.stopping import stop_after_step
from softprompt.thinking import spoken
from softprompt.trackers import check_trackers, tracked

NUM_SAMPLES = 4  # answers that trackers are shown
RATES, SEARCH_STEPS = (0.02, 0.05, 0.1, 0.2, 0.5), 20  # optim.relative_lr = "find"

Events = Generator[Event, None, None]


def train(
    config: Config, *, resume: bool = False, base: FrozenBase | None = None, sources: Mapping[str, Source] = SOURCES
) -> Iterator[Event]:
    """Trains the prompt, or the bank of prompts, of a configuration into the run folder `config.train.out`, yielding events.

    With `resume`, goes on from the run's last checkpoint. `base` spares loading one that is loaded already. `sources`: what the names
    in `prompt.init` mean (init.py). Ctrl-C and SIGTERM finish the step, write a checkpoint and raise KeyboardInterrupt; a second Ctrl-C
    stops at once. Processes that a launcher has started share the work: all of them call this, and the first one alone touches the folder.

    Raises an Error of errors.py before anything is written when the set-up is wrong, and RunError when the run's folder cannot be
    written to any more, or another process has ended.
    """
    with joined() as world, closing(_train(config, resume, base, sources, world)) as events:
        for event in events:
            if isinstance(event, Finished):
                world.end()
            yield event


def _train(config: Config, resume: bool, base: FrozenBase | None, sources: Mapping[str, Source], world: World) -> Events:
    folder = Path(config.train.out)
    early: list[Event] = []
    if resume:
        finished = world.told(lambda: RunFolder.reopen(folder).result())
        if finished is not None:
            yield Finished(finished)
            return
    else:
        world.told(lambda: RunFolder.check_free(folder))
        config = with_absolute_paths(config)
    config = in_precision(config, base, RunFolder(folder) if resume else None, world)
    check_trackers(config.train.trackers)
    if config.optim.relative_lr == "find":
        base = base or load_base(world.placed(config.model))
        for event in _find_rate(config, base, world):
            early.append(event)
            yield event
        assert isinstance(event, Found), "a search ends with what it found"
        config = config.model_copy(update={"optim": config.optim.model_copy(update={"relative_lr": event.relative_lr})})
    if not world.first:
        job, counters = start_job((yield from prepare(config, base, sources, world)), RunFolder(folder), world)
        yield from _run(job, counters, History(len(job.trainees)))
        return
    if config.distil.wanted and not resume:
        with RunFolder.creating(config):  # which keeps what its teacher is asked and answers
            pass
    with ExitStack() as held:
        begun = folder.exists()
        if begun:
            held.enter_context(RunFolder.reopen(folder).locked())
        setup = yield from prepare(config, base, sources, world)
        if not begun:
            with RunFolder.creating(setup.config) as draft:
                _write_setup(draft, setup, early)
            held.enter_context(RunFolder.reopen(folder).locked())
        run = RunFolder.reopen(folder)
        if run.read("data.json") is None:
            _write_setup(run, setup, early)
        job, counters = start_job(setup, run, world)
        history = history_of(run, len(job.trainees))
        yield from tracked(_logged(run, history, _run(job, counters, history)), setup.config)


def _find_rate(config: Config, base: FrozenBase, world: World) -> Events:
    """Trains the prompt for a few steps at all of RATES, as one bank, and says which was the best of them."""
    if config.prompt.bank or config.prompt.count > 1 or config.optim.lr is not None:
        raise ConfigError('optim.relative_lr = "find" is for one prompt without optim.lr: a bank may name a rate for each of its prompts')
    bank = tuple(Member(name=f"rate-{rate}", optim={"relative_lr": rate}) for rate in RATES)
    if config.distil.wanted:
        raise ConfigError('optim.relative_lr = "find" tries rates on rows with answers: leave it out, or name a rate')
    with tempfile.TemporaryDirectory() as folder:
        short = {name: SEARCH_STEPS for name in ("steps", "eval_every", "save_every")}
        endless = {"patience": None, "minutes": None, "trackers": ()}
        of_all = {
            "prompt": config.prompt.model_copy(update={"bank": bank}),
            "optim": config.optim.model_copy(update={"relative_lr": RATES[0]}),  # each of the bank has its own
            "train": config.train.model_copy(update={**short, **endless, "out": f"{folder}/search"}),
        }
        for event in _train(config.model_copy(update=of_all), False, base, SOURCES, world):
            if isinstance(event, Step):
                yield Searching(event.step, SEARCH_STEPS)
    assert isinstance(event, Finished), "a run ends with its result"
    measured = "train_loss" if event.result["eval_loss_after"] is None else "eval_loss_after"
    losses = {rate: event.result["prompts"][f"rate-{rate}"][measured] for rate in RATES}
    yield Found(min(RATES, key=lambda rate: losses[rate]), losses)


def _write_setup(run: RunFolder, setup: Setup, early: list[Event]) -> None:
    """Fills a run folder with all that is known before the first step; data.json is the last of it."""
    of_base = {"base_fingerprint": setup.base.fingerprint, "tokenizer_fingerprint": setup.base.tokenizer_fingerprint}
    run.write("run.json", {**(run.read("run.json") or {}), **of_base})
    run.write_config(setup.config)
    run.write_rejected(setup.rejected)
    save_start(run.start, {name: one.prompt for name, one in setup.untrained.items()})
    for event in early:
        run.append(event)
    run.write("data.json", data_facts(setup))


def _logged(run: RunFolder, history: History, events: Events) -> Events:
    """The events as they are, each written to the run folder before anybody else sees it; with the last one, result.json."""
    with closing(events):
        for event in events:
            run.patiently(partial(run.append, event))
            if isinstance(event, Finished):
                run.patiently(partial(run.write, "result.json", event.result))
            history.hear(event)
            yield event


def _run(job: Job, counters: Counters, history: History) -> Events:
    first = job.world.first
    with stop_after_step() as asked, Writer(job.run) as writer:
        yield _started(job, counters)
        if job.held and counters.step == 0 and all(scores.eval_loss_before is None for scores in counters.scores.values()):
            evaluated, counters = _evaluate(job, counters)
            yield evaluated
        if counters.step == 0 and first:
            yield from _warnings(job, counters, history)
        while not _ended(job, counters):
            try:
                step, counters = _step(job, counters)
            finally:
                yield from writer.wait()  # what was written beside the step, also where the step fails
            yield step
            if job.held and (_ended(job, counters) or counters.step % job.eval_every == 0):
                evaluated, counters = _evaluate(job, counters)
                yield evaluated
            ended, stopped = _ended(job, counters), any(job.world.gathered(asked()))
            if first and not ended and counters.step % job.eval_every == 0:
                yield from _warnings(job, counters, history)
            if first and (ended or counters.step % job.config.train.save_every == 0 or stopped):
                writer.begin(Saved(counters.step, job.run.checkpoint(counters.step)), _checkpoint(job, counters))
            if ended or stopped:
                yield from writer.wait()
            if stopped and not ended:
                job.world.end()
                raise KeyboardInterrupt
        distilled = _distilled(job, counters)
        result = job.world.told(lambda: _left(job, counters, history, distilled))
        if first and job.held and job.config.train.trackers:
            yield _sampled(job, result["prompt"], counters.step)
        yield Finished(result)


def _ended(job: Job, counters: Counters) -> str | None:
    """Why the run is over, or None: all its steps are taken, its minutes are over, or no prompt has improved for too long."""
    limits = job.config.train
    if counters.step >= job.num_steps:
        return "steps"
    if limits.minutes is not None and counters.seconds >= 60 * limits.minutes:
        return "minutes"
    if limits.patience is not None and all(scores.num_worse >= limits.patience for scores in counters.scores.values()):
        return "patience"
    return None


def _step(job: Job, counters: Counters) -> tuple[Step, Counters]:
    """One optimizer step of every prompt over its next `examples_per_step` rows."""
    began = time.perf_counter()
    rows, settings = job.step_of(counters)
    losses_K, allowed = step_gradients(job.base, [one.training for one in job.trainees], rows, settings, job.world)
    losses = losses_K.tolist()
    for one, loss in zip(job.trainees, losses, strict=True):
        if not math.isfinite(loss):
            overflow = ", or float16 overflows: use bfloat16 or float32" if job.base.dtype == torch.float16 else ""
            said = f"{one.name}: the loss of step {counters.step + 1} is not finite: lower optim.relative_lr{overflow}"
            raise Diverged(f"{said}; the last checkpoint is kept", one.name)
    norms, rates = zip(*(one.optimizer.step(counters.step) for one in job.trainees), strict=True)
    slowest = job.world.gathered((allowed, time.perf_counter() - began))
    allowed, seconds = min(told[0] for told in slowest), max(told[1] for told in slowest)
    supervised = [sum(row.num_supervised for row in own) for own in rows]
    scores = {
        one.name: counters.scores[one.name].trained(loss, number)
        for one, loss, number in zip(job.trainees, losses, supervised, strict=True)
    }
    counters = replace(
        counters,
        step=counters.step + 1,
        scores=scores,
        num_examples=counters.num_examples + sum(len(own) for own in rows),
        seconds=counters.seconds + seconds,
        peak_bytes=max(counters.peak_bytes, peak_bytes(job.base.device)),
        tokens_per_batch=allowed if allowed < job.budget else None,
    )
    movements = tuple(one.movement(job.base) for one in job.trainees)
    num_tokens = sum(len(row) for own in rows for row in own)
    return Step(counters.step, tuple(losses), rates, norms, movements, num_tokens, seconds), counters


def _evaluate(job: Job, counters: Counters) -> tuple[Evaluated, Counters]:
    losses = [job.held_out_loss(one.shown) for one in job.trainees]
    scores = {one.name: counters.scores[one.name].evaluated(loss, counters.step) for one, loss in zip(job.trainees, losses, strict=True)}
    for one in job.trainees:
        if counters.step and scores[one.name].best_step == counters.step:
            one.best_PD = one.shown.learned_PD.clone()
    return Evaluated(counters.step, fmean(losses), tuple(losses)), replace(counters, scores=scores)


def _warnings(job: Job, counters: Counters, history: History) -> Iterator[Warned]:
    """What the doctor finds at this step and has not said before; the run's stream remembers it, also over a resume."""
    known = {(prompt, event.check) for event in history.warned for prompt in event.prompts}
    of_whom: dict[tuple[str, str], list[str]] = {}  # the data is that of every prompt of a bank
    for index, one in enumerate(job.trainees):
        case = _case(job, history, index, one.shown)
        for check, finding in warnings(case).items():
            if (one.name, check) not in known:
                of_whom.setdefault((check, finding), []).append(one.name)
    for (check, finding), prompts in of_whom.items():
        yield Warned(counters.step, tuple(prompts), check, finding)


def _case(job: Job, history: History, index: int, prompt: Prompt) -> Case:
    one = job.trainees[index]
    return case_of(history, index, one.config.optim, one.start, prompt, job.base, job.rows, job.held)


def _started(job: Job, counters: Counters) -> Started:
    return Started(
        run=job.run.path,
        base=job.base.name,
        num_steps=job.num_steps,
        first_step=counters.step,
        num_train=len(job.rows.encoded),
        num_eval=len(job.held.encoded) if job.held else 0,
        num_rejected=len(job.rejected),
        notes={one.name: one.untrained.note for one in job.trainees},
        num_trainable=sum(one.optimizer.learned_PD.numel() for one in job.trainees),
        num_parameters=job.base.num_parameters,
        row_rms=job.base.rms,
    )


# ---- what a run leaves ---------------------------------------------------------------------------------------------


def _checkpoint(job: Job, counters: Counters) -> Callable[[], None]:
    """What writes the checkpoint of this moment, whenever it is called, and then drops those that are not kept."""
    prompts = {}
    for one in job.trainees:
        card = partial(_card, job, one, Measured(one.shown, counters.step, None), counters)
        prompts[one.name] = Snapshot.of(one.shown, one.state(), card, job.base)

    def write() -> None:
        save_checkpoint(job.run.checkpoint(counters.step), counters, prompts, job.base)
        drop_checkpoints(job.run.checkpoints, job.config.train.keep, counters.best_steps, job.num_steps)

    return write


def _card(job: Job, one: Trainee, measured: Measured, counters: Counters) -> Card:
    before = counters.scores[one.name].eval_loss_before
    metrics = {"steps": measured.step, "eval_loss_before": before, "eval_loss": measured.eval_loss}
    data = data_card(job.config, job.rows, job.held)
    card = make_card(one.config, job.base, measured.prompt, job.encoder, data, one.untrained.note, metrics)
    return card if job.study is None else card.model_copy(update={"distilled": distilled_card(job.config.distil, job.study)})


def _write_prompts(job: Job, counters: Counters) -> dict[str, Path]:
    """Writes the finished prompts, `prompt` or `prompts/NAME`, unless they are there already. Returns their places."""
    count = len(job.trainees)
    whole = job.run.prompt if count == 1 else job.run.prompts
    if not whole.exists():
        with new_folder(whole) as draft:
            for one in job.trainees:
                best = one.best(counters)
                write_prompt(prompt_folder(draft, one.name, count), best.prompt, _card(job, one, best, counters), job.base)
    return {one.name: prompt_folder(whole, one.name, count) for one in job.trainees}


def _inspected(job: Job, one: Trainee, counters: Counters) -> dict[str, Any]:
    """What the rows of a finished prompt are, for the report; what each is worth takes `softprompt inspect`."""
    best = one.best(counters)
    return inspect(job.base, StoredPrompt(best.prompt, _card(job, one, best, counters), job.encoder), start=one.start).as_dict()


def _left(job: Job, counters: Counters, history: History, distilled: dict[str, Any]) -> dict[str, Any]:
    """Writes the finished prompts, and what their rows are. Returns the run in numbers."""
    places = job.run.patiently(lambda: _write_prompts(job, counters))
    inspected = {one.name: _inspected(job, one, counters) for one in job.trainees}
    job.run.patiently(lambda: job.run.write("inspection.json", inspected))
    return _result(job, counters, history, places, distilled)


def _distilled(job: Job, counters: Counters) -> dict[str, Any]:
    """How like its teacher the best prompt is, where there is one."""
    if job.study is None:
        return {}
    best = min(job.trainees, key=lambda one: _compared(counters.scores[one.name]))
    return {"distilled": outcome(job.base, job.study, best.best(counters).prompt, job.budget, job.world)}


def _compared(scores: Scores) -> float:
    """What prompts of a bank are compared by."""
    return scores.train_loss if scores.best_loss is None else scores.best_loss


def _result(job: Job, counters: Counters, history: History, places: dict[str, Path], distilled: dict[str, Any]) -> dict[str, Any]:
    """The run in numbers; the losses are those of `prompt`, the best of a bank on the held-out rows, else in training."""
    prompts: dict[str, dict[str, Any]] = {
        one.name: {
            "seed": one.config.train.seed,
            "train_loss": counters.scores[one.name].train_loss,
            "eval_loss_before": counters.scores[one.name].eval_loss_before,
            "eval_loss_after": counters.scores[one.name].best_loss,
            "best_step": counters.scores[one.name].best_step,
            "findings": examine(_case(job, history, index, one.best(counters).prompt)),
            "prompt": str(places[one.name]),
        }
        for index, one in enumerate(job.trainees)
    }
    best = min(prompts, key=lambda name: _compared(counters.scores[name]))
    return {
        "steps": counters.step,
        "ended": _ended(job, counters),
        **{key: value for key, value in prompts[best].items() if key != "seed"},
        "seconds": counters.seconds,
        "samples_per_second": counters.num_examples / counters.seconds,
        "peak_bytes": counters.peak_bytes,
        **distilled,
        "prompts": prompts,
    }


def _sampled(job: Job, best: str, step: int) -> Sampled:
    assert job.held is not None
    rows, examples = job.held.encoded[:NUM_SAMPLES], job.held.examples[:NUM_SAMPLES]
    context, sampling = (load_prompt(best, job.base).soft, ()), Sampling(max_new_tokens=limit_of(rows))
    questions = [Question((context,), (row.question,), sampling, stop_ids=job.encoder.end_ids) for row in rows]
    said = {row: ids for row, ids, _ in decode_whole(job.base, questions)}
    texts = [job.base.tokenizer.decode(said[row], skip_special_tokens=True) for row in range(len(rows))]
    answers = [spoken(text, job.encoder.thinking) for text in texts]
    return Sampled(step, tuple((row.messages[-2].content, row.response, answer) for row, answer in zip(examples, answers, strict=True)))


def peak_bytes(device: torch.device) -> int:
    """Most memory used so far: of the process on a CPU, of the allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
