"""softprompt init: what it writes loads, suits the rows, and never replaces a file."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny

from softprompt import cli
from softprompt.config import load_config
from softprompt.data import suggest_columns
from softprompt.draft import draft
from softprompt.errors import ConfigError, DataError
from softprompt.show import show

LABELLED = [{"text": f"这部电影很好看{n}", "label": n % 2} for n in range(12)]
SHAPES = {
    "prompt": tiny.some_rows(12),
    "instruction": [{"instruction": f"Name the number {n}", "input": "", "output": str(n)} for n in range(12)],
    "messages": [
        {"messages": [{"role": "user", "content": f"Is it {n}?"}, {"role": "assistant", "content": "Yes."}] * 2} for n in range(12)
    ],
    "label": LABELLED,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Bases with and without a chat template."""
    home = tmp_path_factory.mktemp("bases")
    return {name: str(tiny.tiny_folder(home / name, chat=name == "chat")) for name in ("chat", "plain")}


def drafted(tmp_path: Path, rows: list, *overrides: str) -> dict:
    """The settings of a draft for these rows, which load."""
    found = tomllib.loads(draft(str(tiny.write_rows(tmp_path / "rows.jsonl", rows)), overrides).text)
    load_config(found)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("base", ["chat", "plain"])
def test_show_works_on_what_is_written(tmp_path, folders, shape, base):
    found = drafted(tmp_path, SHAPES[shape], f"model.name={folders[base]}")
    shown = show(load_config(found))
    lengths = [row.num_cut for row in (*shown.train.encoded, *shown.held.encoded)]
    assert (len(lengths), sum(lengths), shown.rejected) == (12, 0, ())
    longest = max(summary.lengths.largest for summary in shown.summaries.values())
    assert longest <= found["data"]["max_length"] < longest + 64
    assert found["data"]["template"] == ("chat" if base == "chat" else "human-assistant")


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_base_lengths_are_guessed_and_said_to_be(tmp_path, shape):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", SHAPES[shape])
    made = draft(str(rows))
    assert "a guess from characters" in made.text
    assert "estimated from characters" in made.found
    assert not made.has_base
    assert load_config(tomllib.loads(made.text)).data.template == "human-assistant"


def test_characters_of_han_are_worth_more_tokens(tmp_path):
    kinds = {"han": "很" * 300, "latin": "a" * 300}
    found = {name: drafted(tmp_path, [{"prompt": text, "completion": "b"}] * 2)["data"]["max_length"] for name, text in kinds.items()}
    assert found["han"] > 2 * found["latin"]


def test_rows_are_counted_and_a_share_is_held_out(tmp_path):
    assert drafted(tmp_path, SHAPES["prompt"])["data"]["eval_fraction"] == 0.2
    assert drafted(tmp_path, [{"prompt": str(n), "completion": "a"} for n in range(9000)])["data"]["eval_fraction"] == 0.06
    assert "eval_fraction" not in drafted(tmp_path, SHAPES["prompt"][:1] * 3)["data"], "one row cannot be shared out"


def test_a_given_held_out_file_stands_in_place_of_a_share(tmp_path):
    rows = tiny.write_rows(tmp_path / "held.jsonl", SHAPES["prompt"])
    data = drafted(tmp_path, SHAPES["prompt"], f"data.eval={rows}")["data"]
    assert data["eval"] == str(rows)
    assert "eval_fraction" not in data


def test_labels_that_are_numbers_get_words_to_fill_in(tmp_path, folders):
    found = drafted(tmp_path, LABELLED, f"model.name={folders['plain']}")
    assert found["data"]["label_words"] == {"0": "0", "1": "1"}
    filled = {**found, "data": {**found["data"], "label_words": {"0": "差", "1": "好"}}}
    assert set(show(load_config(filled)).train.labels) == {"差", "好"}
    named = [{**row, "label": "good" if row["label"] else "bad"} for row in LABELLED]
    assert "label_words" not in drafted(tmp_path, named)["data"]


def test_the_first_text_is_in_the_language_of_the_questions(tmp_path):
    assert "类" in drafted(tmp_path, LABELLED)["prompt"]["text"]
    english = [{"text": f"A fine film {n}", "label": "good"} for n in range(4)]
    assert drafted(tmp_path, english)["prompt"]["text"].startswith("Say which label")


def test_overrides_stand_as_given(tmp_path):
    given = ["prompt.length=7", "prompt.text=Say it.", "optim.relative_lr=0.1", "data.max_length=99", "prompt.init=['labels', 'text']"]
    found = drafted(tmp_path, LABELLED, *given)
    assert found["prompt"] == {"length": 7, "text": "Say it.", "init": ["labels", "text"]}
    assert (found["optim"], found["data"]["max_length"]) == ({"relative_lr": 0.1}, 99)
    assert [*found] == ["model", "data", "prompt", "optim", "train"]


