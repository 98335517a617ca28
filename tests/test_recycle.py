"""A prompt on another variant of its base: what it has lost is what an evaluation says, and a short training wins it back."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from test_cli import refused, run  # noqa: F401 - fixtures
from transformers import AutoModelForCausalLM

from softprompt.artifact import load_prompt, read_card
from softprompt.config import ModelConfig, load_config
from softprompt.data import load_examples
from softprompt.engine.loading import load_base
from softprompt.evaluation import evaluate
from softprompt.recycle import _other
from softprompt.training import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory, bases) -> Path:
    """A run that has learned something; beside it its rows and its base."""
    home = tmp_path_factory.mktemp("trained")
    return learn(home, tiny.tiny_folder(home / "base"))


@pytest.fixture(scope="module")
def behind(tmp_path_factory) -> Path:
    """The same with the prompt behind BOS."""
    home = tmp_path_factory.mktemp("behind")
    return learn(home, tiny.tiny_folder(home / "base"), "prompt.position=after_bos")


def learn(home: Path, base: Path, *overrides: str) -> Path:
    tiny.write_rows(home / "train.jsonl", tiny.some_rows(24))
    tiny.write_rows(home / "eval.jsonl", tiny.some_rows(7))
    settings = [
        f"model.name={base}", "model.device=cpu", f"data.train={home / 'train.jsonl'}", f"data.eval={home / 'eval.jsonl'}",
        "prompt.length=6", "prompt.init=random", "train.steps=30", "train.examples_per_step=6", f"train.out={home / 'run'}",
    ]  # fmt: skip
    *_, finished = train(load_config(None, [*settings, *overrides]))
    assert finished.result["eval_loss_after"] < finished.result["eval_loss_before"] - 0.3
    return home / "run"


def variant(trained: Path, place: Path, change: float) -> Path:
    """The run's base as someone fine-tuned it: every weight moved by `change` of its own spread."""
    generator = torch.Generator().manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(trained.parent / "base")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight += change * weight.std() * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(place)
    tiny.tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture
def recycled(run, tmp_path):  # noqa: F811
    """recycled(prompt, ...) -> (what --json says, what the screen says); written to tmp_path / "recycled"."""

    def call(prompt: Path, *words: object) -> tuple[dict, str]:
        report = tmp_path / "report.json"
        code, shown, error = run("recycle", prompt, "--out", tmp_path / "recycled", "--json", report, *words)
        assert (code, error) == (0, "")
        return json.loads(report.read_text()), shown

    return call


def loss_on(base: Path, prompt: Path, rows: Path, contestant: str = "prompt") -> float:
    """What an evaluation says."""
    loaded = load_base(ModelConfig(name=str(base), device="cpu"))
    stored = load_prompt(prompt, loaded, allow_other_base=True)
    return evaluate(loaded, stored, load_examples(str(rows))).contestants[contestant]["loss"]


def test_a_prompt_that_has_lost_is_trained_back(trained, recycled, tmp_path):
    other, rows = variant(trained, tmp_path / "other", 0.3), trained.parent / "eval.jsonl"
    found, shown = recycled(trained, f"model.name={other}")
    assert (found["prompt"], found["trained_on"], found["base"]) == (str(tmp_path / "recycled"), str(trained.parent / "base"), str(other))
    assert found["loss_old_base"] == pytest.approx(loss_on(trained.parent / "base", trained, rows), rel=1e-5)
    assert found["loss_new_base"] == pytest.approx(loss_on(other, trained, rows), rel=1e-5)
    assert found["bare_loss"] == pytest.approx(loss_on(other, trained, rows, "base"), rel=1e-5)
    assert found["loss_new_base"] > found["loss_old_base"] + 0.01
    assert found["loss_after"] < found["loss_new_base"] - 0.01
    assert (found["held_out_rows"], found["steps"]) == (7, 20)  # a quarter of 30 would be too few
    assert "more than 0.01: it is trained" in shown
    assert loss_on(other, tmp_path / "recycled", rows) == pytest.approx(found["loss_after"], rel=1e-5)
    result = json.loads((tmp_path / "recycled" / "result.json").read_text())
    assert result["eval_loss_before"] == pytest.approx(found["loss_new_base"], rel=1e-5)  # it began as the prompt that it was
    assert load_prompt(tmp_path / "recycled", load_base(ModelConfig(name=str(other), device="cpu"))).soft.length == 6


