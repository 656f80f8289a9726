"""Requests to the three servers, as programs, browsers and strangers send them, over real connections."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .changes import TEXTS, change_bytes, change_value, parse, written
from .children import TRACEBACK, Child, command, last_line
from .documents import change_file, choose_file
from .forgeries import COUNTED, read_folder, write_folder
from .honest import Honest
from .tries import Kind, Try

KEY = "a-long-random-word"
ANSWER_SECONDS = 30.0
SILENT = 400
"""Connections that say nothing, of one input; more than the server may have descriptors for."""

DESCRIPTORS = 256
SILENT_EVERY = 300
"""One of so many inputs opens them."""

LISTED = 24
"""Runs that the viewer lists."""

INCOMPLETE = 1
"""That one whose rows are not all there."""


@dataclass
class Server:
    """A server in a process of its own.

    Attributes:
        name: Of its command.
        child: The process.
        port: Where it listens.
        said: Bytes of its log that were read.
        events: Of the studio's page: numbers of what can be asked for, and the values that are sent with it at first.
    """

    name: str
    child: Child
    port: int
    said: int = 0
    events: tuple[tuple[int, list[Any]], ...] = ()

    @classmethod
    def start(cls, name: str, words: tuple[object, ...], folder: Path) -> Server:
        """Start it and wait for its address."""
        child = Child(_bounded(command(*words)), folder, cpu_seconds=3600)
        while True:
            out = os.pread(child.out, 1000, 0).decode()
            if match := re.search(r"http://127\.0\.0\.1:(\d+)/", out):
                break
            if child.ended_within(0.05):
                raise RuntimeError(f"{name} did not start: {child.wait().err[-3000:]}")
        server = cls(name, child, int(match[1]))
        while not server.answers(PROBES[name]):
            time.sleep(0.1)
        server.news()
        if name == "studio":
            server.events = tuple(server._read_events())
        return server

    def _read_events(self) -> Iterator[tuple[int, list[Any]]]:
        request = f"GET /config HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nConnection: close\r\n\r\n"
        config = json.loads((self.exchange(request.encode(), ANSWER_SECONDS) or b"").partition(b"\r\n\r\n")[2])
        values = {part["id"]: part["props"].get("value") for part in config["components"]}
        for event in config["dependencies"]:
            yield event["id"], [values.get(part) for part in event["inputs"]]

    def news(self) -> str:
        """What it has written since it was last asked."""
        size = os.fstat(self.child.err).st_size
        text = os.pread(self.child.err, min(size - self.said, 1 << 20), self.said)
        self.said = size
        return text.decode("utf-8", errors="replace")

    def exchange(self, request: bytes, patience: float) -> bytes | None:
        """The answer to some bytes; empty: the connection was closed, None: nothing came for so long."""
        with socket.socket() as connection:
            connection.settimeout(patience)
            try:
                connection.connect(("127.0.0.1", self.port))
                connection.sendall(request)
                return _answer(connection)
            except TimeoutError:
                return None
            except OSError:
                return b""

    def answers(self, path: str) -> bool:
        """Whether it answers an ordinary request."""
        request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n"
        return (self.exchange(request.encode(), ANSWER_SECONDS) or b"").startswith(b"HTTP/1.1 2")


def _bounded(work: Callable[[], object]) -> Callable[[], object]:
    def bounded() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
        os.environ["MNEMOSCOPE_API_KEY"] = KEY
        work()

    return bounded


def _answer(connection: socket.socket) -> bytes:
    """Head and body of one answer, or as much as comes of one that does not end."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        part = connection.recv(65536)
        if not part:
            return answer
        answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\ncontent-length: *(\d+)", head)
    try:
        connection.settimeout(ANSWER_SECONDS if length else 0.2)
        while len(body) < (int(length[1]) if length else 1 << 20):
            part = connection.recv(65536)
            if not part:
                break
            body += part
    except TimeoutError:
        pass
    return head + b"\r\n\r\n" + body


PROBES = {"serve": "/health", "view": "/style.css", "studio": "/theme.css"}
running: dict[str, Server] = {}


def _words(honest: Honest, name: str, folder: Path) -> tuple[object, ...]:
    if name == "serve":
        limits = ("--steps", 2, "--max-steps", 3, "--max-n", 2, "--timeout", 20)
        return ("serve", honest.model, "--thresholds", "5", "--name", "m", *limits, "--port", 0)
    if name == "studio":
        return ("studio", honest.model, "--steps", 2, "--seeds", 1, "--port", 0)
    _furnish(honest, folder / "runs")
    return ("view", "runs", "--port", 0)


