"""softprompt: train, evaluate and use soft prompts for frozen language models. Names load when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softprompt.artifact import load_prompt as load_prompt
    from softprompt.config import Config as Config
    from softprompt.config import load_config as load_config
    from softprompt.data import Message as Message
    from softprompt.data import load_examples as load_examples
    from softprompt.engine.loading import load_base as load_base
    from softprompt.errors import Error as Error
    from softprompt.evaluation import Contest as Contest
    from softprompt.evaluation import evaluate as evaluate
    from softprompt.events import Evaluated as Evaluated
    from softprompt.events import Event as Event
    from softprompt.events import Finished as Finished
    from softprompt.events import Found as Found
    from softprompt.events import Preparing as Preparing
    from softprompt.events import Sampled as Sampled
    from softprompt.events import Saved as Saved
    from softprompt.events import Searching as Searching
    from softprompt.events import Started as Started
    from softprompt.events import Step as Step
    from softprompt.events import Studying as Studying
    from softprompt.events import Warned as Warned
    from softprompt.generation import Ensemble as Ensemble
    from softprompt.generation import generate as generate
    from softprompt.rows import encode_file as encode_file
    from softprompt.sampling import Sampling as Sampling
    from softprompt.screen.progress import show_progress as show_progress
    from softprompt.training import train as train

_HOMES = {
    "Config": "config",
    "Contest": "evaluation",
    "Ensemble": "generation",
    "Error": "errors",
    "Evaluated": "events",
    "Event": "events",
    "Finished": "events",
    "Found": "events",
    "Message": "data",
    "Preparing": "events",
    "Sampled": "events",
    "Sampling": "sampling",
    "Saved": "events",
    "Searching": "events",
    "Started": "events",
    "Step": "events",
    "Studying": "events",
    "Warned": "events",
    "encode_file": "rows",
    "evaluate": "evaluation",
    "generate": "generation",
    "load_base": "engine.loading",
    "load_config": "config",
    "load_examples": "data",
    "load_prompt": "artifact",
    "show_progress": "screen.progress",
    "train": "training",
}

__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'softprompt' has no attribute {name!r}")
    value = getattr(import_module(f"softprompt.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
