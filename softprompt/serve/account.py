"""What is known of one request: for its line in the log, and for the meters."""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from softprompt.serve.asking import Begun, Said


@dataclass
class Account:
    """`route`: the pattern that its path fits, "other" where it fits none. `model`: the name it gave; `kind`: of what is served by that
    name. `asked`, `said`: its texts, where they are to be logged. `between`: is told seconds and the tokens that came after them."""

    id: str
    method: str
    between: Callable[[float, int], None]
    route: str = "other"
    begun: float = field(default_factory=monotonic)
    status: int = 0
    model: str | None = None
    kind: str = "none"
    user: str | None = None
    answers: int = 0
    num_prompt: int = 0
    num_cached: int = 0
    num_virtual: int = 0
    num_said: int = 0
    first_token: float | None = None
    asked: object = None
    said: dict[int, str] | None = None
    error: str | None = None
    _last: dict[int, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return monotonic() - self.begun

    def note(self, number: int, value: Begun | Said) -> None:
        """What an engine said to ask `number`."""
        now = monotonic()
        if isinstance(value, Begun):
            self._last[number] = now
            return
        if not value.num_tokens:
            return
        self.num_said += value.num_tokens
        if self.first_token is None:
            self.first_token = now - self.begun
        else:
            self.between((now - self._last[number]) / value.num_tokens, value.num_tokens)
        self._last[number] = now
        if self.said is not None:
            self.said[number] = self.said.get(number, "") + value.thought + value.text
