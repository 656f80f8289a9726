"""The bundled world: real captioned pictures with planted duplicates, and the small models trained on them.

It is the offline default of every command and the ground truth of the project's own evaluation: for every caption it is
known how often exactly which pixels were shown in training. How it was made: :mod:`mnemoscope.demo.build` and ``train``.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ..detect.calibrate import Calibration
from ..errors import UnknownName, UsageError
from ..similarity.pixels import Pixels, ReferenceSet

ASSETS = Path(__file__).parent / "assets"
GROUPS = ("planted", "recaptioned", "template", "ordinary", "heldout", "twin")
GUIDANCE = 3.0
"""The guidance scale that the bundled model's card recommends and all its figures use."""


@dataclass(frozen=True)
class Row:
    """One line of the manifest: a picture under a caption."""

    id: str
    picture: str
    caption: str
    group: str
    """planted, recaptioned, template, ordinary, heldout, or twin: a planted concept in its other, never shown picture."""
    copies: int
    """How often exactly these pixels stand in one epoch of training; 0 for pictures that were never shown unchanged."""
    draws: int
    """How often the row is drawn in one epoch; each draw of an ordinary picture is a fresh view."""
    concept: str
    style: str
    source: str
    license: str
    sha256: str
    """Of the picture's RGB bytes."""
    family: str | None = None


class World:
    """Rows, pictures and reference sets of one bundled model.

    Args:
        model: ``text-to-image`` (64 px) or ``unconditional`` (32 px): their training lists differ.
        folder: Where manifest and pictures are; default: inside the package.
    """

    def __init__(self, model: str = "text-to-image", folder: Path = ASSETS):
        files = {"text-to-image": "manifest.jsonl", "unconditional": "unconditional.jsonl"}
        if model not in files:
            raise UnknownName("bundled model", model, files)
        self.model, self.folder = model, folder
        self.size = 64 if model == "text-to-image" else 32
        lines = (folder / files[model]).read_text(encoding="utf-8").splitlines()
        self.rows = [Row(**json.loads(line)) for line in lines]

    def __repr__(self) -> str:
        counts = ", ".join(f"{g} {len(self.of(g))}" for g in GROUPS if self.of(g))
        return f"World({self.model!r}: {counts})"

    def of(self, *groups: str, copies: int | None = None) -> list[Row]:
        """Rows of the named groups, optionally of one level of copies."""
        for g in groups:
            if g not in GROUPS:
                raise UnknownName("group", g, GROUPS)
        return [r for r in self.rows if r.group in groups and copies in (None, r.copies)]

    def captions(self, *groups: str, copies: int | None = None) -> list[Row]:
        """One row per caption: an ordinary caption has two pictures and appears once."""
        return list({r.caption: r for r in reversed(self.of(*groups, copies=copies))}.values())[::-1]

    @property
    def levels(self) -> list[int]:
        """Levels of copies of the planted group, fewest first."""
        return sorted({r.copies for r in self.of("planted")})

    @property
    def trained(self) -> list[Row]:
        """Rows the model was shown."""
        return [r for r in self.rows if r.draws]

    def pictures(self, names: Iterable[str]) -> Float[Tensor, "batch 3 height width"]:
        """Pictures by name, in [0, 1], at the model's size."""
        with zipfile.ZipFile(self.folder / "pictures.zip") as z:
            return torch.stack([self._picture(z, name) for name in names])

    def _picture(self, archive: zipfile.ZipFile, name: str) -> Tensor:
        try:
            data = archive.read(f"{name}.webp")
        except KeyError:
            raise UsageError(f"the bundled world has no picture {name!r}; see World().rows for their names.") from None
        image = Image.open(BytesIO(data)).convert("RGB")
        if image.width != self.size:
            image = image.resize((self.size, self.size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    @cached_property
    def thresholds(self) -> Calibration:
        """Scores of ordinary captions (every second one) at the first step with four seeds: ``bench/thresholds.py`` made them."""
        return Calibration.load(self.folder / "thresholds.json")

    @cached_property
    def reference(self) -> WorldReference:
        """Every picture the model was shown, as a calibrated reference set.

        The copy threshold is the similarity that the nearest training picture of a *different* picture exceeds in 1 % of
        searches; different pictures are the held-out ones and the planted concepts' other pictures.
        """
        shown = _unique(r.picture for r in self.trained)
        reference = WorldReference(self, shown, Pixels())
        reference.calibrate(self.pictures(_unique(r.picture for r in self.of("heldout", "twin"))), fmr=0.01)
        return reference


class WorldReference(ReferenceSet):
    """A reference set that can show its pictures, so that a run keeps them beside the copies."""

    def __init__(self, world: World, names: Sequence[str], descriptor: Pixels):
        super().__init__(names, descriptor(world.pictures(names)), descriptor)
        self._world = world

    def image(self, reference: str) -> Float[Tensor, "3 height width"]:
        """The reference picture of that id, in [0, 1]."""
        return self._world.pictures([reference])[0]


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
