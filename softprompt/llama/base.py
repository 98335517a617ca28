"""A GGUF file as a base that llama.cpp holds, quantised as it is: what answers are made over, and what of prompts it can check.

Its weights are never unpacked. So whether a prompt was trained on them is told by less than on a base of ours: `other_than` says by what.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from gguf.quants import dequantize
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import cached_file

from softprompt.config import ModelConfig
from softprompt.engine.gguf_reader import BareReader
from softprompt.engine.loading import device_of, load_settings, load_tokenizer, refuse_unsupported
from softprompt.engine.model import context_length, stop_ids, tokenizer_fingerprint
from softprompt.engine.prompt import DeepPrompt, Prompt, SoftPrompt
from softprompt.engine.unpack import content_hash, known_fingerprints
from softprompt.errors import ConfigError, ModelError
from softprompt.export.slots import ALIKE
from softprompt.llama.context import Context, Piece
from softprompt.llama.rows import LlamaRows, Sequences
from softprompt.llama.states import Layout

MEMORY, SHARE = 2**28, 0.2  # bytes of the cache: so many, or this share of a larger file
MOST_POSITIONS, BLOCK = 1 << 17, 256
SAME_ROW = 0.1  # relative error up to which two embedding rows are the same one, in whatever quantisation
TRIED = 7  # a token whose row is tried
TRIED_NEAR = 0.05  # relative error of logits


@dataclass(frozen=True, eq=False)
class GgufBase:
    """See engine.rows.Held. Of the file: `fingerprints` of its weights, where it was unpacked on this machine before; `content`, its hash.

    `shapes`: of keys and values, as a prompt has them. `layout`: how they lie in llama.cpp's cache, or why that is not known.
    """

    name: str
    tokenizer: Any
    stop_ids: frozenset[int]
    context_length: int
    model_type: str
    hidden_size: int
    shapes: tuple[tuple[int, int], ...]
    fingerprints: frozenset[str]
    content: str
    tokenizer_fingerprint: str
    sequences: Sequences = field(repr=False)
    table: "Table" = field(repr=False)
    layout: "Layout | ModelError" = field(repr=False)
    device: torch.device

    @property
    def num_tokens(self) -> int:
        return min(len(self.tokenizer), self.sequences.context.num_logits)

    def rows(self) -> LlamaRows:
        return LlamaRows(self.sequences)

    def other_than(self, fingerprint: str, model_type: str, bos: Tensor | None, bos_id: int | None) -> bool:
        """Whether weights with this fingerprint, of a base of this type, are others than the file's. `bos`: what a prompt's file holds of
        the BOS in front of it, its row or its keys and values: where either fingerprint is not known, that is compared."""
        if self.fingerprints and fingerprint:
            return fingerprint not in self.fingerprints
        if model_type != self.model_type or bos is None or bos_id is None:
            return model_type != self.model_type
        if len(bos) == self.hidden_size and len(bos) != sum(heads * size for heads, size in self.shapes):
            return _distance(self.table.row(bos_id), bos) > SAME_ROW
        own = self.sequences.new()
        try:
            self.sequences.read([Piece(own, 0, [bos_id])])
            return self.known_layout().distance(self.sequences.context.state(own), bos) > ALIKE
        finally:
            self.sequences.free(own)

    def known_layout(self) -> Layout:
        """Raises ModelError where keys and values of prompts cannot be put into llama.cpp's cache."""
        if isinstance(self.layout, ModelError):
            raise self.layout
        return self.layout


@dataclass(frozen=True)
class Table:
    """The file's embedding rows as the embedding module gives them, and what llama.cpp is given for such a row: `times` it."""

    tensor: Any
    scale: float
    times: float = 1.0

    @classmethod
    def of(cls, file: Path, settings: Any) -> "Table":
        tensor = next((one for one in BareReader(file).tensors if one.name == "token_embd.weight"), None)
        if tensor is None:
            raise ModelError(f"{file}: there are no embeddings in it")
        return cls(tensor, settings.hidden_size**0.5 if settings.model_type.startswith("gemma") else 1.0)

    def row(self, token: int) -> Tensor:
        """[H] float32."""
        return torch.from_numpy(dequantize(self.tensor.data[token : token + 1], self.tensor.tensor_type)[0].copy()).float() * self.scale


