"""A run of very many steps on a base that costs next to nothing: what its folder grows to, whether a step stays as cheap, the report.

Random weights and rows of a few words. A step is timed from one Step event to the next, so that its line in the stream, and now and
then a checkpoint, an evaluation and the doctor, are in it.

    python -m benchmarks.long_run --steps 200000 --out FOLDER
"""

import argparse
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from benchmarks.measuring import machine
from benchmarks.workloads import write_rows
from softprompt.config import Config, load_config
from softprompt.events import Step
from softprompt.training import train

WORDS = ("<pad>", "<s>", "</s>", *(f"w{number}" for number in range(29)))
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}


def tiny_base(folder: Path) -> Path:
    """A model folder of a few kilobytes, with one token for every word."""
    set_seed(0)
    settings = LlamaConfig(**SIZES, vocab_size=len(WORDS), max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(settings).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def configured(home: Path, steps: int, save_every: int, eval_every: int) -> Config:
    rows = [{"prompt": WORDS[3 + number % 7], "completion": WORDS[3 + number % 5]} for number in range(20)]
    files = [write_rows(home / "train.jsonl", rows[:16]), write_rows(home / "eval.jsonl", rows[16:])]
    base = {"name": str(tiny_base(home / "base")), "device": "cpu", "dtype": "float32"}
    data = {"train": str(files[0]), "eval": str(files[1]), "template": "{{ prompt }} ", "max_length": 8}
    how = {"steps": steps, "examples_per_step": 1, "save_every": save_every, "eval_every": eval_every, "out": str(home / "run")}
    return load_config({"model": base, "data": data, "prompt": {"length": 4}, "train": how})


def size(folder: Path, *, without: str) -> tuple[int, int]:
    """Bytes and number of the files in a folder, but for one."""
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != without]
    return sum(sizes), len(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"steps": 200_000, "save-every": 50, "eval-every": 1000}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, required=True, help="a folder to make, for base, rows and run")
    given = parser.parse_args()
    print(machine(), flush=True)
    given.out.mkdir(parents=True)
    began, moments = time.perf_counter(), []
    for event in train(configured(given.out, given.steps, given.save_every, given.eval_every)):
        if isinstance(event, Step):
            moments.append(time.perf_counter())
            if event.step % max(1, given.steps // 20) == 0:
                print(f"step {event.step:,} after {moments[-1] - began:.0f} s", flush=True)
    run, seconds = given.out / "run", [after - before for before, after in pairwise(moments)]
    tenth = len(seconds) // 10
    for name, own in (("first", seconds[:tenth]), ("last", seconds[-tenth:])):
        print(f"a step of the {name} tenth: mean {1000 * fmean(own):.2f} ms, median {1000 * median(own):.2f} ms")
    kept = sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())
    num_bytes, num_files = size(run, without="metrics.jsonl")
    print(f"{given.steps // given.save_every:,} checkpoints were written, {len(kept)} are there: {', '.join(map(str, kept))}")
    print(f"run folder without metrics.jsonl: {num_bytes / 1e6:.2f} MB in {num_files} files")
    print(f"metrics.jsonl: {(run / 'metrics.jsonl').stat().st_size / 1e6:.1f} MB")
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "softprompt", "report", str(run)], check=True, stdout=subprocess.DEVNULL)
    print(f"softprompt report: {time.perf_counter() - began:.1f} s, {(run / 'report.html').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
