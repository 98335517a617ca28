"""A sweep: what it tries, that nothing of it is lost or done twice, and that the best prompt is judged by rows that did not choose it."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny

from softprompt.config import load_config
from softprompt.errors import ConfigError, DataError, RunError
from softprompt.report.sweeps import Shown, Trial, build_page
from softprompt.sweep.best import concluded, judging_rows
from softprompt.sweep.folder import create_sweep, open_sweep
from softprompt.sweep.running import running
from softprompt.sweep.space import draw, read_space
from softprompt.sweep.study import Trials
from softprompt.sweep.work import Worker

SPACE = ["prompt.length=2,4,6", "optim.relative_lr=0.05..0.5:log"]
LONG = ("train.steps=30", "train.save_every=5", "train.eval_every=15")


@pytest.fixture
def settings(make_config, fresh, tmp_path):
    """settings("train.steps=3", ...): a file of settings, and the rest of a sweep's words."""

    def make(*words: str) -> list[str]:
        several = tiny.some_rows(30, lambda n: {"prompt": f"kindly bring nr {n}", "completion": ("tea", "milk")[n % 2]})
        held = tiny.write_rows(tmp_path / "held.jsonl", several)
        file = tmp_path / "sweep.toml"
        file.write_text(make_config(f"data.eval={held}", "train.steps=4").to_toml(), encoding="utf-8")
        return [str(file), f"train.out={tmp_path / 'sweep'}", *words]

    return make


def followed(sweep, workers=1):
    for _ in running(sweep, workers):
        pass
    return concluded(sweep)


# ---- what is tried -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "choices"),
    [
        ("prompt.length=8,16", (8, 16)),
        ("prompt.init=text,vocab", ("text", "vocab")),
        ('prompt.init=["labels", "text"],"vocab"', (["labels", "text"], "vocab")),
        ('prompt.text="Be kind, please.","Be short."', ("Be kind, please.", "Be short.")),
        ("prompt.length=8,8,16", (8, 16)),
    ],
)
def test_lists(setting, choices):
    plain, (one,) = read_space(["train.steps=4", setting])
    assert plain == ["train.steps=4"]
    assert one.choices == choices


@pytest.mark.parametrize(
    "setting", ["prompt.text=Be kind, and short.", "data.train=../rows.jsonl", 'prompt.init=["labels", "text"]', "prompt.text="]
)
def test_one_value_is_no_list(setting):
    assert read_space([setting, "prompt.length=1,2"])[0] == [setting]


def test_a_range_is_covered_evenly():
    _, dimensions = read_space(["optim.relative_lr=0.01..1:log", "prompt.length=2..5", "prompt.init=text,vocab"])
    trials = draw(dimensions, 20, seed=3)
    assert trials == draw(dimensions, 20, seed=3) != draw(dimensions, 20, seed=4)
    rates = sorted(trial["optim.relative_lr"] for trial in trials)
    assert all(10 ** (-2 + place / 10) * 0.99 <= rate <= 10 ** (-1.9 + place / 10) * 1.01 for place, rate in enumerate(rates))
    assert set(Counter(trial["prompt.length"] for trial in trials).values()) == {5}
    assert set(Counter(trial["prompt.init"] for trial in trials).values()) == {10}


def test_lists_alone_are_a_grid():
    _, dimensions = read_space(["prompt.length=2,4,6", "train.seed=0,1"])
    pairs = [tuple(trial.values()) for trial in draw(dimensions, None, 0)]
    assert pairs == [(length, seed) for length in (2, 4, 6) for seed in (0, 1)]
    assert len({tuple(trial.values()) for trial in draw(dimensions, 4, 0)}) == 4
    assert len(draw(dimensions, 30, 0)) == 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.steps=3"], "nothing differs between trials"),
        (["prompt.length=,"], "an empty value in the list"),
        (["prompt.lenght=2,4"], "did you mean prompt.length?"),
        (["optim.relative_lr=low..high"], "a range goes from a number to a number"),
        (["optim.relative_lr=0.5..0.1"], "from the smaller number to the larger"),
        (["optim.relative_lr=0..1:log"], "begins above 0"),
        (["prompt.length=2.5..4"], "is a whole number"),
        (["prompt.length=2,4", "prompt.length=6,8"], "in the sweep twice"),
        (["data.max_length=20,40"], "trials would not compare"),
        (["prompt.count=1,2"], "the sweep itself sets it"),
        (["prompt.length=2,4", "prompt.count=2"], "makes its own banks"),
        (["prompt.length=2,-4"], "prompt.length=-4: prompt.length: input should be greater"),
        (["prompt.length=2,4", "optim.relative_lr=find"], "sweep them"),
    ],
)
def test_a_mistake_is_a_line(settings, tmp_path, words, said):
    with pytest.raises(ConfigError) as error:
        create_sweep(settings(*words))
    assert said in str(error.value)
    assert not (tmp_path / "sweep").exists()


