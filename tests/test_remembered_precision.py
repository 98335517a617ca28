"""The precision is part of a run and of its prompts: what goes on with them computes in it, whatever "auto" would mean there."""

import asyncio
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_cli import run  # noqa: F401
from test_moved import VERBS as MOVED
from test_run import events_of, rows_of

import softprompt
from softprompt.artifact import load_prompt, read_card, write_prompt
from softprompt.card import model_card
from softprompt.config import ModelConfig, load_config
from softprompt.engine.loading import load_base, load_dtype
from softprompt.errors import RunError
from softprompt.recycle import move
from softprompt.runlog import RunFolder
from softprompt.training import train

QUESTIONS = [f"{verb} {drink}" for verb in ("bring", "kindly bring", "please fetch", "no") for drink in ("tea", "milk", "水", "juice")]
VERBS = {**MOVED, "chat": ["chat", "{run}"]}
OTHERWISE = "a prompt trained in {} is used in {} and may answer otherwise: model.dtype={} {}"
SLOW = "would be slow, for this machine does not multiply in {}"
AS_IN_TRAINING = "would compute as in training"
SAYING = """
import sys, torch
for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
    setattr(torch.cpu, name, lambda: {says})
from softprompt.cli import main
sys.argv = ["softprompt", *sys.argv[1:]]
main()
"""


