"""The critical scale σ_c: how much noise level a picture withstands as a fixed point of denoising (López Amado, 2026).

Take the denoiser of noise level σ, D_σ(x) = E[x₀ | x₀ + σ ε = x], and apply it to the picture again and again: x ← D_σ(x). A picture that
the model holds as a point of its own stays where it is until σ is about half as large as the distance to its neighbors; then it is drawn
away towards the mean of many. σ_c is the largest σ at which K = 16 iterations all stay within r ‖x₀‖ of the picture.

For data of points this is mean shift with a Gaussian kernel of bandwidth σ, and two points ±a give σ_c² = a² (1 − r) / artanh(1 − r) as K
grows. A model of variance-preserving diffusion is asked at x_t = α_t x, with σ = σ_t / α_t.

In units of the latents; **high is stored**. 0 says that not even the smallest noise level of the grid was withstood. The grid is geometric
in σ over the training times, and its answer is found by bisection, which takes it that a picture which withstands σ withstands less.
The author's radius was not at hand: r is ours, an option, and scores of different r do not compare.

Costs K·⌈log₂(levels + 1)⌉ F, no gradient: a fixed number, so that nothing has to leave the device on the way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..bounds import COUNT, RATE, TIMES, within
from ..models.base import Condition, Target
from ..models.noising import levels, split
from ..types import Latents, PerSample, precise
from .base import STEPS, opened, time_at

__all__ = ["CriticalNoise", "grid", "withstands"]

LARGEST = 50.0
"""Noise levels end here: a rectified flow's grow without bound."""


def withstands(
    target: Target, x0: Latents, t: Tensor, cond: Condition | None, *, iterations: int, radius: float
) -> Bool[Tensor, " batch"]:
    """Whether iterations of the denoiser of each sample's time all stay within ``radius``·‖x₀‖ of it. NaN does not."""
    alpha, _ = levels(target, t, x0)
    reach = radius * x0.flatten(1).norm(dim=1)
    x, inside = x0, torch.ones(len(x0), dtype=torch.bool, device=x0.device)
    with torch.no_grad():
        for _ in range(iterations):
            x, _ = split(target, alpha * x, t, cond)
            inside &= (x - x0).flatten(1).norm(dim=1) <= reach
    return inside


def grid(target: Target, n: int) -> tuple[Tensor, Float[Tensor, " level"]]:
    """n training times whose σ_t/α_t are spaced as evenly in the logarithm as there are times, and that σ_t/α_t, rising."""
    times = time_at(target, range(STEPS))
    alpha, sigma = (precise(c) for c in target.alpha_sigma(times))
    ratio = (sigma / alpha).cpu().contiguous()
    largest = min(LARGEST, float(ratio[-1]))
    wanted = torch.logspace(math.log10(float(ratio[0])), math.log10(largest), n, dtype=ratio.dtype)
    index = torch.searchsorted(ratio, wanted).clamp(max=int((ratio <= largest).sum()) - 1)
    return times[index.to(times.device)], ratio[index].to(times.device)


class CriticalNoise:
    """σ_c as a measure.

    Args:
        iterations: K.
        radius: r, as a share of ‖x₀‖.
        levels: Noise levels of the grid.
    """

    name = "critical-noise"
    reads = "largest noise level at which the picture stays a fixed point, in units of latents"
    low_is_stored = False
    needs = frozenset({"times"})
    backwards = 0

    @within(iterations=COUNT, radius=RATE, levels=TIMES)
    def __init__(self, iterations: int = 16, radius: float = 0.5, levels: int = 31):
        self.iterations, self.radius, self.levels = iterations, radius, levels

    @property
    def forwards(self) -> int:
        """The rounds of bisection, times the iterations."""
        return self.iterations * self.levels.bit_length()

    def __call__(
        self, target: Target, images: Float[Tensor, "batch 3 rows columns"], *, prompts: Sequence[str] | None = None,
        keys: Sequence[int] | None = None,
    ) -> PerSample:  # fmt: skip
        """See :class:`~mnemoscope.measure.base.Measure`."""
        x0, cond = opened(target, images, prompts)
        times, sigmas = grid(target, self.levels)
        # Numbers of levels, from 1; 0 stands for none. Each picture bisects on its own, all with the same number of rounds.
        low = torch.zeros(len(x0), dtype=torch.long, device=x0.device)
        high = torch.full_like(low, self.levels + 1)
        for _ in range(self.levels.bit_length()):
            middle = ((low + high) // 2).clamp(min=1)
            stays = withstands(target, x0, times[middle - 1], cond, iterations=self.iterations, radius=self.radius)
            low, high = torch.where(stays, middle, low), torch.where(stays, high, middle)
        return torch.cat([torch.zeros_like(sigmas[:1]), sigmas])[low]
