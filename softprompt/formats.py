"""Which format each kind of thing on disk is of. A number rises when an older softprompt would misread what is written from then on."""

from pathlib import Path
from typing import Any, Final

RUN: Final = 1  # of a run folder
PROMPT: Final = 1  # of a prompt's card
EVALUATION: Final = 1
ANSWERS: Final = 1  # of what a file of answers was made with
SWEEP: Final = 1


def newer(place: Path, values: Any, known: int) -> str | None:
    """What to say of a JSON object whose `format` is newer than the one that is known here; None where it is not."""
    found = values.get("format") if isinstance(values, dict) else None
    if not isinstance(found, int) or found <= known:
        return None
    return f"{place} is of a newer softprompt (its format is {found}, this one reads {known}): pip install --upgrade softprompt"
