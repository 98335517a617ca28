"""Pure scores of what a contestant said, each a function of weighted rows, and what the difference of two of them can tell.

A weight is how often a row counts, so a bootstrap sample is a row of weights, the same for every contestant.

Shapes: N rows, L labels, R bootstrap samples.
"""

import importlib
import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from softprompt.errors import ConfigError
from softprompt.extras import has, install_line, need

Numbers = NDArray[np.float64]
SAMPLES, TAIL, ENOUGH_ROWS = 1000, 2.5, 20  # bootstrap samples; per cent on either side of an interval; rows that a verdict needs
BINS = 10  # of confidence, for the calibration


@dataclass(frozen=True)
class Table:
    """What one contestant made of the rows. `losses` summed over a row's `tokens`, `num_bytes` of the text that they stand for.
    `label_losses` [N, L] and `truth` [N] for labelled rows; `answers` where they were generated. Beside a teacher: `divergences` from it,
    summed over the tokens of a row that it judges, how many of these have the same likeliest token as its own, `same_first`, and how many
    there are, `judged`."""

    references: tuple[str, ...]
    losses: Numbers | None = None
    tokens: Numbers | None = None
    num_bytes: Numbers | None = None
    labels: tuple[str, ...] = ()
    truth: NDArray[np.int64] | None = None
    label_losses: Numbers | None = None
    answers: tuple[str, ...] | None = None
    divergences: Numbers | None = None
    same_first: Numbers | None = None
    judged: Numbers | None = None

    @cached_property
    def chosen(self) -> NDArray[np.int64]:
        """[N] the likeliest label of every row."""
        assert self.label_losses is not None
        return self.label_losses.argmin(axis=1)

    @cached_property
    def probabilities(self) -> Numbers:
        """[N, L] of the labels, from their likelihoods."""
        assert self.label_losses is not None
        shares = np.exp(self.label_losses.min(axis=1, keepdims=True) - self.label_losses)
        return shares / shares.sum(axis=1, keepdims=True)


Score = Callable[[Numbers], float]  # of weights [N]


@dataclass(frozen=True)
class Metric:
    """`of` prepares a table once and returns the score of weighted rows. `needs`: what the table must hold. `package`: see extras."""

    name: str
    needs: Literal["losses", "label_losses", "answers", "divergences"]
    of: Callable[[Table], Score]
    higher_is_better: bool = True
    percent: bool = False
    package: str | None = None


def _mean_of(values: Sequence[float] | Numbers) -> Score:
    array = np.asarray(values, dtype=np.float64)
    return lambda weights: float(weights @ array / weights.sum())


def _per_token(sums: Numbers | None, tokens: Numbers | None) -> Score:
    assert sums is not None
    assert tokens is not None
    return lambda weights: float(weights @ sums / (weights @ tokens))


def _loss(table: Table) -> Score:
    return _per_token(table.losses, table.tokens)


def _divergence(table: Table) -> Score:
    return _per_token(table.divergences, table.judged)


def _same_first(table: Table) -> Score:
    return _per_token(table.same_first, table.judged)


def _perplexity(table: Table) -> Score:
    loss = _loss(table)
    return lambda weights: math.exp(min(700.0, loss(weights)))


def _bits_per_byte(table: Table) -> Score:
    losses, num_bytes = table.losses, table.num_bytes
    assert losses is not None
    assert num_bytes is not None
    return lambda weights: float(weights @ losses) / (math.log(2) * max(1.0, float(weights @ num_bytes)))


def _accuracy(table: Table) -> Score:
    return _mean_of(table.chosen == table.truth)


def _macro_f1(table: Table) -> Score:
    """The mean over labels of F1, which is 0 where a label is neither in the rows nor chosen."""

    def score(weights: Numbers) -> float:
        counts_LL = _counted(table, weights)
        both = counts_LL.sum(axis=0) + counts_LL.sum(axis=1)
        return float(np.divide(2 * counts_LL.diagonal(), both, out=np.zeros_like(both), where=both > 0).mean())

    return score


def _binned(table: Table) -> tuple[Numbers, NDArray[np.bool_], NDArray[np.int64]]:
    """[N] each: how sure the chosen label was, whether it was right, its bin of confidence."""
    confidence = table.probabilities.max(axis=1)
    return confidence, table.chosen == table.truth, np.minimum((confidence * BINS).astype(int), BINS - 1)


def _calibration_error(table: Table) -> Score:
    """Expected calibration error (Guo et al. 2017): how far confidence and accuracy lie apart, in BINS bins of confidence."""
    confidence, right, bins_N = _binned(table)

    def score(weights: Numbers) -> float:
        gaps = np.bincount(bins_N, weights=weights * (confidence - right), minlength=BINS)
        return float(np.abs(gaps).sum() / weights.sum())

    return score


