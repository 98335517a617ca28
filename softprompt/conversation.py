"""A talk with a prompt: its turns so far, and which of them still fit into the base's context. Torch is there where it is needed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from softprompt.data import Message
from softprompt.sampling import Sampling

if TYPE_CHECKING:
    from softprompt.artifact import StoredPrompt
    from softprompt.engine.model import FrozenBase
    from softprompt.engine.rows import Held
    from softprompt.generation import Piece


@dataclass(frozen=True)
class Conversation:
    """`turns`: of user and assistant, in pairs; the text of `system` stands before them."""

    system: str | None = None
    turns: tuple[Message, ...] = ()

    def asked(self, text: str) -> tuple[Message, ...]:
        """What is asked with another turn of the user."""
        opening = () if self.system is None else (Message("system", self.system),)
        return (*opening, *self.turns, Message("user", text))

    def answered(self, text: str, answer: str) -> "Conversation":
        """The conversation after another turn of the user and its answer."""
        return replace(self, turns=(*self.turns, Message("user", text), Message("assistant", answer)))

    def before_the_last(self) -> "tuple[Conversation, str]":
        """The conversation without its last two turns, and what the user asked in them."""
        return replace(self, turns=self.turns[:-2]), self.turns[-2].content


def fitted(base: "FrozenBase | Held", prompt: "StoredPrompt", talk: Conversation, text: str, max_new_tokens: int) -> Conversation:
    """The conversation that a text is asked behind: without its oldest turns, as many as have to go so that an answer of
    `max_new_tokens` fits into the base's context; without any where the prompt's template knows no turns.

    Raises DataError for turns that the template cannot write.
    """
    if not prompt.encoder.template.knows_turns:
        return replace(talk, turns=())
    room = None if base.context_length is None else base.context_length - prompt.soft.num_positions - max_new_tokens
    while room is not None and talk.turns and len(prompt.encoder.question(talk.asked(text))) > room:
        talk = replace(talk, turns=talk.turns[2:])
    return talk


@dataclass(frozen=True)
class Here:
    """Prompts over a base in this process, by name; `softprompt.serve.client.There` is a server's."""

    base: "FrozenBase | Held"
    prompts: "Mapping[str, StoredPrompt]"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.prompts)

    @property
    def context_length(self) -> int | None:
        return self.base.context_length

    def about(self, name: str) -> str:
        card = self.prompts[name].card
        return f"{card.num_virtual_tokens} virtual tokens for {card.base.name}"

    def knows_turns(self, name: str) -> bool:
        return self.prompts[name].encoder.template.knows_turns

    def fitted(self, name: str, talk: Conversation, text: str, max_new_tokens: int) -> Conversation:
        """What is left of the talk so that an answer fits. Raises DataError for turns that the template cannot write."""
        return fitted(self.base, self.prompts[name], talk, text, max_new_tokens)

    def answer(self, asked: Mapping[str, Sequence[Message]], sampling: Sampling) -> "Iterator[Piece]":
        """Answers to what each is asked. Raises DataError as `stream` does."""
        from softprompt.generation import stream

        return stream(self.base, [self.prompts[name] for name in asked], list(asked.values()), sampling)

    def bare(self, asked: Sequence[Message], sampling: Sampling) -> "Iterator[Piece]":
        """What the bare base answers, behind the template of the first prompt."""
        from softprompt.generation import stream, without_prompt

        first = next(iter(self.prompts.values()))
        return stream(self.base, without_prompt(self.base, first), [asked], sampling)
