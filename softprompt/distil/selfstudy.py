"""Questions that the base asks itself about a text, where nobody has any (the self-study of Cartridges, Eyuboglu et al. 2025).

Each is asked about one passage, in one of a few general manners, in the language of the text, with all of the text in the context.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from softprompt.contestants import Contestant
from softprompt.data import Message
from softprompt.distil.asked import unanswered
from softprompt.encode import Encoder
from softprompt.engine.decode import Question
from softprompt.sampling import Sampling
from softprompt.scripts import script_of

PASSAGE = 240  # characters that a question is about, about; whole sentences
SENTENCE = re.compile(r"[^.!?。！？\n]+[.!?。！？]*\s*")
MOST = 48  # tokens of a question
TRIES = 4  # questions are drawn so often for each that is wanted: many are said twice
TEMPERATURE, TOP_P = 0.9, 0.95  # with which it is drawn


@dataclass(frozen=True)
class Language:
    """How questions are asked for in one language. `manners`: what a base that follows instructions is told, and how the question of one
    that only goes on with text begins; `passage`: stands around the passage. `summarise`: asks for a summary of so many words, of which a
    token is `words_per_token`, about."""

    manners: tuple[tuple[str, str], ...]
    passage: str
    opening: str
    summarise: str
    words_per_token: float


ENGLISH = Language(
    (
        ("Write one short question about a fact in this passage: who, what, when, where or how many.", "What"),
        ("Write one short question that asks for a name or a number in this passage.", "How many"),
        ("Write one short question about the reason for something in this passage.", "Why"),
        ("Write one short question whose answer is a few words of this passage.", "Who"),
        ("Write one short question about how this passage fits into the whole text.", "Which"),
        ("Write one short question that somebody who uses this text at work would ask.", "When"),
    ),
    "Passage: {passage}\n\n{manner} Reply with the question alone.",
    "Passage: {passage}\nQuestion: {beginning}",
    "Summarise all of the above in at most {words} words. Keep every rule, name and number that matters.",
    0.7,
)
CHINESE = Language(
    (
        ("就这段话里的一个事实提一个简短的问题：谁、什么、何时、哪里或多少。", "什么"),
        ("就这段话里的一个名字或数字提一个简短的问题。", "有多少"),
        ("就这段话里某件事的原因提一个简短的问题。", "为什么"),
        ("提一个简短的问题，它的答案是这段话里的几个字。", "谁"),
        ("就这段话与全文的关系提一个简短的问题。", "哪"),
        ("提一个在工作中使用这篇文字的人会问的简短问题。", "何时"),
    ),
    "段落：{passage}\n\n{manner}只回复问题本身。",
    "段落：{passage}\n问题：{beginning}",
    "用最多{words}个字概括以上全部内容，保留重要的规则、名字和数字。",
    1.0,
)


def language_of(text: str) -> Language:
    return CHINESE if script_of(text) == "Han" else ENGLISH


def passages(text: str) -> list[str]:
    """Whole sentences of about PASSAGE characters, each passage beginning where the one before ended."""
    found: list[str] = []
    for sentence in SENTENCE.findall(text):
        if found and len(found[-1]) + len(sentence) <= PASSAGE:
            found[-1] += sentence
        elif sentence.strip():
            found.append(sentence)
    return [" ".join(passage.split()) for passage in found] or [text.strip()]


@dataclass(frozen=True)
class Asking:
    """Number `number` of the questions to draw: what the base is told, behind which teacher's text, and how the question begins where it
    only goes on with text."""

    number: int
    teacher: int
    told: str
    beginning: str


def askings(texts: tuple[str, ...], follows: bool) -> Iterator[Asking]:
    """Without end: every passage of every text in turn, each time in another manner. `follows`: whether the base follows instructions."""
    about = [(teacher, passage) for teacher, text in enumerate(texts) for passage in passages(text)]
    languages = [language_of(text) for text in texts]
    for number in count():
        turn, place = divmod(number, len(about))
        teacher, passage = about[place]
        language = languages[teacher]
        manner, beginning = language.manners[(place + turn) % len(language.manners)]
        if follows:
            yield Asking(number, teacher, language.passage.format(passage=passage, manner=manner), "")
        else:
            yield Asking(number, teacher, language.opening.format(passage=passage, beginning=beginning), beginning)


def as_question(asking: Asking, contestant: Contestant, encoder: Encoder, follows: bool, seed: int) -> Question:
    """What the base goes on from. The random stream is the question's own."""
    (member,) = contestant.members
    sampling = Sampling(temperature=TEMPERATURE, top_p=TOP_P, max_new_tokens=MOST, seed=seed * 1_000_003 + asking.number)
    if follows:
        example = unanswered((Message("user", asking.told),), "self-study", {})
        ids = contestant.question(encoder, example, encoder.encode(example))
    else:
        ids = tuple(encoder.tokenizer(f"{contestant.wish}\n\n{asking.told}", add_special_tokens=False)["input_ids"])
    return Question(((member.soft, ()),), (ids,), sampling, stop_ids=encoder.end_ids)


def cleaned(asking: Asking, said: str) -> str | None:
    """The question in what the base said: its first line, up to the question mark; None where there is none."""
    line = next((one.strip() for one in (asking.beginning + said).split("\n") if one.strip()), "")
    line = re.sub(r"^(?:\d+[.)、]|[-*•]|(?:Question|问题)\s*[:：])\s*", "", line).strip("\"“”' ")
    end = re.search(r"[?？]", line)
    return line[: end.end()] if end and len(line[: end.end()]) > len(asking.beginning) + 4 else None
