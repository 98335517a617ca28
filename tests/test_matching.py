"""Attention Matching: all of a text's keys are the text; few of them come nearer to it than as many that are picked evenly."""

import random

import pytest
import torch
from tiny import BOS, FAMILIES, tiny_base

from softprompt.engine import matching
from softprompt.engine.batch import collate
from softprompt.engine.layers import Layer
from softprompt.engine.matching import matched, watched
from softprompt.engine.prefix import Prefix
from softprompt.engine.prompt import as_prompt, no_prompt
from softprompt.engine.recited import recited
from softprompt.engine.teacher import Teacher, likeness
from softprompt.engine.tokens import Encoded
from softprompt.errors import ModelError

WATCHED = [family for family in FAMILIES if family != "bloom"]


def ids_of(count, seed):
    return tuple(random.Random(seed).choices(range(10, 300), k=count))


def rows_of(count, seed, length=24):
    return [Encoded(ids_of(length, f"{seed}/{number}"), (False,) * 8 + (True,) * (length - 8)) for number in range(count)]


def taught(base, text, rows, bos=BOS):
    return Teacher(((no_prompt(base, bos), text),), rows, [0] * len(rows))


def attention_of(base, prefix, rows):
    """[layers, N, numbers]: what the attention of every layer gives at what the rows' supervised tokens come after."""
    found = {}
    batch = collate(rows, range(len(rows)), [0] * len(rows), base.device)

    def hear(layer, output, weights):
        found[layer] = output.flatten(0, 1)[batch.scored_N].flatten(1)
        return output

    with watched(base, hear):
        base.continue_from(prefix, batch.which_B, batch.ids_BT, batch.mask_BT)
    return torch.stack([found[layer] for layer in sorted(found)])


@pytest.mark.parametrize("position", ["after_bos", "start"])
@pytest.mark.parametrize("family", WATCHED)
def test_all_of_a_text_is_the_text(family, position, tmp_path):
    """Before BOS the prompt has one of its own, which the second then stands behind: that is no longer the text alone."""
    base, text, rows = tiny_base(tmp_path / "base", family), ids_of(30, "text"), rows_of(4, "rows")
    teacher, before = taught(base, text, rows), base.backbone.config._attn_implementation
    found = matched(base, teacher, rows, 1000, position, BOS, 0)
    prompt = as_prompt(found.layers, position, BOS)
    assert base.backbone.config._attn_implementation == before
    assert prompt.length == len(text) + (position == "start")
    if position == "start":
        return
    assert found.error < 1e-5
    own = attention_of(base, prompt.prefix(base), rows)
    torch.testing.assert_close(own, attention_of(base, teacher.prefix(base, 0), rows), rtol=1e-4, atol=1e-5)
    other = rows_of(4, "other")
    assert likeness(base, taught(base, text, other), prompt, other, 1000).divergence < 1e-6


