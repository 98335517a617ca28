"""Reparametrisations start as the rows they are given, train, resume, and leave rows alone behind."""

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_run import rows_of

from softprompt.artifact import load_prompt
from softprompt.checkpoint import latest_checkpoint
from softprompt.reparam import REPARAMS, Ground
from softprompt.runlog import RunFolder
from softprompt.training import train

NAMES = sorted(REPARAMS)
OTHERS = [name for name in NAMES if name != "none"]


@pytest.fixture
def ground():
    rows = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    return Ground(rows, 0.5, lambda count: torch.randn(count, 32, generator=torch.Generator().manual_seed(1)), seed=3)


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_as_the_rows_it_is_given(ground, name):
    torch.testing.assert_close(REPARAMS[name](ground).rows(), ground.rows_PH, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_rate_moves_the_rows_by_about_its_share_of_their_size(ground, name):
    """Adam's first step moves every number by the rate: the rows should move by about relative_lr x rms, whatever is trained."""
    trained = REPARAMS[name](ground)
    (trained.rows() * torch.randn(6, 32, generator=torch.Generator().manual_seed(4))).sum().backward()
    with torch.no_grad():
        for key, tensor in trained.tensors.items():
            tensor -= 0.01 * trained.scales[key] * tensor.grad.sign()
    moved = (trained.rows() - ground.rows_PH).square().mean().sqrt().item()
    assert 0.01 * ground.rms / 4 < moved < 0.01 * ground.rms * 4


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", OTHERS)
def test_it_trains_and_leaves_rows_alone_behind(bases, make_config, name, method):
    config = make_config(f"prompt.reparam={name}", f"prompt.method={method}", "train.steps=8")
    *_, finished = train(config, base=bases())
    assert finished.result["eval_loss_after"] < finished.result["eval_loss_before"]
    run = Path(config.train.out)
    assert list(load_file(run / "prompt" / "adapter_model.safetensors")) == ["prompt_embeddings"]
    prompt = load_prompt(run, bases())
    assert prompt.soft.length == 17
    state = latest_checkpoint(run / "checkpoints").states["seed-0"]
    assert any(key.endswith("exp_avg") for key in state)


@pytest.mark.parametrize("name", OTHERS)
def test_it_resumes_to_the_same_bits(make_config, tmp_path, name):
    settings = (f"prompt.reparam={name}", "train.steps=6", "train.save_every=2", "optim.ema=0.5")
    list(train(make_config(*settings, f"train.out={tmp_path / 'straight'}")))
    config = make_config(*settings)
    tiny.stop_after(config, 3)
    list(train(RunFolder.reopen(Path(config.train.out)).config(), resume=True))
    assert torch.equal(rows_of(Path(config.train.out)), rows_of(tmp_path / "straight"))