def _furnish(honest: Honest, folder: Path) -> None:
    """An honest run, one whose rows are not all there, and altered ones."""
    for i in range(LISTED):
        t = Try(random.Random(i), folder)
        members = read_folder(honest.run)
        if i == INCOMPLETE:
            COUNTED[0][1](t.chance, members)
        write_folder(members, folder / f"run{i}")
        if i > INCOMPLETE:
            change_file(t, choose_file(t, folder / f"run{i}", r"^(run|samples|thresholds|controls)\.json"))


def server(honest: Honest, name: str, folder: Path) -> Server:
    """The server of this process, started where it does not run."""
    if name not in running or running[name].child.ended_within(0):
        home = folder.with_name(f"{folder.name}-{name}-{time.monotonic_ns()}")
        home.mkdir()
        running[name] = Server.start(name, _words(honest, name, home), home)
    return running[name]


def end_server(name: str) -> Callable[[], None]:
    """Ends it, if this process has started it."""

    def close() -> None:
        if name in running:
            running[name].child.send(signal.SIGKILL)
            running.pop(name).child.wait()

    return close


# Requests -----------------------------------------------------------------------------------------------------------------

METHODS = (
    "GET", "GET", "GET", "POST", "HEAD", "PUT", "OPTIONS", "DELETE", "TRACE", "CONNECT", "PATCH", "get", "X" * 5000, "G\0T", "",
)  # fmt: skip
ORIGINS = (
    "http://evil.example", "null", "http://[", "http://127.0.0.1:1", "http://\xff", "[", "http://[::1", "//",
    "http://127.0.0.1:99999999", "",
)  # fmt: skip
HOSTS = (
    "evil.example", "127.0.0.1:", "[::1]", "[", "a b", "localhost:99999999", "\xff", "127.0.0.1, evil.example",
    "127.0.0.1@evil.example", "",
)  # fmt: skip
HEADERS = (
    "Content-Length: -1", "Content-Length: 99999999999", "Content-Length: 5\r\nContent-Length: 6", "Transfer-Encoding: chunked",
    "Transfer-Encoding: x", "Expect: 100-continue", "Upgrade: websocket\r\nConnection: Upgrade",
    "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings", "Accept-Encoding: gzip, br", "Content-Encoding: gzip",
    "Content-Encoding: x", "Cookie: a=b; =; mnemoscope-view=x", "Cookie: \xff", "Authorization: Bearer",
    "Authorization: Basic eA==", "Authorization: Bearer \xff\xfe", "X-Forwarded-For: 1.2.3.4", "Range: bytes=0-1,3-999999",
    "If-None-Match: *", "Accept: \xff", "X: " + "y" * 70000, "Sec-Fetch-Site: cross-site", "A\0B: c", ": x", "no colon",
    " folded: x", "Accept-Language: " + "a," * 3000, "Content-Type: application/json; charset=utf-16",
    "Content-Type: multipart/form-data; boundary=x", "Content-Type: ", "Content-Type: application/json; charset=x",
    "Content-Type: \xff",
)  # fmt: skip
RAW = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /\r\n\r\n", b"\0" * 1000,
    b"\r\n" * 1000, b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\n", b"\xff" * 100,
    b"GET " + b"/x" * 50000 + b" HTTP/1.1\r\n\r\n", b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nfffffffff\r\n", b"",
)  # fmt: skip
ODD_PATHS = (
    "//evil.example/x", "/%00", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "*", "http://evil.example/", "/\xff", "/%ff",
    "/" + "a" * 9000, "/?" + "a=b&" * 3000, "", "/%",
)  # fmt: skip


@dataclass
class Request:
    """A request before it is written."""

    method: str
    path: str
    headers: list[str]
    body: bytes = b""


def ordinary(chance: random.Random, asked: Server, honest: Honest) -> Request:
    """What a visitor or client sends, with one odd value."""
    if asked.name == "serve":
        return _order(chance)
    if asked.name == "studio" and chance.random() < 0.7:
        return _event(chance, asked.events)
    return _page(chance, asked.name, honest)


