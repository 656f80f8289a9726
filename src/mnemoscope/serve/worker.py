"""One thread that draws, and a short queue before it: a pipeline can do one thing at a time.

Whoever asked may stop waiting at any moment. An order that nobody waits for leaves the queue at once, and one that is being drawn
ends after its current step.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ..bounds import AMOUNT, within

if TYPE_CHECKING:
    from .guard import Decision

__all__ = ["Drawn", "Full", "Leaving", "Order", "Stopped", "Worker", "drawing"]


@dataclass(frozen=True)
class Order:
    """What to draw: one picture for each seed."""

    prompt: str
    seeds: tuple[int, ...]
    width: int
    height: int
    steps: int
    guidance: float
    negative_prompt: str | None = None


@dataclass(frozen=True)
class Drawn:
    """Pictures, and what the guard decided about each."""

    pictures: Sequence[Any]
    decisions: Sequence[Decision]


class Full(Exception):
    """No room in the queue; ``seconds``: how long until there may be."""

    def __init__(self, seconds: int):
        super().__init__(f"the queue is full for about {seconds} s")
        self.seconds = seconds


class Leaving(Exception):
    """The worker takes no more, because it is about to end."""


class Stopped(Exception):
    """Raised inside a generation that nobody waits for."""


Draw: TypeAlias = Callable[[Order, Callable[[], bool]], Drawn]
"""Draws an order; ends with :class:`Stopped` once the function that it is given says True."""


def drawing(guarded: Any) -> Draw:
    """How a guarded diffusers pipeline draws an order: each picture from a CPU generator of its own seed.

    Args:
        guarded: From :func:`mnemoscope.serve.guard.guard`.
    """

    def draw(order: Order, unwanted: Callable[[], bool]) -> Drawn:
        def look(pipe: Any, index: int, t: Any, kept: Mapping[str, Any]) -> Mapping[str, Any]:
            if unwanted():
                raise Stopped
            return kept

        given = {} if order.negative_prompt is None else {"negative_prompt": order.negative_prompt}
        output = guarded(
            order.prompt, num_images_per_prompt=len(order.seeds), width=order.width, height=order.height,
            num_inference_steps=order.steps, guidance_scale=order.guidance, output_type="pil", callback_on_step_end=look,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in order.seeds], **given,
        )  # fmt: skip
        return Drawn(output.images, list(guarded.last))

    return draw


class Worker:
    """Draws orders one after another, in the order in which they came.

    Args:
        draw: See :data:`Draw`; called in one thread only.
        queue: How many orders may wait beside the one that is drawn.

    Raises:
        UsageError: a negative queue.
    """

    @within(queue=AMOUNT)
    def __init__(self, draw: Draw, queue: int = 16):
        self.draw, self.queue = draw, queue
        self.leaving = False
        self._waiting: deque[tuple[Order, Future[Drawn]]] = deque()
        self._current: Future[Drawn] | None = None
        self._changed = threading.Condition()
        self._seconds: float | None = None
        # A daemon, so that a step that takes minutes cannot keep the process alive past its deadline.
        self._thread = threading.Thread(target=self._run, name="mnemoscope-worker", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """How many orders wait."""
        return sum(not future.done() for _, future in list(self._waiting))

    @property
    def running(self) -> int:
        """How many orders are drawn at this moment: 0 or 1."""
        return int(self._current is not None)

    def submit(self, order: Order) -> Future[Drawn]:
        """Queue an order. To cancel the future is to stop waiting for it.

        Raises:
            Full: there are enough.
            Leaving: the worker is about to end.
        """
        future: Future[Drawn] = Future()
        with self._changed:
            if self.leaving:
                raise Leaving
            self._waiting = deque(job for job in self._waiting if not job[1].done())
            if len(self._waiting) + self.running > self.queue:
                raise Full(self._until_room())
            self._waiting.append((order, future))
            self._changed.notify()
        return future

    def leave(self, seconds: float) -> None:
        """Take no more: what waits ends with :class:`Leaving` now, what is drawn does so after ``seconds`` unless it is done before."""
        with self._changed:
            self.leaving = True
            dropped, self._waiting = self._waiting, deque()
            self._changed.notify()
        for _, future in dropped:
            _settle(future, Leaving())
        deadline = threading.Timer(seconds, self._drop_current)
        deadline.daemon = True
        deadline.start()

    def join(self, seconds: float) -> None:
        """Wait until the thread has ended, but no longer than that."""
        self._thread.join(seconds)

    def _drop_current(self) -> None:
        if (current := self._current) is not None:
            _settle(current, Leaving())

    def _until_room(self) -> int:
        """Whole seconds until what waits and what is drawn is likely to be done, by the time that recent orders took."""
        return max(1, math.ceil(max(1, self.waiting + self.running) * (self._seconds or 1.0)))

    def _run(self) -> None:
        while (job := self._next()) is not None:
            order, future = job
            begun = time.monotonic()
            try:
                _settle(future, self.draw(order, future.done))
            except BaseException as e:  # whatever it is, it belongs to this order and not to the next one
                _settle(future, e)
            took = time.monotonic() - begun
            self._seconds = took if self._seconds is None else 0.7 * self._seconds + 0.3 * took
            self._current = None
            del job, order, future  # nothing of it is kept while the thread waits

    def _next(self) -> tuple[Order, Future[Drawn]] | None:
        with self._changed:
            while True:
                while self._waiting:
                    job = self._waiting.popleft()
                    if not job[1].done():
                        self._current = job[1]
                        return job
                if self.leaving:
                    return None
                self._changed.wait()


def _settle(future: Future[Drawn], result: Drawn | BaseException) -> None:
    """Give a future its result, unless nobody waits for it any more."""
    with suppress(InvalidStateError):
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)
