"""Bases whose layers stay in their files and are read one by one as a forward comes to them: for commands that run only a few texts.

accelerate does the reading. Memory is then that of the embedding table, the head and the largest single matrix.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.accelerate import load_offloaded_parameter

from softprompt.engine.family import empty_model

EVERYTHING = {"": "disk"}  # the device map of a model of which nothing is kept


def from_files(settings: Any, device: torch.device, spare: Path, *, trust_remote_code: bool) -> dict[str, Any]:
    """How from_pretrained is told to keep the embedding table and the head alone, on `device`.

    `spare`: a folder for weights that the files hold in another form than the model; it must outlive the model.
    """
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of what is asked for here
    with torch.device("meta"):
        model = empty_model(settings, torch.bfloat16, trust_remote_code=trust_remote_code)
    kept = {model.get_input_embeddings(), model.get_output_embeddings()}
    return {"device_map": _places("", model, kept, str(device)), "offload_folder": str(spare)}


def _places(name: str, module: nn.Module, kept: set[nn.Module], device: str) -> dict[str, str]:
    """Where each part lies: the largest parts without anything that is kept lie on the disk."""
    if module in kept:
        return {name: device}
    if kept.isdisjoint(module.modules()):
        return {name: "disk"}
    places: dict[str, str] = {}
    for child, part in module.named_children():
        places |= _places(f"{name}.{child}".lstrip("."), part, kept, device)
    return places


def values_of(model: Any, name: str, tensor: Tensor) -> Tensor:
    """The numbers of an entry of `model.state_dict()`, from its file where they are not in memory."""
    return load_offloaded_parameter(model, name) if tensor.is_meta else tensor.detach()
