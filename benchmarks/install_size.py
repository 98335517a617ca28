"""What an installation costs: megabytes, seconds to install, seconds to import.

    python -m benchmarks.install_size --json FILE [--torch torch==2.13.0] [--python python3.11] [--keep FOLDER]

Makes an empty environment, installs torch there, then the core of this tree, with nothing in pip's cache. Torch and what it brings are not
counted. "Downloaded" are the files that pip took for all else. The first start of each kind, which reads files from the disk, is not timed.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import Request, urlopen

from benchmarks.measuring import machine

ROOT = Path(__file__).parent.parent
STARTS = {"nothing": ("-c", ""), "import": ("-c", "import softprompt"), "--help": ("--help",), "--version": ("--version",)}
LOADED = """
import sys
from softprompt.cli import main
sys.argv = ["softprompt", "--help"]
try:
    main()
finally:
    print("torch loaded" if "torch" in sys.modules else "torch not loaded", file=sys.stderr)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--torch", default="torch", help="what pip is told to install as torch")
    parser.add_argument("--python", default=sys.executable, help="the Python of the environment")
    parser.add_argument("--starts", type=int, default=15, help="timed starts of each kind")
    parser.add_argument("--keep", type=Path, help="where the environment stays; left out, it vanishes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = given.keep or Path(place) / "environment"
        found = {"machine": machine(), **install(given.python, folder, given.torch), **starts(folder, given.starts)}
    given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    show(found)


def program(folder: Path, name: str) -> str:
    """A program of an environment."""
    return str(folder / ("Scripts" if sys.platform == "win32" else "bin") / name)


def install(python: str, folder: Path, torch: str) -> dict[str, Any]:
    """Seconds and bytes of torch and of all else."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    pip = [program(folder, "python"), "-I", "-m", "pip", "install", "--quiet", "--no-cache-dir", "--disable-pip-version-check"]
    seconds = {}
    before = time.perf_counter()
    subprocess.run([*pip, torch], check=True)
    seconds["torch"] = time.perf_counter() - before
    own = set(sizes(folder))
    before = time.perf_counter()
    subprocess.run([*pip, "--report", str(folder / "report.json"), str(ROOT)], check=True)
    seconds["all else"] = time.perf_counter() - before
    taken = json.loads((folder / "report.json").read_text(encoding="utf-8"))["install"]
    downloads = {one["metadata"]["name"]: size_of(one["download_info"]["url"]) for one in taken if "dir_info" not in one["download_info"]}
    installed = {name: both for name, both in sizes(folder).items() if name not in own}
    return {"install_seconds": seconds, "downloaded": downloads, "installed": installed}


def size_of(address: str) -> int:
    """The bytes of a file that pip downloaded."""
    with urlopen(Request(address, method="HEAD")) as answer:
        return int(answer.headers["Content-Length"])


def sizes(folder: Path) -> dict[str, dict[str, int]]:
    """The bytes on disk of every package of an environment, and of these those without Python's bytecode, made as pip installs."""
    (site,) = [*folder.glob("lib/python*/site-packages"), *folder.glob("Lib/site-packages")]
    found = {}
    for one in importlib.metadata.distributions(path=[str(site)]):
        files = {Path(str(file.locate())): file.suffix for file in one.files or () if Path(str(file.locate())).is_file()}
        code = sum(path.stat().st_size for path, suffix in files.items() if suffix == ".pyc")
        total = sum(path.stat().st_size for path in files)
        found[one.metadata["Name"]] = {"bytes": total, "without_bytecode": total - code}
    return found


def starts(folder: Path, number: int) -> dict[str, Any]:
    """Median seconds of starts, taking turns, and whether --help loads torch."""
    python, softprompt = program(folder, "python"), program(folder, "softprompt")
    timed: dict[str, list[float]] = {name: [] for name in STARTS}
    for _ in range(number + 1):
        for name, arguments in STARTS.items():
            before = time.perf_counter()
            called = [python if arguments[0] == "-c" else softprompt, *arguments]
            subprocess.run(called, check=True, capture_output=True, cwd=folder)
            timed[name].append(time.perf_counter() - before)
    asked = subprocess.run([python, "-c", LOADED], check=True, capture_output=True, text=True, cwd=folder)
    medians = {name: median(seconds[1:]) for name, seconds in timed.items()}
    return {"start_seconds": medians, "torch_loaded": "torch loaded" in asked.stderr}


def show(found: dict[str, Any]) -> None:
    names = sorted(found["installed"], key=lambda name: -found["installed"][name]["bytes"])
    print(f"{'':<24}{'downloaded':>12}{'installed':>12}{'without bytecode':>18}   MB")
    for name in names:
        row = found["installed"][name]
        print(f"{name:<24}{found['downloaded'].get(name, 0) / 1e6:>12.1f}{row['bytes'] / 1e6:>12.1f}{row['without_bytecode'] / 1e6:>18.1f}")
    total = (
        sum(found["downloaded"].values()),
        *(sum(row[key] for row in found["installed"].values()) for key in ("bytes", "without_bytecode")),
    )
    print(f"{'all but torch':<24}{total[0] / 1e6:>12.1f}{total[1] / 1e6:>12.1f}{total[2] / 1e6:>18.1f}")
    print(", ".join(f"installing {name}: {seconds:.0f} s" for name, seconds in found["install_seconds"].items()))
    print(", ".join(f"{name}: {seconds:.3f} s" for name, seconds in found["start_seconds"].items()))
    print("--help loads torch" if found["torch_loaded"] else "--help does not load torch")


if __name__ == "__main__":
    main()
