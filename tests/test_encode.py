"""Ids and supervision, row for row: what the tutorial made, what a chat template makes, what a Jinja template makes."""

from itertools import groupby

import pytest
from tiny import BOS, EOS, tiny_tokenizer, write_rows

from softprompt.data import Example, Loaded, Message, Rejected, load_examples
from softprompt.encode import make_encoder
from softprompt.errors import ConfigError, DataError
from softprompt.prepared import check_rejected
from softprompt.rows import encode_rows
from softprompt.show import Shown

TEMPLATES = ["human-assistant", "chat", "Q: {{ prompt }}\nA:"]
TALK = (("system", "be brief"), ("user", "hi "), ("assistant", " hello "), ("user", "水?"), ("assistant", "water"))


def talk(*turns):
    messages = tuple(Message(*turn) for turn in turns)
    return Example(messages, "rows:1", fields={"prompt": messages[-2].content, "text": messages[-2].content})


def ask(question, answer="yes"):
    return talk(("user", question), ("assistant", answer))


def supervised(encoder, row):
    """Texts of the supervised stretches."""
    pairs = zip(row.ids, row.supervised, strict=True)
    return [encoder.tokenizer.decode([token for token, _ in stretch]) for on, stretch in groupby(pairs, lambda pair: pair[1]) if on]


# ---- human-assistant -----------------------------------------------------------------------------------------------


def tutorial(tokenizer, instruction, given, output):
    """The bloom-1b4-zh tutorial's own preprocessing."""
    question = tokenizer("\n".join(["Human: " + instruction, given]).strip() + "\n\nAssistant: ")["input_ids"]
    answer = tokenizer(output + tokenizer.eos_token)["input_ids"]
    return (question + answer)[:256], ([-100] * len(question) + answer)[:256]


@pytest.mark.parametrize("instruction", ["Translate", "  spaces around \n", "把这句话翻译成英文:", "", "x" * 180])
@pytest.mark.parametrize("given", ["", "早上好", " padded ", "two\nlines\n"])
@pytest.mark.parametrize("output", ["Good morning", " 早上好。 ", "long " * 60])
def test_human_assistant_gives_the_ids_of_the_tutorial(tmp_path, instruction, given, output):
    encoder = make_encoder(tiny_tokenizer(adds_bos=False), "human-assistant")
    path = write_rows(tmp_path / "a.jsonl", [{"instruction": instruction, "input": given, "output": output}])
    row = encoder.encode(load_examples(str(path)).examples[0], 256)
    shown = Shown(encoder, encode_rows(encoder, Loaded((), ()), 256), None).row(row)
    assert (shown["input_ids"], shown["labels"]) == tutorial(encoder.tokenizer, instruction, given, output)


def test_human_assistant_writes_every_turn():
    encoder = make_encoder(tiny_tokenizer(), "human-assistant")
    row = encoder.encode(talk(*TALK))
    text = "be brief\n\nHuman: hi\n\nAssistant:  hello </s>\n\nHuman: 水?\n\nAssistant: water</s>"
    assert encoder.tokenizer.decode(row.ids) == text
    assert supervised(encoder, row) == [" hello </s>", "water</s>"]


# ---- all templates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
def test_bos_stands_once_and_at_the_start(template):
    encoder = make_encoder(tiny_tokenizer(chat=True), template)
    row = encoder.encode(talk(*TALK))
    shown = Shown(encoder, encode_rows(encoder, Loaded((), ()), 256), None).row(row)
    assert BOS not in row.ids
    assert (shown["input_ids"][0], shown["labels"][0], shown["input_ids"].count(BOS)) == (BOS, -100, 1)


@pytest.mark.parametrize(("template", "bos"), [("human-assistant", None), ("chat", BOS), ("{{ prompt }}", None)])
def test_a_tokenizer_that_adds_no_bos_gets_one_only_from_a_chat_template(template, bos):
    assert make_encoder(tiny_tokenizer(adds_bos=False, chat=True), template).bos_id == bos


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("turns", [TALK[1:3], TALK], ids=["one turn", "more turns"])
def test_the_question_of_generation_is_a_prefix_of_the_row(template, turns):
    encoder = make_encoder(tiny_tokenizer(chat=True), template)
    row = encoder.encode(talk(*turns))
    question = encoder.question([Message(*turn) for turn in turns[:-1]])
    assert row.ids[: len(question)] == question
    assert all(row.supervised[len(question) : row.ids.index(EOS, len(question)) + 1])
    assert not row.supervised[len(question) - 1]


