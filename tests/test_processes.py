"""One run computed by several processes: the same bits as by one, and one end for all of them."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import tiny
import torch
from beside import Beside, command
from test_run import events_of

from softprompt.checkpoint import latest_checkpoint
from softprompt.engine import processes
from softprompt.engine.launched import Launched, launched
from softprompt.engine.world import Item, World
from softprompt.errors import RunError
from softprompt.job import shared_budget

SMALL = ("train.steps=20", "train.examples_per_step=8", "train.tokens_per_batch=100", "train.eval_every=7", "train.save_every=4")
TEXT = "Answer kindly, in one word, and name the drink. Never say no."
BANK = '[{name = "short", prompt = {length = 4}}, {name = "noise", prompt = {init = "random", length = 9}}, {name = "other", seed = 3}]'
WORKLOADS = {
    "rows": ("train", ()),
    "deep": ("train", ("prompt.method=prefix",)),
    "bank": ("train", (f"prompt.bank={BANK}",)),
    "distilled": ("distil", (f"distil.text={TEXT * 3}", "distil.count=48", "distil.max_new_tokens=10", "distil.on_policy=0.2")),
}
FEW = {"softprompt.distil.study.WINDOW": 8, "softprompt.engine.likelihood.GROUP": 60}  # so that there is something to share


def started(config, folder: Path, size: int, verb: str = "train", **how) -> Beside:
    """A run in `folder` by so many processes."""
    folder.parent.mkdir(exist_ok=True)
    file = folder.parent / f"{folder.name}.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    return Beside(folder.parent / f"{folder.name}-said", size, command, verb, str(file), f"train.out={folder}", patches=FEW, **how)


def resumed(folder: Path, size: int) -> None:
    again = Beside(folder.parent / f"{folder.name}-again", size, command, "train", "--resume", str(folder), patches=FEW)
    assert again.ended() == [0] * size, again.said


def weights(run: Path) -> dict[str, bytes]:
    """The prompts of a finished run, to the last bit."""
    found = {str(file.relative_to(run)): file.read_bytes() for file in sorted(run.glob("prompt*/**/adapter_model.safetensors"))}
    assert found
    return found


def reached(path: Path, running: Beside) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, running.said
        time.sleep(0.01)


@pytest.mark.parametrize("name", WORKLOADS)
def test_any_number_of_processes_trains_the_same_bits(make_config, tmp_path, name):
    verb, settings = WORKLOADS[name]
    config = make_config(*SMALL, *settings)
    if verb == "distil":  # self-study: the questions are the base's own
        config = config.model_copy(update={"data": config.data.model_copy(update={"train": None, "eval": None})})
    for size in (1, 2, 4):
        launcher = "slurm" if size == 4 else "torchrun"
        running = started(config, tmp_path / f"by-{size}", size, verb, launcher=launcher)
        assert running.ended() == [0] * size, running.said
        assert all(not said for said in running.said[1:]), "the first one talks"
    for size in (2, 4):
        assert weights(tmp_path / f"by-{size}") == weights(tmp_path / "by-1")
        assert events_of(tmp_path / f"by-{size}") == events_of(tmp_path / "by-1")


@pytest.fixture(scope="module")
def straight(bases, tmp_path_factory):
    """A run by one process that nobody stops, its settings, and how long its steps take."""
    home = tmp_path_factory.mktemp("straight")
    rows, held = (tiny.write_rows(home / f"{name}.jsonl", tiny.some_rows(count)) for name, count in (("train", 24), ("eval", 7)))
    from softprompt.config import load_config

    own = ("model.device=cpu", "model.dtype=float32", f"model.name={bases().name}", "prompt.text=Repeat the drink.")
    config = load_config(None, [*own, f"data.train={rows}", f"data.eval={held}", *SMALL, "train.steps=120", "train.keep=all"])
    running = started(config, home / "run", 1)
    assert running.ended() == [0], running.said
    return home / "run", config


def test_a_run_of_two_goes_on_with_one_and_with_three(straight, tmp_path):
    whole, config = straight
    running = started(config, tmp_path / "by-2", 2)
    reached(tmp_path / "by-2" / "checkpoints" / "step-000008", running)
    running.kill(0)
    running.kill(1)
    running.ended()
    for size in (1, 3):
        shutil.copytree(tmp_path / "by-2", tmp_path / f"then-{size}")
        resumed(tmp_path / f"then-{size}", size)
        assert weights(tmp_path / f"then-{size}") == weights(whole)
        assert events_of(tmp_path / f"then-{size}") == events_of(whole)


MOMENTS = int(os.environ.get("MOMENTS", "3"))


@pytest.mark.parametrize("number", range(MOMENTS))
def test_a_process_that_is_killed_ends_the_others(straight, tmp_path, number):
    """At a random moment of the run; what is left goes on to the same bits."""
    whole, config = straight
    draw = random.Random(number)
    size, run = draw.choice((2, 3)), tmp_path / "run"
    running = started(config, run, size)
    reached(run / "config.toml", running)
    time.sleep(draw.uniform(0, 1))
    killed = draw.randrange(size)
    running.kill(killed)
    began = time.monotonic()
    codes = running.ended(10)
    assert time.monotonic() - began < 10
    assert [code for rank, code in enumerate(codes) if rank != killed] == [2] * (size - 1), "the run was over: nothing was tested"
    for said in (said for rank, said in enumerate(running.said) if rank != killed):
        (line,) = [line for line in said.splitlines() if "error" in line]
        assert f"process {killed} of {size}" in line
        assert "ends too: softprompt train --resume" in line
        assert "Traceback" not in said
    resumed(run, draw.choice((1, 2, 3)))
    assert weights(run) == weights(whole)
    assert events_of(run) == events_of(whole)


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_all_stop_after_the_same_step(straight, tmp_path, rank, number):
    whole, config = straight
    run = tmp_path / "run"
    endless = config.model_copy(update={"train": config.train.model_copy(update={"save_every": 10_000})})
    running = started(endless, run, 2)
    reached(run / "start.safetensors", running)
    while '"step"' not in (run / "metrics.jsonl").read_text():
        time.sleep(0.01)
    running.kill(rank, number)
    assert running.ended() == [130, 130], running.said
    assert f"softprompt train --resume {run}" in running.said[0]
    assert running.said[1] == ""
    last = latest_checkpoint(run / "checkpoints")
    assert last is not None
    assert 0 < last.counters.step < 120
    resumed(run, 2)
    assert weights(run) == weights(whole)


def busy(verb, file):
    """The first process is in a step that takes a minute."""
    from softprompt import training

    if os.environ["RANK"] == "0":
        training.step_gradients = lambda *how: (print("busy", flush=True), time.sleep(60))
    command(verb, file)


def test_one_that_computes_for_long_ends_too(straight, tmp_path):
    _, config = straight
    file = tmp_path / "run.toml"
    file.write_text(config.model_copy(update={"train": config.train.model_copy(update={"out": str(tmp_path / "run")})}).to_toml())
    running = Beside(tmp_path / "said", 2, busy, "train", str(file))
    while "busy" not in running.said[0]:
        time.sleep(0.05)
    running.kill(1)
    assert running.ended(15)[0] == 2
    assert running.said[0].count("error: process 1 of 2") == 1


def other_rows(file, other):
    command("train", file, *([f"data.train={other}"] if os.environ["RANK"] == "1" else []))


def test_processes_with_other_rows_are_refused(make_config, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(make_config().to_toml(), encoding="utf-8")
    other = tiny.write_rows(tmp_path / "other.jsonl", tiny.some_rows(23))
    running = Beside(tmp_path / "said", 2, other_rows, str(file), str(other))
    assert running.ended() == [2, 2]
    assert running.said[0].strip().startswith("error: the rows of process 1, on ")
    assert running.said[1] == ""
    assert not (tmp_path / "run").exists()


def test_what_the_first_one_refuses_is_said_once(make_config, tmp_path):
    (tmp_path / "run").mkdir()
    running = started(make_config(), tmp_path / "run", 3)
    assert running.ended() == [2, 2, 2]
    assert running.said[0].endswith("run exists and is not a run: choose another train.out\n")
    assert running.said[1:] == ["", ""]


def alone():
    os.environ.update(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29499")
    with processes.joined():
        raise AssertionError("nobody else is there")


def test_one_that_finds_no_other_says_where_it_looked(tmp_path):
    running = Beside(tmp_path, 1, alone, patches={"softprompt.engine.processes.JOIN": timedelta(seconds=1)})
    assert running.ended() == [2]
    (line,) = [line for line in running.said[0].splitlines() if line.startswith("error")]
    assert line.startswith("error: process 1 of 2 has not met the others at 127.0.0.1:29499: ")


def talk(height, width, seed):
    """Sums and words of several processes are those of one."""
    draw = torch.Generator().manual_seed(seed)
    items = [Item(10 + number, tuple(range(number % height + 1))) for number in range(11)]
    parts = [10 ** (3 * torch.randn(len(item.rows), width, generator=draw)) for item in items]
    alone = World().added_up(torch.zeros(height, width), items, parts.__getitem__)
    backwards = World().added_up(torch.zeros(height, width), items[::-1], parts[::-1].__getitem__)
    assert not torch.equal(alone, backwards), "their order does not matter: nothing is tested"
    with processes.joined() as world:
        asked = []
        assert torch.equal(world.added_up(torch.zeros(height, width), items, lambda number: asked.append(number) or parts[number]), alone)
        assert sum(world.gathered(len(asked))) == len(items)
        assert len(asked) < len(items)
        assert world.gathered([world.rank] * 2000) == [[rank] * 2000 for rank in range(world.size)]
        for value in ("水\ud800", list(range(2000)), None, 0.1):
            assert world.told(lambda value=value: value if world.first else 1 / 0) == value
        told = world.tensors(lambda: {"a": torch.tensor(world.rank + 0.5), "b": torch.arange(6).view(2, 3), "none": torch.zeros(0, 3)})
        assert told["a"] == 0.5
        assert torch.equal(told["b"], torch.arange(6).view(2, 3))
        assert world.each(7, lambda number: number * number) == [number * number for number in range(7)]
        assert world.total(torch.eye(world.size)[world.rank]).tolist() == [1] * world.size
        world.agree({"all of it": 1})
        with pytest.raises(RunError, match="the ranks of process 1, on"):
            world.agree({"the ranks": world.rank})


@pytest.mark.parametrize("held", [1, 2**26])
@pytest.mark.parametrize(("height", "width"), [(1, 2), (3, 1000)])
def test_what_several_add_up_is_what_one_adds_up(tmp_path, held, height, width):
    running = Beside(tmp_path, 3, talk, height, width, 0, patches={"softprompt.engine.processes.HELD": held})
    assert running.ended() == [0] * 3, running.said


def test_micro_batches_are_dealt_by_their_tokens():
    world = processes.Processes.__new__(processes.Processes)
    world.size = 2
    assert world.owners([250, 60, 50, 40, 40, 30, 30]) == [0, 1, 1, 1, 1, 1, 1]
    assert world.owners([100, 100, 90, 90, 10]) == [0, 1, 0, 1, 0]


def test_an_evaluation_is_shared_out(make_config, tmp_path):
    config = make_config("train.steps=3", f"train.out={tmp_path / 'run'}")
    assert started(config, tmp_path / "run", 1).ended() == [0]
    found = {}
    for size in (1, 3):
        place = tmp_path / f"by-{size}"
        line = ("eval", str(tmp_path / "run"), "--answers", "--out", str(place), "--json", str(place) + ".json")
        running = Beside(tmp_path / f"eval-{size}", size, command, *line, patches={**FEW, "softprompt.evaluation.TOGETHER": 4})
        assert running.ended() == [0] * size, running.said
        answers = [json.loads(line) for line in next(place.glob("*/predictions.jsonl")).read_text().splitlines()[1:]]
        found[size] = json.loads(Path(str(place) + ".json").read_text()), sorted(answers, key=lambda one: (one["contestant"], one["row"]))
    assert found[3] == found[1]
    assert len(found[1][1]) > 20


# ---- who started them ----------------------------------------------------------------------------------------------


def test_torchrun_starts_them(make_config, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(make_config(*SMALL, "train.steps=4").to_toml(), encoding="utf-8")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "softprompt", "train", str(file)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=150, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out loss after") == 1
    assert [event["step"] for event in events_of(tmp_path / "run") if event["event"] == "step"] == [1, 2, 3, 4]


NODES = {"SLURM_STEP_NODELIST": "gpu[03-05,7],cpu1", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_JOB_ID": "1234567"}


@pytest.mark.parametrize(
    ("told", "place"),
    [
        ({}, Launched()),
        ({"WORLD_SIZE": "1", "RANK": "0"}, Launched()),
        ({"WORLD_SIZE": "4", "RANK": "2"}, Launched()),
        (
            {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "7"},
            Launched(2, 4, 0, 2, "a", 7),
        ),
        ({**NODES, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Launched()),
        (
            {**NODES, "SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2"},
            Launched(5, 7, 1, 2, "gpu03", 29_500 + 4567),
        ),
        (
            {**NODES, "SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3", "MASTER_PORT": "9"},
            Launched(6, 7, 0, 1, "gpu03", 9),
        ),
    ],
)
def test_what_launchers_say(told, place):
    assert launched(told) == place


def test_on_gpus_a_step_has_a_micro_batch_for_every_process():
    assert shared_budget(65_536, 1_000.5, 4) == 251
    assert shared_budget(100, 1_000.5, 4) == 100
