"""What commands open besides models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from . import screen

if TYPE_CHECKING:
    from ..models.base import Target


def reference_set(folder: str | Path | None, model: str | None) -> Any:
    """What pictures are compared with: the reference set that was named or, for the bundled model, its training pictures; else None."""
    if folder is not None:
        from ..similarity.index import ReferenceIndex

        return ReferenceIndex(folder)
    from ..demo.world import World

    return World().reference if model == "demo" else None


def bundled_calibration(
    target: Target, guidance: float | None, steps: int, seeds: int, window: int, accept: bool
) -> Any:
    """The thresholds that come with the bundled model, where they were made under the same setting or another is accepted."""
    from ..demo.world import World
    from ..detect.calibrate import setting_of

    g = target.guidance if guidance is None else guidance
    setting = setting_of(
        target.identity(), guidance=g, steps=steps, window=(0, window), seeds=seeds, seed_mode="shared"
    )
    found = World().thresholds
    try:
        found.check(setting, accept=accept)
    except UsageError:
        screen.say(
            "The bundled thresholds were made with float32, guidance 3, 50 steps, 4 seeds, first step; not used here "
            "(--accept-threshold)."
        )
        return None
    return found
