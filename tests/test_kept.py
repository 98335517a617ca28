"""What earlier versions wrote is read: loaded, gone on with, reported, answered with; what a newer one wrote is said."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt import Sampling, cli, generate, load_base, load_prompt
from softprompt.config import ModelConfig
from softprompt.errors import ArtifactError, ConfigError, RunError
from softprompt.report import write_report
from softprompt.runlog import RunFolder

VERSIONS = sorted(path.parent for path in (Path(__file__).parent / "kept").glob("*/base"))
PLACE = "/tmp/softprompt-kept"
ALIKE = {"rtol": 0, "atol": 1e-5}  # rows on another processor than that of the kept run; on the same one they are equal


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def kept(request, tmp_path):
    """A copy of the folders of a version. Its runs find base and rows there; its cards still name a base that is gone."""
    home = Path(shutil.copytree(request.param, tmp_path / "kept"))
    for file in home.glob("*/config.toml"):
        text = file.read_text(encoding="utf-8").replace(f'"{PLACE}/', f'"{home.as_posix()}/')
        file.write_text(text, encoding="utf-8", newline="\n")
    return home


@pytest.fixture
def base(kept):
    return load_base(ModelConfig(name=str(kept / "base"), device="cpu", dtype="float32"))


@pytest.fixture
def softprompt(kept, monkeypatch, capsys):
    """softprompt("eval", ...): standard output and error of a verb that has to end well."""

    def call(*words):
        monkeypatch.setattr("sys.argv", ["softprompt", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        output = "".join(capsys.readouterr())
        assert code == 0, output
        return output

    return call


def rows_of(folder):
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


def test_there_are_folders_of_this_version():
    assert VERSIONS


def test_a_version_is_kept_once():
    make = Path(__file__).parent / "kept" / "make.py"
    done = subprocess.run([sys.executable, str(make)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is kept as it is" in done.stderr


@pytest.mark.parametrize("place", ["finished", "bank/prompts/rows", "bank/prompts/deep"])
def test_a_prompt_answers_as_it_did(kept, base, place):
    checkpoint = kept / ("finished/checkpoints/step-000004" if place == "finished" else place.replace("prompts", "checkpoints/step-000006"))
    for folder in (kept / place, checkpoint):
        prompt = load_prompt(folder, base)
        assert (prompt.card.method == "prefix") == (place[-4:] == "deep")
        assert prompt.soft.position == ("start" if place == "finished" else "after_bos")
        assert prompt.encoder.template.name == ("human-assistant" if place == "finished" else "chat")
        assert generate(base, prompt, ["bring 水"], Sampling(4))[0]


@pytest.mark.parametrize("name", ["finished", "bank", "stopped"])
def test_the_stream_of_a_run_is_read(kept, name):
    run = RunFolder.reopen(kept / name)
    kinds = [type(event).__name__ for event in run.stream()]
    assert kinds[0] == "Started"
    assert kinds.count("Step") == {"finished": 4, "bank": 6, "stopped": 5}[name]
    assert (run.result() is None) == (name == "stopped")
    assert set(run.config().members()) == ({"seed-0"} if name == "finished" else {"rows", "deep"})


def test_a_stopped_run_goes_on_to_the_rows_of_the_straight_one(kept, softprompt):
    softprompt("train", "--resume", kept / "stopped")
    starts = [event.first_step for event in RunFolder.reopen(kept / "stopped").stream() if hasattr(event, "first_step")]
    assert starts == [0, 4], "from its checkpoint"
    for name in ("rows", "deep"):
        for place in (f"prompts/{name}", f"checkpoints/step-000006/{name}"):
            assert torch.allclose(rows_of(kept / "stopped" / place), rows_of(kept / "bank" / place), **ALIKE)


def evaluated(kept):
    """The command that made the kept evaluation."""
    metrics = ("--metric", "accuracy", "--metric", "loss", "--metric", "exact_match")
    return "eval", kept / "finished", "--answers", "--max-new-tokens", 4, *metrics, f"model.name={kept / 'base'}", "model.device=cpu"


def test_an_evaluation_goes_on_with_its_answers(kept, softprompt):
    (folder,) = (kept / "finished" / "evaluations").iterdir()
    before = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    file = folder / "predictions.jsonl"
    head, first, *rest = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    known = [head, {**first, "text": "an answer of that time"}, *rest[:-1]]  # the last one is missing
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in known), encoding="utf-8", newline="\n")
    softprompt(*evaluated(kept))
    assert [folder] == list((kept / "finished" / "evaluations").iterdir()), "it is the same evaluation"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert lines[:-1] == known, "what was answered is not asked again"
    assert lines[-1] == {**rest[-1], "source": lines[-1]["source"]}
    after = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    for name, scores in before["contestants"].items():
        assert after["contestants"][name]["loss"] == pytest.approx(scores["loss"], abs=1e-4)


def test_the_report_shows_runs_with_their_evaluation(kept):
    page = write_report([kept / "finished"], None).read_text(encoding="utf-8")
    (folder,) = (kept / "finished" / "evaluations").iterdir()
    said = json.loads((folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()[1])
    assert said["question"] in page
    both = write_report([kept / "bank", kept / "stopped"], kept / "both.html").read_text(encoding="utf-8")
    assert "stopped / deep" in both


def test_a_file_of_answers_goes_on(kept, softprompt):
    folder = kept / "answers"
    words = ("--in", folder / "questions.txt", "--max-new-tokens", 4, "--resume", f"model.name={kept / 'base'}", "model.device=cpu")
    for name in ("whole", "half"):
        softprompt("generate", kept / "finished", *words, "--out", folder / f"{name}.jsonl")
    assert (folder / "half.jsonl").read_bytes().splitlines()[0] == (folder / "whole.jsonl").read_bytes().splitlines()[0]
    assert [json.loads(line)["text"] for line in (folder / "half.jsonl").read_bytes().splitlines()] == [
        "bring tea", "bring 水", "please bring milk",
    ]  # fmt: skip


def test_exports_hold_the_prompt(kept, base):
    """As the engines that they are for read them."""
    from gguf import GGUFReader

    wanted, out = rows_of(kept / "finished" / "prompt"), kept / "exports"
    assert {json.loads(file.read_text(encoding="utf-8"))["softprompt"] for file in out.glob("*/softprompt.json")} == {kept_version(kept)}
    assert torch.equal(torch.from_numpy(np.load(out / "npy" / "finished.npy")), wanted)
    assert torch.equal(torch.load(out / "torch" / "finished.pt", weights_only=True), wanted)
    assert torch.equal(load_file(out / "vllm" / "finished.safetensors")["rows"], wanted)
    facts = json.loads((out / "vocab" / "softprompt.json").read_text(encoding="utf-8"))["prompts"]["finished"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out / "vocab"), AutoTokenizer.from_pretrained(out / "vocab")
    assert tokenizer.convert_tokens_to_ids(facts["tokens"]) == facts["ids"]
    assert torch.allclose(model.get_input_embeddings().weight[facts["ids"]].float(), wanted, rtol=1e-3, atol=1e-3)
    (table,) = (one for one in GGUFReader(out / "gguf" / "model.gguf").tensors if one.name == "token_embd.weight")
    assert np.array_equal(table.data[facts["ids"]], wanted.numpy())


def kept_version(kept):
    return json.loads((kept / "finished" / "run.json").read_text(encoding="utf-8"))["versions"]["softprompt"]


# ---- what a newer version wrote ------------------------------------------------------------------------------------


def newer(file, first=False):
    """Makes a file say that its format is one that nobody knows yet; of a file of lines, the first."""
    head, _, rest = file.read_text(encoding="utf-8").partition("\n") if first else (file.read_text(encoding="utf-8"), "", "")
    values = json.loads(head)
    assert values["format"] == 1
    file.write_text(json.dumps({**values, "format": 2, "unknown": 1}) + "\n" + rest, encoding="utf-8", newline="\n")


SAID = "is of a newer softprompt .its format is 2, this one reads 1.: pip install --upgrade softprompt"


def test_a_prompt_of_a_newer_version_is_said(kept, base):
    newer(kept / "finished" / "prompt" / "card.json")
    with pytest.raises(ArtifactError, match=rf"card\.json {SAID}"):
        load_prompt(kept / "finished", base)


def test_a_run_of_a_newer_version_is_said(kept, softprompt):
    newer(kept / "stopped" / "run.json")
    with pytest.raises(RunError, match=SAID):
        RunFolder.reopen(kept / "stopped")
    with pytest.raises(RunError, match=SAID):
        write_report([kept / "stopped"], None)
    with pytest.raises(AssertionError, match=SAID):
        softprompt("train", "--resume", kept / "stopped")


@pytest.mark.parametrize("name", ["evaluation.json", "predictions.jsonl"])
def test_an_evaluation_of_a_newer_version_is_said(kept, softprompt, name):
    (folder,) = (kept / "finished" / "evaluations").iterdir()
    newer(folder / name, first=name == "predictions.jsonl")
    if name == "evaluation.json":
        with pytest.raises(RunError, match=SAID):
            write_report([kept / "finished"], None)
    else:
        with pytest.raises(AssertionError, match=SAID):
            softprompt(*evaluated(kept))


def test_answers_of_a_newer_version_are_said(kept):
    from softprompt.answering import check_out

    newer(kept / "answers" / "half.jsonl.settings.json")
    with pytest.raises(ConfigError, match=SAID):
        check_out(kept / "answers" / "half.jsonl", resume=True)