def _altered(chance: random.Random, document: object) -> bytes:
    content = json.dumps(document).encode()
    if chance.random() < 0.2:
        return content
    if chance.random() < 0.2:
        return change_bytes(chance, content)[0]
    return written(change_value(chance, parse(content))[0]).encode("utf-8", errors="surrogatepass")


def _order(chance: random.Random) -> Request:
    path = chance.choice(
        ("/v1/images/generations",) * 5
        + ("/v1/models", "/v1/models/m", "/health", "/metrics", "/openapi.json", "/docs", "/ready")
    )
    if path != "/v1/images/generations":
        return Request(chance.choice(METHODS), path, [])
    document = {
        "model": "m", "prompt": "a cat", "n": 1, "size": "16x16", "response_format": "b64_json", "seed": 7, "steps": 2,
        "guidance_scale": 3.0, "user": "u",
    }  # fmt: skip
    return Request("POST", path, ["Content-Type: application/json"], _altered(chance, document))


def _event(chance: random.Random, events: Sequence[tuple[int, list[Any]]]) -> Request:
    """An event of the page, as the page would send it."""
    if chance.random() < 0.2:
        session = chance.choice(("abc123", "", "%ff", "..", "x" * 999))
        return Request("GET", f"/gradio_api/queue/data?session_hash={session}", [])
    number, values = chance.choice(events)
    asked = {"fn_index": number, "trigger_id": chance.randrange(40), "session_hash": "abc123"}
    path = chance.choice(("/gradio_api/queue/join", "/gradio_api/queue/join", "/gradio_api/run/predict"))
    content = _altered(chance, {"data": values, "event_data": None, **asked})
    return Request("POST", path, ["Content-Type: application/json"], content)


def _page(chance: random.Random, name: str, honest: Honest) -> Request:
    if name == "studio":
        paths = [
            "/", "/config", "/theme.css", "/gradio_api/heartbeat/x", "/packet/x", "/assets/x", "/static/../x",
            "/gradio_api/startup-events", "/manifest.json", "/favicon.ico",
        ]  # fmt: skip
        return Request("GET", chance.choice(paths), [])
    ids = [json.loads(line)["id"] for line in (honest.run / "samples.jsonl").read_bytes().splitlines()]
    one, other = (f"run{chance.randrange(LISTED)}" for _ in range(2))
    paths = [
        "/", f"/run/{one}", f"/sample/{one}?id={chance.choice(ids)}", f"/compare?run={one}&run={other}",
        f"/pair?run={one}&run={other}&id={ids[0]}&id={ids[1]}",
    ]  # fmt: skip
    path = chance.choice(paths)
    for _ in range(chance.randrange(3)):
        key = chance.choice(
            ("sort", "page", "show", "q", "id", "run", "seen", "group", "token", "by", "order", "from", "x")
        )
        path += f"{'&' if '?' in path else '?'}{key}={quote(chance.choice((*TEXTS[:-1], '1', '999999999999', 'score'))[:2000])}"
    return Request("GET", path, [])


def alter(chance: random.Random, request: Request, port: int) -> None:
    """One thing of it that is odd."""
    way = chance.choice(("origin", "host", "header", "header", "method", "path", "origins"))
    if way.startswith("origin"):
        request.headers += [f"Origin: {chance.choice(ORIGINS)}"]
        if way == "origins":
            request.headers.insert(0, f"Origin: http://127.0.0.1:{port}")
    elif way == "host":
        request.headers += [f"Host: {chance.choice(HOSTS)}"]
    elif way == "header":
        request.headers += [chance.choice(HEADERS)]
    elif way == "method":
        request.method = chance.choice(METHODS)
    else:
        request.path = chance.choice(ODD_PATHS)


def encoded(request: Request, port: int, keyed: bool) -> bytes:
    """Its bytes."""
    headers = list(request.headers)
    if not any(h.lower().startswith("host:") for h in headers):
        headers.insert(0, f"Host: 127.0.0.1:{port}")
    if keyed and not any(h.lower().startswith("authorization:") for h in headers):
        headers.append(f"Authorization: Bearer {KEY}")
    if request.body and not any(h.lower().startswith(("content-length:", "transfer-encoding:")) for h in headers):
        headers.append(f"Content-Length: {len(request.body)}")
    head = "\r\n".join([f"{request.method} {request.path} HTTP/1.1", *headers, "Connection: close"])
    return head.encode("latin-1", errors="replace") + b"\r\n\r\n" + request.body


