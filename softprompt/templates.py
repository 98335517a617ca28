"""How an example becomes text: segments, each supervised or not.

A chat template is a base's own or a `.jinja` file in the same dialect; what it writes at the end of a turn, in front of an answer and of
the date is found out by asking it.
"""

import datetime
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from softprompt.data import Example, Message
from softprompt.errors import ConfigError, DataError
from softprompt.literal import Tokenizer, control_tokens
from softprompt.thinking import BLOCKS, Thinking, find_block

CLOCK = "strftime_now"
DIRECTIVES = "aAbBdeHIjmMpSuUVwWxXyYzZcDFGgT"  # of strftime; `-` stands between some of them and the percent sign
ANSWER = "0192837465"  # to be found again in what a template writes


@dataclass(frozen=True)
class Segment:
    """A piece of text. `ends`: an answer ends here, with EOS or what the template ends it with, supervised like the text."""

    text: str
    supervised: bool = False
    ends: bool = False


def joined(segments: Iterable[Segment]) -> list[Segment]:
    """The same text in one piece up to each EOS, nothing of it supervised: tokens may cross from a question into its answer."""
    pieces, text = [], ""
    for segment in segments:
        text += segment.text
        if segment.ends:
            pieces.append(Segment(text, ends=True))
            text = ""
    return [*pieces, Segment(text)] if text else pieces


class Template(ABC):
    """How an example becomes text, and how a text ends. `name`: what a card holds, a name of NAMES or Jinja text.

    `knows_turns`: whether earlier turns of a conversation are written. `reads_fields`: whether a row's other columns may be.
    `writes_bos`: whether BOS may stand in the text itself.
    `end_ids`: tokens other than EOS that end an answer. `thinking`: the block it writes in front of answers, `before_answer`: that as
    text, empty. `date`: the day that it is told, where it asks for one.
    """

    name: str
    knows_turns = True
    reads_fields = False
    writes_bos = False
    end_ids: frozenset[int] = frozenset()
    thinking: Thinking | None = None
    before_answer = ""
    date: str | None = None

    @abstractmethod
    def segments(self, example: Example) -> list[Segment]:
        """Raises DataError for an example that cannot be written."""

    def ended(self, ids: list[int], segment: Segment, eos_id: int) -> tuple[list[int], int]:
        """(the segment's ids with its end, how many of them count as the segment's own)."""
        return ([*ids, eos_id], len(ids) + 1) if segment.ends else (ids, len(ids))


def _without_tools(example: Example) -> None:
    if example.has_tools:
        raise DataError('the row has tools, which only a chat template can write: data.template = "chat"', example.source)


class HumanAssistant(Template):
    """`Human: ...\\n\\nAssistant: ` + response + EOS, as the bloom-1b4-zh tutorial writes it; a system turn stands first."""

    name = "human-assistant"

    def segments(self, example: Example) -> list[Segment]:
        _without_tools(example)
        segments: list[Segment] = []
        for message in example.messages:
            if message.role == "system":
                segments.append(Segment(message.content + "\n\n"))
            elif message.role == "user":
                between = "\n\n" if segments and segments[-1].ends else ""
                segments.append(Segment(between + ("Human: " + message.content).strip() + "\n\nAssistant: "))
            else:
                segments.append(Segment(message.content, supervised=message.learned, ends=True))
        return segments


class OwnTemplate(Template):
    """A template of the user's: renders what stands before the last response from the row's fields and `messages`."""

    knows_turns = False  # it may look at the last one alone
    reads_fields = True

    def __init__(self, text: str) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        self.name = text
        try:
            self.template = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"data.template: line {error.lineno}: {error.message}") from None

    def segments(self, example: Example) -> list[Segment]:
        _without_tools(example)
        answered = example.messages[-1].role == "assistant"
        before = example.messages[:-1] if answered else example.messages
        system = "".join(message.content + "\n" for message in before if message.role == "system")
        turns = [{"role": message.role, "content": message.content} for message in before if message.role != "system"]
        try:
            question = Segment(system + self.template.render({**example.fields, "messages": turns}))
        except Exception as error:  # a template is the user's program: 1 / 0 raises as freely as an undefined name
            raise DataError(f"data.template cannot be filled in: {error}", example.source) from None
        return [question, Segment(example.response, supervised=True, ends=True)] if answered else [question]


# ---- chat templates ------------------------------------------------------------------------------------------------


