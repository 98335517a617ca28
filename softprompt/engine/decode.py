"""Batched decoding that continues from prefixes, in a batch that rows join and leave while others go on. Knows only token ids.

Rows of one batch may continue from different prompts of different lengths. Every question samples from its own random
stream, so it gives the same tokens alone or in a batch, whatever joins or leaves beside it.

Shapes: Q questions, B rows (more than Q where prompts answer together), T text tokens, S cached positions, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from softprompt.engine.layers import merged
from softprompt.engine.model import FrozenBase
from softprompt.engine.prefix import Continued, as_prefixes, left_padded
from softprompt.engine.shelf import Context, shelved
from softprompt.sampling import Sampling

POSITIONS, ROWS = 16384, 64  # of a batch at most: positions that the cache holds, rows
WINDOW = 256  # questions that are sorted by length: the first ones are still answered early
WORTH_JOINING = 4  # rows join when they are a quarter of those that go on: each time the whole cache is copied

Ends = Callable[[int], bool]  # told every token of one answer as it comes; whether the answer is complete with it


def never(token: int) -> bool:
    """An answer ends with its end-of-text token, or when its tokens run out."""
    return False


@dataclass(frozen=True)
class Question:
    """What one answer is made from: `texts[i]` continues from `contexts[i]`. Several answer together, as an ensemble that agrees on a
    token `by` the "mean" of the log-probabilities or by "vote" (greedy only). `stop_ids`: tokens that end it, beside the base's."""

    contexts: tuple[Context, ...]
    texts: tuple[tuple[int, ...], ...]
    sampling: Sampling = field(default_factory=Sampling)
    ends: Ends = never
    by: Literal["mean", "vote"] = "mean"
    stop_ids: frozenset[int] = frozenset()

    @property
    def length(self) -> int:
        """Positions that the longest of its texts takes, those of the prefix included."""
        pairs = zip(self.contexts, self.texts, strict=True)
        return max(prompt.num_positions + len(ids) + len(text) for (prompt, ids), text in pairs)

    def limit(self, base: FrozenBase) -> int:
        """Tokens that its answer may have: `max_new_tokens`, or what the base's context leaves it."""
        wanted = self.sampling.max_new_tokens
        return wanted if base.context_length is None else min(wanted, base.context_length - self.length)


@dataclass(frozen=True)
class Token:
    """The answer to question number `row` goes on with `id`; `last` when it is complete (its end-of-text token is not reported)."""

    row: int
    id: int | None
    last: bool


# ---- the open batch ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ongoing:
    """An answer in progress: the number of its question in the batch, its random stream, how many tokens it has so far and the `last`
    of them."""

    number: int
    question: Question
    limit: int
    stream: torch.Generator
    num_said: int = 0
    last: int = 0


@dataclass(frozen=True)
class OpenBatch:
    """Answers in progress. `past`: what their rows have read, in the order of the answers; the last token of an answer is read with
    the next one, those of the answers `unread`. `admitted`: questions so far, which number the next ones."""

    base: FrozenBase
    answers: tuple[Ongoing, ...] = ()
    past: Continued | None = None
    unread: bool = False
    admitted: int = 0

    @property
    def num_rows(self) -> int:
        return sum(len(answer.question.texts) for answer in self.answers)


@torch.inference_mode()
def admit(batch: OpenBatch, questions: Sequence[Question]) -> OpenBatch:
    """The batch with more questions, numbered on from those before; their texts are read."""
    base, first = batch.base, batch.admitted
    new = tuple(
        Ongoing(first + index, one, one.limit(base), _stream(one.sampling.seed, one.texts[0], base.device))
        for index, one in enumerate(questions)
    )
    batch = _read(batch)
    read = _read_texts(base, questions)
    past = read if batch.past is None else _joined(batch.past, read)
    return replace(batch, answers=batch.answers + new, past=past, admitted=first + len(new))


@torch.inference_mode()
def advance(batch: OpenBatch) -> tuple[list[Token], OpenBatch]:
    """One token of every answer, and the batch without the answers that are complete with it."""
    if not batch.answers:
        return [], batch
    batch = _read(batch)
    assert batch.past is not None
    chosen = _choose(batch.base, batch.past, batch.answers)
    tokens, going = [], []
    for answer, token in zip(batch.answers, chosen, strict=True):
        stop, num_said = token in batch.base.stop_ids | answer.question.stop_ids, answer.num_said + 1
        last = stop or num_said >= answer.limit or answer.question.ends(token)
        tokens.append(Token(answer.number, None if stop else token, last))
        going.append(replace(answer, num_said=num_said, last=token))
    ended = {token.row for token in tokens if token.last}
    return tokens, drop(replace(batch, answers=tuple(going), unread=True), ended)


