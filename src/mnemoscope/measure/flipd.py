"""FLIPD, the local intrinsic dimension of what a model has learned at a picture: Kamkari et al., NeurIPS 2024, *A Geometric View of Data
Complexity: Efficient Local Intrinsic Dimension Estimation with Diffusion Models*; read as memorization by Ross et al., ICLR 2025, *A
Geometric Framework for Understanding Memorization in Generative Models*.

A generalizing model has room around a picture: directions in which it may vary and still be likely. A memorized picture has little of it,
down to an isolated point of dimension 0. At a small noise level σ, with the score s = ∇ log p_t and D elements,

    LID(x₀) ≈ D + σ² (tr ∇s(α x₀) + ‖s(α x₀)‖²).

With s = −ε/σ this is D − σ tr ∂ε/∂x + ‖ε‖², and D − σ tr ∂ε/∂x = tr(α² C)/σ², C the posterior covariance of x₀: each direction counts
by how free it is left at that noise. The trace is Hutchinson's, mean of vᵀ(v − σ (∂ε/∂x)ᵀ v) over Rademacher probes v that all pictures
share; D never appears, as vᵀv is D exactly and a difference of large numbers would lose digits.

In dimensions, out of D; **low is stored**. A plain picture (a flat color) has a low dimension without being memorized, and a network need
not be the gradient of anything, so that estimates below 0 occur. Numbers of different noise levels do not compare. No caption is needed.

Costs 1 F and one B per probe: a vector–Jacobian product, which every denoiser can do, instead of the authors' forward-mode one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..bounds import COUNT, STEP, within
from ..models.base import Condition, Target
from ..models.noising import levels, split
from ..types import Latents, PerSample
from .base import common, opened, time_at

__all__ = ["FLIPD", "flipd"]


def flipd(
    target: Target, x0: Latents, t: Tensor, cond: Condition | None, probes: Float[Tensor, "probe channel height width"]
) -> PerSample:
    """The local intrinsic dimension at each x₀, seen at time ``t``, with these probes v."""
    alpha, sigma = levels(target, t, x0)
    with torch.enable_grad():
        x = (alpha * x0).detach().requires_grad_()
        _, eps = split(target, x, t, cond)
        free = torch.zeros(len(x0), dtype=x.dtype, device=x.device)
        for k, v in enumerate(probes):
            (pulled,) = torch.autograd.grad((eps * v).sum(), x, retain_graph=k + 1 < len(probes))
            free += (v * (v - sigma * pulled)).flatten(1).sum(1)
    return free / len(probes) + eps.detach().square().flatten(1).sum(1)


class FLIPD:
    """:func:`flipd` as a measure.

    Args:
        time: Number of the training time, of 1000, at which the model is asked; small. The papers take a twentieth of the way.
        probes: Rademacher probes of the trace.
    """

    name = "flipd"
    reads = "local intrinsic dimension, of as many as latents have elements"
    low_is_stored = True
    needs = frozenset({"times", "grad"})
    forwards = 1

    @within(time=STEP, probes=COUNT)
    def __init__(self, time: int = 50, probes: int = 8):
        self.time, self.probes = time, probes

    @property
    def backwards(self) -> int:
        """One for each probe."""
        return self.probes

    def __call__(
        self, target: Target, images: Float[Tensor, "batch 3 rows columns"], *, prompts: Sequence[str] | None = None,
        keys: Sequence[int] | None = None,
    ) -> PerSample:  # fmt: skip
        """See :class:`~mnemoscope.measure.base.Measure`."""
        x0, cond = opened(target, images, prompts)
        t = time_at(target, [self.time]).expand(len(x0))
        probes = torch.where(common(self.name, self.probes, x0) < 0, -1.0, 1.0).to(x0)
        return flipd(target, x0, t, cond, probes)
