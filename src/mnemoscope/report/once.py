"""Work that several threads ask for at once is done once. No lock is held while it is done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

__all__ = ["Once"]

T = TypeVar("T")


class Once(Generic[T]):
    """Joins those who ask for the same thing at the same time. It remembers nothing: who asks later has it done again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[Hashable, Future[T]] = {}

    def runs(self, key: Hashable) -> bool:
        """Whether a thread is at work on it."""
        with self._lock:
            return key in self._running

    def do(self, key: Hashable, work: Callable[[], T]) -> T:
        """What ``work`` returns or raises; while another thread is at work on the same key, what that one returns or raises."""
        answer: Future[T] = Future()
        with self._lock:
            other = self._running.get(key)
            if other is None:
                self._running[key] = answer
        if other is not None:
            return other.result()
        try:
            answer.set_result(work())
        except BaseException as e:
            answer.set_exception(e)
        finally:
            with self._lock:
                del self._running[key]
        return answer.result()
