"""softprompt distil: what is asked, who answers, what is learned; and that it is a run like any other."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from parrot import running
from safetensors.torch import load_file

from softprompt.artifact import load_prompt
from softprompt.checkpoint import load_start
from softprompt.cli import app
from softprompt.config import ModelConfig, load_config
from softprompt.contestants import Contestant
from softprompt.data import Example, Message, load_examples
from softprompt.distil.asked import Asked
from softprompt.distil.context import Bare, chunks, context_of
from softprompt.distil.onpolicy import own_answers, replies
from softprompt.distil.selfstudy import CHINESE, ENGLISH, askings, cleaned, language_of, passages
from softprompt.distil.study import STUDY, study_of
from softprompt.doctor import diagnose
from softprompt.encode import make_encoder
from softprompt.engine.loading import load_base
from softprompt.engine.prompt import no_prompt
from softprompt.engine.teacher import Teacher, likeness
from softprompt.engine.tokens import Encoded
from softprompt.errors import ConfigError, DataError, RunError
from softprompt.evaluation import Contest, evaluate
from softprompt.events import Finished, Step, Studying, returned
from softprompt.generation import generate
from softprompt.job import prepare
from softprompt.sampling import Sampling
from softprompt.serve.own import start
from softprompt.training import train

TEXT = "Answer kindly, in one word, and name the drink. Never say no."
QUICK = ("distil.max_new_tokens=10", "train.steps=12", "train.examples_per_step=8", "train.eval_every=6", "train.save_every=4")


def rows_of(run):
    return load_file(run / "prompt" / "adapter_model.safetensors")["prompt_embeddings"]


@pytest.fixture
def distilling(make_config, tmp_path):
    """distilling("distil.examples=3", ...): a small run; without rows where there is a text and no questions."""

    def make(*settings, rows=True):
        without = () if rows else ("data.train", "data.eval")
        tree = make_config(*QUICK).model_dump(exclude_none=True)
        for key in without:
            section, name = key.split(".")
            tree[section].pop(name)
        return load_config(tree, [f"train.out={tmp_path / 'distilled'}", *settings])

    return make


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("of", [f"distil.text={TEXT}", "distil.examples=3"])
def test_a_prompt_comes_to_answer_as_the_base_does_with_the_text(distilling, bases, method, of):
    base = bases()
    config = distilling(of, f"prompt.method={method}", "prompt.init=context", "prompt.length=6", "train.steps=25", "train.eval_every=25")
    *_, finished = train(config, base=base)
    found = finished.result["distilled"]
    assert found["kl_after"] < 0.7 * found["kl_before"]
    assert found["same_first_after"] > found["same_first_before"]
    assert found["positions"] == 6
    assert found["teacher_tokens"] > 60
    stored = load_prompt(finished.result["prompt"], base)
    assert stored.card.distilled is not None
    assert TEXT not in stored.card.model_dump_json()
    study = study_of(config, base)
    before = likeness(base, study.held.teacher, no_prompt(base, stored.soft.bos_id), study.held.rows.encoded, 1000)
    after = likeness(base, study.held.teacher, stored.soft, study.held.rows.encoded, 1000)
    assert (before.divergence, after.divergence) == pytest.approx((found["kl_before"], found["kl_after"]), rel=1e-3)
    assert generate(base, stored, ["bring tea"], Sampling(max_new_tokens=5))


TE = 260


@pytest.fixture
def words(tmp_path):
    """A base whose tokenizer has " te" as one token, TE."""
    folder = tiny.tiny_folder(tmp_path / "words", vocab_size=400)
    tokenizer = tiny.tiny_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["vocab"] |= {"Ġt": TE - 1, "Ġte": TE}
    backend["model"]["merges"] = [["Ġ", "t"], ["Ġt", "e"]]
    (folder / "tokenizer.json").write_text(json.dumps(backend), encoding="utf-8")
    return load_base(ModelConfig(name=str(folder), device="cpu"))


def test_a_teacher_that_knows_text_judges_no_blank(words):
    """Where a word has its token with the blank before it, the blank at the end of a question stands in no text: the teacher is to judge
    the answer as it has said it, and the student is taught its first token as certain."""
    base, encoder = words, make_encoder(words.tokenizer, "human-assistant")
    asked = Example((Message("user", "tea?"), Message("assistant", "tea")), "a row")
    teacher = Contestant("teacher", (Bare(no_prompt(base, 1), encoder),), wish="Say tea.")
    plain = encoder.encode(asked)
    whole, sure = teacher.as_text(encoder, asked, plain)
    said = [token for token, on in zip(whole.ids, whole.supervised, strict=True) if on]
    assert base.tokenizer.decode(sure) == "te"
    assert [*sure, *said] == list(plain.ids[len(plain.question) :])
    first = whole.supervised.index(True)
    assert whole.ids[first - 1] == TE  # " te", which it says itself
    assert whole.ids[: first - 1] == teacher.question(encoder, asked, plain)


def test_an_evaluation_counts_what_the_teacher_judges_alone(distilling, words, tmp_path):
    """It agrees with itself on all of that; tokens that it never has to say are no part of the mean."""
    rows = tiny.write_rows(tmp_path / "asked.jsonl", [{"prompt": f"tea {number}?", "completion": "tea"} for number in range(12)])
    config = distilling(f"distil.text={TEXT}", f"model.name={words.name}", f"data.train={rows}", "train.steps=1")
    *_, finished = train(config, base=words)
    stored, context = load_prompt(finished.result["prompt"], words), study_of(config, words).context
    found = evaluate(words, stored, load_examples(str(rows)), Contest(context=context), out=tmp_path / "evaluations").contestants
    assert (found["teacher"].table.tokens > found["teacher"].table.judged).all(), "some are certain"
    assert found["teacher"]["same_first"] == found["control"]["same_first"] == 1
    assert found["prompt"]["divergence"] > 0


@pytest.mark.parametrize("position", ["start", "after_bos"])
def test_as_many_states_as_the_text_has_tokens_are_the_text(distilling, bases, position):
    """A prompt that starts from all that the teacher keeps of its text is the teacher, before it is trained."""
    base, own = bases(), (f"distil.text={TEXT}", "prompt.method=prefix", "prompt.init=states", f"prompt.position={position}")
    setup = returned(prepare(distilling(*own, "prompt.length=5000"), base))
    assert setup.study is not None
    (one,) = setup.untrained.values()
    row = Encoded(tuple(base.tokenizer("tea", add_special_tokens=False)["input_ids"]), (False, True, True))
    ((bare, ids),) = setup.study.classroom.contexts
    teacher = Teacher(((bare, ids),), [row], [0])
    assert one.prompt.length == len(ids)
    if position == "after_bos":
        assert likeness(base, teacher, one.prompt, [row], 100).divergence < 1e-5
    assert "keys and values of" in one.note


@pytest.mark.parametrize("of", [f"distil.text={TEXT}", "distil.examples=3"])
def test_a_prompt_starts_near_its_teacher(distilling, bases, tmp_path, of):
    """Of as many positions as there are tokens, it is its teacher; a few of them are nearer than as many states, and can be trained."""
    base, own = bases(), (of, "prompt.method=prefix", "prompt.position=after_bos")
    found = {}
    for length, init in ((5000, "matching"), (6, "matching"), (6, "states")):
        setup = returned(prepare(distilling(*own, f"prompt.init={init}", f"prompt.length={length}"), base))
        assert setup.study is not None
        (one,) = setup.untrained.values()
        found[length, init] = setup.held_out_loss(one.prompt)
        assert "keys picked from the teacher's" in one.note or init == "states"
    assert found[5000, "matching"] < 1e-5
    assert found[6, "matching"] < 0.8 * found[6, "states"]
    how = ("prompt.init=matching", "prompt.length=6", "train.steps=25", "train.eval_every=25", f"train.out={tmp_path / 'trained'}")
    *_, finished = train(distilling(*own, *how), base=base)
    assert finished.result["distilled"]["kl_after"] < 0.9 * found[6, "matching"]


def test_answers_are_the_teachers_and_end_as_it_ends(distilling, bases, tmp_path):
    """Against `generate` with the text as the system turn, which knows nothing of distillation."""
    base = bases()
    study_of(distilling(f"distil.text={TEXT}"), base)
    lines = [json.loads(line) for line in (tmp_path / "distilled" / STUDY).read_text().splitlines()[1:]]
    assert len(lines) == 31
    for line in lines[:6]:
        own = base.tokenizer(f"{TEXT}\n\nHuman: {line['question']}\n\nAssistant:")["input_ids"]
        with torch.no_grad():
            said = base.model.generate(torch.tensor([own]), max_new_tokens=10, do_sample=False, pad_token_id=0)[0, len(own) :]
        assert line["text"] == base.tokenizer.decode(said, skip_special_tokens=True).strip()
        assert line["ended"] == (2 in said.tolist())


def test_an_answer_that_was_cut_off_is_learned_without_an_end(distilling, bases):
    study = study_of(distilling(f"distil.text={TEXT}"), bases())
    ends = [row.ids[-1] == 2 for row in study.lessons.rows.encoded]
    assert ends == [one.answered.ended for one in study.read]
    assert not all(ends)


def test_examples_are_not_asked_about(distilling, bases):
    study = study_of(distilling("distil.examples=4"), bases())
    shown = {shot.messages[0].content for shot in study.context.shots}
    asked = {example.messages[0].content for lessons in (study.lessons, study.held) for example in lessons.rows.examples}
    assert len(study.context.shots) == 4
    assert shown
    assert not shown & asked


def test_own_answers_in_the_rows_play_no_part(distilling, bases, tmp_path):
    config = distilling(f"distil.text={TEXT}")
    first = study_of(config, bases())
    rows = [{**row, "completion": "something else"} for row in tiny.some_rows(24)]
    tiny.write_rows(tmp_path / "train.jsonl", rows)
    other = study_of(distilling(f"distil.text={TEXT}", f"train.out={tmp_path / 'again'}"), bases())
    assert list(first.lessons.rows.encoded) == list(other.lessons.rows.encoded)


def test_questions_of_a_text_file(distilling, bases, tmp_path):
    (tmp_path / "asked.txt").write_text("".join(f"what is {number}?\n" for number in range(20)), encoding="utf-8")
    config = distilling(f"distil.text={TEXT}", f"distil.questions={tmp_path / 'asked.txt'}", "distil.count=9", rows=False)
    study = study_of(config, bases())
    assert len(study.lessons.rows.encoded) == 9
    assert len(study.held.rows.encoded) == 2, "a tenth is held out"


# ---- self-study ----------------------------------------------------------------------------------------------------


def test_the_base_asks_itself(distilling, bases, tmp_path):
    """A random base says a question mark now and then."""
    config = distilling(f"distil.text={TEXT * 3}", "distil.count=64", rows=False)
    events = list(train(config, base=bases()))
    studied = [event for event in events if isinstance(event, Studying)]
    assert "64 questions about a text of" in studied[0].note
    assert {event.doing for event in studied} == {"questions", "answers"}
    study = study_of(config, bases())
    asked = [example.messages[0].content for lessons in (study.lessons, study.held) for example in lessons.rows.examples]
    assert 2 <= len(set(asked)) == len(asked) <= 64
    assert all(text.endswith("?") for text in asked)
    assert isinstance(events[-1], Finished)


def test_every_passage_is_asked_about_in_the_language_of_the_text():
    text = " ".join(f"Rule {number} says that nobody may carry tea over the bridge on a day with rain." for number in range(9))
    assert "".join(passages(text)).replace(" ", "") == text.replace(" ", "")
    asked = [one for one, _ in zip(askings((text, "茶很好喝。" * 80), True), range(200), strict=False)]
    about = passages(text)
    assert {passage for passage in about if any(passage in one.told for one in asked)} == set(about)
    assert {language_of(text), language_of("茶很好喝。")} == {ENGLISH, CHINESE}
    assert any("只回复问题本身" in one.told for one in asked if one.teacher == 1)
    assert len({one.told for one in asked}) > len(about) + 3


@pytest.mark.parametrize(
    ("said", "question"),
    [
        ("Who carries tea?\nNobody.", "Who carries tea?"),
        ("1. Who carries tea? And why?", "Who carries tea?"),
        ('Question: "Who carries tea?"', "Who carries tea?"),
        ("谁可以带茶？因为", "谁可以带茶？"),
        ("Nobody carries tea.", None),
        ("", None),
        ("?", None),
    ],
)
def test_what_is_a_question(said, question):
    (asking,) = [one for one, _ in zip(askings(("text",), True), range(1), strict=False)]
    assert cleaned(asking, said) == question


def test_a_long_text_is_cut_between_paragraphs_and_every_chunk_is_asked_about(distilling, bases):
    paragraphs = [f"Paragraph {number}. " + "It says something about tea. " * 5 for number in range(6)]
    base = bases()
    encoder = make_encoder(base.tokenizer, "human-assistant")
    cut = chunks("\n\n".join(paragraphs), encoder, 400)
    assert len(cut) > 1
    assert all(len(base.tokenizer(one, add_special_tokens=False)["input_ids"]) <= 400 for one in cut)
    assert "\n\n".join(cut).split() == "\n\n".join(paragraphs).split()
    assert all(one.startswith("Paragraph") for one in cut)
    assert chunks("word" * 200, encoder, 100)[0] == "word" * 25
    assert " ".join(chunks("It says something about tea. " * 9, encoder, 70)) == " ".join(["It says something about tea."] * 9)
    config = distilling(f"distil.text={' '.join(paragraphs)}", "distil.count=64", "data.max_length=150", rows=False)
    study = study_of(config, base)
    assert len(study.context.texts) > 1
    with pytest.raises(ConfigError, match=r"read in . chunks: leave out distil.questions, data.train and data.eval"):
        study_of(distilling(f"distil.text={' '.join(paragraphs)}", "data.max_length=150", f"train.out={config.train.out}-2"), base)


# ---- a run like any other ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [(), ("distil.on_policy=0.5",), ("prompt.count=2",)], ids=["plain", "on-policy", "bank"])
def test_a_resumed_run_is_the_straight_run(distilling, bases, tmp_path, extra):
    own = (f"distil.text={TEXT}", *extra)
    *_, straight = train(distilling(*own, f"train.out={tmp_path / 'straight'}"), base=bases())
    config = distilling(*own)
    events = train(config, base=bases())
    for event in events:
        if isinstance(event, Step) and event.step == 9:
            break
    events.close()
    *_, resumed = train(config, resume=True, base=bases())
    for name in straight.result["prompts"]:
        ours, theirs = (load_prompt(found.result["prompts"][name]["prompt"], bases()).soft for found in (straight, resumed))
        assert torch.equal(ours.learned_PD, theirs.learned_PD)


def test_kill_9_during_the_study_changes_no_bit(distilling, bases, tmp_path):
    config = distilling(f"distil.text={TEXT}", f"train.out={tmp_path / 'straight'}")
    *_, straight = train(config, base=bases())
    killed = config.model_copy(update={"train": config.train.model_copy(update={"out": str(tmp_path / "killed")})})
    (tmp_path / "killed.toml").write_text(killed.to_toml(), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "softprompt", "distil", str(tmp_path / "killed.toml")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
        study = tmp_path / "killed" / STUDY
        while not study.exists() and child.poll() is None:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed" / "prompt").exists()
    with pytest.raises(RunError, match=r"unfinished run: softprompt train --resume"):
        next(iter(train(killed, base=bases())))
    *_, resumed = train(killed, resume=True, base=bases())
    assert torch.equal(rows_of(tmp_path / "straight"), rows_of(tmp_path / "killed"))
    assert resumed.result["distilled"] == straight.result["distilled"]


def test_a_study_of_another_distillation_is_not_gone_on_with(distilling, bases):
    config = distilling(f"distil.text={TEXT}")
    study = Path(config.train.out) / STUDY
    study.parent.mkdir()
    study.write_text('{"format": 1, "evaluation": "another"}\n', encoding="utf-8")
    with pytest.raises(RunError, match=r"study.jsonl is not of this distillation: remove it, or choose another train.out"):
        study_of(config, bases())


def test_a_bank_is_its_prompts_alone(distilling, bases, tmp_path):
    own = f"distil.text={TEXT}"
    *_, bank = train(distilling(own, "prompt.count=2"), base=bases())
    *_, alone = train(distilling(own, "train.seed=1", f"train.out={tmp_path / 'alone'}", "train.tokens_per_batch=4096"), base=bases())
    together = load_prompt(bank.result["prompts"]["seed-1"]["prompt"], bases()).soft.learned_PD
    torch.testing.assert_close(together, load_prompt(alone.result["prompt"], bases()).soft.learned_PD, rtol=2e-3, atol=2e-4)


def test_on_policy_steps_learn_from_what_the_prompt_says(distilling, bases):
    config = distilling(f"distil.text={TEXT}", "distil.on_policy=0.5")
    setup = returned(prepare(config, bases()))
    assert setup.study is not None
    (untrained,) = setup.untrained.values()
    numbers = setup.numbers_of(7)[0]
    said = replies(bases(), setup.study, untrained.prompt, numbers, 10, 3)
    read = own_answers(setup.study, numbers, said)
    answers = [one.answered.example.response for one in read]
    assert [one.own.question for one in read] == [setup.rows.encoded[number].question for number in numbers]
    assert answers != [setup.rows.examples[number].response for number in numbers]
    assert replies(bases(), setup.study, untrained.prompt, numbers, 10, 3) == said


def test_only_the_frozen_positions_stay(distilling, bases):
    config = distilling(f"distil.text={TEXT}", "prompt.method=prefix", "prompt.init=context", "optim.frozen=2", "prompt.length=5")
    *_, finished = train(config, base=bases())
    start = load_start(Path(config.train.out) / "start.safetensors", "seed-0", load_prompt(finished.result["prompt"], bases()).soft)
    now = load_prompt(finished.result["prompt"], bases()).soft.learned_like(start)
    moved = (now - start.learned_PD).abs().amax(dim=1)
    assert moved[:2].max() < 1e-5
    assert moved[2:].min() > 1e-3


def test_the_doctor_measures_against_the_teacher(distilling, bases, tmp_path):
    list(train(distilling(f"distil.text={TEXT}"), base=bases()))
    found = diagnose(tmp_path / "distilled", bases())
    assert not any("held-out loss of 5" in finding for findings in found.values() for finding in findings)


# ---- the command, and what it refuses ------------------------------------------------------------------------------


def test_the_verb_writes_what_it_says(distilling, tmp_path):
    config = distilling(f"distil.text={TEXT}", "distil.keep_text=true")
    (tmp_path / "run.toml").write_text(config.to_toml(), encoding="utf-8")
    app(["distil", str(tmp_path / "run.toml"), "--json", str(tmp_path / "out.json")], standalone_mode=False)
    found = json.loads((tmp_path / "out.json").read_text())
    names = "kl_before kl_after same_first_before same_first_after teacher_tokens positions questions seconds prompt"
    assert set(found) == set(names.split())
    card = json.loads((tmp_path / "distilled" / "prompt" / "card.json").read_text())["distilled"]
    assert card["text"] == TEXT
    app(["eval", str(tmp_path / "distilled"), "--json", str(tmp_path / "eval.json")], standalone_mode=False)
    beside = json.loads((tmp_path / "eval.json").read_text())["contestants"]
    assert [name for name in beside if name not in ("text", "summary")] == ["base", "teacher", "control", "beginning", "prompt"]
    assert beside["teacher"]["divergence"] < 1e-6
    assert abs(beside["control"]["divergence"]) < 1e-4
    assert beside["control"]["same_first"] == 1
    assert beside["control"]["loss"] == pytest.approx(beside["teacher"]["loss"], abs=1e-4)
    assert beside["prompt"]["divergence"] < beside["base"]["divergence"]
    assert all(one["milliseconds"] > 0 for one in beside.values())


def test_a_template_of_the_rows_own_fields(distilling, bases, tmp_path):
    rows = tiny.write_rows(tmp_path / "asked.jsonl", [{"what": f"tea {number}", "completion": "-"} for number in range(12)])
    own = ("data.template=Q {{ what }} A", f"data.train={rows}", f"data.eval={rows}", 'data.columns={prompt = "what"}')
    study = study_of(distilling(f"distil.text={TEXT}", *own), bases())
    assert bases().tokenizer.decode(study.lessons.rows.encoded[0].question) == "Q tea 0 A"


@pytest.mark.parametrize(
    ("settings", "rows", "error", "message"),
    [
        (["distil.text= "], True, ConfigError, "distil.text is empty"),
        (["distil.file=gone.md"], True, ConfigError, "distil.file = gone.md: cannot be read: No such file"),
        (["distil.examples=3"], False, ConfigError, "distil.examples needs rows to take them from: set data.train"),
        (["distil.examples=23"], True, ConfigError, "distil.examples = 23: of 24 training rows"),
        ([f"distil.text={TEXT}", "distil.questions=gone.jsonl"], True, DataError, "gone.jsonl"),
        (["prompt.init=states", "distil.text=a"], True, ConfigError, 'prompt.init = "states" stands alone'),
        (["prompt.init=context"], True, ConfigError, 'prompt.init = "context"'),
        (['prompt.init=["matching", "vocab"]', "prompt.method=prefix", "distil.text=a"], True, ConfigError, '"matching" stands alone'),
        (["prompt.init=matching", "prompt.method=prefix"], True, ConfigError, '"matching" starts from what a teacher reads'),
    ],
)
def test_what_does_not_fit_is_said(distilling, bases, settings, rows, error, message):
    with pytest.raises(error, match=message):
        list(train(distilling(*settings, rows=rows), base=bases()))


def test_one_text_only():
    with pytest.raises(ConfigError, match=r"set one of distil.text, distil.file and distil.examples"):
        load_config({"distil": {"text": "a", "examples": 3}})


def test_nothing_to_distil(make_config, tmp_path):
    (tmp_path / "run.toml").write_text(make_config().to_toml(), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"nothing to distil: set distil.text"):
        app(["distil", str(tmp_path / "run.toml")], standalone_mode=False)


def test_a_chat_template_tells_the_teacher(tmp_path):
    base = tiny.tiny_base(tmp_path / "base", chat=True)
    encoder = make_encoder(base.tokenizer, "chat")
    config = load_config({"model": {"name": base.name}, "distil": {"text": TEXT}, "data": {"template": "chat"}})
    (teacher,) = context_of(config, base, encoder, Asked((), ())).teachers(base, encoder)
    assert teacher.wish == TEXT


# ---- a teacher behind a server -------------------------------------------------------------------------------------


@pytest.fixture
def server(bases):
    """softprompt serve over another base of the same weights."""
    engine = start(bases(seed=0), {})
    with running(engine) as (address, _):
        yield address


def test_a_server_teaches_what_the_base_would(distilling, bases, server, tmp_path):
    base, config = bases(), distilling("distil.text=" + TEXT, "train.steps=20", "train.eval_every=20", f"distil.teacher={server}")
    *_, finished = train(config, base=base)
    study = study_of(config, base)
    local = study_of(distilling("distil.text=" + TEXT, f"train.out={tmp_path / 'local'}"), base)
    assert [one.answered.example.response.strip() for one in study.read] == [one.answered.example.response for one in local.read]
    rows, whole = study.lessons.rows.encoded, []
    for row, example in zip(rows, study.lessons.rows.examples, strict=True):
        ids = base.tokenizer(f"{TEXT}\n\nHuman: {example.messages[0].content}\n\nAssistant:")["input_ids"]
        answer = row.ids[len(row.question) :]
        whole.append(Encoded((*ids[1:], *answer), (*(False,) * len(ids[1:]), *(True,) * len(answer))))
    exact = Teacher(((no_prompt(base, 1), ()),), whole, [0] * len(whole))
    theirs, ours = (likeness(base, teacher, no_prompt(base, 1), rows, 1000) for teacher in (study.lessons.teacher, exact))
    assert 0.3 * ours.divergence < theirs.divergence <= 1.001 * ours.divergence, "tokens that are one class hide some of it"
    assert theirs.same_first == ours.same_first
    assert finished.result["distilled"]["kl_after"] < 0.8 * finished.result["distilled"]["kl_before"]


def test_a_server_that_does_not_answer_or_serves_another_model(distilling, bases, server, tmp_path):
    with pytest.raises(ConfigError, match=r"distil.teacher = http://127.0.0.1:9: no such server answers"):
        study_of(distilling("distil.text=" + TEXT, "distil.teacher=http://127.0.0.1:9"), bases())
    other = ("distil.teacher_model=larger", f"train.out={tmp_path / 'other'}")
    with pytest.raises(ConfigError, match=r"serves no model larger: it serves llama"):
        study_of(distilling("distil.text=" + TEXT, f"distil.teacher={server}", *other), bases())
    with pytest.raises(ConfigError, match=r"distil.on_policy asks the base itself"):
        distilling("distil.text=" + TEXT, f"distil.teacher={server}", "distil.on_policy=0.5")
