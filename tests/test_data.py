"""Rows of every shape and place; what cannot be used is rejected with its place and the reason."""

import io
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tiny import some_rows, write_rows

from softprompt.data import Loaded, Message, held_of, json_array, load_examples
from softprompt.errors import DataError

PAIR = {"prompt": "say hi", "completion": "hi"}
PAIRS = some_rows(8)


def load(path, **how):
    return load_examples(str(path), **how)


def only(tmp_path, row, **how):
    """The single example of a file with this row."""
    loaded = load(write_rows(tmp_path / "one.jsonl", [row]), **how)
    assert loaded.rejected == ()
    return loaded.examples[0]


def hold_out(loaded, fraction, seed):
    """(training rows, held-out rows)."""
    sides = list(zip(loaded.examples, held_of([example.turns for example in loaded.examples], fraction, seed), strict=True))
    train, held = (tuple(example for example, side in sides if side is on) for on in (False, True))
    return Loaded(train, loaded.rejected, loaded.notes), Loaded(held, ())


def answers(loaded):
    return [example.response for example in loaded.examples]


# ---- shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "question"), [("水", "translate\n水"), ("", "translate")])
def test_instruction_and_input_make_the_question(tmp_path, given, question):
    example = only(tmp_path, {"instruction": "translate", "input": given, "output": "water"})
    assert example.messages == (Message("user", question), Message("assistant", "water"))
    assert example.fields == {"instruction": "translate", "input": given, "output": "water", "prompt": question.strip()}


def test_input_may_be_left_out(tmp_path):
    row = {"instruction": "greet", "output": "hi"}
    assert only(tmp_path, row).messages == only(tmp_path, row | {"input": ""}).messages


def test_prompt_and_completion_are_kept_to_the_space(tmp_path):
    assert only(tmp_path, {"prompt": " a ", "completion": " b\n"}).messages == (Message("user", " a "), Message("assistant", " b\n"))


def test_messages_keep_system_and_all_turns(tmp_path):
    turns = [("system", "be brief"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    example = only(tmp_path, {"messages": [{"role": role, "content": content} for role, content in turns]})
    assert example.messages == tuple(Message(*turn) for turn in turns)
    assert (example.response, example.fields["prompt"]) == ("d", "c")


@pytest.mark.parametrize(
    ("label", "words", "word"),
    [(0, {"0": "bad", "1": "good"}, "bad"), ("1", {"0": "bad", "1": "good"}, "good"), (7, None, "7"), ("spam", None, "spam")],
)
def test_a_label_becomes_its_word(tmp_path, label, words, word):
    example = only(tmp_path, {"text": "meh", "label": label}, label_words=words)
    assert (example.messages[0].content, example.response, example.label) == ("meh", word, word)


def test_labels_are_listed_in_order_of_appearance(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "x", "label": label} for label in ("b", "a", "b", "c")])
    assert load(path).labels == ("b", "a", "c")


