"""A model hub on this machine: repositories in memory behind the endpoints that huggingface_hub asks for."""

import base64
import functools
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml

TOKEN = "hf_of_the_stand_in"


@dataclass
class Repository:
    """Its commits, the last one is `main`; each has the bytes of all its files."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], message: str = "") -> str:
        whole = {**self.files("main"), **files} if self.commits else files
        name = hashlib.sha1(f"{len(self.commits)}{sorted(whole)}".encode()).hexdigest()
        self.commits[name] = whole
        self.messages.append(message)
        return name

    def find(self, revision: str) -> str | None:
        """The commit of a revision."""
        if revision == "main":
            return list(self.commits)[-1] if self.commits else hashlib.sha1(b"empty").hexdigest()
        return revision if revision in self.commits else None

    def files(self, revision: str) -> dict[str, bytes]:
        return self.commits.get(self.find(revision) or "", {})


class StandIn:
    """`asked`: method and path of every request. `lfs`: large files and .safetensors are uploaded apart, as the real hub has it.
    `held`: a file whose download does not end, while it is
    set."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.lfs = False
        self.held: str | None = None
        self.holding, self.release = threading.Event(), threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, self))
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, name: str, folder: Path) -> Repository:
        """A repository with the files of a folder."""
        repository = self.repositories[name] = Repository()
        repository.commit({file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()})
        return repository


class Handler(BaseHTTPRequestHandler):
    """One request. Writing needs TOKEN; private repositories are not there without it."""

    def __init__(self, hub: StandIn, *how: Any) -> None:
        self.hub = hub
        super().__init__(*how)

    def log_message(self, *what: Any) -> None:
        pass

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def repository(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        return None if found is None or (found.private and not self.known) else found

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name, rest = ("/".join(parts[2:4]), parts[4:]) if api else ("/".join(parts[:2]), parts[2:])
        repository = self.repository(name)
        if repository is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        commit = repository.find(rest[1] if len(rest) > 1 else "main")
        if commit is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        files = repository.files(commit)
        if not api:
            return self.file("/".join(rest[2:]), files, commit)
        if rest[:1] == ["tree"]:
            listed = [
                {"type": "file", "path": key, "size": len(body), "oid": hashlib.sha1(body).hexdigest()} for key, body in files.items()
            ]
            return self.answer(200, listed)
        siblings = [{"rfilename": key} for key in files]
        return self.answer(200, {"id": name, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []})

    def file(self, name: str, files: dict[str, bytes], commit: str) -> None:
        if name not in files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        headers = {"X_Repo_Commit": commit, "ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"'}
        if name == self.hub.held and self.command == "GET":
            self.send_response(200)
            self.send_header("Content-Length", str(len(files[name])))
            self.end_headers()
            self.wfile.write(files[name][:10])
            self.wfile.flush()
            self.hub.holding.set()
            self.hub.release.wait(60)
            return None
        return self.answer(200, files[name], **headers)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.asked.append(f"PUT {self.path}")
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400)
        self.hub.blobs[oid] = body
        return self.answer(200)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(self.path.partition("?")[0])
        self.hub.asked.append(f"POST {path}")
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if not self.known:
            return self.answer(401)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/lfs/verify":
            return self.answer(200 if json.loads(body)["oid"] in self.hub.blobs else 404)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        repository = self.repository("/".join(parts[2:4]))
        if repository is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if parts[4] == "preupload":
            return self.preupload(json.loads(body))
        return self.commit(repository, [json.loads(line) for line in body.splitlines()], "/".join(parts[2:4]))

    def validate(self, content: str) -> None:
        front = yaml.safe_load(content.split("---\n")[1])
        good = isinstance(front, dict) and isinstance(front.get("tags"), list)
        self.answer(200 if good else 400, {"errors": [] if good else [{"message": "no front matter"}], "warnings": []})

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        status = 409 if name in self.hub.repositories else 200
        if status == 200:
            self.hub.repositories[name] = Repository(private=wanted.get("visibility") == "private" or wanted.get("private") is True)
        self.answer(status, {"url": f"{self.hub.address}/{name}"})

    def batch(self, wanted: dict[str, Any]) -> None:
        to = {"verify": {"href": f"{self.hub.address}/lfs/verify"}}
        objects = [{**one, "actions": {**to, "upload": {"href": f"{self.hub.address}/lfs/{one['oid']}"}}} for one in wanted["objects"]]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def preupload(self, wanted: dict[str, Any]) -> None:
        apart = {file["path"] for file in wanted["files"] if self.hub.lfs and file["path"].endswith(".safetensors")}
        files = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"] in apart else "regular", "shouldIgnore": False}
            for file in wanted["files"]
        ]
        self.answer(200, {"files": files})

    def commit(self, repository: Repository, lines: list[dict[str, Any]], name: str) -> None:
        files, message = {}, ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        commit = repository.commit(files, message)
        self.answer(200, {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.address}/{name}/commit/{commit}"})
