"""Where a prompt starts: each source is a function to rows, looked up by name in SOURCES, and several fill a prompt in turn.

"text" is what PEFT and the tutorials call hard prompt tuning, "random" what they call soft prompt tuning; "vocab" and
"labels" are those of Lester et al. (2021), "file" is the transfer of SPoT (Vu et al. 2022).
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from softprompt.artifact import read_card, stored_rows
from softprompt.config import PromptConfig
from softprompt.engine.matching import matched
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import DeepPrompt, as_prompt
from softprompt.engine.recited import recited
from softprompt.engine.teacher import Teacher
from softprompt.engine.tokens import Encoded
from softprompt.errors import ConfigError
from softprompt.literal import control_tokens
from softprompt.rows import sampled

LENGTH_WITHOUT_TEXT = 16
COMMON_TOKENS = 5000  # as in Lester et al. (2021)
LOOKED_AT = 20_000  # training rows, where there are more


@dataclass(frozen=True)
class Taught:
    """`context`: the ids that the base reads as a teacher before every question; `teacher`: it, with the questions' rows; `rows`: the same
    rows as students read them."""

    context: Sequence[int]
    teacher: Teacher
    rows: Sequence[Encoded]


@dataclass(frozen=True)
class Material:
    """What a prompt may be made from: the base, the training rows, the label words of the data; `sources`: what names in `prompt.init`
    mean; `taught`: where there is a teacher."""

    config: PromptConfig
    base: FrozenBase
    rows: Sequence[Encoded]
    labels: Sequence[str]
    seed: int
    sources: Mapping[str, "Source"]
    taught: Taught | None = None


@dataclass(frozen=True)
class Initial:
    """The rows to start from, [P, H] float32 on the base's device, and a sentence about where they come from."""

    rows_PH: Tensor
    note: str


def initial_rows(material: Material) -> Initial:
    """Fills the prompt from the sources of `prompt.init`, one after another; repeats their rows when they are too few.

    Raises ConfigError for a source that has nothing to give.
    """
    config = material.config
    length = prompt_length(config, material.base.tokenizer, material.labels)
    for name in config.sources:
        if name in DEEP:
            raise ConfigError(f'prompt.init = "{name}" stands alone, and needs prompt.method = "prefix"')
    parts: list[Initial] = []
    for name in config.sources:
        room = length - sum(len(part.rows_PH) for part in parts)
        parts.append(material.sources[name](material, room) if room else Initial(_rows(material, []), f"no room for {name}"))
    rows_PH = torch.cat([part.rows_PH for part in parts])
    note = f"{length} virtual tokens: " + "; ".join(part.note for part in parts)
    if len(rows_PH) < length:
        note += f"; repeated in a cycle, {length / len(rows_PH):.1f} times"
    return Initial(rows_PH[torch.arange(length, device=rows_PH.device) % len(rows_PH)], note)


def prompt_length(config: PromptConfig, tokenizer: object, labels: Sequence[str]) -> int:
    """Virtual tokens: `prompt.length`, else as many rows as text, labels and file have, else 16."""
    if config.length is not None:
        return config.length
    own = {"text": lambda: len(_text_ids(config, tokenizer)), "labels": lambda: len(_labels(labels)), "file": lambda: _file_length(config)}
    return sum(own[name]() for name in config.sources if name in own) or LENGTH_WITHOUT_TEXT


def from_text(material: Material, room: int) -> Initial:
    """Embeddings of the text's tokens, without special tokens."""
    ids = _text_ids(material.config, material.base.tokenizer)
    note = f"{min(room, len(ids))} from the {len(ids)} tokens of prompt.text"
    if room < len(ids):
        note += f", the last {len(ids) - room} are cut: {material.base.tokenizer.decode(ids[room:])!r}"
    return Initial(_rows(material, ids[:room]), note)


