"""The data's report: every planted fault is found where it stands, sound rows have none, and the page is safe to open."""

import json
import random
import re
import sys
from html.parser import HTMLParser

import pytest
import tiny

from softprompt import cli
from softprompt.data import Example, Message
from softprompt.scripts import script_of
from softprompt.show import findings, show
from softprompt.show.findings import Findings, Split
from softprompt.show.page import page
from softprompt.show.words import said_of

SENTENCES = (
    "The parcel came two weeks late and the box was torn open at one side",
    "My kettle stopped working after a single day, please send another one",
    "昨天买的电水壶今天就不工作了，请尽快给我换一个新的，谢谢",
    "包裹晚到了两个星期，盒子的一边被撕开了，里面的杯子也碎了",
    "Could you tell me how to reset the clock on the small radio?",
    "请问这款小收音机的时钟怎样才能重新设置成北京时间？",
)


def examples(*pairs, file="rows.jsonl", label=None):
    rows = enumerate(pairs, 1)
    return [Example((Message("user", asked), Message("assistant", said)), f"{file}:{line}", label) for line, (asked, said) in rows]


def compare(train, held=()):
    return findings.compare(Split.of("train", train), Split.of("eval", held))


def sound():
    return [(sentence, f"{sentence[::-1]} {number}") for number, sentence in enumerate(SENTENCES)]


def test_sound_rows_have_no_findings():
    found = compare(examples(*sound()[:4]), examples(*sound()[4:], file="held.jsonl"))
    assert found == Findings((), (), (), ())


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_row_twice_is_found_whatever_its_white_space(sentence):
    again = f"  {sentence}\n".replace(" ", "\t ")
    found = compare(examples(*sound(), (sentence, "a  b"), (again, "a b ")))
    (group,) = found.duplicates
    assert (group.split, group.rows) == ("train", ("rows.jsonl:7", "rows.jsonl:8"))
    assert not found.near_duplicates, "a row is called one thing"


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_row_with_a_small_change_is_near(sentence):
    changed = sentence.replace(",", ";").replace("，", "；").replace("?", "!").replace("？", "！").replace("torn", "cut")
    assert changed != sentence
    found = compare(examples(*sound(), (changed, sound()[SENTENCES.index(sentence)][1])), examples((changed, "x"), file="held.jsonl"))
    (pair,) = found.near_duplicates
    assert (pair.split, pair.row, pair.like) == ("train", "rows.jsonl:7", f"rows.jsonl:{SENTENCES.index(sentence) + 1}")
    assert 0.7 <= pair.likeness < 1


def test_the_likeness_of_a_pair_is_its_jaccard_index():
    one, other = "the quick brown fox jumps over the lazy dog", "the quick brown fox jumped over the lazy dogs"
    pieces = [{f" {text} x "[start : start + 3] for start in range(len(text) + 2)} for text in (one, other)]
    (pair,) = compare(examples((one, "x"), (other, "x"))).near_duplicates
    assert pair.likeness == pytest.approx(len(pieces[0] & pieces[1]) / len(pieces[0] | pieces[1]), abs=1e-3)


def test_rows_of_one_template_are_not_near_for_its_sake():
    rng = random.Random(0)
    template = f"Decide whether the writer of the message is content or annoyed, as in: {SENTENCES[0]}, {SENTENCES[1]}: "
    messages = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=30)) for _ in range(40)]
    found = compare(examples(*((template + message, "yes") for message in messages), (template + messages[3] + "!", "yes")))
    (pair,) = found.near_duplicates
    assert (pair.row, pair.like) == ("rows.jsonl:41", "rows.jsonl:4")