def reliability(table: Table) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, rows) of every bin of confidence that holds rows."""
    confidence, right, bins_N = _binned(table)
    held = [bins_N == number for number in range(BINS)]
    return [(float(confidence[own].mean()), float(right[own].mean()), int(own.sum())) for own in held if own.any()]


def confusion(table: Table) -> list[list[int]]:
    """[L][L] rows by their own label (first) and the label chosen."""
    assert table.truth is not None
    return _counted(table, np.ones(len(table.truth))).astype(int).tolist()


def _counted(table: Table, weights: Numbers) -> Numbers:
    """[L, L] the weight of the rows of every own label (first) and label chosen."""
    assert table.truth is not None
    num_labels = len(table.labels)
    counts = np.bincount(table.truth * num_labels + table.chosen, weights, num_labels**2).astype(np.float64)
    return counts.reshape(num_labels, num_labels)


# ---- of generated answers ------------------------------------------------------------------------------------------


def by_row(compare: Callable[[str, str], float]) -> Callable[[Table], Score]:
    """The mean over rows of a comparison of answer and reference."""

    def of(table: Table) -> Score:
        assert table.answers is not None
        return _mean_of([float(compare(answer, wanted)) for answer, wanted in zip(table.answers, table.references, strict=True)])

    return of


def exact(answer: str, wanted: str) -> float:
    return float(answer.strip() == wanted.strip())


def read_json(text: str) -> Any:
    """The value, or None for what is no JSON (as for null: an answer of null has no fields)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def json_valid(answer: str, wanted: str) -> float:
    """Whether the answer is an object or an array; a lone number or word in quotes is JSON too, but no record of anything."""
    return float(isinstance(read_json(answer), dict | list))


def json_fields(answer: str, wanted: str) -> float:
    """Share of the fields of both objects that are in both with the same value."""
    said, right = read_json(answer), read_json(wanted)
    if not isinstance(said, dict) or not isinstance(right, dict):
        return float(said is not None and said == right)
    names = said.keys() | right.keys()
    missing = object()
    return sum(said.get(name, missing) == right.get(name, missing) for name in names) / max(1, len(names))


def chrf(answer: str, wanted: str) -> float:
    import sacrebleu

    return sacrebleu.sentence_chrf(answer, [wanted]).score / 100


CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


class _Words:
    """Words by spaces and punctuation; every Chinese, Japanese or Korean character is one (rouge-score itself drops them)."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(rf"{CJK.pattern}|[^\W_]+", CJK.sub(lambda found: f" {found[0]} ", text.lower()))


def rouge_l(answer: str, wanted: str) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words()).score(wanted, answer)["rougeL"].fmeasure


def _bleu(table: Table) -> Score:
    """Corpus BLEU; Chinese by characters, other text by sacrebleu's 13a."""
    import sacrebleu

    assert table.answers is not None
    chinese = any(CJK.search(text) for text in table.references)
    counter = sacrebleu.BLEU(tokenize="zh" if chinese else "13a", effective_order=True)
    counted = [counter.sentence_score(answer, [wanted]) for answer, wanted in zip(table.answers, table.references, strict=True)]
    counts = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in counted], dtype=np.float64)

    def score(weights: Numbers) -> float:
        *ngrams, said, wanted = (weights @ counts).tolist()
        half = len(ngrams) // 2
        whole = sacrebleu.BLEU.compute_bleu(
            correct=[int(n) for n in ngrams[:half]], total=[int(n) for n in ngrams[half:]], sys_len=int(said), ref_len=int(wanted)
        )
        return whole.score / 100

    return score


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("loss", "losses", _loss, higher_is_better=False),
        Metric("perplexity", "losses", _perplexity, higher_is_better=False),
        Metric("bits_per_byte", "losses", _bits_per_byte, higher_is_better=False),
        Metric("divergence", "divergences", _divergence, higher_is_better=False),
        Metric("same_first", "divergences", _same_first, percent=True),
        Metric("accuracy", "label_losses", _accuracy, percent=True),
        Metric("macro_f1", "label_losses", _macro_f1, percent=True),
        Metric("calibration_error", "label_losses", _calibration_error, higher_is_better=False, percent=True),
        Metric("exact_match", "answers", by_row(exact), percent=True),
        Metric("json_valid", "answers", by_row(json_valid), percent=True),
        Metric("json_fields", "answers", by_row(json_fields), percent=True),
        Metric("chrf", "answers", by_row(chrf), percent=True, package="sacrebleu"),
        Metric("bleu", "answers", _bleu, percent=True, package="sacrebleu"),
        Metric("rouge_l", "answers", by_row(rouge_l), percent=True, package="rouge_score"),
    )
}
LIKELIHOOD = ("loss", "perplexity", "bits_per_byte")
TAUGHT = ("divergence", "same_first")
LABELS = ("accuracy", "macro_f1", "calibration_error")


