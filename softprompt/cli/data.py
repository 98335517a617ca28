"""The data, before anything is trained."""

from pathlib import Path
from typing import Annotated

import typer

from softprompt.cli.options import Json, Overrides, Settings, app, config_of, write_json, write_result
from softprompt.errors import ConfigError


@app.command()
def show(
    settings: Settings = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows to print in full.")] = 3,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as one HTML page.")] = None,
    json_file: Json = None,
) -> None:
    """Print rows as the model will see them, supervised tokens coloured; then what is in the data and what is wrong with it."""
    config = config_of(settings)
    from softprompt.screen.data import draw_rows
    from softprompt.screen.run import follow_reading
    from softprompt.show import showing

    shown = follow_reading(showing(config))
    draw_rows(shown, rows)
    if html is not None:
        from softprompt.show.page import page

        write_result("--html", html, page(shown, config, rows))
    write_json(json_file, shown.as_dict(rows))


@app.command()
def init(
    data: Annotated[str, typer.Argument(metavar="DATA", help="The rows: a file, a folder or a hub id, as in data.train.")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The configuration to write; must not exist.")] = Path("my.toml"),
) -> None:
    """Look at rows and write a configuration for them, to be read and changed: template, length, labels, a first text prompt. With
    model.name=BASE, lengths are measured with its tokenizer."""
    if out.exists():
        raise ConfigError(f"--out {out} exists: choose another file")
    from softprompt.draft import draft
    from softprompt.screen.console import console

    drafted = draft(data, overrides or [])
    write_result("--out", out, drafted.text)
    named = "" if drafted.has_base else "name your base in it, then "
    console.print(f"{drafted.found}; written to {out}: {named}softprompt show {out}, softprompt train {out}", markup=False)
