"""Batched decoding that continues from prefixes, in a batch that rows join and leave while others go on. Knows only token ids.

Rows of one batch may continue from different prompts of different lengths. Every question samples from its own random
stream, so it gives the same tokens alone or in a batch, whatever joins or leaves beside it.

Shapes: Q questions, B rows (more than Q where prompts answer together), T text tokens, H hidden size, V vocabulary.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Literal

import torch

from softprompt.engine.choose import Choice, Guide, Likelihood, choose, stream_of, together
from softprompt.engine.model import FrozenBase
from softprompt.engine.reading import OwnRows
from softprompt.engine.rows import Base, Context, Held, Rows, Text
from softprompt.sampling import Sampling

POSITIONS, ROWS = 16384, 64  # of a batch at most: positions that the cache holds, rows
WINDOW = 256  # questions that are sorted by length: the first ones are still answered early
WORTH_JOINING = 4  # rows join when they are a quarter of those that go on: each time all others wait

Ends = Callable[[int], bool]  # told every token of one answer as it comes; whether the answer is complete with it


def never(token: int) -> bool:
    """An answer ends with its end-of-text token, or when its tokens run out."""
    return False


@dataclass(frozen=True)
class Question:
    """What one answer is made from: `texts[i]` continues from `contexts[i]`. Several answer together, as an ensemble that agrees on a
    token `by` the "mean" of the log-probabilities or by "vote" (greedy only). `stop_ids`: tokens that end it, beside the base's.

    `top`: report how likely its tokens were, with so many of the likeliest beside each; `echo`: those of the text too. `guide`: bounds
    what it may say. `keep`: of the first tokens of its texts, so many that other texts begin with as well.
    """

    contexts: tuple[Context, ...]
    texts: tuple[tuple[int, ...], ...]
    sampling: Sampling = field(default_factory=Sampling)
    ends: Ends = never
    by: Literal["mean", "vote"] = "mean"
    stop_ids: frozenset[int] = frozenset()
    top: int | None = None
    echo: bool = False
    guide: Guide | None = None
    keep: int = 0

    @property
    def length(self) -> int:
        """Positions that the longest of its texts takes, those of the prefix included."""
        pairs = zip(self.contexts, self.texts, strict=True)
        return max(prompt.num_positions + len(ids) + len(text) for (prompt, ids), text in pairs)

    def limit(self, base: Base) -> int:
        """Tokens that its answer may have: `max_new_tokens`, or what the base's context leaves it."""
        wanted = self.sampling.max_new_tokens
        return wanted if base.context_length is None else min(wanted, base.context_length - self.length)


@dataclass(frozen=True)
class Read:
    """The text of question number `row` was read; `num_cached` positions of prompt and text were on the shelf."""

    row: int
    num_cached: int
    scores: tuple[Likelihood, ...] = ()


@dataclass(frozen=True)
class Token:
    """The answer to question number `row` goes on with `id`; `last` when it is complete (its end-of-text token is not reported)."""

    row: int
    id: int | None
    last: bool
    score: Likelihood | None = None


# ---- the open batch ------------------------------------------------------------------------------------------------


@dataclass
class Ongoing:
    """An answer in progress: the number of its question in the batch, its random stream, how often it has said which token, and the
    last of them. `texts`: as they are read."""

    number: int
    question: Question
    limit: int
    texts: list[Text]
    stream: torch.Generator
    said: Counter[int] = field(default_factory=Counter)
    last: int = 0

    @property
    def choice(self) -> Choice:
        question = self.question
        return Choice(question.sampling, self.stream, self.said, question.guide, question.top)


