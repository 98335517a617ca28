"""Texts are read behind prompts: many in one forward, long ones in pieces so that others' answers go on meanwhile. What a text begins
with is taken from the shelf where it is there.

Shapes: B texts, T tokens, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from softprompt.engine.choose import Likelihood, likelihoods
from softprompt.engine.model import FrozenBase
from softprompt.engine.prefix import Prefix, as_prefixes, assemble
from softprompt.engine.prompt import Prompt

Context = tuple[Prompt, tuple[int, ...]]  # what a text continues from: a prompt, and the ids behind it


def shelved(base: FrozenBase, context: Context) -> Prefix:
    """The prefix of a context, computed once. By itself, so that it is the same in any company."""
    prompt, ids = context
    return base.shelf.take(prompt, ids, lambda: prompt.prefix(base, ids))


@dataclass
class Text:
    """A text that is being read. `keep`: of its first tokens so many are worth keeping on the shelf, for others that begin with them.
    `top`: its tokens' likelihoods are wanted, with so many of the likeliest beside each.

    `prefix`: what the layers keep of the prompt and the `num_read` tokens so far, of which `num_cached` were on the shelf with what is
    before them; `hidden_H`: the state of the last one."""

    context: Context
    ids: tuple[int, ...]
    keep: int = 0
    top: int | None = None
    prefix: Prefix | None = None
    num_read: int = 0
    num_cached: int = 0
    hidden_H: Tensor | None = None
    scores: list[Likelihood] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        return len(self.ids) - self.num_read

    def begin(self, base: FrozenBase) -> Prefix:
        """What its next tokens continue from."""
        if self.prefix is None:
            prompt, behind = self.context
            self.num_cached = prompt.num_positions + len(behind) if base.shelf.has(*self.context) else 0
            known = () if self.top is not None else base.shelf.longest(prompt, (*behind, *self.ids))
            if len(known) > len(behind):
                self.num_read, self.num_cached = len(known) - len(behind), prompt.num_positions + len(known)
            self.prefix = shelved(base, (prompt, max(known, behind, key=len)))
            if self.top is not None:
                self.scores.append(Likelihood(self.ids[0], None))
        return self.prefix


def read_on(base: FrozenBase, text: Text, most: int) -> None:
    """The next tokens of a text, `most` at most; it stops where its beginning is worth keeping, and keeps it."""
    begun = text.begin(base)
    to_keep = text.keep - text.num_read
    count = min(most, text.num_left, to_keep if to_keep > 0 else most)
    (prefix,) = _read(base, [text], [begun], [count]).separate()
    text.prefix = prefix
    if text.num_read == text.keep:
        prompt, behind = text.context
        base.shelf.put(prompt, (*behind, *text.ids[: text.keep]), prefix)


def read_rest(base: FrozenBase, texts: Sequence[Text]) -> Prefix:
    """All that is left of some texts, in one forward; what the layers keep of them together."""
    return _read(base, texts, [text.begin(base) for text in texts], [text.num_left for text in texts])


def _read(base: FrozenBase, texts: Sequence[Text], begun: Sequence[Prefix], counts: Sequence[int]) -> Prefix:
    starts = list({id(prefix): prefix for prefix in begun}.values())
    numbers = {id(prefix): number for number, prefix in enumerate(starts)}
    which_B = torch.tensor([numbers[id(prefix)] for prefix in begun], device=base.device)
    ids_BT = torch.zeros(len(texts), max(counts), dtype=torch.long, device=base.device)
    mask_BT = torch.zeros_like(ids_BT)
    for row, (text, count) in enumerate(zip(texts, counts, strict=True)):
        ids_BT[row, :count] = torch.tensor(text.ids[text.num_read : text.num_read + count])
        mask_BT[row, :count] = 1
    read = base.continue_from(assemble(starts), which_B, ids_BT, mask_BT, keep=True)
    for row, (text, count) in enumerate(zip(texts, counts, strict=True)):
        before, text.num_read = text.num_read, text.num_read + count
        text.hidden_H = read.hidden_BTH[row, count - 1]
        if text.top is not None:
            after = text.ids[before + 1 : text.num_read + 1]
            text.scores += likelihoods(base, read.hidden_BTH[row, : len(after)], after, text.top)
    return as_prefixes(read)
