"""Answers to texts, with one soft prompt or several side by side in one batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from softprompt.artifact import StoredPrompt
from softprompt.data import Message
from softprompt.encode import Encoder
from softprompt.engine.decode import Question, Token, decode
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import no_prompt
from softprompt.engine.rows import Base, Held
from softprompt.errors import ConfigError, DataError
from softprompt.sampling import Sampling
from softprompt.thinking import Told


@dataclass(frozen=True)
class Ensemble:
    """Prompts that answer together: they agree on every token, `by` the "mean" of their log-probabilities or by "vote" (greedy only)."""

    prompts: tuple[StoredPrompt, ...]
    by: Literal["mean", "vote"] = "mean"


Answerer = StoredPrompt | Ensemble
Asked = str | Sequence[Message]  # a text, or a conversation that ends with the turn to answer


@dataclass(frozen=True)
class Piece:
    """The next piece of text number `row`'s answer; `last` when it is complete. `thought`: of a thinking block in front of it."""

    row: int
    text: str
    last: bool
    thought: str = ""


def generate(
    base: FrozenBase | Held, prompts: Answerer | Sequence[Answerer], texts: Sequence[Asked], sampling: Sampling = Sampling()
) -> list[str]:
    """One answer per text. `prompts`: one prompt or ensemble for all texts, or one for each, which may differ in length and position.

    A text may be a conversation instead: its messages, the one to answer last. Raises what `stream` raises.
    """
    answers = [""] * len(texts)
    for piece in stream(base, prompts, texts, sampling):
        answers[piece.row] += piece.text
    return answers


def stream(
    base: FrozenBase | Held, prompts: Answerer | Sequence[Answerer], texts: Sequence[Asked], sampling: Sampling = Sampling()
) -> Iterator[Piece]:
    """Like `generate`, piece by piece as the tokens come. Raises DataError for a text that is empty, that leaves no room for an answer,
    or that a template cannot write."""
    each = [prompts] * len(texts) if isinstance(prompts, StoredPrompt | Ensemble) else list(prompts)
    if len(each) != len(texts):
        raise DataError(f"{len(each)} prompts for {len(texts)} texts: give one for all, or one for each")
    together = [one if isinstance(one, Ensemble) else Ensemble((one,)) for one in each]
    check_sampling(sampling, together)
    yield from pieces_of(base, together, [prepared(base, one, text, sampling) for one, text in zip(together, texts, strict=True)])


def prepared(base: FrozenBase | Held, one: Ensemble, text: Asked, sampling: Sampling) -> Question:
    """A text as `pieces_of` takes it. Raises DataError as `stream` does."""
    ids = tuple(asked_ids(prompt.encoder, text) for prompt in one.prompts)
    stop_ids = frozenset[int]().union(*(prompt.encoder.end_ids for prompt in one.prompts))
    question = Question(tuple((prompt.soft, ()) for prompt in one.prompts), ids, sampling, by=one.by, stop_ids=stop_ids)
    if base.context_length is not None and question.length >= base.context_length:
        needed = question.length
        raise DataError(f"a text with its prompt takes {needed} tokens, the base's context is {base.context_length}: shorten the text")
    return question


def pieces_of(base: FrozenBase | Held, each: Sequence[Ensemble], questions: Sequence[Question]) -> Iterator[Piece]:
    """Like `stream`, of texts that are `prepared`, `each` for its own."""
    yield from _as_text(base, decode(base, questions), [Told(one.prompts[0].encoder.thinking) for one in each])


def without_prompt(base: FrozenBase | Held, prompt: StoredPrompt) -> StoredPrompt:
    """The bare base behind the same template, to show what an answer was like before."""
    return replace(prompt, soft=no_prompt(base, prompt.encoder.bos_id))


def check_sampling(sampling: Sampling, together: Sequence[Ensemble] = ()) -> None:
    """Raises ConfigError for a value that makes no sense."""
    sampling.check()
    if sampling.temperature > 0 and any(one.by == "vote" for one in together):
        raise ConfigError("a vote has no probabilities to sample from: temperature must be 0, or the ensemble a mean")


def asked_ids(encoder: Encoder, text: Asked, *, trained: bool = True) -> tuple[int, ...]:
    """Ids of what is asked; `trained` as in Encoder.question. Raises DataError for an empty text, and one that no template can write."""
    last = text if isinstance(text, str) else text[-1].content if text else ""
    if not last.strip():
        raise DataError("the text is empty: there is nothing to answer")
    if not isinstance(text, str) and text[-1].role in ("assistant", "system"):
        raise DataError(f"a conversation to answer ends with a question, this one with a turn of the {text[-1].role}")
    return encoder.question(text, trained=trained)


# ---- tokens become text --------------------------------------------------------------------------------------------


class Spelled:
    """The text of tokens that come one by one: only the last few are decoded, whatever came before them. A character that is still
    incomplete waits for its next token, or for the end."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.text = ""
        self._ids: list[int] = []
        self._begun = self._spelled = 0  # ids[begun:spelled] are spelled, and decoded again only to know how the next ones join them

    def add(self, token: int) -> str:
        """What the text grows by."""
        self._ids.append(token)
        return self._grow(whole=False)

    def end(self) -> str:
        """What is left, whole or not."""
        return self._grow(whole=True)

    def _grow(self, whole: bool) -> str:
        before = self._decoded(self._spelled)
        after = self._decoded(len(self._ids))
        if after.endswith("\ufffd") and not whole:
            return ""
        new = after[len(before) :]
        self._begun, self._spelled = self._spelled if new else self._begun, len(self._ids)  # special tokens are no text to join
        self.text += new
        return new

    def _decoded(self, end: int) -> str:
        text: str = self.tokenizer.decode(self._ids[self._begun : end], skip_special_tokens=True)
        return text


def _as_text(base: Base, tokens: Iterator[Token], told: Sequence[Told]) -> Iterator[Piece]:
    spelled = [Spelled(base.tokenizer) for _ in told]
    for token in tokens:
        text = "" if token.id is None else spelled[token.row].add(token.id)
        if token.last:
            text += spelled[token.row].end()
        thought, said = told[token.row].add(text, last=token.last)
        if said or thought or token.last:
            yield Piece(token.row, said, token.last, thought)
