"""The data, before anything is trained."""

from pathlib import Path
from typing import Annotated

import typer

from softprompt.cli.options import Json, Settings, app, config_of, write_json, write_result


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
    from softprompt.show import show

    shown = show(config)
    draw_rows(shown, rows)
    if html is not None:
        from softprompt.show.page import page

        write_result("--html", html, page(shown, config, rows))
    write_json(json_file, shown.as_dict(rows))
