"""Does the doctor name what is broken, and nothing in a sound run? Set-ups with one fault each, on real bases and tasks.

    python benchmarks/broken.py --base gemma=FOLDER --task sentiment --task demo --results FILE --report docs/doctor.md
                                [--steps 40] [--draw]

Every finished set-up becomes a line of the file at once, and one that the file holds already is not repeated.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from quality import CACHE, Runs, read
from tasks import MAKERS, Task, make_tasks

from softprompt.config import USUAL_RATE

# What is set beside the defaults, and what the doctor must speak of; nothing for the sound run.
RATE = USUAL_RATE["prompt"]
SETUPS: dict[str, tuple[tuple[str, ...], str]] = {
    "sound": ((), ""),
    "rate 100 times too low": ((f"optim.relative_lr={RATE / 100}",), "is too low"),
    "rate 100 times too high": ((f"optim.relative_lr={RATE * 100}",), "is too high"),
    "template without the question": (("data.template=Human: {{ '' }}\n\nAssistant: ",), "data.template leaves out"),
    "answers beyond max_length": (("data.max_length=4",), "data.max_length"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--task", action="append", required=True, choices=list(MAKERS), help="repeatable")
    parser.add_argument("--alpaca", type=Path, help="1,000 rows of instruction, input and output, for the task of that name")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--results", required=True, type=Path, help="JSONL, a set-up per line")
    parser.add_argument("--report", type=Path, help="Markdown page to write")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    given = parser.parse_args()
    if not given.draw:
        for base in given.base:
            try_all(*base.split("=", 1), make_tasks(given.task, CACHE, given.alpaca), given.steps, given.results)
    if given.report:
        given.report.write_text(report(read(given.results)), encoding="utf-8")


def try_all(name: str, folder: str, tasks: list[Task], steps: int, results: Path) -> None:
    from meters import machine

    from softprompt.config import ModelConfig
    from softprompt.engine.loading import load_base

    base = load_base(ModelConfig(name=folder))
    for task in tasks:
        for setup in SETUPS:
            key = f"{name}/{task.name}/{setup}"
            if key not in read(results):
                line = {"key": key, "steps": steps, **tried(setup, task, base, steps), "machine": machine()}
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                print(key, *line["findings"], sep="\n  ", flush=True)


def tried(setup: str, task: Task, base: Any, steps: int) -> dict[str, Any]:
    """What the doctor says while the set-up trains, and of the finished run; a refusal counts as a finding before any step."""
    from recipes import Recipe, make_config

    import softprompt
    from softprompt.doctor import diagnose
    from softprompt.events import Warned

    with tempfile.TemporaryDirectory() as out:
        config = make_config(
            Recipe((*SETUPS[setup][0], f"train.steps={steps}", f"train.eval_every={steps // 2}")), task, base, None, 0, f"{out}/run"
        )
        early: list[tuple[int, str]] = []
        try:
            for event in softprompt.train(config, base=base):
                if isinstance(event, Warned):
                    early.append((event.step, event.finding))
            (findings,) = diagnose(f"{out}/run", base).values()
        except softprompt.Error as error:
            refused = str(error).replace(f"{task.train.parent}/", "")
            early, findings = [*early, (0, refused)], [refused]
    return {"early": early, "findings": findings}


def named(setup: str, findings: list[str]) -> bool:
    """Whether the findings are what they should be: the fault among them, or none."""
    wanted = SETUPS[setup][1]
    return any(wanted in finding for finding in findings) if wanted else not findings


def report(found: Runs) -> str:
    of_all = [one["machine"] for one in found.values() if "machine" in one]
    machines = sorted({f"{machine['threads']} thread of {machine['gpu'] or machine['cpu']}" for machine in of_all})
    lines = [
        "# What the doctor says",
        "",
        "Made by `benchmarks/broken.py`: the defaults of `benchmarks/quality.py` with one fault each. Early: the first step after which",
        f"the fault was named while the run went on; 0 is before its first step. {'; '.join(machines)}.",
        "",
        "| base | task | set-up | steps | as it should be | early | findings |",
        "|---|---|---|---:|---|---:|---|",
    ]
    for key, one in found.items():
        base, task, setup = key.split("/")
        wanted = SETUPS[setup][1]
        early = min((step for step, said in one["early"] if wanted and wanted in said), default="")
        right = "yes" if named(setup, one["findings"]) else "**no**"
        said = "<br>".join(finding.replace("|", "\\|") for finding in one["findings"]) or "nothing to find fault with"
        lines.append(f"| {base} | {task} | {setup} | {one['steps']} | {right} | {early} | {said} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
