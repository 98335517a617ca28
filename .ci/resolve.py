"""Whether pip finds wheels for all that softprompt needs, on every Python that pyproject.toml names and four platforms.

    python .ci/resolve.py [EXTRA ...]

Nothing is installed: pip resolves with --dry-run for the other Python and platform, wheels alone. Packages' environment markers
(`sys_platform == "linux"`) it takes from the Python that runs it, whatever --platform says, and would ask for CUDA's wheels on a Mac. So
pip is started with the markers of its target. What this cannot tell: whether the wheels run there.
"""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCAL = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT")  # of one machine: others do not have what lies there
WITH_MARKERS = """
import json, sys
import pip._vendor.packaging.markers as markers
from pip._internal.cli.main import main
own, target = markers.default_environment, json.loads(sys.argv[1])
markers.default_environment = lambda: {**own(), **target}
sys.exit(main(sys.argv[2:]))
"""


@dataclass(frozen=True)
class Platform:
    """`tags`: of the wheels that it takes."""

    name: str
    tags: tuple[str, ...]
    sys_platform: str
    system: str
    machine: str

    def markers(self, python: str) -> dict[str, str]:
        return {
            "os_name": "nt" if self.sys_platform == "win32" else "posix",
            "sys_platform": self.sys_platform,
            "platform_system": self.system,
            "platform_machine": self.machine,
            "python_version": python,
            "python_full_version": f"{python}.0",
        }


def _linux(machine: str, oldest: int, *names: str) -> tuple[str, ...]:
    """glibc 2.28, which Debian 10, Ubuntu 18.10 and RHEL 8 have, and all that runs on it."""
    return (*(f"manylinux_2_{minor}_{machine}" for minor in range(28, oldest - 1, -1)), *(f"{name}_{machine}" for name in names))


PLATFORMS = (
    Platform("Linux x86-64", _linux("x86_64", 5, "manylinux2014", "manylinux2010", "manylinux1", "linux"), "linux", "Linux", "x86_64"),
    Platform("Linux arm64", _linux("aarch64", 17, "manylinux2014", "linux"), "linux", "Linux", "aarch64"),
    Platform("macOS arm64", ("macosx_14_0_arm64",), "darwin", "Darwin", "arm64"),  # pip adds the older ones
    Platform("Windows x86-64", ("win_amd64",), "win32", "Windows", "AMD64"),
)


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(one for extra in sys.argv[1:] for one in project["optional-dependencies"][extra])]
    begin = "Programming Language :: Python :: 3."
    pythons = [f"3.{line.removeprefix(begin)}" for line in project["classifiers"] if line.startswith(begin)]
    with tempfile.TemporaryDirectory() as place:
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        python = Path(place) / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        subprocess.run([python, "-I", "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True)
        cells = list(product(pythons, PLATFORMS))
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda cell: resolve(python, *cell, wanted), cells))
    bad = [(version, platform.name, said) for (version, platform), (good, said) in zip(cells, found, strict=True) if not good]
    print(f"| Python | {' | '.join(platform.name for platform in PLATFORMS)} |")
    print("|---|" + "---|" * len(PLATFORMS))
    for row, version in enumerate(pythons):
        own = found[row * len(PLATFORMS) : (row + 1) * len(PLATFORMS)]
        print(f"| {version} | {' | '.join(said if good else 'no' for good, said in own)} |")
    for version, name, said in bad:
        print(f"Python {version} on {name}: {said}")
    print(f"{len(cells) - len(bad)} of {len(cells)} resolve")
    sys.exit(1 if bad else 0)


def resolve(python: Path, version: str, platform: Platform, wanted: list[str]) -> tuple[bool, str]:
    """(whether it resolves, how many packages of which torch and transformers, or what pip says is missing)."""
    tags = [word for tag in platform.tags for word in ("--platform", tag)]
    target = ["--python-version", version, "--implementation", "cp", *tags, "--only-binary=:all:"]
    environment = {**{name: value for name, value in os.environ.items() if name not in LOCAL}, "PIP_CONFIG_FILE": os.devnull}
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.json"
        quiet = ["--quiet", "--disable-pip-version-check", "--use-feature=fast-deps"]  # a few kilobytes of a wheel instead of all
        dry = ["--dry-run", "--ignore-installed", "--target", place, "--report", str(report)]
        asked = [python, "-I", "-c", WITH_MARKERS, json.dumps(platform.markers(version)), "install", *quiet, *dry, *target, *wanted]
        done = subprocess.run(asked, env=environment, capture_output=True, text=True)
        if done.returncode:
            return False, " ".join(line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: "))
        chosen = {one["metadata"]["name"]: one["metadata"]["version"] for one in json.loads(report.read_text(encoding="utf-8"))["install"]}
    return True, f"{len(chosen)} packages, torch {chosen['torch']}, transformers {chosen['transformers']}"


if __name__ == "__main__":
    main()