def test_trials_share_a_run_where_only_the_prompt_differs(settings):
    sweep = create_sweep(settings("prompt.length=2,4", "train.seed=0,1", "train.steps=2,4"), most=3)
    assert sorted(len(bank) for bank in sweep.banks) == [1, 1, 3, 3]
    for bank, numbers in enumerate(sweep.banks):
        config = sweep.config_of(bank, numbers)
        assert {sweep.spec.trials[number]["train.steps"] for number in numbers} == {config.train.steps}
        assert config.train.seed == 0, "the held-out rows are those of the sweep"
        for number, own in zip(numbers, config.members().values(), strict=True):
            assert (own.prompt.length, own.train.seed) == tuple(sweep.spec.trials[number].values())[:2]


# ---- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["eval", "fraction", "named"])
def test_rows_that_judge_have_neither_trained_nor_chosen(settings, tmp_path, how):
    words = settings("prompt.length=2,4")
    rows = tiny.write_rows(tmp_path / "all.jsonl", tiny.some_rows(40, lambda n: {"prompt": f"bring {n % 30}", "completion": "tea"}))
    if how == "fraction":
        tree = load_config(words[0]).model_dump(exclude_none=True)
        del tree["data"]["eval"]
        Path(words[0]).write_text(load_config(tree, [f"data.train={rows}", "data.eval_fraction=0.3"]).to_toml(), encoding="utf-8")
    sweep = create_sweep(words, test=str(rows) if how == "named" else None)
    judging, _ = judging_rows(sweep)
    from softprompt.data import load_examples

    data = sweep.config.data
    known = {one.turns for source in (data.train, data.eval) if source for one in load_examples(source).examples}
    assert judging.examples
    assert not {one.turns for one in judging.examples} & known
    assert len(judging.examples) == {"eval": 15, "fraction": len(judging.examples), "named": 40}[how]


def test_too_few_rows_to_judge(settings, tmp_path):
    one = tiny.write_rows(tmp_path / "one.jsonl", tiny.some_rows(1))
    with pytest.raises(DataError, match="--test"):
        create_sweep(settings(f"data.eval={one}", "prompt.length=2,4"))


# ---- a whole sweep -------------------------------------------------------------------------------------------------


