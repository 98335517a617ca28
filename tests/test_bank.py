"""Several prompts in one run over one base: each ends as it would alone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from softprompt import load_prompt
from softprompt.checkpoint import latest_checkpoint
from softprompt.config import load_config
from softprompt.errors import ArtifactError, ConfigError
from softprompt.events import Finished, Saved, Started, Step
from softprompt.runlog import RunFolder
from softprompt.training import train

MIXED = """[
    {name = "short", seed = 3, prompt = {length = 4}},
    {name = "noise", prompt = {init = "random", length = 9}, optim = {lr = 0.2, schedule = "constant"}},
    {name = "other-text", prompt = {text = "Say what to drink.", position = "start"}},
]""".replace("\n", " ")


def rows_in(folder: Path) -> torch.Tensor:
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


@pytest.mark.parametrize("settings", [("prompt.count=3", "prompt.init=random"), (f"prompt.bank={MIXED}",)])
@pytest.mark.parametrize("family", ["llama", "bloom", "falcon_mamba"])
def test_each_prompt_ends_as_when_trained_alone(bases, make_config, tmp_path, settings, family):
    base = bases(family)
    config = make_config(*settings, f"model.name={base.name}", "train.steps=6")
    result = list(train(config, base=base))[-1].result
    members = config.members()
    assert list(result["prompts"]) == list(members)
    assert len(members) == 3
    for name, alone in members.items():
        out = tmp_path / f"alone-{name}"
        single = list(train(alone.model_copy(update={"train": alone.train.model_copy(update={"out": str(out)})}), base=base))[-1].result
        found = result["prompts"][name]
        torch.testing.assert_close(rows_in(Path(found["prompt"])), rows_in(out / "prompt"), rtol=1e-3, atol=1e-4)
        for key in ("train_loss", "eval_loss_before", "eval_loss_after"):
            assert found[key] == pytest.approx(single[key], rel=1e-4)
    ends = [found["eval_loss_after"] for found in result["prompts"].values()]
    assert len(set(ends)) == 3, "the prompts are one and the same: nothing was compared"
    assert result["eval_loss_after"] == min(ends)
    assert result["prompt"] in {found["prompt"] for found in result["prompts"].values()}


def test_a_bank_counts_every_row_for_every_prompt(make_config):
    events = list(train(make_config("prompt.count=2", "train.steps=3")))
    started = next(event for event in events if isinstance(event, Started))
    alone = next(iter(train(make_config("train.steps=3", "train.out=" + str(started.run) + "-alone"))))
    assert started.num_trainable == 2 * alone.num_trainable
    assert all(len(event.losses) == 2 for event in events if isinstance(event, Step))
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.result["samples_per_second"] * finished.result["seconds"] == pytest.approx(2 * 3 * 4)


def test_a_resumed_bank_equals_the_straight_one_bit_for_bit(make_config, tmp_path):
    settings = (f"prompt.bank={MIXED}", "train.steps=6", "train.save_every=2")
    straight = make_config(*settings, f"train.out={tmp_path / 'straight'}")
    list(train(straight))
    config = make_config(*settings)
    events = train(config)
    next(event for event in events if isinstance(event, Step) and event.step == 5)
    events.close()
    run = Path(config.train.out)
    assert not (run / "prompts").exists()
    resumed = list(train(RunFolder.reopen(run).config(), resume=True))
    assert resumed[0].first_step == 4
    for name in config.members():
        assert torch.equal(rows_in(run / "prompts" / name), rows_in(tmp_path / "straight" / "prompts" / name))


def test_prompts_of_a_bank_load_from_the_run_and_from_a_checkpoint(bases, make_config):
    config = make_config("prompt.count=2", "train.steps=2")
    saved = next(event for event in train(config) if isinstance(event, Saved))
    checkpoint = latest_checkpoint(saved.path.parent)
    assert checkpoint is not None
    assert list(checkpoint.states) == ["seed-0", "seed-1"]
    for name, state in checkpoint.states.items():
        prompt = load_prompt(saved.path / name, bases())
        assert torch.equal(prompt.soft.rows_PH, state["rows"])
        assert prompt.card.seed == int(name.removeprefix("seed-"))
    with pytest.raises(ArtifactError, match=r"holds 2 prompts: name one, e\.g\. .*seed-0"):
        load_prompt(saved.path, bases())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("prompt.count=2", 'prompt.bank=[{name = "a"}]'), r"set prompt\.count or prompt\.bank, not both"),
        (('prompt.bank=[{name = "a"}, {name = "a"}]',), "two prompts have the same name"),
        (('prompt.bank=[{name = "a"}, {name = "A"}]',), "two prompts have the same name"),
        (
            ('prompt.bank=[{name = "a", prompt = {lenght = 3}}]',),
            r"prompt\.bank, a: unknown key .* did you mean prompt\.length\?",
        ),
        (('prompt.bank=[{name = "a", prompt = {count = 3}}]',), "leave out count and bank"),
        (('prompt.bank=[{name = "a/b"}]',), "name: string should match pattern"),
        (("prompt.count=0",), r"prompt\.count: input should be greater than or equal to 1"),
    ],
)
def test_a_bank_that_cannot_be_is_refused(make_config, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config(*settings).members()


def test_a_bank_is_written_in_the_resolved_configuration(tmp_path):
    config = load_config({"prompt": {"bank": [{"name": "a", "seed": 1}, {"name": "b", "optim": {"lr": 0.5}}]}})
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml())
    assert load_config(file) == config
    assert load_config(file).members()["b"].optim.lr == 0.5


def test_the_prompts_of_a_bank_have_one_template_and_one_base(make_config):
    with pytest.raises(ConfigError, match=r"unknown key"):
        make_config('prompt.bank=[{name = "a", data = {template = "chat"}}]')
