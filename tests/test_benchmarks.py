"""The benchmarks: rows of the wanted lengths, and a comparison from end to end on a tiny model. Times are never judged."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import tiny
import torch

import softprompt
from benchmarks import contestants, distil, eval_speed, long_run, quality, recipes, tasks, train_speed, workloads
from softprompt import init
from softprompt.encode import make_encoder
from softprompt.engine.prompt import no_prompt
from softprompt.evaluation import held_out_loss
from softprompt.events import Saved
from softprompt.peft_here import fault_of_generate
from softprompt.rows import load_rows
from softprompt.training import train

KEYS = {
    "workload", "device", "dtype", "ours_samples_per_second", "peft_samples_per_second", "ratio", "ours_peak_bytes", "peft_peak_bytes",
    "memory_ratio", "loss_difference", "gradient_cosine", "pairs", "machine", "peft_setting", "steps", "examples_per_step",
    "virtual_tokens", "mean_tokens", "mean_supervised",
}  # fmt: skip
CPU = {"dtype": "torch.float32", "machine": {"cpu": "Some CPU", "gpu": None}}


@pytest.mark.parametrize("name", workloads.WORKLOADS)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_rows_have_the_lengths_of_their_workload(tmp_path, name, adds_bos):
    # the template alone takes 20 of the tiny tokenizer's tokens: the shortest rows grow, unless they may be that long
    workload = workloads.WORKLOADS[name]
    profile = replace(workload.profile, shortest=max(workload.profile.shortest, 60 if workload.profile.share else 25))
    encoder = make_encoder(tiny.tiny_tokenizer(adds_bos=adds_bos), "human-assistant")
    made = workloads.make_rows(replace(workload, profile=profile), 40, encoder, None, seed=0)
    encoded = workloads.read_rows(str(workloads.write_rows(tmp_path / "rows.jsonl", made)), encoder, profile.longest)
    lengths = [len(row) + adds_bos for row in encoded]
    assert len(encoded) == 40
    assert profile.shortest <= min(lengths) < max(lengths) <= profile.longest
    assert fmean(lengths) == pytest.approx(profile.mean, rel=0.05)
    if profile.labels:
        assert {row.num_supervised for row in encoded} == set(profile.labels)
    else:
        assert fmean(row.num_supervised for row in encoded) == pytest.approx(profile.share * profile.mean, rel=0.05)


def test_rows_come_from_a_data_file(tmp_path):
    answers = ["one short answer", "another answer which is a good deal longer than the first one", "一个简短的回答"]
    data = tiny.write_rows(tmp_path / "data.jsonl", [{"instruction": "Say.", "input": "", "output": answer} for answer in answers])
    encoder = make_encoder(tiny.tiny_tokenizer(), "human-assistant")
    taken = workloads.make_rows(workloads.WORKLOADS["tutorial"], 5, encoder, str(data), seed=0)
    assert [row["completion"] for row in taken] == [*answers, *answers[:2]]
    joined = workloads.make_rows(workloads.WORKLOADS["long"], 3, encoder, str(data), seed=0)
    encoded = workloads.read_rows(str(workloads.write_rows(tmp_path / "rows.jsonl", joined)), encoder, 1024)
    assert all(900 <= len(row) + 1 <= 1024 and 0.75 < row.num_supervised / len(row) < 0.85 for row in encoded)
    assert all(answers[1] in row["completion"] for row in joined)


def test_a_comparison_from_end_to_end(tmp_path, monkeypatch, capsys):
    model, out = tiny.tiny_folder(tmp_path / "model"), tmp_path / "out.json"
    how = ["--workload", "tutorial", "--steps", "2", "--pairs", "1", "--dtype", "float32", "--head-tolerance", "0"]
    monkeypatch.setattr(sys, "argv", ["train_speed.py", "--model", str(model), "--json", str(out), *how])
    # one thread: beside other work, threads of a tiny model wait for each other longer than they compute
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    train_speed.main()
    result = json.loads(out.read_text(encoding="utf-8"))
    assert set(result) >= KEYS
    assert result["dtype"] == result["peft_setting"]["dtype"] == "float32"
    assert result["peft_setting"]["batch_size"] == 2
    assert result["pairs"][0]["ours"]["samples"] == result["pairs"][0]["tutorial"]["samples"] == 32
    assert result["loss_difference"] < 1e-4
    assert result["gradient_cosine"] > 0.999
    assert min(result["ours_peak_bytes"], result["peft_peak_bytes"]) > 0
    assert "gradient cosine" in capsys.readouterr().out


# ---- quality -------------------------------------------------------------------------------------------------------


@pytest.fixture
def quality_task(tmp_path):
    """Rows of text and label, as the tasks of reviews have them."""
    rows = [{"text": f"{'very ' * (n % 3)}{'nice' if n % 2 else 'awful'}", "label": "good" if n % 2 else "bad"} for n in range(24)]
    files = [
        tiny.write_rows(tmp_path / f"{part}.jsonl", rows[start:stop]) for part, start, stop in (("a", 0, 12), ("b", 12, 18), ("c", 18, 24))
    ]
    return tasks.Task("reviews", *files, "Good or bad?", True, steps=4, examples_per_step=4, max_length=96, virtual_tokens=5)


@pytest.mark.parametrize(
    "name",
    [
        "softprompt",
        "softprompt, labels then text",
        "PEFT's defaults",
        "PEFT, vocabulary init, best rate",
        "PEFT P-tuning, best rate",
        "PEFT P-tuning by LSTM, best rate",
        "PEFT prefix tuning, best rate",
        "LoRA r = 8, best rate",
    ],
)
def test_every_kind_of_recipe_trains_and_is_scored(bases, quality_task, tmp_path, name):
    base = bases()
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    outcome = recipes.run_recipe(recipes.RECIPES[name], quality_task, base, 0.01, 0, str(tmp_path / "run"))
    steps = [step for step, _, _ in outcome.curve]
    assert (steps[0], steps[-1]) == (0, 4)
    assert outcome.curve[-1][2] != outcome.curve[0][2]
    assert 0 <= outcome.accuracy <= 1
    assert outcome.num_trainable > 0
    assert all(torch.equal(value, before[key]) for key, value in base.model.state_dict().items())


def test_lora_starts_at_the_bare_base(bases, quality_task, tmp_path):
    """PEFT's forward and ours agree on the loss before any step: LoRA's B is zero then."""
    base = bases()
    config = recipes.make_config(recipes.RECIPES["LoRA r = 8, best rate"], quality_task, base, 0.01, 0, str(tmp_path / "run"))
    encoder = make_encoder(base.tokenizer, config.data.template)
    bare = held_out_loss(base, no_prompt(base, encoder.bos_id), load_rows(config, encoder)[2], 64)
    outcome = recipes.run_recipe(recipes.RECIPES["LoRA r = 8, best rate"], quality_task, base, 0.01, 0, str(tmp_path / "run"))
    assert outcome.curve[0][2] == pytest.approx(bare, rel=1e-5)


def test_random_means_what_peft_means_by_it(bases, quality_task, tmp_path):
    theirs = recipes.RECIPES["PEFT's defaults"]
    both = {"theirs": theirs, "ours": replace(theirs, random=init.from_noise)}
    start = [recipes.run_recipe(one, quality_task, bases(), None, 0, str(tmp_path / name)).curve[0][2] for name, one in both.items()]
    assert abs(start[0] - start[1]) > 0.01


def test_the_pages_are_what_their_lines_give():
    docs = Path(__file__).parents[1] / "docs"
    ours, doctor, contest = (quality.read(docs / f"{name}.jsonl") for name in ("results", "doctor", "contestants"))
    made = {
        "results": quality.report(ours | doctor),
        "doctor": quality.doctors_page(ours | doctor),
        "contestants": contestants.report(contest),
    }
    assert made == {name: (docs / f"{name}.md").read_text(encoding="utf-8") for name in made}


def test_a_grid_is_searched_on_the_first_seed_alone():
    def run(loss):
        return {"curve": [(0, 0.0, 3.0), (4, 1.0, loss)], "test_loss": loss, "accuracy": None, "num_trainable": 5, **CPU}

    runs = {}
    asked = []
    for rate, seed in quality._points((0.1, 0.2, 0.3), 3, runs, "a/b/c"):
        asked.append((rate, seed))
        runs[f"a/b/c/{rate}/{seed}"] = run({0.1: 2.0, 0.2: 1.0, 0.3: 1.5}[rate])
    assert asked == [(0.2, 0), (0.3, 0), (0.1, 0), (0.2, 1), (0.2, 2)]
    table = quality.report(runs)
    assert "| c | 0.2 | 5 | 3.0000 | 1.0000 ± 0.0000 |  | 3 | Some CPU |" in table


def test_what_one_process_has_begun_the_others_leave_to_it(tmp_path):
    held = tmp_path / "lock"
    begins = 'file = open(sys.argv[1], "w"); print(quality._first_to_begin(file, "a"), flush=True); input()'
    command = [sys.executable, "-c", f"import sys; from benchmarks import quality; {begins}", str(held)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as other:
        assert other.stdout.readline() == "True\n"
        with held.open("w") as file:
            assert not quality._first_to_begin(file, "a")
            assert quality._first_to_begin(file, "b")
            other.communicate("\n")
            assert quality._first_to_begin(file, "a"), "its lock ended with the process"


def test_the_table_begins_with_what_is_asked_first():
    def run(loss, accuracy):
        return {"curve": [(0, 0.0, 3.0), (4, 1.0, loss)], "test_loss": loss, "accuracy": accuracy, "num_trainable": 5, **CPU}

    ours = {"base/task/softprompt/None/0": run(0.25, 0.8), "base/task/softprompt/None/1": run(0.35, 0.9)}
    page = quality.report(ours | {"base/task/LoRA r = 8, best rate/0.001/0": run(0.125, None)})
    assert "| task | base | 85.0 ± 7.1% (0.300 ± 0.071) |  |  |  | (0.125) |" in page


def test_rows_without_labels_are_scored_by_their_loss(bases, quality_task, tmp_path):
    task = replace(quality_task, labelled=False)
    outcome = recipes.run_recipe(recipes.RECIPES["softprompt"], task, bases(), None, 0, str(tmp_path / "run"))
    assert outcome.accuracy is None
    assert outcome.test_loss == min(point[2] for point in outcome.curve)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_the_speed_of_an_evaluation_from_end_to_end(tmp_path, monkeypatch, make_config):
    model, out = tiny.tiny_folder(tmp_path / "model", max_position_embeddings=2048), tmp_path / "out.json"
    list(train(make_config("train.steps=1", f"model.name={model}")))
    how = ["--prompt", str(tmp_path / "run"), "--rows", "5", "--labelled", "9", "--joined", "1", "2", "--pairs", "1"]
    monkeypatch.setattr(eval_speed, "limit_of", lambda rows: 4)
    monkeypatch.setattr(sys, "argv", ["eval_speed.py", "--base", str(model), "--json", str(out), *how])
    eval_speed.main()
    result = json.loads(out.read_text(encoding="utf-8"))
    if fault_of_generate():  # its answers are no truth then
        assert (result["without_peft"], "answers_equal_to_peft" in result) == (fault_of_generate(), False)
    else:
        assert result["answers_equal_to_peft"] >= 1 / 5, "of the longest row, which PEFT does not pad"
    assert min(result[key] for key in result if "_over_" in key) > 0
    short, long = result["labels"]
    assert short["rows"] == long["rows"] == 9
    assert 1.5 < long["tokens_of_a_question"] / short["tokens_of_a_question"] < 2
    for one in (short, long):
        assert one["largest_difference_of_a_loss"] < 1e-3
        assert one["alone_over_shared"] > 0


@pytest.mark.parametrize(
    ("setup", "early"),
    [("rate 100 times too low", 6), ("rate 100 times too high", 6), ("template without the question", 0), ("answers beyond max_length", 0)],
)
def test_a_broken_set_up_is_named(bases, quality_task, setup, early):
    recipe, task = recipes.RECIPES[setup], replace(quality_task, steps=12)
    found = recipes.examined(recipe, task, bases())
    assert quality.named(recipe.finding, found["findings"])
    assert not quality.named(recipes.RECIPES["sound"].finding, found["findings"])
    page = quality.doctors_page({f"tiny/reviews/{setup}": {**found, "early": [(-1, "of something else"), *found["early"]]}})
    assert f"| tiny | reviews | {setup} | 12 | yes | {early} |" in page


def test_exact_answers_are_counted(bases, quality_task, tmp_path):
    """An answer is right when it is the response to the letter; the prompt that says them was trained on these rows."""
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "say", "completion": "aa"}] * 4)
    task = replace(quality_task, train=rows, held=rows, test=Path(f"{rows}[:2]"), labelled=False, exact=True, steps=60)
    learned = recipes.run_recipe(recipes.RECIPES["softprompt"], task, bases(), None, 0, str(tmp_path / "run"))
    bare = recipes.run_recipe(recipes.RECIPES["PEFT as in the tutorial"], task, bases(), None, 0, str(tmp_path / "other"))
    assert (learned.accuracy, bare.accuracy) == (1.0, 0.0)


# ---- contestants ---------------------------------------------------------------------------------------------------


@pytest.fixture
def contest(tmp_path, monkeypatch, quality_task):
    """contest(...): benchmarks/contestants.py on a tiny base, a labelled task and one of text whose held-out rows are its test."""
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f'{{"n": {n}}}'} for n in range(40)]
    train, held = tiny.write_rows(tmp_path / "t.jsonl", rows[:16]), tiny.write_rows(tmp_path / "h.jsonl", rows[16:])
    told = replace(quality_task, name="demo", train=train, held=held, test=held, labelled=False)
    reviews = [{"text": f"{'nice' if n % 2 else 'awful'} {n}", "label": "good" if n % 2 else "bad"} for n in range(12)]
    known = {"demo": told, "sentiment": replace(quality_task, name="sentiment", train=tiny.write_rows(tmp_path / "r.jsonl", reviews))}
    monkeypatch.setattr(contestants, "make_tasks", lambda names, cache, alpaca: [known[name] for name in names])
    model = tiny.tiny_folder(tmp_path / "model", max_position_embeddings=2048)
    common = ["--base", f"tiny={model}", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "found.jsonl")]

    def run(*how):
        monkeypatch.setattr(sys, "argv", ["contestants.py", *common, *map(str, how)])
        contestants.main()
        return [json.loads(line) for line in (tmp_path / "found.jsonl").read_text(encoding="utf-8").splitlines()]

    return run


def test_contestants_from_end_to_end(contest, tmp_path):
    page = tmp_path / "page.md"
    demo, sentiment = contest("--task", "demo", "--task", "sentiment", "--report", page)
    told, labelled = demo["evaluation"], sentiment["evaluation"]
    assert list(told["contestants"]) == list(labelled["contestants"]) == ["base", "text", "few-shot", "prompt"]
    assert told["rows"] == 12, "of 24 rows, half choose among the states of the run"
    assert (told["metric"], labelled["metric"]) == ("exact_match", "accuracy")
    assert demo["training"]["steps"] == 4
    whole = page.read_text(encoding="utf-8")
    low, high = (f"{100 * end:.1f}" for end in labelled["intervals"]["prompt"]["accuracy"])
    assert f"{labelled['contestants']['prompt']['accuracy']:.1%} ({low} to {high})" in whole
    assert whole.count("cannot tell") == len(told["verdicts"]) + len(labelled["verdicts"]) == 12
    assert all(text in whole for text in ("json valid", "--task sentiment", "calibration error"))
    noted = {**sentiment, "notes": ["Read with care."]}
    (tmp_path / "found.jsonl").write_text(f"{json.dumps(demo)}\n{json.dumps(noted)}\n", encoding="utf-8")
    contest("--task", "sentiment", "--draw", "--report", page)
    assert page.read_text(encoding="utf-8") == f"{whole}\nRead with care.\n"


def test_a_measured_task_is_not_measured_again(contest, tmp_path):
    (first,) = contest("--task", "sentiment", "--rows", "4")
    assert first["evaluation"]["rows"] == 4
    prompt = tmp_path / "runs" / "tiny-sentiment" / "prompt" / "card.json"
    made = prompt.stat().st_mtime_ns
    assert contest("--task", "sentiment", "--rows", "4") == [first]
    more = contest("--task", "sentiment")  # other rows: measured, with the prompt that is there
    assert [one["evaluation"]["rows"] for one in more] == [4, 6]
    assert prompt.stat().st_mtime_ns == made
    again = contest("--task", "sentiment", "--run", prompt.parent.parent)
    assert len(again) == 3
    assert again[2]["evaluation"] == more[1]["evaluation"]


def test_a_long_run_says_what_it_left(tmp_path, monkeypatch, capsys):
    given = ("long_run", "--steps", "40", "--save-every", "2", "--eval-every", "10", "--out", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", list(given))
    long_run.main()
    said = capsys.readouterr().out
    assert re.search(r"^a step of the last tenth: mean \d+\.\d+ ms, median \d+\.\d+ ms$", said, re.MULTILINE)
    assert "20 checkpoints were written, 11 are there: 4, 8, " in said
    assert re.search(r"^run folder without metrics\.jsonl: \d\.\d+ MB in \d+ files$", said, re.MULTILINE)
    assert re.search(r"^softprompt report: \d+\.\d s, 0\.\d+ MB$", said, re.MULTILINE)
    assert (tmp_path / "home" / "run" / "result.json").is_file()


def test_a_stopped_training_goes_on(contest, tmp_path, monkeypatch):
    def stopped(*how, **settings):
        for event in train(*how, **settings):
            yield event
            if isinstance(event, Saved) and event.step == 2:
                raise KeyboardInterrupt

    train = softprompt.train
    monkeypatch.setattr(contestants, "SAVE_EVERY", 1)
    monkeypatch.setattr(softprompt, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        contest("--task", "sentiment")
    monkeypatch.setattr(softprompt, "train", train)
    log = tmp_path / "runs" / "tiny-sentiment" / "metrics.jsonl"
    before = log.read_text(encoding="utf-8")
    (done,) = contest("--task", "sentiment")
    assert done["training"]["steps"] == 4
    assert log.read_text(encoding="utf-8").startswith(before), "its first steps are not taken again"


def test_the_starts_of_a_distillation_are_compared(tmp_path, monkeypatch, capsys):
    model, results = tiny.tiny_folder(tmp_path / "model", chat=True, max_position_embeddings=4096), tmp_path / "results.jsonl"
    for name, count in (("ASKED", 16), ("MEASURED", 4)):
        monkeypatch.setattr(distil, name, count)
    short = ("distil.max_new_tokens=6", "data.max_length=160", "train.steps=4", "train.eval_every=2", "train.examples_per_step=2")
    how = ["--seeds", "1", "--lengths", "4", "6", "--runs", str(tmp_path / "runs"), *(word for one in short for word in ("--set", one))]
    monkeypatch.setattr(sys, "argv", ["distil.py", "starts", "--base", str(model), "--results", str(results), *how])
    distil.main()
    distil.main()
    (line,) = [json.loads(one) for one in results.read_text(encoding="utf-8").splitlines()]
    assert set(line["kl"]) == {f"{start}-{length}" for start in ("context", "spread", "states", "matching") for length in (4, 6)}
    assert all(set(curve) == {"0", "2", "4"} for curve in line["kl"].values())
    assert line["kl"]["matching-6"]["0"] < min(line["kl"][f"{start}-6"]["0"] for start in ("context", "spread", "states"))
