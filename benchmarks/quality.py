"""Does it learn? Ours and PEFT's methods on the same rows, steps and seeds; held-out loss and accuracy (exact match on the demo).

    python -m benchmarks.quality --base gemma=FOLDER --base smollm=FOLDER --alpaca FILE --results FILE --report docs/results.md
                                 [--task NAME ...] [--recipe NAME ...] [--rate RATE] [--seeds 3] [--steps N]
                                 [--dtype NAME] [--quantization KIND] [--tf32]
    python -m benchmarks.quality --base gemma=FOLDER --task demo --results docs/doctor.jsonl --doctor docs/doctor.md [--steps 40]

Every finished run becomes a line of the file at once, and a run that the file holds already is not repeated. Several processes
may add to one file: a task and recipe that one of them has begun the others leave to it, so the same command, started several
times, shares the work. A recipe with a grid of rates is searched on the first seed, by the
loss on the held-out rows, from the middle outward for as long as it falls; its best rate alone is run with the other seeds.
--report writes the table and --plot the curves of what the file holds; with --draw nothing is trained.

--doctor asks another question: does the doctor name what is broken, and nothing in a sound run? It trains the recipes with one
fault each in place of the others, and writes what the doctor said of them.
"""

import argparse
import fcntl
import json
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import mean, mode, stdev
from typing import IO, Any

import torch

from benchmarks.measuring import machine
from benchmarks.recipes import RECIPES, Recipe, examined, run_recipe
from benchmarks.tasks import MAKERS, Task, make_tasks
from softprompt.config import ModelConfig
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase

CACHE = Path.home() / ".cache" / "softprompt" / "benchmarks"
AT_A_GLANCE = (
    "softprompt",
    "softprompt, prefix, 32 rows",
    "PEFT as in the tutorial",
    "PEFT, text init, best rate",
    "LoRA r = 8, best rate",
)
COLOURS = 10  # of matplotlib's lines, before the first comes again
Runs = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--task", action="append", choices=list(MAKERS), help="repeatable; left out, all of them")
    parser.add_argument("--recipe", action="append", help="a key of recipes.RECIPES; repeatable; left out, all of them")
    parser.add_argument("--rate", type=float, help="of a grid this rate alone; a later run without it searches the rest")
    parser.add_argument("--dtype", default="auto", help="model.dtype of all; in a second precision a base needs a NAME of its own")
    parser.add_argument("--quantization", choices=("int8", "nf4"), help="model.quantization of all; such a base needs a NAME of its own")
    parser.add_argument("--tf32", action="store_true", help="float32 products of a GPU by its tensor cores, inputs rounded to 10 bits")
    parser.add_argument("--alpaca", type=Path, help="1,000 rows of instruction, input and output")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of every run, in a file of its own; left out, the task's, for the doctor 40")
    parser.add_argument("--results", required=True, type=Path, help="JSONL, a run per line")
    parser.add_argument("--report", type=Path, help="Markdown table to write")
    parser.add_argument("--plot", type=Path, help="PNG of the curves to draw")
    parser.add_argument("--doctor", type=Path, help="Markdown page to write of what the doctor says")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    given = parser.parse_args()
    if not given.draw:
        train_all(given)
    runs = read(given.results)
    if given.report:
        given.report.write_text(report(runs), encoding="utf-8")
    if given.plot:
        draw(runs, given.plot)
    if given.doctor:
        given.doctor.write_text(doctors_page(runs), encoding="utf-8")


def read(path: Path) -> Runs:
    """The runs by key: base/task/recipe/rate/seed; base/task/recipe of those that the doctor looked at."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {run["key"]: run for run in map(json.loads, lines)}


def append(path: Path, run: dict[str, Any]) -> None:
    """One more line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(run, ensure_ascii=False) + "\n")


def train_all(given: argparse.Namespace) -> None:
    torch.backends.cuda.matmul.allow_tf32 = given.tf32
    steps = given.steps or (40 if given.doctor else None)
    tasks = [replace(task, steps=steps or task.steps) for task in make_tasks(given.task or list(MAKERS), CACHE, given.alpaca)]
    names = given.recipe or [name for name, recipe in RECIPES.items() if (recipe.finding is not None) == bool(given.doctor)]
    with (Path(tempfile.gettempdir()) / f"softprompt-{zlib.crc32(str(given.results.absolute()).encode())}.lock").open("w") as begun:
        for name, folder in (base.split("=", 1) for base in given.base):
            base = load_base(ModelConfig(name=folder, dtype=given.dtype, quantization=given.quantization))
            facts = {"dtype": str(base.dtype), "weight_bytes": base.model.get_memory_footprint(), "machine": machine()}
            for recipe, task in product(names, tasks):
                prefix = f"{name}/{task.name}/{recipe}"
                if _first_to_begin(begun, f"{prefix}/{given.rate}"):
                    for run in new_runs(given, prefix, RECIPES[recipe], task, base):
                        append(given.results, {**run, **facts})


