"""An engine that repeats the last words it was told, a word a token: what HTTP makes of an engine, without a model; and its servers."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from softprompt.errors import ArtifactError, ConfigError, DataError
from softprompt.serve.app import make_app
from softprompt.serve.asking import Ask, Begun, Busy, Load, Model, NotServed, Said, Scored
from softprompt.serve.running import Server, server_of
from softprompt.serve.service import Settings

VIRTUAL = 5


class Parrot:
    """`pause`: seconds between tokens. `places`: answers at once; as many may wait. `asked`: all so far; `given_up`: those that were
    closed before their end."""

    def __init__(self, *names: str, pause: float = 0.0, places: int = 1_000) -> None:
        self.known = {name: Model(name, "prompt", 7, VIRTUAL, {"text": name}) for name in names}
        self.pause, self.places = pause, asyncio.Semaphore(places)
        self.most = 2 * places
        self.asked: list[Ask] = []
        self.given_up: list[Ask] = []
        self.running = self.open = 0
        self.closed = False

    def models(self) -> Sequence[Model]:
        both = [Model("both", "ensemble", 7, members=tuple(self.known))] if len(self.known) > 1 else []
        return [Model("base", "base", 7), *self.known.values(), *both]

    async def ask(self, ask: Ask) -> AsyncGenerator[Begun | Said, None]:
        self.asked.append(ask)
        self._check(ask)
        self.open += 1
        ended = False
        try:
            async with self.places:
                self.running += 1
                try:
                    async for value in self._say(ask):
                        ended = isinstance(value, Said) and value.finish is not None
                        yield value
                finally:
                    self.running -= 1
        except (GeneratorExit, asyncio.CancelledError):
            self.given_up += [] if ended else [ask]
            raise
        finally:
            self.open -= 1

    def _check(self, ask: Ask) -> None:
        if ask.model not in {model.name for model in self.models()}:
            raise NotServed.named(ask.model)
        if self.open >= self.most:
            raise Busy("all places are taken", 3)
        if not words_of(ask):
            raise DataError("the text is empty: there is nothing to answer")
        if any(token > 99 for token in ask.sampling.logit_bias):
            raise ConfigError("logit_bias: the base has no token 100")

    async def _say(self, ask: Ask) -> AsyncGenerator[Begun | Said, None]:
        words = words_of(ask)
        text = " ".join(words) if ask.echo else ""
        scores = tuple(scored(word, ask.logprobs, first=number == 0) for number, word in enumerate(words)) if ask.echo else ()
        virtual = 0 if ask.model == "base" else VIRTUAL
        yield Begun(len(words), virtual, virtual + 1, text, scores if ask.logprobs is not None else ())
        most = ask.sampling.max_new_tokens
        if ask.schema is not None:
            words = ["{}"]
        if ask.sampling.temperature:
            words = [f"{word}{ask.sampling.seed}" for word in words]
        finish = "length" if most < len(words) else "stop"
        for number, word in enumerate(words[:most]):
            await asyncio.sleep(self.pause)
            score = () if ask.logprobs is None else (scored(word, ask.logprobs),)
            if word == "hm":
                yield Said("", 1, score, thought=word)
            elif word == "boom":
                raise RuntimeError("the parrot fell off")
            else:
                yield Said(word if number == 0 else f" {word}", 1, score, finish=finish if number + 1 == len(words[:most]) else None)
        if not words[:most] or words[:most][-1] == "hm":
            yield Said("", 0, finish=finish)

    async def add(self, name: str, folder: Path) -> Model:
        if (folder / "adapter_model.safetensors").read_bytes().startswith(b"\x80"):
            raise ArtifactError(f"{folder / 'adapter_model.safetensors'} is damaged")
        self.known[name] = Model(name, "prompt", 7, VIRTUAL, {"text": (folder / "card.json").read_text()}, folder)
        return self.known[name]

    async def remove(self, name: str) -> None:
        if name not in self.known:
            raise NotServed.named(name)
        del self.known[name]

    def load(self) -> Load:
        return Load(self.running, self.open - self.running, 11, 22)

    async def close(self, seconds: float) -> None:
        self.closed = True


def words_of(ask: Ask) -> list[str]:
    """What is repeated: of a conversation, its last turn."""
    if isinstance(ask.text, str):
        return ask.text.split()
    return [str(part) for part in ask.text] if isinstance(ask.text[0], int) else ask.text[-1].content.split()


def scored(word: str, top: int | None, *, first: bool = False) -> Scored:
    others = tuple(Scored(number, f"{word}{number or ''}", word.encode(), -0.5 - number) for number in range(top or 0))
    return Scored(len(word), word, word.encode(), None if first else -0.5, () if first else others)


@contextmanager
def running(engine: Parrot, settings: Settings = Settings(), drain_seconds: float = 5.0) -> Iterator[tuple[str, Server]]:
    """The address of a server over this engine, and the server."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = server_of(make_app(engine, settings), drain_seconds)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        until(lambda: server.started or not thread.is_alive())
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", server
        finally:
            server.should_exit = True
            thread.join()


def until(is_so, seconds: float = 120.0) -> None:
    """Waits for something that another thread or process does."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)
