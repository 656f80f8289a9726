"""Magnitude of the text-conditional prediction: Wen et al., ICLR 2024, *Detecting, Explaining, and Mitigating Memorization*.

d = (1/|S|) Σ_{t∈S} ‖ε_θ(x_t, e_p) − ε_θ(x_t, e_∅)‖₂ over a window S of denoising steps, on the ordinary guided trajectory.

Where the official code and the paper differ, this follows the paper: the norm is taken per image, never over a batch, and
in ε-space whatever the checkpoint predicts. Subtraction and norm are at least float32 whatever the model's dtype, because
bfloat16 rounding alone adds a floor of about 0.27 to a 16,384-element norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ..bounds import STEP, STEPS
from ..errors import CannotAudit, UsageError
from ..models.base import Condition, Target
from ..types import Latents, PerSample, Step, precise

TokenGradients: TypeAlias = Float[Tensor, "batch token dim"]
"""One derivative for each element of each sample's embedding."""


def magnitude(cond: Latents, uncond: Latents) -> PerSample:
    """‖ε(x_t, e_p) − ε(x_t, e_∅)‖₂ of each sample, over all its elements (Wen et al. 2024, the detection metric).

    Args:
        cond: Prediction with the prompt, ``[batch, channel, height, width]``, any float dtype.
        uncond: Prediction with the empty prompt, same shape.

    Returns:
        ``[batch]``, float32 (float64 for float64 predictions). Unit: that of ε, summed in quadrature over D elements; see
        :func:`per_dimension`.
    """
    return (precise(cond) - precise(uncond)).flatten(1).norm(dim=1)


class Gradient(NamedTuple):
    """What :func:`gradient` finds."""

    size: PerSample
    """L = ‖ε(x_t, e) − ε(x_t, e_∅)‖₂ of each sample."""
    slope: TokenGradients
    """∂L/∂e, float32 or better; 0 where the prediction is the null one."""
    output: Latents
    """The raw prediction with the prompt, which sampling would make again."""


def gradient(
    target: Target,
    x: Latents,
    t: Tensor,
    cond: Condition,
    uncond: Latents,
    *,
    enough: Callable[[PerSample], bool] | None = None,
) -> Gradient:
    """The magnitude of each sample, and its derivative with respect to the sample's own copy of the embedding.

    Explanations read it (Wen et al. 2024, token-wise significance), the mitigation of the same paper walks down it.

    Args:
        target: The model; its weights take no part.
        x: What the denoiser is shown, ``[batch, channel, height, width]``.
        t: Its time.
        cond: One row for each sample; the leaf is ``tokens``, whatever else it holds stays as it is.
        uncond: The null prediction in the target's space, a constant.
        enough: Asked with the magnitudes; where it says yes there is no backward, and the slope is 0.

    Costs batch·(F + B), or batch·F.
    """
    # Half precision: entries of the unit vector Δ/‖Δ‖ are about 1/√D, and their products with small weights would vanish.
    # A power of two costs no rounding.
    scale = 2.0 ** round(math.log2(math.prod(x.shape[1:])) / 2)
    leaf = precise(cond.tokens).detach().clone().requires_grad_()
    with torch.enable_grad():
        output = target.output(x, t, replace(cond, tokens=leaf))
        size = magnitude(target.to_space(output, x, t), uncond.detach())
        if enough is not None and enough(size.detach()):
            return Gradient(size.detach(), torch.zeros_like(leaf), output.detach())
        (slope,) = torch.autograd.grad(scale * size.sum(), leaf)
    return Gradient(size.detach(), slope / scale, output.detach())


def per_dimension(d: Tensor, latent_shape: tuple[int, ...]) -> Tensor:
    """d / √(D / 16384): what the magnitude would be at Stable Diffusion's 4×64×64, so that latent sizes compare."""
    size = 1
    for side in latent_shape:
        size *= side
    return d / (size / 16384) ** 0.5


class Magnitude:
    """Mean of :func:`magnitude` over a window of denoising steps, for each sample.

    Args:
        steps: Number of leading steps in the window (1: the first step alone), or a half-open window ``(start, stop)``.

    Feed it steps with :meth:`update`; ask for :meth:`compute` (``[batch]``) or :meth:`per_step` (``[batch, steps seen]``).
    Every step from 0 on is kept, so any other window is a slice of ``per_step``. Nothing leaves the device before the caller
    asks.
    """

    name = "magnitude"
    needs = frozenset({"uncond"})
    higher_is_more_memorized = True

    def __init__(self, steps: int | tuple[int, int] = 1):
        start, stop = steps if isinstance(steps, (list, tuple)) and len(steps) == 2 else (0, steps)
        window = (STEP.judge("the first step of the window", start), STEPS.judge("steps", stop))
        if not window[0] < window[1]:
            raise UsageError(
                f"magnitude: steps={steps!r} is an empty window; use 1 for the first step, or (start, stop)."
            )
        self.window = window
        self.space: str | None = None
        self._seen: list[Tensor] = []

    @property
    def steps_needed(self) -> int:
        """How many steps of a trajectory must be run."""
        return self.window[1]

    def update(self, step: Step) -> None:
        """Take one step. Steps must come in order from index 0."""
        if step.uncond is None:
            raise CannotAudit(
                "magnitude compares the prediction with and without the prompt, and this run makes no prediction without: "
                "set guidance above 1, and use a model that takes text."
            )
        if step.index != len(self._seen):
            raise UsageError(
                f"magnitude was shown step {step.index} after {len(self._seen)} steps; a detector scores one run, from step 0 on."
            )
        self.space = step.space
        self._seen.append(magnitude(step.cond, step.uncond))

    def per_step(self) -> Float[Tensor, "batch step"]:
        """The magnitude at every step seen so far."""
        if not self._seen:
            raise UsageError(
                "magnitude has seen no step: the pipeline ran outside `with watch(pipe)`, or denoise was not iterated."
            )
        return torch.stack(self._seen, dim=1)

    def compute(self) -> PerSample:
        """Mean over the window; the steps of the window that were run."""
        inside = self.per_step()[:, slice(*self.window)]
        if inside.shape[1] == 0:
            raise UsageError(f"magnitude: window {self.window} starts after the {len(self._seen)} steps that were run.")
        return inside.mean(dim=1)
