"""Prompts for MLX, without MLX: the file that mlx-lm reads, and the settings of folders in both spellings."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from other_engines import some_prompt
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, Gemma3TextConfig, LlamaConfig, Phi3Config

from softprompt import load_prompt
from softprompt.config import load_config
from softprompt.engine.model import FrozenBase
from softprompt.engine.unpack import keep_unpacked
from softprompt.errors import ArtifactError, ConfigError
from softprompt.export import Wanted, export, mlx
from softprompt.spellings import settings_in_both, tokenizer_in_both


@pytest.fixture(autouse=True)
def no_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the engine tests have installed it."""
    monkeypatch.setattr(mlx, "has", lambda package: False)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_prompt_cache_holds_the_keys_and_values(bases: Callable[..., FrozenBase], family: str, tmp_path: Path) -> None:
    base = bases(family, num_hidden_layers=7) if family == "gemma3_text" else bases(family)
    folders = [some_prompt(tmp_path / f"p{length}", base, length=length, position="start", deep=True) for length in (5, 20)]
    written = export(Wanted(folders, "mlx", tmp_path / "out"))
    for length, folder in zip((5, 20), folders, strict=True):
        layers = load_prompt(folder, base).soft.prefix(base).layers
        with safe_open(tmp_path / "out" / f"p{length}.safetensors", "pt") as file:
            told, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert told["0.model"] == base.name == written["prompts"][f"p{length}"]["model"]
        kinds = base.model.config.layer_types if family == "gemma3_text" else ["full_attention"] * len(layers)
        assert {"sliding_attention", "full_attention"} >= set(kinds)
        numbers = []
        for number, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
            kept = min(length + 1, 12) if kind == "sliding_attention" else length + 1
            for index, part in enumerate(("keys", "values")):
                assert torch.equal(tensors.pop(f"{number}.{index}"), layer.parts[part][:, :, -kept:])
            assert told[f"1.{number}"] == ("RotatingKVCache" if kind == "sliding_attention" else "KVCache")
            wanted = [length + 1, 0, 12, kept] if kind == "sliding_attention" else [length + 1]
            assert [int(tensors.pop(f"{number}.{index}")) for index in range(2, 2 + len(wanted))] == wanted
            numbers += [f"{number}.{index}" for index in range(2, 2 + len(wanted))]
        assert not tensors
        scalars = [(told[f"2.{index}.0"], told[f"2.{index}.1"]) for index in range(1, len(numbers) + 1)]
        assert scalars == [(name, "scalar") for name in numbers]
        assert set(told) == {"0.model", "0.tokenizer_config", "2.0", *(f"1.{n}" for n in range(len(layers)))} | {
            f"2.{index}.{part}" for index in range(1, len(numbers) + 1) for part in (0, 1)
        }


@pytest.mark.parametrize("template", ["human-assistant", "chat", "{{ prompt }} ->\n"])
def test_its_chat_template_writes_what_stands_behind_the_prompt(bases: Callable[..., FrozenBase], template: str, tmp_path: Path) -> None:
    """`mlx_lm.generate` cuts a chat's text where it finds "<query>" when that is the question."""
    base = bases(chat=True)
    folder = some_prompt(tmp_path / "taste", base, template=template, deep=True)
    export(Wanted([folder], "mlx", tmp_path / "out"))
    with safe_open(tmp_path / "out" / "taste.safetensors", "pt") as file:
        told = json.loads(file.metadata()["0.tokenizer_config"])
    tokenizer = AutoTokenizer.from_pretrained(base.name, **told)

    def written(question: str) -> str:
        return tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)

    text = written("bring 水")[written("<query>").index("<query>") :]
    assert tokenizer.encode(text, add_special_tokens=False) == list(load_prompt(folder, base).encoder.question("bring 水"))


