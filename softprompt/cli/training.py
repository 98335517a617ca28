"""A run: planned, trained, looked at."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from softprompt.cli.options import Json, Overrides, Settings, app, config_of, write_json
from softprompt.engine.launched import launched
from softprompt.errors import ConfigError


@app.command()
def plan(settings: Settings = None, json_file: Json = None) -> None:
    """Count parameters and memory from the base's configuration, without its weights."""
    config = config_of(settings)
    from softprompt.plan import make_plan
    from softprompt.screen.run import draw_plan

    planned = make_plan(config)
    draw_plan(planned)
    write_json(json_file, planned.as_dict())


@app.command()
def train(
    settings: Settings = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with the run in this folder.")] = None,
    json_file: Json = None,
) -> None:
    """Train a soft prompt."""
    config = resumed(resume, settings) if resume else config_of(settings)
    write_json(json_file, followed(config, resume=resume is not None))


@app.command()
def doctor(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    overrides: Overrides = None,
    json_file: Json = None,
) -> None:
    """Say what is wrong with a finished run, with the number and what to do; compares it with what it must beat."""
    from softprompt.doctor import diagnose
    from softprompt.screen.run import draw_findings

    findings = diagnose(run, overrides=overrides or [])
    draw_findings(findings)
    write_json(json_file, {"run": str(run), "findings": findings})


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, finished or not.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The page; left out, report.html in the run.")] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows whose answers are shown.")] = 12,
    json_file: Json = None,
) -> None:
    """Write what runs have left as one HTML page: curves, contestants, answers, the rows of the prompts; one run or several."""
    from softprompt.report import write_report
    from softprompt.screen.console import console

    file = write_report(runs, out, num_rows=rows)
    console.print(f"written to {file}", markup=False)
    write_json(json_file, {"report": str(file), "runs": [str(run) for run in runs]})


@app.command()
def demo(overrides: Overrides = None) -> None:
    """Train, evaluate and try a prompt on the embedded task: customer messages to JSON, with Gemma 3 270M."""
    from softprompt.demo import run_demo

    run_demo(overrides or [])


def followed(config: Any, **how: Any) -> dict[str, Any]:
    """Trains on the screen; the run's result. Ctrl-C says how to go on."""
    from softprompt.events import Finished
    from softprompt.screen.run import draw_run
    from softprompt.training import train

    result: dict[str, Any] = {}

    def remembered() -> Any:
        for event in train(config, **how):
            if isinstance(event, Finished):
                result.update(event.result)
            yield event

    try:
        draw_run(remembered(), config.train.log_every)
    except KeyboardInterrupt:
        kept = (Path(config.train.out) / "config.toml").is_file()
        told = f"stopped; go on with: softprompt train --resume {config.train.out}" if kept else "stopped before the run began"
        if not launched().rank:
            print(told, file=sys.stderr)
        raise typer.Exit(130) from None
    return result


def resumed(run: Path, settings: list[str] | None) -> Any:
    """A run goes on as it began, wherever its base lies now. Of several processes the first one reads its folder."""
    from softprompt.config import load_config
    from softprompt.engine.processes import joined
    from softprompt.locations import PLACE, relocated, with_absolute_paths
    from softprompt.runlog import RunFolder

    may = tuple(f"model.{key}=" for key in (*PLACE, "trust_remote_code"))
    for setting in settings or ():
        if not setting.startswith(may):
            raise ConfigError(f"--resume takes its settings from {run}, but for {', '.join(key[:-1] for key in may)}: leave out {setting}")
    with joined() as world:
        config = load_config(world.told(lambda: RunFolder.reopen(run).config().model_dump(mode="json", exclude_none=True)))
    return with_absolute_paths(config.model_copy(update={"model": relocated(config.model, settings or ())}))
