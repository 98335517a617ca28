"""The routes over real sockets, before an engine that repeats words: shapes, streams, keys, bounds, clients that misbehave, the end."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing

import httpx
import pytest
from openai import APIError, BadRequestError, InternalServerError, NotFoundError, OpenAI, RateLimitError
from parrot import VIRTUAL, Parrot, running, until
from starlette.requests import Request

from softprompt.errors import ConfigError
from softprompt.serve import guard
from softprompt.serve import running as serving
from softprompt.serve.guard import AT_HOME, Keys
from softprompt.serve.log import JsonLines
from softprompt.serve.service import Settings

HELLO = [{"role": "user", "content": "hello big world"}]
LONG = [{"role": "user", "content": "a " * 4_000}]  # to be said for longer than any test waits
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def parrot():
    return Parrot("polite", "terse")


@pytest.fixture
def url(parrot):
    with running(parrot) as (address, _):
        yield address


@pytest.fixture
def client(url):
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def post(url: str, body: object, route: str = CHAT, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(url + route, content=content, headers={"content-type": "application/json", **headers}, timeout=120)


def events(text: str) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# ---- chats -------------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered_whole(client):
    answer = client.chat.completions.create(model="polite", messages=HELLO)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "polite"
    assert abs(answer.created - time.time()) < 60
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content) == ("assistant", "hello big world")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 3, 6)
    assert answer.usage.prompt_tokens_details.virtual_tokens == VIRTUAL
    assert answer.usage.prompt_tokens_details.cached_tokens == 1


def test_fields_that_must_be_there_are_there_though_empty(url):
    whole = post(url, {"model": "base", "messages": HELLO}).json()
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "hello big world", "refusal": None, "annotations": []}
    assert whole["choices"][0]["logprobs"] is None
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 1, "virtual_tokens": 0}


def test_a_chat_streams_what_it_says_whole(client):
    chunks = list(client.chat.completions.create(model="polite", messages=HELLO, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.content for delta in deltas] == ["", "hello", " big", " world", None]
    assert [delta.role for delta in deltas] == ["assistant", None, None, None, None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, None, "stop"]
    assert all(chunk.usage is None for chunk in chunks)


def test_tokens_are_counted_in_a_last_chunk_where_they_are_wanted(url, client):
    asked = {"model": "polite", "messages": HELLO, "n": 2}
    response = post(url, {**asked, "stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response.text)
    assert len(chunks) == 10
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == json.loads(client.chat.completions.create(**asked).usage.model_dump_json(exclude_unset=True))
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (3, 6)
    for options in ({}, {"stream_options": {"include_usage": False}}):
        assert all("usage" not in chunk for chunk in events(post(url, {**asked, "stream": True, **options}).text))


def test_thoughts_stand_apart(client):
    asked = {"model": "base", "messages": [{"role": "user", "content": "hm so hm"}]}
    (choice,) = client.chat.completions.create(**asked).choices
    assert (choice.message.content, choice.message.reasoning_content) == (" so", "hmhm")
    assert client.chat.completions.create(**asked).usage.completion_tokens_details.reasoning_tokens == 2
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
    assert [getattr(delta, "reasoning_content", None) for delta in deltas] == [None, "hm", None, "hm", None]
    assert "".join(delta.content or "" for delta in deltas) == " so"
    assert client.completions.create(model="base", prompt="hm so hm").choices[0].text == " so"


@pytest.mark.parametrize("top", [None, 0, 2])
def test_a_chat_has_logprobs_whole_and_streamed(client, top):
    wanted = {"logprobs": True} if top is None else {"logprobs": True, "top_logprobs": top}
    (choice,) = client.chat.completions.create(model="base", messages=HELLO, **wanted).choices
    assert [(one.token, one.bytes, one.logprob) for one in choice.logprobs.content] == [
        (word, list(word.encode()), -0.5) for word in ("hello", "big", "world")
    ]
    assert [(one.token, one.logprob) for one in choice.logprobs.content[0].top_logprobs] == [
        ("hello", -0.5), ("hello1", -1.5)
    ][: top or 0]  # fmt: skip
    chunks = client.chat.completions.create(model="base", messages=HELLO, stream=True, **wanted)
    streamed = [score for chunk in chunks if chunk.choices[0].logprobs for score in chunk.choices[0].logprobs.content]
    assert streamed == choice.logprobs.content


def test_tokens_are_named_by_their_numbers(client):
    """As vLLM names them: no two look alike. The parrot's number of a word is its length, of its first alternative 0."""
    wanted = {"extra_body": {"return_tokens_as_token_ids": True}}
    (choice,) = client.chat.completions.create(model="base", messages=HELLO, logprobs=True, top_logprobs=1, **wanted).choices
    assert [one.token for one in choice.logprobs.content] == ["token_id:5", "token_id:3", "token_id:5"]
    assert [[top.token for top in one.top_logprobs] for one in choice.logprobs.content] == [["token_id:0"]] * 3
    assert choice.message.content == "hello big world"
    (text,) = client.completions.create(model="base", prompt="a bc", logprobs=1, **wanted).choices
    assert text.logprobs.tokens == ["token_id:1", "token_id:2"]
    assert [list(top) for top in text.logprobs.top_logprobs] == [["token_id:0", "token_id:1"], ["token_id:0", "token_id:2"]]


