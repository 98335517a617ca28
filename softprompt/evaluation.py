"""Prompts against what needs no training, on the same rows: the bare base, a text prompt, a few examples in the context.

Every score has an interval, and every pair of contestants a verdict, from the same bootstrap samples of rows.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from softprompt.answers import Answer, answer, limit_of, reference, stops_of
from softprompt.artifact import StoredPrompt
from softprompt.atomic import write_text
from softprompt.contestants import SHOT_TOKENS, Contestant, Reading, all_contestants, choose_shots, competing, read_rows
from softprompt.data import Example, Loaded
from softprompt.data.examples import fields_text, turns_text
from softprompt.distil.context import Context
from softprompt.distil.rivals import CONTROL, TEACHER, controlled, rivals, teacher_of
from softprompt.encode import Encoder
from softprompt.engine.likelihood import Candidates, ensemble_losses, row_losses
from softprompt.engine.model import FrozenBase
from softprompt.engine.prefix import Prefix
from softprompt.engine.prompt import Prompt, no_prompt, read_together
from softprompt.engine.teacher import Teacher, Teaching, likeness
from softprompt.engine.tokens import Encoded
from softprompt.engine.world import World
from softprompt.errors import ConfigError, DataError
from softprompt.formats import EVALUATION
from softprompt.metrics import (
    Metric,
    Table,
    bootstrap_weights,
    estimate,
    metric_named,
    suiting,
    verdict,
)
from softprompt.predictions import Predictions
from softprompt.results import Evaluation, Result
from softprompt.rows import Rows, encode_rows

TOGETHER = 256  # answers of a process that are kept at once, where several share them: what a kill may cost


@dataclass(frozen=True)
class Contest:
    """Who competes with the prompts, and in what. `text`: a text prompt, instead of the first prompt's init text. `train`: rows to
    take examples from. `metrics`: names, instead of those that suit the rows. `answers`: generate as well. `context`: what the prompts
    were distilled of; its teacher competes, and what is as short as they are."""

    text: str | None = None
    train: Loaded | None = None
    ensemble: bool = False
    adapters: tuple[Path, ...] = ()
    metrics: tuple[str, ...] = ()
    answers: bool = False
    max_new_tokens: int | None = None
    context: Context | None = None


@dataclass(frozen=True)
class Advanced:
    """`done` of `total` rows of what is being done: "scoring" or "answering"."""

    doing: str
    done: int
    total: int


def evaluate(
    base: FrozenBase,
    prompts: StoredPrompt | Sequence[tuple[str, StoredPrompt]],
    loaded: Loaded,
    contest: Contest = Contest(),
    *,
    out: Path | None = None,
    tokens_per_batch: int | None = None,
) -> Evaluation:
    """Compares one prompt, or several with their names, with what they must beat. Raises what `evaluating` raises."""
    for event in evaluating(base, prompts, loaded, contest, out=out, tokens_per_batch=tokens_per_batch):
        if isinstance(event, Evaluation):
            return event
    raise AssertionError("an evaluation ends with its result")


@dataclass
class _Work:
    """What an evaluation works with."""

    base: FrozenBase
    line: list[Contestant]
    rows: Rows
    references: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: list[Metric]
    budget: int
    max_length: int
    limit: int | None
    stops: tuple[str, ...]
    readings: dict[str, list[Reading]] = field(default_factory=dict)
    plain: dict[tuple[str | None, ...], list[list[Encoded]]] = field(default_factory=dict)  # by template, date and system turn
    teacher: Teacher | None = None
    world: World = field(default_factory=World)

    @cached_property
    def examples(self) -> list[list[Example]]:
        """Every row, then the row with each of the label words as its response."""
        return [[example, *(example.answered(label) for label in self.labels)] for example in self.rows.examples]

    def read(self, encoder: Encoder) -> list[list[Encoded]]:
        """These as the bare base reads them, encoded once; only the rows themselves are cut, never a label word."""
        key = encoder.template.name, encoder.template.date, encoder.system
        if key not in self.plain:
            self.plain[key] = [
                [encoder.encode(own, self.max_length), *(encoder.encode(other) for other in others)] for own, *others in self.examples
            ]
        return self.plain[key]


@torch.no_grad()
def evaluating(
    base: FrozenBase,
    prompts: StoredPrompt | Sequence[tuple[str, StoredPrompt]],
    loaded: Loaded,
    contest: Contest = Contest(),
    *,
    out: Path | None = None,
    tokens_per_batch: int | None = None,
    world: World = World(),
) -> Iterator[Advanced | Evaluation]:
    """Like `evaluate`, with its progress. `out`: where the evaluation gets a folder of its own, with predictions.jsonl and
    evaluation.json; the same evaluation goes on with what lies there. The processes of `world` share the rows; the first one writes.

    Raises DataError when no row can be used, ConfigError for a metric that does not fit, ArtifactError for an adapter that does
    not, RunError when `out` cannot be written.
    """
    named = [("prompt", prompts)] if isinstance(prompts, StoredPrompt) else list(prompts)
    work = replace(_prepare(base, named, loaded, contest, min(world.gathered(base.budget(tokens_per_batch, world.beside)))), world=world)
    key = _key(work, named)
    folder = out / key[:8] if out else None
    predictions = Predictions(folder / "predictions.jsonl" if folder and work.limit else None, key, world)
    tables: dict[str, Table] = {}
    if contest.context is not None:
        (taught,) = (one for one in work.line if one.name == TEACHER)
        work.readings[TEACHER] = _read(work, taught)
        encoder = taught.members[0].encoder
        plain = zip(work.rows.examples, work.read(encoder), strict=True)
        sure = [taught.as_text(encoder, example, row)[1] for example, (row, *_) in plain]
        work.teacher = teacher_of(work.readings[TEACHER][0], sure)
    for contestant in work.line:
        yield Advanced("scoring", len(tables), len(work.line))
        with competing(base, contestant) as own:
            work.readings[contestant.name] = _read(work, contestant)
            tables[contestant.name] = _beside_teacher(work, own, contestant, _likelihoods(work, own, contestant.name))
            if contestant.adapter is not None and work.limit:
                yield from _answers(work, own, [contestant.name], predictions)
    if work.limit:
        yield from _answers(work, base, [one.name for one in work.line if one.adapter is None], predictions)
    evaluation = replace(_conclude(work, tables, predictions), folder=folder)
    if folder and world.first:
        folder.mkdir(parents=True, exist_ok=True)
        stored = {"format": EVALUATION, **evaluation.as_dict()}
        write_text(folder / "evaluation.json", json.dumps(stored, indent=2, ensure_ascii=False) + "\n")
    yield evaluation


def _prepare(base: FrozenBase, named: Sequence[tuple[str, StoredPrompt]], loaded: Loaded, contest: Contest, tokens_per_batch: int) -> _Work:
    first = named[0][1]
    rows = encode_rows(first.encoder, loaded, first.card.max_length)
    if not rows.encoded:
        raise DataError(f"no usable row: {rows.rejected[0].source}: {rows.rejected[0].reason}")
    labels = tuple(dict.fromkeys(first.card.data.labels + rows.labels)) if rows.labels else ()
    if first.card.data.labels and not labels:
        words = ", ".join(first.card.data.labels[:5])
        raise DataError(f"the rows have no labels, the prompt was trained on rows with a text and a label ({words}): evaluate it on such")
    references = tuple(reference(first.encoder, example) for example in rows.examples)
    names = contest.metrics or suiting(references, bool(labels), contest.answers, taught=contest.context is not None)
    metrics = [metric_named(name) for name in names]
    for metric in metrics:
        if metric.needs == "label_losses" and not labels:
            raise ConfigError(f"{metric.name} needs rows with a text and a label, these have none")
    limit = None
    if contest.answers or any(metric.needs == "answers" for metric in metrics):
        limit = contest.max_new_tokens or limit_of(rows.encoded)
    shots: tuple[Example, ...] = ()
    if contest.train is not None:
        longest_row = max(len(row) for row in rows.encoded) + (limit or 0) + 1
        room = min(SHOT_TOKENS, (base.context_length or SHOT_TOKENS + longest_row) - longest_row)
        shots = choose_shots(first.encoder, contest.train.examples, rows.examples, room)
    text = contest.text if contest.text is not None else first.card.text
    line = all_contestants(base, named, text=text, shots=shots, ensemble=contest.ensemble, adapters=contest.adapters)
    if contest.context is not None:
        line[1:1] = rivals(base, first.encoder, contest.context, first.soft.length)
    if len({one.name for one in line}) < len(line):
        raise ConfigError("two contestants have the same name: rename a folder")
    stops = stops_of([prompt.encoder for _, prompt in named], rows.examples)
    return _Work(base, line, rows, references, labels, metrics, tokens_per_batch, first.card.max_length, limit, stops)


def _key(work: _Work, named: Sequence[tuple[str, StoredPrompt]]) -> str:
    """What makes an evaluation the same as another, as sha256: all that its scores depend on, by content."""
    base = work.base
    digest = hashlib.sha256(
        f"{base.fingerprint} {base.dtype} {getattr(base.model, 'is_quantized', False)} {work.rows.fingerprint} "
        f"{work.limit} {work.stops} {[metric.name for metric in work.metrics]}".encode()
    )
    for name, prompt in named:
        template, system = prompt.encoder.template, prompt.encoder.system
        digest.update(
            f"{name} {template.name} {template.date} {system}".encode() + prompt.soft.stored(base).float().cpu().numpy().tobytes()
        )
    for one in work.line:
        shots = [(turns_text(shot), fields_text(shot)) for shot in one.shots]  # wherever they lie
        digest.update(repr((one.name, one.wish, shots)).encode())
        for file in sorted(one.adapter.iterdir()) if one.adapter else ():
            if file.suffix in (".json", ".safetensors", ".bin"):
                digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _read(work: _Work, contestant: Contestant) -> list[Reading]:
    encoders = [prompt.encoder for prompt in contestant.members]
    if contestant.name == CONTROL:
        return [controlled(work.base, work.readings[TEACHER][0])]
    return [read_rows(contestant, index, work.examples, work.read(encoder)) for index, encoder in enumerate(encoders)]


def _likelihoods(work: _Work, base: FrozenBase, name: str) -> Table:
    """The losses of a contestant; an ensemble's are of what its members agree on."""
    readings = work.readings[name]
    members = [_member(base, reading) for reading in readings]
    losses_RC = ensemble_losses(base, members, work.budget, work.world).numpy()
    rows = [own[0] for own in readings[0].rows]
    num_bytes = np.array([_num_bytes(base.tokenizer, row) for row in rows], float)
    tokens = np.array([row.num_supervised for row in rows], float)
    table = Table(work.references, losses=losses_RC[:, 0], tokens=tokens, num_bytes=num_bytes, labels=work.labels)
    if not work.labels:
        return table
    truth = np.array([work.labels.index(str(example.label)) for example in work.rows.examples])
    return replace(table, truth=truth, label_losses=losses_RC[:, 1:])


