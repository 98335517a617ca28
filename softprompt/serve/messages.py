"""The messages of a chat as the turns of a conversation."""

from collections.abc import Sequence
from typing import Any

from softprompt.data import Message, more_of
from softprompt.data.examples import Unusable
from softprompt.serve.asking import Conversation
from softprompt.serve.refusals import Refused

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
KNOWN = {  # `reasoning_content` comes back from clients that send our own messages again: templates leave out earlier thoughts
    "assistant": {"tool_calls", "reasoning_content"},
    "tool": {"tool_call_id"},
}
EMPTY: tuple[Any, ...] = (None, [], "", {})  # what fields that are not read may be


def read_messages(messages: Sequence[Any]) -> Conversation:
    """Raises Refused for a message with another role, or with more than text in it."""
    if not messages:
        raise Refused("messages is empty", param="messages", code="invalid_value")
    return tuple(_read(message, f"messages.{number}") for number, message in enumerate(messages))


def _read(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise Refused(f"{place} must be an object", param=place, code="invalid_type")
    said = message.get("role")
    if not isinstance(said, str) or said not in ROLES:
        raise Refused(f"{place}.role must be one of {', '.join(ROLES)}", param=f"{place}.role", code="invalid_value")
    known = {"role", "content", *KNOWN.get(said, ())}
    for name, value in message.items():
        if name not in known and value not in EMPTY:
            raise Refused(f"{place}.{name[:100]} is not supported", param=f"{place}.{name[:100]}", code="unsupported_parameter")
    role = ROLES[said]
    try:
        more = more_of(role, message)
    except Unusable as error:
        raise Refused(f"{place}: {error}", param=f"{place}.tool_calls", code="invalid_value") from None
    return Message(role, _text(message.get("content"), f"{place}.content", may_lack=bool(more) and role == "assistant"), more=more)


def _text(content: Any, place: str, *, may_lack: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and may_lack:
        return ""
    if not isinstance(content, list):
        raise Refused(f"{place} must be a text or a list of text parts", param=place, code="invalid_type")
    return "".join(_part(part, f"{place}.{number}") for number, part in enumerate(content))


def _part(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise Refused(f"{place}: only parts of type text are read", param=place, code="unsupported_content")
    if not isinstance(part.get("text"), str) or set(part) > {"type", "text"}:
        raise Refused(f"{place} must hold type and text", param=place, code="invalid_value")
    text: str = part["text"]
    return text