@pytest.mark.parametrize(
    ("row", "same"),
    [
        ((SENTENCES[0], sound()[0][1]), "row"),
        ((SENTENCES[2] + " ", "something else"), "question"),
        ((SENTENCES[3].replace("了", "啦", 1), "something else"), "near question"),
        ((SENTENCES[1].replace("please", "now"), "something else"), "near question"),
    ],
)
def test_what_training_rows_give_away_of_held_out_rows(row, same):
    found = compare(examples(*sound()), examples(("Is tea ready?", "no"), row, file="held.jsonl"))
    (pair,) = found.in_both_splits
    line = next(line for line, sentence in enumerate(SENTENCES, 1) if sentence[:4] == row[0][:4])
    assert (pair.row, pair.train_row, pair.same) == ("held.jsonl:2", f"rows.jsonl:{line}", same)
    assert (pair.likeness == 1) == (same != "near question")


def test_a_question_with_two_answers_is_a_contradiction():
    found = compare(examples(*sound(), ("水开了吗", "是"), ("水开了吗", "否"), ("水开了吗 ", "是")), examples(("水开了吗", "不知道")))
    (one,) = found.contradictions
    assert [answer.answer for answer in one.answers] == ["是", "否", "不知道"]
    assert one.answers[1].row == "rows.jsonl:8"


def test_turns_before_the_last_count_as_the_question():
    talks = [
        Example(tuple(Message(role, text) for role, text in zip(("user", "assistant") * 2, turns, strict=True)), f"t:{line}")
        for line, turns in enumerate((("hi", "hello", "and?", "tea"), ("bye", "well", "and?", "coffee")), 1)
    ]
    assert not compare(talks).contradictions


def test_twenty_thousand_rows():
    rng = random.Random(0)
    han = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]
    rows = [("请回答：" + "".join(rng.choices(han, k=20)), "".join(rng.choices(han, k=10))) for _ in range(20_000)]
    rows[11_000] = (rows[5][0][:-1] + "好", rows[5][1])
    rows[12_000] = rows[6]
    found = compare(examples(*rows))
    assert [group.rows for group in found.duplicates] == [("rows.jsonl:7", "rows.jsonl:12001")]
    assert [(pair.row, pair.like) for pair in found.near_duplicates] == [("rows.jsonl:11001", "rows.jsonl:6")]


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("请用 Python 写一个 quicksort", "Han"),
        ("Please translate 你好", "Latin"),
        ("ﾃｽﾄです", "Kana"),
        ("日本語の文章を読む", "Kana"),
        ("他说“の”是日文", "Han"),
        ("Как дела?", "Cyrillic"),
        ("안녕하세요 여러분", "Hangul"),
        ("مرحبا", "Arabic"),
        ("12 + 3 = 15 🙂", "none"),
        ("", "none"),
    ],
)
def test_the_script_of_a_text(text, script):
    assert script_of(text) == script


# ---- with a tokenizer: cut rows, labels, the verb ------------------------------------------------------------------


@pytest.fixture
def faulty(make_config, tmp_path):
    """Labelled rows with a fault of every kind, and a name that is a mark-up bomb."""
    bomb = "<script>alert('水')</script> [red]& all"
    texts = [*SENTENCES, SENTENCES[0], SENTENCES[1].replace(",", ";"), bomb, "", "茶" * 60, "茶" * 200]
    rows = [{"text": text, "label": "good" if index % 3 else "bad"} for index, text in enumerate(texts)]
    rows += [{"text": "is it good?", "label": "good"}, {"text": "is it good?", "label": "bad"}, {"text": "empty", "label": " "}]
    train = tiny.write_rows(tmp_path / "faulty.jsonl", rows)
    held = tiny.write_rows(tmp_path / "held.jsonl", [rows[2], {"text": "Something quite different", "label": "unknown"}])
    return make_config(f"data.train={train}", f"data.eval={held}", "data.max_length=205", "data.max_rejected=9")


