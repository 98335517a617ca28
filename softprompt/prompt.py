"""The soft prompt itself, and what it needs to stand in the right place."""

from dataclasses import dataclass

from torch import Tensor

from softprompt.model import FrozenBase, Prefix


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

    def prefix(self, base: FrozenBase) -> Prefix:
        """BOS and rows run through the base once."""
        return base.prefill(self.rows_PH, self.position, self.bos_id)


def no_prompt(base: FrozenBase, bos_id: int | None) -> SoftPrompt:
    """The bare base, as a prompt of no rows."""
    return SoftPrompt(base.row_mean_H.new_zeros(0, base.hidden_size), "after_bos", bos_id)
