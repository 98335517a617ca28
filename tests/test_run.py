"""The run folder and its promises: resume with the same bits, overwrite nothing, keep what a stop leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from softprompt import job as job_module
from softprompt import training
from softprompt.checkpoint import latest_checkpoint
from softprompt.config import load_config
from softprompt.engine import step as step_module
from softprompt.engine.batch import Order
from softprompt.engine.memory import CPU_TOKENS
from softprompt.errors import ConfigError, DataError, MissingPackage, RunError
from softprompt.events import Evaluated, Finished, Saved, Started, Step, returned
from softprompt.job import prepare
from softprompt.runlog import RunFolder
from softprompt.training import train


def rows_of(run: Path) -> torch.Tensor:
    return load_file(run / "prompt" / "adapter_model.safetensors")["prompt_embeddings"]


def events_of(run: Path) -> list[dict]:
    """The run's stream, without clocks and places, and without the starts of those that went on."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "samples_per_second", "peak_bytes", "prompt", "prompts", "run", "path")
    return [{key: value for key, value in line.items() if key not in clock} for line in lines if not line.get("first_step")]


def test_events_come_in_order(make_config, fresh):
    events = list(train(make_config(fresh, "train.steps=4", "train.eval_every=2", "train.save_every=2")))
    kinds = [type(event) for event in events]
    assert kinds == [Started, Evaluated, Step, Step, Evaluated, Saved, Step, Step, Evaluated, Saved, Finished]


LABELS = ("a",) * 60 + ("b",) * 29 + ("c",) * 11


def order_of(labels):
    known = list(dict.fromkeys(labels))
    return Order(np.array([known.index(label) for label in labels]))


@pytest.mark.parametrize("labels", [LABELS, (None,) * 100])
def test_an_epoch_is_every_row_once_in_an_order_of_its_own(labels):
    order = order_of(labels)
    first, second, other = (order.rows(start, 100, seed) for start, seed in ((0, 0), (100, 0), (0, 1)))
    assert sorted(first) == sorted(second) == sorted(other) == list(range(100))
    assert len({tuple(first), tuple(second), tuple(other), tuple(range(100))}) == 4
    assert order_of(labels).rows(90, 30, 0) == first[90:] + second[:20]


def test_the_order_is_that_of_runs_that_were_begun_before():
    assert order_of(LABELS).rows(98, 12, 3) == [71, 33, 41, 62, 18, 96, 47, 73, 27, 59, 87, 44]
    assert order_of((None,) * 100).rows(98, 12, 3) == [48, 66, 97, 32, 75, 69, 72, 7, 21, 80, 55, 60]


@pytest.mark.parametrize("seed", range(3))
def test_every_step_has_labels_in_the_shares_of_all_rows(seed):
    order = order_of(LABELS)
    for step in range(10):
        labels = Counter(LABELS[number] for number in order.rows(10 * step, 10, seed))
        assert all(abs(labels[label] - LABELS.count(label) / 10) <= 1.1 for label in "abc")


def test_sources_are_drawn_by_their_weights_and_each_as_evenly_as_alone():
    parts = np.array([0] * 80 + [1] * 20)
    order = Order(np.zeros(100), parts, (1.0, 3.0))
    for start in (0, 40, 130, 770):
        drawn = order.rows(start, 40, 0)
        assert abs(sum(parts[number] for number in drawn) - 30) <= 1
    small = Counter(number for number in order.rows(0, 400, 0) if parts[number])
    assert small == dict.fromkeys(range(80, 100), 15), "300 of the small source: each row 15 times"
    large = [number for number in order.rows(0, 400, 0) if not parts[number]]
    assert len(large) == 100
    assert sorted(large[:80]) == list(range(80)), "every row of the large one before any comes again"
    assert order.rows(130, 40, 0) == Order(np.zeros(100), parts, (1.0, 3.0)).rows(0, 200, 0)[130:170] != order.rows(130, 40, 1)
    assert all(parts[number] for number in Order(np.zeros(100), parts, (0.0, 1.0)).rows(0, 250, 0))


