"""What is compared: the workloads, the manners in which PEFT is used, and rows of the wanted lengths, made up or cut from a data file."""

import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import NormalDist
from typing import Literal

from softprompt.data import load_examples
from softprompt.encode import Encoder
from softprompt.engine.tokens import Encoded
from softprompt.errors import DataError

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
PROMPT_TEXT = "Below is a conversation between a person and a helpful assistant, who answers every question."
ATTEMPTS = 50  # texts tried until one has exactly the wanted number of tokens
WORDS = (
    "the of and to in is that for it was on are as with they at be this from have or by one had not but what all were when we "
    "there can an your which their said if do will each about how up out them then she many some so these would other into has "
    "more her two like him see time could no make than first been its who now people my made over did down only way find use may "
    "water long little very after words called just where most know get through back much before go good new write our used me "
    "man too any day same right look think also around another came come work three word must because does part even place well"
)


@dataclass(frozen=True)
class Profile:
    """Lengths of rows in tokens, BOS included: log-normal around `mean`, cut at both ends. `sigma`: spread of the logarithm.

    Supervised tokens (EOS included) are `share` of a row, or evenly one of `labels` for rows that end with a label word.
    """

    mean: int
    shortest: int
    longest: int
    sigma: float
    share: float = 0.0
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Workload:
    """`takes_data`: rows come from --data where it is given; `joined`: several of its answers make one row.

    `manners`: how PEFT is used, keys of MANNERS; the last one gives the result its top-level numbers. Without any, a bank of
    `num_prompts` is compared with as many runs of ours, one after another.
    """

    virtual_tokens: int
    examples_per_step: int
    profile: Profile
    manners: tuple[str, ...]
    num_prompts: int = 1
    takes_data: bool = True
    joined: bool = False


@dataclass(frozen=True)
class Manner:
    """A way to use PEFT. `dtype`: None is whatever ours computes in. Of several batch sizes, a trial picks the fastest."""

    dtype: Dtype | None
    batch_sizes: tuple[int, ...]
    grouped: bool


INSTRUCTIONS = Profile(mean=136, shortest=20, longest=256, sigma=0.6, share=113 / 136)
LABELS = Profile(mean=40, shortest=20, longest=60, sigma=0.25, labels=(2, 3))  # a label word of one or two tokens, and EOS
TEXTS = Profile(mean=980, shortest=900, longest=1024, sigma=0.04, share=0.8)

WORKLOADS = {
    "tutorial": Workload(virtual_tokens=17, examples_per_step=16, profile=INSTRUCTIONS, manners=("tutorial",)),
    "tuned": Workload(virtual_tokens=17, examples_per_step=16, profile=INSTRUCTIONS, manners=("best",)),
    "classify": Workload(virtual_tokens=100, examples_per_step=32, profile=LABELS, manners=("tutorial", "best"), takes_data=False),
    "long": Workload(virtual_tokens=17, examples_per_step=4, profile=TEXTS, manners=("best",), joined=True),
    "bank": Workload(virtual_tokens=16, examples_per_step=8, profile=LABELS, manners=(), num_prompts=8, takes_data=False),
}

MANNERS = {
    "tutorial": Manner(dtype="float32", batch_sizes=(2,), grouped=False),
    "best": Manner(dtype=None, batch_sizes=(1, 2, 4, 8, 16), grouped=True),
}


# ---- their rows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Pieces of text to build rows from. `exact`: a text must have exactly the wanted tokens (not every script allows that)."""

    pieces: tuple[str, ...]
    separator: str
    exact: bool


WORD_SOURCE = Source(tuple(WORDS.split()), " ", exact=True)


def make_rows(workload: Workload, num_rows: int, encoder: Encoder, data: str | None, seed: int) -> list[dict[str, str]]:
    """`num_rows` rows of a workload; from the file `data` where one is given and the workload takes it."""
    if data is None or not workload.takes_data:
        return built_rows(workload.profile, num_rows, encoder, WORD_SOURCE, seed)
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in _usable(data, encoder, workload.profile.longest)]
    if workload.joined:
        answers = Source(tuple(row["completion"] for row in rows), "\n\n", exact=False)
        return built_rows(workload.profile, num_rows, encoder, answers, seed)
    return [rows[index % len(rows)] for index in range(num_rows)]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """A JSONL file that softprompt reads."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: str, encoder: Encoder, max_length: int) -> tuple[Encoded, ...]:
    """The rows of a JSONL file, encoded as a run of ours encodes them."""
    return tuple(encoder.encode(example, max_length) for example in load_examples(path).examples)


def _usable(data: str, encoder: Encoder, max_length: int) -> list[tuple[str, str]]:
    """(question, answer) of every row that the encoder accepts."""
    pairs = []
    for example in load_examples(data).examples:
        try:
            encoder.encode(example, max_length)
        except DataError:
            continue
        pairs.append((example.messages[-2].content, example.response))
    return pairs


def built_rows(profile: Profile, num_rows: int, encoder: Encoder, source: Source, seed: int) -> list[dict[str, str]]:
    """Rows of the profile's lengths, in shuffled order. A question has at least what the template takes, and a letter."""
    random = Random(seed)
    lengths = spread_lengths(profile, num_rows)
    random.shuffle(lengths)
    shortest_question = len(encoder.question("a"))
    rows = []
    for index, length in enumerate(lengths):
        supervised = profile.labels[index % len(profile.labels)] if profile.labels else max(2, round(length * profile.share))
        question = max(shortest_question, length - supervised - (encoder.bos_id is not None))
        rows.append(
            {
                "prompt": text_of(source, question, lambda text: len(encoder.question(text)), random),
                "completion": text_of(source, supervised - 1, lambda text: _num_tokens(encoder, text), random),  # EOS follows
            }
        )
    return rows


def spread_lengths(profile: Profile, count: int) -> list[int]:
    """Ascending row lengths with the profile's mean: evenly spaced quantiles, so that a few rows have the profile, too."""
    normal = [NormalDist().inv_cdf((index + 0.5) / count) for index in range(count)]

    def lengths(median: int) -> list[int]:
        return [round(min(profile.longest, max(profile.shortest, median * math.exp(profile.sigma * z)))) for z in normal]

    medians = range(1, 2 * profile.longest)
    return lengths(medians[bisect_left(medians, profile.mean * count, key=lambda median: sum(lengths(median)))])


def text_of(source: Source, num_tokens: int, count: Callable[[str], int], random: Random) -> str:
    """Text from the source's pieces with `num_tokens` tokens as `count` counts them (a few less where not `exact`)."""
    for _ in range(ATTEMPTS):
        text = _cut(_enough(source, num_tokens, count, random), num_tokens, count)
        if count(text) == num_tokens or (text and not source.exact):
            return text
    raise ValueError(f"with this tokenizer no text was found that has exactly {num_tokens} tokens")


def _enough(source: Source, num_tokens: int, count: Callable[[str], int], random: Random) -> str:
    text, length = random.choice(source.pieces), num_tokens
    while count(text) <= num_tokens:
        length *= 2
        while len(text) < length:
            text += source.separator + random.choice(source.pieces)
    return text


def _cut(text: str, num_tokens: int, count: Callable[[str], int]) -> str:
    """A beginning of the text with at most `num_tokens` tokens, of which one more character would make more."""
    longer = bisect_right(range(1, len(text)), num_tokens, key=lambda size: count(text[:size].rstrip()))
    return text[:longer].rstrip()


def _num_tokens(encoder: Encoder, text: str) -> int:
    return len(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
