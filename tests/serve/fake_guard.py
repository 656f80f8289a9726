"""A guard without a model: each picture says from which seed it was drawn; and a real server around it."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from PIL import Image

from mnemoscope.cli.serve import gated
from mnemoscope.cli.view import bound
from mnemoscope.serve.app import Endpoint
from mnemoscope.serve.guard import Decision, GuardError, Refused
from mnemoscope.serve.metrics import Metrics
from mnemoscope.serve.schema import Limits
from mnemoscope.web.app import server

LIMITS = Limits(
    "fake", (8, 16, 24, 32), (8, 16, 24), height=16, width=16, guidance=7.5, steps=3, counts=range(1, 11),
    most_pictures=4, longest_prompt=200,
)  # fmt: skip


class FakeGuard:
    """Draws pictures that hold their seed; some prompts fail in the ways a guarded pipeline can."""

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.metrics = seconds, Metrics()
        self.metrics.attached("fake", 1.0)
        self.asked: list[dict[str, Any]] = []
        self.threads: set[int] = set()
        self.steps = 0
        self.go = threading.Event()
        self.go.set()
        self.inside = 0
        self.last: list[Decision] = []

    def __call__(self, prompt: str, *, generator: Any, callback_on_step_end: Callable[..., Any], **given: Any) -> Any:
        self.inside += 1
        assert self.inside == 1, "two generations at once"
        try:
            return self.draw(prompt, [g.initial_seed() for g in generator], callback_on_step_end, given)
        finally:
            self.inside -= 1

    def draw(self, prompt: str, seeds: list[int], look: Callable[..., Any], given: dict[str, Any]) -> Any:
        self.threads.add(threading.get_ident())
        self.asked.append({"prompt": prompt, "seeds": seeds, **given})
        self.last = [Decision(i, seed / 4, 1.0, None, seed > 4, "passed") for i, seed in enumerate(seeds)]
        if prompt == "refuse":
            raise Refused([Decision(i, 9.0, 1.0, 0.01, True, "refused", prompt=prompt) for i in range(len(seeds))])
        if prompt == "closed":
            raise GuardError("the guard failed")
        if prompt.startswith("break"):
            raise RuntimeError(f"cannot draw {prompt}")
        for index in range(given["num_inference_steps"]):
            self.go.wait(20)
            time.sleep(self.seconds)
            self.steps += 1
            assert look(self, index, 0, {"latents": None}) == {"latents": None}
        return SimpleNamespace(images=[picture(seed, given["width"], given["height"]) for seed in seeds])


def picture(seed: int, width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height))
    for x, byte in enumerate(seed.to_bytes(8, "big")):
        image.putpixel((x, 0), (byte, 0, 0))
    return image


def opened(data: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert image.format == "PNG"
    assert not image.info
    return image


def seed_of(data: str) -> int:
    image = opened(data).convert("RGB")
    return int.from_bytes(bytes(image.getpixel((x, 0))[0] for x in range(8)), "big")


@contextmanager
def served(endpoint: Endpoint, *, key: str | None = None, grace: float = 10.0) -> Iterator[Any]:
    """A real server on loopback; gives its address, and ``end()``, which is what a signal does."""
    with bound("127.0.0.1", 0) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        made = server(
            gated(endpoint, "127.0.0.1", key),
            lifespan="on",
            grace=int(grace) + 2,
            leaving=lambda: endpoint.leave(grace),
        )
        thread = threading.Thread(target=made.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        until(lambda: made.started)

        def end() -> None:
            made.should_exit = True

        try:
            yield SimpleNamespace(address=address, end=end, thread=thread)
        finally:
            end()
            thread.join(30)
            assert not thread.is_alive()


def until(true: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came to be so"
        time.sleep(0.005)
