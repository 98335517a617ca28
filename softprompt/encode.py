"""Template + tokenizer -> ids and which of them are supervised, built in one motion, never searched for afterwards.

A template turns an example into segments of text, each supervised or not. Segments are tokenized one by one, as
generation will see them: the model continues from the tokens of the question, whatever the answer begins with.
The BOS token is kept out of the ids: it belongs to the prefix (see model.py), once, before everything else.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from softprompt.config import Config
from softprompt.data import Example, Loaded, Message, Rejected, hold_out, load_examples
from softprompt.errors import ConfigError, DataError

Tokenizer = Any  # a transformers PreTrainedTokenizerBase; transformers is not imported here


@dataclass(frozen=True)
class Segment:
    """A piece of text. `ends`: the EOS token follows it, supervised like the text."""

    text: str
    supervised: bool = False
    ends: bool = False


@dataclass(frozen=True)
class Encoded:
    """One row as the model sees it, without BOS. `ids[t]` is scored where `supervised[t]`. `num_cut`: ids cut away."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]
    source: str = ""
    num_cut: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_supervised(self) -> int:
        return sum(self.supervised)

    @property
    def question(self) -> tuple[int, ...]:
        """The ids before the last answer."""
        start = len(self) - 1 - self.supervised[::-1].index(True)
        while start and self.supervised[start - 1]:
            start -= 1
        return self.ids[:start]

    def after(self, count: int) -> "Encoded":
        """The row without its first `count` tokens."""
        return replace(self, ids=self.ids[count:], supervised=self.supervised[count:])


def joined(segments: Iterable[Segment]) -> list[Segment]:
    """The same text in one piece up to each EOS, nothing of it supervised: tokens may cross from a question into its answer."""
    pieces, text = [], ""
    for segment in segments:
        text += segment.text
        if segment.ends:
            pieces.append(Segment(text, ends=True))
            text = ""
    return [*pieces, Segment(text)] if text else pieces


def num_shared(texts: Iterable[Sequence[int] | str]) -> int:
    """Tokens, or characters, that all texts begin with."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False)))


def shared_beginning(rows: Iterable[Encoded]) -> tuple[int, ...]:
    """The ids that all rows begin with and that nothing is predicted from: a template's first words, a system turn."""
    questions = [row.ids[: row.supervised.index(True)][:-1] for row in rows]  # the last one predicts
    return questions[0][: num_shared(questions)]


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with a template. `bos_id` is set where rows begin with BOS."""

    tokenizer: Tokenizer
    template: str
    bos_id: int | None
    segments: Callable[[Example], list[Segment]]

    @property
    def knows_turns(self) -> bool:
        """Whether earlier turns of a conversation are written; a template of the user's may look at the last one alone."""
        return self.template in NAMES

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
            raise DataError(f"{source}: the question is empty: there is nothing to answer")
        if self._writes_bos(ids):
            ids, supervised = ids[1:], supervised[1:]
        return Encoded(tuple(ids), tuple(supervised), source)

    def question(self, text: str | Sequence[Message]) -> tuple[int, ...]:
        """Ids of a question that waits for its answer, without BOS."""
        messages = (Message("user", text),) if isinstance(text, str) else tuple(text)
        asked = Example(messages, "question", fields=_question_fields(messages[-1].content))
        ids = tuple(token for segment in self.segments(asked) for token in self._tokenize(segment)[0])
        return ids[1:] if self._writes_bos(ids) else ids

    def opening(self, example: Example) -> str:
        """What every question begins with, whatever it asks, of rows with the fields of this one; without blanks around it."""
        asked = [Example((Message("user", text),), example.source, fields=dict.fromkeys(example.fields, text)) for text in "01"]
        try:
            texts = [self.segments(one)[0].text for one in asked]
        except DataError:  # a template may be unable to fill in such fields
            return ""
        return texts[0][: num_shared(texts)].strip()

    def _writes_bos(self, ids: Sequence[int]) -> bool:
        """Whether the chat template wrote the BOS token that belongs to the prefix. One at a later turn stays: it is text."""
        return self.template == "chat" and bool(ids) and ids[0] == self.bos_id

    def _tokenize(self, segment: Segment) -> tuple[list[int], int]:
        """The segment's ids and how many of them count as the segment's own (a chat template writes some after the end)."""
        ids = self.tokenizer(segment.text, add_special_tokens=False)["input_ids"]
        eos_id = self.tokenizer.eos_token_id
        if self.template != "chat":
            return ([*ids, eos_id], len(ids) + 1) if segment.ends else (ids, len(ids))
        if not segment.supervised:
            return ids, len(ids)
        special = set(self.tokenizer.all_special_ids)
        ends = [index for index, token in enumerate(ids) if token in special]
        return (ids, ends[-1] + 1) if ends else ([*ids, eos_id], len(ids) + 1)


