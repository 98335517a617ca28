"""What benchmarks/distil.py distils: the demo's examples, a system prompt with rules that can be checked, articles with questions."""

import json
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYSTEM = Path(__file__).with_name("system_prompt.md")
DRINKS = ("Assam", "Darjeeling", "Earl Grey", "Lapsang", "Sencha", "Jasmine", "Peppermint", "Rooibos")
PLACES = ("Leeds", "Cork", "Lyon", "Oslo", "Boston", "Cardiff", "Turin", "Tokyo", "Ghent", "Perth")
WAYS = {  # what customers ask; a way that is held out is never asked in training
    "post": (
        "When will my {drink} arrive in {place}?",
        "Do you post to {place}?",
        "How much is postage to {place} for a bag of {drink}?",
    ),
    "order": ("Where is my parcel with the {drink}?", "My order has not come to {place} yet.", "Can I change the {drink} in my order?"),
    "return": ("Can I return the {drink}? I have opened it.", "My teapot came broken to {place}.", "I want my money back for the {drink}."),
    "brew": ("How do I brew {drink}?", "How long should {drink} steep?", "How hot must the water be for {drink}?"),
    "price": ("What does {drink} cost?", "Is {drink} cheaper than last year?", "How much are two bags of {drink}?"),
    "health": ("Is {drink} safe in pregnancy?", "Can I drink {drink} with my blood pressure pills?", "Does {drink} help against a cold?"),
    "other": (
        "Is the tea shop next door in {place} better?",
        "Who should I vote for in {place}?",
        "Do you sell coffee in {place}?",
    ),
    "angry": (
        "This is a disgrace, my {drink} tastes of soap!",
        "You ruined my birthday in {place}!",
        "Worst {drink} ever, shame on you!",
    ),
}


def customers(count: int, seed: int) -> list[tuple[str, str]]:
    """(kind, question), no question twice."""
    draw = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        kind = draw.choice(list(WAYS))
        found[draw.choice(WAYS[kind]).format(drink=draw.choice(DRINKS), place=draw.choice(PLACES))] = kind
    return [(kind, question) for question, kind in found.items()]


RULES: dict[str, Callable[[str, str], bool | None]] = {  # (kind, answer) -> kept, or None where the rule says nothing
    "begins with Hello": lambda kind, said: said.lstrip().startswith("Hello,"),
    "ends with the name": lambda kind, said: said.rstrip().endswith("Mira, Harbour Tea"),
    "no exclamation mark": lambda kind, said: "!" not in said,
    "three sentences": lambda kind, said: len(re.findall(r"[.?!](?:\s|$)", said)) <= 3,
    "no list": lambda kind, said: not re.search(r"^\s*(?:[-*#|]|\d+\.)", said, re.MULTILINE),
    "no price": lambda kind, said: None if kind != "price" else not re.search(r"[£$€]\s?\d|\d+ (?:pounds|pence)", said),
    "asks for the order number": lambda kind, said: None if kind not in ("order", "return") else "order number" in said.lower(),
    "promises no refund": lambda kind, said: None if kind != "return" else not re.search(r"(?:will|can) refund|full refund", said.lower()),
    "sends to a doctor": lambda kind, said: None if kind != "health" else bool(re.search(r"doctor|pharmacist", said.lower())),
    "only Harbour Tea": lambda kind, said: None if kind != "other" else "harbour tea" in said.lower().rsplit("mira", 1)[0],
    "sorry once": lambda kind, said: None if kind != "angry" else len(re.findall(r"sorry|apologi", said.lower())) == 1,
    "is no machine": lambda kind, said: not re.search(r"language model|\bAI\b|assistant model", said),
}


def checks(kinds: Iterable[str], answers: Iterable[str]) -> list[bool]:
    """Every rule that says something about every answer, in order."""
    found = (rule(kind, said) for kind, said in zip(kinds, answers, strict=True) for rule in RULES.values())
    return [one for one in found if one is not None]


@dataclass(frozen=True)
class Article:
    """A text, and questions with all answers that are right."""

    title: str
    text: str
    questions: tuple[tuple[str, tuple[str, ...]], ...]


def articles(file: Path, least: int, most: int, length: Callable[[str], int], count: int) -> list[Article]:
    """The first articles of a file in SQuAD's format whose texts have so many tokens; longer ones are cut behind a whole paragraph."""
    found: list[Article] = []
    for one in json.loads(file.read_text(encoding="utf-8"))["data"]:
        paragraphs: list[Any] = []
        for paragraph in one["paragraphs"]:
            if length("\n\n".join([*(kept["context"] for kept in paragraphs), paragraph["context"]])) > most:
                break
            paragraphs.append(paragraph)
        text = "\n\n".join(paragraph["context"] for paragraph in paragraphs)
        asked = [question for paragraph in paragraphs for question in paragraph["qas"]]
        pairs = tuple((question["question"], tuple(answer["text"] for answer in question["answers"])) for question in asked)
        if paragraphs and length(text) >= least:
            found.append(Article(one["title"], text, pairs))
    return found[:count]


def words_of(text: str) -> list[str]:
    """As SQuAD's script takes a text apart; a Chinese character is a word."""
    text = "".join(" " if character in string.punctuation + "。，、；：？！《》（）“”" else character for character in text.lower())
    text = re.sub(r"\b(?:a|an|the)\b", " ", text)
    return re.findall(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+", text)


def token_f1(answer: str, wanted: Iterable[str]) -> float:
    """The best F1 of the answer's words with those of any answer that is right (Rajpurkar et al. 2016)."""

    def one(right: str) -> float:
        ours, theirs = Counter(words_of(answer)), Counter(words_of(right))
        shared = (ours & theirs).total()
        return 2 * shared / (ours.total() + theirs.total()) if shared else 0.0

    return max(map(one, wanted))
