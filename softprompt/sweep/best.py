"""What came of a sweep: the best prompt by the rows that chose it, and what it is worth on rows that did not."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.artifact import load_prompt
from softprompt.atomic import locked, write_text
from softprompt.config import Sources
from softprompt.data import Loaded, load_examples
from softprompt.data.examples import Example
from softprompt.engine.loading import load_base
from softprompt.errors import DataError, RunError
from softprompt.evaluation import Contest, evaluate
from softprompt.report.sweeps import Shown, write_sweep
from softprompt.sweep.folder import Sweep
from softprompt.sweep.study import UNLOCKED, Seen, Trials


@dataclass(frozen=True)
class Outcome:
    """A finished sweep. `judged`: metric, value, low, high of the best prompt on `rows` rows that did not choose it, and the bare base's
    value; `importance`: of each setting, as a share."""

    trials: tuple[Seen, ...]
    best: Seen
    prompt: Path
    judged: dict[str, Any]
    importance: dict[str, float]
    report: Path

    def as_dict(self) -> dict[str, Any]:
        """The documented JSON of `softprompt sweep`."""
        trials = [{"trial": one.number, "settings": one.values, "state": one.state, "loss": one.loss, **_more(one)} for one in self.trials]
        best = {"trial": self.best.number, "settings": self.best.values, "loss": self.best.loss, "prompt": str(self.prompt)}
        return {"best": {**best, "judged": self.judged}, "importance": self.importance, "trials": trials}


def _more(one: Seen) -> dict[str, Any]:
    return {"prompt": one.prompt, "note": one.note}


def concluded(sweep: Sweep) -> Outcome:
    """Judges the best prompt of a sweep whose trials are over, once, and writes result.json and the report. Raises RunError where no trial
    has finished."""
    trials = Trials(sweep)
    seen = tuple(trials.seen())
    finished = [one for one in seen if one.state == "finished"]
    if not finished:
        raise RunError(f"{sweep.path}: no trial has finished: {_failures(seen)}")
    best = min(finished, key=lambda one: (one.loss, one.number))
    assert best.prompt is not None, "a finished trial has a prompt"
    prompt, result = sweep.path / best.prompt, sweep.path / "result.json"
    with locked(sweep.path / ".result.lock", wait=True, unlocked=UNLOCKED):
        judged = json.loads(result.read_text(encoding="utf-8"))["best"]["judged"] if result.is_file() else _judged(sweep, prompt)
        importance = trials.importance()
        outcome = Outcome(seen, best, prompt, judged, importance, sweep.path / "report.html")
        write_sweep(_shown(sweep, outcome), outcome.report)
        write_text(result, json.dumps(outcome.as_dict(), indent=2, ensure_ascii=False) + "\n")
    return outcome


def _failures(seen: tuple[Seen, ...]) -> str:
    return next((f"{one.note}" for one in seen if one.note), "all were pruned")


def _judged(sweep: Sweep, prompt: Path) -> dict[str, Any]:
    """The best prompt's scores, and the bare base's, on the rows that judge."""
    base = load_base(sweep.config.model)
    stored = load_prompt(prompt, base)
    rows, copies = judging_rows(sweep)
    found = evaluate(base, stored, rows, Contest(), out=sweep.path / "evaluations", tokens_per_batch=sweep.config.train.tokens_per_batch)
    scores = found.contestants["prompt"].scores
    intervals = {name: {"value": one.value, "low": one.low, "high": one.high} for name, one in scores.items()}
    bare = {name: found.contestants["base"][name] for name in scores}
    return {"metric": found.metric, "rows": found.num_rows, "copies_left_out": copies, "scores": intervals, "base": bare}


def judging_rows(sweep: Sweep) -> tuple[Loaded, int]:
    """The rows that judge, without copies of rows that have trained or chosen the prompts, and how many of these there were. Raises
    DataError where all of them are."""
    data = sweep.config.data

    def read(source: Sources) -> Loaded:
        return load_examples(source, label_words=data.label_words, columns=data.columns, stream=data.stream)

    seen = {one.turns for source in (data.train, data.eval) if source for one in read(source).examples}
    loaded = read(sweep.spec.judge)
    fresh: list[Example] = [one for one in loaded.examples if one.turns not in seen]
    if not fresh:
        raise DataError(f"{', '.join(sweep.spec.judge)}: every row that is to judge has trained or chosen prompts: name others with --test")
    return Loaded(tuple(fresh), loaded.rejected, loaded.notes), len(loaded.examples) - len(fresh)


def _shown(sweep: Sweep, outcome: Outcome) -> Shown:
    log = {one.key for one in sweep.spec.dimensions if one.log}
    return Shown(
        sweep.path.name, sweep.keys, outcome.trials, outcome.best.number, str(outcome.prompt), outcome.judged, outcome.importance, log
    )
