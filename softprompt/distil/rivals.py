"""Who competes with a distilled prompt: its teacher, the teacher's own keys and values, and what is as short as the prompt and needs no
training."""

from collections.abc import Sequence
from dataclasses import replace

from softprompt.contestants import Contestant, Reading
from softprompt.data import Message
from softprompt.distil.asked import unanswered
from softprompt.distil.context import Context
from softprompt.distil.selfstudy import language_of
from softprompt.encode import Encoder
from softprompt.engine.decode import Question, decode_whole
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import as_prompt, no_prompt, shapes_of
from softprompt.engine.teacher import Teacher
from softprompt.engine.tokens import Encoded, num_shared, shared_beginning
from softprompt.sampling import Sampling

TEACHER, CONTROL = "teacher", "control"


def rivals(base: FrozenBase, encoder: Encoder, context: Context, positions: int) -> list[Contestant]:
    """Teacher and control, and what fits into so many positions: the text's first tokens and a summary of it, or fewer examples. A control
    is there where the base keeps keys and values."""
    (teacher,) = context.teachers(base, encoder)
    found = [replace(teacher, name=TEACHER)]
    if shapes_of(base.prefill([base.embed_ids([0])]).layers):
        found.append(replace(teacher, name=CONTROL))
    if context.shots:
        return [*found, *_fewer(encoder, teacher, positions)]
    tokenizer = base.tokenizer
    beginning = tokenizer.decode(tokenizer(context.texts[0], add_special_tokens=False)["input_ids"][:positions])
    shorter = {"beginning": beginning, "summary": _summary(base, encoder, teacher, positions)}
    return [*found, *(Contestant(name, teacher.members, wish=text) for name, text in shorter.items() if text.strip())]


def _fewer(encoder: Encoder, teacher: Contestant, positions: int) -> list[Contestant]:
    """As many of the examples as fit, one at least."""
    count, used = 0, 0
    for shot in teacher.shots:
        used += len(encoder.encode(shot)) + 4  # what a template writes between two turns
        count += used <= positions
    return [replace(teacher, name="fewer", shots=teacher.shots[: max(1, count)])]


def _summary(base: FrozenBase, encoder: Encoder, teacher: Contestant, positions: int) -> str:
    """What the base says when it is asked for a summary of the text, cut at so many tokens."""
    assert teacher.wish is not None, "a teacher with a text"
    language = language_of(teacher.wish)
    told = language.summarise.format(words=round(positions * language.words_per_token))
    example = unanswered((Message("user", told),), "summary", {})
    ids = teacher.question(encoder, example, encoder.encode(example))
    question = Question(((no_prompt(base, encoder.bos_id), ()),), (ids,), Sampling(max_new_tokens=positions), stop_ids=encoder.end_ids)
    ((_, said, _),) = decode_whole(base, [question])
    return str(base.tokenizer.decode(said, skip_special_tokens=True))


def teacher_of(reading: Reading, sure: Sequence[tuple[int, ...]]) -> Teacher:
    """What the other contestants are compared with, on the rows as the teacher reads them, but for the first tokens of their answers that
    it has never to say: `sure`, see Teacher."""
    rows = [own[0] for own in reading.rows]
    shared = shared_beginning(rows)
    judged = [row.after(len(shared)).judged_after(len(ids)) for row, ids in zip(rows, sure, strict=True)]
    return Teacher(((reading.soft, shared),), judged, (0,) * len(rows), sure)


def controlled(base: FrozenBase, reading: Reading) -> Reading:
    """The teacher's reading with a prompt in place of the text: the text's own keys and values. It must say what the teacher says."""
    soft, behind = reading.context
    shared = shared_beginning([row for own in reading.rows for row in own])
    count = num_shared([shared, behind])
    layers = soft.prefix(base, shared[:count]).layers
    deep = as_prompt(layers, "after_bos" if soft.bos_id is not None else "start", soft.bos_id)
    rows: list[list[Encoded]] = [[row.after(count) for row in own] for own in reading.rows]
    questions = [(*behind[count:], *ids) for ids in reading.questions]
    return replace(reading, soft=deep, rows=rows, context=(deep, ()), questions=questions)