@torch.inference_mode()
def drop(batch: OpenBatch, rows: set[int]) -> OpenBatch:
    """The batch without the answers to questions of these numbers."""
    if not rows:
        return batch
    kept = tuple(answer for answer in batch.answers if answer.number not in rows)
    if batch.past is None or not kept:
        return replace(batch, answers=kept, past=None, unread=False)
    owners = [answer.number for answer in batch.answers for _ in answer.question.texts]
    index = torch.tensor([row for row, number in enumerate(owners) if number not in rows], device=batch.base.device)
    past = batch.past
    holes = past.mask_BS.shape[1] - int(past.mask_BS[index].sum(dim=1).max())  # on the left, where no row is as long any more
    layers = tuple(
        layer.changed(lambda part: part[index.to(part.device)][..., holes:, :], lambda part: part[index.to(part.device)])
        for layer in past.layers
    )
    return replace(batch, answers=kept, past=Continued(past.hidden_BTH[index], layers, past.mask_BS[index, holes:]))


def _read(batch: OpenBatch) -> OpenBatch:
    """The batch with the last token of every answer read."""
    if batch.past is None or not batch.unread:
        return batch
    ids_B = torch.tensor([answer.last for answer in batch.answers for _ in answer.question.texts], device=batch.base.device)
    return replace(batch, past=batch.base.next_hidden(ids_B, batch.past), unread=False)


def _read_texts(base: FrozenBase, questions: Sequence[Question]) -> Continued:
    """Runs all texts in one batch, then moves the padding from their right end to the left of everything."""
    texts = [text for question in questions for text in question.texts]
    contexts = {_key(context): context for question in questions for context in question.contexts}
    numbers = {key: number for number, key in enumerate(contexts)}
    which_B = torch.tensor([numbers[_key(context)] for question in questions for context in question.contexts], device=base.device)
    width = max(len(text) for text in texts)
    ids_BT = torch.zeros(len(texts), width, dtype=torch.long, device=base.device)
    mask_BT = torch.zeros_like(ids_BT)
    for row, text in enumerate(texts):
        ids_BT[row, : len(text)] = torch.tensor(text)
        mask_BT[row, : len(text)] = 1
    read = base.continue_from(shelved(base, list(contexts.values())), which_B, ids_BT, mask_BT, keep=True)
    last_B = mask_BT.sum(dim=1) - 1
    hidden_B1H = read.hidden_BTH[torch.arange(len(texts), device=base.device), last_B][:, None]
    whole = as_prefixes(read)
    return Continued(hidden_B1H, whole.layers, whole.mask_KS(base.device))


def _key(context: Context) -> tuple[int, tuple[int, ...]]:
    return id(context[0]), context[1]


def _joined(first: Continued, second: Continued) -> Continued:
    """The rows of both, the shorter cache with holes on its left."""
    layers = merged([first.layers, second.layers], left_padded, lambda parts: torch.cat(list(parts)))
    masks = left_padded([first.mask_BS[..., None], second.mask_BS[..., None]])[..., 0]
    return Continued(torch.cat([first.hidden_BTH[:, -1:], second.hidden_BTH]), layers, masks)


# ---- choosing ------------------------------------------------------------------------------------------------------


def _choose(base: FrozenBase, past: Continued, answers: Sequence[Ongoing]) -> list[int]:
    """The next token of every answer, those with the same settings together."""
    logits_QV = _together(base.logits(past.hidden_BTH[:, -1]), [answer.question for answer in answers])
    groups: dict[tuple[float, int, float], list[int]] = {}
    for index, answer in enumerate(answers):
        how = answer.question.sampling
        groups.setdefault((float(how.temperature), how.top_k, how.top_p), []).append(index)
    chosen = [0] * len(answers)
    for settings, members in groups.items():
        logits = logits_QV if len(members) == len(answers) else logits_QV[members]
        tokens = _sampled(logits, [answers[index].stream for index in members], *settings)
        for index, token in zip(members, tokens, strict=True):
            chosen[index] = token
    return chosen