def new_runs(given: argparse.Namespace, prefix: str, recipe: Recipe, task: Task, base: FrozenBase) -> Iterator[dict[str, Any]]:
    """What the file does not hold of a recipe, run by run."""
    runs = read(given.results)
    if recipe.finding is not None:
        if prefix not in runs:
            found = examined(recipe, task, base)
            print(prefix, *found["findings"], sep="\n  ", flush=True)
            yield {"key": prefix, **found}
        return
    for rate, seed in _points((given.rate,) if given.rate and recipe.rates else recipe.rates, given.seeds, runs, prefix):
        key = f"{prefix}/{rate}/{seed}"
        if key not in runs:
            with tempfile.TemporaryDirectory() as out:
                outcome = run_recipe(recipe, task, base, rate, seed, f"{out}/run")
            print(key, f"{outcome.test_loss:.4f}", outcome.accuracy, flush=True)
            runs[key] = {"key": key, **asdict(outcome)}
            yield runs[key]


def _first_to_begin(begun: IO[str], what: str) -> bool:
    """Whether no other process works at it. Until this one ends it holds a lock on one byte of `begun`, at a place that `what` gives."""
    try:
        fcntl.lockf(begun, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, zlib.crc32(what.encode()))
    except OSError:
        return False
    return True


def _points(rates: tuple[float, ...], seeds: int, runs: Runs, prefix: str) -> Iterator[tuple[float | None, int]]:
    """The grid on the first seed, then its best rate on the others; what was found so far decides."""

    def loss(index: int) -> float:
        return runs[f"{prefix}/{rates[index]}/0"]["curve"][-1][2]

    best = len(rates) // 2
    yield rates[best] if rates else None, 0
    for way in (1, -1):
        while 0 <= best + way < len(rates):
            yield rates[best + way], 0
            if not loss(best + way) < loss(best):
                break
            best += way
    for seed in range(1, seeds):
        yield rates[best] if rates else None, seed


def best_rate(runs: Runs, prefix: str) -> float:
    """The rate of the first seed's lowest held-out loss at the end."""
    first = {key: run for key, run in runs.items() if key.startswith(f"{prefix}/") and key.endswith("/0")}
    return float(min(first, key=lambda key: first[key]["curve"][-1][2]).split("/")[-2])


# ---- what was found ------------------------------------------------------------------------------------------------


def grouped(runs: Runs) -> dict[tuple[str, str], dict[str, list[dict[str, Any]]]]:
    """By (base, task), sorted, and recipe: the runs of the recipe's best rate, a seed each."""
    found: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for key in (key for key, run in runs.items() if "curve" in run):
        base, task, recipe, rate, _ = key.split("/")
        prefix = f"{base}/{task}/{recipe}"
        if rate == "None" or float(rate) == best_rate(runs, prefix):
            found.setdefault((base, task), {}).setdefault(recipe, []).append({**runs[key], "rate": rate})
    return dict(sorted(found.items()))


def report(runs_by_key: Runs) -> str:
    lines = [
        "# Results",
        "",
        "Made by `python -m benchmarks.quality`: mean over the seeds, and their standard deviation where there are several. Of a recipe",
        "with a grid of rates the best of the first seed, of those that were run. Steps, rows of a step and texts of a task stand in",
        "`benchmarks/tasks.py`. Many runs shared a processor, so seconds tell orders of magnitude; TF32: products of float32 with inputs",
        "rounded to 10 bits. What follows from it, and what was measured with other budgets or in a trial, stands in LOG.md. The task demo",
        "has had other rows since it was measured here, 552 with four fields: its lines compare methods, not with docs/contestants.md.",
        "",
        "![held-out loss against steps and against seconds](results.png)",
        "",
    ]
    groups = grouped(runs_by_key)
    lines += [*_glance(groups), ""]
    for (base, task), recipes in groups.items():
        lines += [f"## {task}, {base}", "", "| recipe | rate | trainable | held-out loss before | test loss | accuracy | seeds | on |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for recipe, runs in recipes.items():
            accuracy = _accuracy(runs)
            rate = "default" if runs[0]["rate"] == "None" else runs[0]["rate"]
            before = f"{runs[0]['curve'][0][2]:.4f}"
            loss = _spread([run["test_loss"] for run in runs], 4)
            where = ", ".join(dict.fromkeys(map(_where, runs)))
            lines.append(f"| {recipe} | {rate} | {runs[0]['num_trainable']:,} | {before} | {loss} | {accuracy} | {len(runs)} | {where} |")
        lines.append("")
    return "\n".join(lines)


def _glance(groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]]) -> list[str]:
    """What a newcomer asks first: a line for each task and base, accuracy (exact match on the demo) where there is one, and test loss."""
    lines = ["## At a glance", "", f"| task | base | {' | '.join(AT_A_GLANCE)} |", "|---" * (2 + len(AT_A_GLANCE)) + "|"]
    for (base, task), recipes in groups.items():
        found = [recipes.get(recipe, []) for recipe in AT_A_GLANCE]
        cells = [f"{_accuracy(runs)} ({_spread([run['test_loss'] for run in runs], 3)})".lstrip() if runs else "" for runs in found]
        lines.append(f"| {task} | {base} | {' | '.join(cells)} |")
    return [*lines, "", "Accuracy, in brackets the test loss; alpaca has a loss alone. The seeds are counted below."]


