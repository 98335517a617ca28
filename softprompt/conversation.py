"""A talk with a prompt: its turns so far, and which of them still fit into the base's context."""

from dataclasses import dataclass, replace

from softprompt.artifact import StoredPrompt
from softprompt.data import Message
from softprompt.engine.model import FrozenBase


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


def fitted(base: FrozenBase, prompt: StoredPrompt, talk: Conversation, text: str, max_new_tokens: int) -> Conversation:
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
