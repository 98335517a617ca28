"""The model hub: a mirror is honoured, a base comes from one, prompts go there and come back, and being offline is one sentence."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from hub_stand_in import TOKEN, StandIn
from huggingface_hub import close_session, constants
from safetensors.torch import load_file, save_file

from softprompt import cli
from softprompt import hub as hub_module
from softprompt.artifact import FILES, load_prompt, read_card
from softprompt.config import load_config
from softprompt.training import train

REPOSITORY = "someone/some-model"
NOBODY = "http://127.0.0.1:9"
LOAD = f"""
import softprompt
try:
    base = softprompt.load_base(softprompt.load_config(None, ["model.name={REPOSITORY}", "model.device=cpu"]).model)
    print("loaded", base.fingerprint)
except softprompt.Error as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def hub() -> Iterator[StandIn]:
    stand_in = StandIn()
    thread = threading.Thread(target=stand_in.server.serve_forever)
    thread.start()
    yield stand_in
    stand_in.release.set()
    stand_in.server.shutdown()
    stand_in.server.server_close()
    thread.join()


@pytest.fixture
def stocked(hub, bases) -> StandIn:
    """The hub has a base."""
    hub.add(REPOSITORY, Path(bases().name))
    return hub


def environment(home: Path, address: str, **variables: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.upper().startswith("HF_") and "proxy" not in key.lower()}
    return {**kept, "HF_HOME": str(home), "HF_ENDPOINT": address, **variables}


