"""An engine that says who was asked what, a word at a time: what the page makes of answers, without a model."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from parrot import Parrot

from softprompt.errors import DataError
from softprompt.serve.asking import Ask, Begun, Busy, Model, Said


class Talker(Parrot):
    """Over models with cards and runs. Some questions are answered in a way of their own."""

    def __init__(self, models: Sequence[Model]) -> None:
        super().__init__(pause=0.02)
        self.served = models

    def models(self) -> Sequence[Model]:
        return self.served

    def _check(self, ask: Ask) -> None:
        if question_of(ask) == "busy":
            raise Busy("too many requests wait", 7)
        if roles_of(ask)[0] == "system" and question_of(ask).endswith("no system"):
            raise DataError("the chat template refuses this conversation")

    async def _say(self, ask: Ask) -> AsyncGenerator[Begun | Said, None]:
        text = question_of(ask)
        virtual = next(one.num_virtual for one in self.served if one.name == ask.model)
        yield Begun(1_200, virtual, virtual + 20)
        words = f"{ask.model} 说：{text} <b>bold</b> &amp; so on".split(" ")
        if text == "think":
            yield Said("", 1, thought="hm, hm")
        for number in range(10_000 if text == "for ever" else len(words)):
            yield Said(("" if number == 0 else " ") + words[number % len(words)], 1)
            await asyncio.sleep(self.pause)
            if text == "break":
                raise RuntimeError("the talker lost its voice")
        yield Said("", 0, finish="length" if text == "long" else "stop")


def question_of(ask: Ask) -> str:
    """The last turn, of plain dialogue too."""
    return ask.text.rpartition("Human: ")[2].removesuffix("\n\nAssistant:") if isinstance(ask.text, str) else ask.text[-1].content


def roles_of(ask: Ask) -> list[str]:
    return ["text"] if isinstance(ask.text, str) else [turn.role for turn in ask.text]
