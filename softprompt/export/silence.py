"""Head rows of tokens that must never be said.

A prompt's rows are written for reading. As rows of a tied head they would also be candidates for the next token, and some engines
know no list of suppressed tokens. So the head is untied, and each new token gets a row that loses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.export.entries import QUESTIONS, Carried
from softprompt.model import FrozenBase
from softprompt.prompt import SoftPrompt, no_prompt, prefix_of

TEXTS, LENGTH = 16, 64  # random texts that the states are taken from, half of them to find the row and half to judge it
RIDGE = 1e-2  # of the states' mean square
CERTAIN = 6.0  # standard deviations that the judged states must lie from the other side
BELOW = 100.0  # logits, below zero


@dataclass(frozen=True)
class Silence:
    """`row_H`: the head row of every new token; `bias`: its bias, where the head has one. `note`: in words, how sure it is."""

    row_H: Tensor
    bias: float | None
    note: str


@torch.no_grad()
def silence(base: FrozenBase, prompts: Sequence[Carried]) -> Silence:
    """A head with a bias takes a bias of -10,000. Else, the states that a head sees have a direction in common, which least squares
    find: the row is the opposite, so long that its logit is about -100. It is judged on other states than it was found on.

    Where there is no such direction the row is the mean of all rows: never the likeliest (a mean is no more than the largest of what
    it is the mean of), and at most as likely as one of V equals (Jensen's inequality).
    """
    if base.head.bias_V is not None:
        return Silence(torch.zeros(base.head.weight_VH.shape[1]), -1e4, "new tokens have a bias of -10000 in the head: never said")
    found_NH, judged_NH = _states(base, prompts)
    square_HH = found_NH.T @ found_NH / len(found_NH)
    ridge_HH = RIDGE * square_HH.diagonal().mean() * torch.eye(len(square_HH), device=square_HH.device)
    row_H = torch.linalg.solve(square_HH + ridge_HH, found_NH.mean(dim=0))
    shares_N = judged_NH @ row_H  # about 1 each
    certain = (shares_N.mean() / shares_N.std()).item()
    if certain < CERTAIN:
        note = (
            f"the hidden states have no direction in common ({certain:.1f} standard deviations of {CERTAIN:.0f}): a new token is never "
            "the likeliest, but an engine that ignores suppress_tokens in generation_config.json could sample one: give it a logit bias"
        )
        return Silence(base.head.weight_VH.float().mean(dim=0).cpu(), None, note)
    row_H = -row_H * (BELOW / base.head.scale / shares_N.mean())
    gap = (base.logits(judged_NH.to(base.dtype)).float().amax(dim=1) - judged_NH @ row_H * base.head.scale).min().item()
    note = f"new tokens lie {gap:.0f} logits or more below the likeliest one ({len(judged_NH)} states, {certain:.0f} standard deviations)"
    return Silence(row_H.cpu(), None, note)


def _states(base: FrozenBase, prompts: Sequence[Carried]) -> tuple[Tensor, Tensor]:
    """States [N, H] of random texts and of questions, bare and behind the prompts, in two halves."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(len(base.tokenizer), (TEXTS, LENGTH), generator=generator).tolist()
    bare = no_prompt(base, prompts[0].stored.encoder.bos_id)
    starts: list[SoftPrompt] = [bare, *(prompt.stored.soft for prompt in prompts)]
    halves = []
    for half in (0, 1):
        states = [_read(base, starts[index % len(starts)], text) for index, text in enumerate(texts[half::2])]
        states += [_read(base, prompt.stored.soft, prompt.asked(question)) for prompt in prompts for question in QUESTIONS[half::2]]
        halves.append(torch.cat(states))
    return halves[0], halves[1]


def _read(base: FrozenBase, soft: SoftPrompt, ids: Sequence[int]) -> Tensor:
    ids_BT = torch.tensor([list(ids)], device=base.device)
    which_B = torch.zeros(1, dtype=torch.long, device=base.device)
    return base.continue_from(prefix_of(base, [soft]), which_B, ids_BT, torch.ones_like(ids_BT)).hidden_BTH[0].float()