def run(home: Path, address: str, code: str = LOAD, **variables: str) -> subprocess.CompletedProcess[str]:
    told = environment(home, address, **variables)
    return subprocess.run([sys.executable, "-c", code], env=told, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def softprompt(monkeypatch, capsys, tmp_path) -> Callable[..., SimpleNamespace]:
    """softprompt(address, "push", ...): the command line in this process, as HF_ENDPOINT=address HF_TOKEN=token would have it; large
    files go the way that needs no service of their own."""
    for name in [name for name in os.environ if "proxy" in name.lower() or name.startswith("HF_")]:
        monkeypatch.delenv(name)

    def call(address: str, *words: object, token: str = TOKEN) -> SimpleNamespace:
        close_session()
        here = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}"}
        own = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": str(tmp_path / "token")}
        for name, value in {**here, **own, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(sys, "argv", ["softprompt", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        close_session()
        shown = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=shown.out, stderr=shown.err)

    return call


def line_of(done: SimpleNamespace) -> str:
    """The one line that says why nothing was done."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_mirror_is_asked_and_named(hub, tmp_path):
    done = run(tmp_path, hub.address)
    assert any(REPOSITORY in path for path in hub.asked)
    assert done.stdout.startswith(f"ModelError {REPOSITORY}: no such folder here")
    assert f"cannot be loaded from {hub.address} (HF_ENDPOINT sets a mirror)" in done.stdout


def test_a_base_comes_whole_from_a_mirror_and_then_from_the_cache(stocked, bases, tmp_path):
    done = run(tmp_path, stocked.address)
    assert done.stdout == f"loaded {bases().fingerprint}\n", done.stderr
    assert any(path.endswith("/model.safetensors") for path in stocked.asked)
    again = run(tmp_path, NOBODY)
    assert again.stdout == done.stdout, again.stderr


def test_a_mirror_that_needs_no_proxy_is_asked_directly(stocked, bases, tmp_path):
    done = run(tmp_path, stocked.address, http_proxy=NOBODY, no_proxy="127.0.0.1")
    assert done.stdout == f"loaded {bases().fingerprint}\n", done.stderr


def test_being_offline_is_one_sentence(tmp_path):
    done = run(tmp_path, NOBODY)
    assert done.stdout.startswith(f"ModelError {REPOSITORY}: no such folder here, and as a hub id it cannot be loaded from {NOBODY}")
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


def test_a_network_that_comes_back_is_used_by_the_same_process(stocked, bases, tmp_path):
    """One failed connection is not for ever: a process that lives long asks again, and the libraries are as they were."""
    code = f"""
import softprompt.hub as hub, huggingface_hub.constants as constants
connect, clock = hub.socket.create_connection, [0.0]
hub.time.monotonic = lambda: clock[0]
def refused(*args, **how):
    raise OSError("refused")
hub.socket.create_connection = refused
{LOAD}
print("offline", constants.HF_HUB_OFFLINE)
hub.socket.create_connection, clock[0] = connect, hub.ASKED_AGAIN_SECONDS
{LOAD}
"""
    done = run(tmp_path, stocked.address, code)
    first, offline, second = done.stdout.splitlines()
    assert first.startswith(f"ModelError {REPOSITORY}: no such folder here"), done.stderr
    assert offline == "offline False"
    assert second == f"loaded {bases().fingerprint}"


def test_a_failed_connection_is_asked_again_after_a_while(monkeypatch):
    tries, clock = [], [0.0]

    def refused(*args, **how):
        tries.append(args)
        raise OSError("refused")

    monkeypatch.setattr(hub_module.socket, "create_connection", refused)
    monkeypatch.setattr(hub_module.time, "monotonic", lambda: clock[0])
    hub_module._answers.cache_clear()
    for clock[0] in (0.0, 1.0, hub_module.ASKED_AGAIN_SECONDS + 1):
        with hub_module.hub():
            assert constants.HF_HUB_OFFLINE
    assert len(tries) == 2
    hub_module._answers.cache_clear()


def test_a_revision_is_asked_for(stocked, tmp_path):
    first = next(iter(stocked.repositories[REPOSITORY].commits))
    for revision, found in ((first, "loaded"), ("no-such-branch", "ModelError")):
        code = LOAD.replace('"model.device=cpu"', f'"model.device=cpu", "model.revision={revision}"')
        assert run(tmp_path / revision[:5], stocked.address, code).stdout.startswith(found)


def test_a_data_set_that_cannot_be_had_is_one_sentence(tmp_path):
    code = 'import softprompt\ntry:\n    softprompt.load_examples("someone/some-rows")\nexcept softprompt.Error as error:\n    print(error)'
    done = run(tmp_path, NOBODY, code)
    assert f"cannot be loaded from {NOBODY}" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


def test_a_local_folder_needs_no_hub(tmp_path):
    folder = tiny.tiny_folder(tmp_path / "base")
    done = run(tmp_path, NOBODY, LOAD.replace(REPOSITORY, str(folder)))
    assert done.stdout.startswith("loaded "), done.stderr
    assert done.stderr == ""


# ---- prompts go there and come back --------------------------------------------------------------------------------

MINE = "me/my-prompt"


@pytest.fixture(scope="module")
def prompt(tmp_path_factory, bases) -> Path:
    """A finished run that was started from another prompt; its base lies in a local folder."""
    home = tmp_path_factory.mktemp("private-place")
    rows = tiny.write_rows(home / "train.jsonl", tiny.some_rows(12))
    settings = [f"model.name={bases().name}", "model.device=cpu", f"data.train={rows}", "train.steps=2"]
    list(train(load_config(None, [*settings, "prompt.length=4", f"train.out={home / 'first'}"]), base=bases()))
    list(train(load_config(None, [*settings, f"prompt.file={home / 'first'}", f"train.out={home / 'run'}"]), base=bases()))
    return home / "run"


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub 2.4's own upload of large files
@pytest.mark.parametrize("lfs", [True, False])
def test_a_prompt_goes_to_the_hub_and_comes_back(hub, prompt, bases, tmp_path, softprompt, lfs):
    hub.lfs = lfs
    report = tmp_path / "report.json"
    pushed = softprompt(hub.address, "push", prompt, MINE, "--base-id", REPOSITORY, "--json", report)
    assert (pushed.returncode, pushed.stderr) == (0, ""), pushed.stderr
    assert json.loads(report.read_text()) == {"prompt": str(prompt), "repository": MINE, "address": f"{hub.address}/{MINE}"}
    assert any(line.startswith("PUT /lfs/") for line in hub.asked) == lfs
    repository = hub.repositories[MINE]
    assert repository.messages == ["A soft prompt of 4 virtual tokens"]  # one commit: never half a prompt
    assert set(repository.files("main")) == set(FILES)
    pulled = softprompt(hub.address, "pull", MINE, "--out", tmp_path / "pulled", "--json", report)
    assert (pulled.returncode, pulled.stderr) == (0, "")
    assert json.loads(report.read_text()) == {
        "prompt": str(tmp_path / "pulled"), "repository": MINE, "base": REPOSITORY, "num_virtual_tokens": 4,
    }  # fmt: skip
    assert sorted(file.name for file in (tmp_path / "pulled").iterdir()) == sorted(FILES)
    assert torch.equal(load_prompt(tmp_path / "pulled", bases()).soft.rows_PH, load_prompt(prompt, bases()).soft.rows_PH)
    assert read_card(tmp_path / "pulled").base.fingerprint == read_card(prompt).base.fingerprint


def test_the_mirror_is_where_prompts_and_their_bases_are(stocked, prompt, tmp_path):
    stocked.lfs = True
    told = environment(tmp_path, stocked.address, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
    for words in (
        ("push", prompt, MINE, "--base-id", REPOSITORY),
        ("pull", MINE, "--out", tmp_path / "pulled"),
        ("generate", tmp_path / "pulled", "bring tea", "--max-new-tokens", "3"),
    ):
        command = [sys.executable, "-m", "softprompt", *map(str, words)]
        done = subprocess.run(command, env=told, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    for asked in ("POST /api/repos/create", "PUT /lfs/", f"GET /{MINE}/resolve/", f"GET /{REPOSITORY}/resolve/"):
        assert any(line.startswith(asked) for line in stocked.asked), asked


def test_what_is_pushed_names_no_place_of_this_machine_and_is_a_model_card(hub, prompt, bases, tmp_path, softprompt):
    assert softprompt(hub.address, "push", prompt, MINE, "--base-id", REPOSITORY).returncode == 0
    files = hub.repositories[MINE].files("main")
    for place in (bases().name, str(prompt.parent), str(tmp_path.parent.parent)):
        assert all(place.encode() not in body for body in files.values())
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == REPOSITORY
    readme = files["README.md"].decode()
    assert yaml.safe_load(readme.split("---\n")[1])["base_model"] == REPOSITORY
    assert f"softprompt pull {MINE} --out my-prompt\nsoftprompt generate my-prompt" in readme
    assert f'PeftModel.from_pretrained(base_model, "{MINE}")' in readme
    assert "4 from the 4 rows of first" in json.loads(files["card.json"])["init"]


def test_a_base_in_a_local_folder_must_be_named(hub, prompt, bases, tmp_path, softprompt):
    error = line_of(softprompt(hub.address, "push", prompt, MINE))
    assert f"{bases().name} is the base's place on this machine: say by --base-id OWNER/NAME" in error
    assert "is no base of the hub" in line_of(softprompt(hub.address, "push", prompt, MINE, "--base-id", "/tmp/base"))
    assert "is no repository of the hub" in line_of(softprompt(hub.address, "push", prompt, "a/b/c", "--base-id", REPOSITORY))
    assert hub.asked == []


def test_a_card_that_names_the_home_folder_is_not_pushed(hub, prompt, tmp_path, softprompt, monkeypatch):
    folder = Path(shutil.copytree(prompt / "prompt", tmp_path / "prompt"))
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | {"init": f"from {tmp_path / 'home'}/rows"}))
    words = ("push", folder, MINE, "--base-id", REPOSITORY)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    error = line_of(softprompt(hub.address, *words))
    assert f"card.json names {tmp_path / 'home'}, a place on this machine" in error
    assert hub.asked == []


def test_a_damaged_prompt_is_not_pushed(hub, prompt, tmp_path, softprompt):
    folder = Path(shutil.copytree(prompt / "prompt", tmp_path / "prompt"))
    rows = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    save_file({"prompt_embeddings": rows * torch.inf}, folder / "adapter_model.safetensors")
    assert "not finite" in line_of(softprompt(hub.address, "push", folder, MINE, "--base-id", REPOSITORY))
    assert hub.asked == []


def test_only_those_who_may_write_push(hub, prompt, tmp_path, softprompt):
    done = softprompt(hub.address, "push", prompt, MINE, "--base-id", REPOSITORY, token="")
    assert f"{MINE} cannot be pushed to {hub.address} (HF_ENDPOINT sets a mirror)" in line_of(done)
    assert "log in with hf auth login" in done.stderr
    assert hub.repositories == {}


def test_a_private_repository_is_private_and_a_public_one_is_not_taken_for_one(hub, prompt, tmp_path, softprompt):
    words = ("push", prompt, MINE, "--base-id", REPOSITORY, "--private")
    assert softprompt(hub.address, *words).returncode == 0
    assert hub.repositories[MINE].private
    assert "there is no such repository, or it is not for you" in line_of(
        softprompt(hub.address, "pull", MINE, "--out", tmp_path / "pulled", token="")
    )
    hub.repositories[MINE].private = False
    assert "exists and is public" in line_of(softprompt(hub.address, *words))
    assert len(hub.repositories[MINE].commits) == 1


def test_an_older_revision_is_pulled(hub, prompt, tmp_path, softprompt):
    repository = hub.add(MINE, prompt / "prompt")
    (first,) = repository.commits
    repository.commit({"card.json": b"damaged"})
    assert "card.json is damaged" in line_of(softprompt(hub.address, "pull", MINE, "--out", tmp_path / "pulled"))
    assert softprompt(hub.address, "pull", MINE, "--out", tmp_path / "pulled", "--revision", first).returncode == 0
    words = ("pull", MINE, "--out", tmp_path / "other", "--revision", "no-such-branch")
    assert "it has no such revision" in line_of(softprompt(hub.address, *words))
    assert not (tmp_path / "other").exists()


SPOILED = {
    "a pickle": ({"adapter_model.safetensors": b"\x80\x04 this is a pickle"}, "is damaged"),
    "cut off": ({"adapter_model.safetensors": b"\x10\x00"}, "is damaged"),
    "a template file": ({"card.json": "template"}, "a card must hold the template itself"),
    "a damaged adapter": ({"adapter_config.json": b"[]"}, "adapter_config.json is damaged"),
    "another adapter": ({"adapter_config.json": b'{"peft_type": "LORA"}'}, "another kind of adapter"),
    "no card": ({"card.json": None}, "it was not written by softprompt"),
    "no rows": ({"adapter_model.safetensors": None}, "adapter_model.safetensors is missing"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_what_is_no_prompt_is_not_put_in_place(hub, prompt, tmp_path, kind, softprompt):
    changes, reason = SPOILED[kind]
    files = hub.add(MINE, prompt / "prompt").files("main")
    for name, body in changes.items():
        files.pop(name)
        if body == "template":
            body = json.dumps(json.loads((prompt / "prompt" / name).read_text()) | {"template": "/etc/some.jinja"}).encode()
        if body is not None:
            files[name] = body
    error = line_of(softprompt(hub.address, "pull", MINE, "--out", tmp_path / "pulled"))
    assert reason in error
    assert MINE in error
    assert not (tmp_path / "pulled").exists()


def test_files_beside_a_prompt_stay_where_they_are(hub, prompt, tmp_path, softprompt):
    hub.add(MINE, prompt / "prompt").files("main").update({"adapter_model.bin": b"pickle", "run.py": b"code"})
    assert softprompt(hub.address, "pull", MINE, "--out", tmp_path / "pulled").returncode == 0
    assert sorted(file.name for file in (tmp_path / "pulled").iterdir()) == sorted(FILES)
    assert not any("adapter_model.bin" in line or "run.py" in line for line in hub.asked)


def test_an_interrupted_pull_leaves_nothing_and_can_be_done_again(hub, prompt, tmp_path, softprompt):
    hub.add(MINE, prompt / "prompt")
    hub.held = "adapter_model.safetensors"
    told = environment(tmp_path / "home", hub.address, HF_HUB_DISABLE_XET="1")
    command = [sys.executable, "-m", "softprompt", "pull", MINE, "--out", str(tmp_path / "here" / "pulled")]
    with subprocess.Popen(command, env=told, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert hub.holding.wait(60)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "here").exists()
    hub.held = None
    hub.release.set()
    assert softprompt(hub.address, "pull", MINE, "--out", tmp_path / "here" / "pulled").returncode == 0


def test_what_is_there_is_kept(hub, prompt, tmp_path, softprompt):
    hub.add(MINE, prompt / "prompt")
    (tmp_path / "pulled").mkdir()
    assert "exists: choose another folder" in line_of(softprompt(hub.address, "pull", MINE, "--out", tmp_path / "pulled"))
    assert list((tmp_path / "pulled").iterdir()) == []


def test_offline_is_one_sentence_and_what_was_pulled_before_is_still_there(hub, prompt, tmp_path, softprompt):
    offline = f"{MINE} cannot be pushed to {NOBODY} (HF_ENDPOINT sets a mirror): it does not answer"
    assert offline in line_of(softprompt(NOBODY, "push", prompt, MINE, "--base-id", REPOSITORY))
    offline = f"{MINE} cannot be pulled from {NOBODY} (HF_ENDPOINT sets a mirror): it does not answer"
    assert offline in line_of(softprompt(NOBODY, "pull", MINE, "--out", tmp_path / "pulled"))
    hub.add(MINE, prompt / "prompt")
    assert softprompt(hub.address, "pull", MINE, "--out", tmp_path / "one").returncode == 0
    assert softprompt(NOBODY, "pull", MINE, "--out", tmp_path / "two").returncode == 0
