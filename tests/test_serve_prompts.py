"""Prompts come and go while a server runs: a watched folder, uploads by whoever has the admin key, hostile archives."""

import asyncio
import errno
import gzip
import io
import json
import logging
import os
import pickle
import shutil
import tarfile
import threading
from pathlib import Path

import httpx
import pytest
from parrot import Parrot, running, until

from softprompt import artifact, atomic
from softprompt.serve import folder as watching
from softprompt.serve.archive import FILES, NEEDED
from softprompt.serve.guard import Keys
from softprompt.serve.service import Settings

PROMPT = {"card.json": b'{"text": "Be kind."}', "adapter_model.safetensors": b"rows", "adapter_config.json": b"{}", "README.md": b"# x"}
USER, ADMIN = {"authorization": "Bearer user-key"}, {"authorization": "Bearer admin-key"}
MOST = 1 << 20


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(watching, "SECONDS", 0.05)


@pytest.fixture
def parrot():
    return Parrot("polite")


@pytest.fixture
def place(tmp_path) -> Path:
    (tmp_path / "prompts").mkdir()
    return tmp_path / "prompts"


@pytest.fixture
def url(parrot, place):
    settings = Settings(keys=Keys(["user-key"]), admin_keys=Keys(["admin-key"]), folder=place, most_upload=MOST)
    with running(parrot, settings) as (address, _):
        yield address


