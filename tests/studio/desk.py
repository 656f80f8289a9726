"""A studio on a closed-form world, in milliseconds, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mnemoscope.audit.config import AuditConfig
from mnemoscope.audit.run import calibrate
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.similarity.reference import ReferenceSet
from mnemoscope.studio.model import Example, Studio

SHAPE = (3, 4, 4)
KNOWN = "the mona lisa"
ORDINARY = [f"a cat {i}" for i in range(40)]
STEPS = 5
GUIDANCE = 1.5
"""Little, so that a few steps end at the known picture."""


def small_world() -> Gaussian:
    """One prompt has a single picture, the others have many."""
    return Gaussian.world([*ORDINARY, "the lisa", "a cat"], [KNOWN], latent_shape=SHAPE, dtype=torch.float64)


def small_studio(folder: Path, *, calibrated: bool = True, reference: Any = None, **settings: Any) -> Studio:
    world = small_world()
    config = AuditConfig(model="small", seeds=3, steps=STEPS, guidance=GUIDANCE, **settings)
    found = None
    if calibrated:
        ordinary = config.model_copy(
            update={"out": str(folder / "ordinary"), "prompts": AuditConfig(prompts=ORDINARY).prompts}
        )
        run, made = calibrate(ordinary, fpr=0.05, target=world)
        found = made["magnitude"]
        config = config.model_copy(update={"calibration": str(run.folder)})
    return Studio(world, config, found, reference, examples=(Example(KNOWN, "one picture"),), out=folder / "runs")


def pictures_of(world: Gaussian) -> ReferenceSet:
    """A reference set that can show its pictures, with the known one in it."""
    x0 = world.draw(world.encode([KNOWN]), torch.Generator().manual_seed(0))
    images = torch.cat([world.decode(x0), torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(1))])

    class Shown(ReferenceSet):
        def image(self, reference: str) -> torch.Tensor:
            return images[self.ids.index(reference)]

    made = ReferenceSet.of([f"picture {i}" for i in range(6)], images)
    return Shown(made.ids, made.vectors, made.descriptor, 0.99)
