"""A reference set in memory: pictures a copy could be of. For sets on disk see :mod:`.index`."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from .. import stats
from ..errors import UsageError
from .base import DEFAULT, Descriptor, Match, Pictures, build, describe, matched
from .fingerprint import resized
from .layout import CANDIDATES, Layouts, with_layouts

__all__ = ["ReferenceSet"]


class ReferenceSet:
    """Pictures a copy could be of, held as descriptors.

    Args:
        ids: One name per picture.
        vectors: Descriptors, ``[n, dim]``, unit length.
        descriptor: What made them.
        threshold: Similarity above which two pictures are called copies; None until calibrated.
        small: The pictures themselves, small, for layouts; None: layouts are not compared.
    """

    def __init__(
        self,
        ids: Sequence[str],
        vectors: Tensor,
        descriptor: Descriptor,
        threshold: float | None = None,
        small: Pictures | None = None,
    ):
        if len(ids) != len(vectors):
            raise UsageError(f"{len(ids)} ids for {len(vectors)} descriptors; give one id per picture.")
        self.ids, self.vectors, self.descriptor, self.threshold = list(ids), vectors, descriptor, threshold
        self.layout_threshold: float | None = None
        self._small = None if small is None else (resized(small) * 255).round().byte()
        self._place = {name: i for i, name in enumerate(self.ids)}
        self._layouts = Layouts(self._thumbnail)

    @classmethod
    def of(cls, ids: Sequence[str], images: Pictures, descriptor: Descriptor | None = None) -> ReferenceSet:
        """From pictures in [0, 1]."""
        descriptor = build(DEFAULT) if descriptor is None else descriptor
        return cls(ids, describe(descriptor, images), descriptor, small=images)

    @property
    def name(self) -> str:
        """The descriptor's name."""
        return self.descriptor.name

    def __len__(self) -> int:
        return len(self.ids)

    def similarities(self, images: Pictures) -> Float[Tensor, "batch n"]:
        """Every picture against every reference."""
        return describe(self.descriptor, images) @ self.vectors.T

    def calibrate(self, different: Pictures, *, fmr: float = 0.01) -> float:
        """Set and return the similarity that the *nearest* reference of a different picture exceeds with probability ≤ ``fmr``.

        The threshold of layouts is set along with it, in the same way.

        ``different`` are pictures known not to be in the set. The whole search is calibrated, not one pair, because a set of
        thousands finds something similar to anything.
        """
        found = self._candidates(different)
        self.threshold = stats.threshold_at_fpr([some[0].similarity for some in found], fmr).value
        layouts = [best[1] for best in self._layouts.best(different, found) if best is not None]
        if len(layouts) == len(found):
            self.layout_threshold = stats.threshold_at_fpr(layouts, fmr).value
        return self.threshold

    def nearest(self, images: Pictures) -> list[Match]:
        """The most similar reference of each picture; a copy is *above* the calibrated threshold."""
        found = self._candidates(images)
        return with_layouts(found, self._layouts.best(images, found), self.layout_threshold)

    def _candidates(self, images: Pictures) -> list[list[Match]]:
        best = self.similarities(images).topk(min(CANDIDATES, len(self)), dim=1)
        return [
            [matched(self.ids[i], s, self.name, self.threshold) for s, i in zip(values, numbers, strict=True)]
            for values, numbers in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def _thumbnail(self, reference: str) -> Tensor | None:
        return None if self._small is None else self._small[self._place[reference]].float() / 255
