"""A process that works on a sweep: takes a bank, trains it, tells what came of it, until no trial is left.

    python -m softprompt.sweep.work FOLDER [NUMBER]

NUMBER: which of the processes of its machine it is, and so which of the machine's GPUs it takes.
"""

import sys
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from softprompt.config import Config
from softprompt.errors import Diverged, Error
from softprompt.events import Evaluated, Event, Finished
from softprompt.sweep.folder import Sweep, name_of, open_sweep
from softprompt.sweep.study import Trials
from softprompt.training import train

if TYPE_CHECKING:
    from optuna.trial import Trial

    from softprompt.engine.model import FrozenBase

WAIT_SECONDS = 1.0  # between two looks at what the others have left


class Worker:
    """One process of a sweep; the base is loaded once."""

    def __init__(self, sweep: Sweep, number: int) -> None:
        self.sweep, self.number = sweep, number
        self.trials = Trials(sweep)
        self.base: FrozenBase | None = None

    def work(self) -> None:
        """Until every trial is over, whoever ran it. Raises an Error that is no trial's, and KeyboardInterrupt when it is told to stop."""
        self.trials.fill()
        while not self.trials.over():
            with self.trials.claimed() as claim:
                if claim is None:
                    time.sleep(WAIT_SECONDS)
                else:
                    self._train(*claim)

    def _train(self, bank: int, trials: "dict[int, Trial]") -> None:
        """Trains a bank to its end. A trial whose loss is not finite has failed, and the others begin anew without it: a bank's numbers
        are those of all its prompts together."""
        left = dict(trials)
        if any(self.trials.all()[number].state.name == "PRUNED" for number in left):  # killed while it said so
            self._prune(left)
            return
        while left:
            try:
                self._run(self._placed(self.sweep.config_of(bank, list(left))), left)
                return
            except Diverged as error:
                (lost,) = (number for number in left if name_of(number) == error.prompt)
                left.pop(lost).set_user_attr("note", str(error).removeprefix(f"{error.prompt}: "))
                self._tell(lost, "FAIL", None)

    def _run(self, config: Config, trials: "dict[int, Trial]") -> None:
        begun = (Path(config.train.out) / "config.toml").is_file()
        by_name = {name_of(number): trial for number, trial in trials.items()}
        run = cast("Generator[Event, None, None]", train(config, resume=begun, base=self._loaded(config)))
        with closing(run) as events:
            for event in events:
                if isinstance(event, Evaluated):
                    _report(by_name, event)
                    if event.step and all(trial.should_prune() for trial in trials.values()):
                        self._prune(trials)
                        return
                if isinstance(event, Finished):
                    self._finish(event.result, by_name)

    def _prune(self, trials: "dict[int, Trial]") -> None:
        for number in trials:
            if not self._is_over(number):
                self._tell(number, "PRUNED", None)

    def _is_over(self, number: int) -> bool:
        return self.trials.all()[number].state.is_finished()

    def _finish(self, result: dict[str, Any], by_name: "dict[str, Trial]") -> None:
        for name, trial in by_name.items():
            if self._is_over(trial.number):  # told before a kill
                continue
            own = result["prompts"][name]
            trial.set_user_attr("prompt", str(Path(own["prompt"]).absolute().relative_to(self.sweep.path.absolute())))
            trial.set_user_attr("steps", result["steps"])
            self._tell(trial.number, "COMPLETE", own["eval_loss_after"])

    def _tell(self, number: int, state: str, value: float | None) -> None:
        from optuna.trial import TrialState

        self.trials.study.tell(number, value, state=TrialState[state])

    def _loaded(self, config: Config) -> "FrozenBase":
        from softprompt.engine.loading import load_base

        self.base = self.base or load_base(config.model)
        return self.base

    def _placed(self, config: Config) -> Config:
        """The configuration on this process's GPU, where there are several and none is named."""
        import torch

        count = torch.cuda.device_count()
        if config.model.device != "auto" or count < 2:
            return config
        return config.model_copy(update={"model": config.model.model_copy(update={"device": f"cuda:{self.number % count}"})})


def _report(by_name: "dict[str, Trial]", event: Evaluated) -> None:
    """The held-out losses, of which a bank that goes on after a kill says some again."""
    for trial, loss in zip(by_name.values(), event.losses, strict=True):
        if event.step not in trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values:
            trial.report(loss, event.step)


def main() -> None:
    """Errors of the user are one line and exit code 2, as from the command line."""
    folder, number = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    try:
        Worker(open_sweep(folder), number).work()
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
