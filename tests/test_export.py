"""Prompts as entries of a vocabulary and as plain rows: what was written gives what we give, and nothing is half there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from gguf import GGMLQuantizationType
from other_engines import LENGTH, LlamaServer, our_answers, some_prompt, tiny_gguf
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from softprompt import load_prompt
from softprompt.cli import main
from softprompt.config import ModelConfig, load_config
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import SoftPrompt
from softprompt.errors import ArtifactError, ConfigError
from softprompt.export import Wanted, export

JINJA = "{% for turn in messages %}{{ turn.role }}> {{ turn.content }} {% endfor %}Q: {{ prompt }} A:"


def our_answer(base: FrozenBase, folder: Path, question: str) -> str:
    return our_answers(base, folder, [question], 12)[0]


def chat(tokenizer: Any, question: str, **how: str) -> torch.Tensor:
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True, **how)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_a_plain_model_answers_as_ours(bases: Callable[..., FrozenBase], family: str, tmp_path: Path) -> None:
    base = bases(family)
    folder = some_prompt(tmp_path / "taste", base)
    written = export(Wanted([folder], "vocab", tmp_path / "out"))
    assert written["checked"]["logits_relative_error"] < 1e-4
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert written["prompts"]["taste"]["tokens"] == [f"<|sp:taste:{index}|>" for index in range(LENGTH)]
    ids = chat(tokenizer, "bring 水")
    said = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    assert tokenizer.decode(said, skip_special_tokens=True) == our_answer(base, folder, "bring 水")


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_a_new_token_is_never_said(bases: Callable[..., FrozenBase], family: str, tmp_path: Path) -> None:
    base = bases(family)
    written = export(Wanted([some_prompt(tmp_path / "taste", base)], "vocab", tmp_path / "out"))
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = chat(tokenizer, "bring tea").expand(200, -1)
    torch.manual_seed(0)
    how = {"attention_mask": torch.ones_like(ids), "do_sample": True, "temperature": 2.0, "top_k": 0, "max_new_tokens": 20}
    said = model.generate(ids, **how, eos_token_id=None)[:, ids.shape[1] :]
    assert said.numel() == 4000
    assert not torch.isin(said, torch.tensor(written["prompts"]["taste"]["ids"])).any()
    logits = model(ids[:1]).logits[0]
    assert not torch.isin(logits.argmax(dim=1), torch.tensor(written["prompts"]["taste"]["ids"])).any()


# ---- a vocabulary --------------------------------------------------------------------------------------------------


@pytest.fixture
def several(bases: Callable[..., FrozenBase], tmp_path: Path) -> tuple[FrozenBase, dict[str, Path], Path]:
    """Prompts of every template and place on one base, in one folder."""
    base = bases(chat=True, vocab_size=259)  # every row has a token: all of them can be said by both
    prompts = {
        "plain": some_prompt(tmp_path / "plain", base, 1),
        "behind": some_prompt(tmp_path / "behind", base, 2, position="after_bos"),
        "chat": some_prompt(tmp_path / "chat", base, 3, template="chat"),
        "jinja": some_prompt(tmp_path / "runs" / "jinja" / "prompt", base, 4, template=JINJA),
    }
    export(Wanted([*list(prompts.values())[:3], tmp_path / "runs" / "jinja"], "vocab", tmp_path / "out"))
    return base, prompts, tmp_path / "out"


def test_prompts_of_one_file_are_chosen_by_name(several: tuple[FrozenBase, dict[str, Path], Path]) -> None:
    base, prompts, out = several
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    answers = set()
    for name, folder in prompts.items():
        ids = chat(tokenizer, "bring milk", softprompt=name)
        by_message = [{"role": "system", "content": f"softprompt: {name}"}, {"role": "user", "content": "bring milk"}]
        text = tokenizer.apply_chat_template(by_message, tokenize=False, add_generation_prompt=True)
        assert tokenizer(text, add_special_tokens=False).input_ids == ids[0].tolist()
        said = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
        assert tokenizer.decode(said, skip_special_tokens=True) == our_answer(base, folder, "bring milk")
        answers.add(tuple(said.tolist()))
    assert len(answers) == len(prompts), "two prompts answer alike: their choice was not tested"


def test_without_a_name_the_base_answers_as_before(several: tuple[FrozenBase, dict[str, Path], Path]) -> None:
    base, _, out = several
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    turns = [{"role": "system", "content": "kind"}, {"role": "user", "content": "bring milk"}]
    wanted = base.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == wanted
    ids = base.tokenizer(wanted, return_tensors="pt").input_ids
    assert torch.equal(tokenizer(wanted, return_tensors="pt").input_ids, ids)
    size = base.model.config.vocab_size
    spare = [token for token in range(size) if token < 3 + 256]
    assert torch.allclose(model(ids).logits[..., spare], base.model(ids).logits[..., spare], atol=1e-5)


def test_a_name_that_is_not_there_is_one_sentence(several: tuple[FrozenBase, dict[str, Path], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(several[2])
    with pytest.raises(Exception, match="there is no soft prompt taste; there are: plain, behind, chat, jinja"):
        chat(tokenizer, "bring milk", softprompt="taste")


def test_spare_rows_of_the_table_are_used_and_more_are_added(bases: Callable[..., FrozenBase], tmp_path: Path) -> None:
    base = bases()
    folders = [some_prompt(tmp_path / f"p{number}", base, number) for number in range(13)]
    assert len(base.tokenizer) == 259
    export(Wanted(folders[:12], "vocab", tmp_path / "twelve"))
    export(Wanted(folders, "vocab", tmp_path / "thirteen"))
    sizes = [json.loads((tmp_path / name / "config.json").read_text())["vocab_size"] for name in ("twelve", "thirteen")]
    assert sizes == [320, 259 + 13 * LENGTH]


def test_shards_stay_shards(bases: Callable[..., FrozenBase], tmp_path: Path) -> None:
    base = bases(tie_word_embeddings=True)
    base.model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    base.tokenizer.save_pretrained(tmp_path / "sharded")
    folder = some_prompt(tmp_path / "taste", base)
    before = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(before.values())) > 3
    config = load_config(None, [f"model.name={tmp_path / 'sharded'}"]).model
    written = export(Wanted([folder], "vocab", tmp_path / "out"), config)
    after = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: file for name, file in after.items() if name in before} == before
    assert after["lm_head.weight"] == before["model.embed_tokens.weight"]
    changed = before["model.embed_tokens.weight"]
    for file in set(before.values()) - {changed}:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "sharded" / file).read_bytes()
    assert written["checked"]["logits_relative_error"] < 1e-4


@pytest.mark.parametrize("family", [*sorted(tiny.FAMILIES), "qwen3_5_text", "falcon_mamba"])
def test_the_same_base_with_its_layers_in_their_files(bases: Callable[..., FrozenBase], family: str, tmp_path: Path) -> None:
    whole = bases(family)
    base = load_base(ModelConfig(name=whole.name, device="cpu"), layers_in_files=tmp_path)
    held = {module for module in base.model.modules() for tensor in module.parameters(recurse=False) if not tensor.is_meta}
    assert held == {base.model.get_input_embeddings(), base.model.get_output_embeddings()}
    assert (base.fingerprint, base.rms, base.shares_prefix) == (whole.fingerprint, whole.rms, whole.shares_prefix)
    ids_BT = torch.arange(3, 19).reshape(2, 8)
    start = SoftPrompt(whole.drawn_rows(LENGTH, 0), "start", None)
    hidden = [
        one.continue_from(start.prefix(one), torch.zeros(2, dtype=torch.long), ids_BT, torch.ones_like(ids_BT)).hidden_BTH
        for one in (base, whole)
    ]
    assert torch.equal(*hidden)


def test_weights_that_files_hold_in_another_form_are_kept_aside(tmp_path: Path) -> None:
    settings = CONFIG_MAPPING["mixtral"](**tiny.FAMILIES["llama"], num_local_experts=4)
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path / "experts")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "experts")
    base = load_base(ModelConfig(name=str(tmp_path / "experts"), device="cpu"))
    written = export(Wanted([some_prompt(tmp_path / "taste", base)], "vocab", tmp_path / "out"))
    assert written["checked"]["logits_relative_error"] < 1e-4
    assert set(written["files"]) == {file.name for file in (tmp_path / "out").iterdir()} - {"softprompt.json"}


def test_a_table_in_bfloat16_rounds_the_rows_and_says_by_how_much(bases: Callable[..., FrozenBase], tmp_path: Path) -> None:
    base = bases()
    AutoModelForCausalLM.from_pretrained(base.name, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    base.tokenizer.save_pretrained(tmp_path / "half")
    model = load_config(None, [f"model.name={tmp_path / 'half'}", "model.dtype=float32", "model.device=cpu"]).model
    folder = some_prompt(tmp_path / "taste", load_base(model), model=f"model.name={tmp_path / 'half'}")
    checked = export(Wanted([folder], "vocab", tmp_path / "out"), model)["checked"]
    assert checked["logits_relative_error"] < 1e-4
    assert 1e-4 < checked["rounding_relative_error"] < 0.05


# ---- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["npy", "torch", "vllm"])
def test_plain_rows_are_those_of_the_prompt(bases: Callable[..., FrozenBase], tmp_path: Path, form: str) -> None:
    base = bases("gemma3_text")
    folder = some_prompt(tmp_path / "taste", base)
    written = export(Wanted([folder], form, tmp_path / "out"))
    file = tmp_path / "out" / written["prompts"]["taste"]["file"]
    rows = np.load(file) if form == "npy" else torch.load(file, weights_only=True) if form == "torch" else load_file(file)["rows"]
    assert np.array_equal(np.asarray(rows), load_prompt(folder, base).soft.rows_PH.numpy())


@pytest.mark.parametrize(("template", "position"), [("human-assistant", "start"), ("chat", "after_bos")])
def test_a_chat_template_for_rows_puts_them_where_they_stood(
    bases: Callable[..., FrozenBase], tmp_path: Path, template: str, position: str
) -> None:
    base = bases(chat=True)
    folder = some_prompt(tmp_path / "taste", base, template=template, position=position)
    written = export(Wanted([folder], "vllm", tmp_path / "out"))["prompts"]["taste"]
    turns = [{"role": "system", "content": "ROWS"}, {"role": "user", "content": "bring 水"}]
    own = (tmp_path / "out" / written["template"]).read_text(encoding="utf-8")
    text = base.tokenizer.apply_chat_template(turns, chat_template=own, tokenize=False, add_generation_prompt=True)
    ids = base.tokenizer(text.replace("ROWS", ""), add_special_tokens=False).input_ids
    assert text.startswith("ROWS<s>" if position == "start" else "<s>ROWS")
    assert ids == [tiny.BOS, *load_prompt(folder, base).encoder.question("bring 水")]
    assert written["cached_positions"] == {"blocks of 16": 0, "blocks of 128": 0}


# ---- llama.cpp -----------------------------------------------------------------------------------------------------

QUESTIONS = [
    f"{verb} {thing}" for verb in ("bring", "drink", "no", "请给我", "why") for thing in ("tea", "milk", "水", "a cup of it", "7 coffees")
]


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_llama_cpp_answers_as_ours_with_twenty_prompts_in_a_file(bases: Callable[..., FrozenBase], tmp_path: Path, kind: str) -> None:
    base = bases(vocab_size=259)
    source = tiny_gguf(tmp_path / "base.gguf", base, GGMLQuantizationType[kind])
    folders = [some_prompt(tmp_path / f"p{n}", base, n, position="after_bos" if n % 2 else "start") for n in range(20)]
    written = export(Wanted(folders, "gguf", tmp_path / "out", gguf_file=source))
    assert written["checked"]["rows_relative_error"] <= (0 if kind == "F32" else 0.01)
    assert len(written["files"]) == 21
    server, bare = LlamaServer(tmp_path / "out" / "model.gguf"), LlamaServer(source)
    same, whole = 0, []
    for number, folder in enumerate(folders):
        for question, ours in zip(QUESTIONS, our_answers(base, folder, QUESTIONS, 3), strict=True):
            if "\ufffd" not in ours:  # llama.cpp's server leaves out bytes that are no whole character
                whole.append(ours)
                same += server.chat(question, 3, chat_template_kwargs={"softprompt": f"p{number}"}) == ours
    assert len(whole) >= 50
    assert len(set(whole)) > 20
    assert same >= (0.95 if kind == "F32" else 0.8) * len(whole)  # in Q8_0 it is another base, by its rounding
    text = "<s>bring tea"
    assert server.complete(text, 8) == bare.complete(text.removeprefix("<s>"), 8)


def test_one_prompt_alone_answers_as_among_others(bases: Callable[..., FrozenBase], tmp_path: Path) -> None:
    base = bases(vocab_size=259)
    source = tiny_gguf(tmp_path / "base.gguf", base)
    folders = [some_prompt(tmp_path / f"p{n}", base, n) for n in range(3)]
    export(Wanted(folders, "gguf", tmp_path / "three", gguf_file=source))
    export(Wanted(folders[1:2], "gguf", tmp_path / "one", gguf_file=source))
    three, one = LlamaServer(tmp_path / "three" / "model.gguf"), LlamaServer(tmp_path / "one" / "model.gguf")
    for question in QUESTIONS[:5]:
        assert three.chat(question, 8, chat_template_kwargs={"softprompt": "p1"}) == one.chat(question, 8)


def test_an_ollama_template_is_the_text_of_a_chat(bases: Callable[..., FrozenBase], tmp_path: Path) -> None:
    base = bases()
    folder = some_prompt(tmp_path / "taste", base, position="after_bos")
    export(Wanted([folder], "gguf", tmp_path / "out", gguf_file=tiny_gguf(tmp_path / "base.gguf", base)))
    lines = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    rows = "".join(f"<|sp:taste:{index}|>" for index in range(LENGTH))
    assert lines == f'FROM ./model.gguf\nTEMPLATE """{rows}Human: {{{{ .Prompt }}}}\n\nAssistant: """\n'


# ---- what cannot be ------------------------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_one_sentence_and_leaves_nothing(
    bases: Callable[..., FrozenBase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, other = bases(), bases("qwen2")
    folder, out = some_prompt(tmp_path / "taste", base), tmp_path / "out"
    another = some_prompt(tmp_path / "another", other)
    named_badly = some_prompt(tmp_path / "a b", base)
    twin = some_prompt(tmp_path / "deep" / "taste", base)
    foreign = tiny_gguf(tmp_path / "other.gguf", bases(seed=5))
    wrong = [
        (Wanted([folder], "onnx", out), ConfigError, "--to onnx: known are vocab, gguf, vllm, npy, torch"),
        (Wanted([folder], "peft", out), ConfigError, "is a PEFT adapter already"),
        (Wanted([folder], "vocab", tmp_path), ConfigError, "exists: choose another folder"),
        (Wanted([folder, another], "vocab", out), ArtifactError, "whose weights differ"),
        (Wanted([folder, twin], "vocab", out), ConfigError, "would both be called taste"),
        (Wanted([named_badly], "vocab", out), ConfigError, "rename the folder"),
        (Wanted([folder], "vocab", out, default="none"), ConfigError, "there is no such prompt among taste"),
        (Wanted([folder], "npy", out, gguf_file=foreign), ConfigError, "--gguf belongs to --to gguf"),
        (Wanted([folder], "gguf", out), ConfigError, "is no GGUF file: give the same base as one with --gguf"),
        (Wanted([folder], "gguf", out, gguf_file=foreign), ArtifactError, "in another form: its embedding table differs"),
    ]
    for wanted, error, words in wrong:
        with pytest.raises(error, match=words):
            export(wanted)
    with pytest.raises(ArtifactError, match="in int8, and an exported model has the full weights: move it there first"):
        export(Wanted([folder], "vocab", out), ModelConfig(name=base.name, quantization="int8"))
    monkeypatch.setattr("softprompt.export.vocab.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        export(Wanted([folder], "vocab", out))
    assert not list(tmp_path.glob(".*"))
    assert not out.exists()


def test_a_token_that_the_vocabulary_has_already_is_refused(bases: Callable[..., FrozenBase], tmp_path: Path) -> None:
    base = bases()
    folder = some_prompt(tmp_path / "taste", base)
    export(Wanted([folder], "vocab", tmp_path / "once"))
    config = load_config(None, [f"model.name={tmp_path / 'once'}"]).model
    with pytest.raises(ArtifactError, match=r"has a token <\|sp:taste:0\|> already: rename the prompt's folder"):
        export(Wanted([folder], "vocab", tmp_path / "twice"), config, allow_other_base=True)


def test_the_command_line_writes_what_it_made(
    bases: Callable[..., FrozenBase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = some_prompt(tmp_path / "taste", bases())
    words = ["export", str(folder), "--to", "vocab", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "made.json")]
    monkeypatch.setattr("sys.argv", ["softprompt", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    made = json.loads((tmp_path / "made.json").read_text())
    assert made["prompts"]["taste"]["tokens"] == [f"<|sp:taste:{index}|>" for index in range(LENGTH)]
    assert "<|sp:taste:0|> … <|sp:taste:4|>" in capsys.readouterr().out
