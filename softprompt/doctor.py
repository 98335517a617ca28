"""What is wrong with a run, each finding in a sentence with its number and what to do.

`warnings` looks at a run before its first step and while it goes on. `examine` looks at what a run leaves anyway and is part of
every run's result; `softprompt doctor RUN` also measures what the prompt has to beat on the held-out rows: the bare base, the text
prompt, its own rows in reverse order, and noise.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from softprompt.artifact import load_prompt
from softprompt.config import USUAL_RATE
from softprompt.encode import Rows
from softprompt.evaluation import held_out_loss, text_loss
from softprompt.job import Entrant, Setup, prepare
from softprompt.model import FrozenBase, load_base
from softprompt.optim import relative_rate
from softprompt.prompt import DeepPrompt, SoftPrompt, no_prompt
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
    """One prompt of a run. `losses`: of its training steps; `held_out`: by step, 0 is before training; `others`: held-out loss of
    what it has to beat, by name, where that was measured; `held_rows`: the held-out rows, where there are any."""

    rows_PH: Tensor
    start_PH: Tensor
    rms: float
    rows: Rows
    relative_lr: float
    deep: bool
    losses: Sequence[float]
    held_out: Mapping[int, float]
    others: Mapping[str, float] = field(default_factory=dict)
    held_rows: Rows | None = None

    @property
    def usual_rate(self) -> float:
        return USUAL_RATE["prefix" if self.deep else "prompt"]

    @property
    def movement(self) -> float:
        """RMS distance from the start, as a share of the RMS of the base's embedding rows."""
        return (self.rows_PH - self.start_PH).square().mean().sqrt().item() / self.rms

    @property
    def best(self) -> float | None:
        """Lowest held-out loss after training."""
        return min((loss for step, loss in self.held_out.items() if step), default=None)


def examine(case: Case) -> list[str]:
    """The findings, the causes before what they cause. Empty for a sound run."""
    return [finding for check in CHECKS for finding in check(case)]


def same_to_the_model(case: Case) -> Iterator[str]:
    questions = {tuple(zip(row.ids, row.supervised, strict=True))[: row.supervised.index(True)] for row in case.rows.encoded}
    asked = {example.messages[:-1] for example in case.rows.examples}
    if len(asked) > 1 and len(questions) < len(asked) / 2:
        yield (
            f"{len(asked)} different questions look like {len(questions)} to the model: data.template leaves out what they ask; "
            "look at softprompt show, and write the row's own fields into the template"
        )


def cut_answers(case: Case) -> Iterator[str]:
    cut = sum(row.num_cut for row in case.rows.encoded)  # rows are cut at their end, where the answer is
    share = cut / (cut + case.rows.num_supervised)
    if share > CUT:
        yield f"{share:.0%} of the answers' tokens lie beyond data.max_length and are cut away: raise data.max_length"


def unusable_rows(case: Case) -> Iterator[str]:
    rejected, used = len(case.rows.rejected), len(case.rows.encoded)
    if rejected > CUT * (rejected + used):
        yield f"{rejected} of {rejected + used} rows were rejected: {case.rows.rejected[0].reason}"