def test_several_answers_come_as_they_are_made(url):
    parrot = Parrot(pause=0.02)
    with running(parrot) as (address, _):
        asked = {"model": "base", "messages": HELLO, "n": 3, "temperature": 1, "seed": 7}
        whole = post(address, asked).json()
        chunks = events(post(address, {**asked, "stream": True}).text)
    said = [choice["message"]["content"] for choice in whole["choices"]]
    assert said == [f"hello{seed} big{seed} world{seed}" for seed in (7, 8, 9)]
    order = [chunk["choices"][0]["index"] for chunk in chunks if chunk["choices"][0]["delta"].get("content")]
    assert len(order) == 9
    assert order != sorted(order)
    for number, text in enumerate(said):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == number]
        assert "".join(one["delta"].get("content", "") for one in own) == text
        assert [one["finish_reason"] for one in own] == [None, None, None, None, "stop"]


# ---- completions -------------------------------------------------------------------------------------------------------


def test_texts_are_completed_in_their_order(client):
    answer = client.completions.create(model="terse", prompt=["a b", "c"], n=2, temperature=1, seed=3)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert [(one.index, one.text, one.finish_reason) for one in answer.choices] == [
        (0, "a3 b3", "stop"), (1, "a4 b4", "stop"), (2, "c3", "stop"), (3, "c4", "stop")
    ]  # fmt: skip
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 6)
    assert answer.usage.prompt_tokens_details.virtual_tokens == 2 * VIRTUAL


def test_token_ids_are_completed(client):
    assert client.completions.create(model="base", prompt=[1, 2]).choices[0].text == "1 2"
    assert [one.text for one in client.completions.create(model="base", prompt=[[1, 2], [3]]).choices] == ["1 2", "3"]


def test_a_completion_ends_where_its_tokens_run_out(client):
    (choice,) = client.completions.create(model="base", prompt="a b c", max_tokens=2).choices
    assert (choice.text, choice.finish_reason) == ("a b", "length")


def test_a_text_is_echoed_with_its_logprobs(client):
    (choice,) = client.completions.create(model="base", prompt="a bc d", max_tokens=1, echo=True, logprobs=1).choices
    assert choice.text == "a bc da"
    assert choice.logprobs.tokens == ["a", "bc", "d", "a"]
    assert choice.logprobs.text_offset == [0, 1, 3, 4]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5]
    assert choice.logprobs.top_logprobs == [None, {"bc": -0.5}, {"d": -0.5}, {"a": -0.5}]
    (alone,) = client.completions.create(model="base", prompt="a bc d", max_tokens=0, echo=True, logprobs=0).choices
    assert (alone.text, alone.finish_reason, alone.logprobs.tokens) == ("a bc d", "length", ["a", "bc", "d"])
    (plain,) = client.completions.create(model="base", prompt="a bc d", max_tokens=1, echo=True).choices
    assert (plain.text, plain.logprobs) == ("a bc da", None)


