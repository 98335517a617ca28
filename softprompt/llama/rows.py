"""The rows of an open batch in llama.cpp's cache: each in a sequence of its own, behind a copy of its prompt's, which costs nothing.

One cache is shared by all sequences. Prompts and beginnings of texts stay in sequences of their own while there is room.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.engine.choose import AT_ONCE, Likelihood, scored
from softprompt.engine.prompt import Prompt
from softprompt.engine.rows import Context as Start
from softprompt.engine.rows import Text
from softprompt.errors import RunError
from softprompt.llama.context import SEQUENCES, Context, NoRoom, Piece


@dataclass(frozen=True)
class _Kept:
    """A prompt, held by it, and the ids behind it, in a sequence of so many positions."""

    prompt: Prompt
    ids: tuple[int, ...]
    sequence: int
    length: int


class Sequences:
    """The sequences of a context. `read_prompt` reads a prompt into one that is empty, by the function that it is given."""

    def __init__(self, context: Context, read_prompt: Callable[[Prompt, int], None], bytes_of_position: int) -> None:
        self.context, self.bytes_of_position = context, bytes_of_position
        self._read_prompt = read_prompt
        self._free = list(range(SEQUENCES))
        self._kept: OrderedDict[tuple[int, tuple[int, ...]], _Kept] = OrderedDict()

    @property
    def kept_positions(self) -> int:
        return sum(one.length for one in self._kept.values())

    def new(self) -> int:
        """An empty sequence."""
        while not self._free:
            if not self.let_go():
                raise RunError(f"all of llama.cpp's {SEQUENCES} sequences are in use")
        return self._free.pop()

    def free(self, sequence: int) -> None:
        self.context.clear(sequence)
        self._free.append(sequence)

    def let_go(self) -> bool:
        """Nothing is kept any more of what was used least recently; False where nothing is kept."""
        if not self._kept:
            return False
        self.free(self._kept.popitem(last=False)[1].sequence)
        return True

    def with_room(self, call: Callable[[], Tensor | None]) -> Tensor | None:
        """Does it, making room where that lacks. Raises RunError where there is none to make."""
        while True:
            try:
                return call()
            except NoRoom:
                if not self.let_go():
                    raise RunError(f"llama.cpp's cache of {self.context.num_positions} positions is full: give more by --memory") from None

    def read(self, pieces: Sequence[Piece]) -> Tensor:
        found = self.with_room(lambda: self.context.read(pieces))
        assert found is not None
        return found

    def has(self, prompt: Prompt, ids: tuple[int, ...]) -> bool:
        return (id(prompt), ids) in self._kept

    def longest(self, prompt: Prompt, text: tuple[int, ...]) -> tuple[int, ...]:
        """Of what is kept behind this prompt, the most that the text begins with; it leaves a token to be read."""
        found = (ids for own, ids in self._kept if own == id(prompt) and len(ids) < len(text) and text[: len(ids)] == ids)
        return max(found, key=len, default=())

    def copied(self, prompt: Prompt, ids: tuple[int, ...]) -> int:
        """A new sequence with the prompt and the ids behind it, which are read now if they are not kept."""
        own = self.new()
        try:
            if not self.has(prompt, ids):
                self._keep(prompt, ids)
            self._kept.move_to_end((id(prompt), ids))
            self.context.copy(self._kept[id(prompt), ids].sequence, own)
        except BaseException:
            self.free(own)
            raise
        return own

    def put(self, prompt: Prompt, ids: tuple[int, ...], sequence: int) -> None:
        """Keeps what a sequence has read."""
        if not self.has(prompt, ids):
            own = self.new()
            self.context.copy(sequence, own)
            self._kept[id(prompt), ids] = _Kept(prompt, ids, own, prompt.num_positions + len(ids))

    def _keep(self, prompt: Prompt, ids: tuple[int, ...]) -> None:
        sequence = self.new()
        try:
            self._read_prompt(prompt, sequence)
            if ids:
                self.read([Piece(sequence, prompt.num_positions, ids)])
        except BaseException:
            self.free(sequence)
            raise
        self._kept[id(prompt), ids] = _Kept(prompt, ids, sequence, prompt.num_positions + len(ids))


@dataclass(eq=False)
class LlamaText(Text):
    """`sequence`: what it is read into; None before."""

    sequence: int | None = None

    @property
    def num_before(self) -> int:
        """Positions in front of it."""
        prompt, behind = self.context
        return prompt.num_positions + len(behind)


class LlamaRows:
    """See engine.rows.Rows."""

    def __init__(self, sequences: Sequences) -> None:
        self._sequences = sequences
        self._rows: list[tuple[int, int]] = []  # sequence and positions of each
        self._logits_BV = torch.empty(0, sequences.context.num_logits)
        self._open: set[int] = set()

    @property
    def most_positions(self) -> int:
        return self._sequences.context.num_positions

    @property
    def num_bytes(self) -> int:
        return sum(length for _, length in self._rows) * self._sequences.bytes_of_position

    @property
    def kept_bytes(self) -> int:
        return self._sequences.kept_positions * self._sequences.bytes_of_position

    def text(self, context: Start, ids: tuple[int, ...], keep: int, top: int | None) -> LlamaText:
        return LlamaText(context, ids, keep, top)

    def begin(self, text: Text) -> None:
        assert isinstance(text, LlamaText)
        if text.sequence is not None:
            return
        prompt, behind = text.context
        known = () if text.top is not None else self._sequences.longest(prompt, (*behind, *text.ids))
        start = max(known, behind, key=len)
        text.num_cached = prompt.num_positions + len(start) if self._sequences.has(prompt, start) else 0
        text.num_read = len(start) - len(behind)
        text.sequence = self._sequences.copied(prompt, start)
        self._open.add(text.sequence)
        if text.top is not None:
            text.scores.append(Likelihood(text.ids[0], None))

    def read_on(self, text: Text, most: int) -> None:
        assert isinstance(text, LlamaText)
        self.begin(text)
        self._read(text, text.next_count(most))
        if text.num_read == text.keep:
            assert text.sequence is not None
            prompt, behind = text.context
            self._sequences.put(prompt, (*behind, *text.ids[: text.keep]), text.sequence)

    def join(self, texts: Sequence[Text]) -> None:
        own = [text for text in texts if isinstance(text, LlamaText)]
        for text in own:
            self.begin(text)
            while text.top is not None and text.num_left > 1:  # of all its tokens the logits are wanted: a few at a time
                self._read(text, min(AT_ONCE, text.num_left - 1))
        pieces = [self._piece(text, text.num_left, [text.num_left - 1]) for text in own]
        self._logits_BV = torch.cat([self._logits_BV, self._sequences.read(pieces)])
        for text, piece in zip(own, pieces, strict=True):
            text.num_read = len(text.ids)
            self._rows.append((piece.sequence, piece.position + len(piece.read)))

    def next(self, ids: Sequence[int]) -> None:
        pieces = [Piece(sequence, length, [token], [0]) for (sequence, length), token in zip(self._rows, ids, strict=True)]
        self._logits_BV = self._sequences.read(pieces)
        self._rows = [(sequence, length + 1) for sequence, length in self._rows]

    def logits(self) -> Tensor:
        return self._logits_BV

    def keep(self, rows: Sequence[int]) -> None:
        stay = {self._rows[row][0] for row in rows}
        self._free([sequence for sequence, _ in self._rows if sequence not in stay])
        self._rows = [self._rows[row] for row in rows]
        self._logits_BV = self._logits_BV[list(rows)]

    def forget(self, texts: Sequence[Text]) -> None:
        self._free([text.sequence for text in texts if isinstance(text, LlamaText) and text.sequence is not None])

    def _free(self, sequences: Sequence[int]) -> None:
        for sequence in sequences:
            self._open.discard(sequence)
            self._sequences.free(sequence)

    def _piece(self, text: LlamaText, count: int, wanted: Sequence[int]) -> Piece:
        assert text.sequence is not None
        ids = text.ids[text.num_read : text.num_read + count]
        return Piece(text.sequence, text.num_before + text.num_read, ids, wanted)

    def _read(self, text: LlamaText, count: int) -> None:
        scores = text.top is not None
        logits_NV = self._sequences.read([self._piece(text, count, range(count) if scores else ())])
        text.num_read += count
        if scores:
            after = text.ids[text.num_read - count + 1 : text.num_read + 1]
            text.scores += scored(logits_NV[: len(after)], after, [text.top or 0] * len(after))

    def __del__(self) -> None:
        self._free(list(self._open))
