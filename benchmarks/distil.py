"""What a distilled prompt keeps of its teacher, and what the teacher costs.

    python -m benchmarks.distil demo --base FOLDER --results FILE [--seeds 3] [--set section.key=value ...]
    python -m benchmarks.distil system --base FOLDER --results FILE ...
    python -m benchmarks.distil starts --base FOLDER --results FILE [--lengths 32 64] ...
    python -m benchmarks.distil articles --base FOLDER --file xquad.json --results FILE [--count 8] ...
    python -m benchmarks.distil cost --base FOLDER --results FILE

Every finished run becomes a line of the file at once, and one that the file holds already is not repeated. `demo`: the demo's 15 examples
into 59 positions, the training messages without their answers. `system`: the rules of system_prompt.md into 32 positions. `starts`: the
same rules with the same steps from every start of keys and values: the divergence on held-out questions before, half-way and after.
`articles`: texts in SQuAD's format, self-study alone; their own questions only measure. `cost`: seconds of the teacher's part of a step by
the text's length, beside reading the text again with every row, as PEFT's example does.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from benchmarks.distil_tasks import SYSTEM, articles, checks, customers, token_f1
from benchmarks.measuring import machine
from benchmarks.quality import append, read
from softprompt.artifact import StoredPrompt, load_prompt
from softprompt.config import Config, ModelConfig, load_config
from softprompt.data import Example, Loaded, Message, load_examples
from softprompt.demo import HOME
from softprompt.distil.study import study_of
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import no_prompt
from softprompt.engine.teacher import Teacher
from softprompt.engine.tokens import Encoded
from softprompt.evaluation import Contest, evaluate
from softprompt.events import Evaluated, Finished
from softprompt.results import Evaluation
from softprompt.runlog import RunFolder
from softprompt.training import train

ASKED, MEASURED = 240, 60  # customers' questions to learn from, and to measure on
LENGTHS = (100, 250, 500, 1000, 2000, 4000)  # tokens of a text
ROWS, ROW, SUPERVISED, REPEATS = 8, 80, 40, 5  # of a step: rows, their tokens; how often it is timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(WORK))
    parser.add_argument("--base", required=True, help="a folder")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--file", type=Path, help="articles in SQuAD's format")
    parser.add_argument("--count", type=int, default=8, help="articles")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32], help="positions, in starts")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/distil"), help="where run folders are kept")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting; repeatable")
    parser.add_argument("--results", required=True, type=Path, help="JSONL, a run per line")
    given = parser.parse_args()
    base = load_base(ModelConfig(name=given.base, dtype=given.dtype))
    for line in WORK[given.what](base, given):
        append(given.results, {**line, "base": Path(given.base).name, "dtype": given.dtype, "settings": given.set, "machine": machine()})
        print(json.dumps(line, ensure_ascii=False), flush=True)


def known(given: argparse.Namespace, key: str) -> bool:
    return given.results.exists() and key in read(given.results)


def distilled(base: FrozenBase, given: argparse.Namespace, key: str, own: Sequence[str]) -> tuple[Config, StoredPrompt, dict[str, Any]]:
    """A finished run of these settings, its prompt and what came of it."""
    out = given.runs / key.replace("/", "-")
    config = load_config(None, [f"model.name={given.base}", f"model.dtype={given.dtype}", *own, *given.set, f"train.out={out}"])
    began = time.perf_counter()
    *_, finished = train(config, base=base, resume=out.exists())
    assert isinstance(finished, Finished), "a run ends with its result"
    result = finished.result
    facts = {**result["distilled"], "seconds": result["seconds"], "whole_seconds": time.perf_counter() - began}
    return config, load_prompt(result["prompt"], base), facts


def compared(base: FrozenBase, config: Config, prompt: StoredPrompt, rows: Loaded, limit: int) -> Evaluation:
    contest = Contest(answers=True, max_new_tokens=limit, context=study_of(config, base).context)
    return evaluate(base, prompt, rows, contest, out=Path(config.train.out) / "evaluations")


def key_of(given: argparse.Namespace, *parts: object) -> str:
    return "/".join(map(str, (given.what, Path(given.base).name, *parts, *given.set))).replace(" ", "")


# ---- examples ------------------------------------------------------------------------------------------------------


def demo(base: FrozenBase, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    own = [
        f"data.train={HOME / 'train.jsonl'}", f"data.eval={HOME / 'eval.jsonl'}", "data.max_length=128",
        "distil.examples=15", "distil.max_new_tokens=60", "prompt.method=prefix", "prompt.init=context", "prompt.length=59",
        "prompt.position=after_bos", "train.steps=100", "train.examples_per_step=8", "train.eval_every=50",
    ]  # fmt: skip
    test = load_examples(str(HOME / "test.jsonl"))
    for seed in range(given.seeds):
        key = key_of(given, seed)
        if not known(given, key):
            config, prompt, facts = distilled(base, given, key, [*own, f"train.seed={seed}"])
            yield {"key": key, "seed": seed, **facts, "scores": scores(compared(base, config, prompt, test, 60))}


def scores(evaluation: Evaluation) -> dict[str, dict[str, list[float]]]:
    """Every contestant's scores with their intervals."""
    return {
        name: {metric: [one.value, one.low, one.high] for metric, one in result.scores.items()}
        for name, result in evaluation.contestants.items()
    }


