"""Answers from a vLLM server, whose requests continue from keys and values that the base gave here (export/kv_connector.py).

Texts are tokenized here, with each prompt's template; a request is token ids, of which the first are the prompt's placeholders.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import time
from typing import Any

import torch
from openai import APIError, APIStatusError

from softprompt.artifact import find_prompt, load_prompt
from softprompt.config import ModelConfig
from softprompt.encode import Encoder
from softprompt.engine.loading import folder_of, load_base
from softprompt.engine.model import FrozenBase
from softprompt.engine.prefix import Prefix
from softprompt.engine.prompt import SoftPrompt, no_prompt
from softprompt.errors import ArtifactError, ConfigError, DataError, ModelError, RunError
from softprompt.export.kv_folder import KeyValueFolder, Placed
from softprompt.serve import vllm_process
from softprompt.serve.asking import Ask, Begun, Busy, Conversation, Load, Model, NotServed, Said, Text, is_conversation
from softprompt.serve.choices import ID
from softprompt.serve.library import described, encoder_of_base, ids_behind
from softprompt.serve.spelling import Spelling
from softprompt.serve.vllm_request import Answer, fields_of, scores_text

KEPT_SECONDS = 60.0  # that the base stays in memory after a prompt was read
MOST_OPEN = 256  # requests that vLLM is given at once
PROBE, PROBED, CLOSE = "Once upon a time there was", 5, {torch.float32: 0.02}  # logprobs of the likeliest tokens, how near they have to be
CLOSE_IN_HALF = 0.5
TRIED = 8  # rows of the prompt that a server is tried with


@dataclass(frozen=True)
class Expected:
    """What the base says here behind a prompt and PROBE: the likeliest tokens and their logprobs."""

    ids: tuple[int, ...]
    likeliest: Mapping[int, float]
    close: float


@dataclass(frozen=True)
class Tries:
    """What a server has to say without a prompt, and behind one that is put there to try it."""

    bare: Expected
    behind: Expected
    placed: Placed


@dataclass(frozen=True)
class Known:
    """A name that is served. `before`: the ids in front of its texts, placeholders of a prompt or BOS of the base."""

    model: Model
    encoder: Encoder
    before: tuple[int, ...]
    placed: Placed | None
    stop_ids: frozenset[int]


async def start(
    name: str,
    base: ModelConfig,
    prompts: Mapping[str, Path],
    folder: Path,
    *,
    address: str | None = None,
    python: Path | None = None,
    options: Sequence[str] = (),
) -> "VllmEngine":
    """An engine over the base, which is called `name`, and prompts by name. `folder`: where the connector finds keys and values.
    `address`: of a vLLM server that runs with our connector and that folder; else one is started, by the interpreter `python` and with
    more `options` for its command line.

    Raises ModelError for a base that cannot be served so and for a server that does not answer as it should, ArtifactError for a prompt.
    """
    if base.quantization is not None:
        raise ModelError(
            f"model.quantization = {base.quantization!r}: vLLM has the base's full weights; leave it out, or use the own engine"
        )
    lent = _Lent(base)
    async with lent.base() as loaded:
        engine = VllmEngine(name, lent, loaded, KeyValueFolder(folder))
        tries = await asyncio.to_thread(engine.try_out, loaded)
        read = [(one, await asyncio.to_thread(engine.read, loaded, one, path)) for one, path in prompts.items()]
        dtype, place = str(loaded.dtype).removeprefix("torch."), folder_of(base)
    lent.let_go()  # vLLM has need of the memory now
    del loaded
    if address is not None:
        engine.server = await vllm_process.found(address)
    else:
        engine.server = await vllm_process.started(place, dtype, engine.folder, python, options)
    try:
        await engine.check(tries)
        for one, (known, expected) in read:
            await engine.take_in(one, known, expected)
    except BaseException:
        await engine.server.close()
        raise
    return engine


class VllmEngine:
    """The engine of `asking.py` over a vLLM server. Made by `start`."""

    server: vllm_process.Server

    def __init__(self, name: str, lent: "_Lent", base: FrozenBase, folder: KeyValueFolder) -> None:
        self.folder = folder
        self._lent, self._name, self._stop_ids = lent, name, base.stop_ids
        encoder = encoder_of_base(base)
        bos = () if encoder.bos_id is None else (encoder.bos_id,)
        model = Model(name, "base", int(time()))
        self._known = {name: Known(model, encoder, bos, None, base.stop_ids | encoder.end_ids)}
        self._spelling = Spelling(base.tokenizer)
        self._open: Counter[str] = Counter()  # answers by the key of their prompt
        self._begun = self._asked = 0
        self._closing = False
        self._idle = asyncio.Event()
        self._idle.set()

    def models(self) -> Sequence[Model]:
        base, *prompts = (known.model for known in self._known.values())
        return [base, *sorted(prompts, key=lambda model: model.name)]

    def load(self) -> Load:
        return Load(running=self._begun, waiting=self._asked - self._begun)

    # ---- answers

    async def ask(self, ask: Ask) -> AsyncGenerator[Begun | Said, None]:
        known = self._find(ask.model)
        if self._closing or self._asked >= MOST_OPEN:
            raise Busy("the server is going down" if self._closing else f"{self._asked} requests are waiting for vLLM", 1)
        replace(ask.sampling, max_new_tokens=max(1, ask.sampling.max_new_tokens)).check()
        ids = ids_behind(known.encoder, ask.text, trained=known.placed is not None)
        room = self.server.room - len(known.before) - len(ids)
        if room < 1:
            needed = len(known.before) + len(ids)
            raise DataError(f"a text with its prompt takes {needed} tokens, vLLM has room for {self.server.room}: shorten the text")
        begun = False
        self._enter(known)
        try:
            async with aclosing(self._answered(ask, known, ids, room)) as answered:
                async for piece in answered:
                    if isinstance(piece, Begun):
                        self._begun, begun = self._begun + 1, True
                    yield piece
        finally:
            self._begun -= begun
            self._leave(known)

    def _enter(self, known: Known) -> None:
        self._asked += 1
        self._idle.clear()
        self._open[_key(known)] += 1

    def _leave(self, known: Known) -> None:
        self._asked -= 1
        self._open[_key(known)] -= 1
        self._forget(known.placed)
        if not self._asked:
            self._idle.set()

    async def _answered(self, ask: Ask, known: Known, ids: tuple[int, ...], room: int) -> AsyncGenerator[Begun | Said, None]:
        fields = fields_of(ask, self.server.model, (*known.before, *ids), known.stop_ids, room)
        answer = Answer(ask, self._spelling, known.stop_ids, known.encoder.thinking if is_conversation(ask.text) else None)
        num_bos, num_virtual = known.encoder.bos_id is not None, known.model.num_virtual
        num_cached = 0 if known.placed is None else len(known.before)
        begun = Begun(len(ids) + num_bos, num_virtual, num_cached, self._shown(ask.text, ids) if ask.echo else "")
        if scores_text(ask):
            choice = (await self._complete(fields)).choices[0]
            yield replace(begun, scores=answer.echoed(choice, ids, len(known.before)))
            yield answer.said(choice)
            return
        stream = await self._complete({**fields, "stream": True})
        try:
            first = True
            with _our_errors():
                async for chunk in stream:
                    if first:
                        yield begun
                    first = False
                    for choice in chunk.choices:
                        yield answer.said(choice)
        finally:
            await stream.close()

    async def _complete(self, fields: Mapping[str, Any]) -> Any:
        """Asks vLLM."""
        with _our_errors():
            return await self.server.client.completions.create(**fields)

    def _shown(self, text: Text | Conversation, ids: Sequence[int]) -> str:
        return text if isinstance(text, str) else str(self._spelling.tokenizer.decode(list(ids)))

    # ---- prompts

    async def add(self, name: str, folder: Path) -> Model:
        async with self._lent.base() as base:
            known, expected = await asyncio.to_thread(self.read, base, name, folder)
            await self.take_in(name, known, expected)
        return known.model

    def read(self, base: FrozenBase, name: str, path: Path) -> tuple[Known, Expected]:
        """Puts a prompt's keys and values where vLLM finds them. Raises ArtifactError for one that does not fit."""
        if name == self._name:
            raise ConfigError(f"{name} is the name of the base: give the prompt another, NAME={path}")
        folder = find_prompt(path)
        stored = load_prompt(folder, base)
        with torch.no_grad():
            prefix = stored.soft.prefix(base)
            placed = self.folder.put(base, prefix)
        model = described(name, folder, stored)
        known = Known(model, stored.encoder, placed.ids, placed, base.stop_ids | stored.encoder.end_ids)
        return known, _expected(base, prefix)

    async def take_in(self, name: str, known: Known, expected: Expected) -> None:
        """Serves a prompt that vLLM has been seen to know."""
        self._enter(known)
        try:
            await self.compare(known.before, expected, f"the prompt {name} is not what it continues from")
            before, self._known[name] = self._known.get(name), known
        except ModelError as error:
            raise ArtifactError(str(error)) from None
        finally:
            self._leave(known)
        self._forget(None if before is None else before.placed)

    async def remove(self, name: str) -> None:
        if name == self._name:
            raise ConfigError(f"{name} is the base, which stays")
        known = self._find(name)
        del self._known[name]
        self._forget(known.placed)

    def _find(self, name: str) -> Known:
        try:
            return self._known[name]
        except KeyError:
            raise NotServed.named(name) from None

    def _forget(self, placed: Placed | None) -> None:
        """Takes a prompt out of the folder when nobody asks it any more."""
        if placed is None or self._open[placed.key]:
            return
        if all(known.placed is None or known.placed.key != placed.key for known in self._known.values()):
            self.folder.take_away(placed.key)

    def try_out(self, base: FrozenBase) -> "Tries":
        """Puts a prompt into the folder that a server with our connector finds there."""
        bos_id = self._known[self._name].encoder.bos_id
        some = SoftPrompt(base.drawn_rows(TRIED, 0), "start" if bos_id is None else "after_bos", bos_id)
        with torch.no_grad():
            bare, behind = no_prompt(base, bos_id).prefix(base), some.prefix(base)
        return Tries(_expected(base, bare), _expected(base, behind), self.folder.put(base, behind))

    async def check(self, tries: "Tries") -> None:
        """Raises ModelError for a server with other weights, and for one without our connector or with another folder."""
        try:
            await self.compare(self._known[self._name].before, tries.bare, f"it has other weights than {self._name}")
            unread = f"it runs without our connector, or for another folder than {self.folder.path}"
            await self.compare(tries.placed.ids, tries.behind, unread)
        finally:
            self.folder.take_away(tries.placed.key)

    async def compare(self, before: tuple[int, ...], expected: Expected, otherwise: str) -> None:
        """Raises ModelError, with what is the matter `otherwise`, where vLLM says something else than the base does here."""
        how = {"temperature": 0, "max_tokens": 1, "logprobs": 20, "extra_body": {"return_tokens_as_token_ids": True}}
        try:
            said = await self._complete({"model": self.server.model, "prompt": [*before, *expected.ids], **how})
        except (ConfigError, RunError) as error:  # a smaller vocabulary, say
            raise ModelError(f"{error}: {otherwise}") from None
        theirs = {int(token.removeprefix(ID)): value for token, value in said.choices[0].logprobs.top_logprobs[0].items()}
        off = max(abs(theirs.get(token, -99.0) - value) for token, value in expected.likeliest.items())
        if off > expected.close:
            raise ModelError(f"the vLLM server answers otherwise than the base does here (a logprob is off by {off:.2g}): {otherwise}")

    async def close(self, seconds: float) -> None:
        self._closing = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        await self.server.close()
        self._lent.let_go()


