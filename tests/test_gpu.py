"""A GPU computes what the CPU computes: `make test-gpu`, on a machine that has one."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import tiny
import torch
from test_cli import run  # noqa: F401 - a fixture
from test_deep import moved
from test_invariants import FAMILIES, encoded_rows, loss_and_gradient, rows_alike, some_prompt

from softprompt.artifact import load_prompt
from softprompt.config import ModelConfig
from softprompt.engine import head as head_module
from softprompt.engine.head import Head
from softprompt.engine.loading import load_base
from softprompt.engine.loss import TokenIds
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import SoftPrompt
from softprompt.engine.step import StepSettings, step_gradients
from softprompt.events import Finished, Step
from softprompt.generation import generate
from softprompt.sampling import Sampling
from softprompt.training import train

pytestmark = pytest.mark.gpu

TEXTS = ["bring tea", "please please bring 咖啡", "x", "a longer question than the others, so that padding is needed"]


@pytest.fixture(autouse=True)
def there_is_one():
    assert torch.cuda.is_available(), "these tests need a GPU"


def on_gpu(base: FrozenBase, dtype: str = "float32") -> FrozenBase:
    return load_base(ModelConfig(name=base.name, device="cuda", dtype=dtype))


def sent(soft: SoftPrompt, base: FrozenBase) -> SoftPrompt:
    parts = {name: value.to(base.device) for name, value in vars(soft).items() if isinstance(value, torch.Tensor)}
    return replace(soft, **parts)


def test_a_gpu_is_what_auto_takes_and_multiplies_in_bfloat16_there(bases):
    base = load_base(ModelConfig(name=bases().name))
    assert (base.device.type, base.dtype) == ("cuda", torch.bfloat16)


@pytest.mark.parametrize("make_rows", [encoded_rows, rows_alike])
@pytest.mark.parametrize("how", [{}, {"checkpoint_activations": True}])
@pytest.mark.parametrize("make_prompt", [some_prompt, lambda base: some_prompt(base, position="after_bos"), moved])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_the_cpu(bases, family, make_prompt, how, make_rows):
    soft, rows = make_prompt(bases(family)), make_rows()
    loss, gradient = loss_and_gradient(bases(family), soft, rows, 28)
    base = on_gpu(bases(family))
    for tokens in (28, 1000):
        own, own_gradient = loss_and_gradient(base, sent(soft, base), rows, tokens, **how)
        assert own == pytest.approx(loss, rel=1e-4)
        torch.testing.assert_close(own_gradient.cpu(), gradient, rtol=1e-2, atol=1e-3 * gradient.abs().max().item())


@pytest.mark.parametrize("how", [{}, {"scale": 2.0, "cap": 9.0}])
def test_the_head_walks_the_vocabulary_in_blocks(monkeypatch, how):
    monkeypatch.setitem(head_module.BLOCK_NUMBERS, "cuda", 1)
    generator = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(1000, 16, generator=generator), torch.randn(37, 16, generator=generator)
    targets = torch.randint(1000, (37,), generator=generator)
    expected = Head(weight, **how).losses(hidden, TokenIds(targets), 0.0)
    found = Head(weight.cuda(), **how).losses(hidden.cuda(), TokenIds(targets.cuda()), 0.5)  # a GPU leaves nothing out, whatever it may
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own.cpu(), other, rtol=1e-3, atol=1e-4)


def test_products_of_less_precision_still_share_the_prefix(bases, monkeypatch):
    """With TF32 on, a base of ordinary attention is none that keeps a recurrent state."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    assert on_gpu(bases("gemma3_text", hidden_size=256, num_hidden_layers=8)).shares_prefix


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_turns_the_gradient_little(bases, family):
    soft, rows = some_prompt(bases(family)), encoded_rows()
    _, gradient = loss_and_gradient(bases(family), soft, rows, 1000)
    base = on_gpu(bases(family), "bfloat16")
    _, own = loss_and_gradient(base, sent(soft, base), rows, 1000)
    assert torch.nn.functional.cosine_similarity(own.cpu().flatten(), gradient.flatten(), dim=0) > 0.98


