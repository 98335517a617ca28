"""Which class of transformers a base is built with: of one that also sees or hears, the language model in it alone.

Its own class is built, so that the names of its weights and its treatment of logits hold, and all but decoder and head is taken out
before a weight is read: files of images' layers are never opened, and never held.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
)
from transformers.initialization import no_init_weights

CHUNK = 64  # tokens: as many as the layers of gated delta rules take at a time


def class_of(settings: Any) -> Any:
    """What has `from_pretrained` for a base of this configuration."""
    if "AutoModelForCausalLM" in (getattr(settings, "auto_map", None) or {}) or not _is_part(settings):
        return AutoModelForCausalLM
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING):
        found = mapping.get(type(settings), None)
        if found is not None:
            return _language_model_of(found) if found.config_class is type(settings) else AutoModelForCausalLM
    return AutoModelForCausalLM


def empty_model(settings: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """The model that `class_of` loads, of which only shapes are looked at: its numbers are whatever memory held, or none at all under
    torch.device("meta")."""
    kind = class_of(settings)
    with no_init_weights():
        if kind is AutoModelForCausalLM:
            model = kind.from_config(settings, dtype=dtype, trust_remote_code=trust_remote_code)
        else:
            model = kind._from_config(settings, dtype=dtype)
    model.tie_weights()
    return model


def backbone_of(model: Any) -> Any:
    """The layers that read text, without the head."""
    if _is_part(model.config):
        return model.get_decoder().base_model
    return model.model if model.base_model is model else model.base_model  # Llama 4 and Mllama call their layers by another name


def weights_of(model: Any) -> list[tuple[str, str, Tensor]]:
    """(name where the language model stands alone, name in `model.state_dict()`, tensor) of all weights, in the order of the first: the
    same for the language model in a larger one, and for it alone."""
    found = [(name, name, tensor) for name, tensor in model.state_dict().items()]
    if _is_part(model.config):
        kept = {backbone_of(model): "model", model.get_output_embeddings(): "lm_head"}
        inside = {f"{name}.": kept[module] for name, module in model.named_modules() if module in kept}
        found = [
            (f"{alone}.{name.removeprefix(within)}", name, tensor)
            for _, name, tensor in found
            for within, alone in inside.items()
            if name.startswith(within)
        ]
    return sorted(found, key=lambda one: one[0])


def _is_part(settings: Any) -> bool:
    """Whether the language model is one part of a larger one."""
    return settings.get_text_config(decoder=True) is not settings


def _language_model_of(whole: Any) -> Any:
    """The class, without what is neither decoder nor head."""

    def build(self: Any, *arguments: Any, **how: Any) -> None:
        whole.__init__(self, *arguments, **how)
        _take_out(self, {backbone_of(self), self.get_output_embeddings()})

    return type(whole.__name__, (whole,), {"__init__": build, "__module__": whole.__module__, "__doc__": whole.__doc__})


def _take_out(module: nn.Module, kept: set[nn.Module]) -> None:
    for name, child in module.named_children():
        if child in kept:
            continue
        if kept.isdisjoint(child.modules()):
            setattr(module, name, None)
        else:
            _take_out(child, kept)


def shorten_chunks(model: Any) -> None:
    """Makes a Mamba 2 base read in chunks of CHUNK tokens. Its layers fill every text up to whole chunks, of 256 tokens in most bases: on a
    CPU, where no kernel of its own reads them, short texts take several times as long as they need (LOG.md). The numbers are the same up to
    rounding."""
    for module in model.modules():
        if hasattr(module, "A_log") and isinstance(getattr(module, "chunk_size", None), int):
            module.chunk_size = min(module.chunk_size, CHUNK)
