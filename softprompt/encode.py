"""Template + tokenizer -> ids and which of them are supervised, built in one motion, never searched for afterwards.

A template turns an example into segments of text, each supervised or not (templates.py). Segments are tokenized one by one, as
generation will see them: the model continues from the tokens of the question, whatever the answer begins with.
The BOS token is kept out of the ids: it belongs to the prefix (engine/prefix.py), once, before everything else.

What a row says is text, whatever it spells (literal.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice, pairwise
from typing import Any

from softprompt.data import Example, Message
from softprompt.engine.tokens import Encoded, num_shared
from softprompt.errors import ConfigError, DataError, TooLong
from softprompt.literal import MARKS, Literal, Tokenizer
from softprompt.templates import Segment, Template, make_template
from softprompt.thinking import Thinking


@dataclass(frozen=True)
class Draft:
    """A row as text; no segments where there is an `error`."""

    example: Example
    segments: tuple[Segment, ...]
    error: DataError | None = None


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with a template. `bos_id` is set where rows begin with BOS. `system`: the system turn of conversations that have none
    of their own. `num_tokens`: how many tokens the base has embeddings for, where that is known."""

    tokenizer: Tokenizer
    template: Template
    bos_id: int | None
    system: str | None = None
    num_tokens: int | None = None

    @cached_property
    def eos_id(self) -> int:
        """The tokenizer's end of a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer beside the base's own end-of-text tokens."""
        return self.template.end_ids

    @property
    def thinking(self) -> Thinking | None:
        """The block in front of answers that is no part of them."""
        return self.template.thinking

    def told(self, system: str | None) -> "Encoder":
        """The same with another system turn; none where it is empty."""
        return replace(self, system=system or None)

    def completed(self, example: Example) -> Example:
        """The example with the system turn, unless it has one of its own."""
        if self.system is None or any(message.role == "system" for message in example.messages):
            return example
        return replace(example, messages=(Message("system", self.system), *example.messages))

    def segments(self, example: Example) -> list[Segment]:
        """The row as text. Raises DataError for one that the template cannot write."""
        return self.template.segments(self._marked(self.completed(example)))

    def num_unlearned(self, example: Example, row: Encoded) -> int:
        """Answers of a conversation that are read and not learned, because the template writes them otherwise once it goes on."""
        if len(example.messages) < 4 or not self.template.knows_turns:
            return 0
        answers = sum(message.role == "assistant" and message.learned for message in example.messages)
        if answers < 2:
            return 0
        if row.num_cut:
            return answers - sum(segment.supervised for segment in self.segments(example))
        return answers - sum(on and not before for before, on in pairwise((False, *row.supervised)))

    def encode(self, example: Example, max_length: int | None = None) -> Encoded:
        """Ids and supervision of a whole row, cut at `max_length` tokens (BOS counted).

        Raises DataError when the question is empty, nothing supervised is left, or a token has no embedding.
        """
        return self.cut(self.encode_segments(self.segments(example), example.source), max_length)

    def encode_segments(self, segments: Sequence[Segment], source: str) -> Encoded:
        """Ids and supervision of a row in segments. Raises DataError when nothing stands before what is supervised."""
        return self.assembled(segments, [self._ids(segment.text) for segment in segments], source)

    def assembled(self, segments: Sequence[Segment], pieces: Sequence[list[int]], source: str) -> Encoded:
        """The row of segments whose ids are known: `pieces[i]` of `segments[i]`. Raises DataError as `encode_segments`."""
        ids: list[int] = []
        supervised: list[bool] = []
        for segment, found in zip(segments, pieces, strict=True):
            piece, last = self.template.ended(found, segment, self.eos_id)
            ids += piece
            supervised += [segment.supervised] * last + [False] * (len(piece) - last)
        if supervised and supervised[0]:
            raise DataError("the question is empty: there is nothing to answer", source)
        if self._begins_with_bos(ids):
            ids, supervised = ids[1:], supervised[1:]
        self.check_ids(ids, source)
        return Encoded(tuple(ids), tuple(supervised), source)

    def cut(self, row: Encoded, max_length: int | None) -> Encoded:
        """The row's first `max_length` tokens (BOS counted). Raises TooLong when nothing supervised is left."""
        room = len(row) if max_length is None else max(0, max_length - (self.bos_id is not None))
        if len(row) > room:
            supervised, lost = row.supervised[:room], sum(row.supervised[room:])
            row = Encoded(row.ids[:room], supervised, row.source, len(row) - room, lost)
        if not any(row.supervised):
            raise TooLong(max_length, len(row) + row.num_cut + (self.bos_id is not None), row.source)
        return row

    def question(self, text: str | Sequence[Message], *, trained: bool = True) -> tuple[int, ...]:
        """Ids of a question, or of a conversation that ends with one, that waits for its answer, without BOS. `trained`: to go on from the
        template's own pieces; a bare base knows text, which has a blank at the end in one token with the next word (LOG.md)."""
        messages = (Message("user", text),) if isinstance(text, str) else tuple(text)
        asked = Example(messages, "question", fields=question_fields(messages[-1].content))
        *before, last = self.segments(asked)
        last = last if trained else replace(last, text=last.text.rstrip(" ") or last.text)
        found = (self.template.ended(self._ids(segment.text), segment, self.eos_id)[0] for segment in (*before, last))
        ids = tuple(chain.from_iterable(found))
        self.check_ids(ids, "question")
        return ids[1:] if self._begins_with_bos(ids) else ids

    def check_ids(self, ids: Sequence[int], source: str) -> None:
        """Raises DataError for a token that the base has no embedding for."""
        if self.num_tokens is not None and max(ids, default=0) >= self.num_tokens:
            token = max(ids)
            raise DataError(
                f"the token {self.tokenizer.convert_ids_to_tokens(token)!r} (number {token}) has no embedding: the base's table ends at "
                f"{self.num_tokens - 1}; take it out of the text",
                source,
            )

    def opening(self, example: Example) -> str:
        """What every question begins with, whatever it asks, of rows with the fields of this one; without blanks around it."""
        asked = [Example((Message("user", text),), example.source, fields=dict.fromkeys(example.fields, text)) for text in "01"]
        try:
            texts = [self.template.segments(one)[0].text for one in asked]
        except DataError:  # a template may be unable to fill in such fields
            return ""
        return texts[0][: num_shared(texts)].strip()

    def _begins_with_bos(self, ids: Sequence[int]) -> bool:
        """Whether the template wrote the BOS token that belongs to the prefix. One at a later turn stays: it is text."""
        return self.template.writes_bos and bool(ids) and ids[0] == self.bos_id

    def _ids(self, text: str) -> list[int]:
        if MARKS[0] in text:
            return self._literal.ids(text)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    # ---- many rows

    def warm_up(self) -> None:
        """Finds out all that is asked of the tokenizer once, before another thread uses it."""
        _ = self.end_ids, self._literal.stubborn, self.template.thinking

    def drafts(self, examples: Sequence[Example]) -> list[Draft]:
        """Rows as text, to be tokenized together."""
        found = []
        for example in examples:
            try:
                found.append(Draft(example, tuple(self.segments(example))))
            except DataError as error:
                found.append(Draft(example, (), error))
        return found

    def tokenized(self, drafts: Sequence[Draft]) -> list[list[int]]:
        """The ids of every segment of every row in turn, the same as one by one. Fast tokenizers work on them all at once, on all cores,
        and let other threads run."""
        texts = [segment.text for draft in drafts for segment in draft.segments]
        plain = [text for text in texts if MARKS[0] not in text]
        found = iter(many_ids(self.tokenizer, plain))
        return [self._literal.ids(text) if MARKS[0] in text else next(found) for text in texts]

    def finished(self, drafts: Sequence[Draft], pieces: Sequence[list[int]], max_length: int | None) -> Iterator[Encoded | DataError]:
        """What `encode` gives for every row, or raises; `pieces`: what `tokenized` gave."""
        rest = iter(pieces)
        for draft in drafts:
            own = list(islice(rest, len(draft.segments)))
            try:
                if draft.error is not None:
                    raise draft.error
                yield self.cut(self.assembled(draft.segments, own, draft.example.source), max_length)
            except DataError as error:
                yield error

    # ---- control tokens that a row spells

    @cached_property
    def _literal(self) -> Literal:
        return Literal(self.tokenizer)

    def stubborn(self, example: Example) -> tuple[str, ...]:
        """The control tokens that a row spells and that this tokenizer makes even of plain text."""
        if not self._literal.stubborn:
            return ()
        spelled = dict.fromkeys(found for message in example.messages for found in self._literal.spelled(message.content))
        return tuple(text for text in spelled if text in self._literal.stubborn)

    def _marked(self, example: Example) -> Example:
        """The example with marks around the control tokens that it spells."""
        if any([mark in message.content for message in example.messages for mark in MARKS]):
            raise DataError(f"the row holds U+{ord(MARKS[0]):X} or U+{ord(MARKS[1]):X}, which are no characters", example.source)
        if not (example.has_tools or self.template.reads_fields or any([self._literal.spells(one.content) for one in example.messages])):
            return example
        marked = self._literal.marked
        messages = tuple(
            replace(message, content=marked(message.content), more=_inside(message.more, marked)) for message in example.messages
        )
        fields = {key: self._literal.marked(text) if isinstance(text, str) else text for key, text in example.fields.items()}
        return replace(example, messages=messages, fields=fields, tools=_inside(example.tools, marked))


