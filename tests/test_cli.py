"""The command line from end to end: documented JSON, one line for every mistake, and nothing overwritten."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from transformers import Gemma3nTextConfig, T5Config

import softprompt
from softprompt import cli
from softprompt.training import Saved, train


@pytest.fixture
def run(monkeypatch, capsys):
    """run("train", ...) -> (exit code, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["softprompt", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


@pytest.fixture
def config_file(make_config, tmp_path):
    """config_file("train.steps=3", ...): the settings of a small run as a TOML file."""

    def write(*overrides: str) -> Path:
        file = tmp_path / "config.toml"
        file.write_text(make_config("train.steps=2", *overrides).to_toml())
        return file

    return write


@pytest.fixture
def finished(run, config_file, tmp_path) -> Path:
    assert run("train", config_file(), "--json", tmp_path / "train.json")[0] == 0
    return tmp_path / "run"


@pytest.fixture
def refused(run):
    """refused("train", ...) -> the one line that says why."""

    def call(*words: object) -> str:
        code, _, error = run(*words)
        assert code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        return error

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what each verb writes -----------------------------------------------------------------------------------------


def test_a_run_in_a_process_of_its_own_says_nothing_on_standard_error(config_file):
    """Whatever is installed beside: bitsandbytes advises to install kernels where a processor multiplies in bfloat16."""
    words = ["train", config_file("model.dtype=auto")]
    done = subprocess.run([sys.executable, "-m", "softprompt", *words], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_train_writes_its_result(finished, tmp_path):
    result = json.loads((tmp_path / "train.json").read_text())
    documented = ["steps", "train_loss", "eval_loss_before", "eval_loss_after", "seconds", "samples_per_second", "peak_bytes", "prompt"]
    assert set(result) == {*documented, "best_step", "ended", "findings", "prompts"}
    assert (result["best_step"], result["ended"]) == (2, "steps")
    assert (result["steps"], result["prompt"]) == (2, str(finished / "prompt"))
    assert all(math.isfinite(result[key]) and result[key] > 0 for key in documented[:-1])
    assert result == json.loads((finished / "result.json").read_text())


def test_eval_compares_base_text_and_prompt(run, finished, tmp_path):
    code, shown, _ = run("eval", finished, "--data", tmp_path / "eval.jsonl", "model.device=cpu", "--json", tmp_path / "eval.json")
    contestants = json.loads((tmp_path / "eval.json").read_text())["contestants"]
    assert code == 0
    assert list(contestants) == ["base", "text", "few-shot", "prompt"]
    for score in contestants.values():
        assert score["perplexity"] == pytest.approx(math.exp(score["loss"]))
        assert score["accuracy"] is None
        assert f"{score['loss']:.4f}" in shown


def test_the_loss_of_eval_is_the_loss_of_training(run, finished, tmp_path):
    run("eval", finished, "--data", tmp_path / "eval.jsonl", "model.device=cpu", "--json", tmp_path / "eval.json")
    evaluated, trained = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("eval", "train"))
    assert evaluated["contestants"]["prompt"]["loss"] == pytest.approx(trained["eval_loss_after"], rel=1e-5)


def test_eval_gives_an_accuracy_for_labels(run, config_file, tmp_path):
    rows = tiny.write_rows(tmp_path / "labels.jsonl", [{"text": f"film {n}", "label": n % 2} for n in range(12)])
    settings = (f"data.train={rows}", f"data.eval={rows}", "data.label_words.0=bad", "data.label_words.1=good")
    assert run("train", config_file(*settings))[0] == 0
    assert run("eval", tmp_path / "run", "--data", rows, "model.device=cpu", "--json", tmp_path / "eval.json")[0] == 0
    contestants = json.loads((tmp_path / "eval.json").read_text())["contestants"]
    assert all(0 <= score["accuracy"] <= 1 for score in contestants.values())


def test_label_words_are_compared_whole_where_rows_are_cut(run, config_file, tmp_path):
    words = ("goodness gracious me", "good")
    both = tiny.write_rows(tmp_path / "both.jsonl", [{"text": "a", "label": word} for word in words])
    held = tiny.write_rows(tmp_path / "held.jsonl", [{"text": "b", "label": "good"}])
    cut_after_good = len("<" + "Human: b\n\nAssistant: " + "good")
    assert run("train", config_file(f"data.train={both}", f"data.eval={held}", f"data.max_length={cut_after_good}"))[0] == 0
    assert run("eval", tmp_path / "run", "--data", held, "model.device=cpu", "--json", tmp_path / "eval.json")[0] == 0
    evaluated = json.loads((tmp_path / "eval.json").read_text())
    assert evaluated["supervised_tokens"] == 4, "EOS is cut: both words begin alike"
    assert evaluated["contestants"]["prompt"]["accuracy"] == 1.0


def test_generate_answers_with_several_prompts(run, finished, tmp_path):
    checkpoint = finished / "checkpoints" / "step-000002"
    words = ("generate", finished, "bring tea", "a = b", "model.device=cpu", "--with", checkpoint, "--max-new-tokens", 5)
    code, _, _ = run(*words, "--json", tmp_path / "answers.json")
    answers = json.loads((tmp_path / "answers.json").read_text())["answers"]
    assert code == 0
    assert [row["text"] for row in answers] == ["bring tea", "bring tea", "a = b", "a = b"]
    assert [row["prompt"] for row in answers] == [str(finished), str(checkpoint)] * 2
    assert answers[0]["answer"] == answers[1]["answer"] != ""


def test_the_prompts_of_a_bank_answer_together(run, config_file, tmp_path):
    run("train", config_file(), "prompt.count=2", f"train.out={tmp_path / 'bank'}")
    words = ("generate", tmp_path / "bank", "bring tea", "--ensemble", "mean", "model.device=cpu", "--max-new-tokens", 5)
    code, _, error = run(*words, "--json", tmp_path / "answers.json")
    assert (code, error) == (0, "")
    assert len(json.loads((tmp_path / "answers.json").read_text())["answers"]) == 1


def test_doctor_says_what_it_found(run, finished, tmp_path):
    code, shown, _ = run("doctor", finished, "--json", tmp_path / "doctor.json")
    (findings,) = json.loads((tmp_path / "doctor.json").read_text())["findings"].values()
    assert code == 0
    assert shown.split() == (" ".join(findings) or "nothing to find fault with").split()


def test_show_prints_rows_and_a_summary(run, config_file, tmp_path):
    code, shown, _ = run("show", config_file(), "--rows", 2, "--json", tmp_path / "show.json")
    result = json.loads((tmp_path / "show.json").read_text())
    assert code == 0
    assert (result["train"]["num_rows"], result["eval"]["num_rows"], len(result["rows"])) == (24, 7, 2)
    assert result["rows"][0]["supervised_text"] == "tea</s>"
    assert len(result["rows"][0]["input_ids"]) == len(result["rows"][0]["labels"])
    assert f"{tmp_path / 'train.jsonl'}:1" in shown


def test_plan_prints_parameters(run, config_file, bases, tmp_path):
    code, shown, _ = run("plan", config_file(), "--json", tmp_path / "plan.json")
    result = json.loads((tmp_path / "plan.json").read_text())
    assert code == 0
    assert result["num_base"] == bases().num_parameters
    assert result["trainable_line"] in shown


# ---- what is refused, in one line ----------------------------------------------------------------------------------

WRONG = {
    "missing rows": ("data.train=/nowhere.jsonl", "/nowhere.jsonl: no such file"),
    "missing base": ("model.name=/nowhere", "/nowhere: no such model folder"),
    "unknown key": ("train.step=3", "unknown key train.step: did you mean train.steps?"),
    "wrong type": ("train.steps=many", "train.steps: input should be a valid integer"),
    "out of range": ("train.steps=0", "train.steps: input should be greater"),
    "no override": ("steps", "is not an override"),
    "empty init text": ("prompt.text=", "prompt.text is empty"),
    "long prompt": ("prompt.length=400", "exceed the base's context of 512 tokens"),
    "unknown template": ("data.template=chatt", "did you mean chat?"),
    "device": ("model.device=abacus", "model.device = 'abacus' cannot be used here"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_setting_is_one_line(refused, config_file, tmp_path, kind):
    override, reason = WRONG[kind]
    assert reason in refused("train", config_file(), override)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["train", "show", "plan"])
def test_a_missing_config_is_one_line(refused, tmp_path, verb):
    assert "cannot read the config" in refused(verb, tmp_path / "none.toml")


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_a_missing_prompt_is_one_line(refused, tmp_path, verb):
    assert "no prompt here" in refused(verb, tmp_path / "none", "bring tea" if verb == "generate" else "data.eval=x")


def test_a_config_that_is_not_toml_is_one_line(refused, tmp_path):
    (tmp_path / "config.toml").write_text("[train\nsteps = 3")
    assert "not valid TOML" in refused("train", tmp_path / "config.toml")


def test_no_rows_are_one_line(refused, config_file, tmp_path):
    (tmp_path / "train.jsonl").write_text("\n")
    file = config_file()
    (tmp_path / "train.jsonl").write_text("\n")
    assert "train.jsonl: no rows" in refused("train", file)


@pytest.mark.parametrize("verb", ["train", "eval", "plan"])
def test_a_result_that_cannot_be_written_is_one_line(refused, finished, config_file, tmp_path, verb):
    (tmp_path / "file").write_text("")
    words = [finished, "--data", tmp_path / "eval.jsonl"] if verb == "eval" else [config_file(f"train.out={tmp_path / 'other'}")]
    assert "cannot be written" in refused(verb, *words, "--json", tmp_path / "file" / "result.json")


@pytest.mark.parametrize("option", ["--max-new-tokens=0", "--temperature=-1", "--temperature=nan", "--top-p=0", "--top-k=-1"])
def test_senseless_sampling_is_one_line(refused, finished, option):
    refused("generate", finished, "bring tea", option)


def test_a_run_folder_below_a_file_is_one_line(refused, config_file, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "cannot write in" in refused("train", config_file(f"train.out={tmp_path / 'file' / 'run'}"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("settings", "reason"), [(T5Config(), "encoder-decoder"), (Gemma3nTextConfig(), "looks up embeddings again")], ids=["t5", "gemma3n"]
)
@pytest.mark.parametrize("verb", ["train", "plan"])
def test_a_base_that_cannot_work_is_one_line(refused, config_file, tmp_path, verb, settings, reason):
    settings.save_pretrained(tmp_path / "base")
    assert reason in refused(verb, config_file(f"model.name={tmp_path / 'base'}"))


# ---- rows that are rejected, folders that are in the way -----------------------------------------------------------


def test_a_malformed_row_is_named_by_file_and_line_before_anything_is_written(refused, config_file, tmp_path):
    file = config_file()
    with open(tmp_path / "train.jsonl", "a") as rows:
        rows.write('{"prompt": "half\n')
    error = refused("train", file)
    assert f"1 rows rejected, data.max_rejected allows 0: {tmp_path / 'train.jsonl'}:25: not valid JSON" in error
    assert not (tmp_path / "run").exists()


def test_an_allowed_rejected_row_is_listed(run, config_file, tmp_path):
    file = config_file("data.max_rejected=1")
    with open(tmp_path / "train.jsonl", "a") as rows:
        rows.write('{"prompt": "half\n')
    assert run("train", file)[0] == 0
    listed = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert [row["source"] for row in listed] == [f"{tmp_path / 'train.jsonl'}:25"]
    assert "not valid JSON" in listed[0]["reason"]


@pytest.mark.parametrize("kind", ["finished", "unfinished", "foreign"])
def test_a_folder_in_the_way_is_left_as_it_is(refused, make_config, tmp_path, kind):
    config = make_config("train.steps=4", "train.save_every=2")
    folder = tmp_path / "run"
    if kind == "foreign":
        folder.mkdir()
        (folder / "diary.txt").write_text("mine")
    else:
        events = train(config)
        for event in events:
            if kind == "unfinished" and isinstance(event, Saved):
                break
        events.close()
    before = contents(folder)
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml())
    expected = {"finished": "finished run", "unfinished": f"train --resume {folder}", "foreign": "is not a run"}
    assert expected[kind] in refused("train", file)
    assert contents(folder) == before != {}


@pytest.mark.parametrize("program", [["-m", "softprompt"], ["-c", "from softprompt.cli import main; main()"]])
def test_the_program_says_its_version(program):
    done = subprocess.run([sys.executable, *program, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"softprompt {softprompt.__version__}\n"


# ---- what a fresh process loads ------------------------------------------------------------------------------------

HELP = """
import sys
from softprompt.cli import main
sys.argv = ["softprompt", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
"""


@pytest.mark.parametrize("code", [HELP, "import softprompt.config", "import softprompt.data"], ids=["help", "config", "data"])
def test_torch_is_not_loaded_without_need(code):
    heavy = "\nimport sys; print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + heavy], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