def test_a_completion_streams_what_it_says_whole(client):
    asked = {"model": "base", "prompt": ["a bc", "d"], "echo": True, "logprobs": 2}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks.pop().usage == whole.usage
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(one.text for one in own) == choice.text
        assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [value for one in own for value in getattr(one.logprobs, field)] == getattr(choice.logprobs, field)


# ---- what is served ----------------------------------------------------------------------------------------------------


def test_base_prompts_and_ensembles_are_listed(client):
    assert [model.id for model in client.models.list()] == ["base", "polite", "terse", "both"]
    one = client.models.retrieve("polite")
    assert (one.object, one.created, one.owned_by, one.kind, one.num_virtual_tokens) == ("model", 7, "softprompt", "prompt", VIRTUAL)
    assert client.models.retrieve("both").members == ["polite", "terse"]
    with pytest.raises(NotFoundError):
        client.models.retrieve("other/name")


def test_what_an_engine_refuses_has_openais_shape(client, url):
    with pytest.raises(NotFoundError) as found:
        client.chat.completions.create(model="none", messages=HELLO)
    assert (found.value.code, found.value.param, found.value.type) == ("model_not_found", "model", "not_found_error")
    for stream in (False, True):
        with pytest.raises(BadRequestError, match="nothing to answer") as found:
            client.chat.completions.create(model="base", messages=[{"role": "user", "content": " "}], stream=stream)
        assert (found.value.code, found.value.param) == ("invalid_text", "messages")
    with pytest.raises(BadRequestError) as found:
        client.completions.create(model="base", prompt=" ")
    assert found.value.param == "prompt"
    with pytest.raises(BadRequestError) as found:
        client.completions.create(model="base", prompt="a", logit_bias={"100": 1})
    assert found.value.param == "logit_bias"
    assert set(post(url, {}).json()) == {"error"}
    assert set(post(url, {}).json()["error"]) == {"message", "type", "param", "code"}


def test_addresses_that_are_none_are_refused_in_that_shape_too(url):
    for method, path, status in (
        ("GET", "/v2", 404),
        ("GET", CHAT, 405),
        ("PUT", "/v1/models", 405),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
    ):
        response = httpx.request(method, url + path)
        assert response.status_code == status
        assert response.json()["error"]["code"] in ("unknown_url", "method_not_allowed")


def test_our_own_mistake_is_said_as_such(parrot, url, client, caplog):
    with pytest.raises(InternalServerError) as found:
        client.completions.create(model="base", prompt="a boom")
    assert found.value.code == "internal"
    assert "fell off" not in str(found.value)
    with pytest.raises(APIError, match="mistake"):
        list(client.completions.create(model="base", prompt="a boom", stream=True))
    response = post(url, {"model": "base", "prompt": "a boom"}, TEXT)
    assert (response.status_code, response.headers["x-content-type-options"]) == (500, "nosniff")
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["the parrot fell off"] * 3
    assert client.completions.create(model="base", prompt="a").choices[0].text == "a"


# ---- keys, hosts, headers ----------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path):
    def write(*lines: str) -> Keys:
        file = tmp_path / "keys"
        file.write_text("\n".join(lines), encoding="utf-8")
        return Keys.read(file)

    return write


def test_a_key_is_asked_for_where_there_are_any(parrot, keys):
    with running(parrot, Settings(keys=keys("# Ann", "ann-key", "", " bob-key "))) as (url, _):
        for given in ("ann-key", "bob-key"):
            assert post(url, {"model": "base", "messages": HELLO}, authorization=f"Bearer {given}").status_code == 200
        for header in (
            {},
            {"authorization": "Bearer"},
            {"authorization": "Bearer # Ann"},
            {"authorization": "Basic ann-key"},
            {"authorization": "Bearer ann-ke"},
        ):
            for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("POST", TEXT), ("GET", "/metrics"), ("GET", "/v1/models/base")):
                response = httpx.request(method, url + path, headers=header)
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{url}/health").status_code == 200
    assert len(parrot.asked) == 2


