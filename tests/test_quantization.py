"""Bases in 8 and 4 bits: they load, train and are found again, and their gradient is that of the weights they stand for."""

import copy

import pytest
import tiny
import torch
from test_invariants import encoded_rows, loss_and_gradient, some_prompt

from softprompt.artifact import load_prompt, read_card
from softprompt.config import ModelConfig
from softprompt.engine import loading
from softprompt.engine.loading import load_base
from softprompt.engine.model import freeze
from softprompt.errors import ConfigError, MissingPackage
from softprompt.plan import make_plan
from softprompt.training import train

KINDS = ["int8", "nf4"]


@pytest.fixture
def folder(tmp_path):
    return tiny.tiny_folder(tmp_path / "base", "llama", hidden_size=64, intermediate_size=128)


def quantized(folder, kind):
    return load_base(ModelConfig(name=str(folder), device="cpu", dtype="float32", quantization=kind))


@pytest.mark.parametrize(("kind", "least"), [("int8", 0.99), ("nf4", 0.99999)])
def test_the_gradient_is_that_of_the_weights_it_stands_for(folder, kind, least):
    base = quantized(folder, kind)
    assert base.shares_prefix
    plain = freeze(copy.deepcopy(base.model).dequantize().float(), base.tokenizer, "dequantized")
    assert type(plain.model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    soft, rows = some_prompt(plain), encoded_rows()
    grads = [loss_and_gradient(one, soft, rows, 64)[1].flatten() for one in (base, plain)]
    assert torch.cosine_similarity(*grads, dim=0) > least  # int8 rounds the states as well as the weights
    assert 0.95 < grads[0].norm() / grads[1].norm() < 1.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base_trains_and_its_prompt_finds_it_again(folder, make_config, kind):
    config = make_config(f"model.name={folder}", f"model.quantization={kind}", "train.steps=8")
    *_, finished = train(config)
    assert finished.result["eval_loss_after"] < finished.result["eval_loss_before"]
    card = read_card(config.train.out)
    assert card.base.quantization == kind
    again = load_base(card.model_config_of_base.model_copy(update={"device": "cpu"}))
    assert load_prompt(config.train.out, again).soft.rows_PH.shape[1] == 64


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_knows_the_weights(folder, make_config, kind):
    base = quantized(folder, kind)
    held = sum(tensor.numel() * tensor.element_size() for tensor in base.model.state_dict().values())
    planned = make_plan(make_config(f"model.name={folder}", f"model.quantization={kind}", "model.dtype=float32")).memory.weights
    tables = 14 * 1400  # of the 14 matrices, whatever their size: next to nothing beside real ones
    assert planned == pytest.approx(held, abs=tables)


def test_a_gguf_file_is_not_quantized_again():
    with pytest.raises(ConfigError, match="GGUF file is unpacked"):
        loading._quantization(ModelConfig(name="base.gguf", quantization="nf4"))


def test_without_bitsandbytes_the_install_line_is_said(folder, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda package: None)
    with pytest.raises(MissingPackage, match=r"pip install 'softprompt\[quantization\]'"):
        quantized(folder, "nf4")
