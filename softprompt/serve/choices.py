"""What both routes make of an engine's words: a choice put together, tokens counted."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from openai.types import CompletionUsage
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails

from softprompt.serve.asking import Begun, Said, Scored

ID = "token_id:"  # before the number of a token that is named by it
UNLIKELY = -9999.0  # OpenAI's number for what has no logarithm


@dataclass
class Choice:
    """One answer so far."""

    text: str = ""
    thought: str = ""
    scores: list[Scored] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None

    def add(self, said: Said) -> None:
        self.text += said.text
        self.thought += said.thought
        self.scores += said.scores
        self.finish = said.finish


@dataclass
class Count:
    """Tokens of a request. A text that is answered n times counts once; its virtual positions and those that were kept beside it."""

    num_text: int
    num_virtual: int
    num_cached: int
    num_said: int = 0
    num_thought: int = 0

    @classmethod
    def of(cls, begun: Sequence[Begun], n: int) -> "Count":
        read = begun[::n]
        cached = sum(max(0, one.num_cached - one.num_virtual) for one in read)  # of the text: the prompt stands before it
        return cls(sum(one.num_tokens for one in read), sum(one.num_virtual for one in read), cached)

    def add(self, said: Said) -> None:
        self.num_said += said.num_tokens
        self.num_thought += said.num_tokens if said.thought and not said.text else 0

    def usage(self) -> CompletionUsage:
        details = PromptTokensDetails(cached_tokens=self.num_cached, virtual_tokens=self.num_virtual)  # type: ignore[call-arg]
        return CompletionUsage(
            prompt_tokens=self.num_text,
            completion_tokens=self.num_said,
            total_tokens=self.num_text + self.num_said,
            prompt_tokens_details=details,
            completion_tokens_details=CompletionTokensDetails(reasoning_tokens=self.num_thought),
        )


def logprob_of(score: Scored) -> float:
    return UNLIKELY if score.logprob is None else max(score.logprob, UNLIKELY)


def shown(score: Scored, as_ids: bool) -> str:
    """A token as it stands in an answer: its text, or its number as vLLM writes it."""
    return f"{ID}{score.id}" if as_ids else score.text
