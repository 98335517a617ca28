"""What many requests' texts begin with (a system turn, examples, a talk so far) is found by comparing each with the last ones."""

from collections import defaultdict, deque
from collections.abc import Sequence
from itertools import takewhile

NUM_COMPARED = 8  # last texts of a prompt that a new one is compared with
WORTH_KEEPING = 32  # tokens: fewer are read again as fast


class Beginnings:
    """The last texts behind every prompt, by its name."""

    def __init__(self) -> None:
        self._last: defaultdict[str, deque[tuple[int, ...]]] = defaultdict(lambda: deque(maxlen=NUM_COMPARED))

    def shared(self, name: str, text: tuple[int, ...]) -> int:
        """How many tokens the text begins with that another began with too, 0 where they are too few. It is one of the last from now."""
        last = self._last[name]
        found = max((_num_shared(text, other) for other in last), default=0)
        last.append(text)
        return found if found >= WORTH_KEEPING else 0

    def forget(self, name: str) -> None:
        self._last.pop(name, None)


def _num_shared(text: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with; the last one of the text is left to be read."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text[:-1], other, strict=False)))
