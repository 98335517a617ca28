"""Chat templates as people have them: what they write around an answer, of the date, of earlier turns; text that spells control tokens."""

import pytest
import tiny
from tiny import CLOCK, EMPTY_THOUGHT, EOS, OPENED_THOUGHT, TURN_END, TURNS, chat_folder, chat_tokenizer, write_rows
from tokenizers import AddedToken

from softprompt.artifact import load_prompt, read_card
from softprompt.config import ModelConfig, load_config
from softprompt.data import Example, Message, load_examples
from softprompt.encode import make_encoder, shared_system
from softprompt.engine.loading import load_base
from softprompt.errors import ConfigError, DataError
from softprompt.show import show
from softprompt.show.words import said_of
from softprompt.templates import Chat, OwnTemplate, stopped
from softprompt.thinking import Thinking, Told, spoken
from softprompt.training import train


def talk(*turns, fields=None):
    messages = tuple(Message(*turn) for turn in turns)
    return Example(messages, "rows:1", fields=fields or {"prompt": messages[-2].content})


def ask(question, answer="red"):
    return talk(("user", question), ("assistant", answer))


def text_of(encoder, row):
    learned = [token for token, on in zip(row.ids, row.supervised, strict=True) if on]
    return encoder.tokenizer.decode(row.ids), encoder.tokenizer.decode(learned)


def encoder_of(template, **how):
    return make_encoder(chat_tokenizer(template), "chat", **how)


TWO = (("user", "sky?"), ("assistant", "blue"), ("user", "rose?"), ("assistant", "red"))
END = chat_tokenizer(TURNS).convert_tokens_to_ids(TURN_END)


# ---- where an answer ends ------------------------------------------------------------------------------------------


def test_an_answer_ends_where_the_template_ends_a_turn():
    encoder = encoder_of(TURNS)
    row = encoder.encode(ask("rose?"))
    assert encoder.end_ids == {END} != {EOS}
    assert text_of(encoder, row) == ("<|turn|>user\nrose?<|end|>\n<|turn|>assistant\nred<|end|>\n", "red<|end|>")


def test_the_end_of_a_turn_may_be_any_token_that_was_added():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(TURN_END, special=False)])
    tokenizer.chat_template = TURNS
    encoder = make_encoder(tokenizer, "chat")
    assert encoder.end_ids == {tokenizer.convert_tokens_to_ids(TURN_END)}
    assert text_of(encoder, encoder.encode(ask("rose?", "<|end|> red")))[1] == "<|end|> red<|end|>"


@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE, "{% for m in messages %}{{ m.content }}\n{% endfor %}"])
def test_an_answer_that_ends_with_eos_needs_no_other_end(template):
    assert encoder_of(template).end_ids <= {EOS}


# ---- thinking blocks -----------------------------------------------------------------------------------------------


ASKED, OPENED = "<|turn|>user\nrose?<|end|>\n<|turn|>assistant\n", "[rose?]<|turn|><think>\n"
THOUGHT = "<think>\nHm.\n</think>\n\nred"
NO_BREAKS = OPENED_THOUGHT.replace("'<|turn|>' + m.content", "'<|turn|><think></think>' + m.content")


@pytest.mark.parametrize(
    ("template", "answer", "question", "learned"),
    [
        (EMPTY_THOUGHT, "red", ASKED, "<think>\n\n</think>\n\nred<|end|>"),
        (EMPTY_THOUGHT, THOUGHT, ASKED, f"{THOUGHT}<|end|>"),
        (OPENED_THOUGHT, "red", OPENED, "\n</think>\n\nred</s>"),
        (OPENED_THOUGHT, THOUGHT, OPENED, "Hm.\n</think>\n\nred</s>"),
        (NO_BREAKS, "red", OPENED, "</think>red</s>"),
    ],
)
def test_an_answer_is_learned_with_the_block_in_front_of_it(template, answer, question, learned):
    encoder = encoder_of(template)
    row = encoder.encode(ask("rose?", answer))
    assert text_of(encoder, row)[1] == learned
    assert encoder.tokenizer.decode(row.question) == question
    assert row.question == encoder.question("rose?")
    said = learned.removesuffix("<|end|>").removesuffix("</s>")
    assert spoken(said, encoder.thinking) == "red"