# ---- places --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["array.json", "lines.json", "a.jsonl", "a.csv", "a.parquet", "saved", "splits", "splits:train"])
def source(request, tmp_path):
    """The same eight rows in every kind of place."""
    path = tmp_path / request.param.partition(":")[0]
    if path.name == "array.json":
        path.write_text(json.dumps(PAIRS, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        path.write_text("prompt,completion\n" + "".join(f'"{row["prompt"]}",{row["completion"]}\n' for row in PAIRS), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), path)
    elif path.suffix:
        write_rows(path, PAIRS)
    elif path.name == "saved":
        datasets.Dataset.from_list(PAIRS).save_to_disk(path)
    else:
        both = {"train": datasets.Dataset.from_list(PAIRS), "test": datasets.Dataset.from_list([PAIR])}
        datasets.DatasetDict(both).save_to_disk(path)
    return str(tmp_path / request.param)


def test_every_place_gives_the_same_rows(source, tmp_path):
    assert load(source).fingerprint == load(write_rows(tmp_path / "expected.jsonl", PAIRS)).fingerprint


@pytest.mark.parametrize(("cut", "kept"), [("[2:5]", slice(2, 5)), ("[6:]", slice(6, None)), ("[:3]", slice(3)), ("[5:99]", slice(5, 99))])
def test_a_range_takes_rows_as_python_does(source, cut, kept):
    assert answers(load(source + cut)) == [row["completion"] for row in PAIRS[kept]]


def test_a_limit_counts_rows_read(source):
    assert answers(load(source, limit=3)) == [row["completion"] for row in PAIRS[:3]]


def test_a_split_is_named_after_a_colon(tmp_path):
    datasets.DatasetDict(test=datasets.Dataset.from_list([PAIR])).save_to_disk(tmp_path / "d")
    assert answers(load(f"{tmp_path / 'd'}:test")) == ["hi"]
    with pytest.raises(DataError, match=r"has no split 'train': name one, e\.g\. .*d:test"):
        load(tmp_path / "d")


def test_a_data_set_without_splits_takes_no_split(tmp_path):
    datasets.Dataset.from_list([PAIR]).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match="has no splits: leave out :train"):
        load(f"{tmp_path / 'd'}:train")


def test_class_labels_of_a_saved_data_set_are_numbers(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features).save_to_disk(tmp_path / "d")
    assert load(tmp_path / "d", label_words={"0": "neg", "1": "pos"}).labels == ("pos", "neg")


def test_a_byte_order_mark_and_windows_line_ends_are_read_over(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\r\n" + json.dumps(PAIR).encode())
    assert [example.source for example in load(tmp_path / "a.jsonl").examples] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:3"]


def test_a_json_file_may_hold_one_object_over_several_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(PAIR, indent=2))
    assert answers(load(path)) == ["hi"]


def test_half_a_character_is_no_label(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": "\\ud800"}\n')
    (rejected,) = load(path).rejected
    assert rejected.reason.startswith("field label holds half of a surrogate pair")


@pytest.mark.parametrize("inside", ["\u2028", "\x0c", "\x85", "\n"])
def test_a_csv_cell_may_hold_any_separator(tmp_path, inside):
    cell = f"a{inside}b" if inside != "\n" else '"a\nb"'
    (tmp_path / "a.csv").write_text(f"prompt,completion\n{cell},c\n", encoding="utf-8")
    assert load(tmp_path / "a.csv").examples[0].messages[0].content == f"a{inside}b"


# ---- rejected rows -------------------------------------------------------------------------------------------------


def talk(*roles):
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"prompt": "a", ', "not valid JSON: .* (column 17)"),
        ("[" * 100_000, "not usable JSON: "),
        ("5", "a row must be an object with fields, this is int"),
        ("{}", "fields (none) fit no known shape: messages, conversations, instruction/input/output, prompt/completion, text/label"),
        ('{"a": 1, "b": 2}', "fields a, b fit no known shape"),
        ('{"prompt": "a", "completion": "\\ud800"}', "field completion holds half of a surrogate pair"),
        ({"prompt": "a"}, "field completion is missing"),
        ({"instruction": "a", "output": None}, "field output is missing"),
        ({"prompt": "a", "completion": " \n"}, "completion is empty"),
        ({"instruction": "a", "output": ""}, "output is empty"),
        ({"prompt": ["a"], "completion": "b"}, 'messages must be a list of {"role": ..., "content": ...}'),
        ({"instruction": "a", "input": 3, "output": "b"}, "field input must be text, this is int"),
        ({"messages": "hi"}, "messages must be a list of"),
        ({"messages": [{"role": "user"}]}, "field content is missing"),
        (talk(), "end with assistant (a system turn may come first); here: none"),
        (talk("user", "user", "assistant"), "turns must alternate .* here: user, user, assistant"),
        (talk("assistant", "user"), "here: assistant, user"),
        (talk("user", "assistant", "user"), "here: user, assistant, user"),
        (talk("user", "system", "user", "assistant"), "here: user, system, user, assistant"),
        ({"messages": [*talk("user")["messages"], {"role": "assistant", "content": ""}]}, "an assistant turn is empty"),
        ({"text": "a"}, "label is missing"),
        ({"text": "a", "label": True}, "label True has no word in data.label_words"),
        ({"text": "a", "label": 0.5}, "label must be text or a whole number, this is 0.5"),
        ({"text": "a", "label": 9}, "label 9 has no word in data.label_words"),
    ],
)
def test_a_row_is_rejected_with_its_line_and_the_reason(tmp_path, row, reason):
    line = row if isinstance(row, str) else json.dumps(row)
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(PAIR)}\n{line}\n{json.dumps(PAIR)}\n")
    loaded = load(path, label_words={"0": "bad"})
    assert answers(loaded) == ["hi", "hi"]
    (rejected,) = loaded.rejected
    assert rejected.source == f"{path}:2"
    for part in reason.split(" .* "):
        assert part in rejected.reason


