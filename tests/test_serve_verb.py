"""softprompt serve, started as people start it, on a tiny base: answers over HTTP are those of `generate` and of the harness."""

import json
import logging
import random
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from io import BytesIO
from pathlib import Path

import httpx
import pytest
import tiny
from openai import BadRequestError, OpenAI
from parrot import until

from softprompt import Ensemble, Message, Sampling, generate, load_base, load_prompt
from softprompt.cli import serving
from softprompt.config import ModelConfig, load_config
from softprompt.errors import ConfigError
from softprompt.training import train

TEMPLATES = {"polite": "chat", "human": "human-assistant", "deep": "chat"}
QUESTIONS = ("bring tea", "please bring coffee", "水", "bring juice, please, and some 咖啡")


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """The verb, run in this process, sends all that is logged to standard error."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("softprompt.serve").setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base, and runs of prompts for it."""
    home = tmp_path_factory.mktemp("serve")
    tiny.tiny_folder(home / "base", chat=True)
    ends = {
        "bos_token_id": tiny.BOS,
        "eos_token_id": [tiny.EOS, *range(100, 116)],
        "pad_token_id": tiny.PAD,
    }  # so that answers come to an end
    (home / "base" / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    rows = tiny.write_rows(home / "rows.jsonl", tiny.some_rows(12))
    for name, template in TEMPLATES.items():
        settings = [
            f"model.name={home / 'base'}", "model.device=cpu", f"data.train={rows}", f"data.template={template}", "prompt.text=Say it.",
            "optim.relative_lr=0.5", "train.steps=2", f"train.out={home / name}",
            f"prompt.method={'prefix' if name == 'deep' else 'prompt'}",
        ]  # fmt: skip
        list(train(load_config(None, settings)))
    for name in ("keys", "admin"):
        (home / name).write_text(f"{name}-key\n", encoding="utf-8")
    return home


@pytest.fixture(scope="module")
def base(home):
    return load_base(ModelConfig(name=str(home / "base"), device="cpu"))


@pytest.fixture(scope="module")
def prompts(home, base):
    return {name: load_prompt(home / name, base) for name in TEMPLATES}


@contextmanager
def serving_it(home: Path, *words: str) -> Iterator[tuple[str, list[str]]]:
    """The address of a server, and the lines of its log when it has ended."""
    command = [sys.executable, "-m", "softprompt", "serve", *words, "model.device=cpu", "model.dtype=float32", "--port", "0"]
    process = subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log: list[str] = []
    try:
        line = process.stdout.readline()
        assert " at http://127.0.0.1:" in line, process.communicate()[1]
        yield line.split()[-1], log
    finally:
        process.terminate()
        out, err = process.communicate(timeout=300)
        log += err.splitlines()
    assert (process.returncode, out) == (0, "")
    for entry in log:
        json.loads(entry)


@pytest.fixture(scope="module")
def url(home):
    with serving_it(home, "polite", "h=human", "deep/prompt", "--ensemble", "both=polite+h", "--ensemble", "voted=vote:polite+deep") as (
        address,
        log,
    ):
        yield address
    assert not [line for line in log if json.loads(line)["level"] == "error"], log


@pytest.fixture(scope="module")
def client(url):
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def say(client, model: str, text: str, **how) -> str:
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **how).choices[0].message.content


# ---- answers -----------------------------------------------------------------------------------------------------------


def test_names_are_those_of_runs_and_folders_or_given(client):
    served = {model.id: model.kind for model in client.models.list()}
    assert served == {
        "base": "base", "polite": "prompt", "h": "prompt", "deep": "prompt", "both": "ensemble", "voted": "ensemble"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["polite", "h", "deep"])
def test_answers_are_those_of_generate(client, base, prompts, name):
    own = prompts["human" if name == "h" else name]
    for how, sampling in (
        ({}, Sampling(9)),
        ({"temperature": 1.2, "top_p": 0.9, "seed": 5, "extra_body": {"top_k": 50}}, Sampling(9, 1.2, 0.9, 50, 5)),
        ({"temperature": 1, "seed": 6, "extra_body": {"min_p": 0.1}}, Sampling(9, 1, seed=6, min_p=0.1)),
        ({"frequency_penalty": 2, "presence_penalty": 1}, Sampling(9, frequency_penalty=2, presence_penalty=1)),
    ):
        expected = generate(base, own, QUESTIONS, sampling)
        assert [say(client, name, text, max_tokens=9, **how) for text in QUESTIONS] == expected
        assert len(set(expected)) > 1


