"""The bundled world: real captioned pictures with planted duplicates, and the small models trained on them.

It is the offline default of every command and the ground truth of the project's own evaluation: for every caption it is
known how often exactly which pixels were shown in training. How it was made: :mod:`mnemoscope.demo.build` and ``train``.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file
from torch import Tensor

from .. import stats
from ..detect.calibrate import Calibration
from ..errors import UnknownName, UsageError
from ..parsing import json_lines
from ..records.documents import read_json
from ..records.files import open_regular
from ..similarity.base import Descriptor
from ..similarity.decoding import KEPT, decode
from ..similarity.fingerprint import Fingerprint
from ..similarity.reference import ReferenceSet

ASSETS = Path(__file__).parent / "assets"
GROUPS = ("planted", "recaptioned", "template", "ordinary", "heldout", "twin")
COPIES, VECTORS = ASSETS / "copies.json", ASSETS / "reference.safetensors"
"""Null distributions and descriptors of the bundled reference set: ``bench/copies.py`` made them."""
THRESHOLDS = {"audit": ASSETS / "thresholds.json", "guard": ASSETS / "guard-thresholds.json"}
"""What an audit (four seeds of a shared bank) and what a guard (one noise of each prompt's own) judges by: ``bench/thresholds.py``."""
LAYOUT_FMR = 0.01
"""Rate at which a generated picture that is no copy is called a template copy."""
COPY_FMR = 0.05
"""Rate at which the nearest of the bundled pictures to a different picture is called its origin."""
PAIR_FMR = 0.001
"""Share of pairs of different pictures that are called the same one."""
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
        model: ``text-to-image`` or ``unconditional``: their training lists differ.
        folder: Where manifest and pictures are; default: inside the package.
    """

    def __init__(self, model: str = "text-to-image", folder: Path = ASSETS):
        files = {"text-to-image": "manifest.jsonl", "unconditional": "unconditional.jsonl"}
        if model not in files:
            raise UnknownName("bundled model", model, files)
        self.model, self.folder = model, folder
        with open_regular(folder / files[model]) as file:
            self.rows = [Row(**row) for _, row in json_lines(file)]

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

    def pictures(self, names: Iterable[str]) -> Float[Tensor, "batch 3 64 64"]:
        """Pictures by name, in [0, 1]."""
        with zipfile.ZipFile(self.folder / "pictures.zip") as z:
            return torch.stack([self._picture(z, name) for name in names])

    @property
    def ordinary_words(self) -> set[str]:
        """Words of ordinary captions: what may stand for a word, where the tokenizer is too small to know words from their ends."""
        return {word for row in self.of("ordinary") for word in re.findall(r"[a-z]{3,}", row.caption)}

    def fixed_part(self, family: str) -> Bool[Tensor, "height width"]:
        """Where all pictures of a template family are alike, up to 2 of 255 levels: the part that every member repeats."""
        members = _unique(r.picture for r in self.of("template") if r.family == family)
        if not members:
            raise UnknownName("template family", family, {r.family or "" for r in self.of("template")})
        shown = self.pictures(members)
        return (shown.amax(0) - shown.amin(0)).amax(0) <= 2.5 / 255

    def _picture(self, archive: zipfile.ZipFile, name: str) -> Tensor:
        try:
            data = archive.read(f"{name}.webp")
        except KeyError:
            raise UsageError(f"the bundled world has no picture {name!r}; see World().rows for their names.") from None
        read = decode(data, KEPT)
        assert read.picture is not None, read.reason  # the archive comes with the package
        return torch.from_numpy(np.array(read.picture)).permute(2, 0, 1).float() / 255

    def controls(self, levels: Sequence[int] = (24, 48)) -> dict[str, list[dict[str, Any]]]:
        """Prompts with what the controls of an audit need, by what they ask; each list is one audit's ``prompts``.

        ``captions``: planted captions (memorized) and captions that no repeated picture has: held-out ones, and those ordinary
        ones that the bundled thresholds were not made from. ``swap`` is the planted concept's label with the tags of another
        planted caption, so that swapped captions name the pictures and consist of exactly the words of the planted ones.

        ``templates``: members of the composed families, shown (memorized) and never shown; their ``family`` is the layout.

        Args:
            levels: Levels of copies of the planted group that count as memorized: the model card says how many of them come back.

        Raises:
            UsageError: no planted picture has one of these levels.
        """
        planted = [r for level in levels for r in self.of("planted", copies=level)]
        if not planted:
            raise UsageError(f"no planted picture has copies {tuple(levels)}; the levels are {self.levels}.")
        swapped = self._swapped([r.caption for r in planted])
        other = [*self.captions("ordinary")[1::2], *self.captions("heldout")]
        partly = {r.family for r in self.of("template", copies=0)}
        members = [r for r in self.of("template") if r.family in partly]
        return {
            "captions": [
                {"id": r.id, "prompt": r.caption, "group": f"planted × {r.copies}", "label": True, "swap": swap}
                for r, swap in zip(planted, swapped, strict=True)
            ]
            + [{"id": r.id, "prompt": r.caption, "group": r.group, "label": False} for r in other],
            "templates": [
                {
                    "id": r.id,
                    "prompt": r.caption,
                    "group": "template" if r.copies else "template, never shown",
                    "label": r.copies > 0,
                    "family": r.family,
                }
                for r in members
            ],
        }

    def _swapped(self, captions: Sequence[str]) -> list[str]:
        """Each caption's label with another's tags, all of them moved on by one number of places; no result is a caption."""
        parts = [caption.partition(", ") for caption in captions]
        taken = {r.caption for r in self.rows}
        for shift in range(1, len(parts)):
            turned = [*parts[shift:], *parts[:shift]]
            swapped = [label + comma + tags for (label, _, _), (_, comma, tags) in zip(parts, turned, strict=True)]
            if not taken & set(swapped):
                return swapped
        raise UsageError("captions cannot be swapped: whatever tags they exchange, one stays a caption.")

    @cached_property
    def thresholds(self) -> Calibration:
        """Scores of ordinary captions (every second one) at the first step with four seeds: ``bench/thresholds.py`` made them."""
        return Calibration.load(self.folder / "thresholds.json")

    @cached_property
    def guard_thresholds(self) -> Calibration:
        """The same for a guard, which sees one generation of each prompt from a noise of its own."""
        return Calibration.load(self.folder / THRESHOLDS["guard"].name)

    @cached_property
    def reference(self) -> WorldReference:
        """Every picture the model was shown, as a calibrated reference set.

        The copy threshold is the similarity that the nearest training picture of a *different* picture exceeds in 5 % of
        searches; different pictures are the held-out ones and the planted concepts' other pictures. A lower rate would be a statement
        about the few look-alikes among them (two pens, two speech bubbles), which differ by less than a model's blur. The layout
        threshold is what 1 % of *generated* pictures of captions without a repeated picture exceed. What both do to
        generated pictures is measured in the model card.
        """
        if self.folder == ASSETS and (kept := _kept_reference(self)) is not None:
            return kept
        reference = WorldReference(self, self.shown, Fingerprint())
        reference.calibrate(self.pictures(self.different), fmr=COPY_FMR)
        return reference

    @cached_property
    def same_picture(self) -> float:
        """Similarity that one pair of different pictures in a thousand reaches: whether a draw is *this* picture, not whether it is any.

        The copy threshold is of searches among all training pictures, so it is far stricter. A measure of one picture compares with that
        picture alone, and asks all of its draws.
        """
        different = self.reference.descriptor(self.pictures(self.different))
        similar = (different @ self.reference.vectors.T).flatten()
        return float(np.quantile(similar.numpy(), 1 - PAIR_FMR))

    @property
    def shown(self) -> list[str]:
        """Names of the pictures that the model was shown."""
        return _unique(r.picture for r in self.trained)

    @property
    def different(self) -> list[str]:
        """Names of pictures that it was not shown: held-out ones, and the planted concepts' other pictures."""
        return _unique(r.picture for r in self.of("heldout", "twin"))


class WorldReference(ReferenceSet):
    """A reference set that can show its pictures, so that a run keeps them beside the copies."""

    def __init__(self, world: World, names: Sequence[str], descriptor: Descriptor, vectors: Tensor | None = None):
        super().__init__(names, descriptor(world.pictures(names)) if vectors is None else vectors, descriptor)
        self._world = world

    def image(self, reference: str) -> Float[Tensor, "3 height width"]:
        """The reference picture of that id, in [0, 1]."""
        return self._world.pictures([reference])[0]

    def _thumbnail(self, reference: str) -> Tensor:
        return self.image(reference)


def _kept_reference(world: World) -> WorldReference | None:
    """The bundled descriptors and null distributions; None where they were made with another descriptor."""
    descriptor, stored = Fingerprint(), read_json(COPIES)
    if stored["descriptor"] != descriptor.name:
        return None
    place = {name: i for i, name in enumerate(World().shown)}  # each model was shown a part of these
    vectors = load_file(VECTORS)["vectors"].float()[[place[name] for name in world.shown]]
    reference = WorldReference(world, world.shown, descriptor, vectors)
    reference.threshold = stats.threshold_at_fpr(stored["different"], COPY_FMR).value
    reference.layout_threshold = stats.threshold_at_fpr(stored["layouts"], LAYOUT_FMR).value
    return reference


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
