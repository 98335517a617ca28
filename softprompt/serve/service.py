"""What all routes of one server work with."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

from softprompt.errors import DataError
from softprompt.serve.account import Account
from softprompt.serve.answers import Answers
from softprompt.serve.asking import Engine
from softprompt.serve.choices import Count
from softprompt.serve.fields import Wish
from softprompt.serve.folder import Folder
from softprompt.serve.guard import Keys
from softprompt.serve.meters import Meters
from softprompt.serve.refusals import Refused

AGAIN = "5"  # seconds after which another server may stand here


@dataclass(frozen=True)
class Settings:
    """`hosts`: what a request's Host may be, None for anything. `most_bytes`: of a body; `most_upload`: of an archive, packed and
    unpacked. `most_answers`: of a request. `seconds`: of a request; `body_seconds`: of those until its body is there."""

    keys: Keys | None = None
    admin_keys: Keys | None = None
    hosts: frozenset[str] | None = None
    cors_origins: Sequence[str] = ()
    folder: Path | None = None
    most_bytes: int = 1 << 20
    most_upload: int = 64 << 20
    most_answers: int = 128
    seconds: float = 600.0
    body_seconds: float = 30.0
    log_texts: bool = False


@dataclass
class Service:
    """`draining`: no more is taken, what has begun is finished. `running`: requests that have not ended."""

    engine: Engine
    settings: Settings
    meters: Meters
    folder: Folder | None
    draining: bool = False
    running: set[str] = field(default_factory=set)

    async def begin(self, request: Request, wish: Wish, asked: object) -> Answers:
        """Asks the engine; returns when all texts are read. Raises Refused, and what an engine raises."""
        account = account_of(request)
        kinds = {model.name: model.kind for model in self.engine.models()}
        account.model, account.kind, account.user = wish.model, kinds.get(wish.model, "none"), wish.user
        account.answers = len(wish.asks)
        if self.settings.log_texts:
            account.asked, account.said = asked, {}
        deadline = asyncio.get_running_loop().time() + self.settings.seconds - account.seconds
        answers = Answers(self.engine, wish.asks, request.receive, deadline, account)
        try:
            await answers.begin()
        except DataError as error:
            raise Refused(error.reason, param=wish.place, code="invalid_text") from None
        count = Count.of(answers.begun, wish.n)
        account.num_prompt, account.num_virtual, account.num_cached = count.num_text, count.num_virtual, count.num_cached
        return answers


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def account_of(request: Request) -> Account:
    account: Account = request.state.account
    return account


Here = Annotated[Service, Depends(service_of)]


def needs_key(request: Request, service: Here) -> None:
    """For routes that ask for a key where there are any."""
    if service.settings.keys is not None:
        service.settings.keys.check(request)


def needs_admin(request: Request, service: Here) -> None:
    """For routes that are there only with an admin key."""
    if service.settings.admin_keys is None:
        raise Refused("prompts are not managed here: the server was started without --admin-key-file", status=403, code="no_admin")
    service.settings.admin_keys.check(request)


def takes_more(service: Here) -> None:
    """For routes that begin something."""
    if service.draining:
        raise Refused("this server is going down", status=503, code="draining", headers={"Retry-After": AGAIN, "Connection": "close"})
