"""What came of an evaluation: every contestant's scores, and what their differences can tell."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from softprompt.metrics import Estimate, Table, Verdict, confusion, reliability
from softprompt.trackers import Sheet

NUM_SAMPLES = 8  # rows whose answers trackers are shown


@dataclass(frozen=True)
class Result:
    """One contestant: its scores by metric, the tokens that each request has more than the bare base's, its table; how many examples
    it is shown, how many of its answers did not end. `milliseconds`: beside a teacher, what reading these tokens takes where none of them
    is kept from an earlier request."""

    scores: dict[str, Estimate]
    tokens: float
    table: Table
    num_shots: int = 0
    num_unended: int | None = None
    milliseconds: float | None = None

    def __getitem__(self, metric: str) -> float:
        """A score by its metric's name. Raises KeyError for what was not measured."""
        return self.scores[metric].value


@dataclass(frozen=True)
class Evaluation:
    """What came of a contest. `metric` is the one that the verdicts go by; `questions` those of the rows; `folder`: where it lies.
    `lost`: of every prompt that competes with its teacher, the scores that lie below the teacher's interval."""

    contestants: dict[str, Result]
    verdicts: list[Verdict]
    metric: str
    num_rows: int
    num_supervised: int
    num_rejected: int
    labels: tuple[str, ...]
    questions: tuple[str, ...] = ()
    folder: Path | None = None
    lost: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The documented JSON of `softprompt eval`."""
        return {
            "contestants": {
                name: {"loss": None, "perplexity": None, "accuracy": None}
                | {metric: one.value for metric, one in result.scores.items()}
                | {"tokens": result.tokens, "shots": result.num_shots, "unended_answers": result.num_unended}
                | ({} if result.milliseconds is None else {"milliseconds": result.milliseconds})
                for name, result in self.contestants.items()
            },
            "intervals": {
                name: {metric: [one.low, one.high] for metric, one in result.scores.items()} for name, result in self.contestants.items()
            },
            "metric": self.metric,
            "verdicts": [asdict(one) for one in self.verdicts],
            "labels": list(self.labels),
            "confusion": {name: confusion(result.table) for name, result in self.contestants.items()} if self.labels else None,
            "calibration": {name: reliability(result.table) for name, result in self.contestants.items()} if self.labels else None,
            "rows": self.num_rows,
            "supervised_tokens": self.num_supervised,
            "rejected": self.num_rejected,
            "lost": {name: list(scores) for name, scores in self.lost.items()},
        }

    def sheets(self) -> list[Sheet]:
        """For trackers: the contestants with every score and its interval; where they answered, their answers to the first rows."""
        metrics = list(dict.fromkeys(metric for result in self.contestants.values() for metric in result.scores))
        columns = [column for metric in metrics for column in (metric, f"{metric} from", f"{metric} to")]
        rows = []
        for name, result in self.contestants.items():
            scores = [result.scores.get(metric) for metric in metrics]
            rows.append((name, result.tokens, *(end for one in scores for end in ((one.value, one.low, one.high) if one else [None] * 3))))
        found = [Sheet("contestants", ("contestant", "tokens", *columns), tuple(rows))]
        said = {name: result.table.answers for name, result in self.contestants.items() if result.table.answers is not None}
        if said:
            wanted = next(iter(self.contestants.values())).table.references
            lines = list(zip(self.questions, wanted, *said.values(), strict=True))[:NUM_SAMPLES]
            found.append(Sheet("answers", ("question", "wanted", *said), tuple(lines)))
        return found
