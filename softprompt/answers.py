"""Answers of many contestants to many rows: mixed in one batch, the longest first."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from softprompt.contestants import Entry
from softprompt.decode import Question, Sampling, decode_whole
from softprompt.encode import Encoded
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


def answer(base: FrozenBase, entries: Mapping[str, Sequence[Entry]], wanted: Sequence[tuple[str, int]], limit: int) -> Iterator[Answer]:
    """Greedy answers of at most `limit` tokens to the wanted (contestant, row) pairs, as they are complete.

    Raises DataError for a row that leaves no room for an answer.
    """
    softs: list[SoftPrompt] = []
    places: dict[str, list[int]] = {}
    for name, members in entries.items():
        places[name] = [len(softs) + index for index in range(len(members))]
        softs += [member.soft for member in members]
    with torch.inference_mode():
        prefix = prefix_of(base, softs)
    questions = {
        (name, row): Question(tuple(places[name]), tuple(question_of(member.rows[row][0]) for member in entries[name]))
        for name, row in wanted
    }
    lengths = {pair: question.length(prefix) for pair, question in questions.items()}
    for (name, row), length in lengths.items():
        if base.context_length is not None and length >= base.context_length:
            raise DataError(f"row {row + 1} takes {length} tokens with {name}, the base's context is {base.context_length}")
    sampling = Sampling(max_new_tokens=limit)
    for group in _groups(lengths, questions, limit):
        for number, ids, ended in decode_whole(base, prefix, [questions[pair] for pair in group], sampling):
            yield Answer(*group[number], base.tokenizer.decode(ids, skip_special_tokens=True), len(ids), ended)


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


def question_of(row: Encoded) -> tuple[int, ...]:
    """The ids before the last answer of a row."""
    end = len(row) - row.supervised[::-1].index(True)
    start = end - 1
    while start and row.supervised[start - 1]:
        start -= 1
    return row.ids[:start]
