"""The soft prompt itself, and what it needs to stand in the right place."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.model import FrozenBase
from softprompt.prefix import Prefix


@dataclass(frozen=True)
class SoftPrompt:
    """Learned rows [P, H] in float32, whatever the base's precision, and where they stand.

    `bos_id`: the BOS token that belongs to the prefix, or None for a base whose texts have none.
    """

    rows_PH: Tensor
    position: str
    bos_id: int | None

    @property
    def length(self) -> int:
        return self.rows_PH.shape[0]

    def embeds(self, base: FrozenBase) -> Tensor:
        """[S, H] float32: [BOS][rows] for position "after_bos", [rows][BOS] for "start"; no BOS where `bos_id` is None."""
        bos = base.embed_ids([] if self.bos_id is None else [self.bos_id])
        rows_PH = self.rows_PH.to(base.device)
        return torch.cat([bos, rows_PH] if self.position == "after_bos" else [rows_PH, bos])


def prefix_of(base: FrozenBase, prompts: Sequence[SoftPrompt]) -> Prefix:
    """BOS and rows of every prompt, run through the base once."""
    return base.prefill([prompt.embeds(base) for prompt in prompts])


def no_prompt(base: FrozenBase, bos_id: int | None) -> SoftPrompt:
    """The bare base, as a prompt of no rows."""
    return SoftPrompt(base.row_mean_H.new_zeros(0, base.hidden_size), "after_bos", bos_id)
