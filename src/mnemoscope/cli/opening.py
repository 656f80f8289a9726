"""What commands open besides models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from . import screen

if TYPE_CHECKING:
    from ..models.base import Target

FEW = 500
"""Pictures that are indexed anew at every command where a folder of them is named in place of an index."""

MISTAKEN = 0.05
"""Largest share of searches in which such a folder may call something else a copy."""


def reference_set(folder: str | Path | None, model: str | None) -> Any:
    """What pictures are compared with: the reference set that was named or, for the bundled model, its training pictures; else None."""
    if folder is not None:
        from ..similarity.index import ReferenceIndex
        from ..similarity.storage import MANIFEST

        path = Path(folder)
        named = path.is_dir() and not os.path.exists(path / MANIFEST)
        few = _few_pictures(path) if named else None
        if few is not None:
            return few
        index = ReferenceIndex(path)
        for caution in index.files.cautions():
            screen.say(caution)
        return index
    from ..demo.world import World

    return World().reference if model == "demo" else None


def _few_pictures(folder: Path) -> Any:
    """An index of a folder of few pictures, made anew for this command; None: the folder holds none.

    Its threshold is that of pairs of different pictures of the bundled world, so strict that all pictures of the folder together are
    taken for the origin of something else in at most :data:`MISTAKEN` of searches.

    Raises:
        UsageError: it holds too many to be read at every command.
    """
    from ..similarity.decoding import ENDINGS

    n = sum(file.suffix.lower() in ENDINGS for file in folder.rglob("*"))
    if n == 0:
        return None
    if n > FEW:
        raise UsageError(
            f"{folder} holds {n:,} pictures and no index; make one with `mnemoscope index build {folder} --out references` and give "
            f"--reference references."
        )
    import atexit
    import shutil
    import tempfile

    from ..similarity.index import ReferenceIndex
    from ..similarity.nulls import null_of
    from ..similarity.storage import Calibrated
    from .index import quiet_pillow

    place = tempfile.mkdtemp(prefix="mnemoscope-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    with quiet_pillow():
        index = ReferenceIndex.build(folder, place)
    null = null_of(index.name)
    rates = [] if null is None else [float(rate) for rate in null["thresholds"] if float(rate) * len(index) <= MISTAKEN]
    if null is None or not rates:
        return index
    rate = max(rates)
    threshold = null["thresholds"][f"{rate:g}"]
    facts = Calibrated(
        fmr=rate * len(index), different=null["pairs"], references=len(index), source="pairs of the bundled world"
    )
    index.files.update(threshold=threshold, calibration=facts.model_dump())
    screen.say(
        f"{len(index)} reference pictures of {folder}; a copy is a similarity above {threshold:.2f}, which one in {1 / rate:,.0f} pairs of "
        f"different pictures of the bundled world reaches. With pictures of your own: mnemoscope index build {folder} --different OTHERS."
    )
    return index


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