@pytest.mark.parametrize("position", ["after_bos", "start"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_few_are_nearer_to_the_text_than_as_many_that_are_picked_evenly(family, position, tmp_path):
    """On rows that were not matched. Positions that a base has learned (gpt2) are other ones behind a short prompt, whatever it says."""
    base, text, rows, other = tiny_base(tmp_path / "base", family), ids_of(64, "text"), rows_of(24, "rows"), rows_of(12, "other")
    found = matched(base, taught(base, text, rows), rows, 8, position, BOS, 0)
    teacher = taught(base, text, other)
    wanted = attention_of(base, teacher.prefix(base, 0), other)
    places = [0, *range(5, 65, 8)] if position == "after_bos" else [0, *range(5, 61, 8)]
    evenly = as_prompt(recited(base, (BOS, *text), places), position, BOS)
    errors, divergences = [], []
    for prompt in (as_prompt(found.layers, position, BOS), evenly):
        assert prompt.length == 8
        own = attention_of(base, prompt.prefix(base), other)
        errors.append(((own - wanted).norm() / wanted.norm()).item())
        divergences.append(likeness(base, teacher, prompt, other, 1000).divergence)
    assert errors[0] < 0.8 * errors[1]
    assert divergences[0] < (0.95 if family == "gpt2" else 0.7) * divergences[1]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_no_other_values_come_nearer(family, tmp_path, monkeypatch):
    """Autograd is the oracle: the squares of what is off in a layer's attention have no slope in its values."""
    monkeypatch.setattr(matching, "RIDGE", 1e-9)
    base, text = tiny_base(tmp_path / "base", family), ids_of(64, "text")
    rows = [Encoded(row.ids, (False,) + (True,) * (len(row) - 1)) for row in rows_of(24, "rows")]
    teacher = taught(base, text, rows)
    wanted = attention_of(base, teacher.prefix(base, 0), rows)
    found = matched(base, teacher, rows, 8, "after_bos", BOS, 0)
    slopes = []
    for scale in (1.0, 1.1):
        layers = tuple(Layer(one.kind, {**one.parts, "values": scale * one.parts["values"]}) for one in found.layers)
        prefix = Prefix(layers, (9,)).leaf()
        off = (attention_of(base, prefix, rows) - wanted).square().sum(dim=(1, 2))
        if scale == 1.0:
            assert off.sum().sqrt().item() == pytest.approx(found.error * wanted.norm().item(), rel=1e-3)
        values = [layer.parts["values"] for layer in prefix.layers]
        slopes.append([torch.autograd.grad(one, own, retain_graph=True)[0][:, :, 1:].norm() for one, own in zip(off, values, strict=True)])
    assert all(flat < 0.01 * steep for flat, steep in zip(*slopes, strict=True))


def test_the_rows_of_a_sliding_layer_look_at_what_they_see(tmp_path):
    """The window of the tiny base is 12 tokens: its sliding layers keep keys from the end of the text, the others from all of it."""
    base, text, rows = tiny_base(tmp_path / "base", "gemma3_text", num_hidden_layers=6), ids_of(64, "text"), rows_of(8, "rows")
    found = matched(base, taught(base, text, rows), rows, 8, "after_bos", BOS, 0)
    own = base.prefill([base.embed_ids((BOS, *text))], 8 - len(text)).layers
    kinds = base.backbone.config.layer_types
    assert set(kinds) == {"sliding_attention", "full_attention"}
    for kind, layer, whole in zip(kinds, found.layers, own, strict=True):
        distance = torch.cdist(layer.parts["keys"][0][:, 1:], whole.parts["keys"][0])
        assert distance.amin(dim=2).max() < 1e-3
        assert (distance.argmin(dim=2).min() > len(text) - 12) == (kind == "sliding_attention")


def test_several_texts_share_the_prompt(tmp_path):
    base, texts, rows = tiny_base(tmp_path / "base"), (ids_of(40, "one"), ids_of(30, "two")), rows_of(16, "rows")
    bare = no_prompt(base, BOS)
    teacher = Teacher(tuple((bare, text) for text in texts), rows, [number % 2 for number in range(16)])
    prompt = as_prompt(matched(base, teacher, rows, 9, "after_bos", BOS, 0).layers, "after_bos", BOS)
    evenly = as_prompt(recited(base, (BOS, *texts[0], *texts[1]), [0, *range(4, 71, 8)]), "after_bos", BOS)
    assert prompt.length == evenly.length == 9
    ours, theirs = (likeness(base, teacher, one, rows, 1000).divergence for one in (prompt, evenly))
    assert ours < 0.8 * theirs
    assert as_prompt(matched(base, teacher, rows, 1000, "after_bos", BOS, 0).layers, "after_bos", BOS).length == 70


def test_many_and_long_rows_are_matched_in_part(tmp_path, monkeypatch):
    base, text, rows = tiny_base(tmp_path / "base"), ids_of(20, "text"), rows_of(30, "rows", 40)
    monkeypatch.setattr(matching, "TOKENS", 100)
    monkeypatch.setattr(matching, "ROW", 20)
    assert matched(base, taught(base, text, rows), rows, 8, "start", BOS, 0).num_queries == 5 * 19


def test_attention_that_cannot_be_watched_is_said(tmp_path):
    base, rows = tiny_base(tmp_path / "base", "bloom"), rows_of(2, "rows")
    with pytest.raises(ModelError, match=r"the attention of 0 of 2 layers can be watched: start from states"):
        matched(base, taught(base, ids_of(9, "text"), rows), rows, 4, "start", BOS, 0)
