"""The fields of a request: each is honoured or refused, none ignored."""

import json

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as OpenAIChat
from openai.types.completion_create_params import CompletionCreateParamsBase as OpenAICompletion

from softprompt.data import Message
from softprompt.sampling import Sampling
from softprompt.serve.asking import Ask
from softprompt.serve.fields import OF_ONE_ROUTE, OWN, REFUSED, ChatFields, CompletionFields, chat_wish, completion_wish, read_tree
from softprompt.serve.refusals import Refused

HELLO = {"model": "polite", "messages": [{"role": "user", "content": "hello"}]}
TEXT = {"model": "polite", "prompt": "hello"}


def chat(**fields) -> list[Ask]:
    return list(chat_wish({**HELLO, **fields}, 128).asks)


def completion(**fields) -> list[Ask]:
    return list(completion_wish({**TEXT, **fields}, 128).asks)


def refused(make, **fields) -> Refused:
    with pytest.raises(Refused) as found:
        make(**fields)
    assert found.value.status == 400
    return found.value


NEWER = {"moderation", "prompt_cache_options", "prompt_cache_retention"}  # fields that the oldest openai of pyproject.toml has not


# ---- every field is decided --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("theirs", "ours"), [(OpenAIChat, ChatFields), (OpenAICompletion, CompletionFields)])
def test_every_field_of_openai_is_honoured_or_refused(theirs, ours):
    names = set(theirs.__annotations__) | {"stream"}
    decided = {name for name in REFUSED if OF_ONE_ROUTE.get(name, ChatFields) is ours}
    honoured = {field.alias or name for name, field in ours.model_fields.items()}
    assert len(names) > 15
    assert not decided & honoured
    assert names - decided - honoured == set()
    more = set(OWN) | ({"max_tokens", "response_format"} if ours is CompletionFields else set())
    assert (decided | honoured) - names <= more | NEWER


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_field_that_is_not_supported_may_say_what_happens_anyway_and_nothing_else(name):
    make = completion if name == "suffix" else chat
    plain = {**vars(make(seed=1)[0])}
    for value in (None, *REFUSED[name]):
        assert vars(make(seed=1, **{name: value})[0]) == plain
    error = refused(make, **{name: "something else"})
    assert (error.param, error.code) == (name, "unsupported_parameter")


def test_an_unknown_field_is_refused_by_name():
    for make in (chat, completion):
        error = refused(make, repetition_penalty=1.0)
        assert (error.param, error.code) == ("repetition_penalty", "unknown_parameter")
    assert refused(completion, messages=[]).param == "messages"
    assert refused(chat, echo=True).param == "echo"
    assert refused(chat, stream=True, stream_options={"x": 1}).param == "stream_options.x"


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_what_is_missing_is_named(missing):
    with pytest.raises(Refused, match="is missing") as found:
        chat_wish({name: value for name, value in HELLO.items() if name != missing}, 128)
    assert (found.value.param, found.value.code) == (missing, "missing_required_parameter")


# ---- what they become --------------------------------------------------------------------------------------------------

SAMPLED = {
    "temperature": (0.7, {"temperature": 0.7}),
    "top_p": (0.5, {"top_p": 0.5}),
    "top_k": (3, {"top_k": 3}),
    "min_p": (0.1, {"min_p": 0.1}),
    "seed": (-1, {"seed": 2**63 - 1}),
    "frequency_penalty": (-2, {"frequency_penalty": -2.0}),
    "presence_penalty": (1.5, {"presence_penalty": 1.5}),
    "max_tokens": (9, {"max_new_tokens": 9}),
    "logit_bias": ({"17": -100, "3": 0.5}, {"logit_bias": {17: -100.0, 3: 0.5}}),
}


@pytest.mark.parametrize("make", [chat, completion])
@pytest.mark.parametrize("name", sorted(SAMPLED))
def test_how_tokens_are_chosen_reaches_the_engine(make, name):
    value, expected = SAMPLED[name]
    assert [one.sampling for one in make(**{"seed": 5, name: value})] == [Sampling(**{"seed": 5, **expected})]


