"""A talk with a prompt."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from softprompt.cli.options import MaxNewTokens, OtherBase, Overrides, PromptPath, Seed, Temperature, TopK, TopP, app

SEVERAL = '"""'  # begins and ends a turn of several lines


@app.command()
def chat(
    prompt: PromptPath,
    overrides: Overrides = None,
    other: Annotated[
        list[Path] | None, typer.Option("--with", metavar="PROMPT", help="Another prompt that answers each turn too; repeatable.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system turn before the conversation.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    allow_other_base: OtherBase = False,
) -> None:
    """Talk with a soft prompt, turn by turn; /base shows what the bare base answers. Turns come from the terminal, or a line each from a
    file or pipe."""
    from softprompt import Sampling, load_base, load_prompt
    from softprompt.cli.prompts import base_config
    from softprompt.conversation import Conversation
    from softprompt.generation import check_sampling
    from softprompt.screen.chat import Session, talk

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    check_sampling(sampling)
    base = load_base(base_config(prompt, overrides or []))
    speakers = {str(path): load_prompt(path, base, allow_other_base=allow_other_base) for path in [prompt, *(other or [])]}
    talk(Session(base, speakers, (Conversation(system),) * len(speakers), sampling), _turns(_lines()))


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
