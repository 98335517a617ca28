"""Versions of what lies beside softprompt: PEFT's generate under this transformers, newer versions than were tried, the oldest set."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny

from softprompt.engine.tried import NEWEST
from softprompt.peft_here import fault_of_generate

ROOT = Path(__file__).parents[1]
LOAD = """
import sys
from softprompt import load_base, load_config
load_base  # transformers, which asks for torch's version too, has been told the true one
sys.path.insert(0, {!r})
for _ in range(2):
    load_base(load_config(None, ["model.name={}", "model.device=cpu"]).model)
"""


def test_whether_peft_generates_with_its_prompt_is_what_the_example_for_its_authors_shows():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "peft.md").read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", example], capture_output=True, text=True)
    generated, by_hand = re.findall(r"\[.*?\]", done.stdout)
    assert (fault_of_generate() is None) == (generated == by_hand)


@pytest.mark.parametrize("name", sorted(NEWEST))
@pytest.mark.parametrize(("newer", "says"), [(False, False), (True, True)])
def test_a_newer_version_gets_a_try_and_one_line(tmp_path, name, newer, says):
    major, minor, _ = map(int, NEWEST[name].split("."))
    faked = f"{major}.{minor + newer}.9"
    facts = tmp_path / f"{name}-{faked}.dist-info" / "METADATA"
    facts.parent.mkdir()
    facts.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {faked}\n", encoding="utf-8")
    folder = tiny.tiny_folder(tmp_path / "model")
    here = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run([sys.executable, "-c", LOAD.format(str(tmp_path), folder)], capture_output=True, text=True, env=here)
    assert done.returncode == 0, done.stderr
    line = f"{name} {faked}: newer than what softprompt was tested with (up to {name} {NEWEST[name]}); going on\n"
    assert done.stderr == (line if says else "")


def test_the_oldest_set_has_what_the_project_says_it_can_do_with():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = dict(re.match(r"([\w-]+)>=([\w.]+)", one).groups() for one in project["dependencies"] if not one.startswith("torch"))
    pins = dict(line.split("==") for line in (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#")
    assert len(bounds) > 10
    for name, bound in bounds.items():
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", pins[name]), f"{name}: pyproject.toml says {bound}, .ci/oldest.txt {pins[name]}"
