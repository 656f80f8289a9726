"""The image endpoint: OpenAI's images API over HTTP, with a guarded pipeline behind it.

Nothing of a request outlives its answer: no prompt and no picture is stored or logged here. (What the guard logs is its owner's
choice.) Who may come in is decided in front of it, see :class:`mnemoscope.web.access.KeyGate`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import secrets
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Response
from fastapi.security import HTTPBearer
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..bounds import AMOUNT, POSITIVE, within
from ..errors import CannotAudit, UsageError
from ..parsing import ParseError, parse_json
from .guard import GuardError, Refused
from .metrics import CONTENT_TYPE
from .schema import (
    ErrorBody,
    Images,
    Limits,
    Model,
    Models,
    Picture,
    Problem,
    State,
    judged,
    problem_of,
    request_model,
    size_of,
)
from .worker import Drawn, Full, Leaving, Order, Worker, drawing

__all__ = ["PROBES", "Endpoint"]

log = logging.getLogger(__name__)

PROBES = ("/health", "/ready")
"""What tells nothing but whether the server lives and takes work, for those who look after it and have no key."""

BODY_SECONDS = 10.0
"""How long a body may take to arrive."""

LINGER = 1 << 20
"""Bytes of a body that is too large which are still read, so that its sender gets to read the answer."""

READABLE = frozenset({"utf-8", "utf8", "us-ascii"})
"""Encodings of text that a body may be declared to have."""

AGAIN = {"Retry-After": {"description": "Seconds to wait before another try.", "schema": {"type": "integer"}}}
PROBLEMS: dict[int, dict[str, Any]] = {
    400: {"description": "The request is invalid, or the guard refused the generation (`content_policy_violation`)."},
    401: {
        "description": "The key is missing or wrong.",
        "headers": {"WWW-Authenticate": {"schema": {"type": "string"}}},
    },
    403: {"description": "A page of another server made a browser send this."},
    404: {"description": "There is no such model."},
    408: {"description": "The body took too long to arrive."},
    413: {"description": "The body is too large."},
    415: {"description": "The body is not declared as JSON in UTF-8, or it is compressed."},
    421: {"description": "The server does not answer to the name in the Host header."},
    429: {"description": "The queue is full.", "headers": AGAIN},
    500: {"description": "The generation failed."},
    503: {"description": "The server is shutting down.", "headers": AGAIN},
    504: {"description": "The request took longer than it may."},
}
OUTCOMES = ("drawn", "refused", "invalid", "full", "leaving", "timeout", "gone", "failed")
"""What becomes of a request for pictures."""


class Endpoint:
    """A guarded pipeline as a web application.

    Args:
        guarded: From :func:`mnemoscope.serve.guard.guard`.
        limits: What a request may ask for.
        queue: How many requests may wait while one is drawn.
        seconds: How long a request may take, waiting included; then it ends, and its generation after the current step.
        keyed: Whether the document should say that a key is asked for.

    Attributes:
        app: The ASGI application; it wants its lifespan.
    """

    @within(queue=AMOUNT, seconds=POSITIVE)
    def __init__(
        self, guarded: Any, limits: Limits, *, queue: int = 16, seconds: float = 300.0, keyed: bool = False
    ) -> None:
        self.guarded, self.limits, self.seconds = guarded, limits, seconds
        self.request = request_model(limits)
        self.worker = Worker(drawing(guarded), queue)
        self.began = int(time.time())
        self.outcomes: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self.app = self._app(keyed)

    def leave(self, seconds: float) -> None:
        """Refuse what waits and what comes; let what is drawn take that much longer."""
        self.worker.leave(seconds)

    # Addresses ------------------------------------------------------------------------------------------------------------

    async def generations(self, request: Request) -> Images:
        """Draw pictures of a prompt, unless the guard refuses."""
        seeds: tuple[int, ...] = ()
        try:
            order = self._order(await _body(request, self.limits.largest_body))
            seeds = order.seeds
            drawn = await self._drawn(self.worker.submit(order), request)
            pictures = await asyncio.to_thread(_encoded, drawn)
        except BaseException as e:
            outcome, answer = self._failure(e, seeds)
            self.outcomes[outcome] += 1
            raise answer from None  # the cause's frames hold the prompt
        self.outcomes["drawn"] += 1
        return Images(created=int(time.time()), data=pictures, mnemoscope=judged(drawn.decisions, seeds))

    async def models(self) -> Models:
        """The model that is served."""
        return Models(data=[Model(id=self.limits.model, created=self.began)])

    async def health(self) -> State:
        """Whether the server lives."""
        if self.worker.leaving or self.worker.alive:
            return State(status="ok")
        raise Problem(503, "The thread that draws has ended.", "worker_ended", headers={"Retry-After": "1"})

    async def ready(self) -> State:
        """Whether the server takes work; a full queue is no reason against it."""
        if self.worker.alive and not self.worker.leaving:
            return State(status="ready")
        raise _leaving()

    async def metrics(self) -> Response:
        """Counters of the guard and of this server, for Prometheus."""
        return PlainTextResponse(self.guarded.metrics.text() + self._counted(), media_type=CONTENT_TYPE)

    # One request ----------------------------------------------------------------------------------------------------------

    def _order(self, body: bytes) -> Order:
        try:
            asked: Any = self.request.model_validate(parse_json(body))
        except ParseError as e:
            raise Problem(400, f"The body cannot be read: {e}.", "invalid_json") from None
        except ValidationError as e:
            raise problem_of(e) from None
        width, height = size_of(asked.size, self.limits)
        first = secrets.randbits(32) if asked.seed is None else asked.seed
        return Order(
            asked.prompt,
            tuple(range(first, first + (asked.n or 1))),
            width,
            height,
            asked.steps or self.limits.steps,
            asked.guidance_scale or self.limits.guidance,
            asked.negative_prompt,
        )

    async def _drawn(self, future: Future[Drawn], request: Request) -> Drawn:
        """What was drawn; whoever goes away or has waited too long gives up their place."""
        drawn: asyncio.Future[Drawn] = asyncio.wrap_future(future)
        gone = asyncio.ensure_future(_gone(request))
        try:
            either: set[asyncio.Future[Any]] = {drawn, gone}
            done, _ = await asyncio.wait(either, timeout=self.seconds, return_when=asyncio.FIRST_COMPLETED)
            if drawn in done:
                return drawn.result()
            if gone in done:
                raise ClientDisconnect
            raise Problem(504, f"This took longer than {self.seconds:g} s; ask for fewer steps or pictures, or later.")
        finally:
            gone.cancel()
            # Not ``drawn``, which would tell it only later: whoever reads our answer may rely on the place being free.
            future.cancel()

    def _failure(self, error: BaseException, seeds: tuple[int, ...]) -> tuple[str, BaseException]:
        """What to count, and what to answer."""
        if isinstance(error, Problem):
            return ("timeout" if error.status == 504 else "invalid"), error
        if isinstance(error, Refused):
            sentence = "The generation was refused: its score at the first step is above the threshold of this server."
            guarded = judged(error.decisions, seeds)
            return "refused", Problem(400, sentence, "content_policy_violation", param="prompt", guarded=guarded)
        if isinstance(error, Full):
            sentence = "The queue is full; try again later."
            return "full", Problem(429, sentence, headers={"Retry-After": str(error.seconds)})
        if isinstance(
            error, Leaving | asyncio.CancelledError
        ):  # cancelled is what is still there when the server ends at once
            return "leaving", _leaving()
        if isinstance(error, ClientDisconnect):
            return "gone", HTTPException(499)  # nobody reads it
        if isinstance(error, KeyboardInterrupt | SystemExit):
            return "leaving", error
        if isinstance(error, UsageError | CannotAudit):
            return "invalid", Problem(400, str(error))
        if isinstance(error, GuardError):
            return "failed", Problem(500, "The guard failed, and this server draws nothing unguarded.", "guard_failed")
        # Without the message: it may quote the prompt.
        where = "".join(traceback.format_tb(error.__traceback__))
        log.error("a generation failed with %s\n%s", type(error).__name__, where)
        return "failed", Problem(500, f"The generation failed ({type(error).__name__}).")

    # The application ------------------------------------------------------------------------------------------------------

    def _app(self, keyed: bool) -> FastAPI:
        app = FastAPI(
            title=f"mnemoscope serve {self.limits.model}",
            description="OpenAI's images API with a guard against memorized content in front of the model.",
            version="1",
            docs_url=None,  # these pages fetch scripts from elsewhere
            redoc_url=None,
            lifespan=self._lifespan,
            exception_handlers={Problem: _answer, HTTPException: _answer_http, Exception: _answer_unknown},
        )
        app.add_middleware(Heads)
        key: dict[str, Any] = {"dependencies": [Depends(HTTPBearer(auto_error=False))]} if keyed else {}
        let_in = (401, 403, 421) if keyed else (403, 421)
        app.add_api_route(
            "/v1/images/generations",
            self.generations,
            methods=["POST"],
            response_model=Images,
            responses=_problems(*(status for status in PROBLEMS if keyed or status != 401)),
            openapi_extra={"requestBody": _body_document(self.request)},
            **key,
        )
        app.add_api_route("/v1/models", self.models, response_model=Models, responses=_problems(*let_in), **key)
        for path, probe in zip(PROBES, (self.health, self.ready), strict=True):
            app.add_api_route(path, probe, response_model=State, responses=_problems(403, 421, 503))
        told: dict[int | str, dict[str, Any]] = {
            200: {"description": "Text format 0.0.4.", "content": {"text/plain": {"schema": {"type": "string"}}}},
            **_problems(*let_in),
        }
        app.add_api_route("/metrics", self.metrics, response_class=Response, responses=told, **key)
        return app

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.worker.start()
        yield
        self.worker.leave(0.0)
        await asyncio.to_thread(self.worker.join, 1.0)

    def _counted(self) -> str:
        """This server's own families, in the same format as the guard's."""
        worker, name = self.worker, "mnemoscope_serve"
        gauges = {
            "queue_waiting": (worker.waiting, "Requests that wait."),
            "queue_limit": (worker.queue, "Most requests that may wait."),
            "running": (worker.running, "Requests that are drawn at this moment."),
        }
        lines = [
            line
            for what, (value, words) in gauges.items()
            for line in (f"# HELP {name}_{what} {words}", f"# TYPE {name}_{what} gauge", f"{name}_{what} {value}")
        ]
        lines += [
            f"# HELP {name}_requests_total Requests for pictures, by what became of them.",
            f"# TYPE {name}_requests_total counter",
        ]
        lines += [f'{name}_requests_total{{outcome="{k}"}} {v}' for k, v in sorted(self.outcomes.items())]
        return "\n".join([*lines, ""])


class Heads:
    """ASGI middleware: HEAD is GET without a body, wherever there is GET.

    Args:
        app: The application behind it.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self.app({**scope, "method": "GET"}, receive, send_head)


