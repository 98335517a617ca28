"""A talk in the terminal with models behind a server: the answers are those of the same prompts here, without torch."""

import io
import subprocess
import sys

import parrot
import pytest
import tiny
from talker import Talker

from softprompt import Message, Sampling, cli, generate, load_base, load_prompt
from softprompt.config import ModelConfig, load_config
from softprompt.generation import without_prompt
from softprompt.serve.asking import Model
from softprompt.serve.guard import Keys
from softprompt.serve.own import start
from softprompt.serve.service import Settings
from softprompt.training import train

SHORT = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A base with a chat template, two prompts for it, and the address of a server of them."""
    home = tmp_path_factory.mktemp("served")
    tiny.tiny_folder(home / "base", chat=True)
    rows = tiny.write_rows(home / "rows.jsonl", tiny.some_rows(12))
    for name, text in {"one": "Say it.", "two": "Repeat."}.items():
        settings = [f"model.name={home / 'base'}", "model.device=cpu", f"data.train={rows}", "data.template=chat", f"prompt.text={text}"]
        list(train(load_config(None, [*settings, "optim.relative_lr=0.5", "train.steps=2", f"train.out={home / name}"])))
    base = load_base(ModelConfig(name=str(home / "base"), device="cpu"))
    prompts = {name: load_prompt(home / name, base) for name in ("one", "two")}
    with parrot.running(start(base, {name: home / name for name in prompts})) as (address, _):
        yield base, prompts, address


@pytest.fixture
def talk(monkeypatch, capsys):
    """talk(address, ["bring tea"], "--model", "one") -> exit code, what stands on the screen, what stands in standard error."""

    def call(address, lines, *options):
        monkeypatch.setattr(sys, "argv", ["softprompt", "chat", address, "--max-new-tokens", "6", *options])
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    return call


def answers(shown, lines):
    """What stands behind each line, up to the next."""
    found = []
    for line in lines:
        _, _, shown = shown.partition(f"> {line}\n")
        found.append(shown.partition("\n> ")[0].rstrip("\n"))
    return found


def test_a_server_answers_as_the_prompt_does_here(served, talk):
    base, prompts, address = served
    lines = ["bring tea", "and milk", "/base"]
    code, shown, _ = talk(address, lines, "--model", "two", "--system", "Be kind.")
    kind = Message("system", "Be kind.")
    first = generate(base, prompts["two"], [[kind, Message("user", "bring tea")]], SHORT)[0]
    turns = [kind, Message("user", "bring tea"), Message("assistant", first), Message("user", "and milk")]
    second, bare = generate(base, [prompts["two"], without_prompt(base, prompts["two"])], [turns, turns], SHORT)
    assert answers(shown, lines) == [first, second, f"bare base and milk\n{bare}"]
    assert len({first, second, bare}) == 3, "some say the same: nothing was compared"
    assert f"two: {prompts['two'].soft.length} virtual tokens, at {address}/v1/" in shown.replace("\n", "")
    assert code == 0


def test_several_models_answer_each_turn(served, talk):
    base, prompts, address = served
    _, shown, _ = talk(
        f"{address}/v1/", ["bring tea"], "--model", "two", "--model", "one", "--temperature", "0.9", "--seed", "4", "--top-k", "9"
    )
    said = generate(base, [prompts["two"], prompts["one"]], ["bring tea"] * 2, Sampling(6, 0.9, top_k=9, seed=4))
    assert answers(shown, ["bring tea"]) == [f"two\n{said[0]}\none\n{said[1]}"]


def test_without_a_name_the_first_prompt_answers(served, talk):
    base, prompts, address = served
    _, shown, _ = talk(address, ["bring tea"])
    assert answers(shown, ["bring tea"]) == generate(base, prompts["one"], ["bring tea"], SHORT)


def test_what_a_server_refuses_is_one_line_and_the_talk_goes_on(served, talk):
    _, _, address = served
    code, shown, _ = talk(address, ["please " * 100, "bring tea"])
    long, short = answers(shown, ["please " * 100, "bring tea"])
    assert "the base's context is 512" in long.replace("\n", " ")
    assert short
    assert code == 0


def test_a_key_comes_from_a_file_or_the_environment(talk, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    file = tmp_path / "key"
    file.write_text("s3cret\n", encoding="utf-8")
    models = [Model("tiny-base", "base", 0), Model("polite", "prompt", 0, 5)]
    with parrot.running(Talker(models), Settings(Keys(["s3cret"]))) as (address, _):
        code, _, error = talk(address, ["hello"])
        assert (code, error) == (2, f"error: {address} asks for a key: give --api-key-file FILE, or set OPENAI_API_KEY\n")
        _, shown, _ = talk(address, ["hello"], "--api-key-file", str(file))
        assert "polite 说：hello" in shown
        monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
        _, shown, _ = talk(address, ["hello"])
        assert "polite 说：hello" in shown


def test_what_cannot_be_is_one_line(served, talk, tmp_path):
    _, _, address = served
    for words, message in (
        ([address, "--model", "three"], f"{address} serves no model three: it serves base, one, two"),
        ([address, "--with", "runs/x"], "a server has its own base and prompts: name its models by --model, and leave the rest out"),
        ([address, "model.device=cpu"], "a server has its own base and prompts: name its models by --model, and leave the rest out"),
        (["runs/x", "--model", "one"], "--model and --api-key-file are for a server, runs/x is a folder"),
        (
            [address, "--api-key-file", str(tmp_path / "none")],
            f"--api-key-file {tmp_path / 'none'}: cannot be read: No such file or directory",
        ),
        (["http://127.0.0.1:9"], "http://127.0.0.1:9: no such server answers: Connection error."),
    ):
        code, _, error = talk(words[0], [], *words[1:])
        assert (code, error) == (2, f"error: {message}\n")


def test_to_talk_with_a_server_needs_no_torch(served):
    _, _, address = served
    code = (
        "import sys\nfrom softprompt import cli\n"
        f"sys.argv = ['softprompt', 'chat', {address!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], input="bring tea\n", capture_output=True, text=True, check=True).stdout
    assert shown.endswith("[]\n")
    assert "> bring tea\n" in shown
