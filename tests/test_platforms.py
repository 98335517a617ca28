"""Other platforms than Linux: what they lack is taken away, and a run is made all the same."""

import errno
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from softprompt import atomic, training
from softprompt.config import load_config, with_absolute_paths
from softprompt.errors import RunError
from softprompt.runlog import RunFolder

PACKAGE = Path(training.__file__).parent
WITHOUT = """
import os, sys
import psutil  # which takes other ways on other platforms
for name in ("fcntl", "resource"):
    sys.modules[name] = None
psutil.Process.memory_info = lambda process: type("Memory", (), {{"peak_wset": 12345678}})
opened = os.open
def like_windows(path, flags, *more, **how):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return opened(path, flags, *more, **how)
flushed = os.fsync
def writable(descriptor):
    os.write(descriptor, b"")  # EBADF where the file is open for reading alone
    flushed(descriptor)
os.open, os.fsync = like_windows, writable
from softprompt.cli import main
sys.argv = ["softprompt", "train", {settings}]
main()
"""


def test_a_run_needs_no_fcntl_no_resource_and_flushes_no_folder(make_config, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(make_config("train.steps=2", "train.save_every=1").to_toml(), encoding="utf-8")
    code = WITHOUT.format(settings=repr(str(file)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    result = RunFolder.reopen(tmp_path / "run").result()
    assert (result["steps"], result["peak_bytes"]) == (2, 12345678)
    assert (tmp_path / "run" / "prompt" / "card.json").is_file()


def test_no_module_wants_a_platform_as_it_is_imported():
    for file in PACKAGE.rglob("*.py"):
        found = re.findall(r"^(?:import|from) (fcntl|resource|msvcrt|pwd|grp|termios)\b", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert not found, f"{file.name} imports {found}"


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes_whatever_the_platform_counts_in(monkeypatch, platform, unit):
    import resource

    import torch

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: type("Usage", (), {"ru_maxrss": 5000}))
    assert training.peak_bytes(torch.device("cpu")) == 5000 * unit


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_a_file_system_without_locks_is_said_and_the_run_goes_on(make_config, monkeypatch, caplog, tmp_path, number):
    import fcntl

    def refused(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    with caplog.at_level(logging.WARNING):
        list(training.train(make_config("train.steps=1")))
    assert re.search(rf"run: no locks here \({os.strerror(number)}\)", caplog.text)
    assert RunFolder.reopen(tmp_path / "run").result()["steps"] == 1


def test_a_second_process_is_kept_out_and_a_killed_one_is_not(make_config, tmp_path):
    tiny.stop_after(make_config("train.steps=2"), 1)
    run = RunFolder.reopen(tmp_path / "run")
    code = "import sys; from pathlib import Path; from softprompt.runlog import RunFolder\nwith RunFolder(Path(sys.argv[1])).locked():"
    holder = [sys.executable, "-c", f"{code}\n    print('held', flush=True); input()", str(run.path)]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=PACKAGE.parent) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match="another process is running this run"), run.locked():
            pass
        other.kill()
        other.wait()
    with run.locked():
        pass


def test_a_folder_that_cannot_be_flushed_is_there_all_the_same(monkeypatch, tmp_path):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    with atomic.new_folder(tmp_path / "new") as draft:
        (draft / "file").write_text("x")
    atomic.write_text(tmp_path / "text", "a\nb\n")
    assert [Path(path).name for path in flushed] == ["file", tmp_path.name, Path(flushed[2]).name, tmp_path.name]
    assert (tmp_path / "text").read_bytes() == b"a\nb\n"


def test_text_is_written_with_the_same_line_ends_everywhere():
    """A run's stream is read by its line ends."""
    for name in ("atomic.py", "runlog.py", "predictions.py"):
        text = (PACKAGE / name).read_text(encoding="utf-8")
        written = re.findall(r"open\([^\n]*\"(?:a|w|r\+b|wb)\"[^\n]*", text)
        assert written
        assert all('newline="\\n"' in one or 'b"' in one for one in written), name


@pytest.mark.parametrize("rest", ["", ":train", "[0:5]", ":train[0:5]"])
def test_a_path_with_a_colon_of_its_own_is_made_absolute(monkeypatch, tmp_path, rest):
    """As a drive has one."""
    monkeypatch.chdir(tmp_path)
    tiny.write_rows(tmp_path / "C:rows.jsonl", tiny.some_rows(1))
    config = load_config(None, ["model.name=base", f"data.train=C:rows.jsonl{rest}", "data.eval=owner/name:test"])
    data = with_absolute_paths(config).data
    assert (data.train, data.eval) == (f"{tmp_path}/C:rows.jsonl{rest}", "owner/name:test")


def test_a_child_process_computes_in_the_precision_of_the_tests(make_config, tmp_path):
    """Also where the processor multiplies in bfloat16, which a child finds out for itself."""
    file = tmp_path / "run.toml"
    file.write_text(make_config().to_toml(), encoding="utf-8")
    code = (
        "import sys, torch; torch.cpu.get_capabilities = lambda: {'avx512_bf16': True}\n"
        "from softprompt import load_base, load_config\n"
        "print(load_base(load_config(sys.argv[1]).model).dtype, load_base(load_config(sys.argv[1], ['model.dtype=auto']).model).dtype)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.split() == ["torch.float32", "torch.bfloat16"]
