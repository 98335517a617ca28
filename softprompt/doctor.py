"""What is wrong with a run, each finding in a sentence with its number and what to do.

`warnings` looks at a run before its first step and while it goes on. `examine` looks at what a run leaves anyway and is part of
every run's result; `softprompt doctor RUN` also measures what the prompt has to beat on the held-out rows: the bare base, the text
prompt, its own rows in reverse order, and noise.
"""

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from softprompt.artifact import StoredPrompt, load_prompt
from softprompt.card import as_trained
from softprompt.checkpoint import load_start
from softprompt.config import USUAL_RATE, Config, OptimConfig
from softprompt.distil.study import Studied, study_of
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase
from softprompt.engine.optim import relative_rate
from softprompt.engine.prompt import Prompt, no_prompt
from softprompt.errors import RunError
from softprompt.evaluation import held_out_loss, text_loss
from softprompt.events import Evaluated, Event, Step, Warned
from softprompt.locations import relocated
from softprompt.rows import Rows, load_held
from softprompt.runlog import RunFolder

LEARNED = 0.005  # share of the loss before that must be gone
STILL, FAR = 0.1, 20.0  # movement of the rows, in RMS of the base's embedding rows; a sound run moves them by 0.5 to 5
ALIKE = 0.95  # mean cosine of two rows
DEAD = 0.01  # movement of a row as a share of the furthest row's
SPIKE = 1.5  # a step's loss beside the median of all steps
CUT = 0.3  # share of the answers' tokens
SAME = 0.001  # share of the loss
GUESSED = 0.1  # how near, as a share, a loss is to that of guessing
BARE, TEXT = "bare base", "text prompt"
REVERSED, NOISE = "the same rows in reverse order", "random rows of the same size"


@dataclass(frozen=True)
class Case:
    """One prompt of a run. `learned_PD` and `start_PD`: its numbers in the same units, `unit`: what movements are relative to.
    `losses`: of its training steps; `held_out`: by step, 0 is before training; `others`: held-out loss of what it has to beat, by
    name, where that was measured; `rows` and `held`: the training and the held-out rows, where they are at hand."""

    learned_PD: Tensor
    start_PD: Tensor
    unit: float
    method: Literal["prompt", "prefix"]
    relative_lr: float
    losses: Sequence[float]
    held_out: Mapping[int, float]
    others: Mapping[str, float] = field(default_factory=dict)
    rows: Rows | None = None
    held: Rows | None = None

    @property
    def usual_rate(self) -> float:
        return USUAL_RATE[self.method]

    @property
    def movement(self) -> float:
        """RMS distance from the start, as a share of `unit`."""
        return (self.learned_PD - self.start_PD).square().mean().sqrt().item() / self.unit

    @property
    def best(self) -> float | None:
        """Lowest held-out loss after training."""
        return min((loss for step, loss in self.held_out.items() if step), default=None)


class History:
    """What a run's stream has told so far: kept while the run goes on, since reading it anew takes seconds after a million steps.
    `losses` of the steps and `held_out` losses by step: one of each for every prompt."""

    def __init__(self, num_prompts: int) -> None:
        self.losses = [array("d") for _ in range(num_prompts)]
        self.held_out: list[dict[int, float]] = [{} for _ in range(num_prompts)]
        self.warned: list[Warned] = []

    def hear(self, event: Event) -> None:
        """Takes an event in."""
        match event:
            case Step():
                for losses, loss in zip(self.losses, event.losses, strict=True):
                    losses.append(loss)
            case Evaluated():
                for held_out, loss in zip(self.held_out, event.losses, strict=True):
                    held_out[event.step] = loss
            case Warned():
                self.warned.append(event)


def history_of(run: RunFolder, num_prompts: int) -> History:
    """What lies in a run folder. Raises RunError for a damaged stream."""
    history = History(num_prompts)
    for event in run.stream():
        history.hear(event)
    return history


def same_to_the_model(rows: Rows, held: Rows | None) -> Iterator[str]:
    asked, questions = rows.num_questions
    if asked > 1 and questions < asked / 2:
        yield (
            f"{asked} different questions look like {questions} to the model: data.template leaves out what they ask; "
            "look at softprompt show, and write the row's own fields into the template"
        )


def cut_answers(rows: Rows, held: Rows | None) -> Iterator[str]:
    cut = int(rows.column("cut").sum(dtype=np.int64))  # rows are cut at their end, where the answer is
    share = cut / (cut + rows.num_supervised)
    if share > CUT:
        yield f"{share:.0%} of the answers' tokens lie beyond data.max_length and are cut away: raise data.max_length"


def unlearned_answers(rows: Rows, held: Rows | None) -> Iterator[str]:
    if rows.num_unlearned:
        yield (
            f"{rows.num_unlearned} earlier answers of conversations are read and not learned: the chat template writes them otherwise "
            "than a last one; rows with one answer each teach all of them"
        )


