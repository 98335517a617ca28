"""The processes that compute a run together. Here is the one that is alone; several are engine/processes.py's.

The rows of a step and their cut into micro-batches are functions of (config, step) alone, so every process knows the whole step and
computes its share. What must be the same everywhere is asked here, and what several have computed is added up here in an order that does
not know how many they are: the sums are the same to the last bit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from softprompt.config import ModelConfig

Value = TypeVar("Value")


@dataclass(frozen=True)
class Item:
    """Something to compute, in about `cost` tokens; what comes of it is added to these rows of a table."""

    cost: int
    rows: tuple[int, ...]


class World:
    """One process: the first and the only one. Values that are told are of JSON's kinds."""

    rank = 0
    size = 1
    beside = 1  # processes on this machine

    @property
    def first(self) -> bool:
        """Whether this process writes what the run leaves, and says what it has to say."""
        return self.rank == 0

    def placed(self, config: ModelConfig) -> ModelConfig:
        """Where this process loads a base: each of several on a machine has a GPU of its own."""
        return config

    def owners(self, costs: Sequence[int]) -> list[int]:
        """Which process computes each of some things, so that all have about as much to do."""
        return [0] * len(costs)

    def added_up(self, table_KD: Tensor, items: Sequence[Item], of: Callable[[int], Tensor]) -> Tensor:
        """The table with what every item adds to its rows, in the order of the items. `of(number)`: that, [len(item.rows), D] float32,
        asked once for every item by one of the processes."""
        for number, item in enumerate(items):
            add(table_KD, item.rows, of(number))
        return table_KD

    def total(self, sums: Tensor) -> Tensor:
        """Numbers on the CPU of which each is computed by one process, and 0 at the others."""
        return sums

    def as_first(self, tensors: Sequence[Tensor]) -> None:
        """Gives tensors the numbers that those of the first process have."""

    def told(self, make: Callable[[], Value]) -> Value:
        """What `make` gives at the first process, the only one that asks it."""
        return make()

    def tensors(self, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The same of tensors, whose shapes the others need not know and which lie on the CPU there."""
        return make()

    def gathered(self, value: Value) -> list[Value]:
        """What every process says, in the order of their ranks."""
        return [value]

    def each(self, count: int, make: Callable[[int], Value]) -> list[Value]:
        """make(0) ... make(count - 1), each asked for by one of the processes."""
        return [make(number) for number in range(count)]

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Sees that these are the same everywhere; their names say what they are. Raises RunError."""

    def end(self) -> None:
        """Waits for all of them; from here on each may end when it likes."""


def add(table_KD: Tensor, rows: Sequence[int], parts: Tensor) -> None:
    """Adds parts [len(rows), D] to these rows of a table."""
    for row, part_D in zip(rows, parts, strict=True):
        table_KD[row].add_(part_D)