def test_keys_are_compared_in_constant_time(keys, monkeypatch):
    compared = []
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda one, other: compared.append((len(one), len(other))) or one == other)

    asked = Request({"type": "http", "headers": [(b"authorization", b"Bearer a")]})
    keys("a", "b" * 40, "c").check(asked)
    assert compared == [(32, 32)] * 3


@pytest.mark.parametrize("content", [b"", b"\n# nothing\n", b"\xff", None])
def test_a_file_without_keys_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ConfigError):
        Keys.read(tmp_path / "keys")


def test_another_host_is_refused_where_no_key_is_asked_for(parrot):
    with running(parrot, Settings(hosts=frozenset(AT_HOME))) as (url, _):
        assert httpx.get(f"{url}/v1/models", headers={"host": "evil.example"}).json()["error"]["code"] == "unknown_host"
        for host in ("localhost:8000", "LOCALHOST", "127.0.0.1", "[::1]:8000"):
            assert httpx.get(f"{url}/v1/models", headers={"host": host}).status_code == 200


def test_pages_of_other_origins_may_ask_only_where_they_are_named(parrot):
    origin = {"origin": "https://app.example", "access-control-request-method": "POST"}
    with running(parrot) as (url, _):
        assert "access-control-allow-origin" not in httpx.options(url + CHAT, headers=origin).headers
        assert "access-control-allow-origin" not in httpx.get(f"{url}/v1/models", headers=origin).headers
    with running(parrot, Settings(cors_origins=("https://app.example",))) as (url, _):
        assert httpx.options(url + CHAT, headers=origin).headers["access-control-allow-origin"] == "https://app.example"
        assert httpx.get(f"{url}/v1/models", headers=origin).headers["access-control-allow-origin"] == "https://app.example"
        other = httpx.get(f"{url}/v1/models", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_every_response_forbids_to_be_framed_or_guessed(url):
    for response in (
        httpx.get(f"{url}/health"),
        httpx.get(f"{url}/none"),
        post(url, b"{"),
        post(url, {"model": "base", "messages": HELLO, "stream": True}),
    ):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["x-request-id"].startswith("req-")
        assert "server" not in response.headers


# ---- bounds ------------------------------------------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_refused_in_words(url):
    body = json.dumps({"model": "base", "messages": [{"role": "user", "content": "a" * (1 << 20)}]}).encode()
    response = post(url, body)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")
    pieces = httpx.post(url + CHAT, content=(b"a" * 65_536 for _ in range(64)), headers={"content-type": "application/json"})
    assert pieces.status_code == 413
    with closing(connected(url)) as raw:  # sends all before it reads
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 3000000\r\n\r\n"
        )
        threading.Event().wait(0.3)
        raw.sendall(b"a" * 3_000_000)
        assert raw.recv(65_536).startswith(b"HTTP/1.1 413 ")
    with closing(connected(url)) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 999999999999\r\n\r\n")
        assert raw.recv(65_536).startswith(b"HTTP/1.1 413 ")


def test_a_million_stop_texts_are_refused_at_once(parrot):
    with running(parrot, Settings(most_bytes=1 << 24)) as (url, _):
        response = post(url, {"model": "base", "messages": HELLO, "stop": ["a"] * 1_000_000})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "stop")
    assert not parrot.asked


def test_a_body_of_another_kind_is_refused(url):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = httpx.post(url + CHAT, content=b"{}", headers={"content-type": kind})
        assert (response.status_code, response.json()["error"]["code"]) == (415, "invalid_content_type")


@pytest.mark.parametrize(
    "body", [b'{"model": "base", "prompt": "\xff"}', b'{"model": "base", "prompt": "a\\u0000"}', b'{"temperature": NaN}']
)
def test_bytes_that_are_no_text_are_refused(url, body):
    response = post(url, body, TEXT)
    assert response.status_code == 400
    assert response.json()["error"]["code"] in ("invalid_json", "invalid_text")


