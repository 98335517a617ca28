"""The processes that compute a run together, of which there is one.

The rows of a step and their cut into micro-batches are functions of (config, step) alone, so every process knows the whole step and
takes its share; whatever must be decided alike everywhere is asked here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class World:
    """Process number `rank` of `size`."""

    rank: int = 0
    size: int = 1

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """What of a step's micro-batches this process computes."""
        return items[self.rank :: self.size]

    def any(self, wish: bool) -> bool:
        """Whether some process wishes it: to stop, say."""
        return wish

    def smallest(self, number: int) -> int:
        """The smallest of all processes' numbers."""
        return number