def from_labels(material: Material, room: int) -> Initial:
    """One row for each label word, the mean of its tokens' embeddings."""
    labels = _labels(material.labels)
    words = [material.base.tokenizer(word, add_special_tokens=False)["input_ids"] for word in labels[:room]]
    cut = f", cut: {', '.join(labels[room:])}" if room < len(labels) else ""
    rows = [_rows(material, ids).mean(dim=0) for ids in words]
    return Initial(torch.stack(rows), f"{len(rows)} from the label words {', '.join(labels[:room])}{cut}")


def from_vocabulary(material: Material, room: int) -> Initial:
    """Embeddings of different tokens, drawn from the most frequent ones of the training rows, special tokens left out."""
    special, looked_at = control_tokens(material.base.tokenizer), _looked_at(material)
    counts = Counter(token for row in looked_at for token in row.ids if token not in special)
    common = [token for token, _ in counts.most_common(COMMON_TOKENS)]
    if not common:
        raise ConfigError('prompt.init = "vocab": the training rows have no tokens to draw from')
    drawn = random.Random(material.seed).sample(common, min(room, len(common)))
    note = f"{len(drawn)} drawn from the data's {len(common)} most frequent tokens (seed {material.seed})"
    return Initial(_rows(material, drawn), note + ("" if len(looked_at) == len(material.rows) else f", of {len(looked_at)} training rows"))


