"""One base in float32, bfloat16 and float16: the same to its prompts, and as fast; what a precision cannot hold is said."""

import re
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, OPTConfig

import softprompt
from softprompt.artifact import load_prompt, read_card
from softprompt.config import ModelConfig
from softprompt.engine.loading import load_base
from softprompt.engine.model import same_weights
from softprompt.engine.prefix import continue_plain, continue_shared, embedded, prefill
from softprompt.errors import ArtifactError, ModelError, RunError
from softprompt.training import train

DTYPES = ["float32", "bfloat16", "float16"]


def in_dtype(folder, dtype):
    return load_base(ModelConfig(name=str(folder), device="cpu", dtype=dtype))


def projected(folder: Path) -> Path:
    """An OPT whose embeddings are narrower than its layers, as those of facebook/opt-350m."""
    torch.manual_seed(0)
    size = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
    settings = OPTConfig(**size, word_embed_proj_dim=16, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [*sorted(tiny.FAMILIES), "projected"])
def test_every_precision_shares_the_prefix(bases, tmp_path, family, dtype):
    base = in_dtype(projected(tmp_path) if family == "projected" else bases(family).name, dtype)
    assert base.shares_prefix
    start_SH, ids_BT = base.embed_ids([5, 6, 7]), torch.tensor([[8, 9, 10, 11]])
    mask_BT, which_B, embeds_BTH = torch.ones_like(ids_BT), torch.zeros(1, dtype=torch.long), base.embed(ids_BT)
    shared = continue_shared(base.backbone, embeds_BTH, prefill(base.backbone, [start_SH]), which_B, mask_BT, keep=False).hidden_BTH
    plain = continue_plain(base.backbone, embeds_BTH, embedded([start_SH]), which_B, mask_BT, keep=False).hidden_BTH
    assert (shared - plain).float().norm() < {"float32": 1e-5, "bfloat16": 0.03, "float16": 0.005}[dtype] * plain.float().norm()


@pytest.mark.parametrize("origin", DTYPES)
@pytest.mark.parametrize("seed", range(2))
def test_a_base_is_the_same_in_every_precision_and_no_other_is(tmp_path, origin, seed):
    """`origin`: the precision of its files. Some weights are below what float16 holds well."""
    folder = tiny.tiny_folder(tmp_path / "base", seed=seed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) ** 12)
    model.to(getattr(torch, origin)).save_pretrained(folder)
    found = {dtype: in_dtype(folder, dtype) for dtype in DTYPES}
    assert found["float16"].fingerprint != found["float32"].fingerprint or origin == "float16"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.03)
    model.save_pretrained(folder)
    for one in DTYPES:
        tuned = in_dtype(folder, one)
        for other in DTYPES:
            how = {"in_float16": "float16" in (one, other)}
            ours = found[other].fingerprint, found[other].sample
            assert same_weights(ours, (found[one].fingerprint, found[one].sample), **how), (one, other)
            assert not same_weights(ours, (tuned.fingerprint, tuned.sample), **how), (one, other)


@pytest.mark.parametrize("trained_in", ["float16", "bfloat16"])
def test_a_prompt_is_used_in_every_precision(make_config, bases, tmp_path, trained_in):
    config = make_config(f"model.dtype={trained_in}", "train.steps=2")
    list(train(config))
    card = read_card(config.train.out)
    assert card.base.dtype == card.model_config_of_base.dtype == trained_in
    for dtype in DTYPES:
        base = in_dtype(bases().name, dtype)
        assert len(softprompt.generate(base, load_prompt(config.train.out, base), ["bring tea"], softprompt.Sampling(2))) == 1
    other = in_dtype(tiny.tiny_folder(tmp_path / "other", seed=1), "float16")
    with pytest.raises(ArtifactError, match="whose weights differ"):
        load_prompt(config.train.out, other)


def test_a_card_without_a_sample_is_known_by_its_fingerprint_alone(bases):
    base = bases()
    assert same_weights((base.fingerprint, ""), (base.fingerprint, base.sample), in_float16=True)
    assert not same_weights(("other", ""), (base.fingerprint, base.sample), in_float16=True)
    assert not same_weights(("other", base.sample), (base.fingerprint, base.sample), in_float16=False)


@pytest.fixture
def loud(tmp_path) -> Path:
    """A base whose states do not fit into float16: it holds 65,504 at most."""
    folder = tiny.tiny_folder(tmp_path / "loud")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, times in {"up_proj": 100, "gate_proj": 100, "down_proj": 1e4}.items():
            model.model.layers[0].mlp.get_submodule(name).weight.mul_(times)
    model.save_pretrained(folder)
    return folder


def test_an_overflow_is_said_to_be_one(loud):
    assert in_dtype(loud, "bfloat16").shares_prefix
    with pytest.raises(ModelError, match=r"float16 overflows with this base: use model\.dtype = .bfloat16. or .float32."):
        in_dtype(loud, "float16")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_overflow_in_training_is_said_too(make_config, monkeypatch, dtype):
    monkeypatch.setattr("softprompt.training.step_gradients", lambda *arguments: (torch.tensor([float("nan")]), 10))
    with pytest.raises(RunError, match=r"lower optim\.relative_lr") as told:
        list(train(make_config(f"model.dtype={dtype}", "train.steps=1")))
    assert ("float16 overflows" in str(told.value)) == (dtype == "float16")


def test_float64_is_for_the_cpu_alone():
    """Apple's GPUs have none."""
    package = Path(softprompt.__file__).parent
    found = [line for file in package.rglob("*.py") for line in re.findall(r".*\.double\(\).*", file.read_text(encoding="utf-8"))]
    assert len(found) == 4
    assert all(line.count(".double()") == line.count(".cpu().double()") for line in found)