def test_without_a_field_all_is_as_in_generate_but_the_seed():
    (one,), (other,) = chat(), chat()
    assert one.sampling.seed != other.sampling.seed
    for ask in (one, other):
        assert ask.sampling == Sampling(seed=ask.sampling.seed)
        assert (ask.stops, ask.logprobs, ask.echo, ask.schema) == ((), None, False, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.1), ("temperature", -0.1), ("temperature", "1"), ("temperature", True), ("top_p", 0), ("top_p", 1.1),
        ("top_k", -1), ("top_k", 1.5), ("min_p", 1.5), ("seed", 2**63), ("seed", 1.0), ("frequency_penalty", 2.5), ("presence_penalty", -3),
        ("max_tokens", 0),
        ("max_tokens", 2**31), ("n", 0), ("n", 129), ("n", True), ("stream", 1), ("stream", "true"), ("logit_bias", {"a": 1}),
        ("logit_bias", {"1": 101}), ("logit_bias", {"-1": 1}), ("logit_bias", []), ("stop", ["a"] * 5), ("stop", [""]), ("stop", 3),
        ("stop", ["a" * 1_001]), ("user", 7), ("user", "u" * 513), ("model", None), ("stream_options", {"include_usage": True}),
        ("response_format", {"type": "xml"}), ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "text", "json_schema": {"name": "a", "schema": {}}}),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused(field, value):
    for make in (chat, completion):
        assert refused(make, **{field: value}).param.split(".")[0] == field


def test_several_answers_have_seeds_that_follow_on():
    asks = completion(prompt=["a", "b"], n=3, seed=2**63 - 2)
    assert [(ask.text, ask.sampling.seed) for ask in asks] == [(text, seed) for text in "ab" for seed in (2**63 - 2, 2**63 - 1, 0)]
    assert refused(completion, prompt=["a"] * 43, n=3).param == "n"
    assert len(completion(prompt=["a"] * 128)) == 128


def test_best_of_is_n_or_refused():
    assert len(completion(n=2, best_of=2)) == 2
    assert len(completion(best_of=1)) == 1
    assert refused(completion, n=1, best_of=2).param == "best_of"


def test_both_names_of_the_longest_answer_are_read():
    assert chat(max_completion_tokens=3)[0].sampling.max_new_tokens == 3
    assert chat(max_completion_tokens=3, max_tokens=3)[0].sampling.max_new_tokens == 3
    assert refused(chat, max_completion_tokens=3, max_tokens=4).param == "max_tokens"


def test_logprobs_have_two_forms():
    assert chat(logprobs=True)[0].logprobs == 0
    assert chat(logprobs=True, top_logprobs=20)[0].logprobs == 20
    assert chat(logprobs=False)[0].logprobs is None
    assert completion(logprobs=5)[0].logprobs == 5
    assert completion(logprobs=0)[0].logprobs == 0
    assert refused(chat, top_logprobs=2).param == "top_logprobs"
    assert refused(chat, logprobs=True, top_logprobs=21).param == "top_logprobs"
    assert refused(chat, logprobs=5).param == "logprobs"
    assert refused(completion, logprobs=True).param == "logprobs"
    assert refused(completion, logprobs=21).param == "logprobs"


def test_no_token_at_all_can_be_wanted_with_echo_alone():
    assert completion(echo=True, max_tokens=0)[0].sampling.max_new_tokens == 0
    assert refused(completion, max_tokens=0).param == "max_tokens"


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a b", ["a b"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
        ("", [""]),
    ],
)
def test_a_prompt_is_text_or_token_ids_one_or_many(prompt, texts):
    assert [ask.text for ask in completion(prompt=prompt)] == texts


@pytest.mark.parametrize("prompt", [None, [], [[]], [1, "a"], ["a", [1]], [1.0], [True], [-1], [2**31], {}, 3, [[1], []]])
def test_another_prompt_is_refused(prompt):
    assert refused(completion, prompt=prompt).param == "prompt"


def test_one_stop_text_or_up_to_four():
    assert chat(stop="a")[0].stops == ("a",)
    assert chat(stop=["a", "b", "c", "\n"])[0].stops == ("a", "b", "c", "\n")
    assert chat(stop=[])[0].stops == ()


