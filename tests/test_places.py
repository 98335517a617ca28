"""Where a base lies: on one device, its layers on several, or nowhere, in a sentence. The sizes of memory are made up here."""

import re

import pytest
import tiny
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from test_multimodal import SEEING
from transformers import CONFIG_MAPPING

from softprompt.config import ModelConfig
from softprompt.engine import loading, model, places
from softprompt.engine.family import backbone_of, empty_model
from softprompt.engine.loading import load_base
from softprompt.engine.memory import weight_bytes
from softprompt.engine.places import device_map
from softprompt.engine.prefix import checkpointed
from softprompt.errors import ModelError
from softprompt.plan import make_plan

LAYERS = 6


def empty(family):
    if family in SEEING:
        deep = {**SEEING[family], "text_config": {**SEEING[family]["text_config"], "num_hidden_layers": LAYERS}}
    else:
        deep = {**tiny.FAMILIES[family], "n_layer" if "n_layer" in tiny.FAMILIES[family] else "num_hidden_layers": LAYERS}
    with torch.device("meta"):
        return empty_model(CONFIG_MAPPING[family](**deep), torch.float32)


def place_of(places, name):
    """The device of a parameter: that of the longest entry that it lies in."""
    return places[max((entry for entry in places if f"{name}.".startswith(f"{entry}.") or not entry), key=len)]


@pytest.mark.parametrize("family", [*sorted(tiny.FAMILIES), "llava", "qwen2_5_vl"])
def test_layers_lie_on_several_gpus_in_turn_and_the_rest_on_the_first(family):
    whole = empty(family)
    layers = next(module for module in backbone_of(whole).modules() if isinstance(module, torch.nn.ModuleList))
    each = weight_bytes(layers[0], torch.float32, None)
    rest = weight_bytes(whole, torch.float32, None) - LAYERS * each
    free = {"cuda:0": rest + 3 * each, "cuda:1": 2 * each + 100, "cuda:2": 4 * each}
    found = device_map(whole, torch.float32, None, free, family)
    names = {module: name for name, module in whole.named_modules()}
    devices = [place_of(found, names[layer]) for layer in layers]
    assert devices == sorted(devices)
    assert set(devices) <= set(free)
    assert len(set(devices)) > 1
    for device, room in free.items():
        assert devices.count(device) * each + (rest if device == "cuda:0" else 0) <= room
    inside = tuple(f"{names[layer]}." for layer in layers)
    for name, _ in (*whole.named_parameters(), *whole.named_buffers()):
        if not name.startswith(inside):
            assert place_of(found, name) == "cuda:0"


def test_gpus_are_filled_evenly():
    whole = empty("llama")
    each = weight_bytes(whole.model.layers[0], torch.float32, None)
    rest = weight_bytes(whole, torch.float32, None) - LAYERS * each
    room = {"cuda:0": rest + 5 * each, "cuda:1": rest + 5 * each}
    devices = list(device_map(whole, torch.float32, None, room, "base").values())
    assert devices.count("cuda:1") > LAYERS / 2, "the first has table and head already"


def test_one_device_is_enough_where_it_is_enough():
    whole = empty("llama")
    needed = weight_bytes(whole, torch.float32, None)
    assert device_map(whole, torch.float32, None, {"cuda:0": needed}, "base") == {"": "cuda:0"}
    assert device_map(whole, torch.float32, None, {"cuda:0": 2 * needed, "cuda:1": 2 * needed}, "base") == {"": "cuda:0"}
    assert len(device_map(whole, torch.float32, None, {"cuda:0": needed, "cuda:1": 2 * needed}, "base")) > 1, "a step needs room too"
    assert device_map(whole, torch.float32, 4, {"cuda:0": needed // 2}, "base") == {"": "cuda:0"}, "in four bits"


@pytest.mark.parametrize("free", [{"cuda:0": 100}, {"cuda:0": 30_000, "cuda:1": 30_000}, {"cpu": 0}])
def test_too_little_memory_is_a_sentence(free):
    with pytest.raises(ModelError, match=r"^base needs [\d.e-]+ GB for its weights and .* free: try model.quantization"):
        device_map(empty("llama"), torch.float32, None, free, "base")


def test_all_gpus_are_asked_for_auto_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 + index, 100))
    assert places.free_memory(torch.device("cuda"), all_gpus=True) == {"cuda:1": 11, "cuda:0": 10, "cuda:2": 12}
    assert places.free_memory(torch.device("cuda"), all_gpus=False) == {"cuda:1": 11}
    assert places.free_memory(torch.device("cuda:2"), all_gpus=False) == {"cuda:2": 12}
    assert places.free_memory(torch.device("cpu"), all_gpus=True)["cpu"] > 0


def test_what_a_base_needs_is_what_the_plan_says(bases, make_config, monkeypatch):
    weights = make_plan(make_config()).memory.weights
    monkeypatch.setattr(loading, "SMALL", 0)
    monkeypatch.setattr(loading, "free_memory", lambda device, all_gpus: {"cpu": 1})
    with pytest.raises(ModelError, match=re.escape(f"needs {weights / 1e9:.3g} GB for its weights and cpu has 1e-09 GB free")):
        load_base(ModelConfig(name=bases().name, device="cpu"))
    monkeypatch.setattr(loading, "free_memory", lambda device, all_gpus: {"cpu": weights})
    assert load_base(ModelConfig(name=bases().name, device="cpu")).fingerprint == bases().fingerprint


@pytest.mark.parametrize("place", ["from_pretrained", "check"])
def test_running_out_of_memory_is_a_sentence(bases, monkeypatch, place):
    def full(*arguments, **how):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nand more lines")

    if place == "check":
        monkeypatch.setattr(model, "check", full)
    else:
        monkeypatch.setattr(loading, "class_of", lambda settings: type("Kind", (), {"from_pretrained": full}))
    with pytest.raises(ModelError, match=r"the device ran out of memory: try model\.quantization") as told:
        load_base(ModelConfig(name=bases().name, device="cpu"))
    assert "\n" not in str(told.value)


def test_layers_keep_their_hooks_when_their_activations_are_checkpointed(tmp_path):
    """accelerate moves states from device to device in a `forward` of its own."""
    base = tiny.tiny_base(tmp_path)
    layer = base.backbone.layers[1]
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    hooked = vars(layer)["forward"]
    with checkpointed(base.backbone):
        assert vars(layer)["forward"] is not hooked
    assert vars(layer)["forward"] is hooked
    assert "forward" not in vars(base.backbone.layers[0])


def test_a_base_on_one_device_has_no_hooks(bases):
    assert not any(hasattr(module, "_hf_hook") for module in bases().model.modules())
