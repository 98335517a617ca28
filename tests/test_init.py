"""Where prompts start: every source alone and in turn, what is cut or repeated, and another prompt as a start."""

import json
from dataclasses import replace
from itertools import permutations

import pytest
import tiny
import torch

from softprompt.artifact import load_prompt
from softprompt.config import PromptConfig
from softprompt.encode import make_encoder
from softprompt.errors import ArtifactError, ConfigError
from softprompt.init import SOURCES, Material, initial_rows, prompt_length
from softprompt.training import train

TEXT = "Say it"  # one token per byte


@pytest.fixture
def material(bases):
    base = bases()
    encoder = make_encoder(base.tokenizer, "{{ prompt }}")
    rows = [encoder.encode(example) for example in examples_of(tiny.some_rows(9))]

    def make(seed=0, labels=("good", "bad"), **prompt):
        return Material(PromptConfig(**prompt), base, rows, labels, seed, SOURCES)

    return make


def examples_of(rows):
    from softprompt.data import Example, Message

    return [Example((Message("user", row["prompt"]), Message("assistant", row["completion"])), "row", fields=row) for row in rows]


def ids_of(material, rows_PH):
    """The tokens whose embeddings these rows are."""
    table_VH = material.base.embed_ids(range(tiny.VOCABULARY))
    distance, nearest = torch.cdist(rows_PH, table_VH).min(dim=1)
    assert distance.max() < 1e-3
    return nearest.tolist()


def text_ids(material, text=TEXT):
    return material.base.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_text_gives_its_tokens_and_its_length(material):
    made = material(text=TEXT)
    start = initial_rows(made)
    assert ids_of(made, start.rows_PH) == text_ids(made)
    assert "6 from the 6 tokens of prompt.text" in start.note


def test_without_a_text_frequent_tokens_of_the_data_are_drawn(material):
    made = material()
    ids = ids_of(made, initial_rows(made).rows_PH)
    seen = {token for row in made.rows for token in row.ids}
    assert len(set(ids)) == len(ids) == 16
    assert set(ids) <= seen - {tiny.PAD, tiny.BOS, tiny.EOS}
    assert ids == ids_of(made, initial_rows(material()).rows_PH)
    assert ids != ids_of(made, initial_rows(material(seed=1)).rows_PH)


def test_only_the_most_frequent_tokens_are_drawn(material, monkeypatch):
    monkeypatch.setattr("softprompt.init.COMMON_TOKENS", 3)
    made = material(length=3)
    counts = {}
    for row in made.rows:
        for token in row.ids:
            counts[token] = counts.get(token, 0) + (token > tiny.EOS)
    best = sorted(counts.values(), reverse=True)[:3]
    assert sorted((counts[token] for token in ids_of(made, initial_rows(made).rows_PH)), reverse=True) == best


def test_a_label_word_gives_the_mean_of_its_tokens(material):
    made = material(init="labels")
    rows_PH = initial_rows(made).rows_PH
    assert len(rows_PH) == 2
    for row_H, word in zip(rows_PH, ("good", "bad"), strict=True):
        torch.testing.assert_close(row_H, made.base.embed_ids(text_ids(made, word)).mean(dim=0))


def test_examples_stand_whole_before_the_text(material):
    made = material(init="examples", length=40)
    ids = ids_of(made, initial_rows(made).rows_PH)
    short = sorted(made.rows, key=len)[:5]
    assert ids in [list(first.ids + second.ids + third.ids)[-40:] for first, second, third in permutations(short, 3)]


def test_examples_show_different_answers_in_turn(material):
    encoder = make_encoder(material().base.tokenizer, "{{ prompt }}")
    rows = [encoder.encode(one) for one in examples_of([{"prompt": "tea", "completion": word} for word in ("good", *["nice"] * 7)])]
    for seed in range(4):
        made = replace(material(seed=seed, init="examples", length=2 * len(rows[0])), rows=[*rows, *rows])
        ids = ids_of(made, initial_rows(made).rows_PH)
        assert {tuple(ids[: len(rows[0])]), tuple(ids[len(rows[0]) :])} == {row.ids for row in rows}


