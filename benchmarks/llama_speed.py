"""A GGUF file that llama.cpp holds: answers behind 20 prompts, rows and keys and values mixed, 16 at once, against llama.cpp's own server
on the bare base, both with a cache in float16. The two take turns; tokens a second of both, medians and their ratio, and the memory that a
process of ours has at its most.

    python -m benchmarks.llama_speed FILE.gguf [--answers 64] [--tokens 64] [--rounds 3]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.measuring import machine
from softprompt.config import ModelConfig
from softprompt.engine.decode import OpenBatch, Question, Token
from softprompt.engine.prompt import DeepPrompt, Prompt, SoftPrompt
from softprompt.llama.base import GgufBase, load_gguf
from softprompt.sampling import Sampling

AT_ONCE, PROMPTS, LENGTH, TEXT = 16, 20, 32, 64


def some_prompts(base: GgufBase) -> Iterator[Prompt]:
    """Of random numbers: only how many there are matters."""
    generator = torch.Generator().manual_seed(0)
    width, bos = sum(heads * size for heads, size in base.shapes), base.tokenizer.bos_token_id
    for number in range(PROMPTS):
        if number % 2:
            states_PD = 0.1 * torch.randn(LENGTH, width, generator=generator)
            yield DeepPrompt(states_PD, "start", bos, torch.ones(width), base.shapes)
        else:
            yield SoftPrompt(0.1 * torch.randn(LENGTH, base.hidden_size, generator=generator), "start", bos)


def ours(file: Path, answers: int, tokens: int, ids: tuple[int, ...]) -> dict[str, float]:
    base = load_gguf(ModelConfig(gguf_file=str(file), device="cpu"))
    prompts, batch = list(some_prompts(base)), OpenBatch(base)
    endless = Sampling(tokens, logit_bias=dict.fromkeys(base.stop_ids, -1e9))
    questions = [Question(((prompts[number % PROMPTS], ()),), (ids,), endless) for number in range(answers)]
    batch.admit([Question(((prompt, ()),), (ids,), Sampling(1)) for prompt in prompts])  # each is read once
    while batch.arriving or batch.answers:
        batch.advance()
    began, spent, count = time.perf_counter(), time.process_time(), 0
    while questions or batch.answers:
        while questions and batch.num_rows < AT_ONCE:
            batch.admit([questions.pop()])
        count += sum(isinstance(event, Token) for event in batch.advance())
    seconds, spent = time.perf_counter() - began, time.process_time() - spent
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tokens_per_second": count / seconds, "per_cpu_second": count / spent, "memory_of_file": peak / file.stat().st_size}


def theirs(file: Path, answers: int, tokens: int, text: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.serve_llama", str(file), str(AT_ONCE), str(tokens), "F16"]
    with tempfile.TemporaryFile("w+") as texts:
        json.dump([text] * answers, texts)
        texts.seek(0)
        done = subprocess.run(command, stdin=texts, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    text = "bring tea " * (TEXT // 2)
    ids = tuple(load_ids(given.file, text))
    found: dict[str, list[dict[str, float]]] = {"llama.cpp's server, bare base": [], "ours, 20 prompts": []}
    for _ in range(given.rounds):
        for name, call in zip(found, (partial(theirs, text=text), partial(ours, ids=ids)), strict=True):
            found[name].append(call(given.file, given.answers, given.tokens))
            print(json.dumps({name: found[name][-1]}), flush=True)
    medians = {name: {what: median(one[what] for one in rounds) for what in rounds[0]} for name, rounds in found.items()}
    theirs_, ours_ = medians.values()
    ratios = {what: ours_[what] / theirs_[what] for what in ("tokens_per_second", "per_cpu_second")}
    print(json.dumps({"machine": machine(), "medians": medians, "ours by theirs": ratios}))


def load_ids(file: Path, text: str) -> list[int]:
    from softprompt.engine.loading import load_tokenizer

    return list(load_tokenizer(ModelConfig(gguf_file=str(file)))(text, add_special_tokens=False)["input_ids"])


if __name__ == "__main__":
    main()
