"""Attention Matching: all of a text's keys are the text; few of them come nearer to it than as many that are picked evenly."""

import random

import pytest
import torch
from tiny import BOS, FAMILIES, tiny_base

from softprompt.engine.batch import collate
from softprompt.engine.matching import matched, watched
from softprompt.engine.prompt import as_prompt, no_prompt
from softprompt.engine.recited import recited
from softprompt.engine.teacher import Teacher, likeness
from softprompt.engine.tokens import Encoded

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

    with torch.no_grad(), watched(base, hear):
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
    print(family, position, found.error, errors, divergences)
    assert errors[0] < 0.8 * errors[1]
    assert divergences[0] < 0.8 * divergences[1]