class OpenBatch:
    """Answers in progress. `piece`: tokens of texts that are read between two tokens of the answers, so that nobody waits long; None
    reads all that were admitted at once. `admitted`: questions so far, which number the next ones."""

    def __init__(self, base: FrozenBase | Held, piece: int | None = None) -> None:
        self.base, self.piece = base, piece
        self.answers: list[Ongoing] = []
        self.arriving: deque[Ongoing] = deque()
        self.rows: Rows = OwnRows(base, ROWS, POSITIONS) if isinstance(base, FrozenBase) else base.rows()
        self.admitted = 0
        self._unread = False  # the last token of every answer

    @property
    def num_rows(self) -> int:
        return sum(len(answer.question.texts) for answer in (*self.answers, *self.arriving))

    @property
    def widest(self) -> int:
        """Positions that the longest row may come to have."""
        return max((answer.question.length + answer.limit for answer in (*self.answers, *self.arriving)), default=0)

    @torch.inference_mode()
    def admit(self, questions: Sequence[Question]) -> list[int]:
        """The numbers of more questions, whose texts are read before their first token."""
        for question in questions:
            top = question.top if question.echo else None
            pairs = zip(question.contexts, question.texts, strict=True)
            texts = [self.rows.text(context, ids, question.keep, top) for context, ids in pairs]
            stream = stream_of(question.sampling.seed, question.texts[0], self.base.device)
            self.arriving.append(Ongoing(self.admitted, question, question.limit(self.base), texts, stream))
            self.admitted += 1
        return list(range(self.admitted - len(questions), self.admitted))

    @torch.inference_mode()
    def advance(self) -> list[Read | Token]:
        """One token of every answer whose text is read; those that are complete with it leave."""
        if self._unread:
            self.rows.next([answer.last for answer in self.answers for _ in answer.texts])
        events: list[Read | Token] = list(self._read_texts())
        if not self.answers:
            return events
        tokens = self._choose()
        self._unread = True
        self.drop({token.row for token in tokens if token.last})
        return [*events, *tokens]

    def _choose(self) -> list[Token]:
        votes = [index for index, answer in enumerate(self.answers) if answer.question.by == "vote" and len(answer.texts) > 1]
        logits_QV = together(self.rows.logits(), [len(answer.texts) for answer in self.answers], votes)
        chosen, scores = choose(logits_QV, [answer.choice for answer in self.answers])
        tokens = []
        for answer, token, score in zip(self.answers, chosen, scores, strict=True):
            question = answer.question
            answer.said[token] += 1
            answer.last = token
            stop = token in self.base.stop_ids | question.stop_ids
            if question.guide is not None and not stop:
                question.guide.accept(token)
            last = stop or question.ends(token) or answer.said.total() >= answer.limit
            tokens.append(Token(answer.number, None if stop else token, last, None if stop else score))
        return tokens

    @torch.inference_mode()
    def drop(self, numbers: Collection[int]) -> None:
        """The answers to questions of these numbers leave. Others may take the place of theirs."""
        if not numbers:
            return
        self.rows.forget([text for answer in self.arriving if answer.number in numbers for text in answer.texts])
        self.arriving = deque(answer for answer in self.arriving if answer.number not in numbers)
        first = list(accumulate((len(one.texts) for one in self.answers), initial=0))
        order = _closed_up([answer.number in numbers for answer in self.answers], all(len(one.texts) == 1 for one in self.answers))
        if order == list(range(len(self.answers))):
            return
        rows = [first[index] + member for index in order for member in range(len(self.answers[index].texts))]
        self._unread = self._unread and bool(order)
        self.answers = [self.answers[index] for index in order]
        self.rows.keep(rows)

    # ---- texts ---------------------------------------------------------------------------------------------------------

    def _read_texts(self) -> Iterator[Read]:
        """Reads some of the texts that arrived, `piece` tokens of them, and lets in those whose texts are read."""
        left = self.piece
        while self.arriving and (left is None or left > 0):
            long = self._long(self.arriving[0])
            if long is not None:
                before = long.num_read
                self.rows.read_on(long, left if left is not None else long.num_left)
                left = None if left is None else left - (long.num_read - before)
                continue
            short = self._short(left)
            if not short:
                return
            left = None if left is None else left - sum(text.num_left for answer in short for text in answer.texts)
            yield from self._let_in(short)

    def _long(self, answer: Ongoing) -> Text | None:
        """A text that has to be read by itself: one with a beginning to keep, or longer than what may be read."""
        for text in answer.texts:
            self.rows.begin(text)
            if text.num_read < text.keep < len(text.ids) or (self.piece is not None and text.num_left > self.piece):
                return text
        return None

    def _short(self, left: int | None) -> list[Ongoing]:
        """The next ones whose texts are read in one forward."""
        found: list[Ongoing] = []
        while self.arriving and self._long(self.arriving[0]) is None:
            needed = sum(text.num_left for text in self.arriving[0].texts)
            if left is not None and needed > left and (found or left < (self.piece or 0)):
                break
            found.append(self.arriving.popleft())
            left = None if left is None else left - needed
        return found

    def _let_in(self, answers: Sequence[Ongoing]) -> list[Read]:
        self.rows.join([text for answer in answers for text in answer.texts])
        self.answers += answers
        return [Read(one.number, max(text.num_cached for text in one.texts), tuple(one.texts[0].scores)) for one in answers]


def _closed_up(gone: Sequence[bool], may_move: bool) -> list[int]:
    """The places that stay, in their new order: the last ones fill the gaps where they may move, so that few are copied."""
    kept = [index for index, left in enumerate(gone) if not left]
    if not may_move:
        return kept
    order, spare = list(range(len(kept))), [index for index in kept if index >= len(kept)]
    return [index if not gone[index] else spare.pop() for index in order]


# ---- many questions ------------------------------------------------------------------------------------------------


def decode(base: FrozenBase | Held, questions: Sequence[Question]) -> Iterator[Token]:
    """Tokens of all answers as they come. The questions fill one batch of bounded size, which those that wait join as others leave:
    in their order, and sorted by length within WINDOW of them, so that neighbours are about as long as each other."""
    windows = (range(first, min(first + WINDOW, len(questions))) for first in range(0, len(questions), WINDOW))
    order = list(chain.from_iterable(sorted(window, key=lambda number: -questions[number].length) for window in windows))
    waiting, batch = deque(order), OpenBatch(base)
    while waiting or batch.answers:
        joining = fitting(batch, (questions[number] for number in waiting))
        if not batch.answers or joining * WORTH_JOINING >= len(batch.answers) or joining == len(waiting):
            batch.admit([questions[waiting.popleft()] for _ in range(joining)])
        for event in batch.advance():
            if isinstance(event, Token):
                yield Token(order[event.row], event.id, event.last, event.score)


def fitting(batch: OpenBatch, waiting: Iterator[Question]) -> int:
    """How many of those that wait have room in the batch; at least one has in an empty one."""
    rows, joining, widest = batch.num_rows, 0, batch.widest
    for question in waiting:
        rows += len(question.texts)
        widest = max(widest, question.length + question.limit(batch.base))
        if (batch.num_rows or joining) and (rows > ROWS or rows * widest > batch.rows.most_positions):
            break
        joining += 1
    return joining


def decode_whole(base: FrozenBase | Held, questions: Sequence[Question]) -> Iterator[tuple[int, list[int], bool]]:
    """(number of the question, all ids of its answer, whether an end-of-text token came) as the answers are complete."""
    ids: list[list[int]] = [[] for _ in questions]
    for token in decode(base, questions):
        if token.id is not None:
            ids[token.row].append(token.id)
        if token.last:
            yield token.row, ids[token.row], token.id is None
