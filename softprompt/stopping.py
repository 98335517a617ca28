"""Stopping a run from outside: Ctrl-C, or the SIGTERM of a scheduler."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_after_step() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C was pressed or SIGTERM has come; a second Ctrl-C stops at once. A scheduler and what it
    has started may each send SIGTERM: more of them mean nothing more."""
    asked = False

    def remember(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True

    try:
        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where no signal arrives
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
