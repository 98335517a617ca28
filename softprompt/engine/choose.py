"""The next token of every answer of a batch, each by its own settings and from its own random stream, and how likely it was.

Shapes: B rows, Q answers (fewer than B where prompts answer together), V vocabulary, N positions of a text.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from softprompt.engine.model import FrozenBase
from softprompt.sampling import Sampling

GREEDY = 1e-5  # temperatures below are 0: logits divided by them are no numbers any more
AT_ONCE = 64  # positions of a text whose logits are held at a time


class Guide(Protocol):
    """What an answer may say, told every token as it comes."""

    def allowed(self) -> Tensor:
        """[at most V] bool, on the CPU: the tokens that may come next; tokens beyond its end may not."""

    def accept(self, token: int) -> None: ...


@dataclass(frozen=True)
class Likelihood:
    """The logarithm of a token's probability before anything that sampling does to it, and the likeliest tokens at its place with
    theirs, the likeliest first. `logprob` is None where nothing was read before the token."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Choice:
    """How one answer's next token is chosen. `said`: how often it has said which token; `top`: how many likeliest tokens to report with
    the chosen one, None for no report."""

    sampling: Sampling
    stream: torch.Generator
    said: Mapping[int, int]
    guide: Guide | None = None
    top: int | None = None


def choose(logits_QV: Tensor, choices: Sequence[Choice]) -> tuple[list[int], list[Likelihood | None]]:
    """(the next token of every answer, its likelihood where it is asked for); those with the same settings are sampled together."""
    changed_QV = _changed(logits_QV, choices)
    groups: dict[tuple[float, int, float, float], list[int]] = {}
    for index, choice in enumerate(choices):
        how = choice.sampling
        settings = (0.0, 0, 1.0, 0.0) if how.temperature < GREEDY else (float(how.temperature), how.top_k, how.top_p, how.min_p)
        groups.setdefault(settings, []).append(index)
    chosen = [0] * len(choices)
    for settings, members in groups.items():
        logits = changed_QV if len(members) == len(choices) else changed_QV[members]
        tokens = _sampled(logits, [choices[index].stream for index in members], *settings)
        for index, token in zip(members, tokens, strict=True):
            chosen[index] = token
    return chosen, _reported(logits_QV, choices, chosen)


def together(logits_BV: Tensor, counts: Sequence[int], votes: Sequence[int]) -> Tensor:
    """[Q, V]: one row of scores for each answer, from the `counts` rows that give it. The mean of their log-probabilities; for the answers
    `votes` the number of rows that say the token first, and where that is equal the mean of the probabilities."""
    if len(counts) == len(logits_BV):
        return logits_BV
    owner_B = torch.tensor([index for index, count in enumerate(counts) for _ in range(count)], device=logits_BV.device)
    counts_Q1 = torch.tensor(counts, device=logits_BV.device)[:, None]

    def mean(scores_BV: Tensor) -> Tensor:
        return scores_BV.new_zeros(len(counts), scores_BV.shape[1]).index_add_(0, owner_B, scores_BV) / counts_Q1

    log_BV = logits_BV.float().log_softmax(dim=-1)
    scores_QV = mean(log_BV)
    if votes:
        first_BV = torch.zeros_like(log_BV).scatter_(1, log_BV.argmax(dim=-1, keepdim=True), 1.0)
        scores_QV[votes] = (mean(first_BV) * counts_Q1 + mean(log_BV.exp()) / 2)[votes]
    return scores_QV


def likelihoods(base: FrozenBase, hidden_NH: Tensor, ids: Sequence[int], top: int) -> list[Likelihood]:
    """Of the tokens `ids` of a text, each read by the state before it."""
    found = []
    for first in range(0, len(ids), AT_ONCE):
        own = list(ids[first : first + AT_ONCE])
        found += scored(base.logits(hidden_NH[first : first + len(own)]), own, [top] * len(own))
    return found


def stream_of(seed: int, text: Sequence[int], device: torch.device) -> torch.Generator:
    """A random stream that depends on the seed and the text alone, not on the batch around it."""
    mixed = seed
    for token in text:
        mixed = (mixed * 1_000_003 + token + 1) % 2**63
    return torch.Generator(device).manual_seed(mixed)


def _changed(logits_QV: Tensor, choices: Sequence[Choice]) -> Tensor:
    """The logits with every answer's biases, penalties and bounds."""
    some = [index for index, one in enumerate(choices) if one.guide or _bias(one)]
    if not some:
        return logits_QV
    changed_QV = logits_QV.float().clone()
    for index in some:
        logits_V, guide = changed_QV[index], choices[index].guide
        bias = _bias(choices[index])
        if bias:
            ids = torch.tensor(list(bias), device=logits_V.device)
            logits_V[ids] += torch.tensor(list(bias.values()), device=logits_V.device)
        if guide is not None:
            allowed = guide.allowed()[: len(logits_V)].to(logits_V.device)
            logits_V[: len(allowed)].masked_fill_(~allowed, -torch.inf)
            logits_V[len(allowed) :] = -torch.inf
    return changed_QV


def _bias(choice: Choice) -> Mapping[int, float]:
    """What is added to the logits of some tokens: logit_bias, less the penalties (as OpenAI's interface defines them)."""
    how = choice.sampling
    bias = Counter(how.logit_bias)
    if how.presence_penalty or how.frequency_penalty:
        bias.subtract({token: how.presence_penalty + how.frequency_penalty * count for token, count in choice.said.items()})
    return bias


def _sampled(
    logits_BV: Tensor, streams: Sequence[torch.Generator], temperature: float, top_k: int, top_p: float, min_p: float
) -> list[int]:
    if temperature == 0:
        return logits_BV.argmax(dim=-1).tolist()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    probabilities_BV = warpers(torch.empty(0, dtype=torch.long), logits_BV.float()).softmax(dim=-1)
    return [int(torch.multinomial(row, 1, generator=stream)) for row, stream in zip(probabilities_BV, streams, strict=True)]


def _reported(logits_QV: Tensor, choices: Sequence[Choice], chosen: Sequence[int]) -> list[Likelihood | None]:
    asked = [index for index, choice in enumerate(choices) if choice.top is not None]
    found: list[Likelihood | None] = [None] * len(choices)
    if asked:
        own = scored(logits_QV[asked], [chosen[index] for index in asked], [choices[index].top or 0 for index in asked])
        for index, one in zip(asked, own, strict=True):
            found[index] = one
    return found


def scored(logits_NV: Tensor, ids: Sequence[int], tops: Sequence[int]) -> list[Likelihood]:
    """Of the tokens `ids`, each by the logits before it, with so many of the likeliest beside each."""
    log_NV = logits_NV.float().log_softmax(dim=-1)
    own = log_NV.gather(1, torch.tensor(list(ids), device=log_NV.device)[:, None])[:, 0].tolist()
    most = log_NV.topk(min(max(tops), log_NV.shape[1]), dim=-1) if max(tops) else None
    likeliest: list[list[tuple[int, float]]] = [[] for _ in ids]
    if most is not None:
        likeliest = [list(zip(*pair, strict=True)) for pair in zip(most.indices.tolist(), most.values.tolist(), strict=True)]
    return [Likelihood(*one[:2], tuple(one[2][: one[3]])) for one in zip(ids, own, likeliest, tops, strict=True)]
