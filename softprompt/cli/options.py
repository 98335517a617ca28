"""The program, and what several verbs take."""

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.models import CommandInfo

from softprompt import __version__
from softprompt.cli import completion
from softprompt.engine.launched import launched
from softprompt.errors import ConfigError


class Program(TyperGroup):
    """Lists its verbs under their headings; plain text, for typer's other way draws with half of rich and takes twice as long."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        headings: dict[str, list[tuple[str, str]]] = {}
        longest = max(map(len, self.commands))
        for name, verb in self.commands.items():
            headings.setdefault(getattr(verb, "rich_help_panel", ""), []).append((name.ljust(longest), verb.help or ""))
        for heading, verbs in headings.items():
            with formatter.section(heading):
                formatter.write_dl(verbs)


class EngineHere(StrEnum):
    """What computes in this process."""

    own = "own"
    llama = "llama"


app = typer.Typer(
    cls=Program,
    name="softprompt",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 120},
    help="Prompt tuning for frozen language models: train, evaluate and use soft prompts.\n\n"
    "Settings come from a TOML file, from section.key=value, or both; the latter win.",
)

Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG.toml] [section.key=value ...]", help="Settings.", autocompletion=completion.settings),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.key=value ...]", help="Settings, e.g. model.name=FOLDER.", autocompletion=completion.settings),
]
PromptPath = Annotated[Path, typer.Argument(metavar="PROMPT", help="Prompt, checkpoint or run folder.")]
HeldOut = Annotated[str | None, typer.Option("--data", metavar="FILE", help="Held-out rows; left out, those of the run that PROMPT is.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as one JSON object.")]
SystemTurn = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help='System turn, instead of the one that all training rows had; "" is none.')
]
OtherBase = Annotated[bool, typer.Option("--allow-other-base", help="Use a prompt on a base or tokenizer that it was not trained for.")]
FileOfQuestions = Annotated[
    str | None,
    typer.Option("--in", metavar="FILE", help="Answer a file: a .txt file of lines, or rows as training reads them; needs --out."),
]
OutOfFile = Annotated[
    Path | None,
    typer.Option("--out", metavar="ANSWERS.jsonl", help="Where the rows of --in go with their answers, line by line as they come."),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with an --out that is there; several processes that are started with it share the work."),
]
AnswerField = Annotated[
    str, typer.Option(metavar="NAME", help="The answer's field, where the rows of --in have a field answer or error of their own.")
]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens of an answer at most.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens of this joint probability.")]
TopK = Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0 is all.")]
Engine = Annotated[EngineHere, typer.Option("--engine", help="own, or llama: llama.cpp holds a GGUF base, quantised as it is.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"softprompt {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")] = False,
) -> None:
    """What stands before a verb."""


def arrange(groups: Mapping[str, Sequence[str]]) -> None:
    """Puts the verbs in the order and under the headings that --help shows them in."""
    order = {verb: (place, heading) for place, (heading, verb) in enumerate((key, verb) for key, verbs in groups.items() for verb in verbs)}
    for verb in app.registered_commands:
        verb.rich_help_panel = order[_name(verb)][1]
    app.registered_commands.sort(key=lambda verb: order[_name(verb)][0])


def _name(verb: CommandInfo) -> str:
    return verb.name or verb.callback.__name__  # type: ignore[union-attr]


def config_of(settings: list[str] | None) -> Any:
    from softprompt.config import load_config

    first, *rest = settings or [""]
    if "=" in first or not first:
        return load_config(None, settings or ())
    return load_config(first, rest)


def base_by(engine: EngineHere, config: Any, *, memory_bytes: int | None = None) -> Any:
    """The base that a configuration names, held by an engine. `memory_bytes`: what llama.cpp may keep of prompts and answers."""
    if engine == EngineHere.own:
        from softprompt import load_base

        return load_base(config)
    from softprompt.llama.base import load_gguf

    return load_gguf(config, memory_bytes=memory_bytes)


def write_json(file: Path | None, result: dict[str, Any]) -> None:
    if file is not None and not launched().rank:  # of several processes the first one writes
        write_result("--json", file, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def write_result(option: str, file: Path, text: str) -> None:
    """Writes what a command's `option` asks for, whole or not at all. Raises ConfigError where it cannot be written."""
    from softprompt.atomic import write_text

    try:
        write_text(file, text)
    except OSError as error:
        raise ConfigError(f"{option} {file}: cannot be written: {error.strerror}") from None
