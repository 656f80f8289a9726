"""Who may look: this machine, unless a host and a token are given; and what a page may do in a browser: nothing but show itself.

Another page in the same browser cannot read ours: the server answers only to names that are its own (against DNS rebinding), only
to ``GET`` where nothing else was said, and to nothing that a page of another server makes the browser send. A content security
policy allows our one script and our one style sheet, and no address but ours.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import socket
import traceback
from collections.abc import Callable, Collection, Mapping
from urllib.parse import parse_qsl, quote, urlencode

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import redaction
from ..errors import UsageError

__all__ = ["HEADERS", "Gate", "KeyGate", "hosts", "is_loopback"]

log = logging.getLogger(__name__)

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

COOKIE = "mnemoscope-view"

READING = frozenset({"GET", "HEAD"})
TOKEN = "MNEMOSCOPE_VIEW_TOKEN"
"""The environment variable that holds the token of `mnemoscope view`."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}
"""Sent with everything."""

NO_TOKEN = (
    "this server asks for its token. Open the address once with ?token=… (what {variable} or --token was set to), "
    "or send the header Authorization: Bearer …."
)
NO_KEY = "this server asks for its key: send the header Authorization: Bearer … with it."
BEARER = {"WWW-Authenticate": "Bearer"}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def hosts(host: str, token: str | None, variable: str = TOKEN) -> frozenset[str]:
    """The names by which a server may be called, besides addresses in digits, which no name server can forge.

    Args:
        host: Where it listens.
        token: What it asks for.
        variable: The environment variable that a token is best set by.

    Raises:
        UsageError: others than this machine could reach it, and there is no token.
    """
    if token is not None and not token.strip():
        raise UsageError("the token is empty; give a long random one, or none to be reachable from this machine only.")
    if token is not None and re.search("[\ud800-\udfff]", token):
        raise UsageError("the token has bytes that are no UTF-8, which no browser can send; give a long random one.")
    if is_loopback(host):
        return LOOPBACK | {host}
    if token is None:
        raise UsageError(
            f"--host {host} would let in others than this machine; set {variable} to a long random word as well, "
            "or leave --host out."
        )
    return LOOPBACK | {host, socket.gethostname().lower(), socket.getfqdn().lower()}