def test_rows_that_cannot_be_used_are_spoken_of(tmp_path):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [*SHAPES["prompt"], {"prompt": "a"}])
    made = draft(str(rows))
    assert "max_rejected = 0" in made.text
    assert f"1 rows cannot be used; {rows}:13: field completion is missing" in made.text
    assert "1 more cannot be used" in made.found


def test_a_longest_row_far_above_the_rest_is_cut_and_said_to_be(tmp_path, folders):
    rows = [*({"prompt": f"{n}", "completion": "a"} for n in range(300)), {"prompt": "a" * 5000, "completion": "b"}]
    file = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    made = draft(str(file), [f"model.name={folders['plain']}"])
    assert tomllib.loads(made.text)["data"]["max_length"] == 64
    assert "and is cut, 99 of 100 have no more than" in made.text


def test_a_length_leaves_the_base_room_for_a_prompt(tmp_path, folders):
    found = drafted(tmp_path, [{"prompt": "a" * 480, "completion": "b"}, *SHAPES["prompt"]], f"model.name={folders['plain']}")
    assert found["data"]["max_length"] == 512 - 64


@pytest.mark.parametrize("rows", [[{"id": 1, "score": 0.5}], [{"prompt": "a"}], ["a"]], ids=["numbers", "no answer", "no fields"])
def test_rows_without_a_question_or_an_answer_are_one_line(tmp_path, rows):
    file = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: none of the 1 rows can be used: "):
        draft(str(file))


def test_the_rows_are_named_once(tmp_path):
    file = tiny.write_rows(tmp_path / "rows.jsonl", LABELLED)
    with pytest.raises(ConfigError, match=r"leave out data\.train"):
        draft(str(file), ["data.train=x"])


COLUMNS = {
    "question answer id": {"prompt": "question", "completion": "answer"},
    "sentence label:int idx:int": {"text": "sentence", "label": "label"},
    "premise hypothesis label:int": {"text": "{{ premise }}\n{{ hypothesis }}", "label": "label"},
    "article highlights id": {"prompt": "article", "completion": "highlights"},
    "问题 答案": {"prompt": "问题", "completion": "答案"},
    "review sentiment": {"text": "review", "label": "sentiment"},
    "prompt response": {"prompt": "prompt", "completion": "response"},
    "Question Correct_Answer": {"prompt": "Question", "completion": "Correct_Answer"},
    "body category": {"text": "body", "label": "category"},
    "a b": None,
    "label:int": None,
}


@pytest.mark.parametrize("names", COLUMNS)
def test_columns_are_suggested_by_their_names(names):
    row = {name.partition(":")[0]: 1 if name.endswith(":int") else f"some text in {name}" for name in names.split()}
    assert suggest_columns([row, row]) == COLUMNS[names]


@pytest.mark.parametrize("names", [names for names, columns in COLUMNS.items() if columns])
def test_rows_with_columns_of_their_own_get_a_line_that_names_them(tmp_path, folders, names):
    row = {name.partition(":")[0]: 1 if name.endswith(":int") else f"some text in {name}" for name in names.split()}
    rows = [{name: f"{value} {n}" if isinstance(value, str) else value for name, value in row.items()} for n in range(9)]
    found = drafted(tmp_path, rows, f"model.name={folders['plain']}")
    assert found["data"].get("columns") == COLUMNS[names]
    assert show(load_config(found)).train.encoded


# ---- the verb ------------------------------------------------------------------------------------------------------


def run(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["softprompt", *map(str, words)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_init_says_what_it_found_and_what_comes_next(monkeypatch, capsys, tmp_path):
    rows, out = tiny.write_rows(tmp_path / "rows.jsonl", LABELLED), tmp_path / "films.toml"
    assert run(monkeypatch, "init", rows, "--out", out) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    for part in ("12 texts with labels, 2 labels, mostly in Han script", f"written to {out}", "name your base", f"softprompt train {out}"):
        assert part in said
    assert load_config(out).data.train == str(rows)
    assert len(out.read_text().split("\n")) < 20


@pytest.mark.parametrize("there", [True, False], ids=["a file there", "no such folder"])
def test_init_never_replaces_a_file(monkeypatch, capsys, tmp_path, there):
    rows, out = tiny.write_rows(tmp_path / "rows.jsonl", LABELLED), tmp_path / ("mine.toml" if there else "none/mine.toml")
    if there:
        out.write_text("mine")
    assert run(monkeypatch, "init", rows, "--out", out) == 2
    error = capsys.readouterr().err
    assert ("exists" if there else "cannot be written") in error
    assert error.count("\n") == 1
    assert not there or out.read_text() == "mine"


def test_torch_is_not_loaded_without_a_base(tmp_path):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", LABELLED)
    code = f"""
import json, sys
from softprompt.cli import app
app(["init", {json.dumps(str(rows))}, "--out", {json.dumps(str(tmp_path / "my.toml"))}], standalone_mode=False)
print([name for name in ("torch", "transformers", "datasets") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "my.toml").is_file()