def test_a_csv_row_of_the_wrong_width_is_rejected_with_its_line(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\na\na,b,c\n")
    rejected = [(item.source.rpartition(":")[2], item.reason) for item in load(tmp_path / "a.csv").rejected]
    assert rejected == [("3", "field completion is missing"), ("4", "more cells than the header has columns")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[\n{"prompt": "a"},\n{"prompt" "b"}\n]', r"a\.json:3: not valid JSON: .* \(column 11\)"),
        ("a.json", b"[" * 100_000, r"a\.json: not usable JSON"),
        ("a.jsonl", '{"prompt": "é"}'.encode("latin-1"), r"a\.jsonl: not UTF-8 text \(byte 12\): save it as UTF-8"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: no rows"),
        ("a.json", b"[]", r"a\.json: no rows"),
        ("a.csv", b"prompt,completion\n", r"a\.csv: no rows"),
        ("a.parquet", b"no", r"a\.parquet: not a readable Parquet file"),
        ("a.txt", b"hi", r"a\.txt: cannot read \.txt; known are \.json, \.jsonl, \.csv, \.tsv, \.parquet"),
        ("a", b"hi", "cannot read a file without ending"),
    ],
)
def test_an_unreadable_file_is_one_error_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / name)


@pytest.mark.parametrize("name", ["gone.jsonl", "gone", "gone.parquet[1:2]"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(DataError, match=r"gone.*: no such file or folder"):
        load(tmp_path / name)


def test_a_range_beyond_the_rows_is_no_rows(tmp_path):
    with pytest.raises(DataError, match=r"\[8:\]: no rows"):
        load(f"{write_rows(tmp_path / 'a.jsonl', PAIRS)}[8:]")


def test_a_folder_that_datasets_did_not_write_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a folder that datasets' save_to_disk wrote"):
        load(tmp_path)


def test_a_hub_that_does_not_answer_is_one_line(tmp_path):
    code = "from softprompt.data import load_examples, DataError\ntry: load_examples('nobody/nothing')\nexcept DataError as e: print(e)"
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    (line,) = done.stdout.splitlines()
    assert "nobody/nothing: no such file" in line
    assert "http://127.0.0.1:9" in line
    assert (done.returncode, done.stderr) == (0, "")


# ---- held-out rows -------------------------------------------------------------------------------------------------


def test_held_out_rows_are_seeded_disjoint_and_in_order(tmp_path):
    loaded = load(write_rows(tmp_path / "a.jsonl", some_rows(40, lambda n: {"prompt": f"bring tea number {n}", "completion": "tea"})))
    train, held = hold_out(loaded, 0.25, seed=1)
    assert (len(train.examples), len(held.examples)) == (30, 10)
    for part in (train, held):
        places = [loaded.examples.index(example) for example in part.examples]
        assert places == sorted(set(places))
    assert sorted(example.source for example in train.examples + held.examples) == sorted(e.source for e in loaded.examples)
    assert hold_out(loaded, 0.25, seed=1) == (train, held)
    assert hold_out(loaded, 0.25, seed=2) != (train, held)


def test_copies_of_a_row_stay_on_one_side(tmp_path):
    """Copies up to white space; without copies the same rows are held out as ever."""
    rows = some_rows(40, lambda n: {"prompt": f"bring {'  ' * (n % 3)}tea number {n % 10}", "completion": "tea"})
    for seed in range(5):
        train, held = hold_out(load(write_rows(tmp_path / "a.jsonl", rows)), 0.2, seed)
        assert len(held.examples) == 8, "two rows with their four copies each"
        assert len(train.examples) == 32
        assert not {example.turns for example in train.examples} & {example.turns for example in held.examples}
    single = load(write_rows(tmp_path / "b.jsonl", rows[:10]))
    chosen = random.Random(3).sample(range(10), 2)
    assert [
        int(example.response == "tea") and single.examples.index(example) for example in hold_out(single, 0.2, 3)[1].examples
    ] == sorted(chosen)


def test_at_least_one_row_is_held_out_and_one_stays(tmp_path):
    loaded = load(write_rows(tmp_path / "a.jsonl", PAIRS[:2]))
    assert [len(part.examples) for part in hold_out(loaded, 0.01, seed=0)] == [1, 1]
    with pytest.raises(DataError, match=r"eval_fraction = 0\.9 of 2 different rows leaves nothing to train on"):
        hold_out(loaded, 0.9, seed=0)


# ---- arrays of any length ------------------------------------------------------------------------------------------


VALUES = [{"a": 'b, ] \\ " \n 水'}, [1, [2.5e-3, -7]], 12345, "x]", True, None, {}, [], {"deep": [{"er": "y" * 50}]}, "\u2028", False]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 10_000])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_as_json_reads_it_however_it_is_cut(tmp_path, monkeypatch, piece, indent):
    monkeypatch.setattr(json_array, "PIECE", piece)
    for values in (VALUES, VALUES[::-1], [], [7], [[]]):
        for text in (json.dumps(values, indent=indent), f" \n{json.dumps(values, ensure_ascii=False, indent=indent)}\n\n"):
            assert list(json_array.elements(Path("a.json"), io.StringIO(text))) == values


