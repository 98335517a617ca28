"""Who competes in an evaluation: the bare base, a text prompt, a few examples, soft prompts, an ensemble, a PEFT adapter.

Whatever stands before the rows as text is the same for all of them, so it is read once.
"""

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from softprompt.artifact import StoredPrompt
from softprompt.data import Example, Message
from softprompt.encode import Encoder
from softprompt.engine.head import Head
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import Prompt
from softprompt.engine.quantized import unadvised
from softprompt.engine.rows import Context
from softprompt.engine.tokens import Encoded, num_shared
from softprompt.engine.trial import check
from softprompt.errors import ArtifactError, DataError, ModelError, first_line
from softprompt.generation import without_prompt
from softprompt.templates import Segment, joined
from softprompt.thinking import Thinking

POOL = 10_000  # training rows that examples are taken from
MAX_SHOTS, SHOT_TOKENS = 16, 1024  # an evaluation's few-shot context has at most so many examples, and at most so many tokens


class Speaker(Protocol):
    """A prompt, and the encoder that its texts need: one on disk, or the bare base's."""

    @property
    def soft(self) -> Prompt: ...

    @property
    def encoder(self) -> Encoder: ...


@dataclass(frozen=True)
class Contestant:
    """`members`: what it continues from, several for an ensemble. `wish` or `shots`: the text before every row. `adapter`: a PEFT
    adapter's folder, whose layers are in the base while it competes."""

    name: str
    members: tuple[Speaker, ...]
    wish: str | None = None
    shots: tuple[Example, ...] = ()
    adapter: Path | None = None

    @property
    def trained(self) -> bool:
        """Whether anything of it was trained on rows as the template writes them."""
        return self.adapter is not None or any(prompt.soft.length for prompt in self.members)

    def segments(self, encoder: Encoder, example: Example) -> list[Segment]:
        """The row with the text before it."""
        if self.wish is not None:
            return _told(encoder, example, self.wish)
        return _shown(encoder, example, self.shots) if self.shots else encoder.segments(example)

    def full(self, encoder: Encoder, example: Example, plain: Encoded) -> Encoded:
        """The row as this contestant is scored on it; cut where the plain row was cut, so that the same tokens are scored.

        Examples are in the same pieces as the row, since tokens that begin otherwise than theirs would be less likely.
        """
        if self.wish is None and not self.shots:
            return plain
        whole = encoder.encode_segments(self.segments(encoder, example), example.source)
        keep, num_supervised = len(whole) - plain.num_cut, plain.num_supervised
        row = Encoded(whole.ids[:keep], whole.supervised[:keep], plain.source, plain.num_cut)
        return row.judged_after(row.num_supervised - num_supervised)  # the answers of the examples are not scored

    def as_text(self, encoder: Encoder, example: Example, plain: Encoded) -> tuple[Encoded, tuple[int, ...]]:
        """(the row as it is where this contestant goes on from its `question`, supervised where it has the tokens of the plain row's
        answer, from there to its end; the tokens of that answer before them). A blank at the end of a question is one token with the
        answer's first word here, and these are others there."""
        *before, answer = self.segments(encoder, example)
        *earlier, last = joined(before)
        kept = last.text.rstrip(" ") or last.text
        spoken = replace(answer, text=last.text[len(kept) :] + answer.text)
        whole = encoder.encode_segments([*earlier, replace(last, text=kept), spoken], example.source)
        ids, said = whole.ids[: len(whole) - plain.num_cut], plain.ids[len(plain.question) :]
        alike = num_shared([said[::-1], ids[::-1]])
        if not alike or plain.num_supervised != len(said):  # several answers, of which each has its own beginning
            return self.full(encoder, example, plain), ()
        supervised = (*(False,) * (len(ids) - alike), *(True,) * alike)
        return Encoded(ids, supervised, plain.source, plain.num_cut), said[: len(said) - alike]

    def question(self, encoder: Encoder, example: Example, plain: Encoded) -> tuple[int, ...]:
        """What this contestant goes on from when it answers.

        What was trained was trained on the row's own pieces. An untrained base knows text: it gets question and answer of an example
        tokenized as one, and no blank at the end, which text has in one token with the next word; after a blank alone Gemma 3 goes on
        with digits (LOG.md).
        """
        if self.trained:
            return plain.question
        *before, last = joined(self.segments(encoder, example)[:-1])
        return encoder.encode_segments([*before, replace(last, text=last.text.rstrip(" ") or last.text)], example.source).ids


@dataclass(frozen=True)
class Reading:
    """How one member of a contestant reads the rows: their [rows][candidates] continue from `soft`, their questions from `context`.

    `tokens`: how many each request has more than the bare base's. `stop_ids`: what ends its answers beside the base's own tokens;
    `thinking`: the block in front of them.
    """

    soft: Prompt
    rows: list[list[Encoded]]
    context: Context
    questions: list[tuple[int, ...]]
    tokens: float
    stop_ids: frozenset[int] = frozenset()
    thinking: Thinking | None = None


def read_rows(contestant: Contestant, member: int, examples: Sequence[Sequence[Example]], plain: Sequence[Sequence[Encoded]]) -> Reading:
    """`examples[r]`: row r, then its other candidates; `plain`: these as the bare base reads them."""
    prompt = contestant.members[member]
    rows = [
        [contestant.full(prompt.encoder, example, row) for example, row in zip(own, read, strict=True)]
        for own, read in zip(examples, plain, strict=True)
    ]
    questions = [contestant.question(prompt.encoder, own[0], read[0]) for own, read in zip(examples, plain, strict=True)]
    longer = sum(len(own[0]) - len(read[0]) for own, read in zip(rows, plain, strict=True))
    tokens = longer / len(rows) + prompt.soft.length
    how = prompt.encoder.end_ids, prompt.encoder.thinking
    if contestant.wish is None and not contestant.shots:
        return Reading(prompt.soft, rows, (prompt.soft, ()), questions, tokens, *how)
    count = num_shared(ids[:-1] for ids in questions)  # the last one predicts
    return Reading(prompt.soft, rows, (prompt.soft, questions[0][:count]), [ids[count:] for ids in questions], tokens, *how)


