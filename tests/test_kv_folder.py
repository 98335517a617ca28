"""What vLLM is given of prompts, without vLLM: keys and values in a folder, and the fields of a request."""

import asyncio
import json
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file
from test_invariants import some_prompt

from softprompt.config import ModelConfig
from softprompt.engine.prompt import deepened
from softprompt.errors import ArtifactError, ModelError
from softprompt.export.kv_folder import KeyValueFolder, ordinary_ids
from softprompt.sampling import Sampling
from softprompt.serve import vllm
from softprompt.serve.asking import Ask
from softprompt.serve.vllm_request import Spelling, fields_of


def prefix_of(base, length=12, deep=False):
    rows = some_prompt(base, length)
    with torch.no_grad():
        return (deepened(base, rows.rows_PH, rows.position, rows.bos_id) if deep else rows).prefix(base)


def index_of(folder):
    return json.loads((folder.path / "index.json").read_text())


@pytest.mark.parametrize("deep", [False, True])
def test_the_folder_holds_the_keys_and_values_and_as_many_ids(bases, tmp_path, deep):
    base, folder = bases(), KeyValueFolder(tmp_path / "kv")
    prefix = prefix_of(base, deep=deep)
    placed = folder.put(base, prefix)
    stored = load_file(folder.path / f"{placed.key}.safetensors")
    assert len(stored) == 2 * len(prefix.layers)
    for number, layer in enumerate(prefix.layers):
        for part in ("keys", "values"):
            assert torch.equal(stored[f"{part}.{number}"].transpose(0, 1), layer.parts[part][0])
    assert index_of(folder) == {placed.key: {"ids": list(placed.ids)}}
    assert len(placed.ids) == prefix.lengths[0]
    assert set(placed.ids) <= set(ordinary_ids(base))
    assert not set(base.tokenizer.all_special_ids) & set(ordinary_ids(base))
    assert (folder.path / "softprompt_connector.py").read_text().startswith('"""Trained prompts in vLLM')


def test_ids_come_from_the_content_alone(bases, tmp_path):
    base, folder = bases(), KeyValueFolder(tmp_path / "kv")
    one, same, other = (folder.put(base, prefix_of(base, length)) for length in (12, 12, 13))
    elsewhere = KeyValueFolder(tmp_path / "other").put(base, prefix_of(base, 12))
    assert one == same == elsewhere
    assert one.ids != other.ids[:12]
    assert sorted(index_of(folder)) == sorted({one.key, other.key})
    folder.take_away(one.key)
    assert sorted(index_of(folder)) == sorted({one.key, other.key})
    assert [file.stem for file in folder.path.glob("*.safetensors")] == [other.key]


def test_a_prompt_that_might_be_taken_for_text_is_refused(bases, tmp_path):
    base, folder = bases(), KeyValueFolder(tmp_path / "kv")
    with pytest.raises(ArtifactError, match="cannot be told from text"):
        folder.put(base, prefix_of(base, 2))
    assert not (folder.path / "index.json").exists()


def test_a_base_that_keeps_states_is_refused_before_a_server_is_started(bases, tmp_path):
    base = bases("qwen3_5_text")
    with pytest.raises(ModelError, match="its layers keep states"):
        asyncio.run(vllm.start("base", ModelConfig(name=base.name, device="cpu"), {}, tmp_path / "kv"))
    assert not (tmp_path / "kv" / "vllm.log").exists()


def test_a_base_in_few_bits_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"model\.quantization"):
        asyncio.run(vllm.start("base", ModelConfig(name="x", quantization="nf4"), {}, tmp_path / "kv"))


# ---- fields ----------------------------------------------------------------------------------------------------------

OTHER = {
    "max_new_tokens": 7,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "seed": 9,
    "min_p": 0.25,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": {3: 1.5},
}
ASKED = {"stops": ("a",), "logprobs": 2, "schema": {"type": "object"}}


def test_no_field_is_left_out():
    ask = Ask("base", "text", Sampling())
    assert set(OTHER) == {field.name for field in fields(Sampling)}
    assert set(ASKED) | {"model", "text", "sampling", "echo"} == {field.name for field in fields(Ask)}
    asks = [replace(ask, sampling=replace(ask.sampling, **{name: value})) for name, value in OTHER.items()]
    asks += [replace(ask, **{name: value}) for name, value in ASKED.items()]
    asks += [replace(ask, echo=True, logprobs=2)]
    said = [json.dumps(fields_of(one, "base", (1, 2), frozenset({3}), 300)) for one in [ask, *asks]]
    assert len(set(said)) == len(said)
    assert fields_of(ask, "base", (1, 2), frozenset({3}), 5)["max_tokens"] == 5


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_tokens_are_shown_with_the_bytes_that_they_stand_for(bases, family):
    tokenizer = bases(family).tokenizer
    spelling, text = Spelling(tokenizer), " tea 茶 é\n🙂!"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(spelling.scored(token, None).data for token in ids).decode() == text
    assert any(spelling.scored(token, None).text == "\ufffd" for token in ids), "every token is whole: nothing is tested"
    top = spelling.scored(ids[0], -1.0, {1: -3.0, 2: -1.0, 3: -2.0}, most=2).top
    assert [one.id for one in top] == [2, 3]