@pytest.mark.parametrize("piece", [1, 5, 10_000])
@pytest.mark.parametrize(
    "text", ["[1, 2", "[1 2]", "[", "[1,]", '[{"a": tru}]', '[{"a": "b}]\n', "[1]\n x", '[\n1,\n{"a" 2},\n3]', "[\n\n 1,\n 2, ,]"]
)
def test_a_wrong_array_is_said_with_the_place_that_json_says(monkeypatch, piece, text):
    monkeypatch.setattr(json_array, "PIECE", piece)
    with pytest.raises(json.JSONDecodeError) as wanted:
        json.loads(text)
    with pytest.raises(DataError) as caught:
        list(json_array.elements(Path("a.json"), io.StringIO(text)))
    found = re.fullmatch(r"a\.json:(\d+): not valid JSON: .* \(column (\d+)\)", str(caught.value))
    assert found
    assert (int(found[1]), abs(int(found[2]) - wanted.value.colno) <= 1) == (wanted.value.lineno, True)


def test_of_a_long_array_little_is_in_memory(monkeypatch):
    """No more than a few pieces are asked for before the first rows are there, and a mistake in front is said at once."""
    monkeypatch.setattr(json_array, "PIECE", 1000)
    file = io.StringIO(json.dumps([{"prompt": "a" * 90}] * 10_000))
    rows = json_array.elements(Path("a.json"), file)
    assert [next(rows) for _ in range(5)] == [{"prompt": "a" * 90}] * 5
    assert file.tell() <= 1000
    wrong = io.StringIO('[{"a" 1}, ' + "1, " * 100_000 + "2]")
    with pytest.raises(DataError, match=r"a\.json:1: not valid JSON"):
        next(json_array.elements(Path("a.json"), wrong))
    assert wrong.tell() <= 1000
