"""One row with its columns -> Example, or the reason why it cannot be used.

Known by their columns: `messages` or `conversations` (a chat), `instruction`/`input`/`output`, `prompt`/`completion`, `text`/`label`;
`data.columns` says where they come from in other files.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.sandbox

from softprompt.data.examples import ClassName, Example, Message, Unusable
from softprompt.errors import ConfigError

MEANING = frozenset(("system", "history", "rejected", "tools", "images", "image", "videos", "audios"))  # change what a row means


def example_of(row: Any, place: str, label_words: Mapping[str, str], columns: Mapping[str, str]) -> Example:
    """The row as turns, all its columns in `fields`. Raises Unusable; ConfigError for an expression that is not Jinja."""
    if not isinstance(row, Mapping):
        raise Unusable(f"a row must be an object with fields, this is {type(row).__name__}")
    named = {**row, **{name: _column(row, name, wanted) for name, wanted in columns.items()}} if columns else row
    shape = _shape(named, columns)
    if shape is None:
        fields = ", ".join(map(str, row)) or "(none)"
        raise Unusable(f"fields {fields} fit no known shape: {', '.join(FIELDS)}; name them in data.columns")
    example = SHAPES[shape](named, place, label_words)
    return replace(example, fields={**{str(name): value for name, value in row.items()}, **example.fields})


def _shape(row: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """What `data.columns` names goes before what the row happens to hold."""
    own = [shape for shape, needed in NEEDED.items() if needed & columns.keys()] if columns else []
    for shape in (*own, *SHAPES):
        if shape in row:
            return shape
    return None


def unused_columns(row: Any, columns: Mapping[str, str]) -> Iterator[str]:
    """Columns that change what a row means and that its shape does not read."""
    if MEANING.isdisjoint(row):
        return
    shape = _shape({**row, **columns}, columns)
    used = {"system", "history"} if shape == "instruction" else set() if shape == "text" else {"system"}
    if shape in ("messages", "conversations") or isinstance(row.get("prompt"), list):
        used.add("tools")
    for name in row:
        if name in MEANING and row[name] and name not in used and not any(name in wanted for wanted in columns.values()):
            yield name


def _column(row: Mapping[str, Any], name: str, wanted: str) -> Any:
    if wanted in row:
        value = row[wanted]
    elif wanted.isidentifier():
        near = get_close_matches(wanted, list(map(str, row)), n=1)
        hint = f"did you mean {near[0]}?" if near else f"the row has {', '.join(map(str, row)) or 'none'}"
        raise Unusable(f"data.columns.{name}: no column {wanted}: {hint}")
    else:
        try:
            value = _expression(name, wanted)(row)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"data.columns.{name}: {wanted!r} is no column and no Jinja expression: {error.message}") from None
        except Exception as error:  # an expression is the user's program
            raise Unusable(f"data.columns.{name} cannot be filled in: {error}") from None
    if isinstance(value, bool) or name in ("messages", "label") or not isinstance(value, int | float):
        return value
    return str(value)


@lru_cache
def _expression(name: str, wanted: str) -> Callable[[Mapping[str, Any]], Any]:
    """`wanted` as a function of a row: Jinja text, or an expression as it stands between braces."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    if "{{" in wanted or "{%" in wanted:
        return environment.from_string(wanted).render
    found = environment.compile_expression(wanted, undefined_to_none=False)

    def value(row: Mapping[str, Any]) -> Any:
        result = found(row)
        if isinstance(result, jinja2.Undefined):
            str(result)  # raises with the name
        return result

    return value


def _from_messages(row: Mapping[str, Any], place: str, label_words: Mapping[str, str]) -> Example:
    turns = row["messages"] if "messages" in row else row["conversations"]
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not all(isinstance(turn, Mapping) for turn in turns):
        raise Unusable('messages must be a list of {"role": ..., "content": ...}')
    messages = [_message(turn) for turn in turns]
    if row.get("system") and (not messages or messages[0].role != "system"):
        messages.insert(0, Message("system", _text(row, "system")))
    spoken = messages[1:] if messages and messages[0].role == "system" else messages
    if not _in_order(spoken):
        roles = ", ".join(message.role for message in messages) or "none"
        raise Unusable(
            "turns must alternate user, assistant (turns of tools behind calls) and end with assistant (a system turn may come first); "
            f"here: {roles}"
        )
    for message in spoken:
        if message.role == "assistant" and "tool_calls" not in message.more:
            _not_empty(message.content, "an assistant turn")
    learned = [index for index, message in enumerate(messages) if message.role == "assistant" and message.learned]
    if not learned:
        raise Unusable("all its answers have weight 0: there is nothing to learn from")
    messages = messages[: learned[-1] + 1]  # nothing that is learned depends on what comes behind it
    if "tool_calls" in messages[-1].more:
        raise Unusable("its last answer calls a tool: it must end with an answer in text")
    tools = _tools(row)
    _whole_characters(json.dumps([tools, *(message.more for message in messages)], ensure_ascii=False, default=str), "tools")
    return Example(tuple(messages), place, fields={"prompt": messages[-2].content}, tools=tools)


def _in_order(turns: Sequence[Message]) -> bool:
    """Whether every question has its answer, and every call of tools what they said."""
    allowed = {"user"}
    for turn in turns:
        if turn.role not in allowed:
            return False
        calls = "tool_calls" in turn.more
        allowed = (
            {"assistant"} if turn.role == "user" else {"tool", "assistant"} if turn.role == "tool" else {"tool"} if calls else {"user"}
        )
    return bool(turns) and turns[-1].role == "assistant"


def _tools(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The tools of a row: a list, or the same as JSON text."""
    tools = row.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            tools = None
    if not isinstance(tools, list):
        raise Unusable("tools must be a list of tools, or one as JSON text")
    return tuple(tools)


def _from_instruction(row: Mapping[str, Any], place: str, label_words: Mapping[str, str]) -> Example:
    instruction, given, output = _text(row, "instruction"), _text(row, "input", ""), _text(row, "output")
    _not_empty(output, "output")
    question = f"{instruction}\n{given}" if given else instruction
    turns = (*_system(row), *_history(row), Message("user", question), Message("assistant", output))
    return Example(turns, place, fields={"instruction": instruction, "input": given, "prompt": question})


def _from_prompt(row: Mapping[str, Any], place: str, label_words: Mapping[str, str]) -> Example:
    if isinstance(row["prompt"], list) or isinstance(row.get("completion"), list):
        asked, answered = _turns(row["prompt"], "user"), _turns(row.get("completion"), "assistant")
        return _from_messages({**row, "messages": [*asked, *answered]}, place, label_words)
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    _not_empty(completion, "completion")
    return Example((*_system(row), Message("user", prompt), Message("assistant", completion)), place, fields={"prompt": prompt})


def _from_text(row: Mapping[str, Any], place: str, label_words: Mapping[str, str]) -> Example:
    text, label = _text(row, "text"), row.get("label")
    known = _label(label)
    if isinstance(label, ClassName) and label.number in label_words:
        known = label.number
    if label_words and known not in label_words:
        raise Unusable(f"label {label!r} has no word in data.label_words")
    word = _whole_characters(label_words.get(known, known), "label")
    _not_empty(word, "label")
    return Example((Message("user", text), Message("assistant", word)), place, label=word, fields={"text": text, "prompt": text})


def _label(label: Any) -> str:
    """A label as text: without blanks around it, 1.0 as 1, True as true."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    if not isinstance(label, str | int):
        raise Unusable("label is missing" if label is None else f"label must be text or a whole number, this is {label!r}")
    return str(label).strip()


ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}


def _message(turn: Mapping[str, Any]) -> Message:
    """A turn of role and content, or of from and value as ShareGPT has them."""
    role, content = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    if turn.get("function_call"):
        raise Unusable("a turn has a function_call, the old form of tool_calls, which is not read")
    if turn.get("weight") not in (None, 0, 1):
        raise Unusable(f"a turn has weight {turn['weight']}: known are 0, read and not learned, and 1")
    if isinstance(turn.get(content), list):
        turn = {**turn, content: "".join(map(_part, turn[content]))}
    said = _text(turn, role)
    known = ROLES.get(said, said)
    more = more_of(known, turn)
    text = _text(turn, content, "" if "tool_calls" in more else None)
    return Message(known, text, known != "assistant" or turn.get("weight") != 0, more)


def more_of(role: str, turn: Mapping[str, Any]) -> dict[str, Any]:
    """What a turn says of tools, arguments that are JSON text as what they say, as chat templates want them. Raises Unusable."""
    if role == "tool":
        return {name: turn[name] for name in ("name", "tool_call_id") if turn.get(name)}
    calls = turn.get("tool_calls")
    if not calls:
        return {}
    if role != "assistant" or not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise Unusable("tool_calls must be a list of calls, in a turn of the assistant")
    return {"tool_calls": [_read_arguments(call) for call in calls]}


def _read_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    inside = call.get("function")
    if isinstance(inside, Mapping):
        return {**call, "function": _read_arguments(inside)}
    try:
        read = json.loads(call["arguments"]) if isinstance(call.get("arguments"), str) else None
    except ValueError:
        read = None
    return {**call, "arguments": read} if isinstance(read, dict) else dict(call)


def _part(part: Any) -> str:
    """The text of one part of a turn's content."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text":
        raise Unusable(f"a turn holds a part of type {kind}; only text is read")
    return _text(part, "text")


def _turns(value: Any, role: str) -> list[Any]:
    """A prompt or completion, text or turns, as turns."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _system(row: Mapping[str, Any]) -> tuple[Message, ...]:
    return (Message("system", _text(row, "system")),) if row.get("system") else ()


def _history(row: Mapping[str, Any]) -> Iterator[Message]:
    """The earlier turns of a row as pairs of question and answer, as LLaMA-Factory writes them."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Unusable("history must be a list of [question, answer]")
    for pair in history:
        asked, answered = (_text({"history": text}, "history") for text in pair)
        yield Message("user", asked)
        yield Message("assistant", answered)


SHAPES: dict[str, Callable[[Mapping[str, Any], str, Mapping[str, str]], Example]] = {
    "messages": _from_messages,
    "conversations": _from_messages,
    "instruction": _from_instruction,
    "prompt": _from_prompt,
    "text": _from_text,
}
NEEDED = {
    "messages": {"messages"},
    "instruction": {"instruction", "input", "output"},
    "prompt": {"prompt", "completion"},
    "text": {"text", "label"},
}
FIELDS = ("messages", "conversations", "instruction/input/output", "prompt/completion", "text/label")


def _text(row: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = row.get(key)
    if value is None:
        if default is None:
            raise Unusable(f"field {key} is missing")
        return default
    if not isinstance(value, str):
        raise Unusable(f"field {key} must be text, this is {type(value).__name__}")
    return _whole_characters(value, key)


def _whole_characters(value: str, key: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unusable(f"field {key} holds half of a surrogate pair, which is no text") from None
    return value


def _not_empty(response: str, name: str) -> None:
    if not response.strip():
        raise Unusable(f"{name} is empty: there is nothing to learn from")
