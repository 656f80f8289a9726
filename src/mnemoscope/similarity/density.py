"""Density of generations: Carlini et al., USENIX Security 2023, *Extracting Training Data from Diffusion Models* (§4.2).

Asked again and again with other seeds, a model draws a new picture for an ordinary prompt and nearly the same one for a
memorized prompt. This needs pictures alone, no model and no training image: the black-box baseline of every score that looks
inside. The paper calls a prompt memorized if 10 of 500 generations are pairwise near; here the share of near pairs and the
largest such clique are scores like others, and what *near* means comes from a calibration.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import UsageError
from .base import Descriptor, Pictures

__all__ = ["Density", "density", "near_by", "tiled_l2"]

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
    n = len(near)
    if n < 2:
        raise UsageError(
            f"density compares generations of one prompt with each other, and there is {n}; use at least 2 seeds."
        )
    edges = near.triu(1).nonzero().tolist()
    graph = networkx.Graph(edges)
    clique = len(networkx.max_weight_clique(graph, weight=None)[0]) if edges else 1
    return Density(len(edges) / (n * (n - 1) / 2), clique, n)