def unusable_rows(rows: Rows, held: Rows | None) -> Iterator[str]:
    rejected, used = len(rows.rejected), len(rows.encoded)
    if rejected > CUT * (rejected + used):
        yield f"{rejected} of {rejected + used} rows were rejected: {rows.rejected[0].reason}"


def in_both_splits(rows: Rows, held: Rows | None) -> Iterator[str]:
    known = 0 if held is None else int(np.isin(held.column("turns"), rows.column("turns")).sum())
    if known and held is not None:
        yield (
            f"{known} of {len(held.encoded)} held-out rows are training rows too: the held-out loss flatters the prompt; "
            "softprompt show names them, take them out of one of the two"
        )


def hardly_moved(case: Case) -> Iterator[str]:
    if case.movement < STILL:
        yield (
            f"the rows moved by {case.movement:.1%} of the embedding rows' RMS in {len(case.losses)} steps: "
            f"optim.relative_lr = {case.relative_lr:.2g} is too low, {case.usual_rate} is usual; or train for more steps"
        )


def ran_away(case: Case) -> Iterator[str]:
    if case.movement > FAR:
        yield (
            f"the rows are {case.movement:.0f} times the embedding rows' RMS away from their start: "
            f"optim.relative_lr = {case.relative_lr:.2g} is too high, {case.usual_rate} is usual"
        )


