"""Parameters and memory from a configuration alone, against published numbers and against the loaded model."""

from pathlib import Path

import pytest
import tiny
import torch
from other_engines import tiny_gguf
from transformers import BloomConfig

from softprompt.config import OptimConfig, load_config
from softprompt.engine.dryrun import _Alive, step_peak
from softprompt.engine.loading import load_base
from softprompt.engine.optim import PromptOptimizer
from softprompt.engine.prompt import SoftPrompt
from softprompt.engine.step import StepSettings, step_gradients
from softprompt.engine.tokens import Encoded
from softprompt.errors import ConfigError
from softprompt.events import returned
from softprompt.job import prepare
from softprompt.plan import make_plan
from softprompt.screen.console import size
from softprompt.screen.run import draw_plan


@pytest.fixture
def bloom(tmp_path) -> str:
    """bloom-1b4-zh: its configuration, no weights, no tokenizer."""
    BloomConfig(vocab_size=46145, hidden_size=2048, n_layer=24, n_head=16).save_pretrained(tmp_path)
    return str(tmp_path)


def plan_of(name: str, *overrides: str):
    return make_plan(load_config(None, [f"model.name={name}", "model.device=cpu", "prompt.init=random", *overrides]))


def test_bloom_1b4_zh_has_the_numbers_of_the_tutorial(bloom):
    plan = plan_of(bloom, "prompt.length=16")
    assert plan.trainable_line == "trainable params: 32,768 || all params: 1,303,144,448 || trainable%: 0.0025"
    assert size(plan.full_finetuning_bytes) == "20.8 GB"
    assert (plan.architecture, plan.num_layers, plan.hidden_size, plan.num_heads) == ("BloomForCausalLM", 24, 2048, 16)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_the_parts_of_memory_are_those_of_a_run(bases, make_config, method):
    """Counted on the base that is loaded, and on a prompt and its optimizer after a step."""
    config = make_config(f"prompt.method={method}", "train.steps=1")
    memory = make_plan(config).memory
    setup = returned(prepare(config, bases()))
    prompt = next(iter(setup.untrained.values())).prompt
    optimizer = PromptOptimizer(prompt.learned_PD, OptimConfig(relative_lr=0.1), 1, 1.0)
    optimizer.learned_PD.grad = torch.ones_like(prompt.learned_PD)
    held = [optimizer.learned_PD, optimizer.learned_PD.grad]
    assert memory.prompt == sum(tensor.nbytes for tensor in held)
    optimizer.step(0)
    assert memory.optimizer == sum(tensor.nbytes for name, tensor in optimizer.state().items() if name.startswith("exp_avg"))
    assert memory.weights == sum(parameter.nbytes for parameter in bases().model.parameters())
    assert memory.total == memory.prompt + memory.optimizer + memory.weights + memory.activations


def test_half_precision_halves_the_weights(bloom):
    full, half = (plan_of(bloom, f"model.dtype={dtype}").memory for dtype in ("float32", "bfloat16"))
    assert full.weights == 2 * half.weights == 4 * (1_303_144_448 - 32_768)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_the_plan_counts_what_is_loaded(bases, family):
    base = bases(family)
    plan = plan_of(base.name, "prompt.length=7")
    assert plan.num_base == base.num_parameters
    assert plan.num_trainable == 7 * base.hidden_size


def test_the_length_comes_from_the_text(bases):
    assert plan_of(bases().name, "prompt.init=text", "prompt.text=Repeat it.").num_virtual_tokens == len("Repeat it.")


def test_a_prompt_longer_than_the_context_is_refused(bases):
    with pytest.raises(ConfigError, match="exceed the base's context of 512"):
        plan_of(bases().name, "prompt.length=300", "data.max_length=300")


def test_a_plan_for_a_text_needs_a_text(bases):
    with pytest.raises(ConfigError, match=r"prompt\.text is empty"):
        plan_of(bases().name, "prompt.init=text")


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_a_dry_run_holds_what_a_real_step_holds(bases, family, checkpoint):
    base = bases(family)
    rows = [Encoded(tuple(range(3, 43)), (False, *[True] * 39))] * 6
    prompts = [SoftPrompt(base.embed_ids([5] * length).requires_grad_(), "start", None) for length in (7, 3)]
    alive = _Alive([*base.model.parameters(), *base.model.buffers()])
    with alive:
        step_gradients(base, prompts, [rows[:3], rows[3:]], StepSettings(10_000, checkpoint_activations=checkpoint))
    dry = step_peak(base.model.config, base.dtype, [7, 3], (6, 40), checkpoint)
    assert alive.now < alive.peak / 2
    assert dry == pytest.approx(alive.peak, rel=0.1)


def test_checkpointed_activations_are_planned_smaller(bloom):
    plain, checkpointed = (plan_of(bloom, f"train.checkpoint_activations={value}").memory.activations for value in ("false", "true"))
    assert checkpointed < plain / 3


def test_a_recurrent_base_is_planned_too(bases):
    assert plan_of(bases("falcon_mamba").name).memory.activations > 0


def test_what_the_weights_take_in_other_precisions(bloom):
    plan = plan_of(bloom, "model.dtype=bfloat16")
    planned = {kind: plan_of(bloom, "model.dtype=bfloat16", f"model.quantization={kind}").memory.weights for kind in ("int8", "nf4")}
    whole = {dtype: plan_of(bloom, f"model.dtype={dtype}").memory.weights for dtype in ("float32", "bfloat16")}
    assert plan.weights_in == whole | planned
    assert plan.free > 0
    assert plan.unpacking is None


def test_a_gguf_base_is_unpacked_once_and_the_plan_says_so(bases, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    file = tiny_gguf(tmp_path / "base.gguf", bases())
    config = load_config(None, [f"model.gguf_file={file}", "model.device=cpu", "model.dtype=float32", "prompt.init=random"])
    before = make_plan(config).unpacking
    load_base(config.model)
    plan = make_plan(config)
    after = plan.unpacking
    assert (before.file, before.done, after.done) == (file.stat().st_size, False, True)
    assert before.folder == after.folder == sum(parameter.nbytes for parameter in bases().model.parameters())
    assert (tmp_path / "cache" / "unpacked") == Path(after.where).parent
    draw_plan(plan)
    said = capsys.readouterr().out
    assert "lies in the cache" in said
    assert f"model.name={after.where} model.quantization=nf4" in said
    in_few_bits = load_config(None, [f"model.name={after.where}", "model.quantization=nf4", "model.device=cpu", "model.dtype=float32"])
    assert load_base(in_few_bits.model).num_parameters == bases().num_parameters
