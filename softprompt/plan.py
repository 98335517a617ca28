"""A run in numbers before it runs: parameters and memory, from the base's configuration alone.

The model is built on the meta device, which has shapes and no weights.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from softprompt.config import Config
from softprompt.errors import ConfigError
from softprompt.head import BLOCK_NUMBERS
from softprompt.init import prompt_length
from softprompt.memory import CPU_TOKENS, activation_bytes
from softprompt.model import context_length, load_dtype, load_settings, load_tokenizer, refuse_unsupported
from softprompt.training import check_context

BYTES_PER_FULL_PARAMETER = 16  # fp32 weight, gradient and Adam's two moments


@dataclass(frozen=True)
class Memory:
    """Bytes by part of one training step. Activations are an estimate."""

    weights: int
    activations: int
    logits_chunk: int
    prompt: int
    optimizer: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Plan:
    """What a configuration will train and need."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    vocabulary: int
    context_length: int | None
    num_virtual_tokens: int
    num_trainable: int
    num_base: int
    dtype: str
    memory: Memory
    full_finetuning_bytes: int

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
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=config.model.trust_remote_code)
    text = settings.get_text_config(decoder=True)
    width = model.get_input_embeddings()(torch.zeros(1, dtype=torch.long, device="meta")).shape[-1]
    lengths = [_length(own) for own in config.members().values()]
    check_context(context_length(settings), max(lengths), config.data.max_length)
    length = sum(lengths)
    dtype = load_dtype(config.model)
    rows_bytes = 4 * length * width
    memory = Memory(
        weights=sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize,
        activations=activation_bytes(model.base_model) * ((config.train.tokens_per_batch or CPU_TOKENS) + length),
        logits_chunk=4 * BLOCK_NUMBERS["cpu"],
        prompt=2 * rows_bytes,
        optimizer=2 * rows_bytes,
    )
    return Plan(
        architecture=type(model).__name__,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_heads=text.num_attention_heads,
        vocabulary=text.vocab_size,
        context_length=context_length(settings),
        num_virtual_tokens=length,
        num_trainable=length * width,
        num_base=model.num_parameters(),
        dtype=str(dtype).removeprefix("torch."),
        memory=memory,
        full_finetuning_bytes=BYTES_PER_FULL_PARAMETER * model.num_parameters(),
    )


def _length(config: Config) -> int:
    if config.prompt.length is not None or config.prompt.text is None:
        if config.prompt.length is None and config.prompt.init == "text":
            raise ConfigError("prompt.text or prompt.length is needed to plan")
        return prompt_length(config.prompt, None)
    return prompt_length(config.prompt, load_tokenizer(config.model))
