"""What the teacher has in its context: a text whole or in chunks, or examples; and how it reads a question behind that."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softprompt.config import Config
from softprompt.contestants import Contestant, choose_shots
from softprompt.data import Example, Message
from softprompt.data.examples import turns_text
from softprompt.distil.asked import Asked, unanswered
from softprompt.encode import Encoder
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import Prompt, no_prompt
from softprompt.errors import ConfigError, DataError

CUTS = (
    "(\n\n)",
    "(\n)",
    "(?<=[.!?。！？])( *)",
    "( )",
    "()",
)  # where a text may be cut, best places first; nothing is lost
SPARE = 32  # tokens of a context that are left free: what a template writes around a text


@dataclass(frozen=True)
class Bare:
    """The base without a prompt, and the encoder of the prompt that is to be trained."""

    soft: Prompt
    encoder: Encoder


@dataclass(frozen=True)
class Context:
    """`texts`: the chunks of a text, in order; or `shots`: examples. `digest`: sha256 of either."""

    texts: tuple[str, ...]
    shots: tuple[Example, ...]
    digest: str

    def teachers(self, base: FrozenBase, encoder: Encoder) -> list[Contestant]:
        """The base with each chunk, or with the examples, before a question."""
        bare = (Bare(no_prompt(base, encoder.bos_id), encoder),)
        if self.shots:
            return [Contestant("teacher", bare, shots=self.shots)]
        return [Contestant(f"teacher-{number}", bare, wish=text) for number, text in enumerate(self.texts)]


def context_of(config: Config, base: FrozenBase, encoder: Encoder, asked: Asked) -> Context:
    """What [distil] names. Raises ConfigError for a file that cannot be read, an empty text, a template that cannot tell it, and examples
    that do not fit."""
    room = None if base.context_length is None else base.context_length - config.data.max_length - SPARE
    if config.distil.examples is not None:
        return _of_examples(config, encoder, asked.known, asked.held, room)
    text = _text(config)
    parts = (text,) if room is None else tuple(chunks(text, encoder, room))
    question = (*asked.train, *asked.held, unanswered((Message("user", "a"),), "a question", {}))[0]
    _check_told(encoder, parts[0], question)
    return Context(parts, (), hashlib.sha256(text.encode()).hexdigest())


def _of_examples(config: Config, encoder: Encoder, examples: Sequence[Example], held: Sequence[Example], room: int | None) -> Context:
    wanted = config.distil.examples
    assert wanted is not None, "asked for by the caller"
    shots = choose_shots(encoder, examples, held, 10**9 if room is None else room, config.train.seed, wanted)
    if len(shots) < wanted:
        raise ConfigError(f"distil.examples = {wanted}: of {len(examples)} training rows {len(shots)} fit into the base's context")
    digest = hashlib.sha256("".join(turns_text(shot) + "\n" for shot in shots).encode())
    return Context((), shots, digest.hexdigest())


def _text(config: Config) -> str:
    text, name = config.distil.text, "distil.text"
    if config.distil.file is not None:
        name = f"distil.file = {config.distil.file}"
        try:
            text = Path(config.distil.file).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if text is None or not text.strip():
        raise ConfigError(f"{name} is empty: there is nothing to distil")
    return text.strip()


def _check_told(encoder: Encoder, text: str, question: Example) -> None:
    """Raises ConfigError where the template cannot write a text before a question."""
    try:
        Contestant("teacher", (), wish=text).segments(encoder, question)
    except DataError as error:
        raise ConfigError(f"data.template cannot tell the teacher its text: {error.reason}") from None


def chunks(text: str, encoder: Encoder, room: int) -> list[str]:
    """The text in pieces of at most `room` tokens, cut between paragraphs, else lines, else sentences, else words."""

    def fits(piece: str) -> bool:
        return len(encoder.tokenizer(piece, add_special_tokens=False)["input_ids"]) <= room

    def cut(piece: str, at: int) -> list[str]:
        if fits(piece):
            return [piece]
        parts = [part for part in re.split(CUTS[at], piece) if part]
        return [smaller for part in parts for smaller in cut(part, min(at + 1, len(CUTS) - 1))]

    joined: list[str] = []
    for part in cut(text, 0):
        if joined and fits(joined[-1] + part):
            joined[-1] += part
        else:
            joined.append(part)
    return [one.strip() for one in joined if one.strip()]
