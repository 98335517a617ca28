"""What do 8 and 4 bits cost? The same training over the base as it is, in int8 and in nf4: held-out loss, speed, memory.

    python benchmarks/quantization.py --model FOLDER --data FILE --json OUT [--steps 30] [--rows 400]

The first --rows of the file train, the next 64 are held out. Each kind has a process of its own, for its memory. A GGUF file
is named by its unpacked folder (softprompt's cache), since quantisation starts from plain weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from workloads import PROMPT_TEXT

KINDS = ("none", "int8", "nf4")
COLUMNS = ("eval_loss_before", "eval_loss_after", "samples_per_second", "weight_bytes", "step_bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)  # a measuring process
    given = parser.parse_args()
    if given.kind:
        given.json.write_text(json.dumps(measure(given)), encoding="utf-8")
        return
    from meters import machine

    results = {"model": Path(given.model).name, "steps": given.steps, "machine": machine(), "kinds": {kind: alone(kind) for kind in KINDS}}
    given.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def alone(kind: str) -> dict[str, Any]:
    """One kind, measured in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "result.json"
        subprocess.run([sys.executable, *sys.argv, "--kind", kind, "--json", str(answer)], check=True)
        result = json.loads(answer.read_text(encoding="utf-8"))
    print(kind, {name: result[name] for name in COLUMNS}, flush=True)
    return result


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """A run over one kind of base; `step_bytes`: what the process grew by in training."""
    from meters import watch_peak

    from softprompt import load_base, load_config, train

    kind = {} if given.kind == "none" else {"quantization": given.kind}
    with tempfile.TemporaryDirectory() as folder:
        tree = {
            "model": {"name": given.model, **kind},
            "data": {"train": f"{given.data}[0:{given.rows}]", "eval": f"{given.data}[{given.rows}:{given.rows + 64}]"},
            "prompt": {"text": PROMPT_TEXT},
            "train": {"steps": given.steps, "examples_per_step": 8, "out": f"{folder}/run"},
        }
        config = load_config(tree)
        base = load_base(config.model)
        peak = watch_peak(base.model, base.device)
        config = load_config(tree, [f"optim.lr={base.rms / 5}"])
        *_, finished = train(config, base=base)
    return {**finished.result, "weight_bytes": base.model.get_memory_footprint(), "step_bytes": peak()}


if __name__ == "__main__":
    main()
