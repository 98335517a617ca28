"""The engine that decodes here: one thread over one open batch, which requests join and leave at every token.

All that the base computes runs on that thread. Texts become tokens on another one; what is said goes to the event loop.
"""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer

from softprompt.engine.choose import Likelihood
from softprompt.engine.decode import OpenBatch, Question, Read, Token, fitting
from softprompt.engine.model import FrozenBase
from softprompt.engine.rows import Held
from softprompt.errors import ConfigError, DataError, Error
from softprompt.serve.asking import Ask, Begun, Busy, Load, Model, Said, Scored, is_conversation
from softprompt.serve.beginnings import Beginnings
from softprompt.serve.guided import Schema
from softprompt.serve.library import Library, Spoken, ids_behind
from softprompt.serve.spelling import Spelling
from softprompt.serve.telling import Telling

CPU_PIECE, GPU_PIECE = 256, 4096  # tokens of texts that are read between two tokens of the answers
MEMORY = 2**30  # bytes of prompts and beginnings that are kept
RETRY = 2  # seconds after which somebody who was sent away may come again


def start(
    base: FrozenBase | Held,
    prompts: Mapping[str, Path],
    *,
    ensembles: Mapping[str, tuple[Sequence[str], Literal["mean", "vote"]]] | None = None,
    memory_bytes: int = MEMORY,
    most_waiting: int = 256,
    allow_other_base: bool = False,
) -> "OwnEngine":
    """An engine that answers. `ensembles`: names of prompts that answer together, and how they agree. `memory_bytes`: of prompts, and of
    what texts begin with, that are kept at most. Raises ArtifactError and ConfigError for prompts that do not fit."""
    if isinstance(base, FrozenBase):
        base.shelf.room = memory_bytes
    library = Library(base, allow_other_base)
    for name, folder in prompts.items():
        library.add(name, folder)
    for name, (members, by) in (ensembles or {}).items():
        library.add_ensemble(name, members, by)
    return OwnEngine(base, library, most_waiting)


@dataclass(eq=False)
class _Job:
    """A request on its way through the engine; `out` is read on the event loop."""

    ask: Ask
    spoken: Spoken
    texts: tuple[tuple[int, ...], ...]
    guide: Schema | None
    telling: Telling
    loop: asyncio.AbstractEventLoop
    out: "asyncio.Queue[Begun | Said | Exception]"
    question: Question | None = None
    number: int = -1
    gone: bool = False

    def tell(self, *events: Begun | Said | Exception) -> None:
        """Called on the engine's thread."""

        def put() -> None:
            for event in events:
                self.out.put_nowait(event)

        if not self.gone and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(put)


