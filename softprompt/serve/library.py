"""The prompts that are served over one base, by name. Cards and templates stay; the numbers of a prompt leave memory with its prefix and
come back from its folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from weakref import ref

from softprompt.artifact import StoredPrompt, find_prompt, load_prompt
from softprompt.encode import Encoder, make_encoder
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import Prompt, no_prompt
from softprompt.engine.rows import Held
from softprompt.errors import ConfigError, DataError
from softprompt.generation import asked_ids
from softprompt.serve.asking import Ask, Conversation, Model, NotServed, Text, is_conversation
from softprompt.templates import Chat, HumanAssistant
from softprompt.thinking import Thinking


@dataclass(frozen=True)
class Spoken:
    """How one that is served is asked: its prompts by name (an ensemble has several) and what their texts need. `trained`: not the bare
    base."""

    names: tuple[str, ...]
    encoders: tuple[Encoder, ...]
    num_positions: tuple[int, ...]
    num_virtual: int = 0
    trained: bool = True
    by: Literal["mean", "vote"] = "mean"

    @property
    def thinking(self) -> Thinking | None:
        return self.encoders[0].thinking

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset[int]().union(*(encoder.end_ids for encoder in self.encoders))

    @property
    def num_bos(self) -> int:
        return int(self.encoders[0].bos_id is not None)

    def check(self, ask: Ask) -> None:
        """Raises ConfigError for what an ensemble cannot do."""
        if self.by == "vote" and ask.sampling.temperature > 0:
            raise ConfigError(f"{ask.model} votes, and a vote has no probabilities to sample from: temperature must be 0")
        if len(self.names) > 1 and ask.echo and ask.logprobs is not None:
            raise ConfigError(f"{ask.model} is an ensemble, whose prompts read the text apart: echo has no logprobs with it")


def ids_behind(encoder: Encoder, text: Text | Conversation, *, trained: bool) -> tuple[int, ...]:
    """A text as it stands behind a prompt, or behind the bare base (not `trained`), without BOS. Raises DataError for one that is empty or
    cannot be written."""
    if is_conversation(text):
        return asked_ids(encoder, text, trained=trained)
    given = encoder.tokenizer(text, add_special_tokens=False)["input_ids"] if isinstance(text, str) else text
    ids = tuple(token for token in given if isinstance(token, int))
    if any(not 0 <= token < len(encoder.tokenizer) for token in ids):
        raise DataError(f"token ids go from 0 to {len(encoder.tokenizer) - 1}")
    encoder.check_ids(ids, "prompt")
    bare = ids[1:] if ids and ids[0] == encoder.bos_id else ids
    if not bare:
        raise DataError("the text is empty: there is nothing to go on from")
    return bare


def encoder_of_base(base: FrozenBase | Held) -> Encoder:
    """How the bare base is asked: by its chat template, or as a plain dialogue where it has none."""
    template = Chat.name if base.tokenizer.chat_template else HumanAssistant.name
    return make_encoder(base.tokenizer, template, num_tokens=base.num_tokens)


@dataclass
class _Entry:
    model: Model
    spoken: Spoken
    soft: "ref[Prompt] | None" = None


class Library:
    """Everything that loads or looks at numbers runs on the engine's thread; the rest may be asked from anywhere."""

    def __init__(self, base: FrozenBase | Held, allow_other_base: bool = False) -> None:
        self._base, self._other = base, allow_other_base
        self._entries: dict[str, _Entry] = {}
        encoder = encoder_of_base(base)
        self._bare = no_prompt(base, encoder.bos_id)
        self.base_name = _name_of(base)
        model = Model(self.base_name, "base", 0)
        spoken = Spoken((self.base_name,), (encoder,), (self._bare.num_positions,), trained=False)
        self._entries[self.base_name] = _Entry(model, spoken, ref(self._bare))

    @property
    def end_ids(self) -> frozenset[int]:
        return frozenset[int]().union(*(entry.spoken.stop_ids for entry in list(self._entries.values())))

    def models(self) -> Sequence[Model]:
        base, *others = (entry.model for entry in list(self._entries.values()))
        return [base, *sorted(others, key=lambda model: model.name)]

    def find(self, name: str) -> Spoken:
        return self._entry(name).spoken

    def prompt(self, name: str) -> Prompt:
        """A prompt's numbers, from its folder where they have left memory."""
        entry = self._entry(name)
        soft = entry.soft() if entry.soft is not None else None
        if soft is None:
            assert entry.model.folder is not None
            soft = self._load(entry.model.folder).soft
            entry.soft = ref(soft)
        return soft

    def add(self, name: str, path: Path) -> Model:
        """Raises ArtifactError for a prompt that does not fit, ConfigError for a name that something else has."""
        known = self._entries.get(name)
        if known is not None and known.model.kind != "prompt":
            raise ConfigError(f"{name} is the name of the {known.model.kind}: give the prompt another, NAME={path}")
        folder = find_prompt(path)
        stored = self._load(folder)
        model = described(name, folder, stored)
        spoken = Spoken((name,), (stored.encoder,), (stored.soft.num_positions,), stored.soft.length)
        self._entries[name] = _Entry(model, spoken, ref(stored.soft))
        return model

    def add_ensemble(self, name: str, members: Sequence[str], by: Literal["mean", "vote"]) -> Model:
        """Raises NotServed for a member that is not served, ConfigError for a name that something else has."""
        if name in self._entries:
            raise ConfigError(f"{name} is the name of something else that is served: give the ensemble another")
        parts = [self._entry(member).spoken for member in members]
        spoken = Spoken(
            tuple(members),
            tuple(part.encoders[0] for part in parts),
            tuple(part.num_positions[0] for part in parts),
            sum(part.num_virtual for part in parts),
            by=by,
        )
        created = max(self._entry(member).model.created for member in members)
        model = Model(name, "ensemble", created, spoken.num_virtual, members=tuple(members))
        self._entries[name] = _Entry(model, spoken)
        return model

    def remove(self, name: str) -> None:
        """Raises NotServed; ConfigError for the base, and for a prompt that an ensemble needs."""
        entry = self._entry(name)
        if entry.model.kind == "base":
            raise ConfigError(f"{name} is the base, which stays")
        needed = [other.name for other in self.models() if name in other.members]
        if needed:
            raise ConfigError(f"{name} answers in the ensemble {needed[0]}, which would be left without it")
        del self._entries[name]

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise NotServed.named(name) from None

    def _load(self, folder: Path) -> StoredPrompt:
        return load_prompt(folder, self._base, allow_other_base=self._other)


def described(name: str, folder: Path, stored: StoredPrompt) -> Model:
    """A prompt as it is served, and the run that it lies in."""
    run = next((one for one in (folder.parent, folder.parent.parent) if (one / "metrics.jsonl").is_file()), None)
    created = int((folder / "card.json").stat().st_mtime)
    return Model(name, "prompt", created, stored.soft.length, stored.card.model_dump(mode="json"), folder, run)


def _name_of(base: FrozenBase | Held) -> str:
    """A folder's or file's own name, or the hub's."""
    path = Path(base.name)
    return (path.stem if path.is_file() else path.name) if path.exists() else base.name