def from_examples(material: Material, room: int) -> Initial:
    """Embeddings of training rows, one behind another, drawn by the seed from the shorter half of them, different answers in turn.

    The first one is cut where there is no room, so that the text goes on behind a whole answer: a cut one is no pattern to go by.
    """
    looked_at = _looked_at(material)
    short = sorted(looked_at, key=len)[: (len(looked_at) + 1) // 2]
    random.Random(material.seed).shuffle(short)
    by_answer: dict[tuple[int, ...], list[Encoded]] = {}
    for row in short:
        by_answer.setdefault(row.ids[len(row.question) :], []).append(row)
    in_turn = [row for rows in zip_longest(*by_answer.values()) for row in rows if row is not None]
    ids: list[int] = []
    used = 0
    while len(ids) < room and used < len(in_turn):
        ids = [*in_turn[used].ids, *ids]
        used += 1
    return Initial(_rows(material, ids[-room:]), f"{min(room, len(ids))} from the tokens of {used} training rows (seed {material.seed})")


def from_noise(material: Material, room: int) -> Initial:
    """Normal noise with the mean and spread of the base's embedding rows in every dimension."""
    base, generator = material.base, torch.Generator().manual_seed(material.seed)
    noise_PH = torch.randn(room, base.hidden_size, generator=generator).to(base.device)
    return Initial(base.row_mean_H + noise_PH * base.row_std_H, f"{room} from noise like the embedding rows (seed {material.seed})")


def from_file(material: Material, room: int) -> Initial:
    """The rows of another prompt, of this task or another."""
    path = _file(material.config)
    rows_PH = stored_rows(path).to(material.base.device)
    if rows_PH.shape[1] != material.base.hidden_size:
        raise ConfigError(
            f"prompt.file = {path!r} has rows of {rows_PH.shape[1]} numbers, {material.base.name} needs {material.base.hidden_size}"
        )
    cut = f", the last {len(rows_PH) - room} are cut" if room < len(rows_PH) else ""
    return Initial(rows_PH[:room], f"{min(room, len(rows_PH))} from the {len(rows_PH)} rows of {_named(path)}{cut}")


def from_context(material: Material, room: int) -> Initial:
    """Embeddings of the first tokens that the teacher reads."""
    context = _taught(material).context
    ids = context[:room]
    return Initial(_rows(material, ids), f"{len(ids)} from the first of the teacher's {len(context)} tokens")


def from_spread(material: Material, room: int) -> Initial:
    """Embeddings of tokens that the teacher reads, picked evenly."""
    context = _taught(material).context
    count = min(room, len(context))
    ids = [context[index * len(context) // count] for index in range(count)]
    return Initial(_rows(material, ids), f"{count} picked evenly from the teacher's {len(context)} tokens")


def from_states(material: Material, position: str, bos_id: int | None, values: float) -> tuple[DeepPrompt, str]:
    """Keys and values of tokens that the teacher reads, picked evenly, as they are behind the rest of its text; BOS among them where it
    does not stand before the prompt anyway; and a sentence about that. `values`: as for `deepened`. Raises ModelError as `recited`."""
    context = _taught(material).context
    length = min(prompt_length(material.config, material.base.tokenizer, material.labels), len(context))
    own_bos = [] if bos_id is None else [bos_id]
    count = length - (bos_id is not None and position == "start")
    picked = [*range(len(own_bos)), *(len(own_bos) + index * len(context) // count for index in range(count))]
    layers = recited(material.base, [*own_bos, *context], picked)
    note = f"{length} virtual tokens: keys and values of {count} picked evenly from the teacher's {len(context)} tokens"
    return as_prompt(layers, position, bos_id, values), note


def from_matching(material: Material, position: str, bos_id: int | None, values: float) -> tuple[DeepPrompt, str]:
    """Keys of the text that its questions look at most, with values that make attention what it is behind the text; and a sentence about
    that. `values`: as for `deepened`. Raises ModelError as `matched`."""
    taught = _taught(material)
    length = prompt_length(material.config, material.base.tokenizer, material.labels)
    found = matched(material.base, taught.teacher, taught.rows, length, position, bos_id, material.seed)
    prompt = as_prompt(found.layers, position, bos_id, values)
    note = f"{prompt.length} virtual tokens: keys picked from the teacher's {len(taught.context)} tokens in every head, with values that "
    return prompt, note + f"match the attention of {found.num_queries} tokens of questions and answers but for {100 * found.error:.0f}%"


Source = Callable[[Material, int], Initial]
SOURCES: dict[str, Source] = {
    "text": from_text,
    "labels": from_labels,
    "vocab": from_vocabulary,
    "examples": from_examples,
    "random": from_noise,
    "file": from_file,
    "context": from_context,
    "spread": from_spread,
}
DEEP = {"states": from_states, "matching": from_matching}  # to keys and values, not to rows
TAUGHT = ("context", "spread", *DEEP)


def _looked_at(material: Material) -> Sequence[Encoded]:
    """All training rows, or LOOKED_AT of them, spread evenly."""
    return [material.rows[number] for number in sampled(len(material.rows), LOOKED_AT)]


def _rows(material: Material, ids: Sequence[int]) -> Tensor:
    base = material.base
    if max(ids, default=0) >= base.num_tokens:
        name = base.tokenizer.convert_ids_to_tokens(max(ids))
        raise ConfigError(f"prompt.text or a label holds the token {name!r}, which {base.name} has no embedding for: take it out")
    return base.embed_ids(ids)


def _text_ids(config: PromptConfig, tokenizer: object) -> list[int]:
    if config.text is None or not config.text.strip():
        raise ConfigError('prompt.text is empty: say in a sentence what the model should do, or set prompt.init = "vocab"')
    ids: list[int] = tokenizer(config.text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    if not ids:
        raise ConfigError(f"prompt.text {config.text!r} has no tokens in this tokenizer")
    return ids


def _taught(material: Material) -> Taught:
    if material.taught is None:
        (name, *_) = [name for name in material.config.sources if name in TAUGHT]
        raise ConfigError(f'prompt.init = "{name}" starts from what a teacher reads: set distil.text, distil.file or distil.examples')
    return material.taught


def _labels(labels: Sequence[str]) -> Sequence[str]:
    if not labels:
        raise ConfigError('prompt.init = "labels": the rows have no labels (rows of text and label have)')
    return labels


def _file(config: PromptConfig) -> str:
    if config.file is None:
        raise ConfigError('prompt.init = "file": prompt.file is not set: name a prompt, checkpoint or run folder')
    return config.file


def _named(path: str) -> str:
    """A prompt's or run's name, without its place: the note goes into the card, which travels."""
    place = Path(path)
    return place.parent.name if place.name == "prompt" else place.name


def _file_length(config: PromptConfig) -> int:
    return read_card(_file(config)).num_virtual_tokens