@pytest.mark.parametrize("template", [*TEMPLATES, "{{ text }}", "{{ instruction }}{{ input }}"])
def test_a_typed_question_fills_every_template(template):
    encoder = make_encoder(tiny_tokenizer(chat=True), template)
    assert "水?" in encoder.tokenizer.decode(encoder.question("水?"))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_row_is_cut_at_max_length_with_bos_counted(template, adds_bos):
    encoder = make_encoder(tiny_tokenizer(adds_bos=adds_bos, chat=True), template)
    whole = encoder.encode(ask("why?", "because " * 9))
    row = encoder.encode(ask("why?", "because " * 9), 64)
    assert len(row) + (encoder.bos_id is not None) == 64
    assert (row.ids, row.supervised) == (whole.ids[: len(row)], whole.supervised[: len(row)])
    assert (row.num_cut, whole.num_cut) == (len(whole) - len(row), 0)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_response_that_is_cut_away_whole_is_an_error(template):
    with pytest.raises(DataError, match=r"rows:1: the whole response lies beyond data\.max_length = 8 tokens and is cut away"):
        make_encoder(tiny_tokenizer(chat=True), template).encode(ask("why is that?"), 8)


def test_an_empty_question_is_an_error():
    with pytest.raises(DataError, match="rows:1: the question is empty"):
        make_encoder(tiny_tokenizer(), "{{ prompt }}").encode(ask(""))


# ---- chat ----------------------------------------------------------------------------------------------------------


def test_chat_supervises_every_assistant_turn_up_to_its_end_and_nothing_else():
    encoder = make_encoder(tiny_tokenizer(chat=True), "chat")
    row = encoder.encode(talk(*TALK))
    rendered = encoder.tokenizer.apply_chat_template([{"role": role, "content": content} for role, content in TALK], tokenize=False)
    assert "<s>" + encoder.tokenizer.decode(row.ids) == rendered
    assert supervised(encoder, row) == ["hello</s>", "water</s>"]


def test_a_chat_template_without_an_end_of_turn_gets_eos():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    encoder = make_encoder(tokenizer, "chat")
    assert supervised(encoder, encoder.encode(ask("a", "b"))) == ["b\n</s>"]


def test_a_chat_template_that_rewrites_what_it_asked_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }} turns:{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    with pytest.raises(DataError, match="rows:1: this chat template writes a question differently once it is answered"):
        make_encoder(tokenizer, "chat").encode(talk(*TALK))


def test_a_chat_template_that_refuses_a_conversation_is_quoted():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system turns here') }}"
    with pytest.raises(DataError, match="rows:1: the chat template refuses this conversation: no system turns here"):
        make_encoder(tokenizer, "chat").encode(talk(*TALK))


# ---- Jinja ---------------------------------------------------------------------------------------------------------


def test_jinja_renders_fields_and_earlier_turns():
    encoder = make_encoder(tiny_tokenizer(), "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{{ prompt }} ->\n")
    row = encoder.encode(talk(*TALK))
    assert encoder.tokenizer.decode(row.ids) == "be brief\n[user]hi \n[assistant] hello \n[user]水?\n水? ->\nwater</s>"
    assert supervised(encoder, row) == ["water</s>"]


def test_a_jinja_file_is_read(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text("问:{{ prompt }}\n答:", encoding="utf-8")
    assert make_encoder(tiny_tokenizer(), str(path)).template.name == "问:{{ prompt }}\n答:"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{{ promtp }}", "'promtp' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ prompt + 1 }}", "can only concatenate str"),
    ],
)
def test_a_jinja_template_that_cannot_be_filled_in_is_an_error_with_the_row(template, message):
    with pytest.raises(DataError, match=f"rows:1: data.template cannot be filled in: .*{message}"):
        make_encoder(tiny_tokenizer(), template).encode(ask("a"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ a }}\n{% if %}", r"data\.template: line 2: "),
        ("{{ a | nofilter }}", "No filter named 'nofilter'"),
        ("gone.jinja", r"cannot read gone\.jinja"),
        ("human_assistant", "unknown template 'human_assistant': did you mean human-assistant"),
        ("chatt", "did you mean chat"),
        ("xyzzy", "known are human-assistant, chat, Jinja text"),
        ("chat", "the tokenizer has no chat template"),
    ],
)
def test_a_template_that_is_none_is_refused(template, message):
    with pytest.raises(ConfigError, match=message):
        make_encoder(tiny_tokenizer(), template)


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="the tokenizer has no EOS token"):
        make_encoder(tokenizer, "human-assistant")