def test_rows_become_a_folder_and_what_cannot_be_is_said(bases: Callable[..., FrozenBase], tmp_path: Path) -> None:
    base = bases()
    rows, deep = some_prompt(tmp_path / "rows", base), some_prompt(tmp_path / "deep", base, deep=True)
    written = export(Wanted([rows], "mlx", tmp_path / "out"))
    assert written["format"] == "mlx"
    assert written["notes"][-1] == mlx.UNTRIED
    assert (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(ConfigError, match=r"--to mlx: rows \(rows\) become a folder, keys and values files"):
        export(Wanted([deep, rows], "mlx", tmp_path / "both"))
    with pytest.raises(ArtifactError, match="softprompt and PEFT take those, and --to slots, vllm, mlx"):
        export(Wanted([deep], "vocab", tmp_path / "both"))
    assert not (tmp_path / "both").exists()


def test_a_base_that_says_things_in_one_spelling_is_named(bases: Callable[..., FrozenBase], tmp_path: Path) -> None:
    base = bases("llama", rope_parameters={"rope_theta": 5e4, "rope_type": "default"})
    written = export(Wanted([some_prompt(tmp_path / "deep", base, deep=True)], "mlx", tmp_path / "out"))
    note = f'{Path(base.name) / "config.json"} says things under names that mlx-lm does not read: add "rope_theta": 50000.0'
    assert note in written["notes"]


# ---- both spellings --------------------------------------------------------------------------------------------------

SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 3e4}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 2e4, "partial_rotary_factor": 1.0}


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (LlamaConfig(rope_parameters={"rope_theta": 1e5, "rope_type": "default"}), {"rope_theta": 1e5}),
        (LlamaConfig(rope_parameters=SCALED), {"rope_theta": 3e4, "factor": 4.0, "type": "yarn", "rope_type": "yarn"}),
        (Gemma3TextConfig(), {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}),
        (
            Phi3Config(hidden_size=32, num_attention_heads=4, rope_parameters=LONG),
            {"rope_theta": 2e4, "type": "longrope", "partial_rotary_factor": 1.0, "long_factor": [2.0] * 4},
        ),
    ],
)
def test_settings_are_read_from_either_spelling(settings: LlamaConfig, wanted: dict[str, object], tmp_path: Path) -> None:
    """transformers 5 reads the same from both, and from the older alone."""
    settings.dtype = "bfloat16"
    settings.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    before = json.loads(file.read_text())
    both = settings_in_both(before)
    assert {name: both.get(name, (both.get("rope_scaling") or {}).get(name)) for name in wanted} == wanted
    assert both["torch_dtype"] == "bfloat16"
    assert before.items() <= both.items()
    assert settings_in_both(both) == both
    for kept in (both, {name: value for name, value in both.items() if name != "rope_parameters"}):
        file.write_text(json.dumps(kept))
        again = AutoConfig.from_pretrained(tmp_path)
        for name, value in settings.rope_parameters.items():
            assert again.rope_parameters[name] == value or {**again.rope_parameters[name], **value} == again.rope_parameters[name]


def test_exported_and_unpacked_folders_carry_both(bases: Callable[..., FrozenBase], tmp_path: Path) -> None:
    base = bases(rope_parameters={"rope_theta": 5e4, "rope_type": "default"})
    export(Wanted([some_prompt(tmp_path / "rows", base)], "vocab", tmp_path / "out"))
    keep_unpacked(base.model, base.tokenizer, tmp_path / "unpacked")
    for folder in (tmp_path / "out", tmp_path / "unpacked"):
        settings = json.loads((folder / "config.json").read_text())
        assert (settings["rope_theta"], settings["rope_parameters"]["rope_theta"]) == (5e4, 5e4)
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert "extra_special_tokens" not in tokenizer
        assert type(AutoTokenizer.from_pretrained(folder)) is type(base.tokenizer)


def test_a_folder_in_the_older_spelling_gets_the_newer(tmp_path: Path) -> None:
    source = tiny.tiny_folder(tmp_path / "base")
    file = source / "config.json"
    old = {name: value for name, value in json.loads(file.read_text()).items() if name != "rope_parameters"} | {"rope_theta": 7e4}
    file.write_text(json.dumps(old))
    model = load_config(None, [f"model.name={source}", "model.device=cpu"]).model
    from softprompt.engine.loading import load_base

    base = load_base(model)
    export(Wanted([some_prompt(tmp_path / "rows", base)], "vocab", tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["rope_theta"], written["rope_parameters"]["rope_theta"]) == (7e4, 7e4)


def test_the_tokens_that_are_special_are_so_for_both(tmp_path: Path) -> None:
    both = tokenizer_in_both({"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|a|>"], "bos_token": "<s>"})
    assert both == {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<|a|>"], "bos_token": "<s>"}
    named = {"tokenizer_class": "GemmaTokenizer", "extra_special_tokens": {"image_token": "<image>"}}
    assert tokenizer_in_both(named) == named
