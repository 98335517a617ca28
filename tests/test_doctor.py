"""The doctor names what is broken, and finds nothing in a sound run."""

import re
from dataclasses import replace

import pytest
import tiny
import torch

from softprompt.data import Example, Message
from softprompt.data.examples import turns_text
from softprompt.doctor import BARE, NOISE, REVERSED, TEXT, Case, diagnose, examine
from softprompt.engine.tokens import Encoded
from softprompt.errors import DataError, RunError
from softprompt.events import Warned
from softprompt.flat import FlatWriter
from softprompt.rows import Rows
from softprompt.runlog import RunFolder
from softprompt.screen.console import console
from softprompt.screen.run import draw_findings
from softprompt.training import train

LONG = ("train.steps=60", "train.eval_every=20")


def findings_of(config, base=None):
    *_, finished = train(config)
    said = finished.result["findings"]
    (all_said,) = diagnose(config.train.out, base).values()
    assert set(said) <= set(all_said)
    return all_said


def test_a_sound_run_has_no_findings(make_config, bases, fresh):
    assert findings_of(make_config(*LONG, fresh), bases()) == []


def test_a_sound_bank_has_no_findings(make_config, bases, fresh):
    config = make_config(*LONG, fresh, "prompt.count=2")
    list(train(config))
    assert diagnose(config.train.out, bases()) == {"seed-0": [], "seed-1": []}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("optim.relative_lr=0.0025", r"optim\.relative_lr = 0\.0025 is too low"),
        ("optim.lr=0.0005", r"optim\.relative_lr = 0\.0025 is too low"),
        ("optim.relative_lr=25", r"optim\.relative_lr = 25 is too high"),
        ("data.template=Answer {{{{ '' }}}}: ", "12 different questions look like 1 to the model: data.template leaves out"),
        ("train.seed=1", "7 of 7 held-out rows are training rows too"),
        ("{contrary}", "the held-out loss rose from"),
        ("{long_answers}", "of the answers' tokens lie beyond data.max_length"),
        ("prompt.text=aaaaaaaaaaaa", "the rows have collapsed"),
    ],
)
def test_what_is_broken_is_named(make_config, bases, contrary, tmp_path, setting, said):
    answers = tiny.some_rows(24, lambda n: {"prompt": f"bring {n}", "completion": "tea " * 100})
    long_answers = f"data.train={tiny.write_rows(tmp_path / 'long.jsonl', answers)}"
    more = {"prompt.text=aaaaaaaaaaaa": ["optim.relative_lr=0.02"], "{contrary}": ["train.eval_every=5", "optim.relative_lr=1"]}.get(
        setting, []
    )
    found = findings_of(make_config(*LONG, "data.max_length=128", setting.format(contrary=contrary, long_answers=long_answers), *more))
    assert any(re.search(said, finding) for finding in found), found


def test_rows_without_anything_supervised_are_refused_before_a_run(make_config):
    with pytest.raises(DataError, match=r"lies beyond data\.max_length"):
        list(train(make_config("data.max_length=20")))


def test_rows_beyond_a_sliding_window_are_dead(make_config, tmp_path):
    folder = tiny.tiny_folder(tmp_path / "mistral", "mistral")  # two layers with a window of 12
    found = findings_of(make_config(f"model.name={folder}", "train.steps=12", "prompt.length=40"))
    assert any("rows hardly moved: no text looks back that far" in finding for finding in found)


def test_a_run_that_is_not_finished_is_refused(make_config, tmp_path):
    with pytest.raises(RunError, match="not a run folder"):
        diagnose(tmp_path / "nowhere")


# ---- while a run goes on -------------------------------------------------------------------------------------------


def warned(config):
    return [(event.step, event.finding) for event in train(config) if isinstance(event, Warned)]


def test_a_sound_run_is_not_warned(make_config, fresh):
    assert warned(make_config(*LONG, fresh)) == []


def test_what_the_data_shows_is_said_before_the_first_step(make_config):
    ((step, finding),) = warned(make_config("train.steps=4", "train.eval_every=2"))
    assert step == 0
    assert "7 of 7 held-out rows are training rows too" in finding


def test_a_rate_that_is_too_low_is_said_once_and_while_there_is_time(make_config, fresh, tmp_path):
    config = make_config(*LONG, fresh, "optim.relative_lr=0.0005", "train.save_every=20")
    said = warned(config)
    assert [step for step, _ in said] == [20, 20]  # it hardly moves, and it learns nothing
    assert "optim.relative_lr = 0.0005 is too low" in said[0][1]
    assert "nothing was learned" in said[1][1]
    assert sum(isinstance(event, Warned) for event in RunFolder.reopen(tmp_path / "run").events()) == 2


