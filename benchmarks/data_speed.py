"""From rows in a file to ids in arrays: ours, the first time and the next, against a batched map of `datasets` with two processes.

Each measurement is a process of its own: its seconds from the start of Python, those of them that reading took once all is imported, and
by how much its memory grew meanwhile, with what it has mapped. `datasets`
tokenizes question and answer, joins them with labels, and keeps the result as Arrow files; both start without a cache.

    python -m benchmarks.data_speed --tokenizer FOLDER --data ROWS.jsonl --rows 10000 100000 1000000 [--rounds 3] [--peer-rows 100000]

`--data`: rows of instruction, input and output, which are repeated with a number in front until there are enough. Only up to
`--peer-rows` is `datasets` measured too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import psutil

from benchmarks.measuring import machine

MAX_LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of a base")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-rows", type=int, default=100_000)
    parser.add_argument("--characters", type=int, default=10**9, help="of a row's output at most")
    given = parser.parse_args()
    print(json.dumps(machine()))
    for count in given.rows:
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.jsonl"
            write_rows(given.data, rows, count, given.characters)
            sides = ["ours", "datasets"] if count <= given.peer_rows else ["ours"]
            found: dict[str, list[dict[str, float]]] = {}
            for number in range(given.rounds if count <= given.peer_rows else 1):
                for side in sides:
                    home = Path(folder) / f"{side}-{number}"
                    found.setdefault(side, []).append(measured(side, given.tokenizer, rows, home))
                    if side == "ours":
                        found.setdefault("ours, again", []).append(measured(side, given.tokenizer, rows, home))
            print(f"{count:,} rows, {rows.stat().st_size / 1e6:.0f} MB, {found['ours'][0]['tokens'] / count:.0f} tokens each")
            for side, all_of_it in found.items():
                print(f"  {side:<12} {said(all_of_it)}", flush=True)


def said(found: list[dict[str, float]]) -> str:
    """Medians, and the range of the seconds."""
    seconds = sorted(one["seconds"] for one in found)
    rows, memory = (median(one[name] for one in found) for name in ("rows_seconds", "memory"))
    return f"{median(seconds):.1f} s ({seconds[0]:.1f} to {seconds[-1]:.1f}), of these {rows:.2f} s for the rows; {memory / 2**20:+.0f} MB"


def write_rows(source: Path, out: Path, count: int, characters: int) -> None:
    """`count` different rows made of the source's."""
    with source.open(encoding="utf-8") as file:
        rows = json.load(file) if source.suffix == ".json" else [json.loads(line) for line in file]
    with out.open("w", encoding="utf-8") as file:
        for number, row in enumerate(islice(cycle(rows), count)):
            own = {**row, "instruction": f"{number} {row['instruction']}", "output": row["output"][:characters]}
            file.write(json.dumps(own, ensure_ascii=False) + "\n")


def measured(side: str, tokenizer: str, rows: Path, home: Path) -> dict[str, float]:
    """A process's own account of itself, and its seconds from outside."""
    caches = {"SOFTPROMPT_CACHE": str(home), "HF_DATASETS_CACHE": str(home), "TOKENIZERS_PARALLELISM": "true"}
    words = [sys.executable, "-m", "benchmarks.data_speed", side, tokenizer, str(rows)]
    began = time.perf_counter()
    ended = subprocess.run(words, env={**os.environ, **caches}, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    return {**json.loads(ended.stdout.splitlines()[-1]), "seconds": seconds}


def ours(tokenizer: str) -> Callable[[str], int]:
    """As `softprompt train` reads rows before the first step; the tokens that there are."""
    from softprompt.config import ModelConfig, load_config
    from softprompt.encode import make_encoder
    from softprompt.engine.loading import load_tokenizer
    from softprompt.events import returned
    from softprompt.rows import loading_rows

    encoder = make_encoder(load_tokenizer(ModelConfig(name=tokenizer)), "human-assistant")

    def read(rows: str) -> int:
        config = load_config({"data": {"train": rows, "max_length": MAX_LENGTH, "max_rejected": 10**9}})
        return int(returned(loading_rows(config, encoder))[1].column("length").sum())

    return read


def peer(tokenizer: str) -> Callable[[str], int]:
    import datasets
    from transformers import AutoTokenizer, Trainer  # noqa: F401 - a training imports it too

    tokenize = AutoTokenizer.from_pretrained(tokenizer)

    def mapped(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        asked = [
            f"Human: {instruction}\n{given}".strip() + "\n\nAssistant: "
            for instruction, given in zip(batch["instruction"], batch["input"], strict=True)
        ]
        questions = tokenize(asked, add_special_tokens=False)["input_ids"]
        answers = tokenize(batch["output"], add_special_tokens=False)["input_ids"]
        ids, labels = [], []
        for question, answer in zip(questions, answers, strict=True):
            ended = [*answer, tokenize.eos_token_id]
            ids.append((question + ended)[:MAX_LENGTH])
            labels.append(([-100] * len(question) + ended)[:MAX_LENGTH])
        return {"input_ids": ids, "labels": labels}

    def read(rows: str) -> int:
        loaded = datasets.load_dataset("json", data_files=rows, split="train")
        done = loaded.map(mapped, batched=True, num_proc=2, remove_columns=loaded.column_names)
        return sum(map(len, done.with_format("numpy")["input_ids"][:100])) * len(done) // 100

    return read


def alone(side: str, tokenizer: str, rows: str) -> None:
    """One measurement, in this process."""
    read = {"ours": ours, "datasets": peer}[side](tokenizer)
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    tokens = read(rows)
    facts = {"tokens": tokens, "rows_seconds": time.perf_counter() - began, "memory": psutil.Process().memory_info().rss - before}
    print(json.dumps(facts))


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("ours", "datasets"):
        alone(*sys.argv[1:])
    else:
        main()
