"""Prompts carried to other engines."""

import re
from pathlib import Path
from typing import Annotated

import typer

from softprompt.cli import completion
from softprompt.cli.options import Json, OtherBase, app, write_json
from softprompt.errors import ConfigError

FORMATS = ("vocab", "gguf", "vllm", "npy", "torch")


@app.command()
def export(
    prompts: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPT... [model.key=value ...]", help="Prompt or run folders, on one base.", autocompletion=completion.base_settings
        ),
    ],
    to: Annotated[
        str, typer.Option(metavar="FORMAT", help=f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}.", autocompletion=lambda: list(FORMATS))
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    default: Annotated[str | None, typer.Option(metavar="NAME", help="The prompt of a chat that names none.")] = None,
    gguf: Annotated[Path | None, typer.Option(metavar="FILE", help="The base as GGUF, where the prompts' base is a folder.")] = None,
    allow_other_base: OtherBase = False,
    json_file: Json = None,
) -> None:
    """Write prompts for other engines: into a model's vocabulary, into a GGUF file, or as rows; read back and checked."""
    overrides = [item for item in prompts if re.match(r"model\.\w+=", item)]
    paths = [Path(item) for item in prompts if item not in overrides]
    if not paths:
        raise ConfigError("name a prompt or run folder")
    from softprompt.cli.prompts import base_config
    from softprompt.export import Wanted, export
    from softprompt.screen.prompts import draw_exported

    wanted = Wanted(paths, to, out, default, gguf)
    result = export(wanted, base_config(paths[0], overrides), allow_other_base=allow_other_base)
    draw_exported(result)
    write_json(json_file, result)
