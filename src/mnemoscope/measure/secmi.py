"""SecMI's t-error, a membership score: Duan et al., ICML 2023, *Are Diffusion Models Vulnerable to Membership Inference Attacks?*

DDIM without noise moves a picture along the model's own path, x_t' = α_t' x̂₀(x_t, t) + σ_t' ε̂(x_t, t). Take the picture to time t so, in
strides of k; then one stride further, and back. What does not return to where it was is the error of one step,

    ℓ_t = ‖ψ(φ(x̃_t, t), t + k) − x̃_t‖² / D,    φ: one stride towards noise, ψ: one back,

and it is smaller where the model was trained. The clean picture is shown as the state of time 0, as the authors do. Of
their two scores this is the statistic; the other trains a classifier on known members.

Mean squared error per element; **low speaks for membership**. Membership is not memorization: a model may betray that it has
seen a picture which it could never draw. The reverse is seen where one stored picture is all there is: *every* picture comes
back exactly, seen or not, because the error measures how the path bends, not what lies at its end.

Costs t/k + 2 F, no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ..bounds import TIMES, within
from ..errors import UsageError
from ..models.base import Condition, Target
from ..models.noising import levels, split
from ..types import Latents, PerSample
from .base import STEPS, opened, time_at

__all__ = ["SecMI", "moved", "t_error"]


def moved(target: Target, x: Latents, t: Tensor, to: Tensor, cond: Condition | None) -> Latents:
    """One deterministic DDIM step from time ``t`` to time ``to``, in either direction; for a rectified flow, Euler's."""
    x0, eps = split(target, x, t.expand(len(x)), cond)
    alpha, sigma = levels(target, to, x)
    return alpha * x0 + sigma * eps


def t_error(target: Target, x0: Latents, times: Tensor, cond: Condition | None) -> PerSample:
    """ℓ_t of each x₀: ``times`` lead, least noise first, over t, the last but one, to t + k, the last."""
    with torch.no_grad():
        x = x0
        for now, later in pairwise(times[:-1]):
            x = moved(target, x, now, later, cond)
        t, beyond = times[-2], times[-1]
        back = moved(target, moved(target, x, t, beyond, cond), beyond, t, cond)
    return (back - x).square().flatten(1).mean(1)


class SecMI:
    """:func:`t_error` as a measure.

    Args:
        time: t, number of the training time, of 1000.
        stride: k; ``time`` is a multiple of it. The defaults are the authors'.
    """

    name = "secmi"
    reads = "squared error of a DDIM step there and back, per element (membership)"
    low_is_stored = True
    needs = frozenset({"times"})
    backwards = 0

    @within(time=TIMES, stride=TIMES)
    def __init__(self, time: int = 100, stride: int = 10):
        if time < stride or time % stride or time + stride >= STEPS:
            raise UsageError(
                f"time={time}, stride={stride}: use a time below {STEPS} that is a multiple of the stride, for instance 100 and 10."
            )
        self.time, self.stride = time, stride

    @property
    def forwards(self) -> int:
        """The way there, and two for the step there and back."""
        return self.time // self.stride + 2

    def __call__(
        self, target: Target, images: Float[Tensor, "batch 3 rows columns"], *, prompts: Sequence[str] | None = None,
        keys: Sequence[int] | None = None,
    ) -> PerSample:  # fmt: skip
        """See :class:`~mnemoscope.measure.base.Measure`."""
        x0, cond = opened(target, images, prompts)
        return t_error(target, x0, time_at(target, range(0, self.time + self.stride + 1, self.stride)), cond)
