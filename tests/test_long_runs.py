"""Runs of days: which checkpoints stay, who writes them, a disk that fills up, a folder that vanishes, streams of very many steps."""

import errno
import logging
import os
import re
import resource
import shutil
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from test_run import events_of, rows_of

from softprompt import atomic, checkpoint, runlog, training
from softprompt.artifact import find_prompt, load_prompt
from softprompt.checkpoint import kept_steps, latest_checkpoint
from softprompt.errors import ArtifactError, RunError
from softprompt.events import Evaluated, Saved, Started, Step, to_line
from softprompt.runlog import RunFolder
from softprompt.training import train

EVERY_STEP = ("train.save_every=1", "train.eval_every=4")


def checkpoints_of(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


# ---- which checkpoints stay ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "keep", "best", "num_steps", "kept"),
    [
        (range(50, 1001, 50), "some", [], 1000, [*range(100, 1001, 100), 950]),
        (range(50, 1001, 50), "some", [220], 10_000, [250, 950, 1000]),
        (range(50, 1001, 50), "some", [220, 480], 10_000, [250, 500, 950, 1000]),
        (range(50, 251, 50), "some", [250], 625, [100, 150, 200, 250]),
        ([3], "some", [], 1000, [3]),
        (range(1, 9), "all", [2], 8, range(1, 9)),
        (range(1, 9), 3, [2], 8, [6, 7, 8]),
        ([], "some", [], 10, []),
    ],
)
def test_the_best_the_last_two_and_one_of_every_tenth_stay(there, keep, best, num_steps, kept):
    assert kept_steps(there, keep, best, num_steps) == set(kept)