def _try_server(name: str) -> Callable[[Honest, Try], None]:
    def attempt(honest: Honest, t: Try) -> None:
        asked = server(honest, name, t.folder)
        if t.chance.randrange(SILENT_EVERY) == 0:
            _stay_silent(t, asked)
        else:
            _ask(honest, t, asked)
        if not asked.answers(PROBES[name]):
            ended = asked.child.ended_within(0)
            t.blame(
                "tracebacks" if ended else "hangs",
                f"{name}: {'it has ended' if ended else 'no answer any more'} {last_line(asked.news())}",
            )
            end_server(name)()
            return
        news = asked.news()
        if TRACEBACK in news or re.search("(ERROR|CRITICAL) uvicorn.error", news):
            t.blame("tracebacks", f"{name}: {last_line(news)}")

    return attempt


def _ask(honest: Honest, t: Try, asked: Server) -> None:
    keyed = t.chance.random() < 0.8
    if t.chance.random() < 0.15:
        content, whole = t.chance.choice(RAW), False
        if t.chance.random() < 0.6:
            content, _ = change_bytes(t.chance, encoded(ordinary(t.chance, asked, honest), asked.port, keyed))
        request = Request("", "", [])
    else:
        request = ordinary(t.chance, asked, honest)
        if t.chance.random() < 0.5:
            alter(t.chance, request, asked.port)
        content = encoded(request, asked.port, keyed)
        whole = not re.search(rb"(?i)content-length: (-1|99|5)|expect|transfer-encoding|upgrade", content)
    t.say(ascii(content.decode("latin-1"))[1:500])
    answer = asked.exchange(content, ANSWER_SECONDS if whole else 0.3)
    if answer is None:
        if whole:
            t.blame("hangs", f"{asked.name}: no answer")
        return
    if (
        re.match(rf"/run/run{INCOMPLETE}$", request.path)
        and b"HTTP/1.1 200" in answer
        and b" of %d" % honest.samples not in answer
    ):
        t.blame("lost rows", f"view: {request.path} does not say how many of {honest.samples} samples are there")
    _judge(t, asked, request, answer, keyed or "Bearer " + KEY in " ".join(request.headers))


def _judge(t: Try, asked: Server, request: Request, answer: bytes, keyed: bool) -> None:
    match = re.match(rb"HTTP/1\.1 (\d{3})", answer)
    status = int(match[1]) if match else 0
    # The viewer's own page of a damaged run is a sentence.
    if status == 500 and (asked.name != "view" or b"<html" not in answer):
        t.blame("tracebacks", f"{asked.name}: status 500")
    if not 200 <= status < 300:
        return
    origins = [h[8:] for h in request.headers if h.startswith("Origin: ")]
    hosts = [h[6:] for h in request.headers if h.startswith("Host: ")]
    if any(origin != f"http://127.0.0.1:{asked.port}" for origin in origins):
        t.blame("wrongly accepted", f"{asked.name}: an answer to the page of another server ({origins})")
    if "evil.example" in " ".join(hosts) and asked.name != "serve":
        t.blame("wrongly accepted", f"{asked.name}: an answer to another host ({hosts})")
    if asked.name == "serve" and not keyed and request.path and not request.path.startswith(("/health", "/ready")):
        t.blame("wrongly accepted", f"serve: {request.path} without the key")


def _stay_silent(t: Try, asked: Server) -> None:
    """Very many connections that say nothing: others are still answered, and the log stays short."""
    t.say(f"{SILENT} connections that say nothing")
    held = []
    try:
        for _ in range(SILENT):
            connection = socket.socket()
            connection.setblocking(False)
            connection.connect_ex(("127.0.0.1", asked.port))
            held.append(connection)
        time.sleep(1.0)
        if not asked.answers(PROBES[asked.name]):
            t.blame("hangs", f"{asked.name}: no answer beside {SILENT} silent connections")
    finally:
        for connection in held:
            connection.close()
    if len(news := asked.news()) > 100_000:
        t.blame("hangs", f"{asked.name}: {len(news):,} characters of log")


def _prepare(name: str) -> Callable[[Honest], object]:
    return lambda honest: (honest.model, honest.run if name == "view" else None)


KINDS = tuple(
    Kind(f"requests to {name}", inputs, _prepare(name), _try_server(name), end_server(name))
    for name, inputs in (("serve", 1900), ("view", 1800), ("studio", 1300))
)
