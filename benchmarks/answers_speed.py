"""A file of questions against the same questions in one list, in tokens per second; and whether kills change a byte of the answers.

    python -m benchmarks.answers_speed [--base FOLDER] [--questions 2000] [--tokens 32] [--rounds 3] [--kills 0] [--json FILE]

Without `--base`, a random llama of two layers. The prompt is random too: what is answered plays no part, how long it takes does. The sides
take turns in one process; the ratios are medians of the rounds, of the clock and of the processor's time: the latter stands still while
other programs run, with one thread (`OMP_NUM_THREADS=1`). `--kills K`: the same file is answered by processes of their own, of which
K are killed by kill -9 at moments that are spread over the answers, and compared with one that nobody killed.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import softprompt
from benchmarks.measuring import machine
from softprompt.answering import Task, answer_file
from softprompt.artifact import StoredPrompt, load_prompt
from softprompt.atomic import write_text
from softprompt.config import ModelConfig, load_config
from softprompt.data import Questions
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase
from softprompt.generation import generate
from softprompt.sampling import Sampling

WORDS = ("where", "is", "my", "parcel", "the", "shoes", "came", "too", "small", "can", "I", "return", "them", "please", "send", "a", "bill")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a folder or .gguf file; left out, random weights")
    for name, default in {"questions": 2000, "tokens": 32, "virtual": 20, "rounds": 3, "kills": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "questions": given.questions, "base": given.base or "random"}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        config = ModelConfig(name=given.base or str(random_base(home / "base")), dtype="float32")
        rows = write_questions(home / "questions.jsonl", given.questions)
        prompt = make_prompt(config, home, given.virtual)
        if given.rounds:
            result |= speed(config, prompt, rows, Sampling(given.tokens), given.rounds)
        if given.kills:
            result |= killed(prompt, rows, given.tokens, given.questions, given.kills)
    print(json.dumps(result, indent=1))
    if given.json:
        write_text(given.json, json.dumps(result, indent=1) + "\n")


def random_base(folder: Path) -> Path:
    """Two layers over bytes."""
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.1,
        max_position_embeddings=1024, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{character: index + 3 for index, character in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def write_questions(file: Path, number: int) -> Path:
    """Questions of 3 to 16 words."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 16))) for _ in range(number)]
    rows = [json.dumps({"id": index, "prompt": text, "completion": "yes"}) + "\n" for index, text in enumerate(texts)]
    file.write_text("".join(rows), encoding="utf-8")
    return file


def make_prompt(config: ModelConfig, home: Path, virtual: int) -> Path:
    """The run folder of a prompt that took one step."""
    few = write_questions(home / "few.jsonl", 4)
    settings = {
        "model": config.model_dump(), "data": {"train": str(few)}, "prompt": {"length": virtual, "init": "random"},
        "train": {"steps": 1, "out": str(home / "run")},
    }  # fmt: skip
    list(softprompt.train(load_config(settings)))
    return home / "run"


# ---- speed ---------------------------------------------------------------------------------------------------------


def speed(config: ModelConfig, run: Path, rows: Path, sampling: Sampling, rounds: int) -> dict[str, Any]:
    """Tokens per second of the file over those of the list, their answers being the same."""
    base = load_base(config)
    prompt = load_prompt(run, base)
    texts = [json.loads(line)["prompt"] for line in rows.read_text(encoding="utf-8").splitlines()]
    generate(base, prompt, texts[:64], sampling)
    spent: dict[str, list[Spent]] = {"list": [], "file": []}
    differing = 0
    for number in range(rounds):
        began = now()
        listed = generate(base, prompt, texts, sampling)
        between = now()
        filed = by_file(base, prompt, rows, sampling, rows.with_name(f"answers-{number}.jsonl"))
        spent["list"].append(between - began)
        spent["file"].append(now() - between)
        differing += sum(one != other for one, other in zip(listed, filed, strict=True))
    tokens = sum(len(base.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in listed)
    pairs = list(zip(spent["list"], spent["file"], strict=True))
    return {
        "spent": {side: [asdict(one) for one in times] for side, times in spent.items()},
        "tokens_per_second": {side: tokens / median(one.seconds for one in times) for side, times in spent.items()},
        "file_over_list": median(first.seconds / second.seconds for first, second in pairs),
        "file_over_list_by_processor": median(first.processor / second.processor for first, second in pairs),
        "answers_that_differ": differing,
    }


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock, and of this process's work."""

    seconds: float
    processor: float

    def __sub__(self, other: "Spent") -> "Spent":
        return Spent(self.seconds - other.seconds, self.processor - other.processor)


def now() -> Spent:
    return Spent(time.perf_counter(), time.process_time())


def by_file(base: FrozenBase, prompt: StoredPrompt, rows: Path, sampling: Sampling, out: Path) -> list[str]:
    """All that the command does once the base is loaded."""
    questions = Questions(str(rows), {})
    found = questions.survey(["answer", "error"])
    for _ in answer_file(Task(base, prompt, questions, found.num_rows, sampling), out, {"questions": found.digest}):
        pass
    return [json.loads(line)["answer"] for line in out.read_text(encoding="utf-8").splitlines()]


# ---- kills ---------------------------------------------------------------------------------------------------------


def killed(run: Path, rows: Path, tokens: int, number: int, kills: int) -> dict[str, Any]:
    """Answers the file with a process that nobody kills, and with as many as are killed once enough of it is answered."""
    straight, out = rows.with_name("straight.jsonl"), rows.with_name("killed.jsonl")
    command = [sys.executable, "-m", "softprompt", "generate", str(run), "--in", str(rows), f"--max-new-tokens={tokens}", "--resume"]
    subprocess.run([*command, "--out", str(straight)], check=True, stderr=subprocess.DEVNULL)
    draw = random.Random(1)
    moments = sorted(draw.randrange(1, number - number // 20) for _ in range(kills))
    ended = []
    for moment in moments:
        with subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and num_lines(out) < moment:
                time.sleep(0.01)
            time.sleep(draw.random() / 10)
            process.kill()
        ended.append(process.returncode)
    assert ended == [-signal.SIGKILL] * kills, f"some ended before they could be killed: {ended}"
    subprocess.run([*command, "--out", str(out)], check=True, stderr=subprocess.DEVNULL)
    return {"kills": kills, "killed_at": moments, "same_bytes": out.read_bytes() == straight.read_bytes(), "bytes": out.stat().st_size}


def num_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


if __name__ == "__main__":
    main()
