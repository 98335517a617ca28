"""The routes that OpenAI's clients speak with, over an engine."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import time
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, format_sse_event
from openai import BaseModel
from openai.pagination import SyncPage
from openai.types import Model as ModelObject
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from softprompt.errors import Error
from softprompt.serve import chat, completions, prompts
from softprompt.serve.account import Account
from softprompt.serve.answers import Answers
from softprompt.serve.asking import Engine, Model, find_model
from softprompt.serve.fields import Wish, chat_wish, completion_wish, read_tree
from softprompt.serve.folder import Folder
from softprompt.serve.guard import Reception, read_body
from softprompt.serve.log import log_request, logger
from softprompt.serve.meters import Meters
from softprompt.serve.pages import pages
from softprompt.serve.refusals import OURS, Refused, as_body, as_response, refusal
from softprompt.serve.service import Here, Service, Settings, account_of, needs_key, takes_more

DONE = format_sse_event(data_str="[DONE]")
open_to_all, asked = APIRouter(), APIRouter(prefix="/v1", dependencies=[Depends(needs_key)])


def make_app(engine: Engine, settings: Settings) -> FastAPI:
    """The app; its lifespan ends with the engine's."""
    meters = Meters(engine)
    service = Service(engine, settings, meters, None if settings.folder is None else Folder(settings.folder, engine))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = set()
        if service.folder is not None:
            await service.folder.look(at_once=True)
            watching = {asyncio.create_task(service.folder.watch())}
        yield
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        await engine.close(0)

    app = FastAPI(title="softprompt", openapi_url=None, lifespan=lifespan, redirect_slashes=False)
    app.state.service = service
    for router in (open_to_all, asked, prompts.router):
        app.include_router(router)
    app.include_router(pages(engine, [] if settings.keys is None else [Depends(needs_key)]))
    app.add_exception_handler(Error, _refused)
    app.add_exception_handler(HTTPException, _not_routed)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )

    def report(account: Account) -> None:
        meters.report(account)
        log_request(account)

    app.add_middleware(
        Reception, hosts=settings.hosts, seconds=settings.seconds, between=meters.between, running=service.running, report=report
    )
    return app


# ---- errors ------------------------------------------------------------------------------------------------------------


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Error)
    refused = refusal(error)
    account_of(request).error = refused.code
    if refused.status == 503 and error is not refused:
        logger.error("%s", error)
    return as_response(refused)


async def _not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return as_response(Refused(message, status=error.status_code, code=code, headers=error.headers))


# ---- answers -----------------------------------------------------------------------------------------------------------


class Streamed(EventSourceResponse):
    """Chunks as server-sent events. What goes wrong after the head of the response is an event too."""

    def __init__(self, answers: Answers, chunks: AsyncIterator[BaseModel], account: Account) -> None:
        super().__init__(self._events(chunks), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.answers, self.account, self.ended = answers, account, False

    async def _events(self, chunks: AsyncIterator[BaseModel]) -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield format_sse_event(data_str=_as_json(chunk))
        except Exception as error:
            if not isinstance(error, Error):
                logger.exception("%s", self.account.id)
            refused = refusal(error) if isinstance(error, Error) else OURS
            self.account.status, self.account.error = refused.status, refused.code
            yield format_sse_event(data_str=JSONResponse(as_body(refused)).body.decode())  # type: ignore[union-attr]
        yield DONE
        self.ended = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.answers:
            await super().__call__(scope, receive, send)
        if not self.ended:
            self.account.status, self.account.error = 499, "client_gone"


def _as_json(one: BaseModel) -> str:
    return one.model_dump_json(exclude_unset=True, warnings=False)


async def _answered(request: Request, service: Service, read: Callable[[Any, int], Wish], writer: Any, prefix: str) -> Response:
    """`writer`: the module that knows the shape of the answers."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused("the body must be sent as Content-Type: application/json", status=415, code="invalid_content_type")
    tree = read_tree(await read_body(request, service.settings.most_bytes, service.settings.body_seconds))
    wish = read(tree, service.settings.most_answers)
    answers = await service.begin(request, wish, tree)
    head = {"id": f"{prefix}-{uuid4().hex}", "created": int(time()), "model": wish.model}
    if wish.stream:
        return Streamed(answers, writer.chunks(wish, answers, head), account_of(request))
    async with answers:
        return Response(_as_json(await writer.whole(wish, answers, head)), media_type="application/json")


@asked.post("/chat/completions", dependencies=[Depends(takes_more)], response_model=None)
async def chat_completions(request: Request, service: Here) -> Response:
    return await _answered(request, service, chat_wish, chat, "chatcmpl")


@asked.post("/completions", dependencies=[Depends(takes_more)], response_model=None)
async def text_completions(request: Request, service: Here) -> Response:
    return await _answered(request, service, completion_wish, completions, "cmpl")


# ---- what is served, and how it goes -------------------------------------------------------------------------------------


def _described(model: Model) -> ModelObject:
    more = {"kind": model.kind, "num_virtual_tokens": model.num_virtual, "members": list(model.members)}
    return ModelObject(id=model.name, created=model.created, object="model", owned_by="softprompt", **more)  # type: ignore[arg-type]


@asked.get("/models", response_model=None)
async def models(service: Here) -> Response:
    page = SyncPage[ModelObject](data=[_described(model) for model in service.engine.models()], object="list")
    return Response(_as_json(page), media_type="application/json")


@asked.get("/models/{name:path}", response_model=None)
async def model(name: str, service: Here) -> Response:
    return Response(_as_json(_described(find_model(service.engine, name))), media_type="application/json")


@open_to_all.get("/health", response_model=None)
async def health(service: Here) -> Response:
    return JSONResponse({"status": "draining" if service.draining else "ready"}, 503 if service.draining else 200)


@open_to_all.get("/metrics", dependencies=[Depends(needs_key)], response_model=None)
async def metrics(service: Here) -> Response:
    return Response(generate_latest(service.meters.registry), media_type=CONTENT_TYPE_LATEST)
