"""The data, before anything is trained."""

from typing import Annotated

import typer

from softprompt.cli.options import Json, Settings, app, config_of, write_json


@app.command()
def show(
    settings: Settings = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows to print in full.")] = 3,
    json_file: Json = None,
) -> None:
    """Print rows as the model will see them, supervised tokens coloured, and a summary."""
    config = config_of(settings)
    from softprompt.screen.data import draw_rows
    from softprompt.show import show

    shown = show(config)
    draw_rows(shown, rows)
    write_json(json_file, shown.as_dict(rows))
