"""Other platforms than Linux: what they lack is taken away, and a run is made all the same."""

import ast
import errno
import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from softprompt import atomic, training
from softprompt.config import load_config
from softprompt.errors import RunError
from softprompt.locations import with_absolute_paths
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
        "import sys\n"
        "from softprompt import load_base, load_config\n"
        "print(load_base(load_config(sys.argv[1]).model).dtype, load_base(load_config(sys.argv[1], ['model.dtype=auto']).model).dtype)"
    )
    told = {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "bfloat16")}
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True, cwd=PACKAGE.parent, env=told)
    assert done.stdout.split() == ["torch.float32", "torch.bfloat16"]


def opened() -> list[tuple[str, ast.Call, str]]:
    """Every call that reads or writes a file as text, or might: (where, the call, its mode)."""
    found = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
            if name not in ("open", "read_text", "write_text", "fdopen", "NamedTemporaryFile", "TemporaryFile", "TextIOWrapper"):
                continue
            assert isinstance(node, ast.Call)
            if name == "write_text" and isinstance(node.func, ast.Name):
                continue  # atomic's own, of UTF-8 with line ends as they are
            given = [*node.args, *(word.value for word in node.keywords if word.arg == "mode")]
            modes = [one.value for one in given if isinstance(one, ast.Constant) and re.fullmatch(r"[rwax]?[bt]?\+?[bt]?", str(one.value))]
            binary = "w+b" if name in ("NamedTemporaryFile", "TemporaryFile") else "r"  # where no mode is given
            mode = {"write_text": "w", "read_text": "r", "TextIOWrapper": "r"}.get(name) or next(iter(modes), binary)
            where = f"{file.relative_to(PACKAGE)}:{node.lineno}"
            if not (name == "open" and ast.unparse(node.func) in ("os.open", "fsspec.open", "gzip.open", "tarfile.open")):
                found.append((where, node, mode))
    return found


def test_every_file_of_text_says_its_encoding_and_its_line_ends():
    """What Windows takes otherwise is not UTF-8, and ends lines with two characters."""
    calls = opened()
    assert len(calls) > 40
    text = [(where, {word.arg for word in call.keywords}, mode) for where, call, mode in calls if "b" not in mode]
    assert len(text) > 20
    assert not [where for where, said, _ in text if "encoding" not in said]
    assert not [where for where, said, mode in text if mode[0] in "wax" and "newline" not in said]


STARTERS = (
    "serve/vllm_process.py",  # starts vLLM, and there is none but on Linux
    "sweep/running.py",  # starts Python by its own name, and asks for the cores where there is something to ask
)


def test_no_process_is_started_and_nothing_is_asked_of_linux_alone():
    wanted = (
        r"subprocess|multiprocessing|os\.fork|os\.symlink|symlink_to|hardlink_to|os\.link|SIGKILL|SIGHUP|SIGALRM|/proc/|/dev/|cpu_count"
    )
    for file in PACKAGE.rglob("*.py"):
        if file.relative_to(PACKAGE).as_posix() not in STARTERS:
            assert not re.findall(wanted, file.read_text(encoding="utf-8")), file


def test_what_is_open_for_a_moment_is_moved_onto_where_systems_mind(monkeypatch, tmp_path):
    file, tries = tmp_path / "file", []
    replace = Path.replace

    def minds(draft, goal):
        tries.append(goal)
        if len(tries) < 3:
            raise PermissionError(errno.EACCES, "Access is denied", str(goal))
        return replace(draft, goal)

    monkeypatch.setattr(Path, "replace", minds)
    with pytest.raises(PermissionError):
        atomic.write_text(file, "x")
    assert len(tries) == 1, "elsewhere it is no use to wait"
    tries.clear()
    monkeypatch.setattr(atomic, "os", type("Windows", (), {**vars(os), "name": "nt"}))
    atomic.write_text(file, "x")
    assert file.read_bytes() == b"x"
    assert len(tries) == 3


def in_use(folder):
    """What this process has open or mapped below a folder."""
    opened = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    mapped = [line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    return [path for path in (*opened, *mapped) if path.startswith(f"{folder}{os.sep}")]


@pytest.mark.parametrize("what", ["run", "rows", "vocab", "vllm", "npy", "torch"])
def test_nothing_in_a_draft_is_open_when_it_takes_its_place(make_config, monkeypatch, tmp_path, what):
    """Windows moves no folder in which something is open or mapped."""
    from softprompt import prepared
    from softprompt.export import Wanted, export

    config = make_config("train.steps=2", "train.save_every=1")
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    if what == "rows":
        monkeypatch.setattr(prepared, "SMALL", 1)
    elif what != "run":
        list(training.train(config))
    moved, rename = [], Path.rename

    def looked_at(draft, goal):
        moved.append((draft.name, in_use(draft)))
        return rename(draft, goal)

    monkeypatch.setattr(Path, "rename", looked_at)
    if what in ("run", "rows"):
        list(training.train(config))
    else:
        export(Wanted([tmp_path / "run"], what, tmp_path / "out"))
    assert len(moved) >= {"run": 4, "rows": 6}.get(what, 1)
    with (tmp_path / "train.jsonl").open("rb"):
        assert in_use(tmp_path), "it would be seen"
    assert not [one for one in moved if one[1]]


CONSOLES = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "cp1252": {"PYTHONIOENCODING": "cp1252", "TERM": "dumb"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "NO_COLOR": "1"},
}
VERBS = """
import json, sys
from softprompt.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["softprompt", *words]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    print("exit", code, flush=True)
"""


@pytest.mark.parametrize("console", CONSOLES)
def test_a_console_without_unicode_is_written_to(make_config, tmp_path, console):
    file, run = tmp_path / "run.toml", str(tmp_path / "run")
    settings = make_config("train.steps=2", "prompt.text=请重复饮料。", "prompt.length=4", "data.max_length=80")
    file.write_text(settings.to_toml(), encoding="utf-8", newline="\n")
    verbs = [
        ["--help"],
        ["show", str(file)],
        ["train", str(file)],
        ["inspect", run],
        ["eval", run, "--metric", "loss"],
        ["generate", run, "请来一杯水", "--max-new-tokens", "4"],
        ["train", str(file), "data.train=没有.jsonl", f"train.out={run}-2"],
    ]
    own = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHONIO"))}
    done = subprocess.run(
        [sys.executable, "-c", VERBS, json.dumps(verbs)], env=own | CONSOLES[console], capture_output=True, check=False, cwd=PACKAGE.parent
    )
    encoding = CONSOLES[console].get("PYTHONIOENCODING", "ascii")
    said = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert re.findall(r"^exit (\d)", said[0], flags=re.MULTILINE) == ["0"] * 6 + ["2"], said
    assert r"\u6c34" in said[0], "what cannot be shown is escaped"
    assert r"\u6ca1\u6709.jsonl" in said[1]
    assert "Traceback" not in said[1]


def test_an_input_in_another_encoding_is_said(monkeypatch, capsys):
    from softprompt import cli

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("手机\n".encode("gb18030")), encoding="utf-8"))
    monkeypatch.setattr(sys, "argv", ["softprompt", "generate", "nowhere"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "the standard input is not utf-8: put the texts into a file and use --in" in capsys.readouterr().err
