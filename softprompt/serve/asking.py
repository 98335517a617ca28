"""What a client's request asks of an engine, and what an engine says to it: the seam between HTTP and whatever answers. Without torch.

An engine is one of two: `own.py` decodes here, over a base of ours or one that llama.cpp holds; `vllm.py` asks a vLLM server. Both know
the base and prompts by name.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeGuard

from softprompt.data import Message
from softprompt.errors import Error
from softprompt.sampling import Sampling

Text = str | tuple[int, ...]  # stands behind the prompt as it is: text, or token ids
Conversation = tuple[Message, ...]  # is written by the template of the prompt's card


def is_conversation(text: Text | Conversation) -> TypeGuard[Conversation]:
    return not isinstance(text, str) and bool(text) and isinstance(text[0], Message)


class NotServed(Error):
    """What was asked for is not served. `NotServed.named`: no base or prompt of this name is."""

    @classmethod
    def named(cls, name: str) -> "NotServed":
        return cls(f"no model {name[:200]!r} is served here; GET /v1/models lists those that are")


class Busy(Error):
    """No more requests are taken just now. `seconds`: when to come again."""

    def __init__(self, reason: str, seconds: int) -> None:
        super().__init__(reason)
        self.seconds = seconds


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted. `model`: the name of the base, a prompt or an ensemble. `stops`: texts that end the answer and are no
    part of it. `logprobs`: how many of the likeliest tokens to report beside each token, 0 for that token's own alone, None for nothing.
    `echo`: the text's own tokens are reported first. `schema`: a JSON schema that the answer keeps to. `max_new_tokens` of `sampling` may
    be 0 with `echo`."""

    model: str
    text: Text | Conversation
    sampling: Sampling
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Scored:
    """A token and the logarithm of its probability, before anything that sampling does to it; None for a text's first token where nothing
    stands before it. `data`: its bytes, of which `text` may show only a replacement character. `top`: the likeliest tokens at its place,
    the likeliest first."""

    id: int
    text: str
    data: bytes
    logprob: float | None
    top: tuple["Scored", ...] = ()


@dataclass(frozen=True)
class Begun:
    """The text was read: its `num_tokens` and the `num_virtual` positions of the prompt, `num_cached` of both from what was kept.
    `text` and `scores`: of the text itself, where they are to be reported."""

    num_tokens: int
    num_virtual: int
    num_cached: int
    text: str = ""
    scores: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class Said:
    """The answer goes on with `text`, or with `thought`, which belongs to a thinking block. `num_tokens`: tokens since the last piece;
    `scores` are theirs where logprobs were asked for. `finish`: "stop" at its end, "length" where its tokens ran out, None before."""

    text: str
    num_tokens: int
    scores: tuple[Scored, ...] = ()
    thought: str = ""
    finish: Literal["stop", "length"] | None = None


@dataclass(frozen=True)
class Model:
    """What can be asked. `created`: seconds since 1970. `card`: the prompt's card.json. `folder`: of the prompt; `report`: the run's
    folder, where there is one beside it. `members`: the prompts of an ensemble."""

    name: str
    kind: Literal["base", "prompt", "ensemble"]
    created: int
    num_virtual: int = 0
    card: Mapping[str, Any] | None = None
    folder: Path | None = None
    report: Path | None = None
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Load:
    """How busy an engine is. `kept_bytes`: what the layers keep of prompts and texts that are not answered just now; `batch_bytes`: of
    those that are."""

    running: int
    waiting: int
    kept_bytes: int = 0
    batch_bytes: int = 0


class Engine(Protocol):
    """Answers. All methods are called from the event loop's thread."""

    def models(self) -> Sequence[Model]:
        """The base first, then prompts by name."""

    def ask(self, ask: Ask) -> AsyncGenerator[Begun | Said, None]:
        """Begun, then Said until one has a finish. Closing it early frees the answer's place at the next token. Before the first value it
        raises NotServed, Busy, DataError for a text that cannot be answered and ConfigError for settings that cannot be kept to."""

    async def add(self, name: str, folder: Path) -> Model:
        """Serves another prompt, or another in the place of one with this name. Raises ArtifactError for one that does not fit."""

    async def remove(self, name: str) -> None:
        """Answers that have begun are finished. Raises NotServed."""

    def load(self) -> Load:
        """For /metrics."""

    async def close(self, seconds: float) -> None:
        """Takes no more requests and returns when all answers are finished, or given up after `seconds`."""


def find_model(engine: Engine, name: str) -> Model:
    """Raises NotServed."""
    for model in engine.models():
        if model.name == name:
            return model
    raise NotServed.named(name)
