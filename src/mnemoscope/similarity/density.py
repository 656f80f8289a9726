"""Density of generations: Carlini et al., USENIX Security 2023, *Extracting Training Data from Diffusion Models* (§4.2).

Asked again and again with other seeds, a model draws a new picture for an ordinary prompt and nearly the same one for a
memorized prompt. This needs pictures alone, no model and no training image: the black-box baseline of every score that looks
inside. The paper calls a prompt memorized if 10 of 500 generations are pairwise near; here the share of near pairs and the
largest such clique are scores like others, and what *near* means comes from a calibration. :class:`DensityDetector` is
what an audit runs, and there the default counts nothing: the mean similarity of the generations needs no δ and, unlike a share
of so few pairs, is not coarse with a handful of seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import networkx
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .. import plugins
from ..bounds import NEARNESS, within
from ..errors import UnknownName, UsageError
from ..plugins import installed
from ..records.store import short
from . import base
from .base import Descriptor, Pictures

__all__ = ["Density", "DensityDetector", "density", "near_by", "tiled_l2"]

TILES = 4
"""Tiles along each side: 16 of them, as in the paper."""


def tiled_l2(
    a: Float[Tensor, "n 3 height width"], b: Float[Tensor, "m 3 rows columns"], tiles: int = TILES
) -> Float[Tensor, "n m"]:
    """max_i ‖a_i − b_i‖₂ / √dim over ``tiles`` × ``tiles`` tiles: the paper's modified ℓ₂ distance.

    The maximum keeps two pictures apart that share a plain background and differ in one place, which a mean would call alike.

    Args:
        a: Pictures in [0, 1].
        b: Pictures of the same size.
        tiles: Tiles along each side; rows and columns that do not fill one are shared out by the last.

    Returns:
        Distances in [0, 1], float32; 0 for equal pictures.

    Raises:
        UsageError: sizes differ, or a picture has fewer pixels than tiles along a side.
    """
    if a.shape[-2:] != b.shape[-2:]:
        raise UsageError(
            f"tiled ℓ₂ compares pictures of one size, and these are {tuple(a.shape[-2:])} and {tuple(b.shape[-2:])}."
        )
    if min(a.shape[-2:]) < tiles:
        raise UsageError(
            f"tiled ℓ₂ with {tiles} tiles a side needs pictures of at least {tiles} px; got {tuple(a.shape[-2:])}."
        )
    worst = torch.zeros(len(a), len(b), device=a.device)
    for rows in _bands(a.shape[-2], tiles):
        for columns in _bands(a.shape[-1], tiles):
            x, y = (p[..., rows, columns].float().flatten(1) for p in (a, b))
            worst = worst.maximum(_distances(x, y) / x.shape[1] ** 0.5)
    return worst


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Exact: the fast way through a matrix product loses the small distances, which are the ones that matter."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _bands(side: int, tiles: int) -> list[slice]:
    width = side // tiles
    return [slice(k * width, side if k == tiles - 1 else (k + 1) * width) for k in range(tiles)]


def near_by(images: Pictures, descriptor: Descriptor, threshold: float) -> Bool[Tensor, "n n"]:
    """Which pairs of generations are more similar than ``threshold`` under a descriptor: the variant that forgives more."""
    vectors = descriptor(images)
    return vectors @ vectors.T > threshold


@dataclass(frozen=True)
class Density:
    """How alike n generations of one prompt are.

    Attributes:
        pairs: Share of near pairs among the n (n − 1) / 2, in [0, 1].
        clique: Size of the largest set of pairwise near generations; 1: no two are near.
        n: Generations.
    """

    pairs: float
    clique: int
    n: int


def density(near: Bool[Tensor, "n n"]) -> Density:
    """Near pairs and the largest clique among them.

    Args:
        near: Which generations are near each other, symmetric; the diagonal does not count. For the paper's:
            ``tiled_l2(images, images) < δ``.

    Raises:
        UsageError: there are fewer than two generations, so there is no pair.
    """
    n = _several(len(near))
    edges = near.triu(1).nonzero().tolist()
    graph = networkx.Graph(edges)
    clique = len(networkx.max_weight_clique(graph, weight=None)[0]) if edges else 1
    return Density(len(edges) / (n * (n - 1) / 2), clique, n)


def _several(n: int) -> int:
    if n < 2:
        raise UsageError(
            f"density compares generations of one prompt with each other, and there is {n}; use at least 2 seeds."
        )
    return n


TILED = "tiled"
"""The one way of comparing pictures that is a distance of pixels and no descriptor."""

COUNTS = ("pairs", "clique")


class DensityDetector:
    """How alike the generations of one prompt are, as a score: the detector ``density``.

    The score of generation i is the mean of its similarity to the other n − 1, so that the prompt's score, the mean over its
    seeds, is the mean similarity of all n (n − 1) / 2 pairs. With ``near`` the similarity of a pair is 1 or 0, and the prompt's
    score is the share of near pairs, :attr:`Density.pairs`.

    Args:
        descriptor: ``tiled``: 1 − :func:`tiled_l2`, the paper's; else an installed descriptor, and the cosine of its vectors.
        near: When two generations count as near. For ``tiled`` a distance δ, and near is below; for a descriptor a similarity, and
            near is above. None: nothing is counted, pairs are as similar as they are.
        count: With ``near``: ``pairs``, or ``clique``, the share of the generations that are in the largest set of pairwise near
            ones (1/n where no two are; n times the score is :attr:`Density.clique`).
        descriptor_options: Arguments of the descriptor.

    Raises:
        UnknownName: no such descriptor, or no such ``count``.
        UsageError: a clique without ``near``, or an option that the descriptor refuses.
    """

    name = "density"
    needs = frozenset({"pictures"})
    higher_is_more_memorized = True
    steps_needed = 0
    space = "picture"
    costs = "no forwards beyond those of the pictures"

    @within(near=NEARNESS)
    def __init__(
        self,
        descriptor: str = TILED,
        near: float | int | None = None,
        count: str = "pairs",
        descriptor_options: Mapping[str, Any] | None = None,
    ):
        if count not in COUNTS:
            raise UnknownName("count of density", count, COUNTS)
        if count == "clique" and near is None:
            raise UsageError(
                "density: a clique is of generations that are near each other; say what near means, as in near=0.1."
            )
        if descriptor != TILED and descriptor not in installed("descriptor"):
            raise UnknownName("descriptor", descriptor, [TILED, *installed("descriptor")])
        self.descriptor, self.count = descriptor, count
        self.near = None if near is None else float(near)
        self._describe = None if descriptor == TILED else base.build(descriptor, descriptor_options)
        identity = {"tiles": TILES} if self._describe is None else self._describe.identity()
        # A plain value, and public: thresholds are kept with what detectors hold in public, and must not outlive other weights.
        self.identity = json.dumps(identity, sort_keys=True, default=str)

    @classmethod
    def document_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options that a document may choose; those of its descriptor are judged as any descriptor's.

        Raises:
            UnknownName: no such descriptor, or no such ``count``.
            UsageError: an option that a document must not choose.
        """
        chosen = dict(options)
        descriptor, more = str(chosen.get("descriptor", TILED)), chosen.get("descriptor_options") or {}
        if not isinstance(more, Mapping):
            raise UsageError(f"density: descriptor_options is {short(repr(more))}, and must be a mapping of options.")
        if descriptor != TILED:
            chosen["descriptor_options"] = plugins.document_options("descriptor", descriptor, more)
        elif more:
            raise UsageError("density: the comparison of tiles takes no descriptor_options; leave them out.")
        if not plugins.is_number(chosen.get("near")):
            raise UsageError(f"density: near is {short(repr(chosen['near']))}, and must be a number.")
        if chosen.get("count", COUNTS[0]) not in COUNTS:
            raise UnknownName("count of density", str(chosen["count"]), COUNTS)
        return chosen

    def score(self, pictures: Float[Tensor, "n 3 height width"]) -> Float[Tensor, " n"]:
        """How alike each generation is to the others of its prompt.

        Raises:
            UsageError: there is only one, or the pictures are too small to be compared.
        """
        n = _several(len(pictures))
        alike = self._alike(pictures)
        if self.count == "clique":
            return torch.full((n,), density(alike.bool()).clique / n, device=pictures.device)
        alike = alike.float()
        return (alike.sum(1) - alike.diagonal()) / (n - 1)

    def _alike(self, pictures: Pictures) -> Float[Tensor, "n n"] | Bool[Tensor, "n n"]:
        if self._describe is None:
            distance = tiled_l2(pictures, pictures)
            return 1 - distance if self.near is None else distance < self.near
        if self.near is not None:
            return near_by(pictures, self._describe, self.near)
        vectors = self._describe(pictures)
        return vectors @ vectors.T
