"""The page behind a server that knows only the addresses the page needs, and keeps a browser from asking anybody else.

Gradio's own routes can do far more: take files, fetch addresses, show other pages. None of that is reachable here.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import gradio
from fastapi import FastAPI
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import MnemoscopeError
from ..report.packet import pack
from .model import Studio
from .page import build
from .session import LARGEST

__all__ = ["METHODS", "POLICY", "create_app"]

METHODS = ("GET", "HEAD", "POST")

POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self'; manifest-src 'self'; worker-src 'self' blob:; form-action 'self'; base-uri 'self'; "
    "frame-ancestors 'none'"
)
"""Gradio's page is made by inline scripts and templates that it compiles; but whatever runs, it can ask nobody else."""

PAGES = frozenset(
    {
        "/",
        "/theme.css",
        "/manifest.json",
        "/favicon.ico",
        "/config",
        "/gradio_api/startup-events",
        "/gradio_api/run/predict",
    }
)
FOLDERS = ("/assets/", "/static/", "/gradio_api/heartbeat/", "/gradio_api/queue/", "/packet/")
"""What the page asks for; everything else is not there."""

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


def create_app(studio: Studio) -> ASGIApp:
    """The studio as an ASGI application that wants its lifespan; whoever serves it decides who may come in."""

    async def made() -> ASGIApp:
        return Doors(_app(studio))

    # Where no event loop runs, Gradio makes one for each of its locks and never closes it.
    return asyncio.run(made())


def _app(studio: Studio) -> FastAPI:
    packets = Packets()
    page = build(studio, packets.offer)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_route("/packet/{key}", packets.send, methods=["GET"])
    return gradio.mount_gradio_app(
        app, page.blocks, "/", footer_links=[], run_history=False, show_error=False, max_file_size=1, ssr_mode=False,
        enable_monitoring=False, pwa=False, mcp_server=False, theme=page.theme, css=page.css,
    )  # fmt: skip


class Doors:
    """ASGI middleware: the addresses that the page needs, and requests of a size that it makes.

    Args:
        app: The application behind it.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or say that there is nothing."""
        if scope["type"] == "http":
            path = scope["path"]
            if path not in PAGES and not path.startswith(FOLDERS):
                await PlainTextResponse("404: there is no such page.\n", 404)(scope, receive, send)
                return
            receive = _bounded(receive)
        await self.app(scope, receive, send)


def _bounded(receive: Receive) -> Receive:
    """What a visitor sends ends where it gets too large; half a request is none."""
    seen = 0

    async def bounded() -> Message:
        nonlocal seen
        message: dict[str, Any] = dict(await receive())
        seen += len(message.get("body", b""))
        return {"type": "http.disconnect"} if seen > LARGEST_REQUEST else message

    return bounded