def test_what_is_dropped_on_the_way_is_not_missed_later():
    there: set[int] = set()
    for step in range(50, 100_001, 50):
        best = [step // 7000 * 7000] if step >= 7000 else []
        there = kept_steps({*there, step}, "some", best, 100_000)
        assert max(there) == step
        assert len(there) <= 13
    assert there == kept_steps(range(50, 100_001, 50), "some", [98_000], 100_000)
    assert there == {*range(10_000, 100_001, 10_000), 98_000, 99_950}


def test_a_run_keeps_few_checkpoints_and_tells_of_all(make_config, contrary, bases):
    config = make_config("train.steps=40", contrary, "train.eval_every=3", "train.save_every=1", "optim.relative_lr=4")
    events = list(train(config))
    run = Path(config.train.out)
    best = events[-1].result["best_step"]
    assert best % 4, "the best is one of the tenths: nothing was tested"
    assert checkpoints_of(run) == sorted({*range(4, 41, 4), best, 39, 40})
    assert [event.step for event in events if isinstance(event, Saved)] == list(range(1, 41))
    assert RunFolder.reopen(run).events() == events
    assert not list(run.rglob(".*.draft"))
    kept = load_prompt(run / "checkpoints" / f"step-{best:06d}", bases())
    assert torch.equal(kept.soft.learned_PD, load_prompt(run, bases()).soft.learned_PD)
    with pytest.raises(ArtifactError, match=r"step-000001: there is no such checkpoint: train\.keep says"):
        find_prompt(run / "checkpoints" / "step-000001")


@pytest.mark.parametrize("keep", ["all", 2])
def test_all_stay_or_so_many_of_the_last(make_config, keep):
    config = make_config("train.steps=5", "train.save_every=1", f"train.keep={keep}")
    list(train(config))
    assert checkpoints_of(Path(config.train.out)) == ([1, 2, 3, 4, 5] if keep == "all" else [4, 5])


def test_a_checkpoint_that_was_half_gone_when_the_run_was_killed_is_none(make_config, tmp_path, monkeypatch):
    settings = ("train.steps=6", "train.keep=1", *EVERY_STEP)
    list(train(make_config(*settings, f"train.out={tmp_path / 'straight'}")))
    config, run = make_config(*settings), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(atomic.shutil, "rmtree", lambda *how, **more: None)
        tiny.stop_after(config, 4)
    half_gone = list((run / "checkpoints").glob(".*.draft"))
    assert {path.name.split(".")[1] for path in half_gone} == {"step-000001", "step-000002"}
    assert checkpoints_of_whole(run) == [3]
    resumed = list(train(RunFolder.reopen(run).config(), resume=True))
    assert resumed[0].first_step == 3
    assert checkpoints_of(run) == [6]
    assert torch.equal(rows_of(run), rows_of(tmp_path / "straight"))
    assert events_of(run) == events_of(tmp_path / "straight")


def checkpoints_of_whole(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def test_a_checkpoint_that_somebody_holds_open_goes_later(make_config, monkeypatch):
    rename = Path.rename

    def held_open(self, target):
        if self.name == "step-000001" and not (self.parent / "step-000004").exists():
            raise PermissionError(errno.EACCES, "in use", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", held_open)
    config = make_config("train.steps=5", "train.keep=1", *EVERY_STEP)
    list(train(config))
    assert checkpoints_of(Path(config.train.out)) == [5]


# ---- who writes them -----------------------------------------------------------------------------------------------


@pytest.fixture
def late(monkeypatch):
    """Checkpoints are written only when the step behind theirs has been taken; says of which that was so."""
    taken, ahead, write, step = [], [], training.save_checkpoint, training._step
    moved = threading.Condition()

    def stepped(job, counters):
        done = step(job, counters)
        with moved:
            taken.append(done[1].step)
            moved.notify_all()
        return done

    def written(path, counters, *how):
        if counters.step < 5:
            with moved:
                if moved.wait_for(lambda: counters.step + 1 in taken, timeout=20):
                    ahead.append(counters.step)
        write(path, counters, *how)

    monkeypatch.setattr(training, "_step", stepped)
    monkeypatch.setattr(training, "save_checkpoint", written)
    return ahead


KINDS = [(), ("optim.ema=0.5",), ("prompt.method=prefix",), ("prompt.count=2", "prompt.position=after_bos")]


@pytest.mark.parametrize("kind", KINDS, ids=["plain", "average", "prefix", "bank"])
def test_a_step_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(make_config, tmp_path, late, monkeypatch, kind):
    settings = ("train.steps=5", "train.keep=all", *EVERY_STEP, *kind)
    events = list(train(make_config(*settings)))
    assert late == [1, 2, 3, 4]
    monkeypatch.undo()
    list(train(make_config(*settings, f"train.out={tmp_path / 'straight'}")))
    assert len(late) == 4, "the straight run writes as it likes"
    assert events_of(tmp_path / "run") == events_of(tmp_path / "straight")
    assert [type(event) for event in events if isinstance(event, Step | Saved)] == [Step, Saved] * 5
    files = sorted(path.relative_to(tmp_path / "run") for path in (tmp_path / "run" / "checkpoints").rglob("*.safetensors"))
    assert len(files) == 5 * (3 if "prompt.count=2" in kind else 2)
    for file in files:
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "straight" / file).read_bytes()


def test_a_checkpoint_is_told_of_when_it_is_there(make_config, late):
    told = 0
    for event in train(make_config("train.steps=5", "train.keep=all", *EVERY_STEP)):
        if isinstance(event, Saved):
            assert latest_checkpoint(event.path.parent).counters.step == event.step
            told += 1
    assert told == 5


def test_what_is_being_written_when_a_run_is_left_is_there_afterwards(make_config, monkeypatch, tmp_path):
    """As by an exception of whoever follows it, or a step that fails."""
    write = training.save_checkpoint
    begun = threading.Event()

    def slow(*how):
        begun.set()
        threading.Event().wait(0.2)
        write(*how)

    def broken(job, counters):
        if counters.step == 2:
            assert begun.wait(20)
            raise RunError("the step fails")
        return step(job, counters)

    step = training._step
    monkeypatch.setattr(training, "save_checkpoint", slow)
    monkeypatch.setattr(training, "_step", broken)
    with pytest.raises(RunError, match="the step fails"):
        list(train(make_config("train.steps=5", "train.save_every=2")))
    run = RunFolder.reopen(tmp_path / "run")
    assert checkpoints_of(run.path) == [2]
    assert [event.step for event in run.events() if isinstance(event, Saved)] == [2]


# ---- no room, and no folder ----------------------------------------------------------------------------------------


class Full:
    """A disk that is full for so many flushes, of checkpoints or of whatever holds `where` in its path."""

    def __init__(self, times: float, where: str, number: int = errno.ENOSPC) -> None:
        self.times, self.where, self.number, self.flush = times, where, number, os.fsync
        self.refused = 0

    def __call__(self, descriptor: int) -> None:
        if self.where in os.readlink(f"/proc/self/fd/{descriptor}") and self.refused < self.times:
            self.refused += 1
            raise OSError(self.number, os.strerror(self.number))
        self.flush(descriptor)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(runlog, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(runlog, "WAIT_SECONDS", 30.0)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", [".step-000002.", ".prompt.", ".inspection.json.", ".result.json."])
def test_a_run_waits_for_room_and_says_so_once(make_config, tmp_path, monkeypatch, caplog, impatient, where, number):
    settings = ("train.steps=3", *EVERY_STEP)
    list(train(make_config(*settings, f"train.out={tmp_path / 'straight'}")))
    full = Full(3, where, number)
    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        list(train(make_config(*settings)))
    assert full.refused == 3
    assert caplog.text.count("the run waits for room, 30 s at most") == 1
    assert os.strerror(number) in caplog.text
    assert events_of(tmp_path / "run") == events_of(tmp_path / "straight")
    assert torch.equal(rows_of(tmp_path / "run"), rows_of(tmp_path / "straight"))
    assert not list((tmp_path / "run").rglob(".*.draft"))


def test_a_run_that_gets_no_room_ends_with_what_it_had_and_goes_on_later(make_config, tmp_path, monkeypatch, impatient):
    monkeypatch.setattr(runlog, "WAIT_SECONDS", 0.05)
    settings = ("train.steps=5", *EVERY_STEP)
    list(train(make_config(*settings, f"train.out={tmp_path / 'straight'}")))
    config, run = make_config(*settings), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full := Full(float("inf"), ".step-000003."))
        with pytest.raises(RunError) as error:
            list(train(config))
    assert full.refused > 1
    assert str(error.value) == (
        f"{run}: No space left on device, for 0.05 s: make room; the last checkpoint is kept: softprompt train --resume {run}"
    )
    assert checkpoints_of(run) == [1, 2]
    resumed = list(train(RunFolder.reopen(run).config(), resume=True))
    assert resumed[0].first_step == 2
    assert events_of(run) == events_of(tmp_path / "straight")
    assert torch.equal(rows_of(run), rows_of(tmp_path / "straight"))


def test_a_full_disk_is_known_by_what_safetensors_says_of_it(make_config, monkeypatch, caplog, impatient):
    write, refused = checkpoint.save_file, []

    def full(*how):
        if len(refused) < 2:
            refused.append(how)
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        write(*how)

    monkeypatch.setattr(checkpoint, "save_file", full)
    monkeypatch.setattr(training, "save_start", lambda *how: None)
    with caplog.at_level(logging.WARNING):
        *_, finished = train(make_config("train.steps=2"))
    assert (len(refused), finished.result["steps"]) == (2, 2)
    assert "No space left on device: the run waits" in caplog.text


@contextmanager
def no_file_beyond(size):
    """Real: what is written beyond so many bytes of a file fails, as on a full disk but for the number of the error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_safetensors_says_the_number_of_the_error(tmp_path):
    """The one thing that a full disk is known by."""
    with no_file_beyond(1000), pytest.raises(SafetensorError) as error:
        save_file({"a": torch.zeros(100_000)}, tmp_path / "file")
    assert runlog._cause(error.value) == (errno.EFBIG, os.strerror(errno.EFBIG), None)


def test_half_an_event_is_taken_back(make_config, tmp_path):
    tiny.stop_after(make_config("train.steps=3"), 1)
    run = RunFolder.reopen(tmp_path / "run")
    before = run.events_file.read_bytes()
    step = Step(2, (1.0,), (1.0,), (1.0,), (1.0,), 1, 1.0)
    with no_file_beyond(len(before) + 20):
        with pytest.raises(OSError, match="File too large"):
            run.append(step)
        with pytest.raises(RunError, match=r"cannot be written: File too large; the last checkpoint is kept: softprompt train --resume"):
            run.patiently(lambda: run.append(step))
    assert run.events_file.read_bytes() == before
    run.append(step)
    assert run.events()[-1] == step


def run_until(config, moment, meddle):
    """Trains, and meddles when step 2 has told of this moment."""
    for event in train(config):
        if isinstance(event, moment) and event.step == 2:
            meddle()


@pytest.mark.parametrize("moment", [Step, Saved, Evaluated])
def test_a_folder_that_vanishes_ends_the_run_in_a_sentence_and_does_not_come_back(make_config, tmp_path, moment):
    config, run = make_config("train.steps=9", "train.save_every=2", "train.eval_every=2"), tmp_path / "run"
    with pytest.raises(RunError) as error:
        run_until(config, moment, lambda: shutil.rmtree(run))
    assert str(error.value) == (f"{run} has vanished while its run was writing there: bring it back, then softprompt train --resume {run}")
    assert not run.exists()


def test_what_else_keeps_a_checkpoint_from_being_written_is_named(make_config, tmp_path):
    config, run = make_config("train.steps=9", "train.save_every=4"), tmp_path / "run"
    with pytest.raises(RunError, match=rf"{run}/checkpoints cannot be written: File exists; the last checkpoint is kept") as error:
        run_until(config, Step, lambda: (run / "checkpoints").write_text("in the way"))
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is error.value.__context__ is None
    (run / "checkpoints").unlink()
    *_, finished = train(RunFolder.reopen(run).config(), resume=True)
    assert finished.result["steps"] == 9


# ---- streams of very many steps ------------------------------------------------------------------------------------


def test_a_run_does_not_read_its_own_stream_while_it_goes_on(make_config, monkeypatch):
    read, times = RunFolder._read, Counter()

    def counted(self):
        times[self.path.name] += 1
        return read(self)

    monkeypatch.setattr(RunFolder, "_read", counted)
    for name, every in (("often", 1), ("seldom", 6)):
        config = make_config("train.steps=6", f"train.eval_every={every}", "train.save_every=1")
        events = list(train(config.model_copy(update={"train": config.train.model_copy(update={"out": f"{config.train.out}-{name}"})})))
        assert sum(isinstance(event, Evaluated) for event in events) == 1 + 6 // every
    assert times["run-often"] == times["run-seldom"] == 2


def test_events_are_read_one_by_one(make_config, tmp_path):
    list(train(make_config("train.steps=3")))
    run = RunFolder.reopen(tmp_path / "run")
    stream = run.stream()
    assert isinstance(next(stream), Started)
    with open(run.events_file, "ab") as file:
        file.write(b"{\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl:\d+: the line is damaged"):
        list(stream)


def test_a_run_that_was_moved_tells_of_a_checkpoint_once(make_config, tmp_path):
    config = make_config("train.steps=4", "train.save_every=2")
    tiny.stop_after(config, 3)
    (tmp_path / "run").rename(tmp_path / "moved")
    run = RunFolder.reopen(tmp_path / "moved")
    list(train(run.config(), resume=True))
    assert [event.step for event in run.events() if isinstance(event, Saved)] == [2, 4]


def test_a_stream_is_cut_back_line_by_line(make_config, tmp_path):
    tiny.stop_after(make_config("train.steps=9", "train.save_every=3", "train.eval_every=3"), 8)
    run = RunFolder.reopen(tmp_path / "run")
    before = run.events_file.read_text(encoding="utf-8").splitlines(keepends=True)
    with open(run.events_file, "a", encoding="utf-8") as file:
        file.write('{"event": "step", "st')
    run.forget_after(6)
    saved = next(number for number, line in enumerate(before) if re.search(r'"saved", "step": 6', line))
    assert run.events_file.read_text(encoding="utf-8") == "".join(before[: saved + 1])
    assert before[saved + 1 :]
    run.forget_after(6)
    assert run.events_file.read_text(encoding="utf-8") == "".join(before[: saved + 1])
    assert to_line(run.events()[-1]) + "\n" == before[saved]
