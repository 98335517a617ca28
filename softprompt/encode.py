"""Template + tokenizer -> ids and which of them are supervised, built in one motion, never searched for afterwards.

A template turns an example into segments of text, each supervised or not (templates.py). Segments are tokenized one by one, as
generation will see them: the model continues from the tokens of the question, whatever the answer begins with.
The BOS token is kept out of the ids: it belongs to the prefix (engine/prefix.py), once, before everything else.

What a row says is text, whatever it spells: where it holds the name of a control token, that is marked before the template is filled
in, so that the template's own control tokens are the only ones.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from softprompt.data import Example, Message
from softprompt.engine.tokens import Encoded, num_shared
from softprompt.errors import ConfigError, DataError
from softprompt.templates import Segment, Template, Tokenizer, control_tokens, make_template
from softprompt.thinking import Thinking

MARKS = "\ufdd0", "\ufdd1"  # around control tokens that a row spells; Unicode keeps these two from ever being characters
MARKED = re.compile(f"{MARKS[0]}([^{MARKS[0]}{MARKS[1]}]*){MARKS[1]}")


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with a template. `bos_id` is set where rows begin with BOS. `system`: the system turn of conversations that have none
    of their own. `num_tokens`: how many tokens the base has embeddings for, where that is known."""

    tokenizer: Tokenizer
    template: Template
    bos_id: int | None
    system: str | None = None
    num_tokens: int | None = None

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
        answers = sum(message.role == "assistant" for message in example.messages)
        if answers < 2 or not self.template.knows_turns:
            return 0
        if row.num_cut:
            return answers - sum(segment.supervised for segment in self.segments(example))
        return answers - sum(on and not before for before, on in pairwise((False, *row.supervised)))

    def encode(self, example: Example, max_length: int | None = None) -> Encoded:
        """Ids and supervision of a whole row, cut at `max_length` tokens (BOS counted).

        Raises DataError when the question is empty, nothing supervised is left, or a token has no embedding.
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
        self.check_ids(ids, source)
        return Encoded(tuple(ids), tuple(supervised), source)

    def question(self, text: str | Sequence[Message]) -> tuple[int, ...]:
        """Ids of a question, or of a conversation that ends with one, that waits for its answer, without BOS."""
        messages = (Message("user", text),) if isinstance(text, str) else tuple(text)
        asked = Example(messages, "question", fields=_question_fields(messages[-1].content))
        ids = tuple(token for segment in self.segments(asked) for token in self._tokenize(segment)[0])
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

    def _tokenize(self, segment: Segment) -> tuple[list[int], int]:
        """The segment's ids and how many of them count as the segment's own."""
        ids = self._literal(segment.text) if MARKS[0] in segment.text else self._ids(segment.text)
        return self.template.ended(ids, segment, self.tokenizer)

    def _ids(self, text: str, **how: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, **how)["input_ids"]
        return ids

    # ---- control tokens that a row spells

    @cached_property
    def _control(self) -> re.Pattern[str]:
        names = sorted(control_tokens(self.tokenizer).values(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")

    def spelled(self, example: Example) -> tuple[str, ...]:
        """The control tokens that a row spells, in order of appearance."""
        return tuple(dict.fromkeys(found for message in example.messages for found in self._control.findall(message.content)))

    def _marked(self, example: Example) -> Example:
        """The example with marks around the control tokens that it spells."""
        if any(mark in message.content for message in example.messages for mark in MARKS):
            raise DataError(f"the row holds U+{ord(MARKS[0]):X} or U+{ord(MARKS[1]):X}, which are no characters", example.source)

        def marked(text: Any) -> Any:
            return self._control.sub(rf"{MARKS[0]}\g<0>{MARKS[1]}", text) if isinstance(text, str) else text

        if not self.spelled(example) and not any(self._control.search(text) for text in example.fields.values() if isinstance(text, str)):
            return example
        messages = tuple(replace(message, content=marked(message.content)) for message in example.messages)
        return replace(example, messages=messages, fields={key: marked(text) for key, text in example.fields.items()})

    @cached_property
    def _aliased(self) -> tuple[Tokenizer, dict[str, str], dict[int, int]]:
        """A copy of the tokenizer that knows its control tokens by other names too, these names by token, and tokens by the copy's."""
        from tokenizers import AddedToken

        tokenizer, names = copy.deepcopy(self.tokenizer), control_tokens(self.tokenizer)
        aliases = {text: f"{MARKS[0]}{token}{MARKS[1]}" for token, text in names.items()}
        known = {token: self.tokenizer.added_tokens_decoder.get(token) for token in names}
        strips = {token: {"lstrip": one.lstrip, "rstrip": one.rstrip} if one else {} for token, one in known.items()}
        tokenizer.add_tokens([AddedToken(aliases[text], normalized=False, **strips[token]) for token, text in names.items()])
        return tokenizer, aliases, {tokenizer.convert_tokens_to_ids(aliases[text]): token for token, text in names.items()}

    def _literal(self, text: str) -> list[int]:
        """Ids of a text with marks: what stands between them is text, all else as ever."""
        pieces = MARKED.split(text)  # every second one is marked
        if not self.tokenizer.is_fast:  # one that is written in Python splits at every token that it knows, or at none
            ids = [self._ids(_bare(piece), split_special_tokens=bool(number % 2)) for number, piece in enumerate(pieces) if piece]
            return [token for piece in ids for token in piece]
        tokenizer, aliases, tokens = self._aliased
        renamed = [
            _bare(piece) if number % 2 else self._control.sub(lambda found: aliases[found.group()], _bare(piece))
            for number, piece in enumerate(pieces)
        ]
        found = tokenizer("".join(renamed), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [tokens.get(token, token) for token in found]

    def stubborn(self, example: Example) -> tuple[str, ...]:
        """The control tokens that a row spells and that this tokenizer makes even of plain text."""
        return tuple(text for text in self.spelled(example) if text in self._stubborn)

    @cached_property
    def _stubborn(self) -> frozenset[str]:
        names = control_tokens(self.tokenizer)
        return frozenset(text for token, text in names.items() if token in self._ids(text, split_special_tokens=True))


def _bare(text: str) -> str:
    """Without marks that a template has torn apart."""
    return text.replace(MARKS[0], "").replace(MARKS[1], "")


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