def _together(logits_BV: Tensor, questions: Sequence[Question]) -> Tensor:
    """[Q, V]: one row of scores for each question, from the rows that answer it. mean: of their log-probabilities; vote: the number
    of rows that say the token first, and where that is equal the mean of the probabilities."""
    if len(questions) == len(logits_BV):
        return logits_BV
    counts = [len(question.texts) for question in questions]
    owner_B = torch.tensor([index for index, count in enumerate(counts) for _ in range(count)], device=logits_BV.device)
    counts_Q1 = torch.tensor(counts, device=logits_BV.device)[:, None]

    def mean(scores_BV: Tensor) -> Tensor:
        return scores_BV.new_zeros(len(questions), scores_BV.shape[1]).index_add_(0, owner_B, scores_BV) / counts_Q1

    log_BV = logits_BV.float().log_softmax(dim=-1)
    scores_QV = mean(log_BV)
    votes = [index for index, question in enumerate(questions) if question.by == "vote"]
    if votes:
        first_BV = torch.zeros_like(log_BV).scatter_(1, log_BV.argmax(dim=-1, keepdim=True), 1.0)
        scores_QV[votes] = (mean(first_BV) * counts_Q1 + mean(log_BV.exp()) / 2)[votes]
    return scores_QV


def _sampled(logits_BV: Tensor, streams: Sequence[torch.Generator], temperature: float, top_k: int, top_p: float) -> list[int]:
    if temperature == 0:
        return logits_BV.argmax(dim=-1).tolist()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    probabilities_BV = warpers(torch.empty(0, dtype=torch.long), logits_BV.float()).softmax(dim=-1)
    return [int(torch.multinomial(row, 1, generator=stream)) for row, stream in zip(probabilities_BV, streams, strict=True)]


def _stream(seed: int, text: Sequence[int], device: torch.device) -> torch.Generator:
    """A random stream that depends on the seed and the text alone, not on the batch around it."""
    mixed = seed
    for token in text:
        mixed = (mixed * 1_000_003 + token + 1) % 2**63
    return torch.Generator(device).manual_seed(mixed)


# ---- many questions ------------------------------------------------------------------------------------------------


def decode(base: FrozenBase, questions: Sequence[Question]) -> Iterator[Token]:
    """Tokens of all answers as they come. The questions fill one batch of bounded size, which those that wait join as others leave:
    in their order, and sorted by length within WINDOW of them, so that neighbours are about as long as each other."""
    windows = (range(first, min(first + WINDOW, len(questions))) for first in range(0, len(questions), WINDOW))
    order = list(chain.from_iterable(sorted(window, key=lambda number: -questions[number].length) for window in windows))
    waiting, batch = deque(order), OpenBatch(base)
    while waiting or batch.answers:
        joining = _joining(batch, waiting, questions)
        if joining:
            batch = admit(batch, [questions[waiting.popleft()] for _ in range(joining)])
        tokens, batch = advance(batch)
        yield from (replace(token, row=order[token.row]) for token in tokens)


def _joining(batch: OpenBatch, waiting: Sequence[int], questions: Sequence[Question]) -> int:
    """How many of those that wait join the batch now: as many as it has room for, if it is worth it; at least one joins an empty one."""
    rows, joining = batch.num_rows, 0
    widest = max((answer.question.length + answer.limit for answer in batch.answers), default=0)
    for number in waiting:
        question = questions[number]
        rows += len(question.texts)
        widest = max(widest, question.length + question.limit(batch.base))
        if (batch.answers or joining) and (rows > ROWS or rows * widest > POSITIONS):
            break
        joining += 1
    worth = not batch.answers or joining * WORTH_JOINING >= len(batch.answers) or joining == len(waiting)
    return joining if worth else 0


def decode_whole(base: FrozenBase, questions: Sequence[Question]) -> Iterator[tuple[int, list[int], bool]]:
    """(number of the question, all ids of its answer, whether an end-of-text token came) as the answers are complete."""
    ids: list[list[int]] = [[] for _ in questions]
    for token in decode(base, questions):
        if token.id is not None:
            ids[token.row].append(token.id)
        if token.last:
            yield token.row, ids[token.row], token.id is None
