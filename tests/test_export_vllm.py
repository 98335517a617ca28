"""Keys and values of prompts for vLLM: what its connector finds, and how a chat names a prompt. Over vLLM: test_other_engines.py."""

import json
import runpy
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from other_engines import some_prompt
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from softprompt import load_prompt
from softprompt.config import ModelConfig
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase
from softprompt.errors import ArtifactError, ModelError
from softprompt.export import Wanted, export
from softprompt.export.kv_folder import keys_and_values, text_of_name

LETTERS = "abcdefghijk"
TURNS = (
    "{% for m in messages %}{{ '<|turn|>' + m.role + ' ' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant ' }}{% endif %}"
)


def tokenizer_of_words() -> PreTrainedTokenizerFast:
    """Bytes, and all words of three letters: blank and first letter, then the second, then the third become one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Ġ" + "".join(word) for length in (1, 2, 3) for word in product(LETTERS, repeat=length)]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(word[:-1], word[-1]) for word in words]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|end|>"]})
    fast.chat_template = TURNS
    return fast


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    folder = tmp_path_factory.mktemp("words") / "base"
    tokenizer = tokenizer_of_words()
    tiny.tiny_folder(folder, "gemma3_text", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    return load_base(ModelConfig(name=str(folder), device="cpu"))


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "index.json").read_text(encoding="utf-8"))


def test_the_connector_finds_the_keys_and_values_of_both_kinds(base: FrozenBase, tmp_path: Path) -> None:
    folders = [some_prompt(tmp_path / "rows", base, 1, length=9), some_prompt(tmp_path / "deep", base, 2, length=8, deep=True)]
    out = tmp_path / "out"
    written = export(Wanted(folders, "vllm", out))
    assert sorted(index_of(out)) == sorted(Path(one["keys_and_values"]).stem for one in written["prompts"].values())
    for folder in folders:
        facts, prefix = written["prompts"][folder.name], load_prompt(folder, base).soft.prefix(base)
        found, wanted = load_file(out / facts["keys_and_values"]), keys_and_values(base, prefix)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert index_of(out)[Path(facts["keys_and_values"]).stem]["ids"] == facts["ids"]
        assert len(facts["ids"]) == prefix.lengths[0]
        assert facts["request"]["prompt"][: len(facts["ids"])] == facts["ids"]
        question = load_prompt(folder, base).encoder.question("Where is my parcel?")
        assert facts["request"]["prompt"][len(facts["ids"]) :] == list(question)
    assert "rows.safetensors" in {file.name for file in out.iterdir()}
    assert not {"index.lock", "deep.jinja"} & {file.name for file in out.iterdir()}
    assert "SoftPromptConnector" in (out / "softprompt_connector.py").read_text(encoding="utf-8")
    assert written["start"].startswith("PYTHONPATH=DIR vllm serve ")


def test_a_retrained_prompt_has_another_name(base: FrozenBase, tmp_path: Path) -> None:
    ids = []
    for seed in (1, 2, 1):
        folder = some_prompt(tmp_path / f"{len(ids)}" / "taste", base, seed, length=9)
        ids.append(tuple(export(Wanted([folder], "vllm", tmp_path / f"{len(ids)}" / "out"))["prompts"]["taste"]["ids"]))
    assert ids[0] == ids[2] != ids[1]


@pytest.mark.parametrize("template", ["chat", "human-assistant"])
def test_a_chat_names_a_prompt(base: FrozenBase, tmp_path: Path, template: str) -> None:
    how: dict[str, Any] = {"template": template, "length": 9}
    folders = [some_prompt(tmp_path / "rows", base, 1, **how), some_prompt(tmp_path / "deep", base, 2, deep=True, **how)]
    written = export(Wanted(folders, "vllm", tmp_path / "out"))
    file, turns = tmp_path / "out" / "chat.jinja", [{"role": "user", "content": "bring 水"}]
    if template == "human-assistant":  # whose first word might become one with the last of the name
        assert not file.exists()
        assert any("a chat cannot name these prompts" in note for note in written["notes"])
        return
    assert written["start"].endswith("--chat-template DIR/chat.jinja")
    for folder in folders:
        how = {"chat_template": file.read_text(encoding="utf-8"), "tokenize": False, "add_generation_prompt": True}
        text = base.tokenizer.apply_chat_template(turns, softprompt=folder.name, **how)
        ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == [*written["prompts"][folder.name]["ids"], *load_prompt(folder, base).encoder.question("bring 水")]


def test_bytes_are_no_names_for_a_chat(bases: Callable[..., FrozenBase], tmp_path: Path) -> None:
    base = bases(chat=True)
    folder = some_prompt(tmp_path / "taste", base, template="chat", length=12, deep=True)
    written = export(Wanted([folder], "vllm", tmp_path / "out"))
    assert any("a chat cannot name these prompts" in note for note in written["notes"])
    ids = written["prompts"]["taste"]["ids"]
    assert base.tokenizer(text_of_name(base.tokenizer, ids), add_special_tokens=False)["input_ids"] != ids


def test_rows_without_keys_and_values_are_written_as_rows(base: FrozenBase, bases: Callable[..., FrozenBase], tmp_path: Path) -> None:
    short = export(Wanted([some_prompt(tmp_path / "short", base, length=3)], "vllm", tmp_path / "a"))
    assert any(note.startswith("short as rows alone: a prompt of ") for note in short["notes"])
    assert "ids" not in short["prompts"]["short"]
    hybrid = bases("falcon_h1")
    kept = export(Wanted([some_prompt(tmp_path / "states", hybrid, length=12)], "vllm", tmp_path / "b"))
    assert any(note.startswith("states as rows alone: ") for note in kept["notes"])
    assert load_file(tmp_path / "b" / "states.safetensors")["rows"].shape[0] == 12
    with pytest.raises((ArtifactError, ModelError), match="cannot be told from text"):
        export(Wanted([some_prompt(tmp_path / "deep", base, length=3, deep=True)], "vllm", tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_the_module_is_the_connector_alone(base: FrozenBase, tmp_path: Path) -> None:
    """Without vLLM it cannot be loaded, and for no other reason."""
    export(Wanted([some_prompt(tmp_path / "taste", base, length=9)], "vllm", tmp_path / "out"))
    with pytest.raises(ModuleNotFoundError, match="No module named 'vllm'"):
        runpy.run_path(str(tmp_path / "out" / "softprompt_connector.py"))