def test_a_resumed_run_is_not_warned_again(make_config, fresh, tmp_path):
    config = make_config(*LONG, fresh, "optim.relative_lr=0.0005", "train.save_every=20")
    tiny.stop_after(config, 25)
    said = [event for event in train(RunFolder.reopen(tmp_path / "run").config(), resume=True) if isinstance(event, Warned)]
    assert said == []
    assert sum(isinstance(event, Warned) for event in RunFolder.reopen(tmp_path / "run").events()) == 2


def test_a_bank_is_told_of_its_rows_once_and_of_a_prompt_by_name(make_config, fresh, tmp_path):
    bank = 'prompt.bank=[{name = "slow", optim = {relative_lr = 0.0005}}, {name = "usual"}]'
    known_rows = [event for event in train(make_config("train.steps=4", "train.eval_every=2", bank)) if isinstance(event, Warned)]
    assert [event.prompts for event in known_rows if event.step == 0] == [("slow", "usual")]
    of_one = [event for event in train(make_config(*LONG, fresh, bank, f"train.out={tmp_path}/other")) if isinstance(event, Warned)]
    assert {event.prompts for event in of_one} == {("slow",)}


def test_the_screen_says_a_finding_once_and_of_whom():
    with console.capture() as captured:
        draw_findings({"slow": ["known rows", "too low"], "usual": ["known rows"], "fine": []})
    assert captured.get().splitlines() == ["slow, usual: known rows", "slow: too low", "fine: nothing to find fault with"]


# ---- single checks, on numbers -------------------------------------------------------------------------------------


def rows_of(row, *labels):
    """As many rows with these tokens as there are labels."""
    examples = [
        Example((Message("user", f"{len(labels)} {number}"), Message("assistant", "a")), "row", label)
        for number, label in enumerate(labels)
    ]
    writer, known = FlatWriter(), tuple(dict.fromkeys(label for label in labels if label))
    for example in examples:
        label = known.index(example.label) if example.label else -1
        writer.add(row, example, turns_text(example), label=label, part=0, unlearned=0)
    writer.close()
    return Rows(writer.in_memory(), tuple(examples), (), "", known)


@pytest.fixture
def sound():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(8, 16, generator=generator)
    row = Encoded((5, 6, 7, 8), (False, False, True, True), "row")
    return Case(
        learned_PD=start + torch.randn(8, 16, generator=generator),
        start_PD=start,
        unit=1.0,
        rows=rows_of(row, None),
        relative_lr=0.2,
        method="prompt",
        losses=[3.0, 2.8, 2.5, 2.3, 2.2],
        held_out={0: 3.0, 3: 2.5, 5: 2.3},
        others={BARE: 3.5, TEXT: 3.1, REVERSED: 2.9, NOISE: 3.6},
    )


def test_the_sound_case_is_sound(sound):
    assert examine(sound) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"held_out": {0: 2.6671, 56: 2.6670}}, "the held-out loss is 2.6670 after training and 2.6671 before"),
        ({"others": {BARE: 2.2}}, "the bare base has a held-out loss of 2.2000, the soft prompt 2.3000"),
        ({"others": {TEXT: 2.3}}, "the text prompt has a held-out loss of 2.3000, the soft prompt 2.3000"),
        ({"others": {REVERSED: 2.301}}, "the same rows in reverse order give a held-out loss of 2.3010"),
        ({"others": {NOISE: 2.2}}, "random rows of the same size give a held-out loss of 2.2000"),
        ({"losses": [3.0, 2.8, 2.6, 9.0, 2.5]}, "the loss jumped to 9.000"),
    ],
)
def test_a_single_fault_is_the_only_finding(sound, change, said):
    (finding,) = examine(replace(sound, **change))
    assert said in finding


def labelled(*labels):
    """Rows with these labels, two supervised tokens each."""
    return rows_of(Encoded((5, 6, 7, 8), (False, False, True, True), "row"), *labels)


def test_a_prompt_that_guesses_among_the_labels_is_told_so(sound):
    three_to_one = replace(sound, held=labelled("good", "bad", "good", "good"), held_out={0: 3.0, 5: 0.27}, others={})
    (finding,) = examine(three_to_one)  # -(0.75 log 0.75 + 0.25 log 0.25) / 2
    assert "the held-out loss is 0.2700, and 0.2812 is that of guessing among the 2 labels" in finding
    assert examine(replace(three_to_one, held_out={0: 3.0, 5: 0.25})) == []
    assert examine(replace(three_to_one, held=labelled("good", "good"))) == []
    assert examine(replace(three_to_one, held=labelled(None, None))) == []


def test_without_held_out_rows_what_can_be_seen_is_said(sound):
    assert examine(replace(sound, held_out={}, others={})) == []
    (finding,) = examine(replace(sound, held_out={}, others={}, learned_PD=sound.start_PD + 1e-3))
    assert "too low" in finding
