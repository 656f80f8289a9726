"""Detector: what a method that scores prompts promises, and finding one by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from ..errors import UnknownName, UsageError
from ..types import PerSample, Step

__all__ = ["Detector", "build", "installed"]


@runtime_checkable
class Detector(Protocol):
    """Scores each sample of a batch from the steps of its trajectory. One object serves one batch.

    Attributes:
        name: The method's name.
        needs: What it asks of a run: ``uncond``, a prediction without the prompt at every step.
        steps_needed: How many steps of the trajectory it must be shown.
        higher_is_more_memorized: Which way the score points. Not asked for at run time; the contract test wants it.
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


def installed() -> dict[str, EntryPoint]:
    """Detectors by name, ours and plugins'; none is imported."""
    return {entry.name: entry for entry in entry_points(group="mnemoscope.detectors")}


def build(name: str, options: Mapping[str, Any] | None = None) -> Detector:
    """A detector from plain values, as a config or a manifest holds them.

    Raises:
        UnknownName: no detector, or no option of it, has this name; the nearest one is suggested.
        UsageError: a value that the detector refuses.
    """
    known = installed()
    if name not in known:
        raise UnknownName("detector", name, known)
    cls = known[name].load()
    accepted = list(inspect.signature(cls).parameters)
    for option in options or {}:
        if option not in accepted:
            raise UnknownName(f"option of detector {name}", option, accepted)
    try:
        return cls(**(options or {}))
    except (TypeError, ValueError) as e:
        raise UsageError(
            f"detector {name} does not take {dict(options or {})} ({e}); see `mnemoscope ls detectors`."
        ) from e