@pytest.mark.parametrize("template", [EMPTY_THOUGHT, OPENED_THOUGHT])
def test_of_a_conversation_the_last_answer_alone_is_learned_where_earlier_ones_are_written_otherwise(template):
    encoder = encoder_of(template)
    row = encoder.encode(talk(*TWO))
    shown, learned = text_of(encoder, row)
    assert spoken(learned.removesuffix("<|end|>").removesuffix("</s>"), encoder.thinking) == "red"
    assert "blue" in shown
    assert "blue" not in learned
    assert row.question == encoder.question([Message(*turn) for turn in TWO[:-1]])
    assert (encoder.num_unlearned(talk(*TWO), row), encoder.num_unlearned(ask("a"), encoder.encode(ask("a")))) == (1, 0)


def test_all_answers_of_a_conversation_are_learned_where_they_are_written_alike():
    encoder = encoder_of(TURNS)
    row = encoder.encode(talk(*TWO))
    assert (text_of(encoder, row)[1], encoder.num_unlearned(talk(*TWO), row)) == ("blue<|end|>red<|end|>", 0)
    cut = encoder.encode(talk(*TWO), len(row) - 5)
    assert cut.num_cut == 5
    assert encoder.num_unlearned(talk(*TWO), cut) == 0


def test_conversations_that_are_learned_in_part_are_said(tmp_path, make_config):
    turns = [{"role": role, "content": content} for role, content in TWO]
    rows = write_rows(tmp_path / "talk.jsonl", [{"messages": turns}, {"messages": turns[:2]}] * 4)
    config = make_config(
        f"model.name={chat_folder(tmp_path / 'base', EMPTY_THOUGHT)}", "data.template=chat", f"data.train={rows}", "train.steps=1"
    )
    shown = show(config)
    assert shown.as_dict(0)["unlearned"] == [{"row": f"{rows}:{number}", "number": 1} for number in (1, 3, 5, 7)]
    assert any("4 rows of several answers, of which only the last is learned" in said.sentence for said in said_of(shown))
    warned = [event for event in train(config) if type(event).__name__ == "Warned" and event.check == "unlearned_answers"]
    assert [event.finding[:62] for event in warned] == ["4 earlier answers of conversations are read and not learned: th"[:62]]


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    "text", ["<think>\n\n</think>\n\nred rose", "<think>a", "red", "", "<th", "\n</think>\n\nred", " <think></think>red", "<thin red"]
)
@pytest.mark.parametrize("size", [1, 3, 50])
def test_a_streamed_answer_is_what_the_whole_one_says(opened, text, size):
    thinking = Thinking("<think>", "</think>", opened)
    told = Told(thinking)
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    given = [told.add(piece) for piece in pieces] + [told.add("", last=True)]
    assert "".join(said for _, said in given) == spoken(text, thinking)
    assert "".join(thought for thought, _ in given) == thinking.split(text, whole=True)[0]


def test_only_a_template_that_writes_a_block_has_one():
    assert encoder_of(TURNS).thinking is None
    assert encoder_of(EMPTY_THOUGHT).thinking == Thinking("<think>", "</think>", opened=False)
    assert encoder_of(OPENED_THOUGHT).thinking == Thinking("<think>", "</think>", opened=True)
    special = chat_tokenizer(EMPTY_THOUGHT)
    special.add_tokens([AddedToken("</think>", special=True)], special_tokens=True)
    assert make_encoder(special, "chat").thinking is None, "decoded answers hold no special tokens to be found again"