def in_both_splits(case: Case) -> Iterator[str]:
    trained, held = {example.turns for example in case.rows.examples}, case.held_rows.examples if case.held_rows else ()
    known = sum(example.turns in trained for example in held)
    if known:
        yield (
            f"{known} of {len(held)} held-out rows are training rows too: the held-out loss flatters the prompt; "
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
    usual = sorted(case.losses)[len(case.losses) // 2]
    late = case.losses[len(case.losses) // 10 :]
    worst = max(late, default=0.0)
    if worst > SPIKE * max(usual, case.losses[0]):
        yield f"the loss jumped to {worst:.3f}, its usual value is {usual:.3f}: lower optim.relative_lr = {case.relative_lr:.2g}"


def no_better_than_before(case: Case) -> Iterator[str]:
    before, best = case.held_out.get(0), case.best
    if before is not None and best is not None and best > (1 - LEARNED) * before:
        yield f"the held-out loss is {best:.4f} after training and {before:.4f} before: nothing was learned that held-out rows need"


def guesses(case: Case) -> Iterator[str]:
    """The loss of whoever knows the labels and their shares, and has not read the text: prompts rest there for a while (LOG.md)."""
    held = case.held_rows
    labels = [example.label for example in held.examples] if held else []
    if held is None or case.best is None or None in labels:
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
        if len(case.rows_PH) > 1 and loss is not None and case.best is not None and loss <= (1 + SAME) * case.best:
            yield (
                f"{name} give a held-out loss of {loss:.4f}, the prompt {case.best:.4f}: what the rows say hardly matters; "
                "a shorter prompt may do as well, or nothing was learned"
            )


def alike(case: Case) -> Iterator[str]:
    if len(case.rows_PH) < 2 or case.deep:  # keys have a direction in common
        return
    cosine_PP = cosine_similarity(case.rows_PH[:, None], case.rows_PH[None], dim=-1)
    mean = ((cosine_PP.sum() - len(case.rows_PH)) / (len(case.rows_PH) * (len(case.rows_PH) - 1))).item()
    if mean > ALIKE:
        yield f"the rows have collapsed: the mean cosine of two rows is {mean:.2f}; start from text or vocab, or lower optim.relative_lr"


def dead_rows(case: Case) -> Iterator[str]:
    moved_P = (case.rows_PH - case.start_PH).square().mean(dim=1).sqrt()
    dead = int((moved_P <= DEAD * moved_P.max()).sum())
    if dead:
        yield f"{dead} of {len(moved_P)} rows hardly moved: no text looks back that far (a sliding window); shorten prompt.length"


Check = Callable[[Case], Iterator[str]]
OF_THE_DATA: tuple[Check, ...] = (same_to_the_model, cut_answers, unusable_rows, in_both_splits)
UNDERWAY: tuple[Check, ...] = (hardly_moved, ran_away, spikes, no_better_than_before, alike)
CHECKS: tuple[Check, ...] = (*OF_THE_DATA, *UNDERWAY, guesses, overfitted, beaten, says_nothing, dead_rows)


def warnings(case: Case) -> dict[str, str]:
    """What can be said before the run is over, by check: of its data before the first step, and of the training from then on."""
    checks = UNDERWAY if case.losses else OF_THE_DATA
    return {check.__name__: finding for check in checks for finding in check(case)}


# ---- a finished run, with what its prompts have to beat ------------------------------------------------------------


def diagnose(run: str | Path, base: FrozenBase | None = None) -> dict[str, list[str]]:
    """Findings of every prompt of a finished run, by name, with everything measured. Raises an Error for what is none."""
    folder = RunFolder.reopen(Path(run))
    config = folder.config()
    setup = prepare(config, base or load_base(config.model))
    events, findings = folder.events(), {}
    for index, (name, entrant) in enumerate(setup.entrants.items()):
        prompt = load_prompt(folder.prompt if len(setup.entrants) == 1 else folder.prompts / name, setup.base)
        case = case_of(events, index, entrant, setup, prompt.soft.rows_like(entrant.start))
        findings[name] = examine(replace(case, others=_others(setup, prompt.soft, entrant.config.prompt.text)))
    return findings


def case_of(events: Sequence[Mapping[str, Any]], index: int, entrant: Entrant, setup: Setup, rows_PH: Tensor) -> Case:
    """The case of a run's prompt number `index`, from the run's log."""
    rms = entrant.start.rms(setup.base)
    return Case(
        rows_PH=rows_PH,
        start_PH=entrant.start.rows_PH,
        rms=rms,
        rows=setup.rows,
        relative_lr=relative_rate(entrant.config.optim, rms),
        deep=isinstance(entrant.start, DeepPrompt),
        losses=[event["losses"][index] for event in events if event["event"] == "step"],
        held_out={event["step"]: event["losses"][index] for event in events if event["event"] == "evaluated"},
        held_rows=setup.held,
    )


def _others(setup: Setup, soft: SoftPrompt, text: str | None) -> dict[str, float]:
    base, held, budget = setup.base, setup.held, setup.engine.tokens_per_batch
    if held is None:
        return {}
    noise_PH = torch.randn(soft.rows_PH.shape, generator=torch.Generator().manual_seed(0)).to(base.device)
    rivals = {
        BARE: no_prompt(base, soft.bos_id),
        NOISE: replace(soft, rows_PH=noise_PH * soft.rows_PH.square().mean().sqrt()),
    }
    if not isinstance(soft, DeepPrompt):  # keys know their positions, whatever their order
        rivals[REVERSED] = replace(soft, rows_PH=soft.rows_PH.flip(0))
    losses = {name: held_out_loss(base, rival, held, budget) for name, rival in rivals.items()}
    return losses if not text else {**losses, TEXT: text_loss(base, setup.encoder, held, text, budget)}
