"""Does a prompt beat what needs no training? A task's prompt, trained with the defaults (the demo's as `softprompt demo` trains it),
against the bare base, a text prompt, a few examples.

    python -m benchmarks.contestants --base gemma=FOLDER --task demo --task sentiment --results FILE --report docs/contestants.md
                                     [--rows 300] [--dtype float32] [--runs FOLDER | --run FOLDER] [--draw]

Every finished task becomes a line of the file at once, and a task that the file holds already is not repeated. One that was
stopped goes on: its training from the run's last checkpoint, its answers from the last one. --run takes the finished run of the
one task that is named, and measures it anew. --report writes all scores. With --draw nothing is trained or measured. What a reader
must know is added to a line of the file by hand, as "notes".
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import softprompt
from benchmarks.measuring import machine
from benchmarks.quality import CACHE, Runs, append, read
from benchmarks.recipes import Recipe, make_config
from benchmarks.tasks import MAKERS, Task, make_tasks
from softprompt.config import ModelConfig
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase
from softprompt.metrics import Verdict, called, percent, sentence
from softprompt.runlog import RunFolder

SAVE_EVERY = 10  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--task", action="append", required=True, choices=list(MAKERS), help="repeatable")
    parser.add_argument("--alpaca", type=Path, help="1,000 rows of instruction, input and output, for the task of that name")
    parser.add_argument("--rows", type=int, help="test rows at most; left out, all")
    parser.add_argument("--runs", type=Path, default=CACHE / "contestants", help="where run folders are kept")
    parser.add_argument("--dtype", default="auto", help="of the base")
    parser.add_argument("--run", type=Path, help="a finished run of the one task")
    parser.add_argument("--results", required=True, type=Path, help="JSONL, a task per line")
    parser.add_argument("--report", type=Path, help="Markdown page to write")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    given = parser.parse_args()
    if given.run and len(given.task) > 1:
        parser.error("--run is of one task: name one")
    if not given.draw:
        measure_all(given)
    found = read(given.results)
    if given.report:
        given.report.write_text(report(found), encoding="utf-8")


def measure_all(given: argparse.Namespace) -> None:
    name, folder = given.base.split("=", 1)
    base = load_base(ModelConfig(name=folder, dtype=given.dtype))
    for task in map(with_rows_to_test, make_tasks(given.task, CACHE, given.alpaca)):
        key = f"{name}/{task.name}/{given.rows or 'all'}"
        if key in read(given.results) and given.run is None:
            continue
        print(key, flush=True)
        append(given.results, {"key": key, **measure(task, base, given.run or given.runs / f"{name}-{task.name}", given.rows)})


def with_rows_to_test(task: Task) -> Task:
    """Where a task's test rows are those that choose among a run's states, the first half chooses and the second is measured."""
    if task.held != task.test:
        return task
    half = len(task.test.read_text(encoding="utf-8").splitlines()) // 2
    return replace(task, held=Path(f"{task.held}[:{half}]"), test=Path(f"{task.test}[{half}:]"))


def measure(task: Task, base: FrozenBase, folder: Path, num_rows: int | None) -> dict[str, Any]:
    """Trains into the run folder, or goes on there, and evaluates; tasks without labels are answered too."""
    began = folder.exists()
    settings = Recipe((*task.own, f"train.save_every={SAVE_EVERY}"))
    config = RunFolder.reopen(folder).config() if began else make_config(settings, task, base, None, 0, str(folder))
    *_, finished = softprompt.train(config, resume=began, base=base)
    assert isinstance(finished, softprompt.Finished), "a run ends with its result"
    prompt = softprompt.load_prompt(folder / "prompt", base)
    contest = softprompt.Contest(train=softprompt.load_examples(str(task.train)), answers=not task.labelled)
    test, start = softprompt.load_examples(str(task.test), limit=num_rows), time.perf_counter()
    evaluation = softprompt.evaluate(base, prompt, test, contest, out=folder / "evaluations")
    facts = machine()
    return {
        "evaluation": evaluation.as_dict(),
        "training": {
            "steps": finished.result["steps"],
            "examples_per_step": config.train.examples_per_step,
            "num_virtual_tokens": prompt.card.num_virtual_tokens,
            "seconds": finished.result["seconds"],
        },
        "seconds": time.perf_counter() - start,
        "machine": {**facts, "versions": {"softprompt": softprompt.__version__, **facts["versions"]}},
    }


# ---- what was found ------------------------------------------------------------------------------------------------


def report(found: Runs) -> str:
    """All scores with their intervals, all verdicts."""
    lines = [
        "# Contestants",
        "",
        "Made by `python -m benchmarks.contestants`. In brackets: 95% bootstrap intervals over the rows, of one training with one seed.",
        "Tokens: what a request has more than the bare base's. The measured rows neither trained the prompt nor chose among its states.",
        "",
    ]
    for key, one in found.items():
        base, task, rows = key.split("/")
        evaluation = one["evaluation"]
        command = f"python -m benchmarks.contestants --base {base}=FOLDER --task {task}" + ("" if rows == "all" else f" --rows {rows}")
        lines += [f"## {task}, {base}", "", f"    {command}", "", *_how(one), ""]
        lines += [*table(evaluation, metrics_of(evaluation)), "", *(f"- {said}" for said in sentences(evaluation))]
        for name, contestant in evaluation["contestants"].items():
            if contestant["unended_answers"]:
                lines.append(f"- {contestant['unended_answers']} answers of {called(name, contestant['shots'])} did not end")
        lines += ["", *_notes(one)]
    return "\n".join(lines)


def _how(one: dict[str, Any]) -> list[str]:
    evaluation, training, machine = one["evaluation"], one["training"], one["machine"]
    cpu = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''} of {machine['cpu']}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return [
        f"{evaluation['rows']} rows, {evaluation['supervised_tokens']:,} supervised tokens, evaluated in {one['seconds']:.0f} s.",
        f"Trained for {training['steps']} steps of {training['examples_per_step']} rows in {training['seconds']:.0f} s:"
        f" {training['num_virtual_tokens']} virtual tokens.",
        f"{machine['gpu'] or cpu}; {versions}.",
    ]


def _notes(one: dict[str, Any]) -> list[str]:
    return [line for note in one.get("notes", []) for line in (note, "")]


def metrics_of(evaluation: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(metric for scores in evaluation["intervals"].values() for metric in scores))


def table(evaluation: dict[str, Any], metrics: Sequence[str]) -> list[str]:
    headings = ["contestant", "tokens", *(metric.replace("_per_", "/").replace("_", " ") for metric in metrics)]
    lines = [f"| {' | '.join(headings)} |", f"|---|{'---:|' * (len(metrics) + 1)}"]
    for name, contestant in evaluation["contestants"].items():
        intervals = evaluation["intervals"][name]
        scores = [_shown(metric, contestant[metric], *intervals[metric]) if metric in intervals else "" for metric in metrics]
        lines.append(f"| {called(name, contestant['shots'])} | +{contestant['tokens']:.0f} | {' | '.join(scores)} |")
    return lines


def sentences(evaluation: dict[str, Any], pairs: Sequence[tuple[str, str]] | None = None) -> list[str]:
    """The verdicts in words; of these pairs only, or all."""
    contestants, said = evaluation["contestants"], []
    for one in (Verdict(**verdict) for verdict in evaluation["verdicts"]):
        if pairs is None or (one.first, one.second) in pairs:
            sides = [contestants[side] for side in (one.first, one.second)]
            names = [called(side, contestants[side]["shots"]) for side in (one.first, one.second)]
            said.append(sentence(one, names, [side[one.metric] for side in sides]))
    return said


def _shown(metric: str, value: float, low: float, high: float) -> str:
    if percent(metric):
        return f"{value:.1%} ({100 * low:.1f} to {100 * high:.1f})"
    digits = 3 if value < 1000 else 0
    return f"{value:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


if __name__ == "__main__":
    main()
