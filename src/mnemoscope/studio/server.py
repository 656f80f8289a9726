"""The page behind a server that knows only the addresses the page needs, and keeps a browser from asking anybody else.

Gradio's own routes can do far more: take files, fetch addresses, show other pages. None of that is reachable here.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast
from urllib.parse import parse_qsl, urlencode

import gradio
from fastapi import FastAPI
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import MnemoscopeError, UsageError
from ..report.packet import pack
from .events import Handler, handlers_of, is_session, read_event
from .model import Studio
from .page import Page, build
from .session import LARGEST

__all__ = ["METHODS", "POLICY", "create_app"]

METHODS = ("GET", "HEAD", "POST")

POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self'; manifest-src 'self'; worker-src 'self' blob:; form-action 'self'; base-uri 'self'; "
    "frame-ancestors 'none'"
)
"""Gradio's page is made by inline scripts and templates that it compiles; but whatever runs, it can ask nobody else."""

JOIN, DATA = "/gradio_api/queue/join", "/gradio_api/queue/data"
HEARTBEAT = "/gradio_api/heartbeat/"
EVENTS = frozenset({JOIN, "/gradio_api/run/predict"})
"""Where events are sent to."""
STREAMS = (DATA, HEARTBEAT)
"""Answers that go on as long as the page is open."""

PAGES = frozenset(
    {
        "/",
        "/theme.css",
        "/manifest.json",
        "/favicon.ico",
        "/config",
        "/gradio_api/startup-events",
        *EVENTS,
        DATA,
    }
)
FOLDERS = ("/assets/", "/static/", HEARTBEAT, "/packet/")
"""What the page asks for; everything else is not there."""

LONGEST_PATH = 250
"""Characters of an address, without what follows a question mark."""

ON_DISK = frozenset({"page", "deep_link"})
"""Parts of an address by which Gradio opens other pages and stored ones; there are none."""

ABOUT_BODIES = frozenset({b"content-type", b"content-length", b"transfer-encoding", b"content-encoding"})

LARGEST_REQUEST = 2 * LARGEST
"""Bytes: a session's file is sent as text, which takes a third more."""

MOST_PACKETS = 64


class Packets:
    """Exported run folders that may be downloaded, under names that nobody guesses."""

    def __init__(self) -> None:
        self._folders: OrderedDict[str, Path] = OrderedDict()

    def offer(self, folder: Path) -> str:
        """A key to a folder; the oldest stops working when there are many."""
        key = secrets.token_urlsafe(12)
        self._folders[key] = folder
        while len(self._folders) > MOST_PACKETS:
            self._folders.popitem(last=False)
        return key

    def send(self, request: Request) -> Response:
        """The folder of a key as one file, made now and deleted when it is sent."""
        folder = self._folders.get(request.path_params["key"])
        if folder is None:
            return PlainTextResponse("404: this download is not there any more; export the session again.\n", 404)
        kept = tempfile.TemporaryDirectory(prefix="mnemoscope-")
        try:
            packed = pack([folder], Path(kept.name) / f"{folder.name}.packet.zip")
        except MnemoscopeError as e:
            kept.cleanup()
            return PlainTextResponse(f"{e}\n", 409)
        return FileResponse(packed.path, filename=packed.path.name, background=BackgroundTask(kept.cleanup))


def create_app(studio: Studio) -> Doors:
    """The studio as an ASGI application with a lifespan. Whoever serves it decides who may come in, and calls ``leave`` at the end."""

    async def make() -> Doors:
        packets = Packets()
        page = build(studio, packets.offer)
        return Doors(_app(page, packets), handlers_of(page.blocks), page.leave)

    # Where no event loop runs, Gradio makes one for each of its locks and never closes it.
    return asyncio.run(make())


def _app(page: Page, packets: Packets) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_route("/packet/{key}", packets.send, methods=["GET"])
    return gradio.mount_gradio_app(
        app, page.blocks, "/", footer_links=[], run_history=False, show_error=False, max_file_size=1, ssr_mode=False,
        enable_monitoring=False, pwa=False, mcp_server=False, theme=page.theme, css=page.css,
    )  # fmt: skip


