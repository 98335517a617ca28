"""Prompts carried to other engines."""

import re
from pathlib import Path
from typing import Annotated

import typer

from softprompt.cli import completion
from softprompt.cli.options import Json, OtherBase, app, write_json
from softprompt.errors import ConfigError

FORMATS = ("vocab", "gguf", "vllm", "npy", "torch", "slots", "mlx")

Prompts = Annotated[
    list[str],
    typer.Argument(
        metavar="PROMPT... [model.key=value ...]", help="Prompt or run folders, on one base.", autocompletion=completion.base_settings
    ),
]


@app.command()
def export(
    prompts: Prompts,
    to: Annotated[
        str, typer.Option(metavar="FORMAT", help=f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}.", autocompletion=lambda: list(FORMATS))
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    default: Annotated[str | None, typer.Option(metavar="NAME", help="The prompt of a chat that names none.")] = None,
    gguf: Annotated[Path | None, typer.Option(metavar="FILE", help="The base as GGUF, where the prompts' base is a folder.")] = None,
    cache_type: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Of slots: the server's --cache-type-k and --cache-type-v, by default f16.")
    ] = None,
    allow_other_base: OtherBase = False,
    json_file: Json = None,
) -> None:
    """Write prompts for other engines: into a vocabulary, into a GGUF file, as rows, or as keys and values; read back and checked."""
    paths, overrides = _split(prompts)
    from softprompt.cli.prompts import base_config
    from softprompt.export import Wanted, export
    from softprompt.screen.prompts import draw_exported

    wanted = Wanted(paths, to, out, default, gguf, cache_type)
    result = export(wanted, base_config(paths[0], overrides), allow_other_base=allow_other_base)
    draw_exported(result)
    write_json(json_file, result)


@app.command()
def attach(
    address: Annotated[str, typer.Argument(metavar="URL", help="A llama.cpp server that runs, e.g. http://127.0.0.1:8080.")],
    prompts: Prompts,
    slots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder that the server was started with as --slot-save-path.")
    ] = None,
    key_file: Annotated[Path | None, typer.Option("--api-key-file", metavar="FILE", help="The key that the server asks for.")] = None,
    allow_other_base: OtherBase = False,
    json_file: Json = None,
) -> None:
    """Put prompts into a llama.cpp server that runs, and show how to ask it; each is checked by answers of the server."""
    paths, overrides = _split(prompts)
    from softprompt.cli.chat import key_of
    from softprompt.cli.prompts import base_config
    from softprompt.export import Target, attach
    from softprompt.screen.prompts import draw_attached

    target = Target(address, slots, None if key_file is None else key_of(key_file))
    result = attach(target, paths, base_config(paths[0], overrides), allow_other_base=allow_other_base)
    draw_attached(result)
    write_json(json_file, result)


def _split(given: list[str]) -> tuple[list[Path], list[str]]:
    """Prompts, and settings of their base. Raises ConfigError without a prompt."""
    overrides = [item for item in given if re.match(r"model\.\w+=", item)]
    paths = [Path(item) for item in given if item not in overrides]
    if not paths:
        raise ConfigError("name a prompt or run folder")
    return paths, overrides
