"""Models behind a server that speaks OpenAI's interface, to talk with in the terminal. Without torch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import openai
from openai.types import Model

from softprompt.conversation import Conversation
from softprompt.data import Message
from softprompt.errors import ConfigError, DataError
from softprompt.sampling import Sampling


@dataclass(frozen=True)
class Heard:
    """See screen.prompts.Said."""

    row: int
    text: str
    last: bool = False


@dataclass(frozen=True)
class There:
    """See screen.chat.Speakers. `known`: all models of the server, by name; `names`: those to talk with."""

    client: openai.OpenAI
    known: Mapping[str, Model]
    names: tuple[str, ...]

    context_length = None  # the server says what is too long

    def about(self, name: str) -> str:
        virtual = getattr(self.known[name], "num_virtual_tokens", 0)
        return f"{virtual} virtual tokens, at {self.client.base_url}" if virtual else f"at {self.client.base_url}"

    def knows_turns(self, name: str) -> bool:
        return True

    def fitted(self, name: str, talk: Conversation, text: str, max_new_tokens: int) -> Conversation:
        return talk

    def answer(self, asked: Mapping[str, Sequence[Message]], sampling: Sampling) -> Iterator[Heard]:
        """One after the other. Raises DataError for what the server refuses."""
        for row, (name, turns) in enumerate(asked.items()):
            with _refused(str(self.client.base_url)):
                for text in self._pieces(name, turns, sampling):
                    yield Heard(row, text)
            yield Heard(row, "", last=True)

    def bare(self, asked: Sequence[Message], sampling: Sampling) -> Iterator[Heard]:
        """What the server's base answers, behind its own template. Raises DataError."""
        base = next((name for name, model in self.known.items() if getattr(model, "kind", None) == "base"), None)
        if base is None:
            raise DataError("this server does not say which of its models is the base")
        return self.answer({base: asked}, sampling)

    def _pieces(self, name: str, turns: Sequence[Message], sampling: Sampling) -> Iterator[str]:
        with self.client.chat.completions.create(
            model=name,
            messages=cast(Any, [{"role": turn.role, "content": turn.content} for turn in turns]),
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            extra_body={"top_k": sampling.top_k} if sampling.top_k else None,  # which not every server knows
            stream=True,
        ) as chunks:
            for chunk in chunks:
                for choice in chunk.choices:
                    yield choice.delta.content or ""


@contextmanager
def connect(address: str, wanted: Sequence[str], key: str | None) -> Iterator[There]:
    """The models `wanted` of a server, or its first prompt. Raises ConfigError where there is no such server or model."""
    with openai.OpenAI(base_url=f"{address.rstrip('/').removesuffix('/v1')}/v1", api_key=key or "none") as client:
        try:
            known = {model.id: model for model in client.models.list()}
        except openai.AuthenticationError:
            raise ConfigError(f"{address} asks for a key: give --api-key-file FILE, or set OPENAI_API_KEY") from None
        except openai.OpenAIError as error:
            raise ConfigError(f"{address}: no such server answers: {error}") from None
        missing = [name for name in wanted if name not in known]
        if missing or not known:
            raise ConfigError(f"{address} serves no model {', '.join(missing)}: it serves {', '.join(known) or 'none'}")
        first = next((name for name, model in known.items() if getattr(model, "kind", None) == "prompt"), next(iter(known)))
        yield There(client, known, tuple(dict.fromkeys(wanted)) or (first,))


@contextmanager
def _refused(address: str) -> Iterator[None]:
    """What the server says against a request, in one line."""
    try:
        yield
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        raise DataError(str(body.get("message", error))) from None
    except openai.APIError as error:
        raise DataError(f"{address}: {error}") from None
