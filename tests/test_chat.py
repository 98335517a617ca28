"""A talk with a prompt: earlier turns are read, the bare base answers too, what no longer fits is said, and it can be left in every way."""

import io
import os
import pty
import select
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from softprompt import Message, Sampling, cli, generate, load_base, load_prompt
from softprompt.artifact import StoredPrompt
from softprompt.config import ModelConfig, load_config
from softprompt.conversation import Conversation, Here, fitted
from softprompt.engine.model import FrozenBase
from softprompt.errors import DataError
from softprompt.generation import stream, without_prompt
from softprompt.screen import chat
from softprompt.training import train

SHORT = Sampling(max_new_tokens=6)
TURNS = [Message("user", "bring tea"), Message("assistant", "tea"), Message("user", "and milk")]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base with a chat template, and prompts for it whose templates differ."""
    home = tmp_path_factory.mktemp("chat")
    tiny.tiny_folder(home / "base", chat=True)
    rows = tiny.write_rows(home / "rows.jsonl", tiny.some_rows(12))
    for name, template in {"chat": "chat", "human": "human-assistant", "own": "{{ prompt }}:"}.items():
        settings = [
            f"model.name={home / 'base'}", "model.device=cpu", f"data.train={rows}", f"data.template={template}", "prompt.text=Say it.",
            "optim.relative_lr=0.5", "train.steps=2", f"train.out={home / name}",
        ]  # fmt: skip
        list(train(load_config(None, settings)))
    return home


@pytest.fixture(scope="module")
def base(home) -> FrozenBase:
    return load_base(ModelConfig(name=str(home / "base"), device="cpu"))


@pytest.fixture
def talk(home, monkeypatch, capsys):
    """talk("chat", ["bring tea", ...]) -> what stands on the screen."""

    def call(name: str, lines: list[str], *options: str) -> str:
        words = ["softprompt", "chat", str(home / name), "model.device=cpu", "--max-new-tokens", "6", *options]
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        return capsys.readouterr().out

    return call


# ---- conversations are answered ------------------------------------------------------------------------------------


def test_a_conversation_is_asked_as_the_chat_template_writes_it(home, base):
    turns = [{"role": message.role, "content": message.content} for message in TURNS]
    expected = base.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    asked = load_prompt(home / "chat", base).encoder.question(TURNS)
    assert [tiny.BOS, *asked] == expected


@pytest.mark.parametrize("name", ["chat", "human"])
def test_a_conversation_of_one_turn_is_a_text(home, base, name):
    prompt = load_prompt(home / name, base)
    texts = generate(base, prompt, ["bring tea", [Message("user", "bring tea")]], SHORT)
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("name", ["chat", "human"])
def test_earlier_turns_change_the_answer(home, base, name):
    prompt = load_prompt(home / name, base)
    whole, last = generate(base, prompt, [TURNS, TURNS[-1:]], SHORT)
    assert whole != last
    assert whole == "".join(piece.text for piece in stream(base, prompt, [TURNS], SHORT))


@pytest.mark.parametrize("asked", [[], TURNS[:2], [Message("system", "Be kind.")], [Message("user", " ")], ""])
def test_what_asks_nothing_is_refused(home, base, asked):
    with pytest.raises(DataError, match=r"nothing to answer|ends with a question"):
        generate(base, load_prompt(home / "chat", base), [asked], SHORT)


# ---- what still fits -----------------------------------------------------------------------------------------------


def longer(base: FrozenBase, prompt: StoredPrompt, tokens: int) -> Conversation:
    """A conversation of short turns with this many tokens or a few more."""
    talk = Conversation()
    while len(prompt.encoder.question(talk.asked("x"))) < tokens:
        talk = talk.answered(f"turn {len(talk.turns)}", "yes")
    return talk


def test_the_oldest_turns_are_left_out_where_the_context_is_short(home, base):
    prompt = load_prompt(home / "chat", base)
    long = longer(base, prompt, 600)
    kept = fitted(base, prompt, long, "x", 50)
    room = base.context_length - prompt.soft.num_positions - 50
    assert 0 < len(kept.turns) < len(long.turns)
    assert kept.turns == long.turns[-len(kept.turns) :]
    assert kept.turns[0].role == "user"
    one_more = replace(kept, turns=long.turns[-len(kept.turns) - 2 :])
    assert len(prompt.encoder.question(kept.asked("x"))) <= room < len(prompt.encoder.question(one_more.asked("x")))


def test_what_fits_stays_whole(home, base):
    prompt = load_prompt(home / "chat", base)
    short = longer(base, prompt, 100)
    assert fitted(base, prompt, short, "x", 50) == short


def test_a_template_without_turns_gets_none(home, base):
    prompt = load_prompt(home / "own", base)
    assert fitted(base, prompt, Conversation("Be kind.", tuple(TURNS[:2])), "x", 5) == Conversation("Be kind.")


# ---- on the screen -------------------------------------------------------------------------------------------------


def answers(shown: str, lines: list[str]) -> list[str]:
    """What stands behind each line, up to the next."""
    found = []
    for line in lines:
        _, _, shown = shown.partition(f"> {line}\n")
        found.append(shown.partition("\n> ")[0].rstrip("\n"))
    return found


def test_the_screen_shows_what_generate_answers(home, base, talk):
    prompt, lines = load_prompt(home / "chat", base), ["bring tea", "and milk", "/base", "/new", "and milk", "/system Be kind.", "and milk"]
    shown = answers(talk("chat", lines), lines)
    first = generate(base, prompt, ["bring tea"], SHORT)[0]
    turns = [Message("user", "bring tea"), Message("assistant", first), Message("user", "and milk")]
    second, bare = generate(base, [prompt, without_prompt(base, prompt)], [turns, turns], SHORT)
    anew = generate(base, prompt, ["and milk"], SHORT)[0]
    told = [Message("user", "and milk"), Message("assistant", anew), Message("user", "and milk")]
    kind = generate(base, prompt, [[Message("system", "Be kind."), *told]], SHORT)[0]
    assert shown == [first, second, f"bare base and milk\n{bare}", "a new conversation", anew, "system: Be kind.", kind]
    assert len({first, second, bare, anew, kind}) == 5, "some say the same: nothing was compared"


def test_several_prompts_answer_each_turn_in_a_conversation_of_their_own(home, base, talk):
    lines = ["bring tea", "and milk"]
    shown = answers(talk("chat", lines, "--with", str(home / "human"), "--system", "Be kind."), lines)
    for name in ("chat", "human"):
        prompt, talked = load_prompt(home / name, base), Conversation("Be kind.")
        for line, said in zip(lines, shown, strict=True):
            answer = generate(base, prompt, [talked.asked(line)], SHORT)[0]
            assert f"{home / name}\n{answer}" in said
            talked = talked.answered(line, answer)


def test_turns_that_no_longer_fit_are_spoken_of(talk):
    lines = [f"{'please ' * 25}{number}" for number in range(4)]
    shown = answers(talk("chat", lines), lines)
    assert [("the oldest turn is left out from here on" in said) for said in shown] == [False, False, True, True]


def test_a_text_that_can_never_fit_is_one_line_and_the_talk_goes_on(talk):
    lines = ["please " * 100, "bring tea"]
    shown = answers(talk("chat", lines), lines)
    assert "the base's context is 512: shorten the text" in shown[0]
    assert shown[1]
    assert "context" not in shown[1]


def test_a_template_without_turns_is_spoken_of(home, base, talk):
    lines = ["bring tea", "and milk"]
    screen = talk("own", lines)
    assert "its template knows no turns" in screen
    assert answers(screen, lines) == generate(base, load_prompt(home / "own", base), lines, SHORT)


def test_commands_that_cannot_be_are_one_line(talk):
    lines = ["/base", "/bse", "//etc"]
    shown = answers(talk("chat", lines), lines)
    assert shown[0].startswith("nothing has been asked yet")
    assert shown[1] == "/bse is no command (/help lists them); a turn that begins with a slash is written with two: //bse"
    assert "command" not in shown[2]


def test_help_lists_every_command(talk):
    screen = talk("chat", ["/help"])
    assert all(f"\n{name} " in screen for name in chat.COMMANDS)


def test_quit_leaves_at_once(talk):
    assert "> bring tea" not in talk("chat", ["/quit", "bring tea"])


def test_a_turn_of_several_lines(home, base, talk):
    screen = talk("chat", ['"""bring', "", 'tea"""'])
    assert generate(base, load_prompt(home / "chat", base), ["bring\n\ntea"], SHORT)[0] in screen


def interrupted_at(monkeypatch, where: str, lines: list[str], base: FrozenBase, prompt: StoredPrompt) -> None:
    """A talk in which Ctrl-C is pressed once: at the prompt, or while the first answer comes."""
    real, pressed = chat._heard, []

    def heard(session, line):
        if where == "answer" and not pressed:
            pressed.append(line)
            raise KeyboardInterrupt
        return real(session, line)

    def typed():
        if where == "prompt":
            raise KeyboardInterrupt
        yield from lines

    monkeypatch.setattr(chat, "_heard", heard)
    chat.talk(chat.Session(Here(base, {"chat": prompt}), (Conversation(),), SHORT), typed())


def test_ctrl_c_stops_an_answer_alone(home, base, monkeypatch, capsys):
    prompt = load_prompt(home / "chat", base)
    interrupted_at(monkeypatch, "answer", ["bring tea", "and milk"], base, prompt)
    shown = capsys.readouterr().out
    assert "stopped; this turn is forgotten" in shown
    assert generate(base, prompt, ["and milk"], SHORT)[0] in shown, "the turn was not forgotten"


def test_ctrl_c_at_the_prompt_leaves(home, base, monkeypatch, capsys):
    interrupted_at(monkeypatch, "prompt", [], base, load_prompt(home / "chat", base))
    assert "stopped" not in capsys.readouterr().out


IN_TERMINAL = """
import fcntl, signal, sys, termios
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background are started deaf to Ctrl-C
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches it
from softprompt.cli import main
sys.argv = ["softprompt", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("key", [b"\x04", b"\x03"], ids=["ctrl-d", "ctrl-c"])
def test_the_terminal_edits_lines_and_is_left_cleanly(home, base, key):
    ours, theirs = pty.openpty()
    words = ["chat", str(home / "chat"), "model.device=cpu", "model.dtype=float32", "--max-new-tokens", "6"]
    with subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL, *words], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as child:
        os.close(theirs)
        try:
            shown = seen_until(ours, b"> ")
            os.write(ours, b"bring tex\x7fa\n")  # a letter is taken back
            shown += seen_until(ours, b"> ")
            shown += pressed_until_closed(ours, key)
            child.wait(60)
        finally:  # else a failed test waits for the child, and the child for a key
            child.kill()
    os.close(ours)
    assert child.returncode == 0, shown
    assert generate(base, load_prompt(home / "chat", base), ["bring tea"], SHORT)[0].encode() in shown
    assert b"Traceback" not in shown


def seen_until(terminal: int, end: bytes) -> bytes:
    """What a terminal shows until this."""
    seen = b""
    while not seen.endswith(end):
        assert select.select([terminal], [], [], 300)[0], seen
        seen += os.read(terminal, 1000)
    return seen


def pressed_until_closed(terminal: int, key: bytes) -> bytes:
    """What a terminal shows from a key on until it is closed. The key is pressed again as long as its echo at most is shown: input() with
    readline loses a Ctrl-C that comes after its prompt is shown and before it waits (3 of 3,000 on one core), and one that comes while
    Python ends kills it."""
    seen = b""
    for _ in range(60):
        os.write(terminal, key)
        while select.select([terminal], [], [], 300 if seen.replace(b"^C", b"") else 5)[0]:
            try:
                more = os.read(terminal, 1000)
            except OSError:  # how Linux says that the other side is closed
                more = b""
            if not more:
                return seen
            seen += more
    raise AssertionError(seen)
