"""The prompt folder: what its card says, what is refused, and that it loads from wherever it lies."""

import json
import math
import shutil
from pathlib import Path

import peft
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file

from softprompt.artifact import load_prompt, read_card
from softprompt.card import LICENCE_NOTE
from softprompt.config import ModelConfig, load_config
from softprompt.engine.loading import load_base
from softprompt.errors import ArtifactError
from softprompt.training import train

TEXT = "Repeat the drink."
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, bases) -> Path:
    """A finished run of two steps."""
    home = tmp_path_factory.mktemp("trained")
    tiny.write_rows(home / "train.jsonl", tiny.some_rows(24))
    tiny.write_rows(home / "eval.jsonl", tiny.some_rows(7))
    settings = [
        f"model.name={bases().name}", "model.device=cpu", f"data.train={home / 'train.jsonl'}", f"data.eval={home / 'eval.jsonl'}",
        f"prompt.text={TEXT}", "optim.lr=0.05", "train.steps=2", "train.seed=3", f"train.out={home / 'run'}",
    ]  # fmt: skip
    list(train(load_config(None, settings), base=bases()))
    return home / "run"


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A copy of the prompt folder to spoil."""
    return Path(shutil.copytree(trained / "prompt", tmp_path / "prompt"))


def change_card(folder: Path, **changes) -> None:
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | changes))


def test_the_card_names_the_base_and_its_tokenizer(trained, bases):
    base, card = bases(), read_card(trained)
    assert (card.base.name, card.base.model_type, card.base.hidden_size) == (base.name, "llama", 32)
    assert card.base.fingerprint == base.fingerprint
    assert card.base.tokenizer_fingerprint == base.tokenizer_fingerprint


def test_the_card_says_how_texts_are_rendered(trained):
    card = read_card(trained)
    assert (card.template, card.position, card.bos_id, card.max_length) == ("human-assistant", "start", tiny.BOS, 256)
    assert (card.text, card.num_virtual_tokens) == (TEXT, len(TEXT))


def test_the_card_says_what_was_learnt_from(trained):
    data = read_card(trained).data
    assert (data.train, data.num_train, data.num_eval) == ("train.jsonl", 24, 7)
    assert len(data.train_fingerprint) == len(data.eval_fingerprint) == 64
    assert data.train_fingerprint != data.eval_fingerprint


def test_the_card_keeps_metrics_versions_seed_and_licence_note(trained):
    card = read_card(trained)
    assert card.metrics["steps"] == 2
    assert all(math.isfinite(card.metrics[key]) for key in ("eval_loss_before", "eval_loss"))
    assert {"softprompt", "torch", "transformers", "peft", "tokenizers"} <= set(card.versions)
    assert (card.seed, card.licence_note) == (3, LICENCE_NOTE)


def test_the_readme_is_a_model_card_with_yaml_front_matter(trained):
    readme = (trained / "prompt" / "README.md").read_text()
    front = yaml.safe_load(readme.split("---\n")[1])
    assert front == {"library_name": "peft", "tags": ["prompt-tuning", "soft-prompt", "softprompt"], "pipeline_tag": "text-generation"}
    assert LICENCE_NOTE in readme


def test_the_lines_of_the_card_answer_without_peft(trained, bases):
    block = (trained / "prompt" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    ours, peft_s = block.split("\n\n")
    assert "peft" not in ours
    assert peft_s.startswith("from peft import")
    found = {}
    exec(ours.replace("BASE", bases().name).replace("THIS_FOLDER", str(trained / "prompt")), found)
    assert [type(text) for text in found["answers"]] == [str]


def test_the_folder_names_no_place_of_the_training_rows(trained):
    for file in (trained / "prompt").glob("*.*"):
        assert str(trained.parent / "train.jsonl").encode() not in file.read_bytes()


def test_run_prompt_and_checkpoint_folders_load_the_same(trained, bases):
    folders = [trained, trained / "prompt", trained / "checkpoints" / "step-000002"]
    rows = [load_prompt(folder, bases()).soft.rows_PH for folder in folders]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_a_moved_run_still_loads(trained, bases, tmp_path):
    moved = shutil.move(shutil.copytree(trained, tmp_path / "here"), tmp_path / "there")
    assert torch.equal(load_prompt(moved, bases()).soft.rows_PH, load_prompt(trained, bases()).soft.rows_PH)


def test_a_run_that_has_not_finished_is_told_apart(trained, bases, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("prompt")))
    with pytest.raises(ArtifactError, match="has not finished"):
        load_prompt(run, bases())


def test_another_base_is_refused_unless_allowed(trained, bases):
    other = bases(seed=1)
    with pytest.raises(ArtifactError, match=r"weights differ.*--allow-other-base"):
        load_prompt(trained, other)
    assert load_prompt(trained, other, allow_other_base=True).soft.length == len(TEXT)


def test_another_width_is_refused_even_when_another_base_is_allowed(trained, bases):
    with pytest.raises(ArtifactError, match=r"rows of 32 numbers.*needs 64"):
        load_prompt(trained, bases(hidden_size=64), allow_other_base=True)


def test_another_vocabulary_is_refused_unless_allowed(trained, tmp_path):
    folder = tiny.tiny_folder(tmp_path / "base")
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    base = load_base(ModelConfig(name=str(folder), device="cpu"))
    with pytest.raises(ArtifactError, match="another tokenizer"):
        load_prompt(trained, base)
    assert load_prompt(trained, base, allow_other_base=True).soft.length == len(TEXT)


def test_a_tokenizer_that_adds_no_bos_is_another_one(trained, bases):
    base = bases(adds_bos=False)
    with pytest.raises(ArtifactError, match="BOS"):
        load_prompt(trained, base)
    assert load_prompt(trained, base, allow_other_base=True).soft.length == len(TEXT)


def replaced(change):
    return lambda file: save_file(change(load_file(file)), file)


def with_nan(tensors):
    tensors["prompt_embeddings"][4] = math.nan
    return tensors


SPOILED = {
    "too few rows": (replaced(lambda t: {k: v[:-1].contiguous() for k, v in t.items()}), "its card says"),
    "too narrow rows": (replaced(lambda t: {k: v[:, :-1].contiguous() for k, v in t.items()}), "its card says"),
    "whole numbers": (replaced(lambda t: {k: v.long() for k, v in t.items()}), "its card says"),
    "a row of NaN": (replaced(with_nan), "not finite"),
    "an extra tensor": (replaced(lambda t: t | {"extra": torch.zeros(1)}), "must hold one tensor"),
    "another name": (replaced(lambda t: {"other": t["prompt_embeddings"]}), "must hold one tensor"),
    "cut off": (lambda file: file.write_bytes(file.read_bytes()[:-100]), "is damaged"),
    "no safetensors": (lambda file: file.write_bytes(b"\x80\x04 this is a pickle"), "is damaged"),
    "empty": (lambda file: file.write_bytes(b""), "is damaged"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_spoiled_rows_are_refused(folder, bases, kind):
    spoil, reason = SPOILED[kind]
    spoil(folder / WEIGHTS)
    with pytest.raises(ArtifactError, match=reason):
        load_prompt(folder, bases(), allow_other_base=True)


@pytest.mark.parametrize("content", ["not JSON", "", "[]", "{}", '{"format": "2"}', '{"base": null}'])
def test_a_damaged_card_is_refused(folder, bases, content):
    (folder / "card.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"card\.json is damaged"):
        load_prompt(folder, bases())


def test_a_card_that_is_not_text_is_refused(folder, bases):
    (folder / "card.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match=r"card\.json is damaged"):
        load_prompt(folder, bases())


def test_a_missing_folder_is_refused(bases, tmp_path):
    with pytest.raises(ArtifactError, match="no prompt here"):
        load_prompt(tmp_path / "nothing", bases())


def test_a_pickle_is_never_read(folder, bases):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors is missing"):
        load_prompt(folder, bases())


def test_a_peft_adapter_without_a_card_is_refused(folder, tmp_path):
    base = tiny.tiny_base(tmp_path / "base")
    peft.PeftModel.from_pretrained(base.model, folder).save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / WEIGHTS).is_file()
    with pytest.raises(ArtifactError, match=r"no card\.json: it was not written by softprompt"):
        load_prompt(tmp_path / "adapter", base)


def test_a_card_cannot_switch_remote_code_on(folder, bases):
    base = json.loads((folder / "card.json").read_text())["base"]
    change_card(folder, base=base | {"trust_remote_code": True}, trust_remote_code=True)
    assert read_card(folder).model_config_of_base.trust_remote_code is False
    assert load_prompt(folder, bases()).soft.length == len(TEXT)
