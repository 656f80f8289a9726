"""The one filter for everything that a command prints through logs, warnings, errors and streams, ours and the libraries'.

No secret is printed: see :mod:`mnemoscope.redaction`. While strangers' prompts are served, no prompt is either. Libraries quote what
they work on in messages (diffusers those words of a prompt that it cuts off), in exceptions (pydantic whole values) and by printing
tracebacks (Gradio), so nothing that a library says is shown then: only that it spoke, and where.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

from .. import redaction
from ..errors import MnemoscopeError
from ..terminal import one_line

__all__ = ["end_process", "filtered", "own_stderr", "without_prompts"]

log = logging.getLogger(__name__)


class _LogLines(logging.Formatter):
    """A message with its time and place. Further lines of it are indented, so that no value in it begins what looks like another one."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The message, cleaned."""
        return "\n    ".join(one_line(line) for line in super().formatMessage(record).split("\n"))


FORMAT = _LogLines("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")

UNSHOWN = "not shown, because it may quote a prompt"

MOST_CAUSES = 10
"""Errors of one chain that are named."""

_serving = False
"""Whether strangers' prompts are served."""


_format_warning = warnings.formatwarning


def filtered() -> None:
    """Let everything that is logged, warned of or raised from now on pass the filter, whichever handler prints it."""
    logging.setLogRecordFactory(_record)
    warnings.formatwarning = _warning
    # Pixels are bounded by need, before decoding; what is above Pillow's bound and below ours is no cause for alarm.
    warnings.filterwarnings("ignore", message=r"Image size \(\d+ pixels\) exceeds limit")
    # Hooks that somebody has set stay.
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _uncaught
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _uncaught_in_thread


@contextmanager
def without_prompts() -> Iterator[None]:
    """While strangers' prompts are served: what libraries say or print is not shown, and errors without their messages."""
    global _serving
    filtered()
    out, err = sys.stdout, sys.stderr
    handler = logging.StreamHandler(err)
    handler.setFormatter(FORMAT)
    handler.setLevel(logging.WARNING)
    if not logging.root.handlers:
        logging.root.addHandler(handler)
    handlers = logging.root.handlers[:]
    for each in handlers:
        each.addFilter(_is_worth_a_line)
    _serving, sys.stdout, sys.stderr = True, _Unshown("stdout", out), _Unshown("stderr", err)
    try:
        yield
    except MnemoscopeError:
        raise
    except Exception as error:
        log.critical("the server ended by an error\n%s", _in_words(error))
        raise SystemExit(1) from None
    finally:
        _serving, sys.stdout, sys.stderr = False, out, err
        for each in handlers:
            each.removeFilter(_is_worth_a_line)
        logging.root.removeHandler(handler)


def own_stderr() -> Any:
    """The stream that our own sentences go to, also while what libraries print is not shown."""
    return sys.stderr.shown if isinstance(sys.stderr, _Unshown) else sys.stderr


def end_process(code: int) -> NoReturn:
    """End now, leaving behind threads that still compute: Python's own end would abort in them, with a core dump.

    Args:
        code: The exit code.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


# Logs ---------------------------------------------------------------------------------------------------------------------


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] == __name__.partition(".")[0]


def _record(*given: Any, **more: Any) -> logging.LogRecord:
    """A record of a log whose message and exception are fit to be printed."""
    record = logging.LogRecord(*given, **more)
    if _serving and not _is_ours(record.name or ""):
        record.msg = f"a message of {record.name} ({record.filename}:{record.lineno}) is {UNSHOWN}"
        record.args = None
    else:
        _clean_message(record)
    if record.exc_info and record.exc_info[1] is not None:
        record.exc_text, record.exc_info = _in_words(record.exc_info[1]), None
    return record


def _clean_message(record: logging.LogRecord) -> None:
    try:
        said = record.getMessage()
    except Exception:  # which logging would print with the arguments
        said = f"a message that does not fit its arguments ({record.filename}:{record.lineno})"
    if (clean := redaction.text(said)) != said or record.args:
        record.msg, record.args = clean, None


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Whether it is ours, or at least a warning: that a library spoke is of interest only if something is wrong."""
    return _is_ours(record.name) or record.levelno >= logging.WARNING


# Warnings, errors and streams ---------------------------------------------------------------------------------------------


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return redaction.text(_format_warning(message, category, filename, lineno, line))


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        print(_in_words(error), file=own_stderr())


def _uncaught_in_thread(given: threading.ExceptHookArgs) -> None:
    if given.exc_value is not None and not isinstance(given.exc_value, SystemExit):
        print(_in_words(given.exc_value), file=own_stderr())


def _in_words(error: BaseException) -> str:
    """An error with where it came from; its message only where nobody's prompt can be in it."""
    if not _serving:
        return redaction.text("".join(traceback.format_exception(error)).rstrip("\n"))
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(parts) < MOST_CAUSES:
        where = "".join(traceback.format_tb(cause.__traceback__))
        parts.append(f"{where}{type(cause).__qualname__}, whose message is {UNSHOWN}")
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\n".join(reversed(parts))


class _Unshown(io.TextIOBase):
    """A stream that shows nothing of what libraries write to it; each place of theirs that does is named once.

    Args:
        name: Of the stream.
        shown: The stream itself.
    """

    def __init__(self, name: str, shown: Any):
        self.stream, self.shown = name, shown
        self._named: set[object] = set()

    def writable(self) -> bool:
        """As streams for output say."""
        return True

    def fileno(self) -> int:
        """That of the stream itself."""
        return self.shown.fileno()

    def write(self, text: str) -> int:
        """Say who wrote, and nothing of the text."""
        error = sys.exc_info()[1]
        if error is not None and error.__traceback__ is not None:  # as of traceback.print_exc
            frame = traceback.extract_tb(error.__traceback__)[-1]
            if self._is_new((type(error), frame.filename, frame.lineno)):
                log.error("an error that a library printed\n%s", _in_words(error))
        else:
            name, line = _writer()
            if self._is_new((name, line)):
                log.warning("what %s:%d wrote to %s is %s", name, line, self.stream, UNSHOWN)
        return len(text)

    def _is_new(self, place: object) -> bool:
        new = place not in self._named
        self._named.add(place)
        return new


def _writer() -> tuple[str, int]:
    """Module and line of the code that writes."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") in (__name__, "traceback", "warnings"):
        frame = frame.f_back
    return ("?", 0) if frame is None else (frame.f_globals.get("__name__", "?"), frame.f_lineno)
