"""The embedded task: its rows keep one rule and no split gives another away; its run ends with a comparison and drawn answers."""

import json
import re
from itertools import combinations

import pytest

from softprompt import demo
from softprompt.data import load_examples
from softprompt.show.findings import Findings, Split, compare

TOPICS = {"delivery", "return", "change", "billing", "question", "praise"}
PARTS = ("train", "eval", "test")


@pytest.fixture(scope="module")
def parts():
    return {part: load_examples(str(demo.HOME / f"{part}.jsonl")).examples for part in PARTS}


def test_every_record_can_be_read_off_its_message(parts):
    for example in [example for rows in parts.values() for example in rows]:
        message, record = example.messages[-2].content, json.loads(example.response)
        assert example.response == json.dumps(record, ensure_ascii=False, separators=(",", ":"))
        assert list(record) == ["topic", "item", "order"]
        assert record["topic"] in TOPICS
        assert record["item"] in message
        assert record["order"] is None or record["order"] in message


def test_a_record_without_an_order_has_a_message_without_one(parts):
    for example in [example for rows in parts.values() for example in rows]:
        message, record = example.messages[-2].content, json.loads(example.response)
        assert record["order"] or not re.search(r"[A-Z]{1,4}-?[0-9]{3}", message), message


def test_no_message_gives_another_away(parts):
    for part, rows in parts.items():
        assert compare(Split.of("train", rows)) == Findings((), (), (), ()), part
    for first, second in combinations(PARTS, 2):
        assert not compare(Split.of("train", parts[first]), Split.of("eval", parts[second])).in_both_splits, (first, second)


def test_every_topic_and_both_languages_are_measured(parts):
    for rows in parts.values():
        assert {json.loads(example.response)["topic"] for example in rows} == TOPICS
        chinese = sum(any("一" <= character <= "鿿" for character in example.messages[-2].content) for example in rows)
        assert 0.3 < chinese / len(rows) < 0.7


def test_the_demo_ends_with_a_comparison_and_answers_drawn_at_random(bases, tmp_path, monkeypatch, capsys):
    for part, number in (("train", 12), ("eval", 2), ("test", 7)):
        rows = (demo.HOME / f"{part}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / f"{part}.jsonl").write_text("".join(rows[:number]), encoding="utf-8")
    (tmp_path / "demo.toml").write_text((demo.HOME / "demo.toml").read_text(encoding="utf-8"), encoding="utf-8")
    for name, value in (("HOME", tmp_path), ("NUM_COMPARED", 5), ("NUM_SHOWN", 3)):
        monkeypatch.setattr(demo, name, value)
    run = tmp_path / "run"
    demo.run_demo([f"model.name={bases().name}", "model.device=cpu", "data.max_length=400", "train.steps=1", f"train.out={run}"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("bare base", "text prompt", "examples", "soft prompt", "exact match"))
    asked = [json.loads(line)["prompt"] for line in (tmp_path / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "5 messages drawn at random (seed 0) from 7 that neither" in shown
    assert "Of all 7, the soft prompt answers 0% exactly right." in shown
    drawn = shown[shown.index("The first 3 drawn:") :]
    assert sum(message in drawn for message in asked) == drawn.count("expected") == 3
    assert "wrong  soft prompt" in drawn
    assert (run / "prompt" / "adapter_model.safetensors").is_file()