class _Lent:
    """The base, in memory while prompts are read and for a while after."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._lock = asyncio.Lock()
        self._loaded: FrozenBase | None = None
        self._later: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def base(self) -> AsyncIterator[FrozenBase]:
        async with self._lock:
            if self._later is not None:
                self._later.cancel()
            if self._loaded is None:
                self._loaded = await asyncio.to_thread(load_base, self.config)
            loaded = self._loaded
            try:
                yield loaded
            finally:
                self._later = asyncio.get_running_loop().call_later(KEPT_SECONDS, self.let_go)

    def let_go(self) -> None:
        if self._later is not None:
            self._later.cancel()
        self._loaded = self._later = None


@torch.no_grad()
def _expected(base: FrozenBase, prefix: Prefix) -> Expected:
    ids = tuple(base.tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    ids_1T = torch.tensor([ids], device=base.device)
    read = base.continue_from(prefix, torch.zeros_like(ids_1T[:, 0]), ids_1T, torch.ones_like(ids_1T))
    top = base.logits(read.hidden_BTH[0, -1]).float().log_softmax(dim=-1).topk(PROBED)
    return Expected(ids, dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)), CLOSE.get(base.dtype, CLOSE_IN_HALF))


def _key(known: Known) -> str:
    return "" if known.placed is None else known.placed.key


@contextmanager
def _our_errors() -> Iterator[None]:
    """Raises ConfigError for what vLLM refuses, Busy, and RunError where it fails."""
    try:
        yield
    except APIError as error:
        body = error.body if isinstance(error.body, Mapping) else {}  # in the midst of a stream there is no status but this one
        status = error.status_code if isinstance(error, APIStatusError) else body.get("code")
        if status in (400, 422):
            raise ConfigError(f"vLLM refuses this: {error.message}") from None
        if status in (429, 503):
            raise Busy("vLLM takes no more requests just now", 1) from None
        raise RunError(f"vLLM could not answer: {error.message}") from None
