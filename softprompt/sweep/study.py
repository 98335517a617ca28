"""The trials of a sweep as Optuna keeps them: in a journal file, or in a database. All are drawn before the first one runs and wait in its
queue; a bank belongs to the process that holds the lock of its file, which a kill gives back."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from softprompt.atomic import locked
from softprompt.errors import ConfigError, RunError, first_line
from softprompt.extras import need
from softprompt.report import sweeps
from softprompt.sweep.folder import Sweep
from softprompt.sweep.space import Dimension, State, shown

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

STATES: dict[str, State] = {"WAITING": "waiting", "RUNNING": "running", "COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
LINE = 100_000  # bytes of a line of a journal at most
UNLOCKED = "start one process alone on this sweep"


@dataclass(frozen=True)
class Seen(sweeps.Trial):
    """A trial as it stands. `step`: the last one that something is known of."""

    step: int | None


class Lock:
    """What JournalFileBackend wants of a lock, by the system, which gives back that of a process that was killed; and half a line that such
    a process has left is taken away before the next one is written."""

    def __init__(self, journal: str) -> None:
        self._journal, self._lock = Path(journal), FileLock(f"{journal}.lock")

    def acquire(self) -> bool:
        self._lock.acquire()
        with open(self._journal, "r+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - LINE))
            tail = file.read()
            if tail and not tail.endswith(b"\n"):
                file.truncate(end - len(tail) + tail.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self._lock.release()


class Trials:
    """The trials of a sweep in its storage."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.study = _study(sweep)

    def fill(self) -> None:
        """Puts what is missing of the drawn trials into the queue."""
        with self._alone("queue"):
            for number in range(len(self.all()), len(self.sweep.spec.trials)):
                values = {key: shown(value) for key, value in self.sweep.spec.trials[number].items()}
                self.study.enqueue_trial(values, user_attrs={"trial": number})

    def _alone(self, name: str) -> Any:
        return locked(self.sweep.path / f".{name}.lock", wait=True, unlocked=UNLOCKED)

    def all(self) -> "list[FrozenTrial]":
        return self.study.get_trials(deepcopy=False)

    def seen(self) -> list[Seen]:
        """All trials, in the order in which they were drawn."""
        return [_seen(trial, values) for trial, values in zip(self.all(), self.sweep.spec.trials, strict=True)]

    def over(self) -> bool:
        return all(trial.state.is_finished() for trial in self.all())

    @contextmanager
    def claimed(self) -> "Iterator[tuple[int, dict[int, Trial]] | None]":
        """The next bank that nobody runs and that is not over, with its trials by number, without those that have failed; None where there
        is none now. It is held for as long as the block lasts. One that somebody has left behind comes first: banks are claimed in their
        order."""
        from optuna.trial import Trial, TrialState

        before = self.all()
        for bank, numbers in enumerate(self.sweep.banks):
            if all(before[number].state.is_finished() for number in numbers):
                continue
            with locked(self.sweep.path / f".bank-{bank:03d}.lock", wait=False, unlocked=UNLOCKED) as ours:
                now = self.all()
                found = {number: now[number] for number in numbers}
                left = [number for number, one in found.items() if not one.state.is_finished()]
                if ours and left:  # else it was finished just now
                    self._begin([found[number] for number in left])
                    yield bank, {number: Trial(self.study, one._trial_id) for number, one in found.items() if one.state != TrialState.FAIL}
                    return
        yield None

    def _begin(self, trials: "list[FrozenTrial]") -> None:
        """Says that these trials run, with their settings."""
        from optuna.trial import Trial, TrialState

        for found in trials:
            if found.state == TrialState.WAITING:  # `ask` takes whichever waits for longest
                self.study._storage.set_trial_state_values(found._trial_id, TrialState.RUNNING)
            trial = Trial(self.study, found._trial_id)
            for dimension in self.sweep.spec.dimensions:
                _suggest(trial, dimension)

    def importance(self) -> dict[str, float]:
        """How much each setting decides of the loss (PED-ANOVA; Watanabe et al. 2023), as shares; empty where too few trials can tell."""
        import optuna

        with suppress(RuntimeError, ValueError):
            found = optuna.importance.get_param_importances(self.study)
            return {key: share for key, share in found.items() if share == share}
        return {}


def _suggest(trial: "Trial", one: Dimension) -> None:
    """Says which value the trial has, which the queue holds."""
    if one.choices:
        trial.suggest_categorical(one.key, [shown(value) for value in one.choices])
    elif one.whole:
        trial.suggest_int(one.key, int(one.low), int(one.high), log=one.log)
    else:
        trial.suggest_float(one.key, one.low, one.high, log=one.log)


def _seen(trial: "FrozenTrial", values: dict[str, Any]) -> Seen:
    steps = trial.intermediate_values
    loss = trial.value if trial.value is not None else min(steps.values(), default=None)
    told = trial.user_attrs
    last = told.get("steps", max(steps, default=None))
    return Seen(trial.number, values, STATES[trial.state.name], loss, told.get("prompt"), told.get("note"), last)


def _study(sweep: Sweep) -> "Study":
    need("optuna", "softprompt sweep")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = _storage(sweep.storage)
    if "://" not in sweep.storage:
        others = [name for name in optuna.get_all_study_names(storage) if name != sweep.spec.id]
        if others:
            raise ConfigError(f"{sweep.storage} holds the trials of another sweep ({others[0]}): name another file with --storage, or none")
    pruner: Any = optuna.pruners.MedianPruner() if sweep.spec.prune else optuna.pruners.NopPruner()
    sampler = optuna.samplers.RandomSampler(seed=0)  # never asked: every trial brings its settings
    return optuna.create_study(storage=storage, study_name=sweep.spec.id, sampler=sampler, pruner=pruner, load_if_exists=True)


def _check_journal(file: Path) -> None:
    """Raises ConfigError for a file that is there and is no journal of Optuna: nothing is added to it."""
    begin = b""
    if file.is_file():
        with open(file, "rb") as journal:
            begin = journal.readline(LINE)
    if begin.endswith(b"\n") and b'"op_code"' not in begin:
        raise ConfigError(f"--storage {file}: the file is there, and is no journal of Optuna's: name another one")


def _storage(place: str) -> Any:
    import optuna
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    try:
        if "://" in place:
            return RDBStorage(place)
        _check_journal(Path(place))
        return JournalStorage(JournalFileBackend(place, lock_obj=Lock(place)))  # type: ignore[arg-type]
    except ConfigError:
        raise
    except OSError as error:
        raise RunError(f"{place}: the trials cannot be kept there: {error.strerror or error}") from None
    except (ImportError, optuna.exceptions.StorageInternalError) as error:
        raise ConfigError(f"--storage {place}: {first_line(error)}") from None
    except Exception as error:  # of a file that is something else, or of the database's own driver
        raise ConfigError(f"--storage {place} cannot be opened as a storage of Optuna: {first_line(error)}") from None