# ---- one meaning in training and in use ----------------------------------------------------------------------------

TRIMS = TURNS.replace("m.content", "m.content | trim")
NO_SYSTEM = "{%- if messages[0].role == 'system' %}{{ raise_exception('no system') }}{%- endif %}" + TURNS


@pytest.mark.parametrize("template", ["human-assistant", "{{ prompt }}\n->", TURNS, TRIMS, EMPTY_THOUGHT, OPENED_THOUGHT, CLOCK, NO_SYSTEM])
@pytest.mark.parametrize("system", [None, "Be brief. "])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "name it", "input": "", "output": "red"},
        {"instruction": " name it\n", "output": "red"},
        {"instruction": "name it", "input": " a rose ", "output": " red"},
        {"prompt": "  a </s> rose \n", "completion": "<|end|>red\n"},
        {"text": "a rose\t", "label": "red"},
        {"messages": [{"role": "user", "content": " a rose"}, {"role": "assistant", "content": "red "}]},
    ],
)
def test_a_row_asks_what_a_typed_question_asks(tmp_path, template, system, row):
    name = "chat" if "add_generation_prompt" in template else template
    encoder = make_encoder(chat_tokenizer(template), name, system=system)
    example = load_examples(str(write_rows(tmp_path / "row.jsonl", [row]))).examples[0]
    if system and template == NO_SYSTEM:
        with pytest.raises(DataError, match="no system"):
            encoder.encode(example)
        return
    encoded = encoder.encode(example)
    assert encoded.question == encoder.question(example.messages[-2].content)
    assert ("Be brief." in encoder.tokenizer.decode(encoded.ids)) == bool(system)


def test_a_system_turn_of_its_own_comes_before_that_of_the_rows():
    encoder = encoder_of(TURNS, system="Be brief.")
    own = encoder.tokenizer.decode(encoder.question([Message("system", "Be long."), Message("user", "a")]))
    assert own == "<|turn|>system\nBe long.<|end|>\n<|turn|>user\na<|end|>\n<|turn|>assistant\n"
    assert encoder.told("").question("a") == encoder_of(TURNS).question("a")


def test_a_system_turn_is_shared_only_where_all_rows_have_it():
    told, other = talk(("system", "Be brief."), *TWO), talk(("system", "Be long."), *TWO)
    assert shared_system([told, told]) == "Be brief."
    assert shared_system([told, other]) is shared_system([told, ask("a")]) is shared_system([ask("a")]) is shared_system([]) is None


# ---- the clock -----------------------------------------------------------------------------------------------------


def test_a_template_with_a_clock_is_told_one_day():
    encoder = encoder_of(CLOCK, date="2024-02-29")
    assert encoder.template.date == "2024-02-29"
    assert encoder.tokenizer.decode(encoder.question("a")).startswith("<|turn|>system\nToday: 29 Feb 2024<|end|>")
    assert encoder_of(TURNS, date="2024-02-29").template.date is None


@pytest.mark.parametrize(
    "text", ["\n {{ strftime_now('%d %B %Y') }}|", "  {% if true %}\n{{ strftime_now('%-d/%m/%y %H:%M') }}{% endif %}\n"]
)
def test_a_stopped_clock_changes_nothing_else(text, monkeypatch):
    import datetime

    import transformers.utils.chat_template_utils as utils

    class Then(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 2, 9)

    tokenizer, turns = chat_tokenizer(TURNS), [{"role": "user", "content": "a"}]
    ours = tokenizer.apply_chat_template(turns, chat_template=stopped(text, "2024-02-09"), tokenize=False)
    monkeypatch.setattr(utils, "datetime", Then)
    assert ours == tokenizer.apply_chat_template(turns, chat_template=text, tokenize=False)


# ---- which template ------------------------------------------------------------------------------------------------


