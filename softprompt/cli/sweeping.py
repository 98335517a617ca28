"""Many prompts with different settings."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from softprompt.cli.options import Json, Settings, app, write_json
from softprompt.errors import ConfigError


@app.command()
def sweep(
    settings: Settings = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="How many; left out, the whole grid of lists, and 30 where there is a range.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes of this machine that train.")] = 1,
    bank: Annotated[int, typer.Option(min=1, help="Trials that may share a run.")] = 8,
    test: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows that judge the best prompt; left out, a part of the held-out rows.")
    ] = None,
    prune: Annotated[bool, typer.Option(help="Whether runs are ended early that are worse than the median.")] = True,
    storage: Annotated[
        str | None, typer.Option(metavar="FILE", help="Journal or address of a database for Optuna; left out, a file in the folder.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="SWEEP", help="Go on with a sweep, or help with it, from any machine.")] = None,
    json_file: Json = None,
) -> None:
    """Train prompts with different settings, e.g. 'prompt.length=8,16,32' 'optim.relative_lr=0.05..0.5:log', and judge the best."""
    from softprompt.extras import need

    for package in ("optuna", "matplotlib"):
        need(package, "softprompt sweep")
    if resume is not None and settings:
        raise ConfigError(f"--resume takes its settings from {resume}: leave out {settings[0]}")
    from softprompt.screen.sweeping import draw_outcome, draw_sweep
    from softprompt.sweep.best import concluded
    from softprompt.sweep.folder import create_sweep, open_sweep
    from softprompt.sweep.running import running

    if resume is not None:
        found = open_sweep(resume)
    else:
        found = create_sweep(settings or [], trials=trials, most=bank, prune=prune, test=test, storage=storage)
    try:
        draw_sweep(found, running(found, workers))
    except KeyboardInterrupt:
        print(f"stopped; go on with: softprompt sweep --resume {found.path}", file=sys.stderr)
        raise typer.Exit(130) from None
    outcome = concluded(found)
    draw_outcome(found, outcome)
    write_json(json_file, outcome.as_dict())