def test_two_processes_one_killed_halfway(settings, tmp_path):
    """30 trials; what the killed one has begun is gone on with, and all end as they would have without the kill."""
    sweep = create_sweep(settings(*SPACE, *LONG), trials=30, most=5, prune=False)
    assert (len(sweep.spec.trials), len(sweep.banks)) == (30, 6)
    line = [sys.executable, "-m", "softprompt.sweep.work", str(sweep.path)]
    processes = [subprocess.Popen([*line, str(number)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for number in range(2)]
    deadline = time.monotonic() + 200
    while not list(sweep.path.glob("banks/*/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    begun = {path.parts[-3] for path in sweep.path.glob("banks/*/checkpoints/step-*")}
    processes[0].send_signal(signal.SIGKILL)
    processes[1].communicate(timeout=300)
    processes[0].communicate()
    assert [process.returncode for process in processes] == [-signal.SIGKILL, 0]
    assert begun, "the kill came before or after the sweep: nothing was tested"
    trials = Trials(sweep)
    assert {one.state for one in trials.seen()} == {"finished"}
    told = (sweep.path / "journal.log").read_text().splitlines()
    ended = Counter(found["trial_id"] for line in told if (found := json.loads(line)).get("state") == 1)
    assert set(ended.values()) == {1}, "each trial ends once"
    assert len(ended) == 30
    finished = [path.read_text().count('"event": "finished"') for path in sweep.path.glob("banks/*/metrics.jsonl")]
    assert finished == [1] * 6
    with_kill = {one.number: one.loss for one in trials.seen()}
    other = create_sweep([*settings(*SPACE, *LONG), f"train.out={tmp_path / 'straight'}"], trials=30, most=5, prune=False)
    assert other.spec.trials == sweep.spec.trials
    Worker(other, 0).work()
    assert {one.number: one.loss for one in Trials(other).seen()} == with_kill


def test_the_best_is_named_and_judged(settings, tmp_path):
    sweep = create_sweep(settings("prompt.length=2,4", "optim.relative_lr=0.001,0.5"), prune=False)
    outcome = followed(sweep)
    losses = {one.number: one.loss for one in outcome.trials}
    assert outcome.best.number == min(losses, key=losses.get)
    score = outcome.judged["scores"]["loss"]
    assert score["low"] < score["value"] < score["high"]
    assert outcome.judged["rows"] == 15
    assert (outcome.prompt / "adapter_model.safetensors").is_file()
    kept = json.loads((sweep.path / "result.json").read_text())
    assert kept["best"]["trial"] == outcome.best.number
    assert len(kept["trials"]) == 4
    page = (sweep.path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "Parallel coordinates" in page
    again = followed(open_sweep(sweep.path))
    assert again.judged == outcome.judged


def test_a_bank_is_pruned_when_all_of_it_is_worse_than_the_median(settings, tmp_path):
    space = ("train.seed=0,1,2,3,4,5", "optim.relative_lr=0.5,0.000001", "train.steps=12", "train.eval_every=3")
    states = {}
    for most in (1, 2):  # a good trial and a bad one in turn
        sweep = create_sweep([*settings(*space), f"train.out={tmp_path / str(most)}"], most=most)
        Worker(sweep, 0).work()
        states[most] = [one.state for one in Trials(sweep).seen()]
    assert states[1][:5] == ["finished"] * 5, "nothing to compare with before"
    assert set(states[1][5::2]) == {"pruned"}
    assert states[2][0::2] == states[2][1::2], "a bank ends as a whole"
    assert states[2].count("finished") > states[1].count("finished")


def test_half_a_line_of_a_killed_process_is_taken_away(settings):
    sweep = create_sweep(settings("prompt.length=2,4"))
    Trials(sweep).fill()
    with open(sweep.storage, "ab") as journal:
        journal.write(b'{"op_code": 5, "tri')
    Worker(sweep, 0).work()
    assert [one.state for one in Trials(sweep).seen()] == ["finished", "finished"]


def test_a_trial_whose_loss_is_not_finite_fails_alone(settings, monkeypatch):
    from softprompt.errors import Diverged
    from softprompt.sweep import work

    sweep = create_sweep(settings("prompt.length=2,4,6"))
    whole = work.train

    def train(config, **how):
        for event in whole(config, **how):
            if "trial-001" in config.members():
                raise Diverged("trial-001: the loss of step 1 is not finite: lower optim.relative_lr", "trial-001")
            yield event

    monkeypatch.setattr(work, "train", train)
    Worker(sweep, 0).work()
    seen = Trials(sweep).seen()
    assert [one.state for one in seen] == ["finished", "failed", "finished"]
    assert "not finite" in seen[1].note


def test_a_storage_that_is_another_sweeps(settings, tmp_path):
    first = create_sweep(settings("prompt.length=2,4"))
    Trials(first).fill()
    other = create_sweep([*settings("prompt.length=2,4"), f"train.out={tmp_path / 'other'}"], storage=first.storage)
    with pytest.raises(ConfigError, match="holds the trials of another sweep"):
        Trials(other)
    file = tmp_path / "rows.jsonl"
    file.write_text("no journal\n")
    third = create_sweep([*settings("prompt.length=2,4"), f"train.out={tmp_path / 'third'}"], storage=str(file))
    with pytest.raises(ConfigError, match="is no journal"):
        Trials(third)
    assert file.read_text() == "no journal\n"


def test_a_database_keeps_several(settings, tmp_path):
    address = f"sqlite:///{tmp_path / 'trials.db'}"
    for name in ("a", "b"):
        sweep = create_sweep([*settings("prompt.length=2,4", "train.steps=1"), f"train.out={tmp_path / name}"], storage=address)
        Worker(sweep, 0).work()
        assert [one.state for one in Trials(sweep).seen()] == ["finished", "finished"]


def test_a_sweep_in_the_way_and_what_is_none(settings, tmp_path):
    create_sweep(settings("prompt.length=2,4"))
    with pytest.raises(RunError, match="sweep --resume"):
        create_sweep(settings("prompt.length=2,4"))
    with pytest.raises(RunError, match="is not a sweep"):
        open_sweep(tmp_path)


def test_the_page_shows_words_of_any_script():
    trials = [
        Trial(0, {"prompt.text": "简短<b>"}, "finished", 1.0, "p", None),
        Trial(1, {"prompt.text": "Short"}, "failed", None, None, "not finite"),
    ]
    judged = {
        "metric": "loss",
        "rows": 20,
        "copies_left_out": 1,
        "scores": {"loss": {"value": 1, "low": 0.9, "high": 1.1}},
        "base": {"loss": 2.0},
    }
    page = build_page(Shown("s", ("prompt.text",), trials, 0, "p", judged, {}, ()))
    assert '<span lang="zh">简短&lt;b&gt;</span>' in page
    assert "failed: not finite" in page
    assert "简短" not in page[page.index("<figure") : page.index("</figure")], "charts have no font for it"
