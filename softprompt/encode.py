"""Template + tokenizer -> ids and which of them are supervised, built in one motion, never searched for afterwards.

A template turns an example into segments of text, each supervised or not. Segments are tokenized one by one, as
generation will see them: the model continues from the tokens of the question, whatever the answer begins with.
The BOS token is kept out of the ids: it belongs to the prefix (engine/prefix.py), once, before everything else.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from softprompt.data import Example, Message
from softprompt.engine.tokens import Encoded, num_shared
from softprompt.errors import ConfigError, DataError

Tokenizer = Any  # a transformers PreTrainedTokenizerBase; transformers is not imported here


@dataclass(frozen=True)
class Segment:
    """A piece of text. `ends`: the EOS token follows it, supervised like the text."""

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


# ---- the templates -------------------------------------------------------------------------------------------------


class Template(ABC):
    """How an example becomes text, and how a text ends. `name`: what a card holds, a name of NAMES or Jinja text.

    `knows_turns`: whether earlier turns of a conversation are written. `writes_bos`: whether BOS may stand in the text itself.
    """

    name: str
    knows_turns = True
    writes_bos = False

    @abstractmethod
    def segments(self, example: Example) -> list[Segment]:
        """Raises DataError for an example that cannot be written."""

    def ended(self, ids: list[int], segment: Segment, tokenizer: Tokenizer) -> tuple[list[int], int]:
        """(the segment's ids with its end, how many of them count as the segment's own)."""
        return ([*ids, tokenizer.eos_token_id], len(ids) + 1) if segment.ends else (ids, len(ids))


class HumanAssistant(Template):
    """`Human: ...\\n\\nAssistant: ` + response + EOS, as the bloom-1b4-zh tutorial writes it; a system turn stands first."""

    name = "human-assistant"

    def segments(self, example: Example) -> list[Segment]:
        segments: list[Segment] = []
        for message in example.messages:
            if message.role == "system":
                segments.append(Segment(message.content + "\n\n"))
            elif message.role == "user":
                between = "\n\n" if segments and segments[-1].ends else ""
                segments.append(Segment(between + ("Human: " + message.content).strip() + "\n\nAssistant: "))
            else:
                segments.append(Segment(message.content, supervised=True, ends=True))
        return segments


class Chat(Template):
    """The tokenizer's own chat template; every assistant turn is supervised up to its end-of-turn token."""

    name = "chat"
    writes_bos = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def segments(self, example: Example) -> list[Segment]:
        turns = [{"role": message.role, "content": message.content} for message in example.messages]
        segments: list[Segment] = []
        shown = ""
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            asked = self._render(turns[:index], True, example)
            answered = self._render(turns[: index + 1], False, example)
            if not asked.startswith(shown) or not answered.startswith(asked):
                raise DataError(
                    "this chat template writes earlier turns differently once a conversation goes on; "
                    "split the conversation into rows with one answer each, or use a template of your own",
                    example.source,
                )
            segments += [Segment(asked[len(shown) :]), Segment(answered[len(asked) :], supervised=True)]
            shown = answered
        if turns[-1]["role"] != "assistant":
            segments.append(Segment(self._render(turns, True, example)[len(shown) :]))
        return segments

    def ended(self, ids: list[int], segment: Segment, tokenizer: Tokenizer) -> tuple[list[int], int]:
        """A chat template writes the end of a turn itself, and something after it, which nobody need learn."""
        if not segment.supervised:
            return ids, len(ids)
        special = set(tokenizer.all_special_ids)
        ends = [index for index, token in enumerate(ids) if token in special]
        return (ids, ends[-1] + 1) if ends else ([*ids, tokenizer.eos_token_id], len(ids) + 1)

    def _render(self, turns: list[dict[str, str]], ask: bool, example: Example) -> str:
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
        except Exception as error:  # a template may raise anything
            raise DataError(f"the chat template refuses this conversation: {error}", example.source) from None


class OwnTemplate(Template):
    """A template of the user's: renders what stands before the last response from the row's fields and `messages`."""

    knows_turns = False  # it may look at the last one alone

    def __init__(self, text: str) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        self.name = text
        try:
            self.template = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"data.template: line {error.lineno}: {error.message}") from None

    def segments(self, example: Example) -> list[Segment]:
        answered = example.messages[-1].role == "assistant"
        before = example.messages[:-1] if answered else example.messages
        system = "".join(message.content + "\n" for message in before if message.role == "system")
        turns = [{"role": message.role, "content": message.content} for message in before if message.role != "system"]
        try:
            question = Segment(system + self.template.render({**example.fields, "messages": turns}))
        except Exception as error:  # a template is the user's program: 1 / 0 raises as freely as an undefined name
            raise DataError(f"data.template cannot be filled in: {error}", example.source) from None
        return [question, Segment(example.response, supervised=True, ends=True)] if answered else [question]


NAMES = (HumanAssistant.name, Chat.name)