class OwnEngine:
    """See asking.Engine."""

    def __init__(self, base: FrozenBase | Held, library: Library, most_waiting: int) -> None:
        self.base, self.library, self.most_waiting = base, library, most_waiting
        self._vocabulary: LLTokenizer = from_tokenizer(base.tokenizer, eos_token=sorted(base.stop_ids | library.end_ids) or None)
        self._spelling = Spelling(base.tokenizer)
        self._commands: queue.SimpleQueue[_Job | Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[_Job] = deque()
        self._jobs: dict[int, _Job] = {}
        self._beginnings = Beginnings()
        self._num_open = 0
        self._closing = self._stopped = False
        self._tokens = ThreadPoolExecutor(1, thread_name_prefix="tokens")
        self._batch = self._empty()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---- on the event loop ---------------------------------------------------------------------------------------------

    def models(self) -> Sequence[Model]:
        return self.library.models()

    async def ask(self, ask: Ask) -> AsyncGenerator[Begun | Said, None]:
        if self._closing:
            raise Busy("the server is about to stop", RETRY)
        if self._num_open >= self.most_waiting:
            raise Busy(f"{self._num_open} requests are being answered or wait, which is as many as this server takes", RETRY)
        self._num_open += 1
        job = None
        try:
            loop = asyncio.get_running_loop()
            job = await loop.run_in_executor(self._tokens, self._job, ask, loop)
            self._commands.put(job)
            while True:
                event = await job.out.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Said) and event.finish:
                    return
        finally:
            self._num_open -= 1
            if job is not None:
                job.gone = True
                self._commands.put(lambda: self._leave(job))

    async def add(self, name: str, folder: Path) -> Model:
        def added() -> Model:
            self._beginnings.forget(name)
            return self.library.add(name, folder)

        return cast(Model, await self._on_thread(added))

    async def remove(self, name: str) -> None:
        await self._on_thread(lambda: self.library.remove(name))

    def load(self) -> Load:
        running = len(self._jobs)
        return Load(running, max(0, self._num_open - running), self._batch.rows.kept_bytes, self._batch.rows.num_bytes)

    async def close(self, seconds: float) -> None:
        self._closing = True
        end = asyncio.get_running_loop().time() + seconds
        while self._num_open and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)

        def stop() -> None:
            self._stopped = True
            self._fail(Busy("the server stops", RETRY))

        self._commands.put(stop)
        await asyncio.to_thread(self._thread.join)
        self._tokens.shutdown(wait=False)

    async def _on_thread(self, call: Callable[[], Any]) -> Any:
        done: Future[Any] = Future()

        def run() -> None:
            try:
                done.set_result(call())
            except Exception as error:
                done.set_exception(error)

        self._commands.put(run)
        return await asyncio.wrap_future(done)

    # ---- texts to tokens -----------------------------------------------------------------------------------------------

    def _job(self, ask: Ask, loop: asyncio.AbstractEventLoop) -> _Job:
        """Raises NotServed, DataError and ConfigError."""
        spoken = self.library.find(ask.model)
        texts = tuple(ids_behind(encoder, ask.text, trained=spoken.trained) for encoder in spoken.encoders)
        if self.base.context_length is not None:
            needed = max(len(text) + room for text, room in zip(texts, spoken.num_positions, strict=True))
            if needed >= self.base.context_length:
                raise DataError(f"the text takes {needed} tokens with its prompt, the base's context is {self.base.context_length}")
        spoken.check(ask)
        unknown = [token for token in ask.sampling.logit_bias if not 0 <= token < self.base.num_tokens]
        if unknown:  # before it meets the others' logits
            raise ConfigError(f"logit_bias: the base has no token {unknown[0]}")
        guide = None if ask.schema is None else Schema(self._vocabulary, ask.schema)
        telling = Telling(self.base.tokenizer, spoken.thinking if is_conversation(ask.text) else None, ask.stops)
        return _Job(ask, spoken, texts, guide, telling, loop, asyncio.Queue())

    # ---- on the engine's thread ----------------------------------------------------------------------------------------

    def _empty(self) -> OpenBatch:
        return OpenBatch(self.base, CPU_PIECE if self.base.device.type == "cpu" else GPU_PIECE)

    def _run(self) -> None:
        while not self._stopped:
            self._take()
            self._admit()
            try:
                events = self._batch.advance()
            except Exception as error:  # whatever it was, the next requests are to be answered
                self._fail(error)
                continue
            for event in events:
                if event.row in self._jobs:
                    self._tell(self._jobs[event.row], event)

    def _take(self) -> None:
        """What came in meanwhile; waits where there is nothing to do."""
        idle = not (self._waiting or self._batch.answers or self._batch.arriving)
        while idle or not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Job):
                self._waiting.append(command)
            else:
                command()
            idle = idle and not self._waiting and not self._stopped

    def _admit(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            try:
                job.question = job.question or self._question(job)
            except Exception as error:  # a prompt that has left the shelf comes back from its folder, which may be gone
                self._waiting.popleft().tell(error)
                continue
            if not fitting(self._batch, iter([job.question])):
                return
            self._waiting.popleft()
            (job.number,) = self._batch.admit([job.question])
            self._jobs[job.number] = job

    def _question(self, job: _Job) -> Question:
        ask, sampling = job.ask, job.ask.sampling
        if sampling.max_new_tokens == 0:
            sampling = replace(sampling, max_new_tokens=1)
        prompts = tuple(self.library.prompt(name) for name in job.spoken.names)
        alone = len(prompts) == 1
        return Question(
            tuple((prompt, ()) for prompt in prompts),
            job.texts,
            sampling,
            job.telling.ends,
            by=job.spoken.by,
            stop_ids=job.spoken.stop_ids,
            top=ask.logprobs,
            echo=ask.echo and ask.logprobs is not None,
            guide=job.guide,
            keep=self._beginnings.shared(ask.model, job.texts[0]) if alone and not ask.echo else 0,
        )

    def _tell(self, job: _Job, event: Read | Token) -> None:
        if isinstance(event, Read):
            job.tell(self._begun(job, event))
            if job.ask.sampling.max_new_tokens == 0:
                self._batch.drop({job.number})
                self._done(job, Said("", 0, finish="length"))
            return
        if job.guide is not None and job.guide.broken is not None:
            self._batch.drop({job.number})
            del self._jobs[job.number]
            job.tell(ConfigError(f"response_format: {job.guide.broken}"))
            return
        said = job.telling.said(event, None if event.score is None else self._scored(event.score))
        if event.last and said is not None:
            self._done(job, said)
        elif said is not None:
            job.tell(said)

    def _begun(self, job: _Job, read: Read) -> Begun:
        spoken, ask = job.spoken, job.ask
        text, ids = "", job.texts[0]
        if ask.echo:
            text = ask.text if isinstance(ask.text, str) else self.base.tokenizer.decode(list(ids))
        counted = len(ids) + spoken.num_bos
        return Begun(counted, spoken.num_virtual, read.num_cached, text, tuple(map(self._scored, read.scores)))

    def _scored(self, score: Likelihood) -> Scored:
        return self._spelling.scored(score.id, score.logprob, dict(score.top), len(score.top))

    def _done(self, job: _Job, said: Said) -> None:
        del self._jobs[job.number]
        job.tell(said)

    def _leave(self, job: _Job) -> None:
        """A client has gone: its place is free at the next token."""
        if self._jobs.get(job.number) is job:
            del self._jobs[job.number]
            self._batch.drop({job.number})
        elif job in self._waiting:
            self._waiting.remove(job)

    def _fail(self, error: Exception) -> None:
        """All that are answered just now get the error; the batch begins anew."""
        for job in (*self._jobs.values(), *self._waiting):
            job.tell(error if isinstance(error, Error) else RuntimeError(f"{type(error).__name__}: {error}"))
        self._jobs, self._waiting, self._batch = {}, deque(), self._empty()
