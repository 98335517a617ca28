"""A text, or examples, into a prompt."""

from pathlib import Path
from typing import Annotated

import typer

from softprompt.cli.options import Json, Settings, app, config_of, write_json
from softprompt.cli.training import followed, resumed
from softprompt.errors import ConfigError


@app.command()
def distil(
    settings: Settings = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with the run in this folder.")] = None,
    json_file: Json = None,
) -> None:
    """Train a soft prompt to answer as the base does with a text, or examples, in its context; needs no answers."""
    config = resumed(resume, settings) if resume else config_of(settings)
    if not config.distil.wanted:
        raise ConfigError("nothing to distil: set distil.text, distil.file or distil.examples; softprompt train learns from answers")
    result = followed(config, resume=resume is not None)
    write_json(json_file, {**result["distilled"], "seconds": result["seconds"], "prompt": result["prompt"]})
