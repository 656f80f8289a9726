"""Connections on a real server: whoever sends nothing, or reads nothing, keeps nobody else out and fills no log."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest

from mnemoscope.cli.view import bound
from mnemoscope.errors import UsageError
from mnemoscope.web import connections
from mnemoscope.web.app import server
from mnemoscope.web.connections import Patience, require_room, room_for

SHORT = Patience(head=0.2, body=0.2, reading=0.3, pause=0.03)
ASK = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
LARGE = 30 << 20
"""Bytes of an answer that no buffer of the system holds."""


async def answer(scope, receive, send):
    """The body of what was asked, or a large or late answer."""
    path, body, more = scope["path"], b"", True
    while more and scope["method"] == "POST":
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    if path == "/late":
        await asyncio.sleep(0.8)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"x" * LARGE if path == "/large" else b"here" + body})


@contextmanager
def answering(patience=SHORT):
    """A server; gives its port and itself."""
    with bound("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        running = server(answer, lifespan="off", grace=1, leaving=None, patience=patience)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        until(lambda: running.started)
        try:
            yield SimpleNamespace(port=port, held=running.server_state.connections)
        finally:
            running.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@contextmanager
def line(port, sent=b""):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(sent)
        yield connection


def rest(connection) -> bytes:
    """What still comes until the other side ends it."""
    parts = []
    try:
        while part := connection.recv(1 << 20):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def drip(connection) -> None:
    """Send byte after byte until the other side ends it."""
    with suppress(ConnectionError):
        for _ in range(500):
            connection.sendall(b"x")
            time.sleep(0.01)
        pytest.fail("it was never closed")


def answered(connection) -> bool:
    """Whether one whole answer comes."""
    received = b""
    while not received.endswith(b"\r\n0\r\n\r\n"):
        received += (part := connection.recv(1000))
        if not part:
            return False
    return b"here" in received


def until(true, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came to be so"
        time.sleep(0.01)


# Time ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"G", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n", ASK, ASK + b"GET"])
def test_a_connection_without_a_whole_head_is_closed(sent):
    with answering() as here, line(here.port, sent) as connection:
        assert rest(connection).count(b"200 OK") == sent.count(ASK)


@pytest.mark.parametrize("head", [b"X-Long: ", b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n"])
def test_what_drips_is_closed(head):
    """In the head, and in the body."""
    first = b"GET / HTTP/1.1\r\n" if head.startswith(b"X") else b""
    with answering() as here, line(here.port, first + head) as connection:
        drip(connection)


def test_a_body_that_goes_on_after_its_answer_is_closed():
    head = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n"
    with answering() as here, line(here.port, head) as connection:
        drip(connection)


@pytest.mark.parametrize("end", [b"", b"Connection: close\r\n"])
def test_whoever_reads_nothing_is_closed(end):
    ask = b"GET /large HTTP/1.1\r\nHost: 127.0.0.1\r\n" + end + b"\r\n"
    with answering() as here, line(here.port, ask) as connection:
        until(lambda: here.held)
        until(lambda: not here.held)
        assert len(rest(connection)) < LARGE


def test_whoever_reads_slowly_gets_all_of_it():
    patience = Patience(head=0.2, body=0.2, reading=0.3, pause=0.03)
    with answering(patience) as here, line(here.port, b"GET /large HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") as connection:
        received, began = 0, time.monotonic()
        while received < LARGE:
            received += len(connection.recv(1 << 20))
            time.sleep(0.02)
        assert time.monotonic() - began > patience.reading


def test_an_answer_may_take_its_time():
    with answering() as here, line(here.port, b"GET /late HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") as connection:
        assert rest(connection).endswith(b"here\r\n0\r\n\r\n")


def test_a_connection_may_be_used_again_and_again():
    with answering() as here, line(here.port) as connection:
        for _ in range(20):
            connection.sendall(ASK)
            assert answered(connection)
            time.sleep(0.02)


# Number -------------------------------------------------------------------------------------------------------------------


def test_the_longest_without_a_request_makes_room(monkeypatch, caplog):
    monkeypatch.setattr(connections, "room_for", lambda waiting: 4)
    with answering(Patience()) as here:
        silent = [socket.create_connection(("127.0.0.1", here.port), timeout=10) for _ in range(4)]
        until(lambda: len(here.held) == 4)
        for closed in silent[:3]:
            with line(here.port, ASK) as visitor:
                assert answered(visitor)
                assert rest(closed) == b""
                until(lambda: len(here.held) == 4)
            until(lambda: len(here.held) == 3)
            silent.append(socket.create_connection(("127.0.0.1", here.port), timeout=10))
            until(lambda: len(here.held) == 4)
        for connection in silent:
            connection.close()
    assert 1 <= caplog.text.count("longest without a request was closed") <= 2


def test_where_all_have_requests_another_one_is_told_to_come_back(monkeypatch, caplog):
    monkeypatch.setattr(connections, "room_for", lambda waiting: 2)
    late = b"GET /late HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    with answering(Patience()) as here, line(here.port, late) as one, line(here.port, late) as other:
        until(lambda: len(here.held) == 2)
        until(lambda: all(c.cycle is not None for c in here.held))
        with line(here.port) as third:
            told = rest(third)
        assert told.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nRetry-After: 5\r\n" in told
        assert all(b"here" in rest(connection) for connection in (one, other))
    assert caplog.text.count("the newest was refused") == 1


@pytest.mark.parametrize(
    ("files", "waiting", "room"),
    [(256, 0, 128), (1024, 16, 256), (1024, 400, 464), (1024, 500, 512), (1 << 20, 5000, 5064), (1, 0, 1)],
)
def test_at_least_half_of_all_files_are_left(monkeypatch, files, waiting, room):
    monkeypatch.setattr(connections, "_most_files", lambda: files)
    assert room_for(waiting) == room


def test_a_queue_that_cannot_be_held_is_refused(monkeypatch):
    monkeypatch.setattr(connections, "_most_files", lambda: 1024)
    require_room(511)
    with pytest.raises(
        UsageError, match=r"--queue 512 needs as many connections, and this process may open 1024 files"
    ):
        require_room(512)


@pytest.mark.skipif(os.name != "posix", reason="limits of open files")
def test_many_silent_connections_keep_nobody_out(tmp_path):
    """More of them than the command may open files."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
    code = f"{limit}; import typer; from mnemoscope.cli.view import view; typer.run(view)"
    command = [sys.executable, "-c", code, str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        silent = []
        try:
            found = re.fullmatch(r"(http://127\.0\.0\.1:(\d+)/)\n", process.stdout.readline())
            assert found is not None, process.stderr.read()
            for _ in range(100):
                silent.append(socket.socket())
                silent[-1].setblocking(False)
                silent[-1].connect_ex(("127.0.0.1", int(found[2])))
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(found[1], timeout=20) as page:
                assert page.status == 200
        finally:
            process.terminate()
            for connection in silent:
                connection.close()
        talk = process.stderr.read()
    assert "Traceback" not in talk
    assert len(talk) < 2000


# Logs ---------------------------------------------------------------------------------------------------------------------


def test_what_is_no_http_ends_its_connection_alone(caplog):
    late = b"POST /early HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"

    async def early(scope, receive, send):
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b"no"})

    with bound("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        running = server(early, lifespan="off", grace=1, leaving=None)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        with line(port, late) as connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")
            connection.sendall(b"zz\r\n")
            assert rest(connection).count(b"HTTP/1.1") <= 1
        running.should_exit = True
        thread.join(20)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_strangers_make_one_line_a_second(monkeypatch, caplog):
    now = 100.0
    monkeypatch.setattr(connections, "time", SimpleNamespace(monotonic=lambda: now))
    noisy, loud = logging.getLogger("uvicorn.error"), logging.getLogger("asyncio")
    with connections._one_line_a_second(lambda: False):
        for _ in range(500):
            noisy.warning("Invalid HTTP request received.")
            loud.warning("%s failed", "socket.accept()")
        noisy.error("a fault of ours")
        now += 1.0
        loud.warning("%s failed", "socket.accept()")
    noisy.warning("afterwards")
    assert [record.getMessage() for record in caplog.records] == [
        "Invalid HTTP request received.",
        "a fault of ours",
        "socket.accept() failed (999 lines before this one were left out)",
        "afterwards",
    ]


def test_whoever_wants_to_see_everything_does(caplog):
    caplog.set_level(logging.DEBUG)
    with connections._one_line_a_second(lambda: False):
        for _ in range(5):
            logging.getLogger("asyncio").debug("a detail")
    assert len(caplog.records) == 5


def test_a_connection_that_cannot_be_taken_is_one_line(caplog):
    loop = asyncio.new_event_loop()
    connections._report(loop, {"message": "no", "exception": OSError(errno.EMFILE, "Too many open files")})
    assert [record.getMessage() for record in caplog.records] == ["a connection failed: Too many open files"]
    connections._report(loop, {"message": "a fault of ours", "exception": ValueError("x")})
    loop.close()
    assert caplog.records[1].getMessage() == "a fault of ours"
    assert caplog.records[1].levelname == "ERROR"
