"""Measure: what a cheap score of one picture promises, and finding one by name.

InvMM (:mod:`mnemoscope.measure.invmm`) says how strongly a picture is stored, at the price of an optimization. A companion says
something kindred for a few forwards: a column beside it, or a screen before it. None of them is on InvMM's scale, and none is a
verdict; each page says what its number means.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from .. import plugins
from ..errors import CannotAudit, UsageError
from ..models.base import Condition, Target, Trained, noise_from_seeds
from ..types import Latents, PerSample, precise

__all__ = ["STEPS", "Measure", "build", "common", "costs_of", "describe", "opened", "spec_of", "time_at"]

STEPS = 1000
"""Times are named by their number among this many, as discrete-time models count them."""

NEEDS = {"times": "training times", "grad": "gradients"}
"""What ``needs`` means, in a user's words."""


@runtime_checkable
class Measure(Protocol):
    """Scores pictures, each on its own. Options of its constructor are plain values, kept under the same names.

    Attributes:
        name: The method's name.
        reads: What the number is, in words, with its unit.
        low_is_stored: Whether a low number speaks for a stored picture (or for membership); otherwise a high one does.
        needs: ``{"times"}`` (a target that says at which times it was trained), ``{"grad"}`` (gradients through the denoiser).
    """

    name: str
    reads: str
    low_is_stored: bool
    needs: frozenset[str]

    @property
    def forwards(self) -> int:
        """Denoiser forwards of one latent (F) for each picture, exactly."""
        ...

    @property
    def backwards(self) -> int:
        """Backward passes through one latent (B) for each picture, exactly."""
        ...

    def __call__(
        self, target: Target, images: Float[Tensor, "batch 3 rows columns"], *, prompts: Sequence[str] | None = None,
        keys: Sequence[int] | None = None,
    ) -> PerSample:  # fmt: skip
        """The score of each picture, on the device; nothing may leave it here.

        A picture's score depends on the picture, its caption and its key alone, never on the rest of the batch (beyond rounding).

        Args:
            target: The model.
            images: In [0, 1].
            prompts: A caption for each, for a model with text; default: the empty prompt.
            keys: One number per picture, from which draws of its own come. A method whose draws are the same for all pictures,
                which is the fairer comparison, takes no notice of them.

        Raises:
            CannotAudit: the target takes no text and captions were given, or lacks what the method needs.
            UsageError: there is not one caption for each picture.
        """
        ...


def build(name: str, options: Mapping[str, Any] | None = None) -> Measure:
    """A measure from plain values: :func:`mnemoscope.plugins.build`."""
    return plugins.build("measure", name, options)


def spec_of(measure: Measure) -> dict[str, Any]:
    """Name and options, from which :func:`build` makes it again, and which tell its scores from those of other options."""
    return {
        "name": measure.name,
        "options": {k: getattr(measure, k) for k in inspect.signature(type(measure)).parameters},
    }


def screen_of(
    measure: Measure, pictures: Mapping[int, Float[Tensor, "3 rows columns"]], captions: Mapping[int, str]
) -> Callable[[Target, int], float]:
    """A measure as what a canary watch calls for each row (:class:`mnemoscope.mitigate.canaries.CanaryWatch`).

    Args:
        measure: What to ask.
        pictures: Row → the canary, in [0, 1].
        captions: Row → its caption.
    """

    def screen(target: Target, row: int) -> float:
        prompts = [captions[row]] if target.has_text else None
        return float(measure(target, pictures[row][None], prompts=prompts, keys=[row])[0])

    return screen


def describe(entry: EntryPoint) -> tuple[str, str, str]:
    """What a measure's number is, what it needs, and what it costs with its default options, in words.

    A plugin that cannot be imported is described as such: it must not hide the others from the list.
    """
    try:
        made = entry.load()()
        needs = ", ".join(NEEDS.get(need, need) for need in sorted(made.needs)) or "nothing"
        return f"{made.reads}; {'low' if made.low_is_stored else 'high'} is stored", needs, costs_of(made)
    except Exception as e:
        return f"cannot be loaded ({type(e).__name__}: {e})", "unknown", "unknown"


def costs_of(measure: Measure) -> str:
    """``1 forward, 8 backward passes per picture``."""
    counts = ((measure.forwards, "forward", "forwards"), (measure.backwards, "backward pass", "backward passes"))
    return ", ".join(f"{n} {one if n == 1 else many}" for n, one, many in counts if n) + " per picture"


def opened(
    target: Target, images: Float[Tensor, "batch 3 rows columns"], prompts: Sequence[str] | None
) -> tuple[Latents, Condition | None]:
    """x₀ of pictures, float32 or better on the target's device, and their encoded captions (None: a model without text).

    Raises:
        CannotAudit: the target takes no text, and captions were given.
        UsageError: there is not one caption for each picture.
    """
    if prompts is not None and not target.has_text:
        raise CannotAudit(f"{target.name} takes no text; measure its pictures without captions.")
    if prompts is not None and len(prompts) != len(images):
        raise UsageError(f"{len(prompts)} captions for {len(images)} pictures: give one per picture.")
    cond = target.encode(list(prompts or [""] * len(images))) if target.has_text else None
    return precise(target.encode_images(images)).to(target.device), cond


def time_at(target: Target, numbers: Sequence[int]) -> Tensor:
    """The training times that are number 0 … 999 of :data:`STEPS`, least noise first; on the target's device.

    Raises:
        CannotAudit: the target does not say at which times it was trained.
    """
    if not isinstance(target, Trained):
        raise CannotAudit(f"{target.name} does not say at which times it was trained; give its adapter training_times.")
    # The middle of each share: its lower end would round to the step below now and then.
    return target.training_times((torch.tensor(list(numbers)) + 0.5) / STEPS).to(target.device)


def common(purpose: str, n: int, like: Latents) -> Float[Tensor, "n channel height width"]:
    """Standard normal noises that all pictures share, row j from (purpose, j) alone: no score may hang on the luck of its draws."""
    return noise_from_seeds(range(n), int.from_bytes(purpose.encode(), "big"), tuple(like.shape[1:])).to(like)
