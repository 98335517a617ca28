"""Batched decoding that continues from prefixes. Knows only token ids.

Rows of one batch may continue from different prompts of different lengths. Every row samples from its own random
stream, so it gives the same tokens alone or in a batch.

Shapes: B rows, T text tokens, S cached positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from softprompt.errors import ModelError
from softprompt.model import FrozenBase
from softprompt.prefix import Continued, Prefix, as_prefixes

Ends = Callable[[Sequence[int]], bool]  # whether an answer of these ids is complete


def never(ids: Sequence[int]) -> bool:
    """An answer ends with its end-of-text token, or when its tokens run out."""
    return False


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. Temperature 0 is greedy; top_k 0 and top_p 1 switch those cuts off. `ensemble`: how prompts that
    answer together agree on a token, by the "mean" of their log-probabilities or by "vote" (greedy only)."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ensemble: Literal["mean", "vote"] = "mean"


@dataclass(frozen=True)
class Question:
    """What one answer is made from: `texts[i]` continues from prefix number `which[i]`. Several answer together, as an ensemble."""

    which: tuple[int, ...]
    texts: tuple[tuple[int, ...], ...]

    def length(self, prefix: Prefix) -> int:
        """Positions that the longest of its texts takes, those of the prefix included."""
        return max(prefix.lengths[which] + len(text) for which, text in zip(self.which, self.texts, strict=True))


@dataclass(frozen=True)
class Token:
    """The answer to question number `row` goes on with `id`; `last` when it is complete (its end-of-text token is not reported)."""

    row: int
    id: int | None
    last: bool


def decode(base: FrozenBase, prefix: Prefix, questions: Sequence[Question], sampling: Sampling, ends: Ends = never) -> Iterator[Token]:
    """Tokens of all answers as they come; an answer also ends with the token after which `ends` says so.

    Raises ModelError for an ensemble over a base that cannot share prefixes.
    """
    limits = [_limit(base, prefix, question, sampling) for question in questions]
    if not base.shares_prefix:
        for row, question in enumerate(questions):
            if len(question.which) > 1:
                raise ModelError(f"{base.name} keeps a recurrent state: prompts cannot answer together over it")
            yield from _decode_plain(base, prefix.embeds[question.which[0]], question.texts[0], row, limits[row], sampling, ends)
        return
    streams = [_stream(sampling.seed, question.texts[0], base.device) for question in questions]
    alive = list(range(len(questions)))
    said: list[list[int]] = [[] for _ in questions]
    owner = [number for number, question in enumerate(questions) for _ in question.which]  # of each row, an index into alive
    with torch.inference_mode():
        past = _read_texts(base, prefix, questions)
        for count in range(1, max(limits) + 1):
            logits_QV = _together(base.logits(past.hidden_BTH[:, -1]), owner, len(alive), sampling.ensemble)
            chosen = _choose(logits_QV, [streams[number] for number in alive], sampling)
            going = []
            for index, token in enumerate(chosen):
                stop = token in base.stop_ids
                said[alive[index]].append(token)
                last = stop or count == limits[alive[index]] or ends(said[alive[index]])
                yield Token(alive[index], None if stop else token, last)
                if not last:
                    going.append(index)
            if not going:
                return
            if len(going) < len(alive):
                rows = [row for row, index in enumerate(owner) if index in going]
                past, owner = _keep(past, rows), [going.index(owner[row]) for row in rows]
                alive, chosen = [alive[index] for index in going], [chosen[index] for index in going]
            past = base.next_hidden(torch.tensor([chosen[index] for index in owner], device=base.device), past)


def decode_whole(
    base: FrozenBase, prefix: Prefix, questions: Sequence[Question], sampling: Sampling, ends: Ends = never
) -> Iterator[tuple[int, list[int], bool]]:
    """(number of the question, all ids of its answer, whether an end-of-text token came) as the answers are complete."""
    ids: list[list[int]] = [[] for _ in questions]
    for token in decode(base, prefix, questions, sampling, ends):
        if token.id is not None:
            ids[token.row].append(token.id)
        if token.last:
            yield token.row, ids[token.row], token.id is None


def _together(logits_BV: Tensor, owner: Sequence[int], num_questions: int, ensemble: str) -> Tensor:
    """[Q, V]: one row of scores for each question, from the rows that answer it. mean: of their log-probabilities; vote: the number
    of rows that say the token first, and where that is equal the mean of the probabilities."""
    if len(owner) == num_questions:
        return logits_BV
    owner_B = torch.tensor(owner, device=logits_BV.device)
    counts_Q1 = torch.bincount(owner_B, minlength=num_questions)[:, None]

    def mean(scores_BV: Tensor) -> Tensor:
        return scores_BV.new_zeros(num_questions, scores_BV.shape[1]).index_add_(0, owner_B, scores_BV) / counts_Q1

    log_BV = logits_BV.float().log_softmax(dim=-1)
    if ensemble == "mean":
        return mean(log_BV)
    first_BV = torch.zeros_like(log_BV).scatter_(1, log_BV.argmax(dim=-1, keepdim=True), 1.0)
    return mean(first_BV) * counts_Q1 + mean(log_BV.exp()) / 2


def _read_texts(base: FrozenBase, prefix: Prefix, questions: Sequence[Question]) -> Continued:
    """Runs all texts in one batch, then moves the padding from their right end to the left of everything."""
    texts = [text for question in questions for text in question.texts]
    which_B = torch.tensor([number for question in questions for number in question.which], device=base.device)
    width = max(len(text) for text in texts)
    ids_BT = torch.zeros(len(texts), width, dtype=torch.long, device=base.device)
    mask_BT = torch.zeros_like(ids_BT)
    for row, text in enumerate(texts):
        ids_BT[row, : len(text)] = torch.tensor(text)
        mask_BT[row, : len(text)] = 1
    read = base.continue_from(prefix, which_B, ids_BT, mask_BT, keep=True)
    last_B = mask_BT.sum(dim=1) - 1
    hidden_B1H = read.hidden_BTH[torch.arange(len(texts), device=base.device), last_B][:, None]
    whole = as_prefixes(read)
    return Continued(hidden_B1H, whole.layers, whole.mask_KS)


def _keep(past: Continued, rows: Sequence[int]) -> Continued:
    index = torch.tensor(list(rows), device=past.mask_BS.device)
    return Continued(past.hidden_BTH[index], tuple((k[index], v[index]) for k, v in past.layers), past.mask_BS[index])


def _choose(logits_BV: Tensor, streams: Sequence[torch.Generator], sampling: Sampling) -> list[int]:
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1).tolist()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    probabilities_BV = warpers(torch.empty(0, dtype=torch.long), logits_BV.float()).softmax(dim=-1)
    return [int(torch.multinomial(row, 1, generator=stream)) for row, stream in zip(probabilities_BV, streams, strict=True)]


def _limit(base: FrozenBase, prefix: Prefix, question: Question, sampling: Sampling) -> int:
    """Tokens that an answer may have: `max_new_tokens`, or what the base's context leaves it."""
    if base.context_length is None:
        return sampling.max_new_tokens
    return min(sampling.max_new_tokens, base.context_length - question.length(prefix))