class Gate:
    """ASGI middleware: refuses what :mod:`mnemoscope.web.access` says, and adds :data:`HEADERS` to every answer.

    An exception of whatever is behind it is an answer too, and no answer leads to another host.

    Args:
        app: The application behind it.
        host: Where the server listens.
        token: What a visitor must show; None: nothing.
        variable: The environment variable that a token is best set by, as messages name it.
        methods: What may be asked for; None: the application knows.
        headers: Sent with every answer.

    Raises:
        UsageError: see :func:`hosts`.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str = "127.0.0.1",
        token: str | None = None,
        *,
        variable: str = TOKEN,
        methods: Collection[str] | None = READING,
        headers: Mapping[str, str] = HEADERS,
    ):
        self.app = app
        self.names = hosts(host, token, variable)
        self.variable, self.methods, self.headers = variable, methods, headers
        self.digits = not is_loopback(host)
        self.token = token
        redaction.remember({"token": token})
        # The cookie is not the token itself: browsers send cookies to every port of a host.
        self.pass_ = hmac.new((token or "").encode(), b"mnemoscope view", hashlib.sha256).hexdigest()
        self.cookie = f"{COOKIE}-{self.pass_[:8]}"  # which is why two servers need two names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        last = ""

        async def send_guarded(message: Message) -> None:
            nonlocal last
            if message["type"] == "http.response.start":
                self._guard_headers(MutableHeaders(scope=message))
            await send(message)
            last = (
                "end" if message["type"] == "http.response.body" and not message.get("more_body") else message["type"]
            )

        try:
            answer: ASGIApp = self._refusal(HTTPConnection(scope)) or self.app
            await answer(scope, receive, send_guarded)
        except ClientDisconnect:
            log.debug("a visitor went away")
        except Exception as error:
            # Without the message: it may quote what was sent.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("a request failed with %s\n%s", type(error).__name__, where)
            if not last:
                await self._refused(500, "the server failed at this request.")(scope, receive, send_guarded)
            elif last != "end":
                raise  # so that half an answer is seen to be one: the connection ends

    def _guard_headers(self, headers: MutableHeaders) -> None:
        for name, value in self.headers.items():
            headers[name] = value
        # Frameworks make whole addresses of the Host header, which is the visitor's.
        if (address := headers.get("location")) is not None:
            headers["location"] = _without_host(address)

    def _refusal(self, asked: HTTPConnection) -> Response | None:
        if not self._ours(asked.headers.getlist("host")):
            return self._refused(
                421,
                "this server does not answer to that name; open it as http://127.0.0.1 or http://localhost with its port.",
            )
        if self.methods is not None and asked.scope["method"] not in self.methods:
            return self._refused(405, "there is nothing to change here.", Allow=", ".join(sorted(self.methods)))
        if _foreign(asked):
            return self._refused(403, "this was sent by a page of another server; open ours instead.")
        return None if self.token is None else self._without_token(asked)

    def _refused(self, status: int, sentence: str, **headers: str) -> Response:
        return PlainTextResponse(f"{status}: {sentence}\n", status, headers)

    def _ours(self, given: list[str]) -> bool:
        if len(given) != 1:
            return False
        name = _hostname(given[0])
        return name in self.names or (self.digits and _is_address(name))

    def _without_token(self, asked: HTTPConnection) -> Response | None:
        if self._shows_token(asked):
            return None
        if self._same(asked.cookies.get(self.cookie, ""), self.pass_):
            return None
        if self._same(asked.query_params.get("token", ""), self.token or ""):
            return self._welcome(asked)
        return self._refused(401, NO_TOKEN.format(variable=self.variable), **BEARER)

    def _shows_token(self, asked: HTTPConnection) -> bool:
        given = asked.headers.getlist("authorization")
        scheme, _, shown = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        return scheme.lower() == "bearer" and self._same(shown.strip(), self.token or "")

    def _welcome(self, asked: HTTPConnection) -> Response:
        """A cookie, and the same address without the token, so that it stays in no history."""
        rest = [
            (k, v)
            for k, v in parse_qsl(asked.scope["query_string"].decode("latin-1"), keep_blank_values=True)
            if k != "token"
        ]
        # A path of ours begins with one slash; two would be another host.
        path = "/" + quote(asked.scope["path"].lstrip("/"))
        answer = RedirectResponse(path + ("?" + urlencode(rest) if rest else ""), 303)
        answer.set_cookie(self.cookie, self.pass_, httponly=True, samesite="lax", path="/")
        return answer

    @staticmethod
    def _same(shown: str, known: str) -> bool:
        return hmac.compare_digest(shown.encode(errors="replace"), known.encode())


class KeyGate(Gate):
    """The same before a service that programs call: the key is a bearer, never a cookie or a part of an address.

    Args:
        app: The application behind it.
        host: Where the server listens.
        key: What a caller must show; None: nothing.
        refusal: Makes the answer that says no, from status, sentence and headers.
        variable: The environment variable that the key is best set by.
        open: Paths that need no key.

    Raises:
        UsageError: see :func:`hosts`.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        key: str | None,
        *,
        refusal: Callable[[int, str, Mapping[str, str]], Response],
        variable: str,
        open: Collection[str] = (),
    ):
        super().__init__(app, host, key, variable=variable, methods=None)
        self.refusal, self.open = refusal, frozenset(open)

    def _refused(self, status: int, sentence: str, **headers: str) -> Response:
        return self.refusal(status, sentence[0].upper() + sentence[1:], headers)

    def _ours(self, given: list[str]) -> bool:
        # A page that a forged name leads here does not know the key, and a proxy before us may keep a name of its own.
        return super()._ours(given) or (self.token is not None and len(given) == 1)

    def _without_token(self, asked: HTTPConnection) -> Response | None:
        if asked.scope["path"] in self.open or self._shows_token(asked):
            return None
        return self._refused(401, NO_KEY, **BEARER)


def _hostname(header: str) -> str:
    """The name in a Host header, without port and brackets, in lower case; empty: it is none."""
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+))(?::[0-9]+)?", header.strip().lower())
    return "" if found is None else found[1] or found[2]


def _foreign(asked: HTTPConnection) -> bool:
    """Whether a page of another server made the browser send this: browsers name the sender wherever it could do harm."""
    senders = asked.headers.getlist("origin")
    name = asked.headers["host"].strip().lower()
    return len(senders) > 1 or not {sender.lower() for sender in senders} <= {f"http://{name}", f"https://{name}"}


def _without_host(address: str) -> str:
    """The same address on this server."""
    path = re.sub(r"^([a-z][a-z0-9+.-]*:)?//[^/?#]*", "", address, flags=re.IGNORECASE)
    # Two slashes at the beginning would be another host.
    return path if path == address and not path.startswith("/") else "/" + path.lstrip("/\\")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
