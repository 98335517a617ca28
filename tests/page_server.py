"""A server of the page for its tests: models with cards and a run, and answers in OpenAI's stream that say what was asked."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse

from softprompt.serve.asking import Model
from softprompt.serve.pages import pages


class Shelf:
    """As much of an engine as the page asks for."""

    def __init__(self, models: Sequence[Model]) -> None:
        self.known = models

    def models(self) -> Sequence[Model]:
        return self.known


class Server:
    """`asked`: the requests so far. `gone`: how many of their clients left before the end. `key`: where one is needed."""

    def __init__(self, models: Sequence[Model], key: str | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        self.gone, self.key, self.shelf = 0, key, Shelf(models)
        self.app = FastAPI()
        guards = [Depends(self._let_in)] if key else []
        self.app.include_router(pages(self.shelf, guards))  # type: ignore[arg-type]
        self.app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"], dependencies=guards)

    def _let_in(self, request: Request) -> None:
        if request.headers.get("Authorization") != f"Bearer {self.key}":
            raise HTTPException(401, "no such key")

    async def _chat(self, request: Request) -> Any:
        body = await request.json()
        self.asked.append(body)
        text = body["messages"][-1]["content"]
        refusal = self._refused(body, text)
        if refusal:
            status, message = refusal
            return JSONResponse({"error": {"message": message, "type": "x", "param": None, "code": None}}, status, {"Retry-After": "7"})
        return StreamingResponse(self._events(body, text), media_type="text/event-stream")

    def _refused(self, body: dict[str, Any], text: str) -> tuple[int, str] | None:
        if text == "busy":
            return 429, "too many requests wait"
        if body["messages"][0]["role"] == "system" and text.endswith("no system"):
            return 400, "the chat template refuses this conversation"
        return None

    async def _events(self, body: dict[str, Any], text: str) -> AsyncIterator[str]:
        def chunk(delta: dict[str, str], finish: str | None = None, **more: Any) -> str:
            choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
            return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': choices, **more}, ensure_ascii=False)}\n\n"

        said = f"{body['model']} 说：{text} <b>bold</b> &amp; so on".split(" ")
        try:
            yield chunk({"role": "assistant", "content": ""})
            if text == "think":
                yield chunk({"reasoning_content": "hm, hm"})
            for number in range(10_000 if text == "for ever" else len(said)):
                yield chunk({"content": ("" if number == 0 else " ") + said[number % len(said)]})
                await asyncio.sleep(0.02)
                if text == "break":
                    return
            yield chunk({}, "length" if text == "long" else "stop")
            virtual = next(one.num_virtual for one in self.shelf.models() if one.name == body["model"])
            details = {"cached_tokens": virtual, "virtual_tokens": virtual}
            usage = {"prompt_tokens": 1_200, "completion_tokens": len(said), "prompt_tokens_details": details}
            yield chunk({}, choices=[], usage=usage)
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.gone += 1
            raise


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The address of a server with this app."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [found]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{found.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()