def spikes(case: Case) -> Iterator[str]:
    losses = np.array(case.losses)  # a million of them are looked at in milliseconds
    usual = np.partition(losses, len(losses) // 2)[len(losses) // 2]
    worst = losses[len(losses) // 10 :].max(initial=0.0)
    if worst > SPIKE * max(usual, case.losses[0]):
        yield f"the loss jumped to {worst:.3f}, its usual value is {usual:.3f}: lower optim.relative_lr = {case.relative_lr:.2g}"


def no_better_than_before(case: Case) -> Iterator[str]:
    before, best = case.held_out.get(0), case.best
    if before is not None and best is not None and best > (1 - LEARNED) * before:
        yield f"the held-out loss is {best:.4f} after training and {before:.4f} before: nothing was learned that held-out rows need"


def guesses(case: Case) -> Iterator[str]:
    """The loss of whoever knows the labels and their shares, and has not read the text: prompts rest there for a while (LOG.md)."""
    held = case.held
    labels = [] if held is None else held.column("label").tolist()
    if held is None or case.best is None or -1 in labels:
        return
    nats = -sum(math.log(count / len(labels)) * count for count in Counter(labels).values())
    loss = nats / held.num_supervised
    if loss and abs(case.best / loss - 1) < GUESSED:
        yield (
            f"the held-out loss is {case.best:.4f}, and {loss:.4f} is that of guessing among the {len(set(labels))} labels without "
            "reading the text: train for more steps (train.epochs), or with more rows"
        )


def overfitted(case: Case) -> Iterator[str]:
    last, best = case.held_out.get(max(case.held_out, default=0)), case.best
    if last is not None and best is not None and last > 1.02 * best:
        step = min((step for step in case.held_out if step), key=lambda step: case.held_out[step])
        yield (
            f"the held-out loss rose from {best:.4f} at step {step} to {last:.4f} at the end: the rows of step {step} were kept; "
            "train for fewer steps (train.patience), with more rows, or with a shorter prompt"
        )


def beaten(case: Case) -> Iterator[str]:
    for name in (BARE, TEXT):
        loss = case.others.get(name)
        if loss is not None and case.best is not None and case.best >= loss:
            reached = f"the {name} has a held-out loss of {loss:.4f}, the soft prompt {case.best:.4f}"
            yield f"{reached}: do without the soft prompt, or train it longer"


def says_nothing(case: Case) -> Iterator[str]:
    for name in (REVERSED, NOISE):
        loss = case.others.get(name)
        if len(case.learned_PD) > 1 and loss is not None and case.best is not None and loss <= (1 + SAME) * case.best:
            yield (
                f"{name} give a held-out loss of {loss:.4f}, the prompt {case.best:.4f}: what the rows say hardly matters; "
                "a shorter prompt may do as well, or nothing was learned"
            )


def alike(case: Case) -> Iterator[str]:
    if len(case.learned_PD) < 2 or case.method == "prefix":  # keys have a direction in common
        return
    cosine_PP = cosine_similarity(case.learned_PD[:, None], case.learned_PD[None], dim=-1)
    mean = ((cosine_PP.sum() - len(case.learned_PD)) / (len(case.learned_PD) * (len(case.learned_PD) - 1))).item()
    if mean > ALIKE:
        yield f"the rows have collapsed: the mean cosine of two rows is {mean:.2f}; start from text or vocab, or lower optim.relative_lr"


def dead_rows(case: Case) -> Iterator[str]:
    moved_P = (case.learned_PD - case.start_PD).square().mean(dim=1).sqrt()
    dead = int((moved_P <= DEAD * moved_P.max()).sum())
    if dead:
        yield f"{dead} of {len(moved_P)} rows hardly moved: no text looks back that far (a sliding window); shorten prompt.length"


OF_THE_DATA: tuple[Callable[[Rows, Rows | None], Iterator[str]], ...] = (
    same_to_the_model,
    cut_answers,
    unlearned_answers,
    unusable_rows,
    in_both_splits,
)
UNDERWAY: tuple[Callable[[Case], Iterator[str]], ...] = (hardly_moved, ran_away, spikes, no_better_than_before, alike)
AT_THE_END = (*UNDERWAY, guesses, overfitted, beaten, says_nothing, dead_rows)


def examine(case: Case) -> list[str]:
    """The findings, the causes before what they cause. Empty for a sound run."""
    return [*_of_the_data(case).values(), *(finding for check in AT_THE_END for finding in check(case))]


def warnings(case: Case) -> dict[str, str]:
    """What can be said before the run is over, by check: of its data before the first step, and of the training from then on."""
    if not case.losses:
        return _of_the_data(case)
    return {check.__name__: finding for check in UNDERWAY for finding in check(case)}


def _of_the_data(case: Case) -> dict[str, str]:
    if case.rows is None:
        return {}
    return {check.__name__: finding for check in OF_THE_DATA for finding in check(case.rows, case.held)}


def case_of(
    history: History,
    index: int,
    optim: OptimConfig,
    start: Prompt,
    prompt: Prompt,
    base: FrozenBase,
    rows: Rows | None,
    held: Rows | None,
) -> Case:
    """The case of a prompt, as it is now, that started as `start`: number `index` of a run."""
    return Case(
        learned_PD=prompt.learned_like(start),
        start_PD=start.learned_PD,
        unit=start.unit(base),
        method=start.method,
        relative_lr=relative_rate(optim, start.unit(base)),
        losses=history.losses[index],
        held_out=history.held_out[index],
        rows=rows,
        held=held,
    )


# ---- a finished run, with what its prompts have to beat ------------------------------------------------------------


def diagnose(run: str | Path, base: FrozenBase | None = None, overrides: Sequence[str] = ()) -> dict[str, list[str]]:
    """Findings of every prompt of a finished run, by name, with everything measured. `overrides`: of [model], for a base that was moved.
    Raises an Error for what is none.

    What the run said of its training rows before its first step still holds: they are not read again.
    """
    folder = RunFolder.reopen(Path(run))
    config = folder.config()
    base = base or load_base(as_trained(relocated(config.model, overrides), overrides))
    members, findings = config.members(), {}
    study = study_of(config, base) if config.distil.wanted else None
    history = history_of(folder, len(members))
    for index, (name, own) in enumerate(members.items()):
        stored = load_prompt(folder.prompt if len(members) == 1 else folder.prompts / name, base)
        held = load_held(config, stored.encoder) if study is None else study.held.rows
        start = load_start(folder.start, name, stored.soft)
        if start is None:
            raise RunError(f"{folder.start} is missing: without it nobody knows how far the prompt has moved; train the run again")
        case = case_of(history, index, own.optim, start, stored.soft, base, None, held)
        measured = {} if held is None else _others(base, stored, held, own, study)
        findings[name] = [*_said_before(history, name), *examine(replace(case, others=measured))]
    return findings


def _said_before(history: History, name: str) -> list[str]:
    """What the run said of its data."""
    checks = {check.__name__ for check in OF_THE_DATA}
    return [event.finding for event in history.warned if event.check in checks and name in event.prompts]


def _others(base: FrozenBase, stored: StoredPrompt, held: Rows, config: Config, study: Studied | None) -> dict[str, float]:
    prompt, budget = stored.soft, base.budget(config.train.tokens_per_batch)
    learned_PD, teacher = prompt.learned_PD, None if study is None else study.held.teacher
    noise_PD = torch.randn(learned_PD.shape, generator=torch.Generator().manual_seed(0)).to(base.device)
    rivals: dict[str, Prompt] = {
        BARE: no_prompt(base, prompt.bos_id),
        NOISE: prompt.with_learned(noise_PD * learned_PD.square().mean().sqrt()),
    }
    if prompt.method == "prompt":  # keys know their positions, whatever their order
        rivals[REVERSED] = prompt.with_learned(learned_PD.flip(0))
    losses = {name: held_out_loss(base, rival, held, budget, teacher) for name, rival in rivals.items()}
    text = config.prompt.text if teacher is None else None
    return losses if not text else {**losses, TEXT: text_loss(base, stored.encoder, held, text, budget)}
