"""Guidance that starts late (Jain et al., CVPR 2025, *Classifier-Free Guidance inside the Attraction Basin*): no extra forward.

While a memorized trajectory is inside its basin, the term with the prompt pulls it to the training image; outside, the same guidance
leads to new pictures. Before the transition the scale is ``before``, 0 as a rule: the prediction without the prompt,

    ε̂ = ε_∅ + g_t·(ε_c − ε_∅),    g_t = before until the transition, then g.

    static     the transition is a time of the schedule
    dynamic    it is the first local minimum of ‖ε_c − ε_∅‖₂ over the steps, each sample's own
    opposite   before < 0: away from the prompt, until a static or a dynamic transition

Both predictions are made anyway, so that a sample costs the same 2F a step; only their mixture changes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..bounds import FINITE, SHARE, within
from ..models.base import Target
from ..types import PerSample
from .base import Generation

COSTS = "nothing"


def first_rise(sizes: Float[Tensor, "batch step"]) -> Bool[Tensor, " batch"]:
    """Whether a sample's magnitude has passed its first local minimum: it was larger at some step than at the one before."""
    return (sizes[:, 1:] > sizes[:, :-1]).any(1)


@dataclass(frozen=True)
class Static:
    """``before`` for the first ``start`` of the schedule (0 to 1, by the model's time), then g."""

    start: float
    full: float
    """The time at which sampling starts."""
    before: float = 0.0
    scale: float | None = None

    def __call__(self, t: float, sizes: Float[Tensor, "batch step"], scale: float) -> PerSample:
        """See :class:`~mnemoscope.models.sampling.GuidanceRule`."""
        g = scale if self.scale is None else self.scale
        return torch.full_like(sizes[:, -1], self.before if t > (1 - self.start) * self.full else g)


@dataclass(frozen=True)
class Dynamic:
    """``before`` until the first local minimum of a sample's magnitude, at the latest until ``latest`` of the schedule."""

    latest: float
    full: float
    before: float = 0.0
    scale: float | None = None

    def __call__(self, t: float, sizes: Float[Tensor, "batch step"], scale: float) -> PerSample:
        """See :class:`~mnemoscope.models.sampling.GuidanceRule`."""
        g = scale if self.scale is None else self.scale
        if t <= (1 - self.latest) * self.full:
            return torch.full_like(sizes[:, -1], g)
        return torch.where(first_rise(sizes), g, self.before).to(sizes.dtype)


class _Delayed:
    """What the three have in common: a rule around the generation's own scale."""

    changes = frozenset({"guidance"})
    needs: frozenset[str] = frozenset()
    costs = COSTS

    def rule(self, full: float) -> Static | Dynamic:
        """The rule for a schedule that starts at the model's time ``full``."""
        raise NotImplementedError

    def prepare(self, target: Target, generation: Generation) -> Generation:
        """The same start, with a rule for the guidance scale."""
        rule = self.rule(float(target.schedule(generation.steps).timesteps[0]))
        if isinstance(generation.guidance, int | float):
            rule = replace(rule, scale=float(generation.guidance))
        return replace(generation, guidance=rule)


class DelayedGuidance(_Delayed):
    """No guidance for the first ``start`` of the schedule, then as usual.

    Args:
        start: Share of the schedule before the transition, by the model's time. The paper's transitions at t = 650 and t = 500
            of 1000 are 0.35 and 0.5.
        before: The scale until then; 0 is the prediction without the prompt, 1 the one with it.
    """

    name = "delayed-guidance"
    strength, strengths = "start", (0.05, 0.1, 0.2, 0.35, 0.5)

    @within(start=SHARE, before=FINITE)
    def __init__(self, start: float = 0.35, before: float = 0.0):
        self.start, self.before = float(start), float(before)

    def rule(self, full: float) -> Static:
        """See :class:`Static`."""
        return Static(self.start, full, self.before)


class DynamicGuidance(_Delayed):
    """No guidance until each sample's magnitude has passed its first local minimum, then as usual.

    Args:
        latest: Share of the schedule after which guidance starts in any case.
        before: The scale until then.
    """

    name = "dynamic-guidance"
    strength, strengths = "latest", (0.05, 0.1, 0.2, 0.5, 1.0)

    @within(latest=SHARE, before=FINITE)
    def __init__(self, latest: float = 0.5, before: float = 0.0):
        self.latest, self.before = float(latest), float(before)

    def rule(self, full: float) -> Dynamic:
        """See :class:`Dynamic`."""
        return Dynamic(self.latest, full, self.before)


class OppositeGuidance(_Delayed):
    """Guidance away from the prompt at first, then as usual.

    Args:
        start: Share of the schedule before the transition; None: the dynamic transition.
        before: The scale until then, negative as a rule.
    """

    name = "opposite-guidance"
    strength, strengths = "start", (0.02, 0.05, 0.1, 0.2, 0.35)

    @within(start=SHARE, before=FINITE)
    def __init__(self, start: float | None = 0.1, before: float = -3.0):
        self.start, self.before = None if start is None else float(start), float(before)

    def rule(self, full: float) -> Static | Dynamic:
        """See :class:`Static` and :class:`Dynamic`."""
        return Dynamic(1.0, full, self.before) if self.start is None else Static(self.start, full, self.before)
