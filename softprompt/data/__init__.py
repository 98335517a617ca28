"""Rows in a file, folder or hub data set -> Example. What cannot be used is rejected with its place and the reason.

This package does not import torch.
"""

import random
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from softprompt.data.examples import Example as Example
from softprompt.data.examples import Loaded as Loaded
from softprompt.data.examples import Message as Message
from softprompt.data.examples import Rejected as Rejected
from softprompt.data.examples import Unusable
from softprompt.data.files import Note, rows_of
from softprompt.data.naming import as_setting
from softprompt.data.naming import suggest_columns as suggest_columns
from softprompt.data.questions import Questions as Questions
from softprompt.data.questions import Unanswered as Unanswered
from softprompt.data.shapes import example_of, unused_columns
from softprompt.data.shapes import more_of as more_of
from softprompt.errors import DataError

NUM_LOOKED_AT = 100  # rows, for the names of their columns


class Reading:
    """One pass over the rows of a source, or of several (see `data.train` in the configuration): examples and rejected rows in turn.

    `part`: the number of the source that is being read. `notes`: what was assumed about the files, and columns that are not used; whole
    when the pass has ended.
    """

    def __init__(
        self,
        source: str | Sequence[str],
        limit: int | None = None,
        label_words: Mapping[str, str] | None = None,
        columns: Mapping[str, str] | None = None,
        stream: bool = False,
    ) -> None:
        self.source, self.limit, self.label_words, self.columns, self.stream = source, limit, label_words or {}, columns or {}, stream
        self.part = 0
        self._notes: list[str] = []
        self._unused: Counter[str] = Counter()
        self._first: list[Mapping[str, Any]] = []  # rows that were rejected, for the names of their columns

    def __iter__(self) -> Iterator[Example | Rejected]:
        """Raises DataError when a source cannot be read at all, or no row is found."""
        sources = (self.source,) if isinstance(self.source, str) else self.source
        rows = ((part, place, row) for part, one in enumerate(sources) for place, row in rows_of(one, stream=self.stream))
        num_rows = 0
        for self.part, place, row in rows:
            if isinstance(row, Note):
                self._notes.append(f"{place}: {row.text}")
                continue
            if num_rows == self.limit:
                break
            num_rows += 1
            yield self._read(place, row)
        if num_rows == 0:
            raise DataError(f"{', '.join(sources)}: no rows")

    def _read(self, place: str, row: Any) -> Example | Rejected:
        try:
            if isinstance(row, Unusable):
                raise row
            example = example_of(row, place, self.label_words, self.columns)
        except Unusable as reason:
            if isinstance(row, Mapping) and len(self._first) < NUM_LOOKED_AT:
                self._first.append(row)
            return Rejected(place, str(reason))
        self._unused.update(unused_columns(row, self.columns))
        return example

    @property
    def notes(self) -> tuple[str, ...]:
        unused = (f"column {name} of {count} row{'' if count == 1 else 's'} is not used" for name, count in self._unused.items())
        return (*self._notes, *unused)

    def hint(self) -> str:
        """What to write where not a single row fits: whose columns have other names, as far as these say anything."""
        found = suggest_columns(self._first) if self._first and not self.columns else None
        return f"; by their names: {as_setting(found)}" if found and any(name != own for name, own in found.items()) else ""


def load_examples(
    source: str | Sequence[str],
    *,
    limit: int | None = None,
    label_words: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
    stream: bool = False,
) -> Loaded:
    """Reads `source`, one or several (see `data.train` in the configuration) into examples and rejected rows. `stream`: a hub data set is
    read as it comes.

    Raises DataError when the source cannot be read at all or holds no row.
    """
    reading = Reading(source, limit, label_words, columns, stream)
    examples: list[Example] = []
    rejected: list[Rejected] = []
    for row in reading:
        (examples if isinstance(row, Example) else rejected).append(row)  # type: ignore[arg-type]
    if not examples:
        rejected[0] = replace(rejected[0], reason=rejected[0].reason + reading.hint())
    return Loaded(tuple(examples), tuple(rejected), reading.notes)


def first_rows(source: str, count: int) -> list[Mapping[str, Any]]:
    """Up to `count` rows of a source as they are, those that have fields, whatever their shape. Raises DataError as `load_examples`."""
    return [row for _, row in islice(rows_of(source), count) if isinstance(row, Mapping)]


def held_of(turns: Sequence[Hashable], fraction: float, seed: int) -> list[bool]:
    """Whether each row is held out: `fraction` of the different ones (at least one), chosen by `seed`. Rows are the same where their
    `turns` are, so that copies stay on one side. Raises DataError where none would be left."""
    different = list(dict.fromkeys(turns))
    num_held = max(1, round(fraction * len(different)))
    if num_held >= len(different):
        raise DataError(f"data.eval_fraction = {fraction} of {len(different)} different rows leaves nothing to train on")
    held = {different[index] for index in random.Random(seed).sample(range(len(different)), num_held)}
    return [one in held for one in turns]