@pytest.fixture
def report(faulty, tmp_path, monkeypatch, capsys):
    """(screen, JSON, page) of the verb."""
    (tmp_path / "config.toml").write_text(faulty.to_toml())
    words = ["show", tmp_path / "config.toml", "--rows", 9, "--json", tmp_path / "show.json", "--html", tmp_path / "show.html"]
    monkeypatch.setattr(sys, "argv", ["softprompt", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    return capsys.readouterr().out, json.loads((tmp_path / "show.json").read_text()), (tmp_path / "show.html").read_text()


def test_the_json_tells_every_finding(report, tmp_path):
    _, facts, _ = report
    place = f"{tmp_path / 'faulty.jsonl'}:"
    assert [group["rows"] for group in facts["duplicates"]] == [[f"{place}1", f"{place}7"]]
    assert [(pair["row"], pair["like"]) for pair in facts["near_duplicates"]] == [(f"{place}8", f"{place}2")]
    assert [(pair["train_row"], pair["same"]) for pair in facts["in_both_splits"]] == [(f"{place}3", "row")]
    assert [[answer["answer"] for answer in one["answers"]] for one in facts["contradictions"]] == [["good", "bad"]]
    assert [item["source"] for item in facts["rejected"]] == [f"{place}12", f"{place}15"]
    assert facts["labels"] == {"train": {"good": 8, "bad": 5}, "eval": {"good": 1, "unknown": 1}}
    assert facts["scripts"]["train"]["questions"] == {"Latin": 8, "Han": 4, "none": 1}
    (cut,) = facts["cut"]["train"]
    assert (cut["row"], cut["supervised"], facts["train"]["num_cut"]) == (f"{place}11", len("good") + 1, 1)
    assert facts["train"]["share_lost"] == pytest.approx(cut["lost"] / (facts["train"]["num_supervised"] + cut["lost"]))
    assert "Jaccard index" in facts["measure"]


def test_screen_and_page_tell_every_finding(report, faulty):
    screen, facts, html = report
    found = said_of(show(faulty))
    assert len(found) == 7
    read = Reader.of(html)
    for said in found:
        assert said.sentence in screen
        assert said.sentence in read.text
        assert all(row in read.text for row in said.rows)
        assert said.rows[0] in screen
    for label, count in facts["labels"]["train"].items():
        assert re.search(rf"{label}\W+{count} \(", screen)


def test_the_page_escapes_and_stands_alone(report):
    _, facts, html = report
    read = Reader.of(html)
    assert "script" not in read.tags
    assert "<script>alert('水')</script> [red]& all" in read.text
    assert not read.links
    assert read.marked[1:] == [row["supervised_text"] for row in facts["rows"]]


def test_a_page_that_cannot_be_written_is_one_line(faulty, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.toml").write_text(faulty.to_toml())
    monkeypatch.setattr(sys, "argv", ["softprompt", "show", str(tmp_path / "config.toml"), "--html", str(tmp_path / "none" / "x.html")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "cannot be written" in capsys.readouterr().err


def test_sound_data_is_called_sound(make_config, tmp_path):
    rows = tiny.write_rows(tmp_path / "sound.jsonl", [{"prompt": asked, "completion": said} for asked, said in sound()])
    held = tiny.write_rows(tmp_path / "other.jsonl", [{"prompt": "Is tea ready?", "completion": "no"}])
    config = make_config(f"data.train={rows}", f"data.eval={held}", "data.max_length=500")
    shown = show(config)
    assert said_of(shown) == []
    assert "Nothing to find fault with" in page(shown, config, 1)


class Reader(HTMLParser):
    """A page's tags, its text, what is marked in it, and what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.text, self.marked, self.links, self.in_mark = set(), "", [], [], False

    @classmethod
    def of(cls, html: str) -> "Reader":
        read = cls()
        read.feed(html)
        return read

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]
        self.in_mark = tag == "mark"

    def handle_endtag(self, tag):
        self.in_mark = False

    def handle_data(self, data):
        self.text += data
        if self.in_mark:
            self.marked.append(data)
