"""A talk with one prompt or several in the terminal: each line is a turn, or a command that begins with a slash."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from rich.markup import escape

from softprompt.conversation import Conversation
from softprompt.data import Message
from softprompt.errors import DataError
from softprompt.sampling import Sampling
from softprompt.screen.console import console
from softprompt.screen.prompts import Said, draw_stream


class Speakers(Protocol):
    """Who answers, by name: prompts in this process (conversation.Here), or behind a server (serve.client.There)."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def context_length(self) -> int | None: ...
    def about(self, name: str) -> str: ...
    def knows_turns(self, name: str) -> bool: ...
    def fitted(self, name: str, talk: Conversation, text: str, max_new_tokens: int) -> Conversation: ...
    def answer(self, asked: Mapping[str, Sequence[Message]], sampling: Sampling) -> Iterable[Said]: ...
    def bare(self, asked: Sequence[Message], sampling: Sampling) -> Iterable[Said]: ...


@dataclass(frozen=True)
class Session:
    """Who answers, and what has been said with each: their answers differ, so their conversations do."""

    speakers: Speakers
    talks: tuple[Conversation, ...]
    sampling: Sampling


class Leave(Exception):
    """The user has said /quit."""


def talk(session: Session, lines: Iterable[str]) -> None:
    """Answers the lines until they end, or until /quit or Ctrl-C. Ctrl-C while an answer comes stops the answer alone."""
    _greet(session)
    turns = iter(lines)
    while True:
        try:
            line = next(turns).strip()
        except (StopIteration, EOFError, KeyboardInterrupt):
            console.print()
            return
        try:
            session = _heard(session, line) if line else session
        except Leave:
            return
        except DataError as error:
            console.print(f"[red]{escape(str(error))}[/]")
        except KeyboardInterrupt:
            console.print("\n[dim]stopped; this turn is forgotten[/]")


def _greet(session: Session) -> None:
    for name in session.speakers.names:
        console.print(f"[bold]{escape(name)}[/]: {escape(session.speakers.about(name))}")
        if not session.speakers.knows_turns(name):
            console.print("[yellow]its template knows no turns: every text is answered by itself[/]")
    console.print("[dim]/base shows what the bare base answers, /help lists the commands, Ctrl-D leaves[/]")


def _heard(session: Session, line: str) -> Session:
    """The session after a line: a turn, or a command. Two slashes begin a turn that starts with one."""
    if not line.startswith("/") or line.startswith("//"):
        return _answer(session, line.removeprefix("/"))
    name, _, rest = line.partition(" ")
    if name not in COMMANDS:
        raise DataError(f"{name} is no command (/help lists them); a turn that begins with a slash is written with two: /{line}")
    return COMMANDS[name][0](session, rest.strip())


def _answer(session: Session, text: str) -> Session:
    speakers, sampling = session.speakers, session.sampling
    talks = []
    for name, before in zip(speakers.names, session.talks, strict=True):
        talks.append(speakers.fitted(name, before, text, sampling.max_new_tokens))
        if speakers.knows_turns(name) and (num_left_out := (len(before.turns) - len(talks[-1].turns)) // 2):
            whose = f"{name}: " if len(speakers.names) > 1 else ""
            turns = "the oldest turn is" if num_left_out == 1 else f"the oldest {num_left_out} turns are"
            room = f"the base reads {speakers.context_length} tokens at once"
            console.print(f"[yellow]{escape(whose)}{room}: {turns} left out from here on[/]")
    asked = {name: one.asked(text) for name, one in zip(speakers.names, talks, strict=True)}
    answers = draw_stream(speakers.answer(asked, sampling), list(asked))
    if len(answers) == 1 and not answers[0]:
        console.print("[dim](no text: the answer ended at once)[/]")
    return replace(session, talks=tuple(one.answered(text, answer) for one, answer in zip(talks, answers, strict=True)))


# ---- the commands --------------------------------------------------------------------------------------------------


def _bare(session: Session, rest: str) -> Session:
    first = session.talks[0]
    if not first.turns:
        raise DataError("nothing has been asked yet: /base shows the bare base's answer to the last turn")
    before, text = first.before_the_last()
    console.print(f"[bold cyan]bare base[/] [dim]{escape(text)}[/]")
    draw_stream(session.speakers.bare(before.asked(text), session.sampling), [text])
    return session


def _new(session: Session, rest: str) -> Session:
    console.print("[dim]a new conversation[/]")
    return replace(session, talks=tuple(replace(one, turns=()) for one in session.talks))


def _system(session: Session, rest: str) -> Session:
    console.print(f"[dim]system: {escape(rest)}[/]" if rest else "[dim]no system turn[/]")
    return replace(session, talks=tuple(replace(one, system=rest or None) for one in session.talks))


def _help(session: Session, rest: str) -> Session:
    for name, (_, said) in COMMANDS.items():
        console.print(f"{name:<8} {said}", markup=False)
    console.print('Other lines are turns; """ begins and ends a turn of several lines. Ctrl-C stops an answer, or leaves.', markup=False)
    return session


def _quit(session: Session, rest: str) -> Session:
    raise Leave


COMMANDS: dict[str, tuple[Callable[[Session, str], Session], str]] = {
    "/base": (_bare, "what the bare base answers to the last turn"),
    "/new": (_new, "start over"),
    "/system": (_system, "TEXT: a system turn before the conversation; without a text, none"),
    "/help": (_help, "this list"),
    "/quit": (_quit, "leave, as Ctrl-D does"),
}
