"""What a prompt is distilled on: questions, the teacher's answers to them, and how student and teacher read both.

Questions are the user's own, or written by the base itself; answers are the teacher's. Both are kept in the run's study.jsonl, so that a
run that was stopped goes on. They are made in windows: each is one batch that nothing else joins, so that its texts are the same however
often it is made.
"""

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from softprompt.answers import answer, stops_of
from softprompt.config import Config
from softprompt.contestants import Contestant, Reading, read_rows
from softprompt.data import Example, Message, Rejected
from softprompt.data.examples import turns_text
from softprompt.distil import elsewhere
from softprompt.distil.asked import Asked, own_questions, split, unanswered
from softprompt.distil.context import Context, context_of
from softprompt.distil.lessons import Answered, Classroom, Lessons, Read, rows_of
from softprompt.distil.selfstudy import MOST, TRIES, Asking, as_question, askings, cleaned
from softprompt.encode import Encoder, make_encoder, shared_system
from softprompt.engine.decode import decode_whole
from softprompt.engine.model import FrozenBase
from softprompt.engine.tokens import Encoded
from softprompt.engine.world import World
from softprompt.errors import ConfigError, DataError
from softprompt.events import Studying, returned
from softprompt.predictions import Predictions

Item = TypeVar("Item")
WINDOW = 64  # questions of a batch: what a kill may cost
USUAL_COUNT = 256  # questions of self-study
STUDY = "study.jsonl"
QUESTION, ANSWER = "question", "answer"  # what lines of it hold


Said = list[tuple[int, dict[str, Any]]]  # (number of a question, what a line of study.jsonl says of it)


@dataclass(frozen=True)
class Studied:
    """What a distillation works with: what is taught, what is measured on, and of what it is distilled. `read`: the questions of the
    lessons with the teacher's answers."""

    encoder: Encoder
    lessons: Lessons
    held: Lessons
    context: Context
    classroom: Classroom
    read: tuple[Read, ...]

    @property
    def context_ids(self) -> tuple[int, ...]:
        """What the teacher reads before every question, of all chunks in turn."""
        return tuple(chain.from_iterable(ids for _, ids in self.classroom.contexts))


@dataclass(frozen=True)
class _Work:
    config: Config
    base: FrozenBase
    encoder: Encoder
    context: Context
    teachers: list[Contestant]
    notes: Predictions
    world: World

    def turns(self, items: Iterable[Item]) -> Iterator[list[list[Item]]]:
        """Windows of items, at every turn one for each process."""
        return groups(groups(items, WINDOW), self.world.size)

    def note(self, kind: str, turn: Sequence[Sequence[Item]], number: Callable[[Item], int], say: Callable[[Sequence[Item]], Said]) -> None:
        """Keeps what is said of the windows of a turn, where it is not kept yet."""
        missing = [window for window in turn if any((kind, number(one)) not in self.notes.answers for one in window)]
        for said in self.world.each(len(missing), lambda index: say(missing[index])):
            for of, line in said:
                self.notes.add({"contestant": kind, "row": of, **line})


def studying(config: Config, base: FrozenBase, encoder: Encoder, world: World = World()) -> Generator[Studying, None, Studied]:
    """Questions, answers and lessons of a configuration, as far as they do not lie in the run folder `train.out` yet; the processes take
    windows in turn. Yields how far it is.

    Raises ConfigError where [distil] does not fit, DataError where no question can be used.
    """
    asked = own_questions(config)
    encoder = encoder.told(shared_system(asked.train)) if asked.train else encoder
    context = context_of(config, base, encoder, asked)
    teachers = context.teachers(base, encoder)
    key = _key(config, base, encoder, context, asked)
    notes = Predictions(Path(config.train.out) / STUDY, key, world, "distillation", "train.out")
    work = _Work(config, base, encoder, context, teachers, notes, world)
    if len(teachers) > 1 and (asked.train or asked.held):
        raise ConfigError(
            f"the text is longer than the base's context and is read in {len(teachers)} chunks: leave out distil.questions, data.train and "
            "data.eval, so that each chunk is asked about what it says"
        )
    if not asked.train:
        asked, which = yield from _self_study(work, asked.held)
    else:
        asked = asked.without(context.shots, config.distil.count)
        which = [0] * (len(asked.train) + len(asked.held))
    answered = yield from _answers(work, [*asked.train, *asked.held], which)
    classroom = Classroom(base, encoder, teachers, config.data.max_length)
    train, refused = classroom.read(answered[: len(asked.train)])
    held, refused_held = classroom.read(answered[len(asked.train) :])
    classroom.begin([*train, *held])
    part = _listed if config.distil.teacher is not None else _read
    taught, measured = part(work, classroom, train, refused), part(work, classroom, held, refused_held)
    return Studied(encoder, taught, measured, context, classroom, tuple(train))


