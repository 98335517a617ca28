"""Batched decoding that continues from prefixes. Knows only token ids.

Rows of one batch may continue from different prompts of different lengths. Every row samples from its own random
stream, so it gives the same tokens alone or in a batch.

Shapes: B rows, T text tokens, S cached positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from softprompt.model import FrozenBase
from softprompt.prefix import Continued, Prefix


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. Temperature 0 is greedy; top_k 0 and top_p 1 switch those cuts off."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Token:
    """Row `row` said `id`; `last` when it will say no more (its end-of-text token is not reported)."""

    row: int
    id: int | None
    last: bool


def decode(base: FrozenBase, prefix: Prefix, which_B: Sequence[int], texts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Token]:
    """Tokens of all rows as they come; row b continues `texts[b]` from prefix number `which_B[b]`."""
    if not base.shares_prefix:
        for row, (which, text) in enumerate(zip(which_B, texts, strict=True)):
            yield from _decode_plain(base, prefix.embeds[which], text, row, sampling)
        return
    limits = [_limit(base, prefix.lengths[which], text, sampling) for which, text in zip(which_B, texts, strict=True)]
    streams = [_stream(sampling.seed, text, base.device) for text in texts]
    alive = list(range(len(texts)))
    with torch.inference_mode():
        past = _read_texts(base, prefix, which_B, texts)
        for count in range(1, max(limits) + 1):
            chosen = _choose(base.logits(past.hidden_BTH[:, -1]), [streams[row] for row in alive], sampling)
            going = []
            for index, token in enumerate(chosen):
                stop = token in base.stop_ids
                last = stop or count == limits[alive[index]]
                yield Token(alive[index], None if stop else token, last)
                if not last:
                    going.append(index)
            if not going:
                return
            if len(going) < len(alive):
                past, alive, chosen = _keep(past, going), [alive[i] for i in going], [chosen[i] for i in going]
            past = base.next_hidden(torch.tensor(chosen, device=base.device), past)


def _read_texts(base: FrozenBase, prefix: Prefix, which_B: Sequence[int], texts: Sequence[Sequence[int]]) -> Continued:
    """Runs all texts in one batch, then moves the padding from their right end to the left of everything."""
    width = max(len(text) for text in texts)
    ids_BT = torch.zeros(len(texts), width, dtype=torch.long, device=base.device)
    mask_BT = torch.zeros_like(ids_BT)
    for row, text in enumerate(texts):
        ids_BT[row, : len(text)] = torch.tensor(list(text))
        mask_BT[row, : len(text)] = 1
    read = base.continue_from(prefix, torch.tensor(list(which_B), device=base.device), ids_BT, mask_BT, keep=True)
    last_B = mask_BT.sum(dim=1) - 1
    hidden_B1H = read.hidden_BTH[torch.arange(len(texts), device=base.device), last_B][:, None]
    order_BS = read.mask_BS.argsort(dim=1, stable=True)
    holes = int((read.mask_BS == 0).sum(dim=1).min())

    def moved(states: Tensor) -> Tensor:
        return states.gather(2, order_BS[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))[:, :, holes:]

    layers = tuple((moved(k), moved(v)) for k, v in read.layers)
    return Continued(hidden_B1H, layers, read.mask_BS.gather(1, order_BS)[:, holes:])


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


def _limit(base: FrozenBase, prefix_length: int, text: Sequence[int], sampling: Sampling) -> int:
    """Tokens that a row may say: `max_new_tokens`, or what the base's context leaves it."""
    room = sampling.max_new_tokens if base.context_length is None else base.context_length - prefix_length - len(text)
    return min(sampling.max_new_tokens, room)


def _stream(seed: int, text: Sequence[int], device: torch.device) -> torch.Generator:
    """A random stream that depends on the seed and the text alone, not on the batch around it."""
    mixed = seed
    for token in text:
        mixed = (mixed * 1_000_003 + token + 1) % 2**63
    return torch.Generator(device).manual_seed(mixed)


def _decode_plain(base: FrozenBase, start_SH: Tensor, text: Sequence[int], row: int, sampling: Sampling) -> Iterator[Token]:
    """One row by transformers' own generate, for bases whose state cannot be shared; its tokens come all at once."""
    embeds_SH = torch.cat([start_SH, base.embed_ids(text)]).to(base.dtype)
    greedy = sampling.temperature == 0
    how = {} if greedy else {"temperature": float(sampling.temperature), "top_p": sampling.top_p, "top_k": sampling.top_k}
    settings = GenerationConfig(
        max_new_tokens=_limit(base, len(start_SH), text, sampling),
        do_sample=not greedy,
        eos_token_id=sorted(base.stop_ids),
        pad_token_id=min(base.stop_ids),
        **how,
    )
    with torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        said = base.model.generate(inputs_embeds=embeds_SH[None], generation_config=settings)[0].tolist()
    said = [token for token in said if token not in base.stop_ids]
    for index, token in enumerate(said):
        yield Token(row, token, index == len(said) - 1)
    if not said:
        yield Token(row, None, True)