class Chat(Template):
    """A chat template: the tokenizer's own, or `text`. Every assistant turn is supervised up to its end-of-turn token; the last one
    alone where the template writes a conversation otherwise once it goes on."""

    name = "chat"
    writes_bos = True

    def __init__(self, tokenizer: Tokenizer, text: str | None = None, date: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.own = text
        if text is not None:
            self.name = text
        if any(CLOCK in one for one in self._texts):
            self.date = date or datetime.date.today().isoformat()

    @property
    def _texts(self) -> Sequence[str]:
        if self.own is not None:
            return (self.own,)
        known = self.tokenizer.chat_template
        return tuple(known.values()) if isinstance(known, Mapping) else (known,)

    def text(self, tools: Sequence[Any] = ()) -> str:
        """The Jinja text for a conversation, its clock stopped at `date`."""
        own = self.own or chat_text(self.tokenizer, tools)
        return own if self.date is None else stopped(own, self.date)

    def render(self, turns: Sequence[Mapping[str, Any]], ask: bool, tools: Sequence[Any] = ()) -> str:
        """A conversation as text; `ask`: with what opens the next answer. Raises whatever the template raises."""
        how = {"chat_template": self.text(tools), "tools": list(tools) or None, "add_generation_prompt": ask}
        text: str = self.tokenizer.apply_chat_template(list(turns), tokenize=False, **how)
        return text

    def segments(self, example: Example) -> list[Segment]:
        messages = example.messages
        if example.has_tools:
            self._check_tools(example)
        answered = messages[-1].role == "assistant"
        before = messages[:-1] if answered else messages
        asked = self._render(before, True, example)
        pieces = self._turns(before, asked, example)
        if not answered:
            return pieces
        return [*pieces, Segment(self._answer(asked, self._render(messages, False, example), example), supervised=True)]

    def _turns(self, before: Sequence[Message], asked: str, example: Example) -> list[Segment]:
        """What stands before the last answer, with the earlier answers supervised; in one unsupervised piece where they are not written
        as they were when they were the last."""
        segments: list[Segment] = []
        shown = ""
        for index, message in enumerate(before):
            if message.role == "assistant":
                opened, closed = self._render(before[:index], True, example), self._render(before[: index + 1], False, example)
                if not opened.startswith(shown) or not closed.startswith(opened):
                    return [Segment(asked)]
                segments += [
                    Segment(opened[len(shown) :]),
                    Segment(closed[len(opened) :], supervised=message.learned, ends=not message.learned),
                ]
                shown = closed
        return [*segments, Segment(asked[len(shown) :])] if asked.startswith(shown) else [Segment(asked)]

    def _answer(self, asked: str, whole: str, example: Example) -> str:
        """The last answer as it is said after `asked`. A thinking block that a question opens and the answer does not show is closed:
        with the response's own thoughts, where it has any."""
        if whole.startswith(asked):
            return whole[len(asked) :]
        for begin, end in BLOCKS:
            head, opened, rest = asked.rpartition(begin)
            if opened and not rest.strip() and whole.startswith(head):
                said, own = whole[len(head) :], Thinking(begin, end).split(example.response, whole=True)[0]
                if said.startswith(begin):
                    return said.removeprefix(begin)
                thoughts = own.strip().removeprefix(begin).removesuffix(end).strip()
                return f"{thoughts}\n{end}\n\n{said.lstrip()}"
        raise DataError("this chat template writes a question differently once it is answered: use a template of your own", example.source)

    def ended(self, ids: list[int], segment: Segment, eos_id: int) -> tuple[list[int], int]:
        """A chat template writes the end of a turn itself, and something after it, which nobody need learn."""
        if not (segment.supervised or segment.ends):
            return ids, len(ids)
        for known in (self.end_ids, self._control):
            ends = [index for index, token in enumerate(ids) if token in known]
            if ends:
                return ids, ends[-1] + 1
        return [*ids, eos_id], len(ids) + 1

    @cached_property
    def _around(self) -> tuple[str, str]:
        """What the template writes before and behind a last answer; nothing where it refuses the conversation."""
        turns = (Message("user", "a"), Message("assistant", ANSWER))
        try:
            before, _, behind = self.segments(Example(turns, "a question"))[-1].text.partition(ANSWER)
        except DataError:
            return "", ""
        return before, behind

    @cached_property
    def end_ids(self) -> frozenset[int]:  # type: ignore[override]
        """The control tokens behind an answer: each of them ends one."""
        ids: list[int] = self.tokenizer(self._around[1], add_special_tokens=False)["input_ids"]
        return frozenset(ids) & control_tokens(self.tokenizer, also_plain=True).keys()

    @property
    def before_answer(self) -> str:  # type: ignore[override]
        return self._around[0]

    @cached_property
    def thinking(self) -> Thinking | None:  # type: ignore[override]
        found = find_block(self._around[0])  # special tokens are no text of an answer
        return None if found is None or found.end in self._control.values() else found

    @cached_property
    def _control(self) -> dict[int, str]:
        return control_tokens(self.tokenizer)

    def _check_tools(self, example: Example) -> None:
        """Raises DataError where the template leaves out a part of what the row says of tools."""
        messages = example.messages
        whole = self._render(messages, False, example)
        parts = {
            "tools": (messages, replace(example, tools=())),
            "calls of tools": (_changed(messages, lambda one: replace(one, more=_called(one.more))), example),
            "turns of tools": (_changed(messages, lambda one: replace(one, content=ANSWER) if one.role == "tool" else one), example),
        }
        for name, (turns, other) in parts.items():
            if (turns, other) != (messages, example) and self._render(turns, False, other) == whole:
                raise DataError(f"the chat template does not write the {name} of this row", example.source)

    def _render(self, messages: Sequence[Message], ask: bool, example: Example) -> str:
        turns = [{"role": message.role, "content": message.content, **message.more} for message in messages]
        try:
            return self.render(turns, ask, example.tools)
        except Exception as error:  # a template may raise anything
            raise DataError(f"the chat template refuses this conversation: {error}", example.source) from None


def _changed(messages: Sequence[Message], change: Callable[[Message], Message]) -> tuple[Message, ...]:
    return tuple(map(change, messages))


def _called(more: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same with other arguments in its calls."""
    if "tool_calls" not in more:
        return more
    other = {"name": ANSWER, "arguments": {ANSWER: ANSWER}}
    return {**more, "tool_calls": [{**call, "function": other} if "function" in call else {**call, **other} for call in more["tool_calls"]]}


def chat_text(tokenizer: Tokenizer, tools: Sequence[Any] = ()) -> str:
    """The tokenizer's own chat template; of several, the one called default, or tool_use for a conversation with tools.

    Raises ConfigError where there is none.
    """
    if not tokenizer.chat_template:
        raise ConfigError('the tokenizer has no chat template: use data.template = "human-assistant" or a Jinja template')
    try:
        text: str = tokenizer.get_chat_template(tools=list(tools) or None)
    except ValueError:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise ConfigError(
            f"the tokenizer has chat templates called {names} and none called default: save the one to use in a .jinja file "
            "and name that in data.template"
        ) from None
    return text


def stopped(text: str, date: str) -> str:
    """A chat template whose clock shows midnight of one day, as Jinja that any engine can read: a macro takes the clock's place."""
    moment = datetime.datetime.fromisoformat(date)
    shown = {f"%{sign}{letter}": moment.strftime(f"%{sign}{letter}") for letter in DIRECTIVES for sign in ("", "-")}
    pairs = ", ".join(f"['{code}', '{value}']" for code, value in shown.items() if value != code)
    return (
        f"{{%- macro {CLOCK}(format) -%}}{{%- set day = namespace(text=format) -%}}"
        f"{{%- for pair in [{pairs}] -%}}{{%- set day.text = day.text.replace(pair[0], pair[1]) -%}}{{%- endfor -%}}"
        f"{{{{- day.text -}}}}{{%- endmacro %}}\n{text}"  # the line break belongs to the macro (trim_blocks)
    )


# ---- by name -------------------------------------------------------------------------------------------------------


NAMES = (HumanAssistant.name, Chat.name)


def make_template(tokenizer: Tokenizer, wanted: str, date: str | None = None) -> Template:
    """Looks a template up by name, or takes it as Jinja text or a `.jinja` file. Raises ConfigError."""
    if wanted == Chat.name:
        chat_text(tokenizer)
        return Chat(tokenizer, date=date)
    if wanted == HumanAssistant.name:
        return HumanAssistant()
    if "{{" in wanted or "{%" in wanted:
        return _jinja(tokenizer, wanted, date)
    if wanted.endswith(".jinja"):
        try:
            return _jinja(tokenizer, Path(wanted).read_text(encoding="utf-8"), date)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.template: cannot read {wanted}: {error}") from None
    near = get_close_matches(wanted, NAMES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(NAMES)}, Jinja text with {{{{ }}}}, or a .jinja file"
    raise ConfigError(f"data.template: unknown template {wanted!r}: {hint}")


def _jinja(tokenizer: Tokenizer, text: str, date: str | None) -> Template:
    """A template that asks whether to open an answer is a chat template; any other writes a question from the row's fields."""
    if {"messages", "add_generation_prompt"} <= _variables(text):
        return Chat(tokenizer, text, date)
    return OwnTemplate(text)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, by which chat templates mark what a model says."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _variables(text: str) -> set[str]:
    """The names that a template takes from outside. Raises ConfigError where it is no Jinja."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(extensions=[jinja2.ext.loopcontrols, _Generation])
    try:
        return jinja2.meta.find_undeclared_variables(environment.parse(text))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"data.template: line {error.lineno}: {error.message}") from None
