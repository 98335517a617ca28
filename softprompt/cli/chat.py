"""A talk with a prompt."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from softprompt.cli import completion
from softprompt.cli.options import Engine, EngineHere, MaxNewTokens, OtherBase, Overrides, Seed, Temperature, TopK, TopP, app, base_by
from softprompt.errors import ConfigError
from softprompt.extras import need

if TYPE_CHECKING:
    from softprompt.conversation import Here
    from softprompt.serve.client import There

ADDRESS = re.compile(r"https?://")
SEVERAL = '"""'  # begins and ends a turn of several lines


@app.command()
def chat(
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT",
            help="Prompt, checkpoint or run folder, or the address of a server: http://...",
            autocompletion=completion.base_settings,
        ),
    ],
    overrides: Overrides = None,
    other: Annotated[
        list[Path] | None, typer.Option("--with", metavar="PROMPT", help="Another prompt that answers each turn too; repeatable.")
    ] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", metavar="NAME", help="Which model of a server; repeatable. Left out, its first prompt.")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="FILE", help="The key that a server asks for; else OPENAI_API_KEY.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system turn before the conversation.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    allow_other_base: OtherBase = False,
    engine: Engine = EngineHere.own,
) -> None:
    """Talk with a soft prompt, turn by turn; /base shows what the bare base answers. Turns come from the terminal, or a line each from a
    file or pipe."""
    from softprompt.conversation import Conversation
    from softprompt.sampling import Sampling
    from softprompt.screen.chat import Session, Speakers, talk

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    sampling.check()
    place: AbstractContextManager[Speakers]
    if ADDRESS.match(prompt):
        if overrides or other or allow_other_base or engine != EngineHere.own:
            raise ConfigError("a server has its own base and prompts: name its models by --model, and leave the rest out")
        place = _there(prompt, models or [], key_file)
    else:
        if models or key_file:
            raise ConfigError(f"--model and --api-key-file are for a server, {prompt} is a folder")
        place = nullcontext(_here([Path(prompt), *(other or [])], overrides or [], allow_other_base, engine))
    with place as speakers:
        talk(Session(speakers, (Conversation(system),) * len(speakers.names), sampling), _turns(_lines()))


def _here(paths: list[Path], overrides: list[str], allow_other_base: bool, engine: EngineHere) -> "Here":
    """Prompts over their base, loaded."""
    from softprompt import load_prompt
    from softprompt.cli.prompts import base_config
    from softprompt.conversation import Here

    base = base_by(engine, base_config(paths[0], overrides))
    return Here(base, {str(path): load_prompt(path, base, allow_other_base=allow_other_base) for path in paths})


def _there(address: str, models: list[str], key_file: Path | None) -> AbstractContextManager["There"]:
    """Models of a server. Raises MissingPackage and ConfigError."""
    need("openai", "a talk with a server")
    from softprompt.serve.client import connect

    return connect(address, models, os.environ.get("OPENAI_API_KEY") if key_file is None else key_of(key_file))


def key_of(file: Path) -> str:
    """The key that a server asks for. Raises ConfigError."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _lines() -> Iterator[str]:
    """What the user types, with a line to edit where Python has readline; lines of a file or pipe are shown as if typed."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import_module("readline")  # which input() then uses
        while True:
            yield input("> ")
    for line in sys.stdin:
        print(">", line.rstrip("\n"), flush=True)
        yield line.rstrip("\n")


def _turns(lines: Iterator[str]) -> Iterator[str]:
    """Lines, those between two marks as one turn."""
    for line in lines:
        if not line.startswith(SEVERAL):
            yield line
            continue
        text = line.removeprefix(SEVERAL)
        while not text.endswith(SEVERAL):
            text += "\n" + next(lines, SEVERAL)
        yield text.removesuffix(SEVERAL)