def _stream(seed: int, text: Sequence[int], device: torch.device) -> torch.Generator:
    """A random stream that depends on the seed and the text alone, not on the batch around it."""
    mixed = seed
    for token in text:
        mixed = (mixed * 1_000_003 + token + 1) % 2**63
    return torch.Generator(device).manual_seed(mixed)


def _decode_plain(
    base: FrozenBase, start_SH: Tensor, text: Sequence[int], row: int, limit: int, sampling: Sampling, ends: Ends
) -> Iterator[Token]:
    """One row by transformers' own generate, for bases whose state cannot be shared; its tokens come all at once."""
    embeds_SH = torch.cat([start_SH, base.embed_ids(text)]).to(base.dtype)
    greedy = sampling.temperature == 0
    how = {} if greedy else {"temperature": float(sampling.temperature), "top_p": sampling.top_p, "top_k": sampling.top_k}
    settings = GenerationConfig(
        max_new_tokens=limit,
        do_sample=not greedy,
        eos_token_id=sorted(base.stop_ids),
        pad_token_id=min(base.stop_ids),
        **how,
    )
    with torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        said = base.model.generate(inputs_embeds=embeds_SH[None], generation_config=settings)[0].tolist()
    ended = said[-1] in base.stop_ids
    said = [token for token in said if token not in base.stop_ids]
    for count, token in enumerate(said, 1):
        last = ends(said[:count])
        yield Token(row, token, last or (not ended and count == len(said)))
        if last:
            return
    if ended:
        yield Token(row, None, True)
