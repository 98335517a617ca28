"""A GGUF base loaded for the first time: a process of its own with an empty cache, this code against that of another checkout.

    python -m benchmarks.gguf_first FILE.gguf... [--before CHECKOUT] [--rounds 3]

`--before`: a folder with another version of this repository (`git worktree add`). The sides take turns. What they leave in the cache is
compared byte by byte, and the tokens that they make of a text. Seconds are those of the whole process, and of them those of `load_base`.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measuring import machine

HERE = Path(__file__).resolve().parents[1]
TEXT = """  Bring tea, please: 请给我一杯茶，谢谢！\t\tdef f(x):\n    return x**2  # 平方
<bos>日本語のテキスト 👩‍👩‍👧 naïve Ελληνικά 12,345.67€
«Ça va ?» 今天是2026年11月27日；“引号”……   trailing   """
LOAD = """
import json, sys, time
from softprompt import load_base, load_config
began = time.perf_counter()
base = load_base(load_config(None, [f"model.gguf_file={sys.argv[1]}", "model.device=cpu", "model.dtype=float32"]).model)
print(json.dumps({"loading": time.perf_counter() - began, "ids": base.tokenizer(sys.argv[2])["input_ids"]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--before", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(json.dumps(machine()))
    sides = {"now": HERE, **({"before": given.before} if given.before else {})}
    for file in given.files:
        file.read_bytes()  # into the system's cache
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(given.rounds):
            for side, checkout in sides.items():
                found[side].append(first_use(file, checkout))
                print(side, {key: value for key, value in found[side][-1].items() if key != "kept"}, file=sys.stderr, flush=True)
        print(f"{file.name}, {len(found['now'])} times")
        seconds = {side: {key: median(one[key] for one in all_of_it) for key in ("whole", "loading")} for side, all_of_it in found.items()}
        for side, own in seconds.items():
            print(f"  {side:<6} {own['whole']:.1f} s, of these {own['loading']:.1f} s for loading")
        if given.before:
            ratios = ", ".join(f"{key} {seconds['before'][key] / seconds['now'][key]:.2f}x" for key in ("whole", "loading"))
            same = all(one["kept"] == found["now"][0]["kept"] for all_of_it in found.values() for one in all_of_it)
            print(f"  {ratios}; files and tokens {'equal' if same else 'DIFFER'}")


def first_use(file: Path, checkout: Path) -> dict[str, Any]:
    """Seconds, and what there is afterwards: the cache's files by their hash, and the tokens of the text."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "SOFTPROMPT_CACHE": cache, "PYTHONPATH": str(checkout)}
        began = time.perf_counter()
        ended = subprocess.run([sys.executable, "-c", LOAD, file, TEXT], env=environment, capture_output=True, text=True, check=True)
        whole = time.perf_counter() - began
        said = json.loads(ended.stdout.splitlines()[-1])
        files = {str(path.relative_to(cache)): _hash(path) for path in sorted(Path(cache).rglob("*")) if path.is_file()}
        return {"whole": whole, "loading": said["loading"], "kept": [files, said["ids"]]}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
