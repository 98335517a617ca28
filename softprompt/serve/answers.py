"""What an engine says to the asks of one request, as it comes; whoever goes away frees its places."""

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import aclosing
from types import TracebackType

from starlette.types import Receive

from softprompt.serve.account import Account
from softprompt.serve.asking import Ask, Begun, Engine, Said
from softprompt.serve.refusals import Gone, Refused

Value = Begun | Said | Exception


class Answers:
    """An async context, and within it an iterator of (number of the ask, Said) until each has a finish.

    Leaving it closes what has not finished, so does a client that goes away and a deadline; the iterator then raises Gone or Refused, and
    whatever an engine raises.
    """

    def __init__(self, engine: Engine, asks: Sequence[Ask], receive: Receive, deadline: float, account: Account) -> None:
        self.begun: list[Begun] = []
        self._open = set(range(len(asks)))
        self._deadline, self._account = deadline, account
        self._said: asyncio.Queue[tuple[int, Value]] = asyncio.Queue()
        self._early: deque[tuple[int, Said]] = deque()
        self._tasks = [asyncio.create_task(self._ask(engine, number, ask)) for number, ask in enumerate(asks)]
        self._tasks.append(asyncio.create_task(self._watch(receive)))

    async def begin(self) -> None:
        """Returns when all texts are read. Raises what the iterator raises, after it has closed all."""
        begun: dict[int, Begun] = {}
        try:
            while len(begun) < len(self._open):
                number, value = await self._next()
                if isinstance(value, Begun):
                    begun[number] = value
                else:
                    self._early.append((number, value))
        except BaseException:
            await self.close()
            raise
        self.begun = [begun[number] for number in sorted(begun)]

    def __aiter__(self) -> "Answers":
        return self

    async def __anext__(self) -> tuple[int, Said]:
        if not self._open:
            raise StopAsyncIteration
        number, value = self._early.popleft() if self._early else await self._next()
        assert isinstance(value, Said), "an answer begins once"
        if value.finish is not None:
            self._open.remove(number)
        return number, value

    async def __aenter__(self) -> "Answers":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _next(self) -> tuple[int, Begun | Said]:
        try:
            async with asyncio.timeout_at(self._deadline):
                number, value = await self._said.get()
        except TimeoutError:
            raise Refused("the answer took longer than this server gives a request", status=504, code="timeout") from None
        if isinstance(value, Exception):
            raise value
        self._account.note(number, value)
        return number, value

    async def _ask(self, engine: Engine, number: int, ask: Ask) -> None:
        try:
            async with aclosing(engine.ask(ask)) as said:
                async for value in said:
                    self._said.put_nowait((number, value))
                    if isinstance(value, Said) and value.finish is not None:
                        return
            raise AssertionError("an engine ends with a finish")
        except Exception as error:
            self._said.put_nowait((number, error))

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._said.put_nowait((-1, Gone()))
