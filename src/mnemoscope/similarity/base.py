"""Descriptor: what turns pictures into numbers that say "copy", and what a search among references answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from .. import plugins
from ..errors import ModelFault
from .lengths import LONGEST

__all__ = [
    "DEFAULT",
    "Descriptor",
    "Match",
    "Pictures",
    "Vectors",
    "as_tensor",
    "build",
    "build_from_document",
    "describe",
    "matched",
    "too_long",
]

Pictures: TypeAlias = Float[Tensor, "batch 3 height width"]
"""RGB in [0, 1]."""

Vectors: TypeAlias = Float[Tensor, "batch dim"]
"""Descriptors: rows of unit length, so that similarity is their dot product."""

DEFAULT = "fingerprint"
"""The descriptor that commands use when none is named."""


@runtime_checkable
class Descriptor(Protocol):
    """Weights, preprocessing and similarity in one object, with a name that is stored beside every number it gives.

    ``descriptor(descriptor.prepare(picture)[None])`` and ``descriptor(tensor of the same picture[None])`` agree but for
    rounding: an index is built through the one and asked through the other.
    """

    @property
    def name(self) -> str:
        """Different for whatever gives different numbers."""
        ...

    def identity(self) -> dict[str, Any]:
        """What its numbers depend on, as plain values: hash of the weights, preprocessing."""
        ...

    def prepare(self, picture: Image.Image) -> Float[Tensor, "3 height width"]:
        """An RGB picture as the tensor it is described from, best all of one size. Runs in decoding threads: no state, no device.

        Raises:
            UsageError: this picture cannot be described, for instance because it is too small.
        """
        ...

    def __call__(self, images: Pictures) -> Vectors:
        """Descriptors of pictures of any one size, rows of unit length (zero for a picture without content)."""
        ...


@dataclass(frozen=True)
class Match:
    """The nearest reference of one picture, and the one whose layout it shares most.

    Attributes:
        reference: Id of the nearest reference.
        similarity: Of the whole pictures, under ``descriptor``.
        descriptor: Its name.
        threshold: Similarity above which a copy is called; None: not calibrated.
        copy_found: Whether it is.
        layout: Largest layout similarity to one of the nearest references (:mod:`.layout`); None: their pictures cannot be shown.
        layout_reference: The reference it is with.
        layout_threshold: Layout similarity above which a template copy is called; None: not calibrated.
        template_found: Whether it is, the whole picture not being a copy.
    """

    reference: str
    similarity: float
    descriptor: str
    threshold: float | None
    copy_found: bool | None
    layout: float | None = None
    layout_reference: str | None = None
    layout_threshold: float | None = None
    template_found: bool | None = None


def matched(reference: str, similarity: float, descriptor: str, threshold: float | None) -> Match:
    """A match; a copy is *above* the calibrated threshold, and without one no copy is called.

    What rounding of stored vectors adds beyond −1 or 1 is cut off.
    """
    similarity = min(max(similarity, -1.0), 1.0)
    found = None if threshold is None else similarity > threshold
    return Match(reference, round(similarity, 6), descriptor, threshold, found)


def describe(descriptor: Descriptor, images: Pictures) -> Vectors:
    """Descriptors of pictures in [0, 1].

    Raises:
        ModelFault: one is not finite, or longer than 1: it would be similar to nothing, or to anything.
    """
    with torch.no_grad():
        vectors = descriptor(images).float()
    if not bool(torch.isfinite(vectors).all()):
        raise ModelFault(f"{descriptor.name} gives NaN or infinity for a picture; check its weights, and the picture.")
    if bool((vectors.norm(dim=1) > LONGEST).any()):
        raise too_long(descriptor)
    return vectors


def too_long(descriptor: Descriptor) -> ModelFault:
    """What is wrong with a descriptor whose vectors are longer than 1."""
    return ModelFault(f"{descriptor.name} gives vectors longer than 1; similarity is the dot product of unit vectors.")


def as_tensor(picture: Image.Image, least: int = 512) -> Float[Tensor, "1 3 height width"]:
    """An RGB picture in [0, 1]. A large one is first reduced by a whole factor, to no less than ``least`` pixels along its short side."""
    factor = min(picture.size) // least
    small = picture.reduce(factor) if factor > 1 else picture
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() / 255


def build(name: str, options: Mapping[str, Any] | None = None) -> Descriptor:
    """A descriptor from plain values that the reader chose: :func:`mnemoscope.plugins.build`."""
    return plugins.build("descriptor", name, options)


def build_from_document(name: str, options: Mapping[str, Any]) -> Descriptor:
    """A descriptor that a document names, such as an index: only with options that a stranger may choose.

    Raises:
        UsageError: as :func:`mnemoscope.plugins.document_options`.
    """
    return build(name, plugins.document_options("descriptor", name, options))
