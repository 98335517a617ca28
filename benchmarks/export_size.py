"""What an export of a 1.5 B model costs beyond copying its weights: seconds, and memory at its peak.

    python -m benchmarks.export_size --json FILE --tokenizer FOLDER [--pairs 3]

The base is made with random weights (the shape of Qwen2.5-1.5B, bfloat16, shards of 1 GB), the prompt is 20 rows of numbers
that `softprompt import` takes in. Copying the base's folder and exporting take turns. Memory is that of the exporting process:
all of it, and without pages of files that the system may drop at any time.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.measuring import machine

SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "tie_word_embeddings": True,
}
ROWS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--tokenizer", required=True, help="a folder with a tokenizer of at most 151,936 tokens")
    parser.add_argument("--dtype", default="auto", help="model.dtype of the export")
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        subprocess.run([sys.executable, "-m", "benchmarks.export_size", "--make", str(folder / "base"), given.tokenizer], check=True)
        found = measure(folder, given.dtype, given.pairs)
    given.json.write_text(json.dumps({"machine": machine(), **found}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def make(folder: Path, tokenizer: str) -> None:
    """The base, in a process of its own: its memory is not the exporter's."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    config = Qwen2Config(**SHAPE, eos_token_id=tokens.eos_token_id, bos_token_id=tokens.bos_token_id)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="1GB")
    tokens.save_pretrained(folder)


def measure(folder: Path, dtype: str, pairs: int) -> dict[str, Any]:
    softprompt = [sys.executable, "-m", "softprompt"]
    np.save(folder / "rows.npy", 0.02 * np.random.default_rng(0).standard_normal((ROWS, SHAPE["hidden_size"])).astype(np.float32))
    base = [f"model.name={folder / 'base'}", f"model.dtype={dtype}"]
    subprocess.run([*softprompt, "import", str(folder / "rows.npy"), "--out", str(folder / "taste"), *base], check=True)
    copying, exporting, peaks = [], [], []
    for _ in range(pairs):
        began = time.perf_counter()
        shutil.copytree(folder / "base", folder / "copy")
        copying.append(time.perf_counter() - began)
        shutil.rmtree(folder / "copy")
        began = time.perf_counter()
        peaks.append(watched([*softprompt, "export", str(folder / "taste"), *base, "--to", "vocab", "--out", str(folder / "out")]))
        exporting.append(time.perf_counter() - began)
        shutil.rmtree(folder / "out")
    return {
        "weights_bytes": sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors")),
        "shards": len(list((folder / "base").glob("*.safetensors"))),
        "copy_seconds": median(copying),
        "export_seconds": median(exporting),
        "seconds_beyond_copying": median(b - a for a, b in zip(copying, exporting, strict=True)),
        "peak_bytes": max(peak["VmRSS"] for peak in peaks),
        "peak_bytes_without_files": max(peak["RssAnon"] for peak in peaks),
    }


def watched(command: list[str]) -> dict[str, int]:
    """Runs it; the most bytes that the process held, by kind."""
    most = {"VmRSS": 0, "RssAnon": 0}
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                continue
            now = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.split(":")[0] in most}
            most = {kind: max(held, now.get(kind, 0)) for kind, held in most.items()}
            time.sleep(0.02)
    assert process.returncode == 0, command
    return most


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
