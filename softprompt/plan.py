"""A run in numbers before it runs: parameters and memory, from the base's configuration alone.

The model is built on the meta device, which has shapes and no weights.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from softprompt.config import Config
from softprompt.engine.dryrun import prefix_width, step_peak
from softprompt.engine.family import backbone_of, empty_model
from softprompt.engine.loading import device_of, gguf_place, load_dtype, load_settings, load_tokenizer, refuse_unsupported
from softprompt.engine.memory import activation_bytes, token_budget, weight_bytes
from softprompt.engine.model import check_context, context_length
from softprompt.engine.places import free_memory
from softprompt.engine.quantized import bits_of, method_of
from softprompt.init import prompt_length
from softprompt.rows import encoder_of, load_rows

FRAGMENTATION = {"cpu": 1.4}  # what the allocator cannot use again: 1.3 to 1.55 measured on a CPU (LOG.md), next to nothing on a GPU
BYTES_PER_FULL_PARAMETER = 16  # fp32 weight, gradient and Adam's two moments


@dataclass(frozen=True)
class Memory:
    """Bytes by part of one training step. `activations`: all that a step holds at most beside the other parts."""

    weights: int
    activations: int
    prompt: int
    optimizer: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Unpacking:
    """A GGUF file in Hugging Face's form, which a run trains on. Bytes: of the file; of the folder in the cache, which the whole base in
    memory takes too, once. `done`: whether the folder is there."""

    file: int
    folder: int
    where: str
    done: bool


@dataclass(frozen=True)
class Plan:
    """What a configuration will train and need. `weights_in`: bytes of the base's weights by what they could be loaded in; `free`: bytes of
    memory that the device has."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int | None
    vocabulary: int
    context_length: int | None
    num_virtual_tokens: int
    num_trainable: int
    num_base: int
    dtype: str
    memory: Memory
    full_finetuning_bytes: int
    weights_in: dict[str, int]
    free: int
    unpacking: Unpacking | None

    def as_dict(self) -> dict[str, Any]:
        """The documented JSON of `softprompt plan`."""
        memory = {**asdict(self.memory), "total": self.memory.total}
        return {**asdict(self), "memory": memory, "trainable_line": self.trainable_line}

    @property
    def trainable_line(self) -> str:
        """The line that PEFT prints: trainable, all, share."""
        return trainable_line(self.num_trainable, self.num_base)


def trainable_line(num_trainable: int, num_base: int) -> str:
    """`trainable params: 32,768 || all params: 1,303,144,448 || trainable%: 0.0025`."""
    total = num_base + num_trainable
    return f"trainable params: {num_trainable:,} || all params: {total:,} || trainable%: {100 * num_trainable / total:.4f}"


def make_plan(config: Config) -> Plan:
    """Counts what a configuration would train. Needs the base's config file, and its tokenizer only to count `prompt.text`.

    Raises ModelError when the configuration of the base cannot be had or the family is not supported.
    """
    settings = load_settings(config.model)
    refuse_unsupported(settings)
    with torch.device("meta"):
        model = empty_model(settings, load_dtype(config.model), trust_remote_code=config.model.trust_remote_code)
    text = settings.get_text_config(decoder=True)
    width = model.get_input_embeddings()(torch.zeros(1, dtype=torch.long, device="meta")).shape[-1]
    lengths, methods = _lengths(config), [own.prompt.method for own in config.members().values()]
    check_context(context_length(settings), max(lengths), config.data.max_length)
    dtype = load_dtype(config.model)
    widths = {"prompt": width, "prefix": prefix_width(settings, dtype) if "prefix" in methods else 0}
    num_trainable = sum(widths[method] * own for method, own in zip(methods, lengths, strict=True))
    memory = Memory(
        weights=weight_bytes(model, dtype, bits_of(settings, config.model.quantization)),
        activations=_activations(config, settings, model, lengths),
        prompt=2 * 4 * num_trainable,
        optimizer=2 * 4 * num_trainable,
    )
    return Plan(
        architecture=type(model).__name__,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_heads=getattr(text, "num_attention_heads", None),
        vocabulary=text.vocab_size,
        context_length=context_length(settings),
        num_virtual_tokens=sum(lengths),
        num_trainable=num_trainable,
        num_base=model.num_parameters(),
        dtype=str(dtype).removeprefix("torch."),
        memory=memory,
        full_finetuning_bytes=BYTES_PER_FULL_PARAMETER * model.num_parameters(),
        weights_in=_weights_in(model, settings, config),
        free=sum(free_memory(device_of(config.model.device), all_gpus=config.model.device == "auto").values()),
        unpacking=_unpacking(config, weight_bytes(model, dtype, None)),
    )


def _weights_in(model: Any, settings: Any, config: Config) -> dict[str, int]:
    """Of a base that was saved in few bits, as it is alone."""
    if method_of(settings) is not None:
        return {}
    full = {str(dtype).removeprefix("torch."): weight_bytes(model, dtype, None) for dtype in (torch.float32, torch.bfloat16)}
    few = {kind: weight_bytes(model, load_dtype(config.model), bits_of(settings, kind)) for kind in ("int8", "nf4")}
    return full | few


def _unpacking(config: Config, num_bytes: int) -> Unpacking | None:
    found = gguf_place(config.model)
    if found is None:
        return None
    file, folder = found
    return Unpacking(file.stat().st_size, num_bytes, str(folder), folder.is_dir())


def _activations(config: Config, settings: Any, model: Any, lengths: Sequence[int]) -> int:
    """Bytes of a step beside weights, prompt and optimizer, with the largest micro-batch that the configuration can have."""
    width, device = config.data.max_length, device_of(config.model.device)
    budget = token_budget(backbone_of(model), device, config.train.tokens_per_batch)
    rows = max(1, min(budget // width, config.train.examples_per_step * len(lengths)))
    try:
        peak = step_peak(settings, model.dtype, [length + 1 for length in lengths], (rows, width), config.train.checkpoint_activations)
    except Exception:  # what some layers do depends on numbers, which a plan has none of: experts, for one
        peak = rows * (width + max(lengths)) * activation_bytes(backbone_of(model))
    return round(peak * FRAGMENTATION.get(device.type, 1.0))


def _lengths(config: Config) -> list[int]:
    """Virtual tokens of every prompt of the run; tokenizer and rows are loaded only where they have to be looked at."""
    prompts = [own.prompt for own in config.members().values()]
    open_ended = [prompt for prompt in prompts if prompt.length is None]
    sources = {source for prompt in open_ended for source in prompt.sources}
    tokenizer = load_tokenizer(config.model) if sources & {"text", "labels"} else None
    labels = load_rows(config, encoder_of(config))[1].labels if "labels" in sources else ()
    return [prompt_length(prompt, tokenizer, labels) for prompt in prompts]
