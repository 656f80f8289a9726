"""Shapes, and the record of one denoising step that rooms exchange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Latents: TypeAlias = Float[Tensor, "batch channel height width"]
"""What the denoiser sees: latents, or pixels in [-1, 1] for a pixel model."""

PerSample: TypeAlias = Float[Tensor, " batch"]
"""One number for each sample of a batch."""

Space = Literal["eps", "velocity"]
"""In which space predictions are compared: noise ε, or a rectified flow's velocity u = ε − x₀ (design: scores never
cross spaces, because Δε = (1 − t)·Δu vanishes where a flow starts sampling)."""


def precise(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it is: what predictions are compared in, however coarse the model is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True, slots=True)
class Step:
    """One denoising step, seen from outside the model.

    Attributes:
        index: Position in the sampler's schedule; 0 is the first step, on pure noise.
        t: The model's own time at this step (a training timestep for DDPM-type models; for flows 1000 σ, and σ itself in closed forms).
        x: What the denoiser is shown, x_t = α_t x₀ + σ_t ε, ``[batch, channel, height, width]``. (Samplers that work in
            σ-space keep their state in another scale; it does not leave them.)
        cond: Prediction with the prompt, in ``space``, float32 or better, same shape as ``x``. For a model without text, the
            only one.
        uncond: Prediction with the empty prompt, or None where the model has no text or makes no second prediction.
        x_next: What the denoiser will be shown next; after the last step the sample x₀. None where it is not known yet (the
            step just seen by a watched pipeline).
        space: Space of ``cond`` and ``uncond``.
    """

    index: int
    t: float
    x: Latents
    cond: Latents
    uncond: Latents | None
    x_next: Latents | None
    space: Space = "eps"
