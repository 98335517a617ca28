"""Does it learn? Ours and PEFT's methods on the same rows, steps and seeds; held-out loss and accuracy.

    python benchmarks/quality.py --base gemma=FOLDER --base smollm=FOLDER --alpaca FILE --json docs/results.json --report docs/results.md
                                 [--task NAME ...] [--recipe NAME ...] [--seeds 3]

Every finished run is written at once, and a run that the file holds already is not repeated. A recipe with a grid of rates is
searched on the first seed, by the loss on the held-out rows; its best rate alone is run with the other seeds. --report writes
the table and --plot the curves of what the file holds; with --draw nothing is trained.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

CACHE = Path.home() / ".cache" / "softprompt" / "benchmarks"
Runs = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--task", action="append", help="alpaca, sentiment, movies, demo; repeatable; left out, all of them")
    parser.add_argument("--recipe", action="append", help="a key of recipes.RECIPES; repeatable; left out, all of them")
    parser.add_argument("--alpaca", type=Path, help="1,000 rows of instruction, input and output")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--report", type=Path, help="Markdown table to write")
    parser.add_argument("--plot", type=Path, help="PNG of the curves to draw")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    given = parser.parse_args()
    results = json.loads(given.json.read_text(encoding="utf-8")) if given.json.exists() else {"runs": {}}
    if not given.draw:
        train_all(given, results)
    if given.report:
        given.report.write_text(report(results), encoding="utf-8")
    if given.plot:
        draw(results["runs"], given.plot)


def train_all(given: argparse.Namespace, results: dict[str, Any]) -> None:
    from meters import machine
    from recipes import RECIPES, run_recipe
    from tasks import MAKERS, make_tasks

    from softprompt.atomic import write_text
    from softprompt.config import ModelConfig
    from softprompt.model import load_base

    results["machine"] = machine()
    tasks = make_tasks(given.task or list(MAKERS), CACHE, given.alpaca)
    for name, folder in (base.split("=", 1) for base in given.base):
        config = ModelConfig(name=folder)
        base = load_base(config)
        for task in tasks:
            for recipe in given.recipe or list(RECIPES):
                for rate, seed in _points(RECIPES[recipe].rates, given.seeds, results["runs"], f"{name}/{task.name}/{recipe}"):
                    key = f"{name}/{task.name}/{recipe}/{rate}/{seed}"
                    if key not in results["runs"]:
                        with tempfile.TemporaryDirectory() as out:
                            outcome = run_recipe(RECIPES[recipe], task, base, lambda: load_base(config), rate, seed, f"{out}/run")  # noqa: B023
                        results["runs"][key] = asdict(outcome)
                        write_text(given.json, json.dumps(results, indent=1) + "\n")
                        print(key, f"{outcome.test_loss:.4f}", outcome.accuracy, flush=True)


def _points(rates: tuple[float, ...], seeds: int, runs: Runs, prefix: str) -> Iterator[tuple[float | None, int]]:
    """The grid on the first seed, then its best rate on the others; what was found so far decides."""
    for rate in rates or (None,):
        yield rate, 0
    best = best_rate(runs, prefix) if rates else None
    for seed in range(1, seeds):
        yield best, seed


def best_rate(runs: Runs, prefix: str) -> float:
    """The rate of the first seed's lowest held-out loss at the end."""
    first = {key: run for key, run in runs.items() if key.startswith(f"{prefix}/") and key.endswith("/0")}
    return float(min(first, key=lambda key: first[key]["curve"][-1][2]).split("/")[-2])


# ---- what was found ------------------------------------------------------------------------------------------------


def grouped(runs: Runs) -> dict[tuple[str, str], dict[str, list[dict[str, Any]]]]:
    """By (base, task) and recipe: the runs of the recipe's best rate, a seed each."""
    found: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for key in runs:
        base, task, recipe, rate, _ = key.split("/")
        prefix = f"{base}/{task}/{recipe}"
        if rate == "None" or float(rate) == best_rate(runs, prefix):
            found.setdefault((base, task), {}).setdefault(recipe, []).append({**runs[key], "rate": rate})
    return found


def report(results: dict[str, Any]) -> str:
    lines = [
        "# Results",
        "",
        "Made by `benchmarks/quality.py`: mean over the seeds, and their standard deviation where there are several.",
        "",
    ]
    for (base, task), recipes in grouped(results["runs"]).items():
        lines += [f"## {task}, {base}", "", "| recipe | rate | trainable | held-out loss before | test loss | accuracy | seeds |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for recipe, runs in recipes.items():
            accuracy = "" if runs[0]["accuracy"] is None else _spread([100 * run["accuracy"] for run in runs], 1) + "%"
            rate = "default" if runs[0]["rate"] == "None" else runs[0]["rate"]
            before = f"{runs[0]['curve'][0][2]:.4f}"
            loss = _spread([run["test_loss"] for run in runs], 4)
            lines.append(f"| {recipe} | {rate} | {runs[0]['num_trainable']:,} | {before} | {loss} | {accuracy} | {len(runs)} |")
        lines.append("")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    shown = f"{mean(values):.{digits}f}"
    return shown if len(values) == 1 else f"{shown} ± {stdev(values):.{digits}f}"


def draw(runs: Runs, path: Path) -> None:
    """Held-out loss against steps (above) and against seconds of training (below), a column for each base and task."""
    from matplotlib.figure import Figure

    groups = grouped(runs)
    figure = Figure(figsize=(6.5 * len(groups), 10), layout="constrained")
    grid = figure.subplots(2, len(groups), squeeze=False)
    for column, ((base, task), recipes) in enumerate(groups.items()):
        for row, (label, index) in enumerate((("steps", 0), ("seconds of training", 1))):
            axes = grid[row, column]
            for recipe, found in recipes.items():
                axes.plot([point[index] for point in found[0]["curve"]], [point[2] for point in found[0]["curve"]], label=recipe)
            axes.set(xlabel=label, ylabel="held-out loss", title=f"{task}, {base}" if row == 0 else "")
            axes.grid(alpha=0.3)
    grid[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
