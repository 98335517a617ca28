"""The process that serves: one line when it is ready, slow clients sent away, an end that lets what has begun finish."""

import asyncio
import socket
from collections.abc import Awaitable
from time import monotonic
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from softprompt.errors import ConfigError
from softprompt.serve.app import make_app
from softprompt.serve.asking import Engine
from softprompt.serve.service import Service, Settings

HEAD_SECONDS = 10.0  # for the head of a request
LAST_SECONDS = 2  # for what is still open when the time to drain is over


class Hurried(H11Protocol):
    """Closes connections on which the head of a request does not come in time; uvicorn itself waits for ever."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._late = self.loop.call_later(HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class Server(uvicorn.Server):
    """At the first signal it goes on answering, says at /health that it is going down and takes no more; it ends when all is answered, or
    when `drain_seconds` are over, or at the second signal."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self.service, self.drain_seconds = service, drain_seconds
        self._last = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = self.should_exit or self.service.draining
        self.service.draining = True
        self._last = min(self._last, monotonic() + self.drain_seconds)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        count = sum(model.kind == "prompt" for model in self.service.engine.models())
        print(f"{count} prompt{'' if count == 1 else 's'} at {_address(self.servers[0].sockets[0])}", flush=True)

    async def on_tick(self, counter: int) -> bool:
        if self.service.draining and (not self.service.running or monotonic() > self._last):
            self.should_exit = True
        return await super().on_tick(counter)


def _address(listening: Any) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def server_of(app: FastAPI, drain_seconds: float) -> Server:
    """A server of what `make_app` made; its `run` takes the socket to listen at."""
    config = uvicorn.Config(
        app,
        http=Hurried,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=LAST_SECONDS,
    )
    return Server(config, app.state.service, drain_seconds)


def run(engine: Awaitable[Engine], settings: Settings, listening: socket.socket, drain_seconds: float) -> None:
    """Waits for the engine, then serves until the end. Raises what the engine's beginning raises."""

    async def serve() -> None:
        await server_of(make_app(await engine, settings), drain_seconds).serve(sockets=[listening])

    asyncio.run(serve())


def listen(host: str, port: int) -> socket.socket:
    """Raises ConfigError for an address that cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}") from None