def test_noise_is_like_the_embedding_rows(material):
    made = material(init="random", length=4000)
    rows_PH = initial_rows(made).rows_PH
    assert torch.allclose(rows_PH.mean(dim=0), made.base.row_mean_H, atol=5 * made.base.row_std_H.max() / 4000**0.5)
    assert torch.allclose(rows_PH.std(dim=0), made.base.row_std_H, rtol=0.1)


def test_sources_fill_the_prompt_in_turn(material):
    made = material(init=("labels", "text", "vocab"), text=TEXT, length=12)
    start = initial_rows(made)
    assert len(start.rows_PH) == 12
    torch.testing.assert_close(start.rows_PH[:2], initial_rows(material(init="labels")).rows_PH)
    assert ids_of(made, start.rows_PH[2:8]) == text_ids(made)
    assert len(set(ids_of(made, start.rows_PH[8:]))) == 4
    assert "2 from the label words good, bad; 6 from the 6 tokens of prompt.text; 4 drawn" in start.note


def test_what_has_no_room_is_said(material):
    start = initial_rows(material(init=("text", "vocab"), text=TEXT, length=4))
    assert "4 from the 6 tokens of prompt.text, the last 2 are cut: 'it'" in start.note
    assert "no room for vocab" in start.note


def test_too_few_rows_are_repeated(material):
    made = material(text=TEXT, length=15)
    start = initial_rows(made)
    assert ids_of(made, start.rows_PH) == [*text_ids(made), *text_ids(made), *text_ids(made)[:3]]
    assert "repeated in a cycle, 2.5 times" in start.note


@pytest.mark.parametrize(
    ("init", "length"),
    [("text", 6), ("labels", 2), (("labels", "text"), 8), (("labels", "text", "vocab"), 8), ("vocab", 16), ("random", 16)],
)
def test_the_length_is_that_of_the_finite_sources(material, init, length):
    made = material(init=init, text=TEXT)
    assert prompt_length(made.config, made.base.tokenizer, made.labels) == length == len(initial_rows(made).rows_PH)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"init": "labels", "labels": ()}, "the rows have no labels"),
        ({"init": "text", "text": " "}, r"prompt\.text is empty"),
        ({"init": "file"}, r"prompt\.file is not set"),
    ],
)
def test_a_source_with_nothing_to_give_is_refused(material, how, message):
    with pytest.raises(ConfigError, match=message):
        initial_rows(material(**how))


@pytest.mark.parametrize(("length", "note"), [(None, "17 from the 17 rows"), (5, "the last 12 are cut"), (20, "3 drawn from")])
def test_a_prompt_starts_from_another_one(bases, make_config, tmp_path, length, note):
    first = make_config("train.steps=2", f"train.out={tmp_path / 'first'}")
    list(train(first))
    own = ["optim.lr=1e-30", "train.steps=1", f"prompt.file={tmp_path / 'first'}", 'prompt.init=["file", "vocab"]']
    second = make_config(*own, *([f"prompt.length={length}"] if length else []))
    list(train(second))
    before, after = (load_prompt(config.train.out, bases()).soft.rows_PH for config in (first, second))
    kept = min(len(before), length or len(before))
    torch.testing.assert_close(after[:kept], before[:kept])
    assert len(after) == (length or len(before))
    assert note in json.loads((tmp_path / "run" / "prompt" / "card.json").read_text())["init"]


def test_a_prompt_of_another_width_is_refused(make_config, tmp_path):
    folder = tiny.tiny_folder(tmp_path / "wide", "llama", hidden_size=64)
    list(train(make_config("train.steps=1", f"model.name={folder}", f"train.out={tmp_path / 'wide-run'}")))
    with pytest.raises(ConfigError, match="has rows of 64 numbers"):
        list(train(make_config("train.steps=1", f"prompt.file={tmp_path / 'wide-run'}")))


def test_a_missing_prompt_is_refused(make_config, tmp_path):
    with pytest.raises(ArtifactError, match="no prompt here"):
        list(train(make_config(f"prompt.file={tmp_path / 'nowhere'}")))
