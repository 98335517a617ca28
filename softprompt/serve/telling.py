"""Tokens of an answer become the text that a client is told, up to a stop text, which no part of is ever told."""

from collections.abc import Sequence
from typing import Any

from softprompt.engine.decode import Token
from softprompt.generation import Spelled
from softprompt.serve.asking import Said, Scored
from softprompt.thinking import Thinking, Told


class Telling:
    """One answer. Text that a stop text may begin with is held back until it is known whether it does."""

    def __init__(self, tokenizer: Any, thinking: Thinking | None, stops: Sequence[str]) -> None:
        self.stops = stops
        self.stopped = False
        self._spelled, self._told = Spelled(tokenizer), Told(thinking)
        self._held = self._ready = self._thought = ""
        self._num_tokens = 0
        self._scores: list[Scored] = []

    def ends(self, token: int) -> bool:
        """Whether the answer has come to a stop text with this token."""
        self._grow(self._spelled.add(token), last=False)
        return self.stopped

    def said(self, token: Token, score: Scored | None) -> Said | None:
        """What there is to tell after a token, which `ends` knows of."""
        if token.id is not None:
            self._num_tokens += 1
            self._scores += [score] if score is not None else []
        if token.last:
            self._grow(self._spelled.end(), last=True)
        if not (self._ready or self._thought or token.last):
            return None
        finish = None if not token.last else "stop" if token.id is None or self.stopped else "length"
        said = Said(self._ready, self._num_tokens, tuple(self._scores), self._thought, finish)  # type: ignore[arg-type]
        self._ready = self._thought = ""
        self._num_tokens, self._scores = 0, []
        return said

    def _grow(self, text: str, last: bool) -> None:
        if self.stopped:
            return
        thought, said = self._told.add(text, last=last)
        self._thought += thought
        self._held += said
        found = [at for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped, self._ready, self._held = True, self._ready + self._held[: min(found)], ""
            return
        open_end = 0 if last else max((_begun(self._held, stop) for stop in self.stops), default=0)
        known = len(self._held) - open_end
        self._ready, self._held = self._ready + self._held[:known], self._held[known:]


def _begun(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop text begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
