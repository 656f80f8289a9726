"""Thumbnails as a descriptor: small, permissive, good enough to tell copies apart at 64 px.

Two pictures are compared by the cosine of their 16 × 16 RGB box thumbnails after the mean colour is removed. That forgives
an autoencoder's blur and small noise, and nothing else: it does not see through mirroring, cropping or turning.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ..bounds import THUMBNAIL, within
from ..errors import UsageError
from .base import Pictures, as_tensor

__all__ = ["PLAIN", "Pixels"]

PLAIN = 0.05
"""Norm below which what is left of a thumbnail is rounding (less than half a grey level a pixel), not a picture."""


class Pixels:
    """Mean-free ``side`` × ``side`` RGB thumbnails, unit length; similarity is their dot product, in [−1, 1]."""

    near_duplicate = 0.98
    """Similarity above which two pictures of a set are called near-duplicates: at side 16, none of the 2.5 million pairs of
    different pictures of the bundled world reaches it (the closest, 0.978, are templates)."""

    @within(side=THUMBNAIL)
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
        return self._pooled(as_tensor(picture, 32 * self.side))[0]

    def __call__(self, images: Pictures) -> Float[Tensor, "batch dim"]:
        """Descriptors of pictures in [0, 1] of any size; float32, rows of unit length (zero for a plain card)."""
        small = self._pooled(images).flatten(2)
        return F.normalize((small - small.mean(2, keepdim=True)).flatten(1), dim=1, eps=PLAIN)

    def _pooled(self, images: Pictures) -> Float[Tensor, "batch 3 side side"]:
        if min(images.shape[-2:]) < self.side:
            raise UsageError(f"{self.name} needs pictures of at least {self.side} px; got {tuple(images.shape[-2:])}.")
        return F.adaptive_avg_pool2d(images.float(), self.side)
