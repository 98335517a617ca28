"""When a run stops and what it keeps: the best rows, patience, minutes; and the rate that fits every base."""

import itertools
import json
from pathlib import Path

import pytest
import tiny
import torch
from test_run import RESTLESS, rows_of

from softprompt import training
from softprompt.artifact import load_prompt
from softprompt.checkpoint import latest_checkpoint
from softprompt.config import OptimConfig
from softprompt.engine.optim import PromptOptimizer
from softprompt.errors import ConfigError
from softprompt.evaluation import held_out_loss
from softprompt.events import Evaluated, Finished, Found, Step
from softprompt.rows import load_rows
from softprompt.runlog import RunFolder
from softprompt.training import train


def test_the_rows_with_the_lowest_held_out_loss_are_the_result(bases, make_config, contrary):
    config = make_config("train.steps=6", contrary, *RESTLESS)
    events = list(train(config))
    losses = {event.step: event.loss for event in events if isinstance(event, Evaluated) and event.step}
    best = min(losses, key=losses.get)
    assert best < 6, "the last rows are the best: nothing was tested"
    result = events[-1].result
    assert (result["best_step"], result["eval_loss_after"], result["steps"]) == (best, losses[best], 6)
    prompt = load_prompt(config.train.out, bases())
    held = load_rows(config, prompt.encoder)[2]
    assert held_out_loss(bases(), prompt.soft, held, 256) == pytest.approx(losses[best], rel=1e-6)
    assert prompt.card.metrics["steps"] == best
    assert prompt.card.metrics["eval_loss"] == losses[best]


def test_without_held_out_rows_the_last_rows_are_the_result(make_config):
    tree = make_config("train.steps=3").model_dump(exclude_none=True)
    del tree["data"]["eval"]
    *_, finished = train(make_config().model_validate(tree))
    run = Path(tree["train"]["out"])
    last = latest_checkpoint(run / "checkpoints").states["seed-0"]["rows"]
    assert torch.equal(rows_of(run), last)
    assert (finished.result["best_step"], finished.result["eval_loss_after"]) == (None, None)


def test_patience_ends_a_run_that_no_longer_improves(make_config):
    events = list(train(make_config("train.steps=40", "train.patience=2", "train.eval_every=3", "optim.lr=1e-30")))
    assert [event.step for event in events if isinstance(event, Evaluated)] == [0, 3, 6, 9]
    assert (events[-1].result["ended"], events[-1].result["steps"]) == ("patience", 9)


def test_patience_waits_for_every_prompt_of_a_bank(make_config):
    bank = 'prompt.bank=[{name = "still", optim = {lr = 1e-30}}, {name = "learns"}]'
    *_, finished = train(make_config("train.steps=12", "train.patience=1", "train.eval_every=2", bank))
    assert finished.result["steps"] > 4
    assert finished.result["prompts"]["still"]["best_step"] == 2


def test_patience_without_held_out_rows_is_refused(make_config):
    tree = make_config("train.patience=2").model_dump(exclude_none=True)
    del tree["data"]["eval"]
    with pytest.raises(ConfigError, match=r"train\.patience needs held-out rows"):
        list(train(make_config().model_validate(tree)))


def test_minutes_end_a_run_with_an_evaluation_and_a_prompt(make_config, monkeypatch):
    config, clock = make_config("train.steps=1000000", "train.minutes=0.01"), itertools.count(step=0.25)
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(clock))  # every step takes a quarter of a second
    events = list(train(config))
    result = events[-1].result
    assert (result["ended"], result["steps"], result["seconds"]) == ("minutes", 3, 0.75)
    assert result["best_step"] is not None
    assert (Path(config.train.out) / "prompt" / "card.json").is_file()


def test_a_run_that_ended_early_is_only_finished_when_it_is_resumed(make_config):
    config = make_config("train.steps=40", "train.patience=1", "train.eval_every=1", "optim.lr=1e-30")
    for event in (events := train(config)):
        if type(event).__name__ == "Saved":
            break
    events.close()
    resumed = list(train(RunFolder.reopen(Path(config.train.out)).config(), resume=True))
    assert not any(isinstance(event, Step) for event in resumed)
    assert isinstance(resumed[-1], Finished)
    assert resumed[-1].result["ended"] == "patience"


@pytest.mark.parametrize(("steps", "expected"), [(4, [4]), (25, [10, 20, 25]), (100, [25, 50, 75, 100])])
def test_evaluations_are_spread_over_the_run(make_config, steps, expected):
    events = train(make_config(f"train.steps={steps}", "train.examples_per_step=1"))
    assert [event.step for event in events if isinstance(event, Evaluated)] == [0, *expected]


