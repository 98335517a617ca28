"""Files as people have them: each gives rows, or one sentence that says what to do."""

import csv
import gzip
import io
import json

import pytest
import tiny

from softprompt import cli
from softprompt.config import load_config
from softprompt.data import load_examples
from softprompt.encode import make_encoder
from softprompt.errors import ConfigError, DataError
from softprompt.runlog import RunFolder
from softprompt.training import train

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARE = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
MNLI = {"prompt": "premise ~ ' / ' ~ hypothesis", "completion": "label"}


def said(loaded):
    return [[(message.role, message.content) for message in example.messages] for example in loaded.examples]


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


QA = [("user", "q"), ("assistant", "a")]
ROWS = {
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, {}, [("user", "q"), ("assistant", "a")]),
    "alpaca with history": (
        {"instruction": "q", "output": "a", "system": "s", "history": [["q1", "a1"]]},
        {},
        [("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q"), ("assistant", "a")],
    ),
    "sharegpt": (SHARE, {}, QA),
    "sharegpt with system": ({**SHARE, "system": "s"}, {}, [("system", "s"), *QA]),
    "belle": ({"id": "1", "conversations": [{"from": "human", "value": "q"}, {"from": "assistant", "value": "a"}]}, {}, QA),
    "openai": ({"messages": TURNS}, {}, QA),
    "openai parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, TURNS[1]]}, {}, QA),
    "trl turns": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, {}, QA),
    "firefly": ({"kind": "NLI", "input": "q", "target": "a"}, {"prompt": "input", "completion": "target"}, QA),
    "dolly": ({"instruction": "q", "context": "", "response": "a"}, {"prompt": "instruction", "completion": "response"}, QA),
    "question": ({"question": "q", "answer": "a"}, {"prompt": "question", "completion": "answer"}, QA),
    "squad": ({"question": "q", "answers": {"text": ["a"]}}, {"prompt": "question", "completion": "answers.text[0]"}, QA),
    "sst2": ({"sentence": "q", "label": "pos "}, {"text": "sentence"}, [("user", "q"), ("assistant", "pos")]),
    "mnli": ({"premise": "p", "hypothesis": "h", "label": 1}, MNLI, [("user", "p / h"), ("assistant", "1")]),
    "labels 1.0": ({"text": "q", "label": 1.0}, {}, [("user", "q"), ("assistant", "1")]),
    "labels true": ({"text": "q", "label": True}, {}, [("user", "q"), ("assistant", "true")]),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_shape_gives_its_turns(name, tmp_path):
    row, columns, expected = ROWS[name]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(row))
    loaded = load_examples(str(file), columns=columns)
    assert (said(loaded), loaded.rejected, loaded.notes) == ([expected], (), ())
    if columns:
        assert set(row) <= set(loaded.examples[0].fields)