def _where(run: dict[str, Any]) -> str:
    machine = run["machine"]
    return (machine["gpu"] or machine["cpu"]) + (", TF32" if machine.get("tf32") and run["dtype"] == "torch.float32" else "")


def _accuracy(runs: list[dict[str, Any]]) -> str:
    return "" if runs[0]["accuracy"] is None else _spread([100 * run["accuracy"] for run in runs], 1) + "%"


def _spread(values: list[float], digits: int) -> str:
    shown = f"{mean(values):.{digits}f}"
    return shown if len(values) == 1 else f"{shown} ± {stdev(values):.{digits}f}"


def draw(runs: Runs, path: Path) -> None:
    """Held-out loss of the first seed against steps (left) and, of the runs that most runs share a machine with, against seconds of
    training (right), a line of pictures for each base and task with three recipes or more. Their height is that of the second half."""
    from matplotlib.figure import Figure

    groups = {where: recipes for where, recipes in grouped(runs).items() if len(recipes) > 2}
    figure = Figure(figsize=(14, 4.5 * len(groups)), layout="constrained")
    for row, ((base, task), recipes) in zip(figure.subplots(len(groups), 2, squeeze=False), groups.items(), strict=True):
        firsts = {recipe: found[0] for recipe, found in recipes.items()}
        late = [loss for run in firsts.values() for *_, loss in run["curve"][len(run["curve"]) // 2 :]]
        room = 0.1 * (max(late) - min(late))
        usual = mode(map(_where, firsts.values()))
        for axes, label, index in zip(row, ("steps", "seconds of training"), (0, 1), strict=True):
            for number, (recipe, run) in enumerate(firsts.items()):
                line = "--" if number >= COLOURS else "-"
                points = run["curve"] if label == "steps" or _where(run) == usual else []
                axes.plot([point[index] for point in points], [point[2] for point in points], line, label=recipe)
            axes.set(xlabel=label, ylabel="held-out loss", title=f"{task}, {base}", ylim=(min(late) - room, max(late) + room))
            axes.grid(alpha=0.3)
        row[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=80)


def doctors_page(found: Runs) -> str:
    """What the doctor said of every set-up, when, and whether it is what it should say."""
    looked_at = {key: run for key, run in found.items() if "early" in run}
    of_all = [one["machine"] for one in looked_at.values() if "machine" in one]
    machines = sorted({f"{machine['threads']} thread of {machine['gpu'] or machine['cpu']}" for machine in of_all})
    lines = [
        "# What the doctor says",
        "",
        "Made by `python -m benchmarks.quality --doctor`: the defaults with one fault each. Early: the first step after which",
        f"the fault was named while the run went on; 0 is before its first step. {'; '.join(machines)}.",
        "",
        "| base | task | set-up | steps | as it should be | early | findings |",
        "|---|---|---|---:|---|---:|---|",
    ]
    for key, one in looked_at.items():
        base, task, setup = key.split("/")
        wanted = RECIPES[setup].finding
        early = min((step for step, said in one["early"] if wanted and wanted in said), default="")
        right = "yes" if named(wanted, one["findings"]) else "**no**"
        said = "<br>".join(finding.replace("|", "\\|") for finding in one["findings"]) or "nothing to find fault with"
        lines.append(f"| {base} | {task} | {setup} | {one['steps']} | {right} | {early} | {said} |")
    return "\n".join([*lines, ""])


def named(wanted: str | None, findings: list[str]) -> bool:
    """Whether the findings are what they should be: the fault among them, or none."""
    return any(wanted in finding for finding in findings) if wanted else not findings


if __name__ == "__main__":
    main()