def suiting(references: Sequence[str], labelled: bool, generates: bool, *, taught: bool = False) -> tuple[str, ...]:
    """The metrics that the rows' shape asks for: of labels, of JSON, else of text; `taught`: beside a teacher. Those that are not installed
    are said and left out."""
    said: tuple[str, ...] = ("exact_match",) if labelled else ("chrf", "bleu", "rouge_l", "exact_match")
    if all(isinstance(read_json(text), dict) for text in references):
        said = ("exact_match", "json_valid", "json_fields")
    suit = (*LIKELIHOOD, *(TAUGHT if taught else ()), *(LABELS if labelled else ()), *(said if generates else ()))
    absent = {name: package for name in suit if (package := METRICS[name].package) and not has(package)}
    if absent:
        lines = " ".join(dict.fromkeys(map(install_line, absent.values())))
        logging.getLogger(__name__).warning("not measured: %s: %s", ", ".join(absent), lines)
    return tuple(name for name in suit if name not in absent)


def metric_named(name: str) -> Metric:
    """A metric by its name, or `module:function`, a function of (answer, reference) to a number. Raises ConfigError, MissingPackage."""
    if name in METRICS:
        metric = METRICS[name]
        if metric.package:
            need(metric.package, f"the metric {name}")
        return metric
    module, colon, function = name.partition(":")
    if not colon:
        raise ConfigError(f"no metric is called {name!r}: there are {', '.join(METRICS)}, and module:function of your own")
    try:
        compare = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the metric {name} cannot be loaded: {error}") from None
    return Metric(name, "answers", by_row(compare))


# ---- what differences can tell -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A score with its 95% bootstrap interval."""

    value: float
    low: float
    high: float
    samples: Numbers


@dataclass(frozen=True)
class Verdict:
    """`first` against `second` by one metric. `difference` = first - second, with its 95% interval from paired bootstrap samples.
    `rows_needed`: how many rows such a difference would take, where these cannot tell."""

    metric: str
    first: str
    second: str
    outcome: Literal["better", "worse", "cannot tell"]
    difference: float
    low: float
    high: float
    num_rows: int
    rows_needed: int | None


def bootstrap_weights(num_rows: int) -> Numbers:
    """[R, N]: how often each row is drawn in each sample; always the same for a number of rows."""
    generator = np.random.default_rng(0)
    return generator.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=SAMPLES).astype(np.float64)


def estimate(metric: Metric, table: Table, weights_RN: Numbers) -> Estimate:
    """The score on all rows and on every bootstrap sample."""
    score = metric.of(table)
    samples = np.array([score(weights) for weights in weights_RN])
    low, high = np.percentile(samples, [TAIL, 100 - TAIL])
    return Estimate(score(np.ones(weights_RN.shape[1])), float(low), float(high), samples)


def verdict(metric: Metric, names: tuple[str, str], estimates: Mapping[str, Estimate], num_rows: int) -> Verdict:
    """Whether the first of two contestants is better; they must come from the same bootstrap samples."""
    first, second = (estimates[name] for name in names)
    difference = first.value - second.value
    low, high = (float(end) for end in np.percentile(first.samples - second.samples, [TAIL, 100 - TAIL]))
    if num_rows < ENOUGH_ROWS or low <= 0 <= high:
        needed = math.ceil(num_rows * ((high - low) / 2 / difference) ** 2) if difference else None
        needed = None if needed is None else max(needed, num_rows + 1, ENOUGH_ROWS)
        return Verdict(metric.name, *names, "cannot tell", difference, low, high, num_rows, needed)
    better = (difference > 0) == metric.higher_is_better
    return Verdict(metric.name, *names, "better" if better else "worse", difference, low, high, num_rows, None)


# ---- in words ------------------------------------------------------------------------------------------------------


UNTRAINED = ("text", "few-shot", "teacher", "control", "beginning", "fewer", "summary")  # contestants that verdicts are not about


def called(name: str, num_shots: int = 0) -> str:
    """A contestant's name for people."""
    known = {
        "base": "bare base",
        "text": "text prompt",
        "prompt": "soft prompt",
        "few-shot": f"{num_shots} examples",
        "beginning": "first tokens",
        "fewer": f"{num_shots} examples",
    }
    return known.get(name, name)


def percent(metric: str) -> bool:
    """Whether a metric is a share, shown in per cent."""
    return metric in METRICS and METRICS[metric].percent


def sentence(one: Verdict, names: Sequence[str], values: Sequence[float]) -> str:
    """A verdict in words, from the names for people and the scores of its two sides."""
    first, second = names
    shares = percent(one.metric)
    shown = [f"{value:.1%}" if shares else f"{value:.4f}" for value in values]
    change, low, high = (f"{100 * end:+.1f}" if shares else f"{end:+.4f}" for end in (one.difference, one.low, one.high))
    measured = f"{one.metric.replace('_', ' ')} {shown[0]} against {shown[1]}, {change}{' points' if shares else ''} ({low} to {high})"
    if one.outcome != "cannot tell":
        return f"{first} is {one.outcome} than {second}: {measured}"
    told = "" if one.rows_needed is None else f"; about {one.rows_needed:,} rows would tell"
    return f"{first} against {second}: cannot tell with {one.num_rows} rows: {measured}{told}"


def below_teacher(lost: Sequence[str]) -> str:
    """What a distilled prompt lost, in words."""
    if not lost:
        return "every score lies within the teacher's interval"
    return f"below the teacher's interval: {', '.join(metric.replace('_', ' ') for metric in lost)}"