def tell(patch: pytest.MonkeyPatch, says: bool) -> None:
    """Whether the processor multiplies in bfloat16, by its own account; the tests' own has none of it."""
    patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: says)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Runs named by what "auto" was to them, with the base and the rows that they had."""
    home = tmp_path_factory.mktemp("home")
    tiny.tiny_folder(home / "base")
    for name, limit in (("train", 12), ("eval", 5)):
        tiny.write_rows(home / f"{name}.jsonl", tiny.some_rows(limit))
    for dtype in ("float32", "bfloat16"):
        with pytest.MonkeyPatch.context() as patch:
            tell(patch, dtype == "bfloat16")
            list(train(settings(home, home / dtype)))
    return home


def settings(home: Path, out: Path, *own: str) -> softprompt.Config:
    return load_config(None, [
        f"model.name={home / 'base'}", "model.device=cpu", f"data.train={home / 'train.jsonl'}", f"data.eval={home / 'eval.jsonl'}",
        "prompt.text=Repeat.", "train.steps=6", "train.save_every=2", "train.examples_per_step=4", f"train.out={out}", *own,
    ])  # fmt: skip


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """The precision of every base that is loaded."""
    found, freeze = [], softprompt.engine.loading.freeze

    def seen(*given):
        base = freeze(*given)
        found.append(base.precision)
        return base

    monkeypatch.setattr("softprompt.engine.loading.freeze", seen)
    return found


def child(says: bool, *words: object) -> str:
    """Standard error of the command line in a process of its own, on a processor that says so."""
    command = [sys.executable, "-c", SAYING.format(says=says), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(softprompt.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_run_and_card_say_what_auto_was(home):
    for dtype in ("float32", "bfloat16"):
        card = read_card(home / dtype)
        assert RunFolder.reopen(home / dtype).config().model.dtype == card.base.dtype == card.model_config_of_base.dtype == dtype
        for checkpoint in (home / dtype / "checkpoints").iterdir():
            assert read_card(checkpoint).base.dtype == dtype
        shown = (home / dtype / "prompt" / "README.md").read_text(encoding="utf-8")
        assert f"| precision of the base | {dtype} |\n" in shown
        assert f'["model.name=BASE", "model.dtype={dtype}"]' in shown
    assert not torch.equal(rows_of(home / "float32"), rows_of(home / "bfloat16"))


def test_a_prompt_answers_as_where_it_was_trained(home, tmp_path, monkeypatch):
    base = load_base(ModelConfig(name=str(home / "base"), device="cpu"))
    assert base.precision == "float32"
    ours = softprompt.generate(base, load_prompt(home / "float32", base), QUESTIONS, softprompt.Sampling(24))
    (tmp_path / "texts.txt").write_text("\n".join(QUESTIONS), encoding="utf-8")
    said = {}
    for name, own in (("as trained", ()), ("as the machine likes", ("model.dtype=auto",))):
        out = tmp_path / f"{name}.jsonl"
        words = ("--in", tmp_path / "texts.txt", "--out", out, "--max-new-tokens", 24, "model.device=cpu", *own)
        error = child(True, "generate", home / "float32", *words)
        said[name] = [json.loads(line)["answer"] for line in out.read_text(encoding="utf-8").splitlines()]
        line = f"{OTHERWISE.format('float32', 'bfloat16', 'float32', AS_IN_TRAINING)}\n"
        assert error.count("may answer otherwise") == error.count(line) == (name != "as trained"), error
    assert said["as trained"] == ours
    assert said["as the machine likes"] != ours, "the case is one where the precision matters"


CASES = {  # trained in, whether the processor multiplies in bfloat16, what the command says, used in, what is told of it
    "float32 stays": ("float32", True, (), "float32", None),
    "bfloat16 stays": ("bfloat16", True, (), "bfloat16", None),
    "the machine has none": ("bfloat16", False, (), "float32", SLOW),
    "a setting": ("float32", True, ("model.dtype=bfloat16",), "bfloat16", AS_IN_TRAINING),
    "slow on demand": ("bfloat16", False, ("model.dtype=bfloat16",), "bfloat16", None),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", CASES)
def test_every_verb_computes_as_in_training(run, home, loaded, tmp_path, monkeypatch, caplog, verb, case):  # noqa: F811
    trained_in, says, own, used_in, why = CASES[case]
    tell(monkeypatch, says)
    monkeypatch.setattr(sys, "stdin", io.StringIO("bring tea\n"))
    words = [word.format(run=home / trained_in, out=tmp_path / "out") for word in VERBS[verb]]
    assert run(*words, "model.device=cpu", *own)[0] == 0
    assert set(loaded) == {used_in}
    assert caplog.messages == ([] if why is None else [OTHERWISE.format(trained_in, used_in, trained_in, why.format(trained_in))])


def test_a_server_computes_so_too(home, monkeypatch, caplog):
    from softprompt.cli.serving import _Own, _Served

    tell(monkeypatch, True)
    served = _Served.of([str(home / "float32"), f"half={home / 'bfloat16'}", "model.device=cpu"], None)
    engine = asyncio.run(served.by_own(_Own({}, None, None, False), "own"))
    assert engine.base.precision == "float32"
    assert caplog.messages == [OTHERWISE.format("bfloat16", "float32", "bfloat16", AS_IN_TRAINING)], "of the second"


def test_the_harness_computes_so_too(home, monkeypatch):
    pytest.importorskip("lm_eval")
    from softprompt.harness import SoftPromptLM

    tell(monkeypatch, True)
    assert SoftPromptLM(str(home / "float32"), device="cpu").base.precision == "float32"
    assert SoftPromptLM(str(home / "bfloat16"), device="cpu").base.precision == "bfloat16"


@pytest.mark.parametrize("given", ["command line", "Python"])
def test_a_run_goes_on_in_the_precision_that_it_began_in(home, tmp_path, monkeypatch, given):
    with pytest.MonkeyPatch.context() as patch:
        tell(patch, True)
        tiny.stop_after(settings(home, tmp_path / "run"), 5)
    assert load_dtype(ModelConfig(device="cpu")) == torch.float32
    if given == "command line":
        error = child(False, "train", "--resume", tmp_path / "run")
        assert error == f"{tmp_path / 'run'} goes on in bfloat16, as it began: this machine does not multiply in it and is slow\n"
    else:  # with the configuration of then, which leaves it open
        events = list(train(settings(home, tmp_path / "run"), resume=True))
        assert events[0].first_step == 4
    assert torch.equal(rows_of(tmp_path / "run"), rows_of(home / "bfloat16"))
    assert events_of(tmp_path / "run") == events_of(home / "bfloat16")
    assert read_card(tmp_path / "run").base.dtype == "bfloat16"


def test_another_precision_does_not_go_on(home, tmp_path):
    tiny.stop_after(settings(home, tmp_path / "run"), 3)
    half = load_base(ModelConfig(name=str(home / "base"), device="cpu", dtype="bfloat16"))
    for config, base in ((settings(home, tmp_path / "run", "model.dtype=bfloat16"), None), (settings(home, tmp_path / "run"), half)):
        with pytest.raises(RunError, match="began in float32, and the base is asked for in bfloat16: it must be the same to resume"):
            list(train(config, resume=True, base=base))


def test_a_base_that_is_given_decides(home, tmp_path):
    half = load_base(ModelConfig(name=str(home / "base"), device="cpu", dtype="bfloat16"))
    list(train(settings(home, tmp_path / "run"), base=half))
    assert RunFolder.reopen(tmp_path / "run").config().model.dtype == read_card(tmp_path / "run").base.dtype == "bfloat16"


def test_a_study_is_kept_with_the_precision_that_it_was_made_in(home, tmp_path):
    events = train(settings(home, tmp_path / "run", "distil.text=Bring what is asked for.", "prompt.init=random", "prompt.length=4"))
    next(event for event in events if type(event).__name__ == "Studying")
    events.close()
    assert not (tmp_path / "run" / "data.json").exists()
    assert RunFolder.reopen(tmp_path / "run").config().model.dtype == "float32"


def test_what_has_not_noted_its_precision_goes_on_as_ever(home, tmp_path, monkeypatch, caplog):
    """As folders of before."""
    tiny.stop_after(settings(home, tmp_path / "run"), 3)
    file = tmp_path / "run" / "config.toml"
    file.write_text(file.read_text(encoding="utf-8").replace('dtype = "float32"', 'dtype = "auto"'), encoding="utf-8")
    tell(monkeypatch, True)
    list(train(RunFolder.reopen(tmp_path / "run").config(), resume=True))
    assert RunFolder.reopen(tmp_path / "run").config().model.dtype == read_card(tmp_path / "run").base.dtype == "bfloat16"
    card = read_card(home / "float32")
    old = card.model_copy(update={"base": card.base.model_copy(update={"dtype": "auto"})})
    base = load_base(old.base_here(["model.device=cpu"]))
    assert base.precision == "bfloat16"
    (tmp_path / "old").mkdir()
    write_prompt(tmp_path / "old", load_prompt(home / "float32", base).soft, old, base)
    caplog.clear()
    load_prompt(tmp_path / "old", base)
    assert not caplog.messages
    assert "precision" not in model_card(old)


def test_recycling_measures_in_the_precision_of_the_training(home, loaded, tmp_path, monkeypatch):
    tiny.tiny_folder(tmp_path / "other", seed=1)
    moved = move(home / "bfloat16", [f"model.name={tmp_path / 'other'}", "model.device=cpu"])
    assert loaded == ["float32", "float32"], "this machine multiplies in no other"
    moved.write(tmp_path / "moved")
    assert read_card(tmp_path / "moved").base.dtype == "bfloat16", "it was trained in"
    del loaded[:]
    half = move(home / "bfloat16", ["model.dtype=float32"])
    assert loaded == ["bfloat16", "float32"], "which is to be compared"
    half.write(tmp_path / "half")
    assert read_card(tmp_path / "half").base.dtype == "float32"