# ---- a system prompt -----------------------------------------------------------------------------------------------


def of_system(given: argparse.Namespace, asked: Sequence[tuple[str, str]]) -> list[str]:
    """The settings of a run on the system prompt."""
    given.runs.mkdir(parents=True, exist_ok=True)
    questions = given.runs / "customers.txt"
    questions.write_text("".join(question + "\n" for _, question in asked[MEASURED:]), encoding="utf-8")
    return [
        f"distil.file={SYSTEM}", f"distil.questions={questions}", "distil.max_new_tokens=96", "data.template=chat", "data.max_length=192",
        "prompt.method=prefix", "prompt.init=context", "prompt.length=32", "train.steps=120", "train.examples_per_step=8",
        "train.eval_every=60",
    ]  # fmt: skip


def system(base: FrozenBase, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    asked = customers(ASKED + MEASURED, 0)
    own = of_system(given, asked)
    rows = tuple(Example((Message("user", text), Message("assistant", "-")), text) for _, text in asked[:MEASURED])
    kinds = [kind for kind, _ in asked[:MEASURED]]
    for seed in range(given.seeds):
        key = key_of(given, seed)
        if known(given, key):
            continue
        config, prompt, facts = distilled(base, given, key, [*own, f"train.seed={seed}"])
        found = compared(base, config, prompt, Loaded(rows, ()), 96)
        kept = {name: checks(kinds, result.table.answers or ()) for name, result in found.contestants.items()}
        teacher = [number for number, passed in enumerate(kept["teacher"]) if passed]
        share = {name: fmean(passed[number] for number in teacher) for name, passed in kept.items()}
        whole = {name: fmean(passed) for name, passed in kept.items()}
        yield {"key": key, "seed": seed, **facts, "of_the_teachers": share, "checks": whole, "num_checks": len(kept["teacher"])}


STARTS = ("context", "spread", "states", "matching")


def starts(base: FrozenBase, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All starts of a seed are one bank: the same questions, answers, rows and steps."""
    own = of_system(given, customers(ASKED + MEASURED, 0))
    each = [(f"{start}-{length}", start, length) for length in given.lengths for start in STARTS]
    members = (f'{{name = "{name}", prompt = {{init = "{start}", length = {length}}}}}' for name, start, length in each)
    bank = f"prompt.bank=[{', '.join(members)}]"
    for seed in range(given.seeds):
        key = key_of(given, *given.lengths, seed)
        if not known(given, key):
            config, _, facts = distilled(base, given, key, [*own, bank, f"train.seed={seed}"])
            measured = [event for event in RunFolder.reopen(Path(config.train.out)).stream() if isinstance(event, Evaluated)]
            curves = {name: {event.step: event.losses[index] for event in measured} for index, (name, _, _) in enumerate(each)}
            yield {"key": key, "seed": seed, **facts, "kl": curves}


# ---- articles ------------------------------------------------------------------------------------------------------

TOLD = {"en": "Answer questions about this text in a few words.", "zh": "用几个字回答关于这篇文字的问题。"}


def of_articles(base: FrozenBase, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    language = "zh" if "zh" in given.file.name else "en"
    found = articles(given.file, 600, 2000, lambda text: len(base.tokenizer(text)["input_ids"]), given.count)
    for article in found:
        key = key_of(given, language, article.title)
        if known(given, key):
            continue
        length = len(base.tokenizer(article.text)["input_ids"]) // 8
        text = json.dumps(f"{TOLD[language]}\n\n{article.text}", ensure_ascii=False)
        own = [
            f"distil.text={text}", "distil.max_new_tokens=32", "data.max_length=160",
            "prompt.method=prefix", "prompt.init=spread", f"prompt.length={length}", "train.steps=150", "train.examples_per_step=8",
            "train.eval_every=75", f"data.template={'chat' if base.tokenizer.chat_template else PLAIN}",
        ]  # fmt: skip
        config, prompt, facts = distilled(base, given, key, own)
        rows = tuple(
            Example((Message("user", q), Message("assistant", right[0])), q, fields={"prompt": q}) for q, right in article.questions
        )
        evaluation = compared(base, config, prompt, Loaded(rows, ()), 32)
        f1 = {
            name: fmean(token_f1(said, right) for said, (_, right) in zip(result.table.answers or (), article.questions, strict=True))
            for name, result in evaluation.contestants.items()
        }
        yield {"key": key, "title": article.title, "num_questions": len(rows), **facts, "f1": f1, "scores": scores(evaluation)}


PLAIN = "Question: {{ prompt }}\nAnswer:\n"  # of a base that knows no turns


# ---- what a teacher costs ------------------------------------------------------------------------------------------


def cost(base: FrozenBase, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A step's rows as the teacher reads them: behind keys and values that are kept, and with the text before each of them."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(10, base.num_tokens, (max(LENGTHS) + ROWS * ROW,), generator=draw).tolist()
    texts, rows = ids[: max(LENGTHS)], [ids[max(LENGTHS) + row * ROW :][:ROW] for row in range(ROWS)]
    supervised = (*(False,) * (ROW - SUPERVISED), *(True,) * SUPERVISED)
    bare = no_prompt(base, base.tokenizer.bos_token_id)
    for length in LENGTHS:
        key = key_of(given, length)
        if known(given, key):
            continue
        text = tuple(texts[:length])
        kept = Teacher(((bare, text),), [Encoded(tuple(row), supervised) for row in rows], [0] * ROWS)
        whole = [Encoded((*text, *row), ((False,) * length + supervised)) for row in rows]
        again = Teacher(((bare, ()),), whole, [0] * ROWS)
        ours, theirs = [], []
        kept.states(base, range(ROWS))
        for _ in range(REPEATS):  # in turn
            ours.append(seconds(base, kept, [range(ROWS)]))
            theirs.append(seconds(base, again, [[row] for row in range(ROWS)]))
        yield {"key": key, "tokens": length, "kept": median(ours), "again": median(theirs), "ratio": median(theirs) / median(ours)}


def seconds(base: FrozenBase, teacher: Teacher, batches: Sequence[Sequence[int]]) -> float:
    began = time.perf_counter()
    for numbers in batches:
        teacher.states(base, numbers)
    return time.perf_counter() - began


WORK = {"demo": demo, "system": system, "starts": starts, "articles": of_articles, "cost": cost}

if __name__ == "__main__":
    main()
