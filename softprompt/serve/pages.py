"""The page at `/`, where two answers to one question come beside each other, and what it needs to know of the prompts. Without torch.

The page itself lies in `page/`; it asks /v1/chat/completions as any other client does. Nothing of it comes from another host.
"""

import hashlib
import hmac
import secrets
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response, params
from fastapi.concurrency import run_in_threadpool

from softprompt import report
from softprompt.errors import Error
from softprompt.report.reading import read_runs
from softprompt.serve.asking import Engine, Model, NotServed, find_model
from softprompt.serve.samples import Sample, changed, samples_of

HOME = Path(__file__).parent / "page"
SCRIPTS = ("view.js", "sheet.js", "stream.js", "words.js")
OWN = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
POLICY = f"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; {OWN}"
REPORT_POLICY = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; {OWN}; sandbox"  # a report has styles and no script
HEADERS = {"Cache-Control": "no-cache", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}
NUM_ROWS = 12  # whose answers a report shows

Samples = Callable[[Path, int], Sequence[Sample]]


def pages(engine: Engine, guards: Sequence[params.Depends] = ()) -> APIRouter:
    """The page's routes. `guards` let in who has the key; the page's own files are for everybody, what it shows is not."""
    router = APIRouter(include_in_schema=False)
    samples: Samples = lru_cache(1024)(lambda run, at: samples_of(run))
    reports, secret = Reports(), secrets.token_bytes(32)
    _add_files(router)

    def link(name: str) -> str:
        """Opens one report, since a link cannot carry the key."""
        return hmac.new(secret, name.encode(), hashlib.sha256).hexdigest() if guards else ""

    @router.get("/page/models.json", dependencies=guards)
    async def models() -> list[dict[str, Any]]:
        known = list(engine.models())
        return await run_in_threadpool(lambda: [_shown(one, samples, link(one.name)) for one in known])

    @router.get("/page/card/{name:path}", dependencies=guards)
    async def card(name: str) -> dict[str, Any]:
        own = find_model(engine, name).card
        if own is None:
            raise NotServed(f"{name} has no card")
        return {**own, "base": {**own["base"], "name": last_part(own["base"]["name"])}}

    @router.get("/page/report/{name:path}")
    async def report_of(name: str, key: str = "") -> Response:
        if not hmac.compare_digest(key.encode(), link(name).encode()):
            return _plain(401, "this link has expired: reload the page that it was on")
        try:
            run = find_model(engine, name).report
            if run is None:
                raise NotServed(f"{name} lies in no run's folder: there is no report")
            page = await run_in_threadpool(reports.drawn, run)
        except NotServed as error:
            return _plain(404, str(error))
        except Error as error:
            return _plain(500, f"the report cannot be drawn: {error}")
        return Response(page, media_type="text/html", headers={**HEADERS, "Content-Security-Policy": REPORT_POLICY})

    return router


class Reports:
    """Reports of runs, drawn when they are asked for and again when something in the run has changed; one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made = lru_cache(16)(lambda run, at: report.build_page(read_runs([run]), NUM_ROWS))

    def drawn(self, run: Path) -> str:
        """The report as HTML. Raises RunError for a damaged run, MissingPackage without matplotlib."""
        with self._lock:
            return self._made(run, changed(run))


def last_part(name: str) -> str:
    """A base's name without the place of a local folder."""
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(name).is_absolute():
            return kind(name).name
    return name


def _plain(status: int, text: str) -> Response:
    return Response(text, status, HEADERS, media_type="text/plain")


def _shown(model: Model, samples: Samples, key: str) -> dict[str, Any]:
    """What the page's list says of a base or prompt."""
    card, run = model.card or {}, model.report
    return {
        "name": model.name,
        "kind": model.kind,
        "virtual": model.num_virtual,
        "members": model.members,
        **{field: card.get(field) for field in ("template", "system", "text", "metrics")},
        "samples": [asdict(one) for one in samples(run, changed(run))] if run else [],
        "report": f"page/report/{quote(model.name, safe='')}{f'?key={key}' if key else ''}" if run else None,
    }


def _add_files(router: APIRouter) -> None:
    """The page's own files, read once; a browser asks each time whether one has changed."""
    files = {"/": (HOME / "index.html", "text/html"), "/page/style.css": (HOME / "style.css", "text/css")}
    files |= {"/page/report.css": (report.HOME / "page.css", "text/css")}
    files |= {f"/page/{name}": (HOME / name, "text/javascript") for name in SCRIPTS}
    for address, (file, kind) in files.items():
        router.add_api_route(address, _file(file.read_bytes(), kind), methods=["GET", "HEAD"])


def _file(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": tag, "Content-Security-Policy": POLICY}

    async def give(request: Request) -> Response:
        if tag in request.headers.get("If-None-Match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=kind)

    return give
