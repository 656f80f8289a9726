"""Detector: what a method that scores prompts promises, and finding one by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.metadata import EntryPoint
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from .. import plugins
from ..types import PerSample, Step

__all__ = ["Detector", "build", "describe"]

NEEDS = {
    "uncond": "text, guidance above 1",
    "grad": "gradients",
    "attention": "attention maps",
    "reference": "reference pictures",
}
"""What ``needs`` means, in a user's words."""


@runtime_checkable
class Detector(Protocol):
    """Scores each sample of a batch from the steps of its trajectory. One object serves one batch.

    Attributes:
        name: The method's name.
        needs: What it asks of a run: ``uncond``, a prediction without the prompt at every step.
        steps_needed: How many steps of the trajectory it must be shown.
        higher_is_more_memorized: Which way the score points. Not asked for at run time; the contract test wants it.
        costs: What it costs, in words; optional. Without it, forwards are counted from ``steps_needed`` (:func:`describe`).
        space: Space of the predictions it compared; known once it has seen a step.
    """

    name: str
    needs: frozenset[str]
    space: str | None

    @property
    def steps_needed(self) -> int:
        """How many steps of a trajectory must be run."""
        ...

    def update(self, step: Step) -> None:
        """Take one step; steps come in order from index 0. Nothing may leave the device here."""
        ...

    def per_step(self) -> Float[Tensor, "batch step"]:
        """The value at every step seen, on the device."""
        ...

    def compute(self) -> PerSample:
        """The score, on the device."""
        ...


def build(name: str, options: Mapping[str, Any] | None = None) -> Detector:
    """A detector from plain values: :func:`mnemoscope.plugins.build`."""
    return plugins.build("detector", name, options)


def describe(entry: EntryPoint) -> tuple[str, str]:
    """What a detector asks of a run, and what it costs with its default options, in words.

    A plugin that cannot be imported is described as such: it must not hide the others from the list.
    """
    try:
        make = entry.load()
    except Exception as e:
        return f"cannot be loaded ({type(e).__name__}: {e})", "unknown"
    try:
        made = make()
    except Exception:  # it has options without defaults
        made = make
    needs: Collection[str] = getattr(made, "needs", ())
    steps = getattr(made, "steps_needed", None)
    costs = getattr(made, "costs", None) or (_forwards(steps, needs) if isinstance(steps, int) else "by its options")
    return ", ".join(NEEDS.get(need, need) for need in sorted(needs)) or "nothing", costs


def _forwards(steps: int, needs: Collection[str]) -> str:
    """Denoiser forwards: who compares asks twice at each step, but all prompts share the null prediction of the first."""
    compares = "uncond" in needs
    each = 2 * steps - 1 if compares else steps
    return f"{each} forward{'s' if each > 1 else ''} per sample{', 1 per seed' if compares else ''}"
