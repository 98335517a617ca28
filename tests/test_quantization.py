"""Bases in 8 and 4 bits: they load, train and are found again, and their gradient is that of the weights they stand for."""

import copy
import json
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_invariants import encoded_rows, loss_and_gradient, some_prompt
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from softprompt.artifact import load_prompt, read_card
from softprompt.config import ModelConfig
from softprompt.engine import loading
from softprompt.engine.loading import load_base
from softprompt.engine.model import freeze
from softprompt.errors import ArtifactError, ConfigError, MissingPackage, ModelError
from softprompt.export import Wanted, export
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
        loading._quantization(ModelConfig(name="base.gguf", quantization="nf4"), LlamaConfig())


def test_without_bitsandbytes_the_install_line_is_said(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(MissingPackage, match=r"pip install 'softprompt\[quantization\]'"):
        quantized(folder, "nf4")


# ---- bases that were saved in few bits -----------------------------------------------------------------------------


FOUR_BIT = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float16"}
SAVED_WITH = {"int8": BitsAndBytesConfig(load_in_8bit=True), "nf4": BitsAndBytesConfig(load_in_4bit=True, **FOUR_BIT)}


@pytest.fixture(params=KINDS)
def saved(request, folder, tmp_path):
    """(folder of the base as it was saved in few bits, model.quantization that means the same)."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=SAVED_WITH[request.param], device_map={"": "cpu"})
    model.save_pretrained(tmp_path / "saved")
    tiny.tiny_tokenizer(chat=True).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"
    return tmp_path / "saved", request.param


def test_a_base_saved_in_few_bits_is_what_the_same_quantization_gives(folder, saved):
    path, kind = saved
    base, ours = load_base(ModelConfig(name=str(path), device="cpu", dtype="float32")), quantized(folder, kind)
    assert base.fingerprint == ours.fingerprint
    soft, rows = some_prompt(ours), encoded_rows()
    (loss, grad), (other, other_grad) = (loss_and_gradient(one, soft, rows, 64) for one in (base, ours))
    assert loss == other
    assert torch.equal(grad, other_grad)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_computes_in_the_precision_asked_for(saved, dtype):
    base = load_base(ModelConfig(name=str(saved[0]), device="cpu", dtype=dtype))
    assert base.shares_prefix
    assert base.dtype == base.head.weight_VH.dtype == getattr(torch, dtype)
    assert getattr(base.model.model.layers[0].mlp.up_proj, "compute_dtype", base.dtype) == base.dtype


def test_it_is_planned_trained_and_carried(saved, make_config, tmp_path):
    path, kind = saved
    config = make_config(f"model.name={path}", "model.dtype=float32", "train.steps=8", "data.template=chat")
    base = load_base(config.model)
    held = sum(tensor.numel() * tensor.element_size() for tensor in base.model.state_dict().values())
    assert make_plan(config).memory.weights == pytest.approx(held, abs=14 * 1400)
    *_, finished = train(config)
    assert finished.result["eval_loss_after"] < finished.result["eval_loss_before"]
    assert read_card(config.train.out).base.quantization is None
    checked = export(Wanted([tmp_path / "run"], "vocab", tmp_path / "vocab"), config.model)["checked"]
    assert checked["logits_relative_error"] < (1e-4 if kind == "nf4" else 0.05)
    packed, before = (load_file(where / "model.safetensors")["model.layers.0.mlp.up_proj.weight"] for where in (tmp_path / "vocab", path))
    assert torch.equal(packed, before), "as few bits as it had"
    with pytest.raises(ArtifactError, match="a GGUF file has other weights: move it there first, softprompt recycle"):
        export(Wanted([tmp_path / "run"], "gguf", tmp_path / "gguf"), config.model)


def test_it_is_not_quantized_again(saved):
    with pytest.raises(ConfigError, match="is quantised already, by bitsandbytes: leave it out"):
        load_base(ModelConfig(name=str(saved[0]), device="cpu", quantization="nf4"))


def test_a_base_saved_in_few_bits_says_which_package_it_wants(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(MissingPackage, match=r"pip install 'softprompt\[quantization\]'"):
        load_base(ModelConfig(name=str(saved[0]), device="cpu"))


@pytest.mark.parametrize(
    ("said", "wants"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "gptqmodel"),
    ],
)
def test_what_is_not_installed_is_said_in_a_sentence(folder, said, wants):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": said}))
    with pytest.raises(ModelError) as told:
        load_base(ModelConfig(name=str(folder), device="cpu"))
    assert str(told.value).startswith(f"{folder}: cannot be loaded as a model: ")
    assert wants in str(told.value)
    assert "\n" not in str(told.value)


def test_compressed_tensors_are_unpacked_and_trained_on(folder, make_config, tmp_path):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import ModelCompressor

    weights = quantization.QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    groups = {"all": quantization.QuantizationScheme(targets=["Linear"], weights=weights)}
    settings = quantization.QuantizationConfig(config_groups=groups, ignore=["lm_head"], format="pack-quantized")
    model = AutoModelForCausalLM.from_pretrained(folder)
    quantization.apply_quantization_config(model, settings)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.detach().unflatten(1, (-1, 32)).abs().amax(dim=-1) / 7.5
    compressor = ModelCompressor(quantization_config=settings)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "saved")
    compressor.update_config(tmp_path / "saved")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "saved")
    assert "model.layers.0.mlp.up_proj.weight_packed" in load_file(tmp_path / "saved" / "model.safetensors")
    config = make_config(f"model.name={tmp_path / 'saved'}", "model.dtype=float32", "train.steps=8")
    assert load_base(config.model).shares_prefix
    assert make_plan(config).memory.weights == make_plan(make_config(f"model.name={folder}", "model.dtype=float32")).memory.weights
    *_, finished = train(config)
    assert finished.result["eval_loss_after"] < finished.result["eval_loss_before"]
    assert load_prompt(config.train.out, load_base(config.model)).soft.rows_PH.shape[1] == 64