def _beside_teacher(work: _Work, base: FrozenBase, contestant: Contestant, table: Table) -> Table:
    """The table with how far the contestant is from the teacher, where there is one and the contestant is a prompt or a text."""
    if work.teacher is None or len(contestant.members) > 1 or contestant.adapter is not None:
        return table
    (reading,) = work.readings[contestant.name]
    found = likeness(base, work.teacher, reading.soft, [own[0] for own in reading.rows], work.budget, work.world)
    return replace(table, divergences=found.divergences_R.numpy(), same_first=found.same_first_R.numpy(), judged=found.tokens_R.numpy())


def _member(base: FrozenBase, reading: Reading) -> tuple[Prefix, Candidates]:
    """What the rows of a reading continue from, and the rest of each."""
    prefix, rests = read_together(base, [reading.soft], [candidate for own in reading.rows for candidate in own])
    rest = iter(rests)
    return prefix, [[next(rest) for _ in own] for own in reading.rows]


def _num_bytes(tokenizer: Any, row: Encoded) -> int:
    ids = [token for token, on in zip(row.ids, row.supervised, strict=True) if on]
    return len(tokenizer.decode(ids, skip_special_tokens=True).encode())


def _answers(work: _Work, base: FrozenBase, names: Sequence[str], predictions: Predictions) -> Iterator[Advanced]:
    wanted = [(name, row) for name in names for row in range(len(work.rows.examples))]
    missing = [pair for pair in wanted if pair not in predictions.answers]
    yield Advanced("answering", len(wanted) - len(missing), len(wanted))
    assert work.limit is not None
    for done, said in enumerate(_said(work, base, missing), 1):
        example, row = work.rows.examples[said["row"]], said["row"]
        question = example.messages[-2].content
        predictions.add({**said, "source": example.source, "question": question, "reference": work.references[row]})
        yield Advanced("answering", len(wanted) - len(missing) + done, len(wanted))