def test_names_with_markup_or_places_in_them_are_only_names(url):
    for name in ("../../etc/passwd", "<script>alert(1)</script>", "polite/../../x", "\u202epolite", "%00", "base\r\nx: y"):
        response = post(url, {"model": name, "messages": HELLO})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
        assert response.headers["content-type"] == "application/json"
    for path in ("/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2f%2e%2e%2fetc", "/v1/models/<b>"):
        assert httpx.get(url + path).status_code == 404


def test_where_all_places_are_taken_a_client_is_told_when_to_come_again():
    parrot = Parrot(places=1, pause=0.2)
    with running(parrot) as (url, _), OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        threads = [threading.Thread(target=post, args=(url, {"model": "base", "messages": HELLO})) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: parrot.open == 2)
        with pytest.raises(RateLimitError) as found:
            client.chat.completions.create(model="base", messages=HELLO)
        assert found.value.response.headers["retry-after"] == "3"
        assert found.value.code == "busy"
        several = post(url, {"model": "base", "messages": HELLO, "n": 5})
        assert several.status_code == 429
        for thread in threads:
            thread.join()
        assert parrot.open == 0


def test_what_takes_too_long_ends(parrot):
    parrot.pause = 0.2
    words = [{"role": "user", "content": "a " * 50}]
    with running(parrot, Settings(seconds=0.5)) as (url, _), OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        response = post(url, {"model": "base", "messages": words})
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        chunks = client.chat.completions.create(model="base", messages=words, stream=True)
        assert next(chunks).choices[0].delta.role == "assistant"
        with pytest.raises(APIError, match="took longer"):
            list(chunks)
        until(lambda: len(parrot.given_up) == 2 and parrot.running == 0)


# ---- clients that misbehave --------------------------------------------------------------------------------------------


def connected(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=120)


def head(body: bytes, length: int | None = None) -> bytes:
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (
        len(body) if length is None else length
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_goes_away_frees_its_places(parrot, url, stream, n):
    parrot.pause = 0.05
    body = json.dumps({"model": "base", "messages": LONG, "max_tokens": 4_000, "stream": stream, "n": n}).encode()
    with closing(connected(url)) as raw:
        raw.sendall(head(body) + body)
        if stream:
            assert raw.recv(1_024)
        until(lambda: parrot.running == n)
    until(lambda: parrot.running == 0)
    assert len(parrot.given_up) == n


def test_a_client_that_goes_away_while_it_waits_is_forgotten():
    parrot = Parrot(places=1, pause=0.05)
    body = json.dumps({"model": "base", "messages": LONG, "max_tokens": 4_000}).encode()
    with running(parrot) as (url, _), closing(connected(url)) as first:
        first.sendall(head(body) + body)
        until(lambda: parrot.running == 1)
        with closing(connected(url)) as second:
            second.sendall(head(body) + body)
            until(lambda: parrot.open == 2)
        until(lambda: parrot.open == 1)
        assert parrot.running == 1


def test_half_a_body_is_waited_for_a_while_only(parrot):
    with running(parrot, Settings(body_seconds=0.3)) as (url, _), closing(connected(url)) as raw:
        raw.sendall(head(b"", 100) + b'{"model": ')
        assert raw.recv(65_536).startswith(b"HTTP/1.1 408 ")
        until(lambda: raw.recv(65_536) == b"")
        assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.parametrize("sent", [b"", b"GET /heal", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"])
def test_half_a_head_is_waited_for_a_while_only(parrot, sent, monkeypatch):
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.3)
    with running(parrot) as (url, _):
        with closing(connected(url)) as raw:
            raw.sendall(sent)
            assert raw.recv(65_536) == b""
        with closing(connected(url)) as raw:  # so is what comes behind a request
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"ready" in raw.recv(65_536)
            raw.sendall(sent or b"G")
            until(lambda: raw.recv(65_536) == b"")


def test_a_slow_answer_is_not_taken_for_a_slow_client(monkeypatch):
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.2)
    with running(Parrot(pause=0.3)) as (url, _):
        assert post(url, {"model": "base", "messages": HELLO}).status_code == 200


def test_a_body_that_ends_early_is_forgotten(parrot, url):
    with closing(connected(url)) as raw:
        raw.sendall(head(b"", 100) + b'{"model": ')
        raw.shutdown(socket.SHUT_WR)
        while raw.recv(65_536):
            pass
    assert httpx.get(f"{url}/health").status_code == 200
    assert not parrot.asked


def test_what_is_no_http_at_all_is_refused(url):
    for sent in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"A" * 100_000):
        with closing(connected(url)) as raw:
            raw.sendall(sent)
            assert raw.recv(65_536).startswith(b"HTTP/1.1 400 ")
    assert httpx.get(f"{url}/health").status_code == 200