async def _body(request: Request, most: int) -> bytes:
    """The body of a JSON request, whether or not its length was declared."""
    if not _is_readable(request):
        sentence = "Send the body as JSON in UTF-8, not compressed, with one header Content-Type: application/json."
        raise Problem(415, sentence, headers={"Accept-Encoding": "identity"})
    try:
        body = await asyncio.wait_for(_read(request, most), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Problem(408, f"The body took longer than {BODY_SECONDS:g} s to arrive.") from None
    if len(body) > most:
        raise Problem(413, f"The body is larger than {most} bytes.", headers={"Connection": "close"})
    return body


def _is_readable(request: Request) -> bool:
    """Whether the body is declared as plain JSON in UTF-8."""
    kinds = request.headers.getlist("content-type")
    codings = request.headers.getlist("content-encoding")
    if len(kinds) != 1 or any(coding.strip().lower() not in ("", "identity") for coding in codings):
        return False
    kind, *parameters = (part.strip().lower() for part in kinds[0].split(";"))
    charsets = [text.partition("=")[2].strip('"') for text in parameters if text.startswith("charset=")]
    return kind == "application/json" and READABLE.issuperset(charsets)


async def _read(request: Request, most: int) -> bytes:
    """At most one byte more than allowed; of what comes after them a little is read and thrown away."""
    body, seen = bytearray(), 0
    async for chunk in request.stream():
        seen += len(chunk)
        body += chunk[: most + 1 - len(body)]
        if seen > most + LINGER:
            break
    return bytes(body)


async def _gone(request: Request) -> None:
    """Returns when the client has hung up; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _encoded(drawn: Drawn) -> list[Picture]:
    return [Picture(b64_json=base64.b64encode(_png(image)).decode()) for image in drawn.pictures]


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _leaving() -> Problem:
    return Problem(503, "The server is shutting down; try again in a moment.", headers={"Retry-After": "5"})


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, **PROBLEMS[status]} for status in statuses}


def _body_document(model: Any) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}


async def _answer(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.response()


async def _answer_http(request: Request, error: Exception) -> Response:
    """What the framework refuses: unknown addresses and methods."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if "GET" in (allowed := headers.get("Allow", "").split(", ")):
        headers["Allow"] = ", ".join(sorted({*allowed, "HEAD"}))
    return Problem(error.status_code, f"{error.detail}.", headers=headers).response()


async def _answer_unknown(request: Request, error: Exception) -> JSONResponse:
    return Problem(500, f"The server failed ({type(error).__name__}).", "internal_error").response()