def test_ensembles_answer_as_in_generate(client, base, prompts):
    for name, members, by in (("both", ("polite", "human"), "mean"), ("voted", ("polite", "deep"), "vote")):
        together = Ensemble(tuple(prompts[one] for one in members), by)
        assert [say(client, name, text, max_tokens=9) for text in QUESTIONS] == generate(base, together, QUESTIONS, Sampling(9))
    with pytest.raises(BadRequestError, match="temperature must be 0"):
        say(client, "voted", "bring tea", temperature=1)


def test_turns_are_read(client, base, prompts):
    turns = [Message("system", "Be kind."), Message("user", "bring tea"), Message("assistant", "tea"), Message("user", "and milk")]
    asked = [{"role": turn.role, "content": turn.content} for turn in turns]
    answer = client.chat.completions.create(model="polite", messages=asked, max_tokens=9).choices[0].message.content
    assert [answer] == generate(base, prompts["polite"], [turns], Sampling(9))


def test_a_stream_says_what_is_said_whole(client):
    how = {"max_tokens": 24, "n": 3, "temperature": 1, "seed": 1, "logprobs": True, "top_logprobs": 3}
    asked = {"model": "deep", "messages": [{"role": "user", "content": "bring tea"}], **how}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks.pop().usage.completion_tokens == whole.usage.completion_tokens
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert own[-1].finish_reason == choice.finish_reason
        scores = [score for one in own if one.logprobs for score in one.logprobs.content]
        for one, other in zip(scores, choice.logprobs.content, strict=True):
            assert [score.token for score in (one, *one.top_logprobs)] == [score.token for score in (other, *other.top_logprobs)]
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert len({choice.message.content for choice in whole.choices}) == 3


def test_stop_texts_end_an_answer_also_across_tokens(client):
    text = client.completions.create(model="base", prompt="bring", max_tokens=30, temperature=1, seed=3).choices[0].text
    stop = text[5:8]
    assert len(stop.encode()) > 2
    (choice,) = client.completions.create(model="base", prompt="bring", max_tokens=30, temperature=1, seed=3, stop=[stop, "never"]).choices
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")


def test_a_schema_is_kept_to(client):
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "one", "schema": schema, "strict": True}}
    for seed in range(3):
        said = say(client, "polite", "bring tea", max_tokens=200, temperature=1, seed=seed, response_format=form)
        assert json.loads(said)["a"] in ("x", "y")
    form["json_schema"]["schema"] = {"type": "no such type"}
    with pytest.raises(BadRequestError) as found:
        say(client, "polite", "bring tea", response_format=form)
    assert found.value.param == "response_format"


def test_a_bias_forbids_tokens_or_forces_them(client):
    token = 3 + 65
    said = client.completions.create(model="base", prompt="bring", max_tokens=4, logit_bias={str(token): 100}, logprobs=0)
    assert len(set(said.choices[0].logprobs.tokens)) == 1
    with pytest.raises(BadRequestError) as found:
        client.completions.create(model="base", prompt="bring", logit_bias={"99999": 1})
    assert found.value.param == "logit_bias"


def test_what_cannot_be_read_is_refused(client):
    for text, message in (("a" * 2_000, "context"), (" ", "empty")):
        with pytest.raises(BadRequestError, match=message) as found:
            say(client, "polite", text)
        assert (found.value.param, found.value.code) == ("messages", "invalid_text")
    with pytest.raises(BadRequestError, match="token ids") as found:
        client.completions.create(model="base", prompt=[1_000_000])
    assert found.value.param == "prompt"


def test_a_pattern_meant_to_hang_hangs_nothing(url, client):
    def ask(pattern: str) -> int:
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "string", "pattern": pattern}}}
        asked = {"model": "base", "prompt": "a", "max_tokens": 8, "temperature": 1, "seed": 1, "response_format": form}
        return httpx.post(f"{url}/v1/completions", json=asked, timeout=300).status_code

    patterns = ("^(a+)+$", "^(a|a)*b$", "(.*)*(.*)*x", "a{1,1000}{1,1000}", "(((((a{50}){50}){50}){50}){50})")
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(ask, pattern) for pattern in patterns]
        assert say(client, "polite", "bring tea", max_tokens=3) is not None
        assert {done.result() for done in waiting} <= {200, 400}


# ---- many at once ------------------------------------------------------------------------------------------------------