class Doors:
    """ASGI middleware: the addresses that the page needs, and requests of the size and shape that it makes.

    Args:
        app: The application behind it.
        handlers: What the handlers of the page take.
        leaving: Called when everything ends.
    """

    def __init__(
        self, app: ASGIApp, handlers: Mapping[int, Handler] = MappingProxyType({}), leaving: Callable[[], object] = bool
    ):
        self.app, self.handlers, self.leaving = app, handlers, leaving
        self._ends = False
        self._streams: set[asyncio.Task[Any]] = set()

    def leave(self) -> None:
        """End: work is told to stop, and answers that would go on for ever are cut off."""
        self._ends = True
        self.leaving()
        for stream in self._streams:
            stream.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or say that there is nothing."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        if not _is_there(path):
            await PlainTextResponse("404: there is no such page.\n", 404)(scope, receive, send)
            return
        receive = _bounded(receive)
        try:
            _judge_address(scope)
            if path in EVENTS and scope["method"] == "POST":
                scope, receive = await self._read_event(scope, receive)
        except UsageError as e:
            await JSONResponse({"detail": str(e)}, 422)(scope, receive, send)
            return
        await self._answer(scope, receive, send)

    async def _read_event(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        """A request for an event, with the event as we read it.

        Raises:
            UsageError: it is none.
        """
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise UsageError(
                    "this is no event of the page (it is too large, or it did not arrive whole); load the page again."
                )
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        read = read_event(bytes(body), self.handlers, queued=scope["path"] == JOIN)
        others = [(k, v) for k, v in scope["headers"] if k.lower() not in ABOUT_BODIES]
        headers = [*others, (b"content-type", b"application/json"), (b"content-length", str(len(read)).encode())]
        return {**scope, "headers": headers}, _replayed(read, receive)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on. What is cut off at the end is an end, not an error with a traceback."""
        begun = complete = False

        async def watched(message: Message) -> None:
            nonlocal begun, complete
            begun = True
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        task = asyncio.current_task()
        streams = self._streams if scope["path"].startswith(STREAMS) and task is not None else set()
        streams.add(cast("asyncio.Task[Any]", task))
        try:
            await self.app(scope, receive, watched)
        except asyncio.CancelledError:
            if not self._ends:
                raise
        finally:
            streams.discard(cast("asyncio.Task[Any]", task))
        if not begun:
            await PlainTextResponse("503: the studio has ended.\n", 503)(scope, receive, send)
        elif not complete:
            await send({"type": "http.response.body", "body": b""})


def _is_there(path: str) -> bool:
    """Whether the page needs the address; longer and stranger ones than it has would be looked for on the disk."""
    return len(path) <= LONGEST_PATH and path.isascii() and (path in PAGES or path.startswith(FOLDERS))


def _judge_address(scope: Scope) -> None:
    """Look at what an address says, and take out what Gradio would look for on the disk.

    Raises:
        UsageError: it names no visit where one is needed.
    """
    path, query = scope["path"], parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
    names = [value for name, value in query if name == "session_hash"]
    if path.startswith(HEARTBEAT):
        names.append(path.removeprefix(HEARTBEAT))
    if (path.startswith(STREAMS) and len(names) != 1) or not all(map(is_session, names)):
        raise UsageError("this names no visit of the page (session_hash); load the page again.")
    if any(name in ON_DISK for name, _ in query):
        scope["query_string"] = urlencode([(k, v) for k, v in query if k not in ON_DISK], encoding="latin-1").encode()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A body that is there already; after it, whatever comes."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


def _bounded(receive: Receive) -> Receive:
    """What a visitor sends ends where it gets too large; half a request is none."""
    seen = 0

    async def bounded() -> Message:
        nonlocal seen
        message: dict[str, Any] = dict(await receive())
        seen += len(message.get("body", b""))
        return {"type": "http.disconnect"} if seen > LARGEST_REQUEST else message

    return bounded
