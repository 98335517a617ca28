"""A file of questions becomes a file of answers: whole, in order, with the rows' own fields, the same bytes whoever was killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import softprompt
from softprompt import answering
from softprompt.answering import Answered
from softprompt.data import Questions
from softprompt.data import files as data_files
from softprompt.errors import DataError
from softprompt.screen.prompts import follow_answers

WORDS = ("model.device=cpu", "--max-new-tokens=4")


@pytest.fixture
def trained(make_config, tmp_path):
    list(softprompt.train(make_config("train.steps=1")))
    return tmp_path / "run"


@pytest.fixture
def generate(trained, monkeypatch, capsys):
    """generate(--in, ...): (exit code, what was said on standard error)."""

    def call(*words, prompt=trained):
        monkeypatch.setattr("sys.argv", [str(word) for word in ("softprompt", "generate", prompt, *WORDS, *words)])
        code = 0
        try:
            from softprompt import cli

            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, capsys.readouterr().err

    return call


def read(file):
    return [json.loads(line) for line in file.read_bytes().decode().split("\n")[:-1]]


def alone(trained, texts):
    """What `generate` answers to each text by itself."""
    card = json.loads((trained / "prompt" / "card.json").read_text())
    base = softprompt.load_base(softprompt.load_config({"model": {"name": card["base"]["name"], "device": "cpu"}}).model)
    stored = softprompt.load_prompt(trained, base)
    return [softprompt.generate(base, stored, [text], softprompt.Sampling(4))[0] for text in texts]


TEXTS = ["bring tea", "bring 水 now please", "coffee", "x" * 600, "milk"]


def test_answers_are_those_of_single_texts_and_go_on(generate, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "WINDOW", 2)
    file, out = tmp_path / "texts.txt", tmp_path / "answers.jsonl"
    file.write_text("\n\n".join(TEXTS) + "\n", encoding="utf-8")
    code, error = generate("--in", file, "--out", out, "--resume")
    rows, whole = read(out), out.read_bytes()
    assert code == 0
    assert "0 of 5 answered" in error
    assert "5 of 5 answered" in error
    assert f"  {file}:7: a text with its prompt takes" in error
    assert error.endswith(f"1 of 5 could not be answered: their lines in {out} have error\n")
    assert [row["text"] for row in rows] == TEXTS
    assert [list(row) for row in rows] == [["text", "answer"]] * 3 + [["text", "answer", "error"]] + [["text", "answer"]]
    assert rows[3]["answer"] is None
    assert "shorten the text" in rows[3]["error"]
    assert [row["answer"] for row in rows if row["answer"] is not None] == alone(trained, [text for text in TEXTS if len(text) < 500])
    assert not (tmp_path / "answers.jsonl.parts").exists()

    code, error = generate("--in", file, "--out", out, "--resume")
    assert code == 0
    assert error.startswith(f"{out} is finished: 5 answers\n")
    first, second = whole.splitlines(keepends=True)[:2]
    out.write_bytes(first + second[:-7])
    code, error = generate("--in", file, "--out", out)
    assert (code, out.read_bytes()) == (2, first + second[:-7])
    assert "exists and has 1 answers: --resume goes on with it" in error
    code, error = generate("--in", file, "--out", out, "--resume")
    assert code == 0
    assert error.startswith("1 of 5 answered")
    assert out.read_bytes() == whole


@pytest.mark.parametrize("words", [("--temperature=1.5", "--seed=3"), ("model.dtype=bfloat16",)])
def test_sampled_and_rounded_answers_go_on_as_they_were(generate, tmp_path, monkeypatch, words):
    """A window that was begun is made again as a whole: what shares a batch with a row is the same as before."""
    monkeypatch.setattr(answering, "WINDOW", 4)
    file, out = tiny.write_rows(tmp_path / "a.jsonl", tiny.some_rows(11)), tmp_path / "out.jsonl"
    assert generate("--in", file, "--out", out, *words)[0] == 0
    whole = out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:6]))
    assert generate("--in", file, "--out", out, "--resume", *words)[1].startswith("6 of 11 answered")
    assert out.read_bytes() == whole


def test_only_the_same_command_goes_on(generate, tmp_path):
    file, out = tmp_path / "texts.txt", tmp_path / "answers.jsonl"
    file.write_text("bring tea\n")
    assert generate("--in", file, "--out", out)[0] == 0
    whole = out.read_bytes()
    for words in (
        ("--temperature=1",),
        ("--system=Be kind.",),
        ("--answer-field=said",),
        ("data.columns.prompt=text",),
        ("model.dtype=bfloat16",),
    ):
        code, error = generate("--in", file, "--out", out, "--resume", *words)
        assert code == 2
        assert "was begun with another" in error
        assert error.count("\n") == 1
    file.write_text("changed\n")
    code, error = generate("--in", file, "--out", out, "--resume")
    assert code == 2
    assert "another questions" in error
    assert out.read_bytes() == whole
    out.unlink()
    assert generate("--in", file, "--out", out)[0] == 0, "a file that was removed is begun anew"
    assert read(out)[0]["text"] == "changed"


HALVES = [("--in=a.txt",), ("--out=a.jsonl",), ("--in=a.txt", "--out=b.jsonl", "text"), ("--resume", "text"), ("--answer-field=a", "text")]


@pytest.mark.parametrize("words", [*HALVES, ("--in=a.txt", "--out=b.jsonl", "--with=run")])
def test_half_of_a_command_is_refused(generate, words):
    code, error = generate(*words)
    assert code == 2
    assert "go together" in error


def test_the_answers_of_somebody_else_stay(generate, tmp_path):
    (tmp_path / "a.txt").write_text("q\n")
    (tmp_path / "b.jsonl").write_text("mine\n")
    for words in ((), ("--resume",)):
        code, error = generate("--in", tmp_path / "a.txt", "--out", tmp_path / "b.jsonl", *words)
        assert code == 2
        assert "choose another file" in error
    assert (tmp_path / "b.jsonl").read_text() == "mine\n"


# ---- rows ----------------------------------------------------------------------------------------------------------

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
    found, unusable = Questions(str(file), columns).part(0, 2)
    assert [(message.role, message.content) for message in found.turns] == turns
    assert (found.fields, found.place) == (row, f"{file}:1")
    assert not unusable.turns
    assert unusable.place == f"{file}:2"


def write_as(rows, path):
    """The same rows as a file of any kind."""
    import pandas

    frame = pandas.DataFrame(rows)
    match path.suffix:
        case ".jsonl":
            tiny.write_rows(path, rows)
        case ".json":
            path.write_text(json.dumps(rows))
        case ".csv":
            frame.to_csv(path, index=False)
        case ".parquet":
            frame.to_parquet(path, index=False)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_row_keeps_its_fields_in_every_kind_of_file(generate, tmp_path, name):
    rows = [{"id": f"n{number}", "prompt": text, "number": "7"} for number, text in enumerate(["bring tea", "coffee 水"])]
    assert generate("--in", write_as(rows, tmp_path / name), "--out", tmp_path / "out.jsonl")[0] == 0
    found = read(tmp_path / "out.jsonl")
    assert [{key: row[key] for key in ("id", "prompt", "number")} for row in found] == rows
    assert [list(row) for row in found] == [["id", "prompt", "number", "answer"]] * 2


def test_what_json_does_not_know_is_text(generate, tmp_path):
    import datetime

    import pyarrow
    import pyarrow.parquet

    columns = {"prompt": ["bring tea"], "when": [datetime.date(2026, 1, 2)], "raw": [b"x"], "score": [float("nan")], "in": [[1.5, None]]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert generate("--in", tmp_path / "a.parquet", "--out", tmp_path / "out.jsonl")[0] == 0
    (row,) = read(tmp_path / "out.jsonl")
    del row["answer"]
    assert row == {"prompt": "bring tea", "when": "2026-01-02", "raw": "b'x'", "score": "nan", "in": [1.5, None]}
    (tmp_path / "b.jsonl").write_text('{"prompt": "tea", "broken": "\\ud800"}\n')
    assert generate("--in", tmp_path / "b.jsonl", "--out", tmp_path / "half.jsonl")[0] == 0
    assert read(tmp_path / "half.jsonl")[0]["broken"] == "\ud800"


@pytest.mark.parametrize("taken", ["answer", "error"])
def test_no_field_of_a_row_is_overwritten(generate, tmp_path, taken):
    file = tiny.write_rows(tmp_path / "a.jsonl", [{"prompt": "tea"}, {"prompt": "bring tea", taken: "mine"}, {"prompt": ""}])
    out = tmp_path / "out.jsonl"
    code, error = generate("--in", file, "--out", out)
    assert code == 2
    assert f"a.jsonl:2: the row has a field {taken} of its own: name the answer's with --answer-field" in error
    assert not out.exists()
    assert generate("--in", file, "--out", out, "--answer-field", "said")[0] == 0
    assert [list(row) for row in read(out)] == [["prompt", "said"], ["prompt", taken, "said"], ["prompt", "said", "said_error"]]
    assert read(out)[1][taken] == "mine"


def test_bad_rows_do_not_end_it(generate, tmp_path):
    lines = ['{"prompt": "tea"}', '{"prompt": ', "[1]", '{"prompt": 3, "id": 7}', '{"prompt": "  "}', '{"other": 1}', '{"prompt": "milk"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    code, error = generate("--in", tmp_path / "a.jsonl", "--out", tmp_path / "out.jsonl")
    rows = read(tmp_path / "out.jsonl")
    assert code == 0
    assert ["error" in row for row in rows] == [False, True, True, True, True, True, False]
    assert [row["answer"] is None for row in rows] == ["error" in row for row in rows]
    for number, row in enumerate(rows, 1):
        assert row.get("error", f"{tmp_path}/a.jsonl:{number}: ").startswith(f"{tmp_path}/a.jsonl:{number}: ")
    assert [row["row"] for row in rows[1:3]] == [f"{tmp_path}/a.jsonl:{number}" for number in (2, 3)]
    assert rows[3]["id"] == 7
    assert "5 of 7 could not be answered" in error
    assert error.count("a.jsonl:") == 3, "the first three are named"


def test_prompts_that_answer_together_answer_a_file(generate, make_config, tmp_path):
    list(softprompt.train(make_config("train.steps=1", "prompt.count=2", "prompt.init=random", f"train.out={tmp_path / 'bank'}")))
    (tmp_path / "a.txt").write_text("bring tea\nbring milk\n")
    out = tmp_path / "out.jsonl"
    assert generate("--in", tmp_path / "a.txt", "--out", out, "--ensemble=mean", prompt=tmp_path / "bank")[0] == 0
    base = softprompt.load_base(make_config().model)
    both = softprompt.Ensemble(tuple(softprompt.load_prompt(path, base) for path in sorted((tmp_path / "bank").glob("prompts/*"))))
    assert [row["answer"] for row in read(out)] == softprompt.generate(base, both, ["bring tea", "bring milk"], softprompt.Sampling(4))


def test_rows_are_read_as_they_are_needed(generate, tmp_path, monkeypatch):
    """Of a file of 40 rows no more than a window is read before the first answers are written."""
    monkeypatch.setattr(answering, "WINDOW", 8)
    file, out = tiny.write_rows(tmp_path / "a.jsonl", tiny.some_rows(40)), tmp_path / "out.jsonl"
    whole, passes, written = data_files.READERS[".jsonl"], [], []

    def counting(path):
        passes.append(0)
        for item in whole(path):
            passes[-1] += 1
            yield item

    append = answering.Shared._append

    def appending(self, lines):
        written.append((len(passes), passes[-1], self.num_lines + len(lines)))
        append(self, lines)

    monkeypatch.setitem(data_files.READERS, ".jsonl", counting)
    monkeypatch.setattr(answering.Shared, "_append", appending)
    assert generate("--in", file, "--out", out)[0] == 0
    assert len(read(out)) == 40
    assert {number for number, _, _ in written} == {2}, "one pass that counts the rows, one that answers them"
    assert all(read <= 8 * -(-lines // 8) for _, read, lines in written if lines % 8)
    assert written[0][1] <= 8


def test_a_file_that_changes_meanwhile_is_said(tmp_path):
    questions = Questions(str(tiny.write_rows(tmp_path / "a.jsonl", tiny.some_rows(3))), {})
    assert questions.survey([]).num_rows == 3
    with pytest.raises(DataError, match="has changed"):
        questions.part(0, 4)
    assert [row.place.rpartition(":")[2] for start in (2, 0) for row in questions.part(start, 3)] == ["3", "1", "2", "3"]


def test_the_screen_says_where_it_stands(capsys):
    states = [Answered(done, 4) for done in (1, 2, 4, 4)]
    follow_answers(states, Path("out"), every=0)
    first, second, last = capsys.readouterr().err.splitlines()
    assert (first, last) == ("1 of 4 answered", "4 of 4 answered")
    assert second.startswith("2 of 4 answered, 0:00:0")
    follow_answers(states, Path("out"), every=1e9)
    assert capsys.readouterr().err.splitlines() == ["1 of 4 answered", "4 of 4 answered"]


def test_ctrl_c_says_how_to_go_on(generate, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(answering, "_lines", interrupted)
    (tmp_path / "a.txt").write_text("q\n")
    code, error = generate("--in", tmp_path / "a.txt", "--out", tmp_path / "out.jsonl")
    assert code == 130
    assert error.endswith("stopped; the same command goes on with --resume\n")


# ---- processes that are killed, or that share a file -----------------------------------------------------------------


def test_a_window_waits_for_its_turn_and_none_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "WINDOW", 4)
    lines = [f"{number}\n".encode() for number in range(10)]
    out = tmp_path / "out"
    first, second = (answering.Shared(out, 10) for _ in range(2))
    first.begin({"a": 1})
    second.begin({"a": 1})
    second.put(1, lines[4:7])
    second.put(1, lines[4:8])
    second.put(2, lines[8:])
    assert (out.read_bytes(), first.missing(), first.num_done()) == (b"", [0], 6)
    first.put(0, lines[:3])
    assert (second.missing(), second.num_done()) == ([0], 9)
    first.put(0, lines[:4])
    with out.open("ab") as file:
        file.write(b"4\n5\n6")  # a process that puts the next window behind it is killed
    anew = answering.Shared(out, 10)
    assert (anew.missing(), out.read_bytes()) == ([], b"".join(lines))
    assert not list(anew.folder.glob("*.jsonl"))
    for stale in (first, second, anew):
        assert (stale.missing(), stale.num_done()) == ([], 10)
    out.unlink()
    (anew.folder / "1.jsonl").write_bytes(b"stale\n")
    fresh = answering.Shared(out, 10)
    fresh.begin({"a": 2})
    assert fresh.missing() == [0, 1, 2], "what waits is of a file that somebody has removed"


FORKS = '''
import json, os, signal, sys, time
from pathlib import Path
import torch
import transformers.models.llama.modeling_llama  # once for all of them; what torch has begun would not outlive a fork
torch.set_num_threads(1)
from softprompt import answering, artifact, cli, generation
from softprompt.engine import loading
answering.WINDOW = 16
answering.PATIENCE = 0.01
words, jobs = json.loads(sys.argv[1]), json.loads(sys.argv[2])
append, window = answering.Shared._append, answering._answer_window

def start(job):
    """A process that answers, and dies by kill -9 as it writes line number `dies`, half of it, or as it begins a window."""
    child = os.fork()
    if child:
        return child
    def appending(self, lines):
        if job.get("dies", 1e9) <= self.num_lines + len(lines):
            content = b"".join(lines)
            with self.out.open("ab") as file:
                file.write(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, lines)
    def beginning(task, shared, number):
        met = shared.out.with_suffix(".met")
        met.mkdir(exist_ok=True)
        (met / str(os.getpid())).touch()
        while len(list(met.iterdir())) < job.get("meets", 1):
            time.sleep(0.001)
        if job.get("dies_at_once"):
            os.kill(os.getpid(), signal.SIGKILL)
        yield from window(task, shared, number)
    answering.Shared._append, answering._answer_window = appending, beginning
    sys.argv = ["softprompt", *words, "--resume", "--out", job["out"]]
    code = 1
    try:
        code = cli.main() or 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stderr.flush()
        os._exit(code)

ends = []
for together in jobs:
    ends.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in [start(job) for job in together]])
print(json.dumps(ends))
'''


@pytest.fixture
def forked(trained, tmp_path):
    """forked(jobs): how the processes of every job ended."""
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [*tiny.some_rows(150), {"other": 1}, *tiny.some_rows(149)])

    def run(*jobs):
        words = ["generate", str(trained), *WORDS, "--in", str(rows)]
        command = [sys.executable, "-c", FORKS, json.dumps(words), json.dumps(jobs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        print(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_kill_9_at_20_moments_changes_no_byte(forked, tmp_path):
    moments = [1, 2, 15, 16, 17, 31, 33, 64, 65, 80, 100, 128, 129, 150, 151, 200, 240, 256, 290, 300]
    straight, killed = tmp_path / "straight.jsonl", tmp_path / "killed.jsonl"
    whole = [{"out": str(out)} for out in (straight, killed)]
    ends = forked(whole[:1], *([{**whole[1], "dies": moment}] for moment in moments), whole[1:])
    assert ends == [[0], *[[-9]] * 20, [0]], "every one but the first and the last was killed"
    assert killed.read_bytes() == straight.read_bytes()
    assert len(read(killed)) == 300
    assert sum("error" in row for row in read(killed)) == 1
    assert len({row["answer"] for row in read(killed)}) > 3


def test_processes_that_share_a_file_write_what_one_writes(forked, tmp_path):
    """Each has a window before any answers its own, so that all take part; then one of three is killed with a window of its own."""
    straight, shared, taken = ({"out": str(tmp_path / f"{name}.jsonl")} for name in ("straight", "shared", "taken"))
    killed = {**taken, "meets": 3, "dies_at_once": True}
    ends = forked([straight], [{**shared, "meets": 3}] * 3, [{**taken, "meets": 3}, killed, {**taken, "meets": 3}])
    assert ends == [[0], [0, 0, 0], [0, -9, 0]]
    expected = Path(straight["out"]).read_bytes()
    for one in (shared, taken):
        assert Path(one["out"]).read_bytes() == expected
        assert len(list(Path(one["out"]).with_suffix(".met").iterdir())) == 3
    assert not list(tmp_path.glob("*.parts"))
