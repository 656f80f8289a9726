"""A picture's own denoising loss, the plainest of membership scores (the loss attack of Yeom et al., CSF 2018, on the loss of Ho et al.,
NeurIPS 2020, eq. 14):

    E_t E_ε ‖ε_θ(α_t x₀ + σ_t ε, t) − ε‖² / D,

in the space of the model's predictions (ε, or the velocity of a rectified flow). Times are the middles of equal strata of the training
times, and noises are the same for all pictures, so that two pictures differ by the pictures alone.

Mean squared error per element; **low is stored**. It mixes what the model knows of this picture with how easy the picture is: a plain one
has a low loss without ever having been seen. That is why it is a companion, and a floor that other scores have to beat.

Costs one F per draw, no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .. import bounds
from ..bounds import within
from ..models.base import Target
from ..models.noising import denoising_loss
from ..types import PerSample
from .base import STEPS, common, opened, time_at

__all__ = ["DenoisingLoss"]


class DenoisingLoss:
    """Mean of :func:`~mnemoscope.models.noising.denoising_loss` over the training times.

    Args:
        draws: Strata of the training times, one noise each.
    """

    name = "denoising-loss"
    reads = "mean squared error of predictions, per element"
    low_is_stored = True
    needs = frozenset({"times"})
    backwards = 0

    @within(draws=bounds.STEPS)
    def __init__(self, draws: int = 16):
        self.draws = draws

    @property
    def forwards(self) -> int:
        """One for each draw."""
        return self.draws

    def __call__(
        self, target: Target, images: Float[Tensor, "batch 3 rows columns"], *, prompts: Sequence[str] | None = None,
        keys: Sequence[int] | None = None,
    ) -> PerSample:  # fmt: skip
        """See :class:`~mnemoscope.measure.base.Measure`."""
        x0, cond = opened(target, images, prompts)
        times = time_at(target, [(2 * k + 1) * STEPS // (2 * self.draws) for k in range(self.draws)])
        noises = common(self.name, self.draws, x0)
        with torch.no_grad():
            losses = [
                denoising_loss(target, x0, t.expand(len(x0)), eps.expand_as(x0), cond)
                for t, eps in zip(times, noises, strict=True)
            ]
        return torch.stack(losses).mean(0)
