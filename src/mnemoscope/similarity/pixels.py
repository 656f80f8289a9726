"""Thumbnails as a descriptor: small, permissive, good enough to tell copies apart at 64 px.

Two pictures are compared by the cosine of their 16 × 16 RGB box thumbnails after the mean colour is removed. That forgives
an autoencoder's blur and small noise, and nothing else: it does not see through mirroring, cropping or turning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ..errors import UsageError
from .base import Descriptor, Match, Pictures, matched

__all__ = ["PLAIN", "Match", "Pictures", "Pixels", "ReferenceSet"]

PLAIN = 0.05
"""Norm below which what is left of a thumbnail is rounding (less than half a grey level a pixel), not a picture."""


class Pixels:
    """Mean-free ``side`` × ``side`` RGB thumbnails, unit length; similarity is their dot product, in [−1, 1]."""

    near_duplicate = 0.98
    """Similarity above which two pictures of a set are called near-duplicates: at side 16, none of the 2.5 million pairs of
    different pictures of the bundled world reaches it (the closest, 0.978, are templates)."""

    def __init__(self, side: int = 16):
        self.side = side

    @property
    def name(self) -> str:
        """Stored with every number this descriptor gives."""
        return f"pixels-{self.side}"

    def identity(self) -> dict[str, Any]:
        """What the numbers depend on; there are no weights."""
        rule = f"box mean to {self.side} x {self.side} RGB, mean color removed, unit length"
        return {"descriptor": "pixels", "side": self.side, "weights": None, "preprocessing": rule}

    def prepare(self, picture: Image.Image) -> Float[Tensor, "3 height width"]:
        """The thumbnail: pooling it once more changes nothing. Large pictures are first reduced by a whole factor."""
        factor = min(picture.size) // (32 * self.side)
        small = picture.reduce(factor) if factor > 1 else picture
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255
        return self._pooled(pixels[None])[0]

    def __call__(self, images: Pictures) -> Float[Tensor, "batch dim"]:
        """Descriptors of pictures in [0, 1] of any size; float32, rows of unit length (zero for a plain card)."""
        small = self._pooled(images).flatten(2)
        return F.normalize((small - small.mean(2, keepdim=True)).flatten(1), dim=1, eps=PLAIN)

    def _pooled(self, images: Pictures) -> Float[Tensor, "batch 3 side side"]:
        if min(images.shape[-2:]) < self.side:
            raise UsageError(f"{self.name} needs pictures of at least {self.side} px; got {tuple(images.shape[-2:])}.")
        return F.adaptive_avg_pool2d(images.float(), self.side)


class ReferenceSet:
    """Pictures a copy could be of, held as descriptors.

    Args:
        ids: One name per picture.
        vectors: Descriptors, ``[n, dim]``, unit length.
        descriptor: What made them.
        threshold: Similarity above which two pictures are called copies; None until calibrated.
    """

    def __init__(self, ids: Sequence[str], vectors: Tensor, descriptor: Descriptor, threshold: float | None = None):
        if len(ids) != len(vectors):
            raise UsageError(f"{len(ids)} ids for {len(vectors)} descriptors; give one id per picture.")
        self.ids, self.vectors, self.descriptor, self.threshold = list(ids), vectors, descriptor, threshold

    @classmethod
    def of(cls, ids: Sequence[str], images: Pictures, descriptor: Descriptor | None = None) -> ReferenceSet:
        """From pictures in [0, 1]."""
        descriptor = descriptor or Pixels()
        return cls(ids, descriptor(images), descriptor)

    @property
    def name(self) -> str:
        """The descriptor's name."""
        return self.descriptor.name

    def __len__(self) -> int:
        return len(self.ids)

    def similarities(self, images: Pictures) -> Float[Tensor, "batch n"]:
        """Every picture against every reference."""
        return self.descriptor(images) @ self.vectors.T

    def calibrate(self, different: Pictures, *, fmr: float = 0.01) -> float:
        """Set and return the similarity that the *nearest* reference of a different picture exceeds with probability ≤ ``fmr``.

        ``different`` are pictures known not to be in the set. The whole search is calibrated, not one pair, because a set of
        thousands finds something similar to anything.
        """
        nearest = self.similarities(different).max(1).values
        self.threshold = float(torch.quantile(nearest, 1 - fmr, interpolation="higher"))
        return self.threshold

    def nearest(self, images: Pictures) -> list[Match]:
        """The most similar reference of each picture; a copy is *above* the calibrated threshold."""
        best = self.similarities(images).max(1)
        return [
            matched(self.ids[i], s, self.name, self.threshold)
            for s, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