# ---- log and meters ----------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(caplog):
    """The log's lines about requests so far."""
    caplog.set_level(logging.INFO, "softprompt.serve")

    def read() -> list[dict]:
        return [json.loads(JsonLines().format(record)) for record in caplog.records if hasattr(record, "fields")]

    return read


def test_a_request_is_a_line_of_the_log_without_its_text(parrot, url, client, lines):
    client.chat.completions.create(model="polite", messages=HELLO, user="ann", n=2)
    list(client.chat.completions.create(model="polite", messages=HELLO, stream=True, safety_identifier="bob"))
    with pytest.raises(BadRequestError):
        client.chat.completions.create(model="polite", messages=HELLO, temperature=3)
    httpx.get(f"{url}/secret-place")
    until(lambda: len(lines()) == 4)
    first, second, third, fourth = lines()
    assert {key: first[key] for key in ("route", "method", "model", "status", "error", "answers", "user")} == {
        "route": CHAT, "method": "POST", "model": "polite", "status": 200, "error": None, "answers": 2, "user": "ann"
    }  # fmt: skip
    assert (first["prompt_tokens"], first["virtual_tokens"], first["completion_tokens"]) == (3, VIRTUAL, 6)
    assert 0 <= first["first_token"] <= first["seconds"]
    assert (second["user"], second["completion_tokens"], second["status"]) == ("bob", 3, 200)
    assert (third["status"], third["error"]) == (400, "invalid_value")
    assert (fourth["status"], fourth["route"]) == (404, "other")
    assert "hello" not in json.dumps(lines())
    assert "secret" not in json.dumps(lines())


def test_texts_stand_in_the_log_where_they_are_wanted(parrot, lines):
    with running(parrot, Settings(log_texts=True)) as (url, _):
        post(url, {"model": "polite", "messages": HELLO, "n": 2})
        until(lambda: len(lines()) == 1)
    (line,) = lines()
    assert line["asked"]["messages"] == HELLO
    assert line["said"] == {"0": "hello big world", "1": "hello big world"}


def test_one_that_went_away_is_logged_as_such(parrot, url, lines):
    parrot.pause = 0.05
    for stream in (False, True):
        body = json.dumps({"model": "base", "messages": LONG, "max_tokens": 4_000, "stream": stream}).encode()
        with closing(connected(url)) as raw:
            raw.sendall(head(body) + body)
            until(lambda: parrot.running == 1)
        until(lambda: parrot.running == 0)
    until(lambda: len(lines()) == 2)
    assert [(line["status"], line["error"]) for line in lines()] == [(499, "client_gone")] * 2


def test_a_line_of_the_log_cannot_be_forged(parrot, url, client, lines):
    with pytest.raises(NotFoundError):
        client.chat.completions.create(model='x"}\n{"status": 200', messages=HELLO)
    until(lambda: len(lines()) == 1)
    assert lines()[0]["model"] == 'x"}\n{"status": 200'


def metric(url: str, name: str) -> dict[str, float]:
    """The values of a metric by their labels."""
    found = [line.rpartition(" ") for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith(name)]
    return {label.removeprefix(name): float(value) for label, _, value in found}


