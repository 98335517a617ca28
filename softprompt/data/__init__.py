"""Rows in a file, folder or hub data set -> Example. What cannot be used is rejected with its place and the reason.

This package does not import torch.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
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
from softprompt.errors import DataError

NUM_LOOKED_AT = 100  # rows, for the names of their columns


def load_examples(
    source: str | Sequence[str],
    *,
    limit: int | None = None,
    label_words: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> Loaded:
    """Reads `source`, one or several (see `data.train` in the configuration) into examples and rejected rows.

    Raises DataError when the source cannot be read at all or holds no row.
    """
    examples: list[Example] = []
    rejected: list[Rejected] = []
    notes: list[str] = []
    unused: Counter[str] = Counter()
    first: list[Mapping[str, Any]] = []
    num_rows = 0
    for place, row in rows_of(source):
        if isinstance(row, Note):
            notes.append(f"{place}: {row.text}")
            continue
        if num_rows == limit:
            break
        num_rows += 1
        try:
            if isinstance(row, Unusable):
                raise row
            examples.append(example_of(row, place, label_words or {}, columns or {}))
            unused.update(unused_columns(row, columns or {}))
        except Unusable as reason:
            rejected.append(Rejected(place, str(reason)))
            if isinstance(row, Mapping) and len(first) < NUM_LOOKED_AT:
                first.append(row)
    if num_rows == 0:
        raise DataError(f"{source if isinstance(source, str) else ', '.join(source)}: no rows")
    if not examples and not columns:
        rejected[0] = replace(rejected[0], reason=rejected[0].reason + _hint(first))
    notes += [f"column {name} of {count} row{'' if count == 1 else 's'} is not used" for name, count in unused.items()]
    return Loaded(tuple(examples), tuple(rejected), tuple(notes))


def _hint(rows: Sequence[Mapping[str, Any]]) -> str:
    """What to write about rows whose columns have other names, where these say anything."""
    found = suggest_columns(rows) if rows else None
    return f"; by their names: {as_setting(found)}" if found and any(name != own for name, own in found.items()) else ""


def first_rows(source: str, count: int) -> list[Mapping[str, Any]]:
    """Up to `count` rows of a source as they are, those that have fields, whatever their shape. Raises DataError as `load_examples`."""
    return [row for _, row in islice(rows_of(source), count) if isinstance(row, Mapping)]


def hold_out(loaded: Loaded, fraction: float, seed: int) -> tuple[Loaded, Loaded]:
    """Splits off `fraction` of the different examples (at least one), chosen by `seed`; both parts keep the file's order. Copies of a
    row, up to white space, stay on one side."""
    different = list(dict.fromkeys(example.turns for example in loaded.examples))
    num_held = max(1, round(fraction * len(different)))
    if num_held >= len(different):
        raise DataError(f"data.eval_fraction = {fraction} of {len(different)} different rows leaves nothing to train on")
    held = {different[index] for index in random.Random(seed).sample(range(len(different)), num_held)}
    train = tuple(example for example in loaded.examples if example.turns not in held)
    evaluation = tuple(example for example in loaded.examples if example.turns in held)
    return Loaded(train, loaded.rejected, loaded.notes), Loaded(evaluation, ())
