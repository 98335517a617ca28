"""Answers as completions: whole, or chunk by chunk."""

from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from openai.types import Completion, CompletionChoice
from openai.types.completion_choice import Logprobs

from softprompt.serve.answers import Answers
from softprompt.serve.asking import Scored
from softprompt.serve.choices import Choice, Count, logprob_of, shown
from softprompt.serve.fields import Wish


async def whole(wish: Wish, answers: Answers, head: dict[str, Any]) -> Completion:
    """`head`: id, created and model."""
    count = Count.of(answers.begun, wish.n)
    choices = [Choice(begun.text, scores=list(begun.scores)) if wish.echo else Choice() for begun in answers.begun]
    async for number, said in answers:
        choices[number].add(said)
        count.add(said)
    made = [_choice(number, one.text, _logprobs(one.scores, 0, wish), one.finish) for number, one in enumerate(choices)]
    return Completion(**head, object="text_completion", choices=made, usage=count.usage())


async def chunks(wish: Wish, answers: Answers, head: dict[str, Any]) -> AsyncIterator[Completion]:
    """The text first where it is echoed, the words as they come, and tokens where they are wanted."""
    count = Count.of(answers.begun, wish.n)
    offsets = [0] * len(wish.asks)
    usage = {"usage": None} if wish.usage else {}

    def chunk(number: int, text: str, scores: Sequence[Scored], finish: Literal["stop", "length"] | None) -> Completion:
        piece = _choice(number, text, _logprobs(scores, offsets[number], wish), finish)
        offsets[number] += sum(len(score.text) for score in scores)
        return Completion(**head, object="text_completion", choices=[piece], **usage)  # type: ignore[arg-type]

    for number, begun in enumerate(answers.begun if wish.echo else ()):
        yield chunk(number, begun.text, begun.scores, None)
    async for number, said in answers:
        count.add(said)
        if said.text or said.scores or said.finish is not None:
            yield chunk(number, said.text, said.scores, said.finish)
    if wish.usage:
        yield Completion(**head, object="text_completion", choices=[], usage=count.usage())


def _choice(number: int, text: str, logprobs: Logprobs | None, finish: Literal["stop", "length"] | None) -> CompletionChoice:
    """Built without a check: the package's type has no None for the end of a chunk and for the logprob of a text's first token."""
    return CompletionChoice.model_construct(index=number, text=text, logprobs=logprobs, finish_reason=finish)


def _logprobs(scores: Sequence[Scored], offset: int, wish: Wish) -> Logprobs | None:
    """`offset`: where in the choice's text the tokens begin."""
    if wish.logprobs is None:
        return None
    offsets = []
    for score in scores:
        offsets.append(offset)
        offset += len(score.text)
    return Logprobs.model_construct(
        tokens=[shown(score, wish.as_ids) for score in scores],
        token_logprobs=[None if score.logprob is None else logprob_of(score) for score in scores],
        top_logprobs=[_top(score, wish.as_ids) for score in scores],
        text_offset=offsets,
    )


def _top(score: Scored, as_ids: bool) -> dict[str, float] | None:
    """By text, as this form has them; of tokens that look alike, the likeliest. The token itself is always there."""
    if score.logprob is None:
        return None
    found: dict[str, float] = {}
    for one in (*score.top, score):
        found.setdefault(shown(one, as_ids), logprob_of(one))
    return found
