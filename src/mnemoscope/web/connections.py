"""How many connections a server holds, and for how long: whoever sends nothing, or reads nothing, keeps nobody else out.

Where there are as many as there may be, the one that has been without a request for longest makes room for the newest. What
strangers make the server say takes one line a second.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from socket import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import UsageError

__all__ = ["Config", "Patience", "Server", "require_room", "room_for"]

log = logging.getLogger(__name__)

MOST = 256
"""Connections that are held where nothing asks for more."""

SPARE = 64
"""Connections beside those that wait for an answer: of whoever looks after the server, and of those that are told to come back."""

AT_ONCE = 16
"""Connections that are taken together. Up to three times as many are open before the first of them is judged."""

BACKLOG = 128
"""Connections that the system keeps until we take them; of more than these, honest ones too would have to try again after a second."""

FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 5\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n"
    b"503: this server holds as many connections as it may; try again in a moment.\n"
)

NOISY = ("uvicorn.error", "asyncio", "mnemoscope.web.access", __name__)
"""Loggers that speak because of what strangers send."""


@dataclass(frozen=True)
class Patience:
    """How long a connection may take, in seconds, before it is closed.

    Attributes:
        head: For a whole head: from the beginning, or from the last answer.
        body: For a whole body, from its head.
        reading: Without reading anything of an answer that waits for it.
        pause: Between two looks at all connections.
    """

    head: float = 10.0
    body: float = 60.0
    reading: float = 30.0
    pause: float = 1.0


def room_for(waiting: int = 0) -> int:
    """How many connections a server may hold, so that at least half of the files that it may open are left for everything else.

    Args:
        waiting: Connections that may wait for an answer with good reason.
    """
    return max(1, min(_most_files() // 2, max(MOST, waiting + SPARE)))


def require_room(waiting: int) -> None:
    """Refuse a queue that is longer than connections can be held.

    Raises:
        UsageError: it is.
    """
    if waiting >= _most_files() // 2:
        raise UsageError(
            f"--queue {waiting} needs as many connections, and this process may open {_most_files()} files; "
            "raise that limit (ulimit -n), or give a shorter queue."
        )


def _most_files() -> int:
    if sys.platform == "win32":
        return 2 * MOST
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


class Config(uvicorn.Config):
    """Uvicorn's configuration, with bounds on connections.

    Args:
        app: What answers.
        waiting: Connections that may wait for an answer with good reason.
        patience: How long the others may take.
        given: What uvicorn takes.
    """

    def __init__(self, app: Any, *, waiting: int = 0, patience: Patience | None = None, **given: Any):
        self.room, self.patience = room_for(waiting), patience or Patience()
        super().__init__(
            app,
            http=Connection,
            ws="none",
            backlog=max(1, min(AT_ONCE, _most_files() // 16)),
            # Of answers that are still made for whoever has gone; connections are bounded below it.
            limit_concurrency=2 * self.room + AT_ONCE,
            **given,
        )


class Connection(H11Protocol):
    """One connection, which knows what it waits for and since when."""

    config: Config

    def __init__(self, *given: Any, **more: Any):
        super().__init__(*given, **more)
        self._state: tuple[str, Any] = ("head", None)
        self._since = time.monotonic()

    def connection_made(self, transport: Any) -> None:
        """Begin, and make room where there is none."""
        super().connection_made(transport)
        held = [other for other in self.connections if isinstance(other, Connection) and not other._is_gone]
        room = self.config.room
        if len(held) <= room:
            return
        idle = [other for other in held if other is not self and other._current_state()[0] == "head"]
        if idle:
            min(idle, key=lambda other: other._since).transport.abort()
            log.warning("more than %d connections: the one that was longest without a request was closed", room)
        else:
            transport.write(FULL)
            transport.close()
            log.warning("more than %d connections, all with requests: the newest was refused", room)

    def handle_events(self) -> None:
        """As uvicorn; what breaks the protocol when an answer has begun already ends the connection and nothing else."""
        try:
            super().handle_events()
        except h11.ProtocolError:
            self.transport.abort()

    def close_if_overdue(self, now: float) -> None:
        """End it where it takes longer than it may.

        Args:
            now: The time, of the monotonic clock.
        """
        state, patience = self._current_state(), self.config.patience
        if state != self._state:
            self._state, self._since = state, now
        most = {"head": patience.head, "body": patience.body, "reading": patience.reading}.get(state[0])
        if most is not None and now - self._since > most:
            self.transport.abort()

    def _current_state(self) -> tuple[str, Any]:
        """What it waits for (head, body, reading, answer), and what changes with each step forward."""
        if unread := self.transport.get_write_buffer_size():
            return "reading", unread
        if self.cycle is None or self.cycle.response_complete:
            return "head", self.cycle
        return "body" if self.cycle.more_body else "answer", self.cycle

    @property
    def _is_gone(self) -> bool:
        return self.transport.is_closing() and not self.transport.get_write_buffer_size()


class Server(uvicorn.Server):
    """Uvicorn's server, which looks after its connections and says when it begins to end.

    Args:
        config: How it answers.
        leaving: Called when it begins to end, before answers are waited for.
    """

    def __init__(self, config: Config, leaving: Callable[[], object] | None = None):
        super().__init__(config)
        self.patience, self.leaving = config.patience, leaving

    def run(self, sockets: list[socket] | None = None) -> None:
        """Answer until the end."""
        with _one_line_a_second(lambda: self.force_exit):
            super().run(sockets)

    async def serve(self, sockets: list[socket] | None = None) -> None:
        """The same, inside a loop."""
        asyncio.get_running_loop().set_exception_handler(_report)
        looking = asyncio.create_task(self._look_after_connections())
        try:
            await super().serve(sockets)
        finally:
            looking.cancel()

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Begin. To uvicorn and asyncio the backlog is also how many connections are taken together."""
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(BACKLOG)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Tell, then end."""
        if self.leaving is not None:
            self.leaving()
        await super().shutdown(sockets)

    async def _look_after_connections(self) -> None:
        while True:
            await asyncio.sleep(self.patience.pause)
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.close_if_overdue(now)


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What went wrong outside of requests. Connections that cannot be taken are no fault of the program: they need no traceback."""
    error = context.get("exception")
    if isinstance(error, OSError):
        log.warning("a connection failed: %s", error.strerror or type(error).__name__)
    else:
        loop.default_exception_handler(context)


# Logs ---------------------------------------------------------------------------------------------------------------------


class _OneASecond(logging.Filter):
    """Lets one line a second through, which says how many were left out before it.

    Args:
        is_over: Whether nothing is worth a line any more.
    """

    def __init__(self, is_over: Callable[[], bool] = lambda: False):
        super().__init__()
        self.is_over = is_over
        self._lock = threading.Lock()
        self._next, self._left_out = 0.0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is shown."""
        now = time.monotonic()
        with self._lock:
            if now < self._next or self.is_over():
                self._left_out += 1
                return False
            self._next, left_out, self._left_out = now + 1.0, self._left_out, 0
        if left_out:
            record.msg, record.args = f"{record.getMessage()} ({left_out} lines before this one were left out)", None
        return True


@contextmanager
def _one_line_a_second(is_over: Callable[[], bool]) -> Iterator[None]:
    # Errors apart, so that nobody can hide one behind a flood of warnings.
    warnings, errors = _OneASecond(is_over), _OneASecond(is_over)

    def is_shown(record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:  # somebody wants to see everything
            return True
        return (errors if record.levelno >= logging.ERROR else warnings).filter(record)

    loggers = [logging.getLogger(name) for name in NOISY]
    for logger in loggers:
        logger.addFilter(is_shown)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_shown)
