"""Every random draw of a training, from (seed, place) alone: the place of a sample in the whole training, counted from 0.

So a resumed training goes on as if it had never stopped, and the number of processes changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..mitigate.base import generator, key_of
from ..types import Latents

__all__ = ["Draws", "Visits"]


@dataclass(frozen=True)
class Visits:
    """One batch. All of it is on the CPU.

    Attributes:
        places: Of these samples in the whole training.
        rows: Which pictures.
        mirrored: Which of them are mirrored.
        posterior: Standard normal noise of the autoencoder's posterior.
        noise: ε.
        t: Timesteps.
        blank: Whose caption is replaced by the empty prompt.
    """

    places: range
    rows: Int[Tensor, " batch"]
    mirrored: Bool[Tensor, " batch"]
    posterior: Latents
    noise: Latents
    t: Int[Tensor, " batch"]
    blank: Bool[Tensor, " batch"]


class Draws:
    """The order of pictures, and what is drawn for each visit.

    Args:
        listing: The rows of one epoch; a picture with copies is in it several times.
        shape: Of a latent, ``(channels, height, width)``.
        horizon: Number of training timesteps.
        seed: Of all draws.
        flip: Mirror half of the visits.
        dropout: Share of visits with the empty prompt.
    """

    def __init__(
        self, listing: Sequence[int], shape: tuple[int, int, int], *, horizon: int, seed: int, flip: bool, dropout: float
    ):  # fmt: skip
        self.listing = torch.tensor(listing, dtype=torch.long)
        self.shape, self.horizon, self.seed, self.flip, self.dropout = shape, horizon, seed, flip, dropout
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def visits(self, start: int, n: int) -> Visits:
        """What the samples at places ``start`` to ``start + n`` are."""
        drawn = [self._visit(place) for place in range(start, start + n)]
        rows = torch.stack([self._row(place) for place in range(start, start + n)])
        numbers = torch.stack([u for u, _, _ in drawn])
        return Visits(
            places=range(start, start + n),
            rows=rows,
            mirrored=numbers[:, 0] < 0.5 if self.flip else torch.zeros(n, dtype=torch.bool),
            posterior=torch.stack([z for _, z, _ in drawn]),
            noise=torch.stack([e for _, _, e in drawn]),
            t=(numbers[:, 1] * self.horizon).long().clamp(max=self.horizon - 1),
            blank=numbers[:, 2] < self.dropout,
        )

    def _visit(self, place: int) -> tuple[Float[Tensor, " 3"], Tensor, Tensor]:
        source = torch.Generator("cpu").manual_seed(key_of("visit", place, self.seed))
        u = torch.rand(3, generator=source, dtype=torch.float64)
        return u, torch.randn(self.shape, generator=source), torch.randn(self.shape, generator=source)

    def _row(self, place: int) -> Tensor:
        epoch, within = divmod(place, len(self.listing))
        return self.listing[self._order(epoch)[within]]

    def _shuffled(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.listing), generator=generator(key_of("order", epoch, self.seed), "order"))
