"""The model hub: a mirror is honoured, a whole base comes from one, and being offline is one sentence."""

import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
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


class Handler(BaseHTTPRequestHandler):
    """Just enough of the hub: a repository's files and facts, or 404. Remembers what it was asked for."""

    def __init__(self, folder: Path | None, asked: list[str], *how) -> None:
        self.folder, self.asked = folder, asked
        super().__init__(*how)

    def log_message(self, *what) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        body, path = None, self.path.partition("?")[0]
        if self.folder and path.startswith(f"/{REPOSITORY}/resolve/"):
            file = self.folder / path.split("/", 5)[5]
            body = file.read_bytes() if file.is_file() else None
        elif self.folder and path.startswith(f"/api/models/{REPOSITORY}"):
            files = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0"} for file in self.folder.iterdir()]
            facts = {"id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": file["path"]} for file in files], "tags": []}
            body = json.dumps(files if "/tree/" in path else facts).encode()
        self.send_response(404 if body is None else 200)
        body = body or b""
        if not body:
            self.send_header("X-Error-Code", "EntryNotFound" if self.folder else "RepoNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


class StandIn:
    """A hub on this machine, for one folder or for none."""

    def __init__(self, folder: Path | None) -> None:
        self.asked: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, folder, self.asked))
        self.address = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture(params=[False])
def hub(request, bases) -> Iterator[StandIn]:
    stand_in = StandIn(Path(bases().name) if request.param else None)
    thread = threading.Thread(target=stand_in.server.serve_forever)
    thread.start()
    yield stand_in
    stand_in.server.shutdown()
    stand_in.server.server_close()
    thread.join()


def run(home: Path, address: str, code: str = LOAD, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.upper().startswith("HF_") and "proxy" not in key.lower()}
    environment = {**kept, "HF_HOME": str(home), "HF_ENDPOINT": address, **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_mirror_is_asked_and_named(hub, tmp_path):
    done = run(tmp_path, hub.address)
    assert any(REPOSITORY in path for path in hub.asked)
    assert done.stdout.startswith(f"ModelError {REPOSITORY}: no such folder here")
    assert f"cannot be loaded from {hub.address} (HF_ENDPOINT sets a mirror)" in done.stdout


@pytest.mark.parametrize("hub", [True], indirect=True)
def test_a_base_comes_whole_from_a_mirror_and_then_from_the_cache(hub, bases, tmp_path):
    done = run(tmp_path, hub.address)
    assert done.stdout == f"loaded {bases().fingerprint}\n", done.stderr
    assert any(path.endswith("/model.safetensors") for path in hub.asked)
    again = run(tmp_path, NOBODY)
    assert again.stdout == done.stdout, again.stderr


@pytest.mark.parametrize("hub", [True], indirect=True)
def test_a_mirror_that_needs_no_proxy_is_asked_directly(hub, bases, tmp_path):
    done = run(tmp_path, hub.address, http_proxy=NOBODY, no_proxy="127.0.0.1")
    assert done.stdout == f"loaded {bases().fingerprint}\n", done.stderr


def test_being_offline_is_one_sentence(tmp_path):
    done = run(tmp_path, NOBODY)
    assert done.stdout.startswith(f"ModelError {REPOSITORY}: no such folder here, and as a hub id it cannot be loaded from {NOBODY}")
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


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