def test_a_micro_batch_that_does_not_fit_is_cut(bases):
    """Memory really runs out: the process may have no more than the model and a few rows need."""
    small = bases("llama", hidden_size=256, intermediate_size=4096, num_hidden_layers=8)
    base, rows = on_gpu(small), encoded_rows() * 600
    soft = sent(some_prompt(small), base)
    loss, gradient = loss_and_gradient(base, soft, rows, 500)
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    rows_PH = soft.rows_PH.clone().requires_grad_()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 400 * 2**20) / total)
    try:
        own, allowed = step_gradients(base, [replace(soft, rows_PH=rows_PH)], [rows], StepSettings(10**6))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert allowed < 10**6, "everything fitted: nothing was tested"
    assert own.item() == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(rows_PH.grad, gradient, rtol=1e-2, atol=1e-3 * gradient.abs().max().item())


@pytest.mark.parametrize("more", [(), ("prompt.method=prefix",), ("prompt.count=3",), ("optim.ema=0.5",)])
def test_a_run_is_that_of_the_cpu_and_goes_on_after_a_stop(make_config, tmp_path, more):
    def losses(*words):
        return [event.losses for event in train(make_config(*more, "train.save_every=2", *words)) if isinstance(event, Step)]

    device = ("model.device=cuda", "model.dtype=float32")
    expected = losses(f"train.out={tmp_path / 'cpu'}")
    whole = losses(*device, f"train.out={tmp_path / 'whole'}")
    for own, other in zip(whole, expected, strict=True):
        assert own == pytest.approx(other, rel=1e-2)
    config = make_config(*more, *device, "train.save_every=2", f"train.out={tmp_path / 'stopped'}")
    tiny.stop_after(config, 3)
    rest = [event.losses for event in train(config, resume=True) if isinstance(event, Step)]
    assert len(rest) == len(whole) - 2, "it went on from the checkpoint of step 2"
    for own, other in zip(rest, whole[2:], strict=True):
        assert own == pytest.approx(other, rel=1e-3)
    assert all(first != second for first, second in pairwise(whole))


@pytest.mark.parametrize("how", [{}, {"temperature": 1.5, "top_p": 0.9, "top_k": 50, "seed": 7}])
def test_answers_are_the_same_alone_and_in_a_batch(make_config, bases, how):
    sampling = Sampling(max_new_tokens=12, **how)
    *_, finished = train(make_config())
    assert isinstance(finished, Finished)
    base = on_gpu(bases())
    prompt = load_prompt(finished.result["prompt"], base)
    together = generate(base, prompt, TEXTS, sampling)
    assert together == [generate(base, prompt, [text], sampling)[0] for text in TEXTS]
    if sampling.temperature == 0:
        assert together == generate(bases(), load_prompt(finished.result["prompt"], bases()), TEXTS, sampling)


def test_the_commands_take_the_gpu_by_themselves(run, make_config, bases, tmp_path):  # noqa: F811
    """As a newcomer types them: no device, no precision."""
    rows, folder, result = str(make_config().data.train), str(tmp_path / "mine"), tmp_path / "eval.json"
    settings = [f"model.name={bases().name}", f"data.train={rows}", "data.eval_fraction=0.25", "prompt.text=Repeat.", "train.steps=4"]
    assert run("train", *settings, f"train.out={folder}")[0] == 0
    assert run("eval", folder, "--data", rows, "--json", str(result))[0] == 0
    assert json.loads(result.read_text())["contestants"]["prompt"]["loss"] > 0
    assert run("generate", folder, "bring tea", "--max-new-tokens", "5")[0] == 0
    for verb in ("inspect", "doctor", "report"):
        assert run(verb, folder)[0] == 0