def test_many_at_once_get_what_each_gets_alone_whatever_others_do(url, base, prompts):
    """A third leave early, are malformed or too large; the others' answers are those of `generate`."""
    draw = random.Random(0)

    def ask(number: int) -> tuple[int, str | None]:
        name = draw.choice(["polite", "human", "deep"])
        text, seed = f"bring {number} {'x' * draw.randint(0, 60)}", draw.randint(0, 9)
        asked = {"model": "h" if name == "human" else name, "messages": [{"role": "user", "content": text}], "max_tokens": 12}
        asked |= {"temperature": draw.choice([0, 1.3]), "seed": seed}
        match number % 9:
            case 0:
                with httpx.stream(
                    "POST", f"{url}/v1/chat/completions", json={**asked, "stream": True, "max_tokens": 200}, timeout=300
                ) as response:
                    next(response.iter_lines())
                return response.status_code, None
            case 1:
                return httpx.post(f"{url}/v1/chat/completions", json={**asked, "temperature": 7}, timeout=300).status_code, None
            case 2:
                return httpx.post(f"{url}/v1/chat/completions", json={**asked, "user": "u" * (1 << 20)}, timeout=300).status_code, None
        answer = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=300).json()
        expected = generate(base, prompts[name], [text], Sampling(12, asked["temperature"], seed=seed))
        assert [answer["choices"][0]["message"]["content"]] == expected
        return 200, expected[0]

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(90)))
    assert [status for status, _ in found] == [{1: 400, 2: 413}.get(number % 9, 200) for number in range(90)]
    until(lambda: "softprompt_batch_answers 0.0" in httpx.get(f"{url}/metrics").text)


# ---- the harness -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
@pytest.mark.parametrize("name", ["base", "polite"])
def test_the_harness_scores_the_same_over_http(url, home, tmp_path, name):
    rows = [{"q": f"bring {word} {n}", "right": n % 2} for n, word in enumerate(["tea", "milk", "juice", "coffee"] * 3)]
    tiny.write_rows(tmp_path / "task.jsonl", rows)
    for task, kind in {"drinks": "multiple_choice", "said": "generate_until"}.items():
        more = (
            'doc_to_choice: ["tea", "milk"]\ndoc_to_target: right\nmetric_list: [{metric: acc}]\n'
            if task == "drinks"
            else "doc_to_target: '{{q}}'\ngeneration_kwargs: {until: ['e'], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]\n"
        )
        (tmp_path / f"{task}.yaml").write_text(
            f"task: {task}\ndataset_path: json\noutput_type: {kind}\ntest_split: train\n"
            f"dataset_kwargs: {{data_files: {tmp_path / 'task.jsonl'}}}\ndoc_to_text: '{{{{q}}}}:'\n{more}",
            encoding="utf-8",
        )
    import lm_eval
    import lm_eval.models  # registers those of its own
    from lm_eval.tasks import TaskManager

    from softprompt import harness  # noqa: F401 - registers the model

    def judged(model: str, arguments: str) -> list[object]:
        tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
        found = lm_eval.simple_evaluate(
            model, model_args=arguments, tasks=["drinks", "said"], task_manager=tasks, batch_size=4, device="cpu"
        )
        return [sample["resps"] for task in ("drinks", "said") for sample in found["samples"][task]]

    over_http = judged(
        "local-completions", f"model={name},base_url={url}/v1/completions,tokenizer={home / 'base'},tokenized_requests=True,max_length=512"
    )
    here = (
        judged("hf", f"pretrained={home / 'base'},add_bos_token=True") if name == "base" else judged("softprompt", f"prompt={home / name}")
    )
    assert len(over_http) == 24
    for one, other in zip(over_http[:12], here[:12], strict=True):
        for (score, greedy), (known, also) in zip((pair[0] for pair in one), (pair[0] for pair in other), strict=True):
            assert (score, greedy) == (pytest.approx(known, abs=2e-3), also)
    if name != "base":  # the harness's own model writes end tokens that are no special ones into its answers
        assert over_http[12:] == here[12:]


# ---- prompts that come and go ------------------------------------------------------------------------------------------


def packed(folder: Path) -> bytes:
    made = BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        tar.add(folder, arcname="prompt")
    return made.getvalue()