def test_the_rows_of_a_step_are_a_function_of_configuration_and_step(make_config, bases, tmp_path):
    rows = [{"text": f"row {number}", "label": "good" if number % 3 else "bad"} for number in range(12)]
    config = make_config(f"data.train={tiny.write_rows(tmp_path / 'labels.jsonl', rows)}", "train.epochs=2", "prompt.count=2")
    setup, again = (returned(prepare(config, bases())) for _ in range(2))
    assert [setup.rows_of(step) for step in (4, 0, 1)] == [again.rows_of(step) for step in (4, 0, 1)]
    order = order_of([row["label"] for row in rows])
    for step in range(setup.num_steps):
        first, other = ([setup.rows.encoded.index(row) for row in own] for own in setup.rows_of(step))
        assert first == order.rows(4 * step, 4, 0), "in the shares of the labels"
        assert first != other == order.rows(4 * step, 4, 1)


def test_epochs_make_steps(make_config):
    started = next(iter(train(make_config("train.epochs=2", "train.examples_per_step=5"))))
    assert (started.num_train, started.num_steps) == (24, 10)


@pytest.mark.parametrize(
    ("num_rows", "steps"),
    [(10_000, 625), (3_300, 207), (2_000, 250), (1_000, 188), (100, 63)],  # one pass, one, two, three, ten
)
def test_few_rows_are_seen_more_than_once(num_rows, steps):
    from softprompt.job import count_steps

    assert count_steps(load_config(), num_rows) == steps
    assert count_steps(load_config(None, ["train.epochs=1"]), num_rows) == -(-num_rows // 16)


def test_whole_passes_are_made_where_nothing_is_said(make_config):
    tree = make_config("train.examples_per_step=5").model_dump(exclude_none=True)
    del tree["train"]["epochs"]
    *events, finished = train(load_config(tree))
    steps = [event for event in events if isinstance(event, Step)]
    assert len(steps) == 48  # 24 rows ten times, five a step
    assert finished.result["prompts"]["seed-0"]["train_loss"] < steps[0].loss


def test_same_seed_same_bits(make_config, tmp_path):
    for name in ("a", "b"):
        list(train(make_config("train.steps=5", f"train.out={tmp_path / name}")))
    list(train(make_config("train.steps=5", "train.seed=1", f"train.out={tmp_path / 'c'}")))
    assert torch.equal(rows_of(tmp_path / "a"), rows_of(tmp_path / "b"))
    assert not torch.equal(rows_of(tmp_path / "a"), rows_of(tmp_path / "c"))


RESTLESS = ("train.eval_every=1", "optim.relative_lr=4", "optim.schedule=constant", "optim.ema=0.5")


@pytest.mark.parametrize("how", [("train.eval_every=3", "optim.schedule=cosine"), RESTLESS], ids=["calm", "restless"])
@pytest.mark.parametrize("stop_after", [1, 2, 3, 5])
def test_a_resumed_run_equals_the_straight_run_bit_for_bit(make_config, contrary, tmp_path, stop_after, how):
    settings = ("train.steps=6", "train.save_every=2", contrary, *how)
    list(train(make_config(*settings, f"train.out={tmp_path / 'straight'}")))
    config = make_config(*settings)
    tiny.stop_after(config, stop_after)
    run = Path(config.train.out)
    assert run.is_dir()
    assert not (run / "prompt").exists()
    resumed = list(train(RunFolder.reopen(run).config(), resume=True))
    assert resumed[0].first_step == (stop_after - 1) // 2 * 2
    assert torch.equal(rows_of(run), rows_of(tmp_path / "straight"))
    assert events_of(run) == events_of(tmp_path / "straight")


KILLED = ("train.steps=250", "train.save_every=3", "train.keep=all", "train.eval_every=50")


@pytest.fixture(scope="module")
def straight(bases, tmp_path_factory):
    """A run that nobody kills, and its settings."""
    home = tmp_path_factory.mktemp("straight")
    rows, held = (tiny.write_rows(home / f"{name}.jsonl", tiny.some_rows(count)) for name, count in (("train", 24), ("eval", 7)))
    base = ("model.device=cpu", "model.dtype=float32", f"model.name={bases().name}", "prompt.text=Repeat the drink.")
    settings = (*base, f"data.train={rows}", f"data.eval={held}", *KILLED, "train.examples_per_step=4")
    list(train(load_config(None, [*settings, f"train.out={home / 'run'}"])))
    return home / "run", settings


@pytest.mark.parametrize("reached", ["config.toml", "checkpoints/step-000003", "checkpoints/step-000036"])
def test_kill_9_at_any_moment_then_resume_gives_the_same_bits(straight, tmp_path, reached):
    straight_run, settings = straight
    run = tmp_path / "killed"
    config = load_config(None, [*settings, f"train.out={run}"])
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml())
    process = subprocess.Popen([sys.executable, "-m", "softprompt", "train", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (run / reached).exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed: nothing was tested"
    assert (latest_checkpoint(run / "checkpoints") is None) == (reached == "config.toml")
    for _ in train(RunFolder.reopen(run).config(), resume=True):
        pass
    assert torch.equal(rows_of(run), rows_of(straight_run))
    assert events_of(run) == events_of(straight_run)
    assert not list(run.rglob("*.draft"))


def test_ctrl_c_keeps_the_state_and_says_how_to_go_on(make_config, tmp_path):
    config = make_config("train.steps=100000", "train.save_every=100000")
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml())
    process = subprocess.Popen([sys.executable, "-m", "softprompt", "train", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    run = Path(config.train.out)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (run / "metrics.jsonl").exists():
        time.sleep(0.05)
    while time.monotonic() < deadline and '"step"' not in (run / "metrics.jsonl").read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert f"softprompt train --resume {run}" in error
    assert "Traceback" not in error
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.counters.step > 0


def test_resuming_a_finished_run_returns_its_result_and_changes_nothing(make_config):
    config = make_config("train.steps=2")
    result = list(train(config))[-1].result
    before = {path: path.stat().st_mtime_ns for path in Path(config.train.out).rglob("*")}
    again = list(train(RunFolder.reopen(Path(config.train.out)).config(), resume=True))
    assert [event.result for event in again] == [result]
    assert before == {path: path.stat().st_mtime_ns for path in Path(config.train.out).rglob("*")}


def test_a_run_folder_is_never_overwritten(make_config):
    config = make_config("train.steps=2")
    list(train(config))
    content = (Path(config.train.out) / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="finished run"):
        list(train(config))
    assert (Path(config.train.out) / "metrics.jsonl").read_bytes() == content


def test_changed_rows_are_noticed_on_resume(make_config):
    config = make_config("train.steps=4", "train.save_every=1")
    events = train(config)
    next(event for event in events if isinstance(event, Saved))
    events.close()
    tiny.write_rows(Path(config.data.train), tiny.some_rows(23))
    with pytest.raises(RunError, match="rows have changed"):
        list(train(RunFolder.reopen(Path(config.train.out)).config(), resume=True))


def test_other_weights_are_noticed_on_resume(make_config, tmp_path):
    config = make_config("train.steps=4", "train.save_every=1", f"model.name={tiny.tiny_folder(tmp_path / 'base')}")
    events = train(config)
    next(event for event in events if isinstance(event, Saved))
    events.close()
    tiny.tiny_folder(tmp_path / "base", seed=1)
    with pytest.raises(RunError, match="other weights"):
        list(train(RunFolder.reopen(Path(config.train.out)).config(), resume=True))


def test_a_second_process_is_kept_out(make_config):
    config = make_config("train.steps=4")
    events = train(config)
    next(iter(events))
    with pytest.raises(RunError, match="another process"):
        list(train(RunFolder.reopen(Path(config.train.out)).config(), resume=True))
    events.close()


def test_a_loss_that_is_not_finite_stops_before_the_step(make_config, tmp_path):
    base = tiny.tiny_base(tmp_path / "base")
    config = make_config("train.steps=9", "train.save_every=1", f"model.name={base.name}")
    events = train(config, base=base)
    next(event for event in events if isinstance(event, Step) and event.step == 2)
    base.model.lm_head.weight[5, 0] = float("nan")  # norms keep the rows of any rate finite: something else has to break
    with pytest.raises(RunError, match=r"loss of step 3 is not finite: lower optim\.relative_lr"):
        list(events)
    checkpoint = latest_checkpoint(Path(config.train.out) / "checkpoints")
    assert checkpoint is not None, "the steps before are kept"
    assert checkpoint.counters.step == 2
    assert RunFolder.reopen(Path(config.train.out)).events()[-1] == Saved(2, Path(config.train.out) / "checkpoints" / "step-000002")


def test_nothing_is_written_when_the_set_up_is_wrong(make_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    for override, error in (
        ("data.max_length=5000", ConfigError),
        ("prompt.text=''", ConfigError),
        ("data.max_length=8", DataError),
        ("train.trackers=['wandb']", MissingPackage),
    ):
        config = make_config(override)
        with pytest.raises(error):
            list(train(config))
        assert not Path(config.train.out).exists()


def test_the_run_folder_tells_what_ran(make_config, fresh):
    config = make_config("train.steps=2", fresh)
    list(train(config))
    run = Path(config.train.out)
    assert load_config(run / "config.toml").train.steps == 2
    assert "torch" in json.loads((run / "run.json").read_text())["versions"]
    assert [event["event"] for event in events_of(run)] == [*("started", "evaluated", "step", "step", "evaluated", "saved", "finished")]
    assert (run / "rejected.jsonl").read_text() == ""
    assert load_file(run / "start.safetensors")["seed-0/learned"].shape == rows_of(run).shape


def test_the_token_budget_that_was_found_is_part_of_the_run(make_config):
    config = make_config("train.steps=1")
    assert config.train.tokens_per_batch is None
    list(train(config))
    assert load_config(Path(config.train.out) / "config.toml").train.tokens_per_batch == CPU_TOKENS


def test_paths_of_a_run_are_absolute(make_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_config("train.steps=1", "data.train=train.jsonl[0:9]")
    list(train(config))
    kept = RunFolder.reopen(Path(config.train.out)).config()
    assert kept.data.train == f"{tmp_path / 'train.jsonl'}[0:9]"
    assert os.path.isabs(kept.model.name or "")


def test_a_micro_batch_that_memory_cut_stays_cut_and_evaluation_does_not_change(make_config, tmp_path, monkeypatch):
    """The run remembers it: a resumed one is cut alike, to the same bits; held-out rows are read as before."""
    sizes, evaluated, whole, measure = [], [], step_module.batch_gradients, job_module.held_out_loss

    def short_of_memory(base, leaf, batch, counts, settings):
        if len(batch.rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(batch.rows))
        return whole(base, leaf, batch, counts, settings)

    monkeypatch.setattr(job_module, "held_out_loss", lambda *how: evaluated.append(how[3]) or measure(*how))
    settings = ("train.steps=4", "train.save_every=1", "train.eval_every=1", "train.tokens_per_batch=1000")
    config = make_config(*settings, f"train.out={tmp_path / 'straight'}")
    with monkeypatch.context() as patch:
        patch.setattr(step_module, "batch_gradients", short_of_memory)
        events = train(config)
        next(event for event in events if isinstance(event, Saved))
        events.close()
        assert sizes[:2] == [2, 2], "the first step was cut"
        assert sum(sizes) == 8, "one more was taken while its checkpoint was written"
    checkpoint = latest_checkpoint(tmp_path / "straight" / "checkpoints")
    cut = checkpoint.counters.tokens_per_batch
    assert 0 < cut < 1000
    asked = []
    monkeypatch.setattr(training, "step_gradients", lambda *how: asked.append(how[3].tokens_per_batch) or step_module.step_gradients(*how))
    for _ in train(RunFolder.reopen(tmp_path / "straight").config(), resume=True):
        pass
    assert asked == [cut] * 3
    assert set(evaluated) == {1000}


def test_the_furthest_checkpoint_is_found_after_a_million_steps(make_config, tmp_path):
    config = make_config("train.steps=2", "train.save_every=1")
    list(train(config))
    folder = Path(config.train.out) / "checkpoints"
    (folder / "step-000002").rename(folder / "step-1000000")
    (folder / "step-000001").rename(folder / "step-999999")
    assert latest_checkpoint(folder).counters.step == 2


def test_a_run_resumes_from_any_folder(make_config, tmp_path, monkeypatch):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    (home / "mine.jinja").write_text("Q: {{ prompt }} A: ", encoding="utf-8")
    monkeypatch.chdir(home)
    config = make_config("data.template=mine.jinja", "train.steps=3", "train.save_every=1")
    tiny.stop_after(config, 2)
    monkeypatch.chdir(elsewhere)
    *_, finished = train(RunFolder.reopen(Path(config.train.out)).config(), resume=True)
    assert finished.result["steps"] == 3


def test_a_folder_that_cannot_be_filled_leaves_nothing(make_config, monkeypatch):
    """What is known before the first step is there whole, or not at all."""
    config = make_config("train.steps=2")

    def full(*how):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_start", full)
        with pytest.raises(RunError, match="cannot write there: No space left on device"):
            list(train(config))
    assert not Path(config.train.out).exists()
    assert list(train(config))