def test_of_several_chat_templates_the_default_one_is_used():
    named = {"default": TURNS, "tool_use": "{{ messages[0].content }} with tools"}
    encoder = encoder_of(named)
    assert encoder.question("a") == encoder_of(TURNS).question("a")
    assert encoder.template.render([{"role": "user", "content": "a"}], True, [{"type": "function"}]) == "a with tools"
    with pytest.raises(
        ConfigError, match=r"chat templates called rag, tool_use and none called default: save the one to use in a \.jinja file"
    ):
        encoder_of({"tool_use": TURNS, "rag": TURNS})


DIALECT = (
    "{%- if messages | length > 9 %}{{ raise_exception('too long') }}{%- endif %}{{ bos_token }}"
    "{%- for m in messages %}{%- if m.role == 'tool' %}{%- continue %}{%- endif %}{{ {'r': m.role} | tojson }}\n"
    "{%- if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{%- else %}{{ m.content }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ {'r': 'assistant'} | tojson }}\n{%- endif %}"
)


def test_a_file_in_the_dialect_of_chat_templates_is_one(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(DIALECT, encoding="utf-8")
    encoder = make_encoder(chat_tokenizer(None), str(file))
    assert isinstance(encoder.template, Chat)
    assert encoder.template.name == DIALECT, "a card holds the template itself"
    shown = encoder.tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in TWO], chat_template=DIALECT, tokenize=False)
    row = encoder.encode(talk(*TWO))
    assert "<s>" + encoder.tokenizer.decode(row.ids) == shown
    assert text_of(encoder, row)[1] == "blue</s>red</s>"


@pytest.mark.parametrize("text", ["{{ prompt }}", "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ add_generation_prompt }}"])
def test_a_template_over_fields_stays_one(text):
    assert isinstance(make_encoder(chat_tokenizer(None), text).template, OwnTemplate)


def test_a_chat_template_that_is_no_jinja_is_refused():
    with pytest.raises(ConfigError, match=r"data\.template: line 1: "):
        make_encoder(chat_tokenizer(None), "{{ messages }}{% if add_generation_prompt %}")


# ---- text that spells control tokens -------------------------------------------------------------------------------

SPELLS = "a </s> b<|end|><s>c"


@pytest.mark.parametrize("template", ["human-assistant", "{{ prompt }}\n->", "chat"])
def test_what_a_row_spells_is_text(template):
    encoder = make_encoder(chat_tokenizer(TURNS), template)
    row, question = encoder.encode(ask(SPELLS, SPELLS)), encoder.question(SPELLS)
    plain = encoder.encode(ask("#" * len(SPELLS), "#" * len(SPELLS)))
    control = {token for token in encoder.tokenizer.all_special_ids if token in row.ids}
    assert [token for token in row.ids if token in control] == [token for token in plain.ids if token in control]
    assert len(row) == len(plain), "one token for every byte"
    assert row.question == question
    assert encoder.tokenizer.decode(row.ids) == encoder.tokenizer.decode(plain.ids).replace("#" * len(SPELLS), SPELLS)
    assert encoder.tokenizer.decode([t for t, on in zip(row.ids, row.supervised, strict=True) if on]).startswith(SPELLS)


def test_text_around_a_spelled_control_token_is_tokenized_as_one():
    """As plain text has it: with merges over the borders of what is spelled."""
    tokenizer = chat_tokenizer(TURNS)
    wanted = tokenizer("x </s>y", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    encoder = make_encoder(tokenizer, "chat")
    opened = encoder.tokenizer("<|turn|>user\n", add_special_tokens=False)["input_ids"]
    assert list(encoder.question("x </s>y"))[len(opened) :][: len(wanted)] == wanted


def test_marks_in_a_row_are_refused():
    with pytest.raises(DataError, match=r"rows:1: the row holds U\+FDD0 or U\+FDD1"):
        encoder_of(TURNS).encode(ask("a \ufdd0"))


def test_control_tokens_that_a_tokenizer_makes_of_text_are_said(tmp_path, make_config):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "bring": 3, "tea": 4}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tiny.tiny_folder(tmp_path / "base")
    PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": "bring", "completion": "tea </s> tea"}, {"prompt": "bring", "completion": "tea"}]
    )
    shown = show(make_config(f"model.name={folder}", f"data.train={rows}"))
    assert shown.as_dict(0)["control_tokens"] == [{"row": f"{rows}:1", "tokens": ("</s>",)}]
    assert any("1 row that the tokenizer reads as more than text" in said.sentence for said in said_of(shown))


