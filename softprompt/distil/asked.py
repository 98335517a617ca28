"""The questions that a teacher is asked: the user's own, answers not needed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from softprompt.config import Config
from softprompt.data import Example, Message, Questions, held_of, load_examples
from softprompt.data.questions import ANY
from softprompt.encode import question_fields
from softprompt.errors import ConfigError, DataError

HELD_OUT = 0.1  # of the questions, where neither data.eval nor data.eval_fraction says


@dataclass(frozen=True)
class Asked:
    """Questions to learn from and to measure on, each with ANY for an answer. `known`: rows with answers, to take examples from."""

    train: tuple[Example, ...]
    held: tuple[Example, ...]
    known: tuple[Example, ...] = ()

    def without(self, shots: Sequence[Example], count: int | None) -> "Asked":
        """The questions that the teacher is not shown with their answers, `count` to learn from at most."""
        shown = {shot.messages[:-1] for shot in shots}
        left = tuple(one for one in self.train if one.messages[:-1] not in shown)[:count]
        return replace(self, train=left, held=tuple(one for one in self.held if one.messages[:-1] not in shown))


def own_questions(config: Config) -> Asked:
    """What `distil.questions`, `data.train` and `data.eval` ask; nothing to learn from where the base is to ask itself.

    Raises ConfigError for examples without rows, DataError for a source without a question.
    """
    data, own = config.data, config.distil.questions
    known: tuple[Example, ...] = ()
    if data.train is not None and (own is None or config.distil.examples is not None):
        loaded = load_examples(data.train, limit=data.limit, label_words=data.label_words, columns=data.columns, stream=data.stream)
        known = tuple(loaded.examples)
    if config.distil.examples is not None and not known:
        raise ConfigError("distil.examples needs rows to take them from: set data.train")
    train = _of_file(own, config) if own is not None else tuple(one.answered(ANY) for one in known)
    if data.eval is not None:
        sources = (data.eval,) if isinstance(data.eval, str) else data.eval
        return Asked(train, tuple(question for one in sources for question in _of_file(one, config)), known)
    return replace(split(train, config), known=known) if train else Asked((), (), known)


def split(questions: Sequence[Example], config: Config) -> Asked:
    """The questions, some of them held out."""
    sides = held_of([one.turns for one in questions], config.data.eval_fraction or HELD_OUT, config.train.seed)
    pairs = list(zip(questions, sides, strict=True))
    return Asked(tuple(one for one, out in pairs if not out), tuple(one for one, out in pairs if out))


def unanswered(turns: Sequence[Message], place: str, fields: dict[str, object]) -> Example:
    """A question as a row that waits for its answer."""
    return Example((*turns, Message("assistant", ANY)), place, fields={**question_fields(turns[-1].content), **fields})


def _of_file(source: str, config: Config) -> tuple[Example, ...]:
    questions = Questions(source, config.data.columns)
    rows = questions.part(0, questions.survey(()).num_rows)
    found = [unanswered(row.turns, row.place, dict(row.fields)) for row in rows if row.turns]
    if not found:
        raise DataError(f"{source}: no question can be used: {rows[0].reason}")
    return tuple(found)