def test_what_is_trained_back_stands_where_it_stood(behind, recycled, tmp_path):
    found, _ = recycled(behind, f"model.name={variant(behind, tmp_path / 'other', 0.3)}")
    card = read_card(tmp_path / "recycled")
    assert (card.position, card.bos_id) == ("after_bos", tiny.BOS)
    assert found["steps"] == 20, "it was trained"


def test_a_prompt_that_has_lost_little_stays_and_is_bound_to_the_new_base(trained, recycled, tmp_path):
    other = variant(trained, tmp_path / "other", 1e-3)
    found, shown = recycled(trained, f"model.name={other}")
    assert found["steps"] == 0
    assert found["loss_after"] == found["loss_new_base"]
    assert 0 < abs(found["loss_new_base"] - found["loss_old_base"]) < 0.01
    assert "it stays as it is" in shown
    base = load_base(ModelConfig(name=str(other), device="cpu"))
    assert torch.equal(
        load_prompt(tmp_path / "recycled", base).soft.rows_PH, load_prompt(trained, base, allow_other_base=True).soft.rows_PH
    )
    card = read_card(tmp_path / "recycled")
    assert card.base.name == str(other)
    assert card.metrics["eval_loss"] == found["loss_new_base"]
    assert card.init.startswith("the rows of a prompt for base, which was started with: 6 virtual tokens")


def test_the_tolerance_decides(trained, recycled, tmp_path):
    found, _ = recycled(trained, f"model.name={variant(trained, tmp_path / 'other', 0.3)}", "--tolerance", "9")
    assert found["steps"] == 0


@pytest.mark.parametrize("change", ["model.dtype=bfloat16", "model.quantization=int8"])
def test_a_base_in_fewer_bits_is_another_one(trained, recycled, tmp_path, change):
    found, _ = recycled(trained, change, "model.dtype=float32" if "int8" in change else change, "--tolerance", "0.5")
    assert found["steps"] == 0
    assert 0 < abs(found["loss_new_base"] - found["loss_old_base"]) < 0.5
    assert read_card(tmp_path / "recycled").base.quantization == ("int8" if "int8" in change else None)


def test_a_fine_tuned_and_quantised_base_is_trained_on(trained, recycled, tmp_path):
    other = variant(trained, tmp_path / "other", 0.3)
    found, _ = recycled(trained, f"model.name={other}", "model.quantization=int8", "model.dtype=float32")
    assert found["loss_after"] < found["loss_new_base"] - 0.01
    assert read_card(tmp_path / "recycled").base.quantization == "int8"


def test_without_the_old_base_the_loss_of_the_run_is_compared(trained, recycled, tmp_path):
    copy = Path(shutil.copytree(trained.parent, tmp_path / "copy")) / "run"
    known = read_card(copy).metrics["eval_loss"]
    other = variant(trained, tmp_path / "other", 0.3)
    move_base(copy, tmp_path / "gone")
    found, _ = recycled(copy, f"model.name={other}")
    assert found["loss_old_base"] == known
    assert found["steps"] == 20


def move_base(run_folder: Path, place: Path) -> None:
    """The run and its prompt say that their base lies at `place`, where there is nothing."""
    card = run_folder / "prompt" / "card.json"
    old = json.loads(card.read_text())["base"]["name"]
    for file in (card, run_folder / "config.toml"):
        file.write_text(file.read_text().replace(old, str(place)))


def test_where_nobody_knows_what_it_has_lost_it_is_trained(trained, recycled, tmp_path):
    copy = Path(shutil.copytree(trained.parent, tmp_path / "copy")) / "run"
    other, rows = variant(trained, tmp_path / "other", 0.001), tiny.write_rows(tmp_path / "rows.jsonl", tiny.some_rows(9))
    move_base(copy, tmp_path / "gone")
    found, shown = recycled(copy, f"model.name={other}", "--data", rows, "train.steps=3")
    assert (found["loss_old_base"], found["steps"], found["held_out_rows"]) == (None, 3, 9)
    assert "the loss cannot be had" in shown
    assert "no such model folder; so it is trained" in shown


def test_a_base_named_anew_keeps_nothing_that_belonged_to_the_old_one():
    old = ModelConfig(name="old", gguf_file="old.gguf", revision="v1", dtype="float32", device="cpu", trust_remote_code=True)
    assert _other(old, ["model.name=new", "train.steps=3"]) == ModelConfig(name="new", dtype="float32", device="cpu")
    assert _other(old, ["model.quantization=int8"]) == old.model_copy(update={"quantization": "int8"})