REJECTED = {
    "tool call at the end": ({"messages": [TURNS[0], {**TURNS[1], "tool_calls": [{"id": 1}]}]}, {}, "its last answer calls a tool"),
    "call without its answer": ({"messages": [TURNS[0], {**TURNS[1], "tool_calls": [{}]}, *TURNS]}, {}, "turns of tools behind calls"),
    "old form of calls": ({"messages": [TURNS[0], {**TURNS[1], "function_call": {"name": "f"}}]}, {}, "old form of tool_calls"),
    "half a character": ({"messages": TURNS, "tools": '["\\ud800"]'}, {}, "half of a surrogate pair"),
    "tools as words": ({"messages": TURNS, "tools": "a hammer"}, {}, "tools must be a list"),
    "weight": ({"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}, {}, "all its answers have weight 0"),
    "half a weight": ({"messages": [TURNS[0], {**TURNS[1], "weight": 0.5}]}, {}, "weight 0.5"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TURNS[1]]}, {}, "part of type image_url"),
    "misspelt column": ({"question": "q", "answer": "a"}, {"prompt": "qestion"}, "no column qestion: did you mean question"),
    "unknown name": ({"question": "q"}, {"prompt": "'a' ~ nothing", "completion": "question"}, "'nothing' is undefined"),
    "other columns": ({"foo": "q"}, {}, "name them in data.columns"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_a_row_that_cannot_be_used_says_why(name, tmp_path):
    row, columns, reason = REJECTED[name]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(row))
    (rejected,) = load_examples(str(file), columns=columns).rejected
    assert reason in rejected.reason


@pytest.mark.parametrize("column", ["system", "rejected", "tools"])
def test_a_column_with_a_meaning_that_is_not_read_is_noted(column, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines({"text": "q", "label": "a", column: "x"}))
    assert load_examples(str(file)).notes == (f"column {column} of 1 row is not used",)


def table(delimiter, rows):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([["prompt", "completion"], *rows])
    return text.getvalue()


CHINESE = [["今天天气怎么样，适合出门吗", "很好，请放心出门"]]
FILES = {
    "a.tsv": table("\t", CHINESE).encode(),
    "semicolons.csv": table(";", CHINESE).encode(),
    "gbk.csv": table(";", CHINESE).encode("gbk"),
    "utf16.tsv": table("\t", CHINESE).encode("utf-16"),
    "a.csv.gz": gzip.compress(table(",", CHINESE).encode()),
    "a.jsonl.gz": gzip.compress(lines(dict(zip(["prompt", "completion"], CHINESE[0], strict=True)))),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_its_rows(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    loaded = load_examples(str(tmp_path / name))
    assert [[text for _, text in turns] for turns in said(loaded)] == CHINESE
    assert bool(loaded.notes) == (name == "gbk.csv")


def test_zst_patterns_and_addresses(tmp_path):
    import fsspec
    import pyarrow

    content = lines({"prompt": "q", "completion": "a"})
    with pyarrow.output_stream(str(tmp_path / "1.jsonl.zst"), compression="zstd") as file:
        file.write(content)
    (tmp_path / "2.jsonl").write_bytes(content * 2)
    assert len(load_examples(f"{tmp_path}/*.jsonl*").examples) == 3
    assert len(load_examples(f"{tmp_path}/*.jsonl*[1:3]").examples) == 2
    with fsspec.open("memory://rows/a.jsonl", "wb") as file:
        file.write(content)
    loaded = load_examples("memory://rows/a.jsonl")
    assert [example.source for example in loaded.examples] == ["memory://rows/a.jsonl:1"]
    with pytest.raises(DataError, match="memory://rows/b"):
        load_examples("memory://rows/b.jsonl")


def test_latin_1_is_not_taken_for_chinese(tmp_path):
    (tmp_path / "a.csv").write_bytes("prompt,completion\nété,préféré déjà\n".encode("latin-1"))
    with pytest.raises(DataError, match="save it as UTF-8"):
        load_examples(str(tmp_path / "a.csv"))


def test_a_bad_line_and_a_long_cell_do_not_lose_the_file(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion\nq,a\n"b"c,d\nq,' + "a" * 200_000 + "\n", encoding="utf-8")
    loaded = load_examples(str(tmp_path / "a.csv"))
    assert [len(example.response) for example in loaded.examples] == [1, 200_000]
    (rejected,) = loaded.rejected
    assert rejected.source.endswith("a.csv:3")


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ('q1,a\nq2,"open\nq3,a\nq4,a\n', ["q1", "q3", "q4"], [3]),
        ('q1,a\n\nq2,"open\nq3,"a"\nq4,"open\nq5,a\n', ["q1", "q3", "q5"], [4, 6]),
        ('q1,"two\nlines"\nq2,"open\n', ["q1"], [4]),
    ],
)
def test_an_open_quote_does_not_swallow_the_rest_of_a_file(text, good, bad, tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\n" + text, encoding="utf-8")
    loaded = load_examples(str(tmp_path / "a.csv"))
    assert [example.messages[0].content for example in loaded.examples] == good
    assert [int(item.source.rpartition(":")[2]) for item in loaded.rejected] == bad
    assert all("not valid CSV" in item.reason for item in loaded.rejected)


def test_an_open_quote_in_the_header_is_one_sentence(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,"completion\nq,a\n', encoding="utf-8")
    with pytest.raises(DataError, match="header is not valid CSV"):
        load_examples(str(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [({}, ["negative", "positive"]), ({"0": "bad", "1": "good"}, ["bad", "good"]), ({"negative": "N", "positive": "P"}, ["N", "P"])],
)
def test_numbers_of_classes_are_their_names(words, expected, tmp_path):
    import datasets

    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])})
    rows = {"sentence": ["a", "b", "c"], "label": [0, 1, -1]}
    datasets.DatasetDict({"validation": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(str(tmp_path / "sst2"))
    loaded = load_examples(f"{tmp_path}/sst2:validation", columns={"text": "sentence"}, label_words=words)
    assert [example.response for example in loaded.examples] == expected
    assert [item.reason for item in loaded.rejected] == ["label is missing"]


def test_several_files_and_a_pattern_are_one_source_from_any_folder(make_config, tmp_path, monkeypatch):
    for name, number in (("a", 3), ("b1", 4), ("b2", 5)):
        tiny.write_rows(tmp_path / f"{name}.jsonl", tiny.some_rows(number))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    sources = ("a.jsonl[1:]", "b*.jsonl")
    assert len(load_examples(sources).examples) == 11
    assert len(load_examples(list(sources), limit=3).examples) == 3
    with pytest.raises(DataError, match=r"c\.jsonl: no such file"):
        load_examples(["a.jsonl", "./c.jsonl"])
    (tmp_path / "config.toml").write_text(make_config("train.steps=2").to_toml())
    more = ('data.train=["a.jsonl[1:]", "b*.jsonl"]', 'data.eval=["a.jsonl", "b1.jsonl"]', "train.save_every=1")
    config = load_config(tmp_path / "config.toml", more)
    assert config.data.train == sources
    assert load_config({"data": {"train": list(sources)}}).data.train == sources
    tiny.stop_after(config, 1)
    monkeypatch.chdir(tmp_path / "elsewhere")
    end = list(train(RunFolder.reopen(tmp_path / "run").config(), resume=True))[-1]
    assert end.step == 2
    card = json.loads((tmp_path / "run" / "prompt" / "card.json").read_text())
    assert (card["data"]["train"], card["data"]["num_train"], card["data"]["num_eval"]) == ("a.jsonl[1:], b*.jsonl", 11, 7)


@pytest.mark.parametrize("wrong", ["data.train=[]", "data.train=[1]"])
def test_a_list_that_names_no_files_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"data\.train"):
        load_config(None, [wrong])


def weighed(tmp_path, *weights):
    turns = []
    for number, weight in enumerate(weights):
        turns += [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}", "weight": weight}]
    (example,) = load_examples(str(tiny.write_rows(tmp_path / "rows.jsonl", [{"messages": turns}]))).examples
    return example


NO_END = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.mark.parametrize("template", ["human-assistant", tiny.TURNS, NO_END])
def test_a_turn_of_weight_0_is_read_and_not_learned(template, tmp_path):
    tokenizer = tiny.chat_tokenizer(template)
    encoder = make_encoder(tokenizer, "human-assistant" if template == "human-assistant" else "chat")
    whole, part = encoder.encode(weighed(tmp_path, 1, 1, 1)), encoder.encode(weighed(tmp_path, 0, 1, 0))
    assert whole.ids[: len(part.ids)] == part.ids
    learned = [token for token, on in zip(part.ids, part.supervised, strict=True) if on]
    assert tokenizer.decode(learned) in ("a1</s>", "a1<|end|>")
    assert "a0" in tokenizer.decode(part.ids)
    assert encoder.num_unlearned(weighed(tmp_path, 0, 1, 1), encoder.encode(weighed(tmp_path, 0, 1, 1))) == 0


def test_weights_of_1_change_nothing_and_others_the_fingerprint(tmp_path):
    prints = []
    for weights in ((1, 1), (None, None), (0, 1)):
        weighed(tmp_path, *weights)
        prints.append(load_examples(str(tmp_path / "rows.jsonl")).fingerprint)
    assert prints[0] == prints[1] != prints[2]


PAIR = {"premise": "p", "hypothesis": "h", "label": 1}
SHOWN = {  # a file's name -> (its bytes, a part of the sentence, or nothing where its row is shown)
    **{f"{name}.jsonl": (lines(row), "") for name, (row, columns, _) in ROWS.items() if not columns},
    **{name: (content, "") for name, content in FILES.items()},
    "question.jsonl": (lines({"question": "q", "answer": "a"}), 'data.columns = {prompt = "question", completion = "answer"}'),
    "dolly.jsonl": (lines({"prompt": "q", "response": "a"}), 'data.columns = {prompt = "prompt", completion = "response"}'),
    "sst2.csv": (b"sentence,label\ngood,1\n", 'data.columns = {text = "sentence", label = "label"}'),
    "mnli.jsonl": (lines(PAIR), 'data.columns = {text = "{{ premise }}\\n{{ hypothesis }}", label = "label"}'),
    "numbers.jsonl": (lines({"a": 1, "b": 2}), "name them in data.columns"),
    "weights.jsonl": (lines({"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}), "all its answers have weight 0"),
    "image.jsonl": (lines({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TURNS[1]]}), "part of type image_url"),
    "list.json": (b'["a"]', "must be an object"),
    "broken.json": (b'[{"prompt": "q"', "not valid JSON"),
    "half.jsonl": (b'{"prompt": "q"\n', "not valid JSON"),
    "empty.jsonl": (b"", "no rows"),
    "latin.csv": ("prompt,completion\nété,préféré déjà\n".encode("latin-1"), "save it as UTF-8"),
    "rows.xlsx": (b"PK", "cannot read .xlsx"),
    "open.csv": (b'prompt,completion\nq,"a\n', "not valid CSV"),
    "damaged.csv.gz": (b"\x1f\x8bno", "cannot be read"),
    "damaged.parquet": (b"PAR1", "not a readable Parquet file"),
}


@pytest.mark.parametrize("name", SHOWN)
def test_show_prints_rows_or_one_sentence(name, bases, tmp_path, monkeypatch, capsys):
    content, sentence = SHOWN[name]
    (tmp_path / name).write_bytes(content)
    words = [f"model.name={bases().name}", f"data.train={tmp_path / name}", "--json", str(tmp_path / "shown.json")]
    monkeypatch.setattr("sys.argv", ["softprompt", "show", *words])
    capsys.readouterr()  # of making the base
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    output = capsys.readouterr()
    if sentence:
        assert (code, output.err.count("\n")) == (2, 1)
        assert output.err.startswith("error: ")
        assert sentence in output.err
        assert name in output.err
    else:
        assert (code, output.err) == (0, "")
        assert json.loads((tmp_path / "shown.json").read_text())["train"]["num_rows"] == 1


TOOL_ROW = {
    "tools": json.dumps([{"type": "function", "function": {"name": "weather", "parameters": {}}}]),
    "messages": [
        {"role": "user", "content": "Oslo?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "</s>Oslo"}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
    ],
}
WRITES_TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|turn|>{{ m.role }}:{{ m.content }}"
    "{% for call in m.tool_calls or [] %}({{ call.function.name }} {{ call.function.arguments | tojson }}){% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant:{% endif %}"
)


def test_calls_and_turns_of_tools_are_written_by_the_chat_template(tmp_path):
    loaded = load_examples(str(tiny.write_rows(tmp_path / "rows.jsonl", [TOOL_ROW])))
    assert (loaded.rejected, loaded.notes) == ((), ())
    encoder = make_encoder(tiny.chat_tokenizer(WRITES_TOOLS), "chat")
    row = encoder.encode(loaded.examples[0])
    text = "".join(encoder.tokenizer.decode([token]) for token in row.ids)
    expected = encoder.tokenizer.apply_chat_template(
        [
            *TOOL_ROW["messages"][:1],
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "</s>Oslo"}}}]},
            *TOOL_ROW["messages"][2:],
        ],
        tools=json.loads(TOOL_ROW["tools"]),
        tokenize=False,
    )
    assert text == expected
    assert tiny.EOS not in row.ids
    learned = encoder.tokenizer.decode([token for token, on in zip(row.ids, row.supervised, strict=True) if on])
    assert learned == '(weather {"city": "</s>Oslo"})<|end|>Rain.<|end|>'


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (tiny.TURNS, "does not write the tools"),
        (WRITES_TOOLS.replace("m.tool_calls or []", "[]"), "does not write the calls of tools"),
        (WRITES_TOOLS.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}"), "does not write the turns of tools"),
        ("human-assistant", "only a chat template"),
        ("{{ prompt }}", "only a chat template"),
    ],
)
def test_a_template_that_leaves_out_tools_rejects_the_row(template, reason, tmp_path):
    (example,) = load_examples(str(tiny.write_rows(tmp_path / "rows.jsonl", [TOOL_ROW]))).examples
    encoder = make_encoder(tiny.chat_tokenizer(tiny.TURNS), template)
    with pytest.raises(DataError, match=reason):
        encoder.encode(example)
