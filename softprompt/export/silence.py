"""Head rows of tokens that must never be said.

A prompt's rows are written for reading. As rows of a tied head they would also be candidates for the next token, and some engines
know no list of suppressed tokens. So the head is untied, and each new token gets a row that loses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import Prompt, no_prompt
from softprompt.export.carried import QUESTIONS, Carried, states_behind

TEXTS, LENGTH = 8, 64  # random texts that the states are taken from, half of them to find the row and half to judge it
RIDGE = 1e-3
CERTAIN = 0.05  # of the mean: how far on the losing side each judged state must lie
BELOW = 100.0  # logits, below the mean of all
BIAS = -1e4


@dataclass(frozen=True)
class Silence:
    """`row_H`: the head row of every new token; `bias`: its bias, where the head has one. `note`: in words, how sure it is."""

    row_H: Tensor
    bias: float | None
    note: str


@torch.no_grad()
def silence(base: FrozenBase, prompts: Sequence[Carried]) -> Silence:
    """A head with a bias takes a bias of -10,000. Else every new token gets the mean of all head rows: never the likeliest (a mean is
    no more than the largest of what it is the mean of), and at most as likely as one of V equals (Jensen's inequality). From it goes
    what the states that a head sees have in common, so much that the logit falls by about another 100. More would not be safer: a
    rare state has nothing of the common direction or a little of its opposite, which the mean's distance must outweigh (LOG.md).

    The row is judged on other states than it was found on. Where they have no direction in common, the mean stands alone.
    """
    if base.head.bias_V is not None:
        return Silence(torch.zeros(base.head.weight_VH.shape[1]), BIAS, "new tokens have a bias of -10000 in the head: never said")
    found_NH, judged_NH = _states(base, prompts)
    mean_H, direction_H = base.head.weight_VH.mean(dim=0, dtype=torch.float32), _common_direction(found_NH)
    shares_N = judged_NH @ direction_H
    nearest = (shares_N.min() / shares_N.mean()).item()
    if not nearest > CERTAIN:
        note = (
            f"the hidden states have no direction in common (of {len(judged_NH)} one lies at {nearest:.2f} of the mean): a new "
            "token is never the likeliest, but an engine that ignores suppress_tokens in generation_config.json could sample one: "
            "give it a logit bias"
        )
        return Silence(mean_H.cpu(), None, note)
    row_H = mean_H - direction_H * (BELOW / base.head.scale / shares_N.mean())
    own_N = replace(base.head, weight_VH=row_H[None].to(base.dtype)).logits(judged_NH)[:, 0].float()
    gap = (base.logits(judged_NH).float().amax(dim=1) - own_N).min().item()
    note = f"new tokens lie {gap:.0f} logits or more below the likeliest one (on {len(judged_NH)} states that the row was not made from)"
    return Silence(row_H.cpu(), None, note)


@torch.enable_grad()
def _common_direction(states_NH: Tensor) -> Tensor:
    """[H]: the direction that every state has at least 1 of, as short as may be: a support vector machine of one class, with squared
    hinges. Least squares would do for nearly all states, and leave the few that differ most on the other side (LOG.md)."""
    scale = states_NH.square().mean().sqrt()
    scaled_NH, direction_H = states_NH / scale, torch.zeros(states_NH.shape[1], device=states_NH.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([direction_H], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        value = (1 - scaled_NH @ direction_H).relu().square().mean() + RIDGE * direction_H.square().sum()
        value.backward()
        return value.item()

    optimizer.step(loss)
    return direction_H.detach() / scale


def _states(base: FrozenBase, prompts: Sequence[Carried]) -> tuple[Tensor, Tensor]:
    """States [N, H] of random texts and of questions, bare and behind the prompts, in two halves."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(base.num_tokens, (TEXTS, LENGTH), generator=generator).tolist()
    bare = no_prompt(base, prompts[0].encoder.bos_id)
    starts: list[Prompt] = [bare, *(prompt.soft for prompt in prompts)]
    rows: list[list[tuple[int, Sequence[int]]]] = [[], []]
    for half in (0, 1):
        rows[half] += [(index % len(starts), text) for index, text in enumerate(texts[half::2])]
        rows[half] += [(index + 1, prompt.asked(question)) for index, prompt in enumerate(prompts) for question in QUESTIONS[half::2]]
    states = states_behind(base, starts, rows[0] + rows[1])
    return torch.cat(states[: len(rows[0])]).float(), torch.cat(states[len(rows[0]) :]).float()