def make_template(tokenizer: Tokenizer, wanted: str) -> Template:
    """Looks a template up by name, or takes it as Jinja text or a `.jinja` file. Raises ConfigError."""
    if wanted == Chat.name:
        if not tokenizer.chat_template:
            raise ConfigError('the tokenizer has no chat template: use data.template = "human-assistant" or a Jinja template')
        return Chat(tokenizer)
    if wanted == HumanAssistant.name:
        return HumanAssistant()
    if "{{" in wanted or "{%" in wanted:
        return OwnTemplate(wanted)
    if wanted.endswith(".jinja"):
        try:
            return OwnTemplate(Path(wanted).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.template: cannot read {wanted}: {error}") from None
    near = get_close_matches(wanted, NAMES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(NAMES)}, Jinja text with {{{{ }}}}, or a .jinja file"
    raise ConfigError(f"data.template: unknown template {wanted!r}: {hint}")


# ---- encoding ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with a template. `bos_id` is set where rows begin with BOS."""

    tokenizer: Tokenizer
    template: Template
    bos_id: int | None

    def segments(self, example: Example) -> list[Segment]:
        """The row as text. Raises DataError for one that the template cannot write."""
        return self.template.segments(example)

    def encode(self, example: Example, max_length: int | None = None) -> Encoded:
        """Ids and supervision of a whole row, cut at `max_length` tokens (BOS counted).

        Raises DataError when the question is empty or nothing supervised is left.
        """
        return _cut(self.encode_segments(self.segments(example), example.source), max_length, self.bos_id is not None)

    def encode_segments(self, segments: Sequence[Segment], source: str) -> Encoded:
        """Ids and supervision of a row in segments. Raises DataError when nothing stands before what is supervised."""
        ids: list[int] = []
        supervised: list[bool] = []
        for segment in segments:
            piece, last = self._tokenize(segment)
            ids += piece
            supervised += [segment.supervised and index < last for index in range(len(piece))]
        if supervised and supervised[0]:
            raise DataError("the question is empty: there is nothing to answer", source)
        if self._begins_with_bos(ids):
            ids, supervised = ids[1:], supervised[1:]
        return Encoded(tuple(ids), tuple(supervised), source)

    def question(self, text: str | Sequence[Message]) -> tuple[int, ...]:
        """Ids of a question that waits for its answer, without BOS."""
        messages = (Message("user", text),) if isinstance(text, str) else tuple(text)
        asked = Example(messages, "question", fields=_question_fields(messages[-1].content))
        ids = tuple(token for segment in self.segments(asked) for token in self._tokenize(segment)[0])
        return ids[1:] if self._begins_with_bos(ids) else ids

    def opening(self, example: Example) -> str:
        """What every question begins with, whatever it asks, of rows with the fields of this one; without blanks around it."""
        asked = [Example((Message("user", text),), example.source, fields=dict.fromkeys(example.fields, text)) for text in "01"]
        try:
            texts = [self.segments(one)[0].text for one in asked]
        except DataError:  # a template may be unable to fill in such fields
            return ""
        return texts[0][: num_shared(texts)].strip()

    def _begins_with_bos(self, ids: Sequence[int]) -> bool:
        """Whether the template wrote the BOS token that belongs to the prefix. One at a later turn stays: it is text."""
        return self.template.writes_bos and bool(ids) and ids[0] == self.bos_id

    def _tokenize(self, segment: Segment) -> tuple[list[int], int]:
        """The segment's ids and how many of them count as the segment's own."""
        ids = self.tokenizer(segment.text, add_special_tokens=False)["input_ids"]
        return self.template.ended(ids, segment, self.tokenizer)


def _question_fields(text: str) -> Mapping[str, str]:
    """A question typed by a user stands for the main field of every shape of row."""
    return {"prompt": text, "instruction": text, "input": "", "text": text}


def _cut(row: Encoded, max_length: int | None, has_bos: bool) -> Encoded:
    room = len(row) if max_length is None else max(0, max_length - has_bos)
    num_cut = max(0, len(row) - room)
    row = replace(row, ids=row.ids[:room], supervised=row.supervised[:room], num_cut=num_cut)
    if row.num_supervised == 0:
        raise DataError(f"the whole response lies beyond data.max_length = {max_length} tokens and is cut away", row.source)
    return row


def make_encoder(tokenizer: Tokenizer, template: str) -> Encoder:
    """Raises ConfigError for an unknown name, a faulty template, or a tokenizer without EOS or chat template."""
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no EOS token: answers would never end")
    found = make_template(tokenizer, template)
    return Encoder(tokenizer, found, _bos_id(tokenizer, found))


def _bos_id(tokenizer: Tokenizer, template: Template) -> int | None:
    """BOS where the tokenizer adds it, or where the template writes it, once: a token at every turn is a mark of turns."""
    bos_id = tokenizer.bos_token_id
    if bos_id is None or tokenizer("a")["input_ids"][0] == bos_id:
        return bos_id
    if template.writes_bos and bos_id != tokenizer.eos_token_id:
        shown = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
        return bos_id if shown.startswith(tokenizer.bos_token) and shown.count(tokenizer.bos_token) == 1 else None
    return None


def check_position(position: str, encoder: Encoder) -> None:
    """Raises ConfigError for "after_bos" without a BOS token."""
    if position == "after_bos" and encoder.bos_id is None:
        raise ConfigError('prompt.position = "after_bos": this tokenizer adds no BOS token; use "start"')