def test_a_base_that_was_changed_in_its_place_is_another_one(trained, recycled, tmp_path):
    copy = Path(shutil.copytree(trained.parent, tmp_path / "copy"))
    move_base(copy / "run", copy / "base")
    variant(trained, copy / "base", 0.3)
    found, _ = recycled(copy / "run")
    assert found["loss_old_base"] == read_card(trained).metrics["eval_loss"]
    assert found["loss_after"] < found["loss_new_base"]


def test_another_tokenizer_is_trained_on(trained, recycled, tmp_path):
    other = variant(trained, tmp_path / "other", 1e-3)
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_tokens(["please"])
    tokenizer.save_pretrained(other)
    found, shown = recycled(trained, f"model.name={other}", "train.steps=2")
    assert (found["loss_old_base"], found["steps"]) == (None, 2)
    assert "another tokenizer makes other tokens" in shown


def test_a_base_whose_tokenizer_adds_no_bos_takes_the_prompt(trained, recycled, tmp_path):
    other = variant(trained, tmp_path / "other", 1e-3)
    tiny.tiny_tokenizer(adds_bos=False).save_pretrained(other)
    found, _ = recycled(trained, f"model.name={other}", "--tolerance", "99")
    assert found["steps"] == 0
    rows = trained.parent / "eval.jsonl"
    assert loss_on(other, tmp_path / "recycled", rows) == pytest.approx(found["loss_new_base"], rel=1e-5)


def test_a_prompt_away_from_its_run_needs_rows(trained, refused, recycled, tmp_path):  # noqa: F811
    prompt = Path(shutil.copytree(trained / "prompt", tmp_path / "prompt"))
    words = (prompt, f"model.name={variant(trained, tmp_path / 'other', 0.3)}", "model.device=cpu")
    assert "give --data FILE" in refused("recycle", *words, "--out", tmp_path / "recycled")
    held = ("--data", trained.parent / "eval.jsonl")
    assert "give data.train=FILE" in refused("recycle", *words, *held, "--out", tmp_path / "recycled")
    assert not (tmp_path / "recycled").exists()
    found, _ = recycled(*words, *held, f"data.train={trained.parent / 'train.jsonl'}", "train.steps=20")
    assert found["loss_after"] < found["loss_new_base"]


def test_one_prompt_of_a_bank_takes_its_own_settings(bases, recycled, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    bank = 'prompt.bank=[{name = "six"}, {name = "seven", prompt = {length = 7}, seed = 3}]'
    run_folder = learn(home, tiny.tiny_folder(home / "base"), bank)
    found, _ = recycled(run_folder / "prompts" / "seven", f"model.name={variant(run_folder, tmp_path / 'other', 0.3)}", "train.steps=3")
    assert found["steps"] == 3
    card = read_card(tmp_path / "recycled")
    assert (card.num_virtual_tokens, card.seed) == (7, 3)


def test_a_deep_prompt_moves_but_is_no_start(bases, refused, recycled, tmp_path):  # noqa: F811
    home = tmp_path / "home"
    home.mkdir()
    run_folder = learn(home, tiny.tiny_folder(home / "base"), "prompt.method=prefix")
    other = variant(run_folder, tmp_path / "other", 0.3)
    words = (run_folder, f"model.name={other}")
    assert "no rows for another prompt to start from" in refused("recycle", *words, "--out", tmp_path / "recycled")
    assert not (tmp_path / "recycled").exists()
    assert recycled(*words, "--tolerance", "99")[0]["steps"] == 0
    assert read_card(tmp_path / "recycled").base.name == str(other)


def test_bad_wishes_are_refused_in_a_sentence(trained, refused, tmp_path):  # noqa: F811
    out = tmp_path / "recycled"
    wide = tiny.tiny_folder(tmp_path / "wide", hidden_size=64)
    assert "rows of 32 numbers" in refused("recycle", trained, f"model.name={wide}", "--out", out)
    assert "is the base that" in refused("recycle", trained, "--out", out)
    assert "no such model folder" in refused("recycle", trained, f"model.name={tmp_path / 'nothing'}", "--out", out)
    assert not out.exists()
    out.mkdir()
    assert "exists: choose another folder" in refused("recycle", trained, f"model.name={wide}", "--out", out)
