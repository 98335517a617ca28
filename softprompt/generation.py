"""Answers to texts, with one soft prompt or several side by side in one batch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from softprompt.artifact import StoredPrompt
from softprompt.decode import Question, Sampling, Token, decode
from softprompt.encode import Encoder
from softprompt.errors import ConfigError, DataError
from softprompt.model import FrozenBase
from softprompt.prompt import no_prompt, prefix_of

Together = StoredPrompt | tuple[StoredPrompt, ...]
Prompts = Together | Sequence[Together]


@dataclass(frozen=True)
class Piece:
    """The next piece of text number `row`'s answer; `last` when it is complete."""

    row: int
    text: str
    last: bool


def generate(base: FrozenBase, prompts: Prompts, texts: Sequence[str], sampling: Sampling = Sampling()) -> list[str]:
    """One answer per text. `prompts`: one for all texts, or one for each, which may differ in length and position; a tuple of
    prompts in the place of one answers together, as an ensemble."""
    answers = [""] * len(texts)
    for piece in stream(base, prompts, texts, sampling):
        answers[piece.row] += piece.text
    return answers


def stream(base: FrozenBase, prompts: Prompts, texts: Sequence[str], sampling: Sampling = Sampling()) -> Iterator[Piece]:
    """Like `generate`, piece by piece as the tokens come. Raises DataError for a text that leaves no room for an answer."""
    each = [prompts] * len(texts) if isinstance(prompts, StoredPrompt | tuple) else list(prompts)
    if len(each) != len(texts):
        raise DataError(f"{len(each)} prompts for {len(texts)} texts: give one for all, or one for each")
    check_sampling(sampling)
    members = [one if isinstance(one, tuple) else (one,) for one in each]
    ids = [tuple(_question(prompt.encoder, text) for prompt in one) for one, text in zip(members, texts, strict=True)]
    if not texts:
        return
    distinct = list({id(prompt): prompt for one in members for prompt in one}.values())
    number = {id(prompt): index for index, prompt in enumerate(distinct)}
    questions = [Question(tuple(number[id(prompt)] for prompt in one), own) for one, own in zip(members, ids, strict=True)]
    with torch.inference_mode():
        prefix = prefix_of(base, [prompt.soft for prompt in distinct])
    needed = max(question.length(prefix) for question in questions)
    if base.context_length is not None and needed >= base.context_length:
        raise DataError(f"a text with its prompt takes {needed} tokens, the base's context is {base.context_length}: shorten the text")
    yield from _as_text(base, decode(base, prefix, questions, sampling), len(texts))


def without_prompt(base: FrozenBase, prompt: StoredPrompt) -> StoredPrompt:
    """The bare base behind the same template, to show what an answer was like before."""
    return replace(prompt, soft=no_prompt(base, prompt.encoder.bos_id))


def check_sampling(sampling: Sampling) -> None:
    """Raises ConfigError for a value that makes no sense."""
    if sampling.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, this is {sampling.max_new_tokens}")
    if not 0 <= sampling.temperature < math.inf:
        raise ConfigError(f"temperature must be 0 or a positive number, this is {sampling.temperature}")
    if not 0 < sampling.top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1, this is {sampling.top_p}")
    if sampling.ensemble == "vote" and sampling.temperature > 0:
        raise ConfigError("a vote has no probabilities to sample from: temperature must be 0, or the ensemble a mean")
    if sampling.top_k < 0:
        raise ConfigError(f"top_k must not be negative, this is {sampling.top_k}")


def _question(encoder: Encoder, text: str) -> tuple[int, ...]:
    if not text.strip():
        raise DataError("the text is empty: there is nothing to answer")
    return encoder.question(text)


def _as_text(base: FrozenBase, tokens: Iterator[Token], num_rows: int) -> Iterator[Piece]:
    """Decodes each row as it grows; a character that is still incomplete waits for its next token."""
    ids: list[list[int]] = [[] for _ in range(num_rows)]
    shown = [0] * num_rows
    for token in tokens:
        if token.id is not None:
            ids[token.row].append(token.id)
        text = base.tokenizer.decode(ids[token.row], skip_special_tokens=True)
        if token.last or not text.endswith("\ufffd"):
            yield Piece(token.row, text[shown[token.row] :], token.last)
            shown[token.row] = len(text)
