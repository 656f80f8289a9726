"""Ctrl-C and SIGTERM in the process of a command. Standard library only, because it is there before anything else is imported.

While modules are imported or a model is opened, nothing can be lost, and an interrupt goes astray: libraries turn it into errors of
their own, or swallow it. So a process that loads ends at once. At any other time an interrupt is a :class:`KeyboardInterrupt`, for whoever
knows what is saved. Without :func:`take`, as in a program that uses mnemoscope as a library, nothing here has an effect.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["begin_loading", "came", "end_loading", "ignore", "loading", "take", "take_terminate"]

STOPPED = 130
"""Exit code of a command that was stopped by Ctrl-C: 128 and the signal's number."""

_loads = False
_came = False


def take() -> None:
    """Take Ctrl-C over for this process, which loads from now on. Where it is ignored or somebody else's, it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    begin_loading()


def take_terminate() -> None:
    """Let SIGTERM end this process with 0: at once while it loads, else by :class:`SystemExit`."""
    signal.signal(signal.SIGTERM, _terminate)


def begin_loading() -> None:
    """From now on modules are imported or a model is opened: there is nothing to save."""
    global _loads
    _loads = True


def end_loading() -> None:
    """From now on results are computed or written, or somebody is served."""
    global _loads
    _loads = False


@contextmanager
def loading() -> Iterator[None]:
    """A span in which a model is opened."""
    before = _loads
    begin_loading()
    try:
        yield
    finally:
        if not before:
            end_loading()


def came() -> bool:
    """Whether Ctrl-C came: whatever error follows it comes of it."""
    return _came


def ignore() -> None:
    """From now on this process only ends: Python's own end takes its time, and would let a signal that comes then decide the exit code."""
    if signal.getsignal(signal.SIGINT) is _interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, frame: object) -> None:
    global _came
    if _loads:
        try:
            os.write(2, b"mnemoscope: stopped\n")
        finally:
            os._exit(STOPPED)
    _came = True
    raise KeyboardInterrupt


def _terminate(number: int, frame: object) -> None:
    if _loads:
        os._exit(0)
    sys.exit(0)
