"""A run that is followed from Python: shown where it is looked at, its events passed on."""

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softprompt.events import Event


def show_progress(events: "Iterable[Event]", log_every: int = 10) -> "Iterator[Event]":
    """Passes a run's events on as they are and shows the run: in a notebook a bar and the curves of training and held-out loss, in one
    display that is kept up to date; elsewhere what `softprompt train` shows, with a line every `log_every` steps.

        for event in show_progress(train(config)):
            ...
    """
    if in_notebook():
        from softprompt.screen.notebook import displayed

        return displayed(events, log_every)
    from softprompt.screen.run import drawn

    return drawn(events, log_every)


def in_notebook() -> bool:
    """Whether this runs in a kernel, whose front end shows HTML. IPython is there already where it does."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None