def test_the_rate_is_a_share_of_the_rms_of_the_rows():
    for how, rate in ((OptimConfig(relative_lr=0.1), 0.05), (OptimConfig(relative_lr=0.1, lr=3.0), 3.0)):
        optimizer = PromptOptimizer(torch.ones(2, 3), how, 9, unit=0.5)
        optimizer.learned_PD.grad = torch.ones(2, 3)
        assert optimizer.step(0)[1] == pytest.approx(rate)
        torch.testing.assert_close(optimizer.shown_PD, torch.ones(2, 3) - rate)


def test_the_first_step_moves_every_number_by_the_rate():
    optimizer = PromptOptimizer(torch.ones(2, 2), OptimConfig(relative_lr=0.1, clip_norm=99), 9, unit=1.0)
    optimizer.learned_PD.grad = torch.tensor([[3.0, 4.0], [-2.0, 0.0]])
    optimizer.step(0)
    torch.testing.assert_close(optimizer.shown_PD, 1 + 0.1 * torch.tensor([[-1.0, -1.0], [1.0, 0.0]]), rtol=1e-4, atol=1e-5)


def test_one_relative_rate_moves_the_rows_of_every_base_alike(make_config, tmp_path):
    moved = []
    for scale in (1.0, 0.02):
        folder = tiny.tiny_folder(tmp_path / f"base-{scale}", "llama", initializer_range=0.2 * scale)
        config = make_config(f"model.name={folder}", "train.steps=1", f"train.out={tmp_path / f'run-{scale}'}")
        moved.append(next(event for event in train(config) if isinstance(event, Step)).movement)
    assert moved[0] == pytest.approx(0.25, rel=0.05)  # Adam's first step is the rate in every number
    assert moved[1] == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize("held", [True, False])
def test_a_rate_is_found_before_the_run(make_config, held):
    tree = make_config("train.steps=3", "optim.relative_lr=find").model_dump(exclude_none=True)
    if not held:
        del tree["data"]["eval"]
    events = list(train(make_config().model_validate(tree)))
    kinds = [type(event).__name__ for event in events]
    assert kinds[:22] == ["Searching"] * 20 + ["Found", "Started"]
    found = events[20]
    assert found.relative_lr == min(found.losses, key=found.losses.get)
    assert len(set(found.losses.values())) == len(found.losses) == 5
    assert RunFolder.reopen(Path(tree["train"]["out"])).config().optim.relative_lr == found.relative_lr
    list(train(RunFolder.reopen(Path(tree["train"]["out"])).config(), resume=True))  # without another search


def test_the_rate_that_is_found_is_the_best_of_single_runs(make_config, tmp_path):
    found = next(event for event in train(make_config("train.steps=3", "optim.relative_lr=find")) if isinstance(event, Found))
    alone = make_config("train.steps=20", "train.eval_every=20", "optim.relative_lr=0.1", f"train.out={tmp_path / 'alone'}")
    *_, finished = train(alone)
    assert found.losses[0.1] == pytest.approx(finished.result["eval_loss_after"], rel=1e-4)


def test_a_bank_has_no_rate_to_find(make_config):
    with pytest.raises(ConfigError, match="is for one prompt"):
        list(train(make_config("prompt.count=2", "optim.relative_lr=find")))


def test_movement_is_in_the_log(make_config):
    config = make_config("train.steps=3")
    list(train(config))
    lines = [json.loads(line) for line in (Path(config.train.out) / "metrics.jsonl").read_text().splitlines()]
    moved = [line["movements"][0] for line in lines if line["event"] == "step"]
    assert len(moved) == 3
    assert all(value > 0 for value in moved)


def test_the_moving_average_is_what_is_evaluated_and_saved():
    optimizer = PromptOptimizer(torch.zeros(1, 2), OptimConfig(lr=1.0, ema=0.75, schedule="constant", warmup_fraction=0.0), 9, unit=1.0)
    optimizer.learned_PD.grad = torch.ones(1, 2)
    optimizer.step(0)
    torch.testing.assert_close(optimizer.shown_PD, 0.25 * optimizer.learned_PD.detach())
    again = PromptOptimizer(torch.zeros(1, 2), optimizer.config, 9, unit=1.0)
    again.restore(optimizer.state())
    assert torch.equal(again.shown_PD, optimizer.shown_PD)