def load_gguf(config: ModelConfig, *, memory_bytes: int | None = None, cache_type: Literal["f16", "f32"] = "f16") -> GgufBase:
    """The base of a configuration, held by llama.cpp. `memory_bytes`: what the cache of keys and values takes, that of prompts and of
    answers; `cache_type`: in what it holds them.

    Raises MissingPackage, ConfigError for a base that is no GGUF file, ModelError for one that cannot be served so.
    """
    name, gguf_file = config.location
    if gguf_file is None:
        raise ConfigError(f"{name} is no GGUF file: --engine llama serves those alone; model.gguf_file=FILE names one")
    settings = load_settings(config)
    refuse_unsupported(settings)
    file, text = Path(cached_file(name, gguf_file, revision=config.revision)), settings.get_text_config(decoder=True)
    shapes = _shapes(text)
    size = sum(heads * width for heads, width in shapes) * (2 if cache_type == "f16" else 4)
    room = (memory_bytes or max(MEMORY, int(SHARE * file.stat().st_size))) // size
    positions = min(MOST_POSITIONS, max(1, room // BLOCK) * BLOCK)
    gpu = config.device != "cpu" and device_of(config.device).type != "cpu"
    context = Context(file, positions, cache_type, torch.get_num_threads(), gpu=gpu or config.device == "auto")
    table = _tried(Table.of(file, text), context, file)
    tokenizer = load_tokenizer(config)
    layout = _layout(str(file), text, context, shapes)
    return GgufBase(
        name=f"{name}/{gguf_file}",
        tokenizer=tokenizer,
        stop_ids=stop_ids(tokenizer, GenerationConfig.from_model_config(settings)),
        context_length=min(context.num_positions, context_length(settings) or context.num_positions),
        model_type=settings.model_type,
        hidden_size=context.row_size,
        shapes=shapes,
        fingerprints=known_fingerprints(file),
        content=content_hash(file),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        sequences=Sequences(context, _Reading(context, table, layout), size),
        table=table,
        layout=layout,
        device=torch.device("cpu"),  # where tokens are chosen
    )


def _shapes(text: Any) -> tuple[tuple[int, int], ...]:
    """Of keys and values of every layer, by the settings."""
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ((heads, size),) * (2 * text.num_hidden_layers)


def _layout(name: str, text: Any, context: Context, shapes: tuple[tuple[int, int], ...]) -> "Layout | ModelError":
    kinds: Sequence[str] = getattr(text, "layer_types", None) or ("full_attention",) * text.num_hidden_layers
    try:
        return Layout.of(name, text.model_type, context.turned, [kind == "sliding_attention" for kind in kinds], shapes)
    except ModelError as error:
        return error


def _tried(table: Table, context: Context, file: Path) -> Table:
    """The table with what llama.cpp is to be given for its rows: some families' rows it multiplies itself, by what their embedding modules
    multiply by. A token's logits tell. Raises ModelError where its row does not give them."""
    (wanted_V,) = context.read([Piece(0, 0, [TRIED], [0])])
    context.clear(0)
    for times in dict.fromkeys((1.0, 1 / table.scale)):
        (found_V,) = context.read([Piece(0, 0, times * table.row(TRIED)[None], [0])])
        context.clear(0)
        if _distance(found_V, wanted_V) < TRIED_NEAR:
            return Table(table.tensor, table.scale, times)
    raise ModelError(f"{file}: llama.cpp takes other rows than those of its embeddings, so it cannot read prompts over it")


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-9))


@dataclass(frozen=True)
class _Reading:
    """Reads a prompt into an empty sequence."""

    context: Context
    table: Table
    layout: "Layout | ModelError"

    def __call__(self, prompt: Prompt, sequence: int) -> None:
        bos = [] if prompt.bos_id is None else [prompt.bos_id]
        before, behind = ([], bos) if prompt.position == "start" else (bos, [])
        if isinstance(prompt, DeepPrompt):
            self._put(prompt, sequence, before)
        else:
            assert isinstance(prompt, SoftPrompt)
            self._read(sequence, 0, before)
            self._read(sequence, len(before), prompt.rows_PH * self.table.times)
        self._read(sequence, len(before) + prompt.length, behind)

    def _read(self, sequence: int, position: int, what: "list[int] | Tensor") -> None:
        if len(what):
            self.context.read([Piece(sequence, position, what)])

    def _put(self, prompt: DeepPrompt, sequence: int, before: list[int]) -> None:
        """Keys and values take the place of those of plain tokens."""
        if isinstance(self.layout, ModelError):
            raise self.layout
        self._read(sequence, 0, [*before, *[TRIED] * prompt.length])
        state = self.layout.with_prompt(self.context.state(sequence), prompt.scaled_PD * prompt.scale_D, len(before))
        self.context.clear(sequence)
        self.context.put(sequence, state)