def _inside(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _inside(one, change) for key, one in value.items()}
    return type(value)(_inside(one, change) for one in value) if isinstance(value, list | tuple) else value


def question_fields(text: str) -> Mapping[str, str]:
    """A question typed by a user stands for the main field of every shape of row."""
    return {"prompt": text, "instruction": text, "input": "", "text": text}


def many_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Of every text what `tokenizer(text, add_special_tokens=False)` gives."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        return list(tokenizer(list(texts), add_special_tokens=False)["input_ids"])
    tokenizer(texts[0], add_special_tokens=False)  # sets the library's tokenizer to neither cut nor fill nor split control tokens
    return [one.ids for one in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def shared_system(examples: Sequence[Example]) -> str | None:
    """The system turn that all rows begin with, or None."""

    def systems() -> Iterator[str | None]:
        for example in examples:
            first = example.messages[0]
            yield first.content if first.role == "system" else None

    found = set(systems())
    return found.pop() if len(found) == 1 else None


def make_encoder(
    tokenizer: Tokenizer, template: str, *, date: str | None = None, system: str | None = None, num_tokens: int | None = None
) -> Encoder:
    """`date`: the day that a template with a clock is told; left out, today. `system` and `num_tokens`: see Encoder.

    Raises ConfigError for an unknown name, a faulty template, or a tokenizer without EOS or chat template.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no EOS token: answers would never end")
    found = make_template(tokenizer, template, date)
    return Encoder(tokenizer, found, _bos_id(tokenizer, found), system or None, num_tokens)


def _bos_id(tokenizer: Tokenizer, template: Template) -> int | None:
    """BOS where the tokenizer adds it, or where the template writes it, once: a token at every turn is a mark of turns."""
    bos_id = tokenizer.bos_token_id
    if bos_id is None or tokenizer("a")["input_ids"][0] == bos_id:
        return bos_id
    if template.writes_bos and bos_id != tokenizer.eos_token_id:
        shown = template.segments(Example((Message("user", "a"),), "a question"))[0].text
        return bos_id if shown.startswith(tokenizer.bos_token) and shown.count(tokenizer.bos_token) == 1 else None
    return None


def check_position(position: str, encoder: Encoder) -> None:
    """Raises ConfigError for "after_bos" without a BOS token."""
    if position == "after_bos" and encoder.bos_id is None:
        raise ConfigError('prompt.position = "after_bos": this tokenizer adds no BOS token; use "start"')
