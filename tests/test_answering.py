"""A file of questions becomes a file of answers, whole, in order, and only once."""

import json

import pytest
import tiny

import softprompt
from softprompt import answering
from softprompt.data import load_questions


@pytest.fixture
def trained(make_config, tmp_path):
    config = make_config("train.steps=1")
    list(softprompt.train(config))
    return tmp_path / "run"


@pytest.fixture
def generate(trained, monkeypatch, capsys):
    def call(*words):
        words = ["softprompt", "generate", trained, "model.device=cpu", "--max-new-tokens=4", *words]
        monkeypatch.setattr("sys.argv", [str(word) for word in words])
        code = 0
        try:
            from softprompt import cli

            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, capsys.readouterr().err

    return call


def read(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


TEXTS = ["bring tea", "bring 水 now please", "coffee", "x" * 600, "milk"]


def test_answers_are_those_of_single_texts_and_go_on(generate, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "GROUP", 2)
    file, out = tmp_path / "texts.txt", tmp_path / "answers.jsonl"
    file.write_text("\n\n".join(TEXTS) + "\n", encoding="utf-8")
    code, error = generate("--file", file, "--out", out)
    rows, whole = read(out), out.read_bytes()
    assert code == 0
    assert "5 of 5 answered" in error
    assert "1 could not be answered" in error
    assert [(row["number"], row["text"]) for row in rows] == list(enumerate(TEXTS))
    assert rows[3]["answer"] is None
    assert "shorten the text" in rows[3]["error"]
    card = json.loads((trained / "prompt" / "card.json").read_text())
    base = softprompt.load_base(softprompt.load_config({"model": {"name": card["base"]["name"], "device": "cpu"}}).model)
    stored = softprompt.load_prompt(trained, base)
    alone = [softprompt.generate(base, stored, [text], softprompt.Sampling(4))[0] for text in TEXTS if len(text) < 500]
    assert [row["answer"] for row in rows if row["answer"] is not None] == alone

    assert "is finished: 5 answers" in generate("--file", file, "--out", out)[1]
    first, second = whole.splitlines(keepends=True)[:2]
    out.write_bytes(first + second[:-7])
    code, error = generate("--file", file, "--out", out)
    assert code == 0
    assert error.startswith("1 of 5 answered")
    assert out.read_bytes() == whole

    for words in (("--temperature=1",), ("--system=Be kind.",)):
        code, error = generate("--file", file, "--out", out, *words)
        assert code == 2
        assert "was begun with another" in error
        assert error.count("\n") == 1
    file.write_text("changed\n")
    code, error = generate("--file", file, "--out", out)
    assert code == 2
    assert "another file" in error
    assert out.read_bytes() == whole


@pytest.mark.parametrize("words", [("--file=a.txt",), ("--out=a.jsonl",), ("--file=a.txt", "--out=b.jsonl", "text")])
def test_half_of_a_command_is_refused(generate, words):
    code, error = generate(*words)
    assert code == 2
    assert "go together" in error


def test_the_answers_of_somebody_else_stay(generate, tmp_path):
    (tmp_path / "a.txt").write_text("q\n")
    (tmp_path / "b.jsonl").write_text("mine\n")
    code, error = generate("--file", tmp_path / "a.txt", "--out", tmp_path / "b.jsonl")
    assert code == 2
    assert "choose another file" in error
    assert (tmp_path / "b.jsonl").read_text() == "mine\n"


ROWS = [
    ({"prompt": "q"}, {}, [("user", "q")]),
    ({"question": "q", "answer": "a"}, {"prompt": "question", "completion": "nothing"}, [("user", "q")]),
    ({"instruction": "q", "input": "i", "system": "s"}, {}, [("system", "s"), ("user", "q\ni")]),
    ({"text": "q", "label": 1}, {}, [("user", "q")]),
    ({"messages": [{"role": "user", "content": "q"}]}, {}, [("user", "q")]),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {}, [("user", "q")]),
]


@pytest.mark.parametrize(("row", "columns", "turns"), ROWS)
def test_the_question_of_a_row_needs_no_answer(row, columns, turns, tmp_path):
    file = tiny.write_rows(tmp_path / "rows.jsonl", [row, {"other": 1}])
    found, unusable = load_questions(str(file), columns)
    assert [(message.role, message.content) for message in found.turns] == turns
    assert not unusable.turns
    assert "rows.jsonl:2" in unusable.reason
