"""Who may ask, and what stands between a client and the routes: keys, bounds, headers, the account of every request."""

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softprompt.errors import ConfigError
from softprompt.serve.account import Account
from softprompt.serve.log import logger
from softprompt.serve.refusals import OURS, Gone, Refused, as_response

HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
}
AT_HOME = ("localhost", "127.0.0.1", "::1")
LINGER_BYTES, LINGER_SECONDS = 64 << 20, 2.0  # that are read of a body which is refused
GRACE = 5.0  # seconds that a client has for what was written when its time ran out


class Keys:
    """Keys by their digests, so that comparing takes as long whatever they are."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def read(cls, file: Path) -> "Keys":
        """One a line; empty lines and those with # in front are left out. Raises ConfigError."""
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: no keys could be read: {getattr(error, 'strerror', None) or error}") from None
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ConfigError(f"{file} holds no key: write one a line")
        return cls(keys)

    def check(self, request: Request) -> None:
        """Raises Refused for a request without one of the keys."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        same = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(same):
            message = "this server needs a key: Authorization: Bearer KEY"
            raise Refused(message, status=401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """The body, at most so many bytes, within so many seconds. Raises Refused and Gone. FastAPI's own limit would answer in plain text."""
    too_long = Refused(f"the body has more than {most:,} bytes", status=413, code="too_large", headers={"Connection": "close"})
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > most):
        await _linger(request)
        raise too_long
    pieces, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for piece in request.stream():
                size += len(piece)
                if size > most:
                    break
                pieces.append(piece)
    except TimeoutError:
        raise Refused("the body did not come in time", status=408, code="timeout", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise Gone from None
    if size > most:
        await _linger(request)
        raise too_long
    return b"".join(pieces)


async def _linger(request: Request) -> None:
    """Reads on for a moment: a client that still sends when its connection is closed never sees why."""
    left = LINGER_BYTES
    with suppress(TimeoutError, ClientDisconnect, RuntimeError):  # the last: all of it had come
        async with asyncio.timeout(LINGER_SECONDS):
            async for piece in request.stream():
                left -= len(piece)
                if left < 0:
                    return


@dataclass(frozen=True)
class Reception:
    """The outermost layer: gives a request its account and every response its headers, ends what takes too long, reports at the end.

    `hosts`: what a request's Host may be, None for anything: a page of another host that a browser was led to by a forged name must not
    reach a server that asks for no key. `running`: the ids of the requests that have not ended.
    """

    app: ASGIApp
    hosts: frozenset[str] | None
    seconds: float
    between: Callable[[float, int], None]
    running: set[str]
    report: Callable[[Account], None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        account = Account(f"req-{secrets.token_hex(12)}", scope["method"], self.between)
        scope.setdefault("state", {})["account"] = account

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                account.status = account.status or message["status"]
                message["headers"] = _completed(message["headers"], account.id)
            await send(message)

        self.running.add(account.id)
        try:
            async with asyncio.timeout(self.seconds + GRACE):
                if self.hosts is not None and _host(scope) not in self.hosts:
                    refused = Refused("this host is not known here: --host, or ask with a key", code="unknown_host")
                    await as_response(refused)(scope, receive, send_with_headers)
                else:
                    await self.app(scope, receive, send_with_headers)
        except Exception as error:
            logger.exception("%s", account.id)
            if account.status:  # too late for another response: the connection is closed
                account.status, account.error = 500, type(error).__name__
                raise
            account.error = OURS.code
            await as_response(OURS)(scope, receive, send_with_headers)
        finally:
            self.running.discard(account.id)
            account.route = getattr(scope.get("route"), "path", account.route)
            self.report(account)


def _completed(headers: Any, name: str) -> list[tuple[bytes, bytes]]:
    """With what no route has said itself."""
    own = {key.lower() for key, _ in headers}
    return [*headers, *((key, value) for key, value in HEADERS.items() if key not in own), (b"x-request-id", name.encode())]


def _host(scope: Scope) -> str:
    """The Host of a request without its port."""
    host = next((value.decode("latin-1") for key, value in scope["headers"] if key == b"host"), "")
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].lower()
