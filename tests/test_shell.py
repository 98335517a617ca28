"""Before a verb does anything: --help in groups, and what the shell completes, asked through its own protocol."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from softprompt import cli
from softprompt.cli.carrying import FORMATS as OFFERED
from softprompt.cli.options import app
from softprompt.config import Config
from softprompt.export import FORMATS

ASK = """
source "$HOME/.bash_completions/softprompt.sh"
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_softprompt_completion softprompt
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def shell(tmp_path_factory) -> dict[str, str]:
    """The environment of a shell that has the program, its completion installed."""
    home = tmp_path_factory.mktemp("home")
    program = home / "bin" / "softprompt"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom softprompt.cli import main\nmain()\n")
    program.chmod(0o755)
    root = Path(cli.__file__).parents[2]
    environment = {**os.environ, "HOME": str(home), "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(root)}
    environment["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"  # the shell is named, not looked for among the parents
    subprocess.run(["softprompt", "--install-completion", "bash"], env=environment, check=True, capture_output=True)
    return environment


@pytest.fixture
def complete(shell, tmp_path):
    """complete("train", "mo") -> what bash is told; the last word is the one at the cursor, cut at "=" as bash does."""

    def ask(*words: str) -> list[str]:
        asked = ["bash", "--norc", "-c", ASK, "bash", "softprompt", *words]
        return subprocess.run(asked, env=shell, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.split()

    return ask


def test_verbs_are_completed(complete):
    assert complete("tr") == ["train"]
    assert {name for verbs in cli.GROUPS.values() for name in verbs} <= set(complete(""))


def test_keys_of_the_configuration_are_completed(complete):
    assert complete("train", "my.toml", "mo") == [f"model.{key}=" for key in type(Config().model).model_fields]
    assert complete("train", "my.toml", "") == [f"{section}." for section in Config.model_fields]


def test_a_single_key_is_not_closed_with_a_blank(complete):
    assert complete("show", "data.max_l") == ["data.max_length=", "data.max_length=256"]
    assert complete("show", "model.na") == ["model.name=", "model.name=…"]


@pytest.mark.parametrize("words", [("=",), ("=", "b")], ids=["nothing", "a letter"])
def test_values_of_a_setting_are_completed(complete, words):
    found = complete("train", "model.dtype", *words)
    assert found == (["auto", "float32", "bfloat16", "float16"] if len(words) == 1 else ["bfloat16"])


def test_files_are_left_to_the_shell(complete, tmp_path):
    assert complete("train", "my") == complete("train", "") == complete("chat", "") == complete("train", "data.train", "=", "my") == []
    (tmp_path / "model.toml").write_text("")
    assert "model.toml" in complete("train", "mo"), "a file is hidden by keys that begin alike"


def test_a_prompt_s_verbs_complete_settings_of_the_base(complete):
    assert all(key.startswith("model.") for key in complete("generate", "runs/a", "m"))
    assert complete("generate", "runs/a", "tr") == []


def test_formats_are_completed(complete):
    assert complete("export", "runs/a", "--to", "v") == ["vocab", "vllm"]
    assert set(OFFERED) == set(FORMATS)


def test_help_lists_every_verb_once_in_the_order_of_work():
    done = subprocess.run([sys.executable, "-m", "softprompt", "--help"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    verbs = [name for names in cli.GROUPS.values() for name in names]
    assert len(verbs) == len(set(verbs)) == len(app.registered_commands)
    listed = [line.split()[0] for line in lines if line.split() and line.split()[0] in verbs]
    assert listed == verbs
    headings = [line.removesuffix(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings[-len(cli.GROUPS) :] == list(cli.GROUPS)
