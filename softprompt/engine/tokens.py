"""A row as the model sees it: ids, and which of them are supervised."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from operator import itemgetter


@dataclass(frozen=True)
class Encoded:
    """One row, without BOS. `ids[t]` is scored where `supervised[t]`. `num_cut`: ids cut away, `num_lost` of them supervised."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]
    source: str = ""
    num_cut: int = 0
    num_lost: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_supervised(self) -> int:
        return sum(self.supervised)

    @property
    def question(self) -> tuple[int, ...]:
        """The ids before the last answer."""
        start = len(self) - 1 - self.supervised[::-1].index(True)
        while start and self.supervised[start - 1]:
            start -= 1
        return self.ids[:start]

    def judged_after(self, count: int) -> "Encoded":
        """The row with its first `count` supervised tokens unsupervised."""
        first = {index for index, _ in islice(filter(itemgetter(1), enumerate(self.supervised)), count)}
        return replace(self, supervised=tuple(on and index not in first for index, on in enumerate(self.supervised)))

    def after(self, count: int) -> "Encoded":
        """The row without its first `count` tokens."""
        return replace(self, ids=self.ids[count:], supervised=self.supervised[count:])


def num_shared(texts: Iterable[Sequence[int] | str]) -> int:
    """Tokens, or characters, that all texts begin with."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False)))


def shared_beginning(rows: Iterable[Encoded]) -> tuple[int, ...]:
    """The ids that all rows begin with and that nothing is predicted from: a template's first words, a system turn."""
    questions = [row.ids[: row.supervised.index(True)][:-1] for row in rows]  # the last one predicts
    return questions[0][: num_shared(questions)]
