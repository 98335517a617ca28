"""Texts are read behind prompts: many in one forward, long ones in pieces so that others' answers go on meanwhile. What a text begins
with is taken from the shelf where it is there.

Shapes: B texts, T tokens, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.engine.choose import Likelihood, likelihoods
from softprompt.engine.model import FrozenBase
from softprompt.engine.prefix import Prefix, as_prefixes, assemble
from softprompt.engine.rows import Context, Text
from softprompt.engine.slots import Slots


def shelved(base: FrozenBase, context: Context) -> Prefix:
    """The prefix of a context, computed once. By itself, so that it is the same in any company."""
    prompt, ids = context
    return base.shelf.take(prompt, ids, lambda: prompt.prefix(base, ids))


@dataclass(eq=False)
class OwnText(Text):
    """`prefix`: what the layers keep of the prompt and of the tokens so far; `hidden_H`: the state of the last one."""

    prefix: Prefix | None = None
    hidden_H: Tensor | None = None

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


class OwnRows:
    """See rows.Rows: the base computes them, what the layers keep of them lies in slots."""

    def __init__(self, base: FrozenBase, most_rows: int, most_positions: int) -> None:
        self.base, self.most_positions = base, most_positions
        self.slots = Slots(base.device, most_rows, most_positions)
        self._hidden_BH = torch.empty(0)

    @property
    def num_bytes(self) -> int:
        return self.slots.num_bytes

    @property
    def kept_bytes(self) -> int:
        return self.base.shelf.num_bytes

    def text(self, context: Context, ids: tuple[int, ...], keep: int, top: int | None) -> OwnText:
        return OwnText(context, ids, keep, top)

    def begin(self, text: Text) -> None:
        assert isinstance(text, OwnText)
        text.begin(self.base)

    def read_on(self, text: Text, most: int) -> None:
        assert isinstance(text, OwnText)
        (prefix,) = _read(self.base, [text], [text.begin(self.base)], [text.next_count(most)]).separate()
        text.prefix = prefix
        if text.num_read == text.keep:
            prompt, behind = text.context
            self.base.shelf.put(prompt, (*behind, *text.ids[: text.keep]), prefix)

    def join(self, texts: Sequence[Text]) -> None:
        own = [text for text in texts if isinstance(text, OwnText)]
        read = _read(self.base, own, [text.begin(self.base) for text in own], [text.num_left for text in own])
        before = [self._hidden_BH] if self.slots.lengths else []
        self.slots.join(read.layers, read.lengths)
        self._hidden_BH = torch.cat([*before, torch.stack([text.hidden_H for text in own if text.hidden_H is not None])])

    def next(self, ids: Sequence[int]) -> None:
        self._hidden_BH = self.base.next_hidden(torch.tensor(list(ids), device=self.base.device), self.slots)

    def logits(self) -> Tensor:
        return self.base.logits(self._hidden_BH)

    def keep(self, rows: Sequence[int]) -> None:
        self._hidden_BH = self._hidden_BH[list(rows)]
        self.slots.keep(rows)

    def forget(self, texts: Sequence[Text]) -> None:
        return


def _read(base: FrozenBase, texts: Sequence[OwnText], begun: Sequence[Prefix], counts: Sequence[int]) -> Prefix:
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