def archive(files: dict[str, bytes] = PROMPT, *more: tarfile.TarInfo) -> bytes:
    """A .tar.gz file."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in more:
            tar.addfile(info)
    return made.getvalue()


def upload(url: str, name: str | None, content: bytes) -> httpx.Response:
    params = {} if name is None else {"name": name}
    return httpx.post(f"{url}/v1/prompts", params=params, content=content, headers=ADMIN, timeout=30)


def names(parrot: Parrot) -> list[str]:
    return [model.name for model in parrot.models() if model.kind == "prompt"]


def write(folder: Path, files: dict[str, bytes] = PROMPT) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


# ---- over HTTP ---------------------------------------------------------------------------------------------------------


def test_the_files_are_those_of_a_prompt_folder():
    assert set(FILES) == set(artifact.FILES)
    assert artifact.WEIGHTS in NEEDED


def test_a_prompt_is_uploaded_listed_asked_and_deleted(parrot, url, place):
    response = upload(url, "kind", archive())
    assert response.status_code == 201
    assert response.json() == {
        "id": "kind",
        "object": "prompt",
        "created": 7,
        "num_virtual_tokens": 5,
        "card": {"text": PROMPT["card.json"].decode()},
    }
    assert {path.name: path.read_bytes() for path in (place / "kind").iterdir()} == PROMPT
    listed = httpx.get(f"{url}/v1/prompts", headers=ADMIN).json()
    assert [one["id"] for one in listed["data"]] == ["polite", "kind"]
    asked = {"model": "kind", "prompt": "a b"}
    assert httpx.post(f"{url}/v1/completions", json=asked, headers=USER).json()["choices"][0]["text"] == "a b"
    gone = httpx.delete(f"{url}/v1/prompts/kind", headers=ADMIN)
    assert (gone.status_code, gone.json()) == (200, {"id": "kind", "deleted": True, "object": "prompt"})
    assert names(parrot) == ["polite"]
    assert list(place.iterdir()) == []
    assert httpx.delete(f"{url}/v1/prompts/kind", headers=ADMIN).status_code == 404
    assert upload(url, "kind", archive()).status_code == 201


@pytest.mark.parametrize("inside", ["kind/", "./", "./kind/"])
def test_files_may_lie_in_one_folder_of_the_archive(parrot, url, inside):
    folder = tarfile.TarInfo(inside)
    folder.type = tarfile.DIRTYPE
    needed = {f"{inside}{name}": PROMPT[name] for name in NEEDED}
    assert upload(url, "kind", archive(needed, folder)).status_code == 201
    assert names(parrot) == ["polite", "kind"]


def test_what_tar_writes_is_taken(parrot, url, tmp_path):
    write(tmp_path / "kind")
    made = Path(shutil.make_archive(str(tmp_path / "kind"), "gztar", tmp_path, "kind"))
    assert upload(url, "kind", made.read_bytes()).status_code == 201


def test_only_an_admin_key_opens_the_routes(parrot, url, place):
    for header in ({}, USER):
        assert httpx.get(f"{url}/v1/prompts", headers=header).status_code == 401
        assert httpx.post(f"{url}/v1/prompts?name=kind", content=archive(), headers=header).status_code == 401
        assert httpx.delete(f"{url}/v1/prompts/polite", headers=header).status_code == 401
    assert httpx.get(f"{url}/v1/models", headers=ADMIN).status_code == 401
    with running(parrot, Settings(folder=place)) as (other, _):
        refused = upload(other, "kind", archive())
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "no_admin")
    with running(parrot, Settings(admin_keys=Keys(["admin-key"]))) as (other, _):
        assert httpx.get(f"{other}/v1/prompts", headers=ADMIN).status_code == 200
        refused = upload(other, "kind", archive())
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "no_folder")
    assert names(parrot) == ["polite"]


@pytest.mark.parametrize(
    "name", [None, "", ".", "..", "../kind", "a/b", "/tmp/kind", "a\\b", "-kind", ".kind", "a b", "<b>", "a\n", "a\0", "字" * 67, "kind?"]
)
def test_names_with_places_or_markup_are_refused(parrot, url, place, name):
    response = upload(url, name, archive())
    assert (response.status_code, response.json()["error"]["param"]) == (400, "name")
    assert list(place.parent.rglob("card.json")) == []
    assert names(parrot) == ["polite"]


def test_names_of_any_script_are_taken(parrot, url):
    for name in ("客服", "Ünï-1.2_x", "字" * 66):
        assert upload(url, name, archive()).status_code == 201
        assert httpx.delete(f"{url}/v1/prompts/{name}", headers=ADMIN).status_code == 200


def test_a_name_that_is_taken_is_not_taken_again(parrot, url, place):
    for name in ("polite", "base"):
        response = upload(url, name, archive())
        assert (response.status_code, response.json()["error"]["code"]) == (409, "name_taken")
    (place / "other").mkdir()
    assert upload(url, "other", archive()).status_code == 409
    assert [path.name for path in place.iterdir()] == ["other"]


def test_a_prompt_of_the_command_line_is_not_deleted(parrot, url):
    assert httpx.delete(f"{url}/v1/prompts/polite", headers=ADMIN).status_code == 409
    for name in ("none", "base", "..", "%2e%2e", "..%2f..%2fx"):
        assert httpx.delete(f"{url}/v1/prompts/{name}", headers=ADMIN).status_code in (404, 405, 409)
    assert names(parrot) == ["polite"]


def test_a_prompt_deleted_while_it_answers_finishes(parrot, url):
    parrot.pause = 0.1
    upload(url, "kind", archive())
    said = {}

    def ask() -> None:
        asked = {"model": "kind", "prompt": "a b c d"}
        said.update(httpx.post(f"{url}/v1/completions", json=asked, headers=USER).json())

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: parrot.running == 1)
    assert httpx.delete(f"{url}/v1/prompts/kind", headers=ADMIN).status_code == 200
    assert parrot.running == 1
    thread.join()
    assert said["choices"][0]["text"] == "a b c d"


# ---- hostile archives --------------------------------------------------------------------------------------------------


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def sized(name: str, size: int) -> bytes:
    """An archive whose only file says that it has so many bytes, with zeros behind it."""
    info = tarfile.TarInfo(name)
    info.size = size
    return gzip.compress(info.tobuf() + bytes(min(size, 32 * MOST)))


def long_header(size: int) -> bytes:
    """A name of so many zeros: read into memory by whoever trusts it."""
    info = entry("././@LongLink", tarfile.GNUTYPE_LONGNAME)
    info.size = size
    return gzip.compress(info.tobuf() + bytes(size))


HOSTILE = {
    "nothing": b"",
    "no archive": b"hello",
    "a pickle": pickle.dumps({"prompt_embeddings": [1.0]}),
    "a zip": b"PK\x03\x04" + bytes(100),
    "a tar without gzip": gzip.decompress(archive()),
    "half an archive": archive()[:-40],
    "a broken one": archive()[:60] + b"\xff" * 40 + archive()[100:],
    "an empty one": archive({}),
    "one file": archive({"card.json": b"{}"}),
    "the other file": archive({"adapter_model.safetensors": b"rows"}),
    "a file twice": archive({**PROMPT, "./card.json": b"{}"}),
    "two folders": archive({"a/card.json": b"{}", "b/adapter_model.safetensors": b"rows"}),
    "a way out": archive({**PROMPT, "../card.json": b"{}"}),
    "a long way out": archive({**PROMPT, "a/../../card.json": b"{}"}),
    "an absolute place": archive({**PROMPT, "/card.json": b"{}"}),
    "a deep place": archive({**PROMPT, "a/b/README.md": b""}),
    "a backslash": archive({**PROMPT, "..\\card.json": b"{}"}),
    "a pickled file": archive({**PROMPT, "adapter_model.bin": pickle.dumps(1)}),
    "code": archive({**PROMPT, "modeling.py": b"import os"}),
    "a link": archive(PROMPT, entry("README.md", tarfile.SYMTYPE, "/etc/passwd")),
    "links alone": archive({}, *(entry(name, tarfile.SYMTYPE, "/etc/passwd") for name in NEEDED)),
    "a hard link": archive(PROMPT, entry("adapter_config.json", tarfile.LNKTYPE, "card.json")),
    "a device": archive(PROMPT, entry("README.md", tarfile.CHRTYPE)),
    "a pipe": archive(PROMPT, entry("README.md", tarfile.FIFOTYPE)),
    "a folder out": archive(PROMPT, entry("..", tarfile.DIRTYPE)),
    "folders without end": archive(PROMPT, *(entry(f"d{number}", tarfile.DIRTYPE) for number in range(100))),
    "a bomb": archive({**PROMPT, "README.md": bytes(8 * MOST)}),
    "a size that is a lie": sized("card.json", 1 << 40),
    "a negative size": gzip.compress(tarfile.TarInfo("card.json").tobuf().replace(b"00000000000", b"-0000000001")),
    "a header that is a bomb": long_header(64 * MOST),
    "markup": archive({**PROMPT, "<script>alert(1)</script>": b""}),
    "no text in a name": archive({**PROMPT, "card\udcff.json": b""}),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_hostile_archives_leave_nothing_behind(parrot, url, place, kind):
    assert len(HOSTILE[kind]) < MOST, "it is not refused for its size alone"
    response = upload(url, "kind", HOSTILE[kind])
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_archive")
    assert "<script>" not in response.headers["content-type"]
    assert list(place.iterdir()) == []
    assert names(parrot) == ["polite"]
    assert upload(url, "kind", archive()).status_code == 201


def test_an_archive_that_is_too_large_is_not_read(parrot, url, place):
    response = upload(url, "kind", os.urandom(MOST + 1))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")
    assert list(place.iterdir()) == []


def test_a_pickle_in_the_place_of_the_rows_is_refused(parrot, url, place):
    response = upload(url, "kind", archive({**PROMPT, "adapter_model.safetensors": pickle.dumps([1.0])}))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_prompt")
    assert str(place) not in response.text
    assert list(place.iterdir()) == []
    assert names(parrot) == ["polite"]


@pytest.mark.parametrize("at", ["writing", "flushing"])
def test_a_full_disk_leaves_nothing_half(parrot, url, place, at, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if at == "writing":
            patch.setattr(Path, "write_bytes", full)
        else:
            patch.setattr(atomic.os, "fsync", full)
        response = upload(url, "kind", archive())
        assert (response.status_code, response.json()["error"]["code"]) == (507, "not_kept")
    assert list(place.iterdir()) == []
    assert names(parrot) == ["polite"]
    assert upload(url, "kind", archive()).status_code == 201


# ---- the folder --------------------------------------------------------------------------------------------------------


def test_what_lies_there_is_served_from_the_first_request_on(parrot, place):
    write(place / "kind")
    write(place / "run" / "prompt")
    write(place / ".hidden")
    write(place / "half", {"card.json": b"{}"})
    (place / "file").write_text("x")
    with running(parrot, Settings(folder=place)) as (url, _):
        assert [one["id"] for one in httpx.get(f"{url}/v1/models").json()["data"]][1:4] == ["polite", "kind", "run"]


def test_prompts_are_added_replaced_and_removed(parrot, url, place):
    write(place / "kind")
    until(lambda: names(parrot) == ["polite", "kind"])
    first = parrot.known["kind"]
    write(place / "kind", {**PROMPT, "card.json": b'{"text": "Be kinder."}'})
    until(lambda: parrot.known["kind"] != first)
    assert "kinder" in parrot.known["kind"].card["text"]
    (place / "kind").rename(place / "kinder")
    until(lambda: names(parrot) == ["polite", "kinder"])
    shutil.rmtree(place / "kinder")
    until(lambda: names(parrot) == ["polite"])


def test_a_folder_that_is_being_copied_is_not_read_half(parrot, place):
    """Looked at while it grows, and when it has stood still between two looks."""
    write(place / "kind", {**PROMPT, "adapter_model.safetensors": b""})
    file = place / "kind" / "adapter_model.safetensors"
    watched, served = watching.Folder(place, parrot), []

    async def look():
        await watched.look()
        served.append("kind" in names(parrot))

    async def copied():
        for size in range(4):
            file.write_bytes(b"row " * size)
            await look()
        await look()

    asyncio.run(copied())
    assert served == [False] * 4 + [True]


def test_what_is_wrong_is_said_once_until_it_changes(parrot, url, place, caplog):
    caplog.set_level(logging.INFO, "softprompt.serve")
    write(place / "kind", {**PROMPT, "adapter_model.safetensors": pickle.dumps([1.0])})
    write(place / "polite")
    write(place / "a b")

    def said(name: str) -> int:
        return sum(f"{place / name} is not served" in record.getMessage() for record in caplog.records)

    until(lambda: said("kind") == said("polite") == said("a b") == 1)
    threading.Event().wait(0.3)
    assert [said(name) for name in ("kind", "polite", "a b")] == [1, 1, 1]
    assert names(parrot) == ["polite"]
    (place / "kind" / "adapter_model.safetensors").write_bytes(b"good")
    until(lambda: names(parrot) == ["polite", "kind"])


def test_a_folder_that_is_away_for_a_while_is_waited_for(parrot, url, place, caplog):
    write(place / "kind")
    until(lambda: names(parrot) == ["polite", "kind"])
    place.rename(place.parent / "away")
    until(lambda: "could not be looked at" in caplog.text)
    assert names(parrot) == ["polite", "kind"]
    (place.parent / "away").rename(place)
    write(place / "kinder")
    until(lambda: names(parrot) == ["polite", "kind", "kinder"])


def test_an_uploaded_prompt_is_not_read_twice(parrot, url, place, monkeypatch):
    added = []
    add = parrot.add

    async def watched(name, folder):
        added.append(name)
        return await add(name, folder)

    monkeypatch.setattr(parrot, "add", watched)
    upload(url, "kind", archive())
    threading.Event().wait(0.3)
    assert added == ["kind"]
    json.loads((place / "kind" / "card.json").read_text())