def test_a_response_format_is_a_schema_or_none():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert chat(response_format={"type": "text"})[0].schema is None
    assert chat(response_format={"type": "json_object"})[0].schema == {"type": "object"}
    for strict in ({}, {"strict": True}, {"strict": False}, {"strict": None}):
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, **strict}}
        assert chat(response_format=form)[0].schema == schema
    error = refused(chat, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": [1]}})
    assert error.param == "response_format.json_schema.schema"


# ---- messages ----------------------------------------------------------------------------------------------------------


def test_messages_become_turns():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    (ask,) = chat(
        messages=[
            {"role": "developer", "content": "be kind"},
            {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
            {"role": "assistant", "content": "yes", "refusal": None, "annotations": [], "reasoning_content": "hm", "function_call": None},
            {"role": "user", "content": "what is a"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": "c1"},
        ]
    )
    read = {**call, "function": {"name": "f", "arguments": {"a": 1}}}
    assert ask.text == (
        Message("system", "be kind"),
        Message("user", "hello"),
        Message("assistant", "yes"),
        Message("user", "what is a"),
        Message("assistant", "", more={"tool_calls": [read]}),
        Message("tool", "1", more={"tool_call_id": "c1"}),
    )
    assert [turn.more for turn in ask.text[4:]] == [{"tool_calls": [read]}, {"tool_call_id": "c1"}]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hello", "messages.0"),
        ({"content": "a"}, "messages.0.role"),
        ({"role": "function", "content": "a"}, "messages.0.role"),
        ({"role": ["user"], "content": "a"}, "messages.0.role"),
        ({"role": "user"}, "messages.0.content"),
        ({"role": "user", "content": None}, "messages.0.content"),
        ({"role": "user", "content": 3}, "messages.0.content"),
        ({"role": "user", "content": ["a"]}, "messages.0.content.0"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}, "messages.0.content.1"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "messages.0.content.0"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "messages.0.content.0"),
        ({"role": "user", "content": "a", "name": "Ann"}, "messages.0.name"),
        ({"role": "user", "content": "a", "tool_call_id": "c1"}, "messages.0.tool_call_id"),
        ({"role": "assistant", "content": "a", "audio": {"id": "x"}}, "messages.0.audio"),
        ({"role": "assistant", "content": None, "tool_calls": "f"}, "messages.0.tool_calls"),
    ],
)  # fmt: skip
def test_a_message_with_more_than_text_is_refused_at_its_place(message, param):
    assert refused(chat, messages=[message]).param == param
    assert refused(chat, messages=[]).param == "messages"


# ---- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b'"a"', b"null", b'{"temperature": NaN}', b'{"temperature": Infinity}', b'{"temperature": -Infinity}',
        b'{"a": "\xff"}', b'{"a": "\xed\xa0\x80"}', b'{"a": "\\ud800"}', b'{"a": "\\ud800\\u0041"}', b'{"a": "\x00"}', b'{"a": "x\\u0000"}',
        b'{"a": [{"b\\u0000": 1}]}', b"[" * 100_000, b'{"a":' * 100_000, b"\x1f\x8b\x08", "{}".encode("utf-16"),
    ],
)  # fmt: skip
def test_what_is_no_json_object_or_no_text_is_refused(body):
    with pytest.raises(Refused) as found:
        read_tree(body)
    assert found.value.status == 400


def test_all_other_text_is_read_as_it_is():
    tree = {"a": "水 \\u0000 \u2028 é", "b": [1, 2.5, None, True]}
    assert read_tree(json.dumps(tree).encode()) == read_tree(json.dumps(tree, ensure_ascii=False).encode()) == tree


def test_numbers_too_large_for_any_field_are_refused():
    tree = read_tree(json.dumps(HELLO)[:-1].encode() + b', "temperature": 1e999}')
    assert refused(lambda: chat_wish(tree, 128)).param == "temperature"
    tree = read_tree(json.dumps(HELLO)[:-1].encode() + b', "seed": ' + b"9" * 4_000 + b"}")
    assert refused(lambda: chat_wish(tree, 128)).param == "seed"