# ---- rows of a run -------------------------------------------------------------------------------------------------


def test_rows_that_cannot_be_encoded_join_the_rejected_ones():
    loaded = Loaded((ask("a"), ask("why? " * 9), ask("b")), (Rejected("rows:9", "broken"),))
    rows = encode_rows(make_encoder(tiny_tokenizer(), "human-assistant"), loaded, 40)
    assert rows.examples == (loaded.examples[0], loaded.examples[2])
    assert rows.rejected[0] == loaded.rejected[0]
    assert (rows.rejected[1].source, rows.rejected[1].reason[:18]) == ("rows:1", "the whole response")
    assert rows.num_supervised == 2 * len("yes" + "$")


def test_as_many_rejected_rows_as_allowed_pass():
    check_rejected([], 0)
    check_rejected([Rejected("a:1", "x")] * 2, 2)


def test_too_many_rejected_rows_are_counted_by_kind_with_a_place_and_what_would_keep_them():
    empty = [Rejected(f"a:{line}", "output is empty") for line in range(1, 6)]
    others = [Rejected(f"b:{line}", f"reason {line}") for line in range(3)]
    long = [Rejected(f"c:{line}", "the whole response is cut away", length) for line, length in ((7, 300), (9, 512))]
    with pytest.raises(DataError) as caught:
        check_rejected([*others, *long, *empty], 1)
    assert str(caught.value) == (
        "10 rows rejected, data.max_rejected allows 1: a:1 (and 4 more): output is empty; "
        "c:7 (and 1 more): the whole response is cut away; data.max_length = 512 keeps them whole; b:0: reason 0; and 2 more"
    )
    with pytest.raises(DataError, match=r"^5 of the first 10,000 rows rejected, data.max_rejected allows 0: a:1 "):
        check_rejected(empty, 0, 10_000)


TURNS = (
    "{% for m in messages %}{{ bos_token }}{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant\n{% endif %}"
)


def test_a_bos_token_that_marks_turns_stays_in_the_text():
    """SmolLM2 calls its <|im_start|> the BOS token and adds none."""
    tokenizer = tiny_tokenizer(adds_bos=False)
    tokenizer.chat_template = TURNS
    encoder = make_encoder(tokenizer, "chat")
    turns = [{"role": "user", "content": "tea?"}]
    wanted = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True)["input_ids"]
    assert encoder.bos_id is None
    assert wanted.count(BOS) == 2
    assert list(encoder.question("tea?")) == wanted


def test_only_the_first_bos_of_a_chat_belongs_to_the_prefix():
    """Llama 2 writes <s> before every question."""
    tokenizer = tiny_tokenizer(adds_bos=True)
    tokenizer.chat_template = TURNS.replace(
        "{% for m in messages %}{{ bos_token }}", "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}{% endif %}"
    ).replace("{% if add_generation_prompt %}{{ bos_token }}", "{% if add_generation_prompt %}")
    encoder = make_encoder(tokenizer, "chat")
    turns = [Message("user", "tea?"), Message("assistant", "yes"), Message("user", "now?")]
    shown = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in turns], tokenize=True, add_generation_prompt=True
    )["input_ids"]
    assert encoder.bos_id == BOS
    assert shown.count(BOS) == 2
    assert [BOS, *encoder.question(turns)] == shown