# ---- from training to use ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clock_base(tmp_path_factory):
    return load_base(ModelConfig(name=str(chat_folder(tmp_path_factory.mktemp("clock"), CLOCK)), device="cpu"))


def told_rows(tmp_path):
    turns = [("system", "Be brief."), ("user", "bring tea"), ("assistant", "tea")]
    return write_rows(tmp_path / "told.jsonl", [{"messages": [{"role": role, "content": content} for role, content in turns]}] * 8)


def test_a_prompt_keeps_the_day_the_system_turn_and_the_ends(tmp_path, make_config, clock_base):
    config = make_config(
        f"model.name={clock_base.name}", "data.template=chat", "data.date=2020-05-06", f"data.train={told_rows(tmp_path)}", "train.steps=2"
    )
    list(train(config, base=clock_base))
    card = read_card(config.train.out)
    assert (card.date, card.system, card.end_ids) == ("2020-05-06", "Be brief.", (END,))
    encoder = load_prompt(config.train.out, clock_base).encoder
    shown = encoder.tokenizer.decode(encoder.question("bring tea"))
    assert (
        shown
        == "<|turn|>system\nToday: 06 May 2020<|end|><|turn|>system\nBe brief.<|end|><|turn|>user\nbring tea<|end|><|turn|>assistant\n"
    )


def test_a_run_that_is_resumed_on_another_day_has_the_same_texts(tmp_path, make_config, clock_base, monkeypatch):
    import softprompt.templates as templates
    from softprompt.runlog import RunFolder

    def on(day):
        class Today(templates.datetime.date):
            @classmethod
            def today(cls):
                return cls.fromisoformat(day)

        monkeypatch.setattr(templates.datetime, "date", Today)

    def config(name):
        return make_config(
            f"model.name={clock_base.name}", "data.template=chat", "train.steps=4", "train.save_every=2", f"train.out={tmp_path / name}"
        )

    on("2020-01-01")
    straight = list(train(config("straight"), base=clock_base))
    tiny.stop_after(config("stopped"), 3)
    on("2020-01-02")
    run = RunFolder.reopen(tmp_path / "stopped")
    assert run.config().data.date == "2020-01-01"
    resumed = list(train(run.config(), resume=True, base=clock_base))
    same = ("eval_loss_after", "train_loss", "best_step")
    assert [resumed[-1].result[key] for key in same] == [straight[-1].result[key] for key in same]
    prompts = [load_prompt(tmp_path / name, clock_base).soft.rows_PH for name in ("straight", "stopped")]
    assert prompts[0].equal(prompts[1])
    assert read_card(tmp_path / "stopped").date == "2020-01-01"


@pytest.mark.parametrize("day", ["2026-11-26", "'2026-11-26'", "20261126"])
def test_a_day_is_read_in_every_form_of_toml(make_config, day, tmp_path):
    (tmp_path / "a.toml").write_text(f"[data]\ndate = {day if '-' in day else repr(day)}\n", encoding="utf-8")
    assert load_config(tmp_path / "a.toml").data.date == make_config(f"data.date={day}").data.date == "2026-11-26"


def test_a_day_that_is_none_is_refused(make_config):
    with pytest.raises(ConfigError, match=r"data\.date: must be a day, e\.g\. 2026-11-26 \(got 'someday'\)"):
        make_config("data.date=someday")
