"""Similarity to what the audited model could at best have drawn of a reference: its autoencoder's reconstruction.

A latent model draws through its autoencoder, and a descriptor may take the autoencoder's blur for a difference. Beside the similarity
to a reference therefore stands the similarity to the reference's own reconstruction. Copies are called by the first alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..types import Latents

__all__ = ["Reconstructions"]

REMEMBERED = 4096
"""References whose reconstruction's descriptor is kept."""


@runtime_checkable
class Autoencodes(Protocol):
    """What is asked of a target here."""

    latent_shape: tuple[int, int, int]

    def encode_images(self, images: Float[Tensor, "batch 3 rows columns"]) -> Latents:
        """x₀ of pictures in [0, 1]."""
        ...

    def decode(self, x: Latents) -> Float[Tensor, "batch 3 rows columns"]:
        """Pictures in [0, 1]."""
        ...


class Reconstructions:
    """Similarities of generated pictures to reconstructed references.

    Args:
        target: The model.
        reference: A reference set; one without a ``descriptor``, or that cannot show its pictures, has no reconstructions.
    """

    def __init__(self, target: Autoencodes, reference: Any):
        self.target = target
        self._describe: Any = getattr(reference, "descriptor", None)
        self._image: Any = getattr(reference, "image", None)
        self._vector = lru_cache(maxsize=REMEMBERED)(self._reconstructed)

    def similarity(self, picture: Float[Tensor, "3 height width"], reference: str) -> float | None:
        """To the reference of that id; None where there is no autoencoder or no picture to reconstruct."""
        size = tuple(picture.shape[-2:])
        if self._describe is None or self._image is None or size == tuple(self.target.latent_shape[1:]):
            return None
        vector = self._vector(reference, size)
        return None if vector is None else round(float(self._describe(picture[None])[0] @ vector), 6)

    def _reconstructed(self, reference: str, size: tuple[int, int]) -> Tensor | None:
        shown = self._image(reference)
        if shown is None:
            return None
        with torch.no_grad():
            sized = F.interpolate(shown[None].float(), size, mode="bilinear", antialias=True, align_corners=False)
            return self._describe(self.target.decode(self.target.encode_images(sized.clamp(0, 1))))[0]
