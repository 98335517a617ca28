"""Wheel and sdist: what is in them, types for others, a cache without a home. `make package` tries the wheel in an empty environment."""

import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

import softprompt
from softprompt.engine import unpack

ROOT = Path(__file__).parent.parent
BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('dist')); print(build_meta.build_sdist('dist'))"
ELSEWHERE = ["torch", "transformers", "peft", "accelerate", "huggingface_hub", "datasets", "gguf", "rich"]  # not what the names are about


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist) of a copy of the tree: setuptools leaves files where it builds."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("softprompt", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=tree, stdout=subprocess.PIPE, text=True, check=True)
    wheel, sdist = (name for name in done.stdout.splitlines() if name.endswith((".whl", ".tar.gz")))
    return tree / "dist" / wheel, tree / "dist" / sdist


def package_files():
    return {str(file.relative_to(ROOT)) for file in (ROOT / "softprompt").rglob("*") if file.is_file() and "__pycache__" not in file.parts}


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
        told = {name.partition(".dist-info/")[2] for name in wheel.namelist()} - {""}
    assert found == package_files()
    assert told == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
    assert built[0].name.endswith("-py3-none-any.whl")
    assert built[0].stat().st_size < 1_000_000


def test_the_sdist_holds_what_builds_the_wheel_and_no_tests(built, tmp_path):
    with tarfile.open(built[1]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert {"LICENSE", "README.md", "pyproject.toml", *package_files()} <= found
    assert not [name for name in found if name.startswith(("tests", "benchmarks", "docs"))]
    subprocess.run([sys.executable, "-c", BUILD], cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    (again,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(built[0]) as one, zipfile.ZipFile(again) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


def test_the_public_names_have_types_for_a_program_beside_the_wheel(built, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (site,) = [*tmp_path.glob("env/lib/python*/site-packages"), *tmp_path.glob("env/Lib/site-packages")]
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(site)
    (site / "rest.pth").write_text(str(distribution("pydantic").locate_file("")), encoding="utf-8")
    skipped = "mypy-" + ",".join(f"{name}.*" for name in ELSEWHERE)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = true\n[{skipped}]\nfollow_imports = skip\n", encoding="utf-8")
    shutil.copy(Path(__file__).parent / "typed.py", tmp_path)
    python = next(path for path in (tmp_path / "env/bin/python", tmp_path / "env/Scripts/python.exe") if path.exists())
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    written = (tmp_path / "typed.py").read_text(encoding="utf-8")
    assert [name for name in softprompt.__all__ if not re.search(rf"\b{name}\b", written.split('"""', 2)[2])] == []
    asked = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--python-executable", str(python), "typed.py"]
    done = subprocess.run(asked, cwd=tmp_path, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- a cache where there is no home --------------------------------------------------------------------------------


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """Without a setting of one's own, and with a folder of temporary files that is ours alone."""
    for name in ("SOFTPROMPT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    unpack._writable_or_temporary.cache_clear()
    yield temporary
    unpack._writable_or_temporary.cache_clear()


def test_caches_lie_in_the_home(no_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert unpack.cache_root() == tmp_path / "home" / ".cache" / "softprompt"
    assert not list(no_cache.iterdir())


@pytest.mark.parametrize("home", ["a file", "relative"])
def test_where_the_home_cannot_be_written_caches_lie_among_temporary_files_and_that_is_said(no_cache, monkeypatch, tmp_path, caplog, home):
    (tmp_path / "a file").write_text("", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home) if home == "a file" else home)
    with caplog.at_level(logging.WARNING):
        found = unpack.cache_root()
        assert unpack.cache_root() == found
    assert found.is_dir()
    assert found.parent == no_cache
    assert not (tmp_path / "relative").exists()
    assert caplog.text.count(f"caches lie in {found}; SOFTPROMPT_CACHE names another folder") == 1, "once"


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="each user has temporary files of his own")
def test_a_folder_that_somebody_put_there_is_not_taken(no_cache, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "theirs").mkdir()
    (no_cache / f"softprompt-{os.getuid()}").symlink_to(tmp_path / "theirs")
    found = unpack.cache_root()
    assert found.parent == no_cache
    assert not found.is_symlink()
    assert not list((tmp_path / "theirs").iterdir())