def test_prompts_come_and_go_over_http_and_in_a_folder(home, base, prompts, tmp_path):
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    shutil.copytree(home / "human" / "prompt", shelf / "first")
    tiny.tiny_folder(tmp_path / "other", chat=True, seed=1)
    settings = [f"model.name={tmp_path / 'other'}", "model.device=cpu", f"data.train={home / 'rows.jsonl'}", "train.steps=1"]
    list(train(load_config(None, [*settings, f"train.out={tmp_path / 'foreign'}"])))
    admin = {"authorization": "Bearer admin-key"}
    expected = generate(base, prompts["polite"], ["bring tea"], Sampling(9))
    words = ("--folder", str(shelf), "--admin-key-file", "admin", "--memory", "1")
    with serving_it(home, *words) as (url, _), closing(client_of(url)) as client:
        assert say(client, "first", "bring tea", max_tokens=9) == generate(base, prompts["human"], ["bring tea"], Sampling(9))[0]
        added = httpx.post(f"{url}/v1/prompts?name=new", content=packed(home / "polite" / "prompt"), headers=admin)
        assert added.status_code == 201, added.text
        assert [say(client, "new", "bring tea", max_tokens=9)] == expected
        refused = httpx.post(f"{url}/v1/prompts?name=foreign", content=packed(tmp_path / "foreign" / "prompt"), headers=admin)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_prompt")
        assert "whose weights differ" in refused.json()["error"]["message"]
        shutil.copytree(home / "deep" / "prompt", shelf / ".draft")
        (shelf / ".draft").rename(shelf / "dropped")
        until(lambda: "dropped" in {model.id for model in client.models.list()})
        assert [say(client, "dropped", "bring tea", max_tokens=9)] == generate(base, prompts["deep"], ["bring tea"], Sampling(9))
        for name in ("new", "dropped"):
            assert httpx.delete(f"{url}/v1/prompts/{name}", headers=admin).status_code == 200
        assert {model.id for model in client.models.list()} == {"base", "first"}
    assert [path.name for path in shelf.iterdir()] == ["first"]


def client_of(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_keys_of_a_file_are_asked_for(home):
    with serving_it(home, "polite", "--api-key-file", "keys") as (url, log):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer keys-key", "host": "x.example"}).status_code == 200
    assert [json.loads(line)["status"] for line in log] == [401, 200]


# ---- what cannot be served ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to serve"),
        (["none"], "no prompt here"),
        (["x=none"], "no prompt here"),
        (["polite", "polite/prompt"], "would both be served as polite"),
        (["polite", "human", "--ensemble", "both"], "write NAME=A"),
        (["polite", "--ensemble", "both=polite"], "write NAME=A"),
        (["polite", "--ensemble", "both=polite+none"], "no model 'none'"),
        (["base=polite"], "the name of the base"),
        (["polite", "--host", "0.0.0.0"], "give --api-key-file"),
        (["polite", "--host", "::"], "give --api-key-file"),
        (["polite", "--host", "some.example"], "give --api-key-file"),
        (["polite", "--host", "192.0.2.1", "--api-key-file", "keys"], "--host 192.0.2.1"),
        (["polite", "--api-key-file", "none"], "no keys could be read"),
        (["polite", "--folder", "none"], "no such folder"),
        (["polite", "model.name=none"], "none"),
        (["polite", "--engine", "sglang"], "there are own, llama, vllm and vllm=URL"),
        (["polite", "--engine", "vllm="], "there are own, llama, vllm and vllm=URL"),
        (["polite", "--engine", "vllm", "--memory", "9"], "are for the engines own and llama"),
        (["polite", "--engine", "vllm=http://127.0.0.1:1"], "needs --vllm-folder"),
        (["polite", "--engine", "vllm=http://127.0.0.1:1", "--vllm-folder", "kv"], "no vLLM server answers"),
        (["polite", "--vllm-folder", "kv"], "go with --engine vllm"),
    ],
)
def test_what_cannot_be_served_is_a_sentence_and_exit_code_2(home, words, message, monkeypatch, capsys):
    from softprompt import cli

    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", ["softprompt", "serve", *words, "--port", "0"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_port_that_is_taken_is_a_sentence(home, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [sys.executable, "-m", "softprompt", "serve", "polite", "--port", str(taken.getsockname()[1])]
        ended = subprocess.run(words, cwd=home, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "Address already in use" in ended.stderr


def test_a_missing_extra_is_a_sentence(home, monkeypatch, capsys):
    from softprompt import cli

    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr(sys, "argv", ["softprompt", "serve", str(home / "polite")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    said = "error: softprompt serve needs llguidance, which is not installed: pip install 'softprompt[serve]'\n"
    assert capsys.readouterr().err == said


def test_a_bank_is_served_by_the_names_of_its_prompts(home, make_config):
    list(train(make_config("train.steps=1", "prompt.count=2")))
    run = make_config().train.out
    assert list(serving._named([run])) == [path.name for path in sorted((Path(run) / "prompts").iterdir())]
    with pytest.raises(ConfigError, match="would both be served"):
        serving._named([run, run])