def _question_fields(text: str) -> Mapping[str, str]:
    """A question typed by a user stands for the main field of every shape of row."""
    return {"prompt": text, "instruction": text, "input": "", "text": text}


def _cut(row: Encoded, max_length: int | None, has_bos: bool) -> Encoded:
    room = len(row) if max_length is None else max(0, max_length - has_bos)
    num_cut = max(0, len(row) - room)
    row = replace(row, ids=row.ids[:room], supervised=row.supervised[:room], num_cut=num_cut)
    if row.num_supervised == 0:
        raise DataError(f"{row.source}: the whole response lies beyond data.max_length = {max_length} tokens and is cut away")
    return row


def make_encoder(tokenizer: Tokenizer, template: str) -> Encoder:
    """Looks the template up by name, or takes it as Jinja text or a `.jinja` file.

    Raises ConfigError for an unknown name, a faulty template, or a tokenizer without EOS or chat template.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no EOS token: answers would never end")
    text = _template_text(template)
    if text == "chat":
        if not tokenizer.chat_template:
            raise ConfigError('the tokenizer has no chat template: use data.template = "human-assistant" or a Jinja template')
        segments: Callable[[Example], list[Segment]] = _Chat(tokenizer)
    elif text == "human-assistant":
        segments = human_assistant
    else:
        segments = _Jinja(text)
    return Encoder(tokenizer, text, _bos_id(tokenizer, text), segments)


def _template_text(template: str) -> str:
    if template in NAMES or "{{" in template or "{%" in template:
        return template
    if template.endswith(".jinja"):
        try:
            return Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.template: cannot read {template}: {error}") from None
    near = get_close_matches(template, NAMES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(NAMES)}, Jinja text with {{{{ }}}}, or a .jinja file"
    raise ConfigError(f"data.template: unknown template {template!r}: {hint}")


def _bos_id(tokenizer: Tokenizer, template: str) -> int | None:
    """BOS where the tokenizer adds it, or where the chat template writes it, once: a token at every turn is a mark of turns."""
    bos_id = tokenizer.bos_token_id
    if bos_id is None or tokenizer("a")["input_ids"][0] == bos_id:
        return bos_id
    if template == "chat" and bos_id != tokenizer.eos_token_id:
        shown = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
        return bos_id if shown.startswith(tokenizer.bos_token) and shown.count(tokenizer.bos_token) == 1 else None
    return None


# ---- the templates -------------------------------------------------------------------------------------------------


def human_assistant(example: Example) -> list[Segment]:
    """`Human: ...\\n\\nAssistant: ` + response + EOS, as the bloom-1b4-zh tutorial writes it; a system turn stands first."""
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


class _Chat:
    """The tokenizer's own chat template; every assistant turn is supervised up to its end-of-turn token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, example: Example) -> list[Segment]:
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
                    f"{example.source}: this chat template writes earlier turns differently once a conversation goes on; "
                    "split the conversation into rows with one answer each, or use a template of your own"
                )
            segments += [Segment(asked[len(shown) :]), Segment(answered[len(asked) :], supervised=True)]
            shown = answered
        if turns[-1]["role"] != "assistant":
            segments.append(Segment(self._render(turns, True, example)[len(shown) :]))
        return segments

    def _render(self, turns: list[dict[str, str]], ask: bool, example: Example) -> str:
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
        except Exception as error:  # a template may raise anything
            raise DataError(f"{example.source}: the chat template refuses this conversation: {error}") from None