# ---- text before the rows ------------------------------------------------------------------------------------------


def _told(encoder: Encoder, example: Example, wish: str) -> list[Segment]:
    """The row with a text prompt as its system turn, or in its first turn where the template knows no system."""
    example = encoder.completed(example)
    system = [message.content for message in example.messages if message.role == "system"]
    spoken = tuple(message for message in example.messages if message.role != "system")
    first = Message("user", "\n".join([wish, *system, spoken[0].content]))
    for turns in ((Message("system", "\n".join([wish, *system])), *spoken), (first, *spoken[1:])):
        try:
            return encoder.told(None).segments(replace(example, messages=turns))
        except DataError as error:  # some chat templates know no system turn
            refused = error
    raise refused


def _shown(encoder: Encoder, example: Example, shots: Sequence[Example]) -> list[Segment]:
    """The row as the last turns of a conversation that the examples begin; row behind row where a template knows one turn only."""
    if not encoder.template.knows_turns:
        return [segment for one in (*shots, example) for segment in encoder.segments(one)]
    example = encoder.completed(example)
    turns = [message for one in (*shots, example) for message in one.messages]
    system = [message for message in example.messages if message.role == "system"]
    return encoder.segments(replace(example, messages=(*system, *(turn for turn in turns if turn.role != "system"))))


def choose_shots(
    encoder: Encoder, examples: Sequence[Example], held: Sequence[Example], room: int, seed: int = 0, most: int = MAX_SHOTS
) -> tuple[Example, ...]:
    """Examples of the training rows for a few-shot context, the labels in turn: as many as fit into `room` tokens, `most` at most, none
    that is held out. Of more than POOL rows they are taken from so many that are drawn."""
    known, draw = {example.messages for example in held}, random.Random(seed)
    if len(examples) > POOL:
        examples = [examples[number] for number in draw.sample(range(len(examples)), POOL)]
    pool = [example for example in examples if example.messages not in known]
    draw.shuffle(pool)
    by_label: dict[str | None, list[Example]] = {}
    for example in pool:
        by_label.setdefault(example.label, []).append(example)
    in_turn = [own[index] for index in range(max(map(len, by_label.values()), default=0)) for own in by_label.values() if index < len(own)]
    chosen: list[Example] = []
    left = room
    for example in in_turn:
        length = len(encoder.encode(example)) + 4  # what a template writes between two turns
        if length <= left and len(chosen) < most:
            chosen.append(example)
            left -= length
    return tuple(chosen)


# ---- adapters ------------------------------------------------------------------------------------------------------


@contextmanager
def competing(base: FrozenBase, contestant: Contestant) -> Iterator[FrozenBase]:
    """Yields the base that the contestant answers with: with an adapter's layers and head inside while it competes.

    Raises ArtifactError for an adapter that does not fit, or changes the base in a way that the head does not show.
    """
    if contestant.adapter is None:
        yield base
        return
    with unadvised():
        from peft import PeftModel

    wrong = f"{contestant.adapter} cannot be put on {base.name}"
    before = [(parent, name, child) for parent in base.model.modules() for name, child in parent.named_children()]
    try:
        model = PeftModel.from_pretrained(base.model, str(contestant.adapter))
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise ArtifactError(f"{wrong}: {first_line(error)}") from None
    try:
        head = adapted_head(base)
        try:
            sharing = check(base.model, head, wrong)
        except ModelError as error:
            raise ArtifactError(str(error)) from None
        yield replace(base, head=head, sharing=sharing)
    finally:
        model.unload()
        for parent, name, child in before:  # PEFT leaves what an adapter has trained as a whole in the place of the base's own
            setattr(parent, name, child)


def adapted_head(base: FrozenBase) -> Head:
    """The head of a base with an adapter in it: trained itself, or with the adapter's share added to its weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    module = base.model.get_output_embeddings()
    if isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save[module.active_adapters[0]]
    elif isinstance(module, BaseTunerLayer):
        module = copy.deepcopy(module)
        module.merge()
        module = module.get_base_layer()
    return replace(base.head, weight_VH=module.weight.detach(), bias_V=getattr(module, "bias", None))


def all_contestants(
    base: FrozenBase,
    prompts: Sequence[tuple[str, StoredPrompt]],
    *,
    text: str | None = None,
    shots: Sequence[Example] = (),
    ensemble: bool = False,
    adapters: Sequence[Path] = (),
) -> list[Contestant]:
    """All contestants, those that cost nothing first. They read the rows with the template of the first prompt."""
    first = prompts[0][1]
    bare = (without_prompt(base, first),)
    line = [Contestant("base", bare)]
    if text:
        line.append(Contestant("text", bare, wish=text))
    if shots:
        line.append(Contestant("few-shot", bare, shots=tuple(shots)))
    line += [Contestant(name, (prompt,)) for name, prompt in prompts]
    if ensemble:
        line.append(Contestant("ensemble", tuple(prompt for _, prompt in prompts)))
    return [*line, *(Contestant(adapter.name, bare, adapter=adapter) for adapter in adapters)]
