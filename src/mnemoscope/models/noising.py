"""The forward process from outside: x_t of a clean picture, what a prediction at x_t says, and how wrong it is."""

from __future__ import annotations

from torch import Tensor

from ..types import Latents, PerSample, precise
from .base import Condition, Target

__all__ = ["denoising_loss", "levels", "noised", "split"]


def levels(target: Target, t: Tensor, x: Latents) -> tuple[Tensor, Tensor]:
    """α_t and σ_t, float32 or better, shaped and placed to multiply ``x``; ``t`` is a scalar, or one per sample."""
    alpha, sigma = (precise(c).to(x.device).view(-1, 1, 1, 1) for c in target.alpha_sigma(t))
    return alpha, sigma


def noised(target: Target, x0: Latents, t: Tensor, eps: Latents) -> Latents:
    """x_t = α_t x₀ + σ_t ε."""
    alpha, sigma = levels(target, t, x0)
    return alpha * x0 + sigma * eps


def split(target: Target, x: Latents, t: Tensor, cond: Condition | None) -> tuple[Latents, Latents]:
    """(x̂₀, ε̂) with x = α_t x̂₀ + σ_t ε̂, whatever the model predicts; float32 or better, differentiable in ``x``.

    Costs batch F. ε̂ = x + α u of a rectified flow, whose α + σ is 1.
    """
    alpha, sigma = levels(target, t, x)
    predicted = target.predict(x, t, cond)
    if target.space == "velocity":
        return x - sigma * predicted, x + alpha * predicted
    return (x - sigma * predicted) / alpha, predicted


def denoising_loss(target: Target, x0: Latents, t: Tensor, eps: Latents, cond: Condition | None) -> PerSample:
    """Mean squared error of the prediction at x_t = α_t x₀ + σ_t ε, of each sample, in the target's space; differentiable.

    Args:
        target: The model.
        x0: Clean latents, ``[batch, channel, height, width]``.
        t: One time for each sample.
        eps: The noise that is added.
        cond: One encoded prompt for each sample; None for a model without text.

    Costs batch F.
    """
    aim = eps if target.space == "eps" else eps - x0
    return (target.predict(noised(target, x0, t, eps), t, cond) - aim).square().flatten(1).mean(1)
