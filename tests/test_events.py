"""The wire: every event is a line and back, the run folder's stream is what was yielded, and others can follow it."""

import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny

import softprompt
from softprompt import runlog
from softprompt.errors import RunError
from softprompt.events import (
    KINDS,
    STEP,
    Evaluated,
    Finished,
    Found,
    Preparing,
    Sampled,
    Saved,
    Searching,
    Started,
    Step,
    Studying,
    Warned,
    from_line,
    to_line,
)
from softprompt.runlog import RunFolder
from softprompt.training import train

ONE_OF_EACH = [
    Preparing(2000, None, 0.5),
    Studying("answers", 64, 256, "self-study: 256 questions"),
    Searching(3, 20),
    Found(0.05, {0.02: 1.5, 0.05: 1.25}),
    Started(Path("runs/茶"), "base", 5, 2, 24, 7, 1, {"seed-0": "6 from 6 tokens"}, 192, 10_000, 0.2),
    Step(3, (2.5, 1e-30), (1e-05, 0.1), (0.3, 0.4), (0.0, 1.5), 320, 0.125),
    Evaluated(3, 2.25, (2.0, 2.5)),
    Warned(3, ("a", "b"), "ran_away", 'too "high"\nby far'),
    Saved(3, Path("runs/茶/checkpoints/step-000003")),
    Sampled(5, (("bring tea", "tea", "咖"),)),
    Finished({"steps": 5, "ended": "steps", "train_loss": 2.0, "prompts": {"seed-0": {"findings": []}}}),
]


@pytest.mark.parametrize("event", ONE_OF_EACH, ids=lambda event: type(event).__name__)
def test_an_event_is_a_line_and_back(event):
    line = to_line(event)
    assert "\n" not in line
    assert json.loads(line)["event"] == type(event).__name__.lower()
    assert from_line(line.encode()) == event
    assert to_line(from_line(line.encode())) == line


def test_there_is_one_of_each_and_all_are_public():
    assert {type(event) for event in ONE_OF_EACH} == set(KINDS.values())
    assert {kind.__name__ for kind in KINDS.values()} < set(softprompt.__all__)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting"),
        ("[]", "no object"),
        ('{"step": 1}', "event: None is not known"),
        ('{"event": "danced"}', "event: 'danced' is not known"),
        ('{"event": "saved", "step": "x", "path": "a"}', "step: Input should be a valid integer"),
        ('{"event": "evaluated", "step": 1, "loss": 2.0}', "losses: Field required"),
        ('{"event": "step", "step": 1, "losses": [2.0]}', "lrs: Field required"),
        ('{"event": "step", "step": 1, "los', "Unterminated string"),
    ],
)
def test_what_is_no_event_is_said(line, reason):
    with pytest.raises(ValueError, match=reason):
        from_line(line.encode())


def test_a_line_of_a_later_version_may_hold_more():
    assert from_line(b'{"event": "searching", "step": 1, "num_steps": 2, "new": []}') == Searching(1, 2)


def test_a_step_is_read_alike_however_its_line_begins():
    """The usual line of ours is read by a way of its own, which is faster."""
    step = Step(3, (2.5, float("inf")), (1e-05, 0.1), (0.3, 1e300), (0.0, 1.5), 320, 0.125)
    line = to_line(step).encode()
    values = json.loads(line)
    turned = json.dumps({"step": values.pop("step"), **values}).encode()
    assert line.startswith(STEP)
    assert not turned.startswith(STEP)
    assert from_line(line) == from_line(turned) == step
    undefined = from_line(to_line(Step(3, (float("nan"),), (1.0,), (1.0,), (1.0,), 1, 1.0)).encode())
    assert math.isnan(undefined.losses[0])


def test_events_and_run_folders_need_no_torch():
    code = "import sys, softprompt.events, softprompt.runlog; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False", "False"]


@pytest.mark.parametrize("more", [(), ("optim.relative_lr=find",), ("prompt.count=2", "train.save_every=2")])
def test_the_stream_of_a_run_is_what_it_yielded(make_config, more):
    config = make_config("train.steps=4", "train.eval_every=2", *more)
    yielded = list(train(config))
    run = RunFolder.reopen(Path(config.train.out))
    assert run.events() == yielded
    assert {type(event) for event in yielded} >= {Started, Step, Evaluated, Saved, Finished}
    assert ({Searching, Found} <= {type(event) for event in yielded}) == bool(more and "find" in more[0])
    assert [event for _, event in run.follow()] == yielded
    offset = [place for place, _ in run.follow()][2]
    assert [event for _, event in run.follow(offset)] == yielded[3:]


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_run_is_followed_while_it_is_written_stopped_and_resumed(make_config, monkeypatch, stop_after):
    monkeypatch.setattr(runlog, "POLL_SECONDS", 0.001)
    config = make_config("train.steps=5", "train.save_every=2", "train.eval_every=5")
    tiny.stop_after(config, stop_after)
    run, seen, ready = RunFolder.reopen(Path(config.train.out)), [], threading.Event()

    def follow():
        for _, event in run.follow():
            seen.append(event)
            if isinstance(event, Step) and event.step == stop_after:
                ready.set()

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    assert ready.wait(20)
    rest = list(train(run.config(), resume=True))
    follower.join(20)
    assert not follower.is_alive(), "it ends with the run"
    first = rest[0].first_step
    assert first == stop_after // 2 * 2
    again = seen.index(rest[0]) if first else len(seen) - len(rest)
    assert seen[again:] == rest, "from the step that it was resumed from, all of it"
    assert [event.step for event in seen[:again] if isinstance(event, Step)] == list(range(1, stop_after + 1))
    assert [event.step for event in run.events() if isinstance(event, Step)] == [1, 2, 3, 4, 5]


def test_another_process_follows(make_config):
    config = make_config("train.steps=4")
    *_, finished = train(config)
    code = "import sys, pathlib; from softprompt.runlog import RunFolder; "
    code += "print(len(list(RunFolder(pathlib.Path(sys.argv[1])).follow())))"
    found = subprocess.run([sys.executable, "-c", code, config.train.out], capture_output=True, text=True, check=True, timeout=60)
    assert int(found.stdout) == len(RunFolder.reopen(Path(config.train.out)).events())
    assert isinstance(finished, Finished)


def test_a_checkpoint_that_could_not_be_told_of_is_told_of_by_the_resumed_run(make_config):
    config = make_config("train.steps=4", "train.save_every=2")
    tiny.stop_after(config, 3)
    run = RunFolder.reopen(Path(config.train.out))
    lines = run.events_file.read_text(encoding="utf-8").splitlines(keepends=True)
    saved = next(index for index, line in enumerate(lines) if '"saved"' in line)
    run.events_file.write_text("".join(lines[:saved]), encoding="utf-8")  # killed between the checkpoint and its line
    list(train(run.config(), resume=True))
    assert [event.step for event in run.events() if isinstance(event, Saved)] == [2, 4]


def test_a_damaged_line_is_named(make_config):
    config = make_config("train.steps=2")
    list(train(config))
    run = RunFolder.reopen(Path(config.train.out))
    lines = run.events_file.read_text(encoding="utf-8").splitlines(keepends=True)
    run.events_file.write_text("".join([lines[0], "{\n", *lines[1:]]), encoding="utf-8")
    with pytest.raises(RunError, match=r"metrics\.jsonl:2: the line is damaged"):
        run.events()
    with pytest.raises(RunError, match=r"metrics\.jsonl:byte \d+: the line is damaged"):
        list(run.follow())
