"""What a user can get wrong, as a tree. Every message says what is wrong, where, and what to do.

    Error
    |-- ConfigError      a key or value of the configuration          (also ValueError)
    |-- DataError        rows that cannot be used                     (also ValueError)
    |-- ModelError       a base that cannot be loaded or used         (also ValueError)
    |-- ArtifactError    a prompt that does not fit or cannot be had   (also ValueError)
    |-- RunError         a run folder, or a run that cannot go on     (also RuntimeError)
    |   `-- Diverged     a loss that is not finite
    `-- MissingPackage   an extra that is not installed               (also ImportError)

The command line prints the message in one line and exits with 2. Our own mistakes are assertions, not these.
"""


class Error(Exception):
    """Anything that the user can mend. `said`: whether another process of the same run has said it."""

    said = False


class ConfigError(Error, ValueError):
    """A configuration key or value."""


class DataError(Error, ValueError):
    """Rows that cannot be read or used. `source`: the row, where it is one; `reason`: what is wrong with it."""

    def __init__(self, reason: str, source: str = "") -> None:
        super().__init__(f"{source}: {reason}" if source else reason)
        self.reason, self.source = reason, source


class TooLong(DataError):
    """A row whose whole response is cut away. `length`: its tokens, all of them."""

    def __init__(self, max_length: int | None, length: int, source: str) -> None:
        super().__init__(f"the whole response lies beyond data.max_length = {max_length} tokens and is cut away", source)
        self.length = length


class ModelError(Error, ValueError):
    """A base model that cannot be found, loaded or used."""


class ArtifactError(Error, ValueError):
    """A prompt folder that is damaged or belongs to something else."""


class RunError(Error, RuntimeError):
    """A run folder in the way, or a run that cannot go on."""


class Diverged(RunError):
    """A run whose loss is not finite any more. `prompt`: the name of the prompt that has it."""

    def __init__(self, message: str, prompt: str) -> None:
        super().__init__(message)
        self.prompt = prompt


class MissingPackage(Error, ImportError):
    """An optional package that is not installed."""


def first_line(error: Exception) -> str:
    """What somebody else's error says, in one line; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