def _read(work: _Work, classroom: Classroom, read: Sequence[Read], refused: Sequence[Rejected]) -> Lessons:
    return classroom.lessons(read, refused)


def _listed(work: _Work, classroom: Classroom, read: Sequence[Read], refused: Sequence[Rejected]) -> Lessons:
    """What a teacher elsewhere has said, as it said it."""
    found: list[tuple[Encoded, elsewhere.Told]] = []
    examples: list[Example] = []
    refused = list(refused)
    for one in read:
        example = one.answered.example
        told = elsewhere.Told.of(work.notes.answers[ANSWER, one.answered.number])
        try:
            found.append(elsewhere.read(work.encoder, example, told, work.config.data.max_length))
            examples.append(example)
        except DataError as error:
            refused.append(Rejected(example.source, error.reason))
    rows = rows_of([(row, example) for (row, _), example in zip(found, examples, strict=True)], refused)
    return Lessons(rows, elsewhere.listed(found))


def study_of(config: Config, base: FrozenBase, world: World = World()) -> Studied:
    """What a run in the folder `train.out` was taught. Raises what `studying` raises."""
    encoder = make_encoder(base.tokenizer, config.data.template, date=config.data.date, num_tokens=base.num_tokens)
    return returned(studying(config, base, encoder, world))


def _key(config: Config, base: FrozenBase, encoder: Encoder, context: Context, asked: Asked) -> str:
    how: tuple[object, ...] = (
        base.fingerprint,
        encoder.template.name,
        encoder.template.date,
        encoder.system,
        config.data.max_length,
        config.distil.count,
    )
    how += (config.distil.teacher is not None, config.distil.teacher_model)
    digest = hashlib.sha256(repr((how, context.digest, config.distil.max_new_tokens, config.train.seed)).encode())
    for example in (*asked.train, *asked.held):
        digest.update(turns_text(example).encode())
    return digest.hexdigest()


# ---- questions of the base's own -----------------------------------------------------------------------------------


def _self_study(work: _Work, held: tuple[Example, ...]) -> Generator[Studying, None, tuple[Asked, list[int]]]:
    """Questions that differ from each other, and the number of each one's teacher. `held`: what is measured on, where that is known."""
    wanted, follows = work.config.distil.count or USUAL_COUNT, work.encoder.template.name == "chat"
    found: dict[str, int] = {}
    yield Studying("questions", 0, wanted, _cost(work, wanted))
    for turn in work.turns(islice(askings(work.context.texts, follows), TRIES * wanted)):
        work.note(QUESTION, turn, attrgetter("number"), partial(_questions, work, follows))
        for one in chain.from_iterable(turn):
            question = cleaned(one, work.notes.answers[QUESTION, one.number]["text"])
            if question is not None and len(found) < wanted:
                found.setdefault(question, one.teacher)
        yield Studying("questions", len(found), wanted)
        if len(found) == wanted:
            break
    if len(found) < 2:
        raise DataError("the base asks no questions about the text: name some in distil.questions")
    examples = [unanswered((Message("user", text),), f"self-study:{number}", {}) for number, text in enumerate(found, 1)]
    teacher_of = {one.source: teacher for one, teacher in zip(examples, found.values(), strict=True)}
    asked = Asked(tuple(examples), held) if held else split(examples, work.config)
    return asked, [teacher_of.get(one.source, 0) for one in (*asked.train, *asked.held)]


def _questions(work: _Work, follows: bool, window: Sequence[Asking]) -> Said:
    """What the base asks when it is told to as a window says."""
    seed = work.config.train.seed
    questions = [as_question(one, work.teachers[one.teacher], work.encoder, follows, seed) for one in window]
    found = list(decode_whole(work.base, questions))
    return [(window[row].number, {"text": work.base.tokenizer.decode(ids, skip_special_tokens=True)}) for row, ids, _ in found]


def groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group


def _cost(work: _Work, wanted: int) -> str:
    texts = work.context.texts
    length = sum(len(work.base.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    written = wanted * (MOST + work.config.distil.max_new_tokens)
    chunks = f" in {len(texts)} chunks" if len(texts) > 1 else ""
    return (
        f"self-study: {wanted} questions about a text of {length:,} tokens{chunks}, and their answers: {written:,} tokens to write at most"
    )


# ---- answers -------------------------------------------------------------------------------------------------------


def _answers(work: _Work, asked: Sequence[Example], which: Sequence[int]) -> Generator[Studying, None, list[Answered | Rejected]]:
    """The teacher's answer to every question, or why there is none."""
    stops = _stops(work.encoder, work.teachers[0], asked)
    yield Studying("answers", 0, len(asked))
    say = _said if work.config.distil.teacher is None else _said_elsewhere
    for turn in work.turns(range(len(asked))):
        work.note(ANSWER, turn, int, partial(say, work, asked, which, stops))
        yield Studying("answers", turn[-1][-1] + 1, len(asked))
    found: list[Answered | Rejected] = []
    for number, example in enumerate(asked):
        said = work.notes.answers[ANSWER, number]
        if said["text"].strip():
            found.append(Answered(example.answered(said["text"]), bool(said["ended"]), which[number], number))
        else:
            found.append(Rejected(example.source, "the teacher says nothing"))
    return found


def _readings(
    work: _Work, asked: Sequence[Example], which: Sequence[int], window: Sequence[int]
) -> tuple[dict[str, list[Reading]], dict[tuple[str, int], int]]:
    """How the teachers read the questions of a window; the number of each row of theirs."""
    readings: dict[str, list[Reading]] = {}
    numbers: dict[tuple[str, int], int] = {}
    for teacher, contestant in enumerate(work.teachers):
        own = [number for number in window if which[number] == teacher]
        if own:
            examples = [[asked[number]] for number in own]
            readings[contestant.name] = [read_rows(contestant, 0, examples, [[work.encoder.encode(one)] for (one,) in examples])]
            numbers |= {(contestant.name, row): number for row, number in enumerate(own)}
    return readings, numbers


def _said(work: _Work, asked: Sequence[Example], which: Sequence[int], stops: Sequence[str], window: Sequence[int]) -> Said:
    readings, numbers = _readings(work, asked, which, window)
    said = answer(work.base, readings, list(numbers), work.config.distil.max_new_tokens, stops)
    found = [(numbers[one.contestant, one.row], one) for one in said]
    return [(number, {**_question(asked[number]), "text": one.text, "ended": one.ended}) for number, one in found]


def _said_elsewhere(work: _Work, asked: Sequence[Example], which: Sequence[int], stops: Sequence[str], window: Sequence[int]) -> Said:
    """By a server, WINDOW of them at once."""
    readings, numbers = _readings(work, asked, which, window)
    bos = [] if work.encoder.bos_id is None else [work.encoder.bos_id]
    ends = work.base.stop_ids | work.encoder.end_ids

    def said(place: tuple[str, int]) -> dict[str, Any]:
        reading = readings[place[0]][0]
        told = server.answer([*bos, *reading.context[1], *reading.questions[place[1]]], work.config.distil.max_new_tokens, ends)
        text = work.base.tokenizer.decode(told.ids, skip_special_tokens=True)
        return {**_question(asked[numbers[place]]), "text": text, **told.as_dict()}

    with elsewhere.server(work.config.distil) as server, ThreadPoolExecutor(WINDOW) as pool:
        return list(zip(numbers.values(), pool.map(said, numbers), strict=True))


def _question(example: Example) -> dict[str, str]:
    return {"question": example.messages[-2].content}


def _stops(encoder: Encoder, teacher: Contestant, asked: Sequence[Example]) -> tuple[str, ...]:
    """What ends an answer beside its end-of-text token: with examples, what ends theirs; else where the next question would begin."""
    if teacher.shots:
        return stops_of([encoder], teacher.shots)
    opening = encoder.opening(asked[0])
    return (f"\n{opening}",) if opening else ()