class _Jinja:
    """A template of the user's: renders what stands before the last response from the row's fields and `messages`."""

    def __init__(self, text: str) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        try:
            self.template = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"data.template: line {error.lineno}: {error.message}") from None

    def __call__(self, example: Example) -> list[Segment]:
        answered = example.messages[-1].role == "assistant"
        before = example.messages[:-1] if answered else example.messages
        system = "".join(message.content + "\n" for message in before if message.role == "system")
        turns = [{"role": message.role, "content": message.content} for message in before if message.role != "system"]
        try:
            question = Segment(system + self.template.render({**example.fields, "messages": turns}))
        except Exception as error:  # a template is the user's program: 1 / 0 raises as freely as an undefined name
            raise DataError(f"{example.source}: data.template cannot be filled in: {error}") from None
        return [question, Segment(example.response, supervised=True, ends=True)] if answered else [question]


NAMES = ("human-assistant", "chat")


# ---- the rows of a run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The rows of one split: what the model sees, the examples behind it in the same order, and what was rejected."""

    encoded: tuple[Encoded, ...]
    examples: tuple[Example, ...]
    rejected: tuple[Rejected, ...]
    fingerprint: str
    labels: tuple[str, ...]

    @property
    def num_supervised(self) -> int:
        return sum(row.num_supervised for row in self.encoded)


def encode_rows(encoder: Encoder, loaded: Loaded, max_length: int) -> Rows:
    """Encodes every example; those that cannot be used join the rejected ones."""
    kept: list[tuple[Encoded, Example]] = []
    rejected = list(loaded.rejected)
    for example in loaded.examples:
        try:
            kept.append((encoder.encode(example, max_length), example))
        except DataError as error:
            rejected.append(Rejected(example.source, str(error).removeprefix(f"{example.source}: ")))
    encoded, examples = zip(*kept, strict=True) if kept else ((), ())
    return Rows(encoded, examples, tuple(rejected), loaded.fingerprint, loaded.labels)


def load_splits(config: Config) -> tuple[Loaded, Loaded | None]:
    """(training rows, held-out rows or None) of a configuration, before they are encoded."""
    if config.data.train is None:
        raise ConfigError("data.train is not set: name a file, a folder or a hub data set")
    words = config.data.label_words
    train = load_examples(config.data.train, limit=config.data.limit, label_words=words)
    if config.data.eval is not None:
        return train, load_examples(config.data.eval, label_words=words)
    if config.data.eval_fraction:
        return hold_out(train, config.data.eval_fraction, config.train.seed)
    return train, None


def load_rows(config: Config, encoder: Encoder) -> tuple[Rows, Rows | None]:
    """The rows of `load_splits`, encoded. Does not judge how many were rejected."""
    train, held = load_splits(config)
    rows = encode_rows(encoder, train, config.data.max_length)
    return rows, None if held is None else encode_rows(encoder, held, config.data.max_length)


def check_rejected(rejected: Sequence[Rejected], max_rejected: int) -> None:
    """Raises DataError when more rows were rejected than allowed."""
    if len(rejected) > max_rejected:
        shown = "; ".join(f"{item.source}: {item.reason}" for item in rejected[:3])
        more = f"; and {len(rejected) - 3} more" if len(rejected) > 3 else ""
        raise DataError(f"{len(rejected)} rows rejected, data.max_rejected allows {max_rejected}: {shown}{more}")
