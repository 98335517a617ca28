"""A prompt's rows under the glass, and shorter prompts."""

import json
from dataclasses import replace

import pytest
import tiny
import torch

from softprompt.artifact import load_prompt
from softprompt.data import load_examples
from softprompt.engine.prompt import SoftPrompt
from softprompt.errors import ConfigError
from softprompt.evaluation import held_out_loss
from softprompt.inspection import inspect, leave_out_losses, nearest_tokens, prune, without
from softprompt.rows import encode_rows
from softprompt.training import train


@pytest.fixture
def stored(make_config, bases, tmp_path):
    list(train(make_config("train.steps=10", "prompt.length=6")))
    return load_prompt(tmp_path / "run", bases())


@pytest.fixture
def held(stored, tmp_path):
    return encode_rows(stored.encoder, load_examples(str(tmp_path / "eval.jsonl")), 200)


def test_rows_of_the_vocabulary_lie_nearest_to_themselves(bases):
    base = bases("gemma3_text")
    ids = [65, 100, 2]
    near = nearest_tokens(base, 3 * base.embed_ids(ids))
    assert [own[0][0] for own in near] == [base.tokenizer.decode([token]) for token in ids]
    assert [own[0][1] for own in near] == pytest.approx([1, 1, 1])
    assert all(own[0][1] >= own[1][1] >= own[2][1] for own in near)


def test_what_a_row_is_worth_is_the_loss_without_it(bases, stored, held):
    base = bases()
    rows_PH = stored.soft.rows_PH
    losses = leave_out_losses(base, stored.soft, held.encoded, [(), (0,), (2, 4)], 64)
    kept = [[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [0, 1, 3, 5]]
    alone = [held_out_loss(base, replace(stored.soft, rows_PH=rows_PH[own]), held, 64) for own in kept]
    assert losses == pytest.approx(alone, rel=1e-5)
    facts = inspect(base, stored, held.encoded)
    assert facts.rows[0].worth == pytest.approx(alone[1] - alone[0], abs=1e-4)
    assert facts.loss < facts.bare_loss


def test_size_drift_and_likeness(bases, stored):
    base = bases()
    start = SoftPrompt(base.embed_ids(range(10, 16)), "after_bos", tiny.BOS)
    moved = replace(stored, soft=replace(start, rows_PH=start.rows_PH.clone()))
    moved.soft.rows_PH[2] += base.rms * 0.5
    moved.soft.rows_PH[4] = 2 * moved.soft.rows_PH[3]
    facts = inspect(base, moved, start=start)
    drift_of_4 = (2 * start.rows_PH[3] - start.rows_PH[4]).square().mean().sqrt().item() / base.rms
    assert [row.drift for row in facts.rows] == pytest.approx([0, 0, 0.5, 0, drift_of_4, 0], abs=1e-5)
    assert facts.rows[1].size == pytest.approx(start.rows_PH[1].square().mean().sqrt().item() / base.rms)
    assert facts.alike[1] == pytest.approx(1)
    assert {row.worth for row in facts.rows} == {None}


def loss_of_rows(base, stored, held, rows):
    return held_out_loss(base, replace(stored.soft, rows_PH=stored.soft.rows_PH[rows]), held, 256)


def test_pruning_keeps_what_is_missed_most(bases, stored, held):
    base = bases()
    shorter, before, after = prune(base, stored, held.encoded, 4)
    assert shorter.soft.length == shorter.card.num_virtual_tokens == 4
    assert before == pytest.approx(held_out_loss(base, stored.soft, held, 256), rel=1e-5)
    kept = list(range(6))
    for _ in range(2):  # the shortened prompts one by one, each by an evaluation of its own
        losses = {gone: loss_of_rows(base, stored, held, [row for row in kept if row != gone]) for gone in kept}
        kept.remove(min(losses, key=losses.__getitem__))
    assert torch.equal(shorter.soft.rows_PH, stored.soft.rows_PH[kept])
    assert after == pytest.approx(loss_of_rows(base, stored, held, kept), rel=1e-5)
    assert torch.equal(without(stored.soft, (1, 3)).rows_PH, stored.soft.rows_PH[[0, 2, 4, 5]])
    for keep in (0, 6, 7):
        with pytest.raises(ConfigError, match="keep fewer"):
            prune(base, stored, held.encoded, keep)
    with pytest.raises(ConfigError, match="give --data"):
        prune(base, stored, (), 2)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_inspect_and_prune_from_the_command_line(make_config, bases, tmp_path, monkeypatch, capsys, method):
    from softprompt import cli

    list(train(make_config("train.steps=6", "prompt.length=6", f"prompt.method={method}")))

    def run(*words):
        monkeypatch.setattr("sys.argv", ["softprompt", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr()

    device = "model.device=cpu"
    code, shown = run("inspect", tmp_path / "run", device, "--json", tmp_path / "facts.json")
    facts = json.loads((tmp_path / "facts.json").read_text(encoding="utf-8"))
    assert code in (0, None)
    assert len(facts["rows"]) == 6
    assert facts["held_out_rows"] == 7
    assert all(row["drift"] > 0 for row in facts["rows"])
    assert ("nearest tokens" in shown.out) == (method == "prompt")
    short = tmp_path / "short"
    assert run("prune", tmp_path / "run", device, "--keep", 3, "--out", short, "--json", tmp_path / "short.json")[0] in (0, None)
    told = json.loads((tmp_path / "short.json").read_text(encoding="utf-8"))
    assert load_prompt(short, bases()).soft.length == 3
    run("inspect", short, device, "--data", tmp_path / "eval.jsonl", "--json", tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))
    assert again["loss"] == pytest.approx(told["loss_after"], rel=1e-5)
    code, shown = run("prune", tmp_path / "run", device, "--keep", 3, "--out", short)
    assert code == 2
    assert "exists: choose another folder" in shown.err
    code, shown = run("prune", short, device, "--keep", 2, "--out", tmp_path / "shorter")
    assert code == 2
    assert "give --data FILE" in shown.err
