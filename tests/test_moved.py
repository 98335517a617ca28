"""A base that was moved or renamed since the training: every verb is told where it lies, and its weights decide whether it is the one."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from test_cli import refused, run  # noqa: F401
from test_house import strange_base
from test_run import rows_of

from softprompt.artifact import read_card
from softprompt.config import ModelConfig, load_config
from softprompt.engine.loading import load_base
from softprompt.errors import ModelError, RunError
from softprompt.locations import relocated
from softprompt.runlog import RunFolder
from softprompt.training import train


@pytest.fixture(scope="module")
def home(tmp_path_factory, bases) -> Path:
    """A finished run whose base has moved from `base` to `moved`; `other` has other weights, `stopped` was stopped after a checkpoint
    and `begun` before the first."""
    home = tmp_path_factory.mktemp("home")
    tiny.tiny_folder(home / "base")
    tiny.tiny_folder(home / "other", seed=5)
    for name, limit in (("train", 12), ("eval", 5)):
        tiny.write_rows(home / f"{name}.jsonl", tiny.some_rows(limit))
    for name, last in (("run", None), ("stopped", 3), ("begun", 1)):
        config = load_config(None, [
            f"model.name={home / 'base'}", "model.device=cpu", f"data.train={home / 'train.jsonl'}", f"data.eval={home / 'eval.jsonl'}",
            "prompt.text=Repeat.", "train.steps=4", "train.save_every=2", "train.examples_per_step=4", f"train.out={home / name}",
        ])  # fmt: skip
        list(train(config)) if last is None else tiny.stop_after(config, last)
    (home / "base").rename(home / "moved")
    return home


VERBS = {
    "eval": ["eval", "{run}"],
    "generate": ["generate", "{run}", "bring tea"],
    "inspect": ["inspect", "{run}"],
    "prune": ["prune", "{run}", "--keep", "3", "--out", "{out}"],
    "export": ["export", "{run}", "--to", "vocab", "--out", "{out}"],
    "doctor": ["doctor", "{run}"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_told_where_the_base_lies(run, refused, home, tmp_path, verb):  # noqa: F811
    words = [word.format(run=home / "run", out=tmp_path / "out") for word in VERBS[verb]]
    assert f"{home / 'base'}: no such model folder; if the base was moved, model.name=FOLDER says where it lies" in refused(*words)
    assert "whose weights differ" in refused(*words, f"model.name={home / 'other'}")
    code, _, error = run(*words, f"model.name={home / 'moved'}", "--json", tmp_path / "result.json")
    assert (code, error) == (0, "")
    assert json.loads((tmp_path / "result.json").read_text())


def test_recycle_of_a_base_that_only_moved_writes_its_new_place(run, home, tmp_path):  # noqa: F811
    code, _, _ = run("recycle", home / "run", f"model.name={home / 'moved'}", "--out", tmp_path / "out", "--json", tmp_path / "result.json")
    found = json.loads((tmp_path / "result.json").read_text())
    assert (code, found["steps"], found["loss_old_base"]) == (0, 0, found["loss_new_base"])
    assert read_card(tmp_path / "out").base.name == str(home / "moved")


def test_the_harness_is_told_too(home):
    pytest.importorskip("lm_eval")
    from softprompt.harness import SoftPromptLM

    place = {"model.name": str(home / "moved")}
    assert SoftPromptLM(str(home / "run"), device="cpu", **place).base.name == str(home / "moved")
    assert SoftPromptLM(str(home / "run"), dtype="bfloat16", **place, **{"model.trust_remote_code": True}).base.dtype == torch.bfloat16


@pytest.mark.parametrize("stopped", ["stopped", "begun"])
def test_a_run_goes_on_with_its_base_in_another_place(run, refused, home, tmp_path, stopped):  # noqa: F811
    folder = Path(shutil.copytree(home / stopped, tmp_path / "again"))
    assert "no such model folder" in refused("train", "--resume", folder)
    assert "has other weights than when" in refused("train", "--resume", folder, f"model.name={home / 'other'}")
    assert RunFolder.reopen(folder).config().model.name == str(home / "base")
    assert run("train", "--resume", folder, f"model.name={home / 'moved'}")[0] == 0
    assert torch.equal(rows_of(folder), rows_of(home / "run"))
    assert RunFolder.reopen(folder).config().model.name == read_card(folder).base.name == str(home / "moved")
    assert run("doctor", folder)[0] == 0


def test_another_tokenizer_does_not_go_on(home, tmp_path):
    folder, base = Path(shutil.copytree(home / "stopped", tmp_path / "again")), Path(shutil.copytree(home / "moved", tmp_path / "base"))
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_tokens(["tea"])
    tokenizer.save_pretrained(base)
    config = RunFolder.reopen(folder).config()
    with pytest.raises(RunError, match="another tokenizer than when"):
        list(train(config.model_copy(update={"model": config.model.model_copy(update={"name": str(base)})}), resume=True))


@pytest.mark.parametrize("setting", ["model.dtype=bfloat16", "model.device=cpu", "model.quantization=int8", "train.steps=9", "some.toml"])
def test_nothing_that_changes_bits_can_be_said_to_a_resumed_run(refused, home, setting):  # noqa: F811
    told = refused("train", "--resume", home / "stopped", setting)
    assert "but for model.name, model.gguf_file, model.revision, model.trust_remote_code: leave out " + setting in told


def test_a_new_place_forgets_the_old_one_and_keeps_the_rest(tmp_path):
    (tmp_path / "file.gguf").touch()
    old = ModelConfig(name="owner/name", revision="v1", quantization="int8", dtype="float16")
    assert relocated(old, ["model.name=here"]) == ModelConfig(name="here", quantization="int8", dtype="float16")
    assert relocated(old, ["model.device=cpu", "data.limit=3"]) == old.model_copy(update={"device": "cpu"})
    packed = ModelConfig(name="owner/name", gguf_file="file.gguf")
    assert relocated(packed, [f"model.name={tmp_path}"]).location == (str(tmp_path), "file.gguf")
    assert relocated(packed, ["model.name=other/name"]).location == ("other/name", "file.gguf")
    assert relocated(packed, [f"model.name={tmp_path / 'file.gguf'}"]).location == (str(tmp_path), "file.gguf")
    assert relocated(packed, [f"model.gguf_file={tmp_path / 'file.gguf'}"]).location == (str(tmp_path), "file.gguf")
    assert relocated(packed, ["model.gguf_file=other.gguf"]).location == ("owner/name", "other.gguf")


def test_code_of_a_base_is_run_from_the_command_line_alone(run, refused, make_config, tmp_path):  # noqa: F811
    base = strange_base(tmp_path / "strange")
    config = make_config(f"model.name={base}", "model.trust_remote_code=true", "train.steps=2", "train.save_every=1")
    tiny.stop_after(config, 2)
    folder, allow = tmp_path / "run", "model.trust_remote_code=true"
    comes = f"{base} comes with code of its own: read it, then allow it on the command line with {allow}"
    assert comes in refused("train", "--resume", folder)
    assert run("train", "--resume", folder, allow)[0] == 0
    for verb, words in VERBS.items():
        own = [word.format(run=folder, out=tmp_path / verb) for word in words]
        assert comes in refused(*own)
        code, _, error = run(*own, allow)
        assert (code, error) == (0, ""), verb
    with pytest.raises(ModelError, match="comes with code of its own"):
        load_base(ModelConfig(name=str(base)))
