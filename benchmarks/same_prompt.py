"""Whether the demo learns the same prompt in several environments: its first steps, in float32, with one thread.

    python -m benchmarks.same_prompt --json FILE PYTHON PYTHON ... [--steps 20] [--base FILE.gguf]

PYTHON: interpreters of environments that softprompt can run in, e.g. .venv-oldest/bin/python .venv-newest/bin/python. Each trains in turn.
The prompts at the start and after every fifth step are compared with those of the first: the length of the difference as a share of the
prompt's, and the largest difference of a number as a share of their root mean square.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.measuring import machine
from softprompt.atomic import write_text
from softprompt.demo import demo_base

EVERY = 5
TRAIN = """
import json, sys
from importlib.metadata import version
from softprompt.demo import demo_config
from softprompt.events import Saved, Step
from softprompt.training import train
losses = []
for event in train(demo_config(sys.argv[2:])):
    losses += [event.loss] if isinstance(event, Step) else []
    if isinstance(event, Saved) and event.step == int(sys.argv[1]):
        break
print(json.dumps({"losses": losses, "versions": {name: version(name) for name in ("torch", "transformers", "peft", "numpy")}}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--base", help="a GGUF file instead of the demo's")
    given = parser.parse_args()
    base = given.base or str(demo_base())
    with tempfile.TemporaryDirectory() as folder:
        sides = [trained(python, given.steps, base, Path(folder) / str(number)) for number, python in enumerate(given.pythons)]
        steps = range(0, given.steps + 1, EVERY)
        differences = [[difference(Path(folder), number, step) for step in steps] for number in range(1, len(sides))]
    result = {"machine": machine(), "base": Path(base).name, "steps": list(steps), "sides": sides, "differences": differences}
    write_text(given.json, json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("steps", "differences")}, indent=1))


def trained(python: str, steps: int, base: str, out: Path) -> dict[str, Any]:
    """Losses and versions of a run that ends after `steps` of the demo's; its rate still falls over all of them."""
    how = [f"model.gguf_file={base}", "model.dtype=float32", "model.device=cpu", f"train.save_every={EVERY}", "train.keep=all"]
    line = [python, "-c", TRAIN, str(steps), *how, f"train.out={out}"]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout.splitlines()[-1])


def difference(folder: Path, number: int, step: int) -> dict[str, float]:
    """How far a side's prompt is from that of the first."""
    first, other = (numbers(folder / str(side), step).double() for side in (0, number))
    apart = first - other
    return {"relative": (apart.norm() / first.norm()).item(), "largest": (apart.abs().max() / first.square().mean().sqrt()).item()}


def numbers(run: Path, step: int) -> torch.Tensor:
    """All numbers of the prompt, one after the other."""
    (file,) = (run / "checkpoints" / f"step-{step:06d}").rglob("adapter_model.safetensors") if step else run.rglob("start.safetensors")
    return torch.cat([part.flatten() for part in load_file(file).values()])


if __name__ == "__main__":
    main()