def _said(work: _Work, base: FrozenBase, missing: Sequence[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """The answers to (contestant, row), as they come; of several processes, TOGETHER of each at a time."""
    assert work.limit is not None
    size = work.world.size
    said = partial(answer, base, work.readings, limit=work.limit, stops=work.stops)
    if size == 1:
        yield from map(asdict, said(missing))
        return
    for start in range(0, len(missing), TOGETHER * size):
        parts = [missing[start : start + TOGETHER * size][rank::size] for rank in range(size)]
        for own in work.world.each(size, partial(_all, said, parts)):
            yield from own


def _all(
    said: Callable[[Sequence[tuple[str, int]]], Iterator[Answer]], parts: Sequence[Sequence[tuple[str, int]]], rank: int
) -> list[dict[str, Any]]:
    return [asdict(one) for one in said(parts[rank])]


def _conclude(work: _Work, tables: dict[str, Table], predictions: Predictions) -> Evaluation:
    num_rows = len(work.rows.examples)
    weights_RN = bootstrap_weights(num_rows)
    results = {}
    shots = {one.name: len(one.shots) for one in work.line}
    for name, table in tables.items():
        unended = None
        if work.limit:
            said = [predictions.answers[name, row] for row in range(num_rows)]
            table, unended = replace(table, answers=tuple(one["text"] for one in said)), sum(not one["ended"] for one in said)
        measured = [metric for metric in work.metrics if getattr(table, metric.needs) is not None]
        scores = {metric.name: estimate(metric, table, weights_RN) for metric in measured}
        tokens = sum(reading.tokens for reading in work.readings[name])
        milliseconds = None if work.teacher is None else sum(_milliseconds(work.base, reading) for reading in work.readings[name])
        results[name] = Result(scores, tokens, table, shots[name], unended, milliseconds)
    by = _deciding(work.metrics)
    rivals = [name for name, result in results.items() if by.name in result.scores]
    estimates = {name: results[name].scores[by.name] for name in rivals}
    verdicts = [verdict(by, (second, first), estimates, num_rows) for first, second in combinations(rivals, 2)]
    questions = tuple(example.messages[-2].content for example in work.rows.examples)
    counts = num_rows, work.rows.num_supervised, len(work.rows.rejected)
    evaluation = Evaluation(results, verdicts, by.name, *counts, work.labels, questions)
    return evaluation if work.teacher is None else replace(evaluation, lost=_lost(results, work.line))


def _milliseconds(base: FrozenBase, reading: Reading) -> float:
    """What it takes to read what stands before every row; the median of three times."""
    soft, ids = reading.context

    def once() -> float:
        began = time.perf_counter()
        soft.prefix(base, ids)
        return 1000 * (time.perf_counter() - began)

    return median(once() for _ in range(3))


def _lost(results: dict[str, Result], line: Sequence[Contestant]) -> dict[str, tuple[str, ...]]:
    """Of every prompt the scores outside of the teacher's interval, on the worse side: of answers and labels, where there are any."""
    teacher = results[TEACHER].scores
    measured = [one for one in map(metric_named, teacher) if one.needs != "divergences"]
    told = [one for one in measured if one.needs != "losses"] or measured

    def worse(name: str) -> tuple[str, ...]:
        own = results[name].scores
        lost = {
            metric.name: own[metric.name].value < teacher[metric.name].low
            if metric.higher_is_better
            else own[metric.name].value > teacher[metric.name].high
            for metric in told
            if metric.name in own
        }
        return tuple(metric for metric, below in lost.items() if below)

    return {one.name: worse(one.name) for one in line if one.trained and one.adapter is None and one.name != CONTROL}


def _deciding(metrics: Sequence[Metric]) -> Metric:
    """What verdicts go by: how often labels are right, else the first metric of answers, else the first of all."""
    kinds = ("label_losses", "answers", "divergences", "losses")
    return next(metric for kind in kinds for metric in metrics if metric.needs == kind)


# ---- losses alone --------------------------------------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(
    base: FrozenBase, soft: Prompt, rows: Rows, tokens_per_batch: int, teacher: Teaching | None = None, world: World = World()
) -> float:
    """Mean loss per supervised token over all rows, which the processes share: the cross-entropy, or the divergence from a teacher that
    reads the same rows."""
    if teacher is not None:
        return likeness(base, teacher, soft, rows.encoded, tokens_per_batch, world).divergence
    return _mean(base, soft, rows.encoded, tokens_per_batch, world)


@torch.no_grad()
def text_loss(base: FrozenBase, encoder: Encoder, rows: Rows, text: str, tokens_per_batch: int) -> float:
    """Mean loss per supervised token of the bare base that is told `text`."""
    told = Contestant("text", (), wish=text)
    encoded = [told.full(encoder, example, row) for example, row in zip(rows.examples, rows.encoded, strict=True)]
    return _mean(base, no_prompt(base, encoder.bos_id), encoded, tokens_per_batch)


def _mean(base: FrozenBase, soft: Prompt, rows: Sequence[Encoded], tokens_per_batch: int, world: World = World()) -> float:
    sums = row_losses(base, *read_together(base, [soft], rows), tokens_per_batch, world=world)
    return sums.sum().item() / sum(row.num_supervised for row in rows)