def test_meters_count_what_happened(parrot, url, client):
    client.chat.completions.create(model="polite", messages=HELLO)
    list(client.completions.create(model="base", prompt="a b", stream=True))
    for name in ("evil-1", "evil-2"):
        with pytest.raises(NotFoundError):
            client.chat.completions.create(model=name, messages=HELLO)
    httpx.get(f"{url}/evil-3")
    until(lambda: any("other" in label for label in metric(url, "softprompt_requests_total")))
    assert metric(url, "softprompt_requests_total")['{kind="prompt",method="POST",route="/v1/chat/completions",status="200"}'] == 1
    assert metric(url, "softprompt_requests_total")['{kind="none",method="POST",route="/v1/chat/completions",status="404"}'] == 2
    tokens = metric(url, "softprompt_tokens_total")
    assert tokens['{kind="prompt",part="text"}'] == tokens['{kind="prompt",part="answer"}'] == 3
    assert tokens['{kind="prompt",part="virtual"}'] == VIRTUAL
    assert tokens['{kind="base",part="answer"}'] == 2
    assert metric(url, "softprompt_first_token_seconds_count") == {'{kind="base"}': 1, '{kind="prompt"}': 1}
    assert metric(url, "softprompt_between_tokens_seconds_count") == {"": 3}
    assert metric(url, "softprompt_kept_bytes") == {"": 11}
    assert metric(url, "softprompt_batch_bytes") == {"": 22}
    assert metric(url, "softprompt_models") == {"": 4}
    assert "evil" not in httpx.get(f"{url}/metrics").text


def test_meters_know_the_batch_and_who_waits():
    parrot = Parrot(places=2, pause=0.3)
    with running(parrot) as (url, _):
        threads = [threading.Thread(target=post, args=(url, {"model": "base", "messages": HELLO})) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: parrot.open == 3 and parrot.running == 2)
        assert metric(url, "softprompt_batch_answers") == {"": 2}
        assert metric(url, "softprompt_waiting_answers") == {"": 1}
        for thread in threads:
            thread.join()


# ---- the end -----------------------------------------------------------------------------------------------------------

SERVER = """
import sys
sys.path.insert(0, "tests")
from parrot import Parrot
from softprompt.serve.app import make_app
from softprompt.serve.log import log_as_json
from softprompt.serve.running import listen, server_of
from softprompt.serve.service import Settings
log_as_json()
parrot = Parrot(pause=float(sys.argv[1]))
with listen("127.0.0.1", 0) as listening:
    server_of(make_app(parrot, Settings()), float(sys.argv[2])).run(sockets=[listening])
assert parrot.closed
assert not [name for name in sys.modules if name == "torch"], "torch was imported"
"""


def started(pause: float, drain: float) -> tuple[subprocess.Popen, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(pause), str(drain)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    line = process.stdout.readline()
    assert line.startswith("0 prompts at http://127.0.0.1:")
    return process, line.split()[-1]


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_what_has_begun_is_finished_and_nothing_else_is_taken(sign):
    process, url = started(pause=0.3, drain=20)
    with httpx.stream("POST", url + CHAT, json={"model": "base", "messages": HELLO, "stream": True}, timeout=120) as response:
        os.kill(process.pid, sign)
        until(lambda: httpx.get(f"{url}/health").status_code == 503)
        refused = post(url, {"model": "base", "messages": HELLO})
        assert (refused.status_code, refused.json()["error"]["code"], refused.headers["retry-after"]) == (503, "draining", "5")
        text = "".join(response.iter_text())
    assert [event["choices"][0]["delta"].get("content") for event in events(text)] == ["", "hello", " big", " world", None]
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "")
    assert all(json.loads(line)["status"] in (200, 503) for line in err.splitlines())


def test_an_idle_server_ends_at_once_with_0():
    process, _ = started(pause=0, drain=1_000)
    process.terminate()
    assert process.communicate(timeout=120) == ("", "")
    assert process.returncode == 0


@pytest.mark.parametrize(("drain", "signals"), [(0.3, 1), (1_000, 2)])
def test_what_does_not_end_is_given_up(drain, signals):
    process, url = started(pause=1_000, drain=drain)
    with closing(connected(url)) as raw:
        body = json.dumps({"model": "base", "messages": HELLO}).encode()
        raw.sendall(head(body) + body)
        until(lambda: metric(url, "softprompt_batch_answers") == {"": 1})
        for _ in range(signals):
            process.terminate()
            time.sleep(0.2)
        process.wait(timeout=120)
    assert process.returncode == 0
    process.communicate()
