"""Answers of many contestants to many rows: mixed in one batch, the longest first."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from softprompt.contestants import Entry
from softprompt.data import Example
from softprompt.decode import Question, Sampling, decode_whole
from softprompt.encode import Encoded, Encoder
from softprompt.errors import DataError
from softprompt.model import FrozenBase
from softprompt.prompt import SoftPrompt, prefix_of

POSITIONS, ROWS = 16384, 64  # of a batch at most: positions that the cache holds, questions


@dataclass(frozen=True)
class Answer:
    """What a contestant said to row number `row`. `ended`: it came to its end before its tokens ran out."""

    contestant: str
    row: int
    text: str
    num_tokens: int
    ended: bool


def answer(
    base: FrozenBase, entries: Mapping[str, Sequence[Entry]], wanted: Sequence[tuple[str, int]], limit: int, stops: Sequence[str] = ()
) -> Iterator[Answer]:
    """Greedy answers of at most `limit` tokens to the wanted (contestant, row) pairs, as they are complete; `stops` end them too.

    Raises DataError for a row that leaves no room for an answer.
    """
    softs: list[SoftPrompt] = []
    places: dict[str, list[int]] = {}
    for name, members in entries.items():
        places[name] = [len(softs) + index for index in range(len(members))]
        softs += [member.asked for member in members]
    with torch.inference_mode():
        prefix = prefix_of(base, softs)
    questions = {
        (name, row): Question(tuple(places[name]), tuple(member.questions[row] for member in entries[name])) for name, row in wanted
    }
    lengths = {pair: question.length(prefix) for pair, question in questions.items()}
    for (name, row), length in lengths.items():
        if base.context_length is not None and length >= base.context_length:
            raise DataError(f"row {row + 1} takes {length} tokens with {name}, the base's context is {base.context_length}")
    sampling = Sampling(max_new_tokens=limit)

    def said(ids: Sequence[int]) -> tuple[str, bool]:
        return first_answer(base.tokenizer.decode(ids, skip_special_tokens=True), stops)

    for group in _groups(lengths, questions, limit):
        for number, ids, ended in decode_whole(base, prefix, [questions[pair] for pair in group], sampling, lambda ids: said(ids)[1]):
            text, stopped = said(ids)
            yield Answer(*group[number], text, len(ids), ended or stopped)


def _groups(
    lengths: Mapping[tuple[str, int], int], questions: Mapping[tuple[str, int], Question], limit: int
) -> Iterator[list[tuple[str, int]]]:
    """The longest questions first, so that those of a batch are about as long as each other."""
    group: list[tuple[str, int]] = []
    rows = 0
    for pair in sorted(lengths, key=lambda pair: -lengths[pair]):
        more = len(questions[pair].which)
        widest = lengths[group[0]] if group else 0
        if group and (rows + more > ROWS or (rows + more) * (widest + limit) > POSITIONS):
            yield group
            group, rows = [], 0
        group.append(pair)
        rows += more
    if group:
        yield group


def limit_of(rows: Iterable[Encoded]) -> int:
    """Tokens that an answer may have: half as many again as the longest response, and 8."""
    longest = max(row.num_supervised for row in rows)
    return longest + longest // 2 + 8


def stops_of(encoders: Iterable[Encoder], examples: Sequence[Example]) -> tuple[str, ...]:
    """What ends an answer: the end of its line, and where a template begins the next question.

    A base that was never told to stop goes on with a next turn of its own, and only its first answer is meant. Whatever a response of
    the rows holds itself ends nothing. The same for all contestants, as the stop texts of every evaluation harness are.
    """
    openings = dict.fromkeys(encoder.opening(examples[0]) for encoder in encoders)
    stops = ("\n", *(f"\n{opening}" for opening in openings if opening))
    return tuple(stop for stop in stops if not any(stop in example.response.strip() for example in examples))


def first_answer(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """(What was said before the first stop text, whether there was one); blanks and line breaks before and after it are left out."""
    text = text.lstrip()
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found, default=None)].rstrip(), bool(found)
