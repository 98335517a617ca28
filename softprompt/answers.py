"""Answers of many contestants to many rows, mixed in one batch, and where they end."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from softprompt.contestants import Reading
from softprompt.data import Example
from softprompt.encode import Encoder
from softprompt.engine.decode import Ends, Question, decode_whole
from softprompt.engine.model import FrozenBase
from softprompt.engine.tokens import Encoded
from softprompt.errors import DataError
from softprompt.generation import Spelled
from softprompt.sampling import Sampling
from softprompt.thinking import Thinking, spoken


@dataclass(frozen=True)
class Answer:
    """What a contestant said to row number `row`. `ended`: it came to its end before its tokens ran out."""

    contestant: str
    row: int
    text: str
    num_tokens: int
    ended: bool


def answer(
    base: FrozenBase, readings: Mapping[str, Sequence[Reading]], wanted: Sequence[tuple[str, int]], limit: int, stops: Sequence[str] = ()
) -> Iterator[Answer]:
    """Greedy answers of at most `limit` tokens to the wanted (contestant, row) pairs, as they are complete; `stops` end them too.

    Raises DataError for a row that leaves no room for an answer.
    """
    sampling, questions = Sampling(max_new_tokens=limit), []
    for name, row in wanted:
        members = readings[name]
        contexts, texts = tuple(member.context for member in members), tuple(member.questions[row] for member in members)
        ends = until(base.tokenizer, stops, members[0].thinking)
        question = Question(contexts, texts, sampling, ends, stop_ids=frozenset[int]().union(*(member.stop_ids for member in members)))
        if base.context_length is not None and question.length >= base.context_length:
            raise DataError(f"row {row + 1} takes {question.length} tokens with {name}, the base's context is {base.context_length}")
        questions.append(question)
    for number, ids, ended in decode_whole(base, questions):
        thinking = readings[wanted[number][0]][0].thinking
        text, stopped = first_answer(base.tokenizer.decode(ids, skip_special_tokens=True), stops, thinking)
        yield Answer(*wanted[number], text, len(ids), ended or stopped)


def until(tokenizer: Any, stops: Sequence[str], thinking: Thinking | None = None) -> Ends:
    """For one question: its answer ends with the token with which the first of the stop texts is there, outside of a thinking block."""
    spelled = Spelled(tokenizer)

    def ends(token: int) -> bool:
        spelled.add(token)
        said = thinking.split(spelled.text, whole=False)[1] if thinking else spelled.text
        return any(stop in said.lstrip() for stop in stops)

    return ends


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop texts."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)]


def limit_of(rows: Iterable[Encoded]) -> int:
    """Tokens that an answer may have: half as many again as the longest response, and 8."""
    longest = max(row.num_supervised for row in rows)
    return longest + longest // 2 + 8


def stops_of(encoders: Sequence[Encoder], examples: Sequence[Example]) -> tuple[str, ...]:
    """What ends an answer: the end of its line, and where a template begins the next question.

    A base that was never told to stop goes on with a next turn of its own, and only its first answer is meant. Whatever a response of
    the rows holds itself ends nothing. The same for all contestants, as the stop texts of every evaluation harness are.
    """
    openings = dict.fromkeys(encoder.opening(examples[0]) for encoder in encoders)
    stops = ("\n", *(f"\n{opening}" for opening in openings if opening))
    said = [reference(encoders[0], example).strip() for example in examples]
    return tuple(stop for stop in stops if not any(stop in text for text in said))


def reference(encoder: Encoder, example: Example) -> str:
    """What a row's response says outside of a thinking block: what an answer is compared with."""
    return spoken(example.response, replace(encoder.thinking, opened=False) if encoder.thinking else None)


def first_answer(text: str, stops: Sequence[str], thinking: Thinking | None = None) -> tuple[str, bool]:
    """(What was said before the first stop text, whether there was one); a thinking block, and blanks and line breaks before and after
    the answer, are left out."""
    text = spoken(text, thinking).lstrip()
    return cut_at(text, stops).rstrip(), any(stop in text for stop in stops)
