"""How long descriptors are: none is longer than 1, so that no similarity exceeds 1. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

__all__ = ["LONGEST", "SLACK", "Lengths", "examine"]

LONGEST = 1.001
"""Length that a descriptor may give: networks compute in half precision."""

SLACK = {"float16": 2e-3, "float32": 1.1e-3}
"""By how much a stored vector may be longer than 1, by its dtype: what a descriptor may give, and rounding."""

BLOCK = 1 << 22
"""Numbers that are looked at together."""


@dataclass(frozen=True)
class Lengths:
    """What :func:`examine` saw.

    Attributes:
        faulty: The first vector that is not finite, or longer than 1; None: there is none.
        length: Its length, in words; empty: there is none.
        short: Vectors shorter than 1: of pictures without content, if nothing happened to them.
    """

    faulty: int | None
    length: str
    short: int


def examine(vectors: Float[np.ndarray, "n dim"]) -> Lengths:
    """Look at the length of every vector, a block in memory at a time.

    Args:
        vectors: float16 or float32; may be memory-mapped.
    """
    slack, step, short = SLACK[vectors.dtype.name], max(1, BLOCK // vectors.shape[1]), 0
    for start in range(0, len(vectors), step):
        block = np.asarray(vectors[start : start + step], np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = np.sqrt(np.einsum("nd,nd->n", block, block))
        sound = lengths <= 1 + slack  # false for NaN
        if not sound.all():
            first = int(np.argmin(sound))
            return Lengths(start + first, f"{lengths[first]:g}", short)
        short += int((lengths < 1 - slack).sum())
    return Lengths(None, "", short)
