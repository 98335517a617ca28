"""Answers as chat completions: whole, or chunk by chunk."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob, chat_completion
from openai.types.chat.chat_completion_chunk import Choice as Piece
from openai.types.chat.chat_completion_chunk import ChoiceDelta, ChoiceLogprobs
from openai.types.chat.chat_completion_token_logprob import TopLogprob

from softprompt.serve.answers import Answers
from softprompt.serve.asking import Said, Scored
from softprompt.serve.choices import Choice, Count, logprob_of, shown
from softprompt.serve.fields import Wish


async def whole(wish: Wish, answers: Answers, head: dict[str, Any]) -> ChatCompletion:
    """`head`: id, created and model."""
    count, choices = Count.of(answers.begun, wish.n), [Choice() for _ in wish.asks]
    async for number, said in answers:
        choices[number].add(said)
        count.add(said)
    return ChatCompletion(
        **head, object="chat.completion", choices=[_choice(number, one, wish) for number, one in enumerate(choices)], usage=count.usage()
    )


def _choice(number: int, choice: Choice, wish: Wish) -> chat_completion.Choice:
    thought = {"reasoning_content": choice.thought} if choice.thought else {}
    message = ChatCompletionMessage(role="assistant", content=choice.text, refusal=None, annotations=[], **thought)  # type: ignore[arg-type]
    scores = None if wish.logprobs is None else chat_completion.ChoiceLogprobs(content=_scores(choice.scores, wish.as_ids), refusal=None)
    assert choice.finish is not None
    return chat_completion.Choice(index=number, message=message, finish_reason=choice.finish, logprobs=scores)


async def chunks(wish: Wish, answers: Answers, head: dict[str, Any]) -> AsyncIterator[ChatCompletionChunk]:
    """A role for every choice, then their words as they come, the end of each alone, and tokens where they are wanted."""
    count = Count.of(answers.begun, wish.n)
    usage = {"usage": None} if wish.usage else {}

    def chunk(number: int, delta: ChoiceDelta, said: Said | None = None, *, ends: bool = False) -> ChatCompletionChunk:
        scores = None if wish.logprobs is None or said is None else ChoiceLogprobs(content=_scores(said.scores, wish.as_ids), refusal=None)
        piece = Piece(index=number, delta=delta, finish_reason=said.finish if said and ends else None, logprobs=None if ends else scores)
        return ChatCompletionChunk(**head, object="chat.completion.chunk", choices=[piece], **usage)  # type: ignore[arg-type]

    for number in range(len(wish.asks)):
        yield chunk(number, ChoiceDelta(role="assistant", content=""))
    async for number, said in answers:
        count.add(said)
        if said.text or said.thought or said.scores:
            thought = {"reasoning_content": said.thought} if said.thought else {}
            yield chunk(number, ChoiceDelta(content=said.text, **thought), said)  # type: ignore[arg-type]
        if said.finish is not None:
            yield chunk(number, ChoiceDelta(), said, ends=True)
    if wish.usage:
        yield ChatCompletionChunk(**head, object="chat.completion.chunk", choices=[], usage=count.usage())


def _scores(scores: Sequence[Scored], as_ids: bool) -> list[ChatCompletionTokenLogprob]:
    return [
        ChatCompletionTokenLogprob(
            token=shown(score, as_ids),
            bytes=list(score.data),
            logprob=logprob_of(score),
            top_logprobs=[TopLogprob(token=shown(one, as_ids), bytes=list(one.data), logprob=logprob_of(one)) for one in score.top],
        )
        for score in scores
    ]
