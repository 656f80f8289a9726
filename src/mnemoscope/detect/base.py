"""Detector: what a method that scores prompts promises, and finding one by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.metadata import EntryPoint
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from .. import plugins
from ..types import PerSample, Step

__all__ = ["AnyDetector", "Detector", "PictureDetector", "build", "comparing", "describe", "stepwise"]

NEEDS = {
    "uncond": "text, guidance above 1",
    "grad": "gradients",
    "attention": "attention maps",
    "pictures": "pictures, 2 seeds or more",
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


@runtime_checkable
class PictureDetector(Protocol):
    """The second shape of a detector: it compares the finished pictures of *one prompt* with each other.

    It sees no step and no model, so it also works where nothing else is known. Each generation gets the score that its own
    comparisons give, and the prompt's score is their mean, as it is for every other detector. An audit asks it once all seeds
    of a prompt have their picture, and hands it the pictures as they were kept.

    Attributes:
        name: The method's name.
        needs: ``{"pictures"}``, which is how this shape is recognized.
        steps_needed: 0.
        higher_is_more_memorized, costs: As for :class:`Detector`.
        space: What is stored where other detectors say in which space they compared predictions.
    """

    name: str
    needs: frozenset[str]
    space: str | None
    steps_needed: int

    def score(self, pictures: Float[Tensor, "n 3 height width"]) -> Float[Tensor, " n"]:
        """The score of each of n ≥ 2 generations of one prompt, RGB in [0, 1]; on the device of the pictures.

        Raises:
            UsageError: there is only one, or the pictures cannot be compared.
        """
        ...


AnyDetector: TypeAlias = Detector | PictureDetector
"""Either shape."""


def stepwise(detectors: Mapping[str, AnyDetector]) -> dict[str, Detector]:
    """Those that watch the steps of a trajectory."""
    return {name: cast(Detector, d) for name, d in detectors.items() if "pictures" not in d.needs}


def comparing(detectors: Mapping[str, AnyDetector]) -> dict[str, PictureDetector]:
    """Those that compare the pictures of a prompt."""
    return {name: cast(PictureDetector, d) for name, d in detectors.items() if "pictures" in d.needs}


def build(name: str, options: Mapping[str, Any] | None = None) -> AnyDetector:
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
