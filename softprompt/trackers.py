"""Experiment trackers, through accelerate: numbers by step, and tables by each tracker's own means."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.config import Config
from softprompt.events import Cell, Evaluated, Event, Finished, Sampled, Step
from softprompt.extras import need

PROJECT = "softprompt"  # what the trackers call a project or an experiment


@dataclass(frozen=True)
class Sheet:
    """A table under a name."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Tracking:
    """What reports to every tracker of a run; to none where the configuration names none."""

    trackers: Sequence[Any]  # accelerate's GeneralTracker

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(dict(values), step=step)

    def table(self, sheet: Sheet, step: int) -> None:
        for tracker in self.trackers:
            TABLES[tracker.name](tracker, sheet, step)


def check_trackers(names: Sequence[str]) -> None:
    """Raises MissingPackage when one of them is not installed."""
    for package in names:
        need(package, f"train.trackers = {package}")


@contextmanager
def tracking(names: Sequence[str], config: Config, path: Path, called: str) -> Iterator[Tracking]:
    """Opens a run `called` so in every tracker that `names` holds, with the settings; TensorBoard's files lie in the folder `path`."""
    if not names:
        yield Tracking(())
        return
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, log_with=list(names), project_dir=str(path))
    flat = {f"{section}.{key}": value for section, table in config.model_dump(mode="json").items() for key, value in table.items()}
    settings = {key: value for key, value in flat.items() if isinstance(value, int | float | str | bool)}
    accelerator.init_trackers(PROJECT, settings, {"wandb": {"name": called}, "mlflow": {"run_name": called}, "trackio": {"name": called}})
    try:
        yield Tracking(accelerator.trackers)
    finally:
        accelerator.end_training()


def tracked(events: Generator[Event, None, None], config: Config) -> Iterator[Event]:
    """The events of a run as they are, told to the trackers that its configuration names."""
    folder = Path(config.train.out)
    with closing(events), tracking(config.train.trackers, config, folder, folder.name) as track:
        for event in events:
            match event:
                case Step():
                    numbers = {"loss": event.loss, "lr": event.lr, "grad_norm": event.grad_norm, "movement": event.movement}
                    track.numbers(numbers, event.step)
                case Evaluated():
                    track.numbers({"eval_loss": event.loss}, event.step)
                case Sampled():
                    track.table(Sheet("samples", ("question", "wanted", "answer"), event.rows), event.step)
                case Finished():
                    track.table(_losses(event.result), event.step)
            yield event


def _losses(result: Mapping[str, Any]) -> Sheet:
    """The losses of every prompt of a run."""
    columns = ("train_loss", "eval_loss_before", "eval_loss_after", "best_step")
    rows = tuple((name, *(found[key] for key in columns)) for name, found in result["prompts"].items())
    return Sheet("prompts", ("prompt", *columns), rows)


# ---- a table, tracker by tracker -----------------------------------------------------------------------------------


def _tensorboard(tracker: Any, sheet: Sheet, step: int) -> None:
    """As Markdown, which its page of texts draws as a table."""
    lines = [sheet.columns, ["---"] * len(sheet.columns), *sheet.rows]
    tracker.log({sheet.name: "\n".join("| " + " | ".join(map(_markdown, line)) + " |" for line in lines)}, step=step)


def _markdown(cell: Cell) -> str:
    text = "" if cell is None else f"{cell:.4f}" if isinstance(cell, float) else str(cell)
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")


def _wandb(tracker: Any, sheet: Sheet, step: int) -> None:
    tracker.log_table(sheet.name, columns=list(sheet.columns), data=[list(row) for row in sheet.rows], step=step)


def _mlflow(tracker: Any, sheet: Sheet, step: int) -> None:
    """As an artifact of the run."""
    import mlflow

    mlflow.log_table(_frame(sheet), f"{sheet.name}.json")


def _trackio(tracker: Any, sheet: Sheet, step: int) -> None:
    import trackio

    tracker.log({sheet.name: trackio.Table(dataframe=_frame(sheet))}, step=step)


def _frame(sheet: Sheet) -> Any:
    import pandas

    return pandas.DataFrame(list(sheet.rows), columns=list(sheet.columns), dtype=object)


TABLES: dict[str, Callable[[Any, Sheet, int], None]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
