"""Other starting noise: Jeon et al., ICML 2025, *Understanding and Mitigating Memorization in Generative Models via Sharpness of
Probability Landscapes* (SAIL); Han et al., NeurIPS 2025, *Adjusting Initial Noise to Mitigate Memorization in Text-to-Image Diffusion
Models*.

Where a prompt is memorized, log p(x_T | c) is sharp long before the picture shows. Both papers look at the score difference

    s^Δ(x) = ∇ log p(x | c) - ∇ log p(x) = -(ε_c(x) - ε_∅(x))/σ_T = -Δ(x)/σ_T

at the first step, and move x_T to where it changes less along itself. Here all is written with Δ, in the target's space, and x is the
unit-variance noise; Δ̂ = Δ/‖Δ‖. A step along Δ̂ is one against s^Δ: away from the prompt.

**SAIL** descends, by Adam,

    J(x) = ‖Δ(x + δΔ̂) - Δ(x)‖ + α‖x‖    (as published, with squares)     or     ‖Δ(x + δΔ̂)‖ + α‖x‖    (as in the official code)

until J ≤ threshold. The code's J, default here, is what its settings belong to (α = 0.05, threshold 8.2 at δ = 1 for 4×64×64 latents,
where ‖x‖ ≈ 128): along Δ̂ a sharp difference grows, so that it holds sharpness and magnitude both. With the published squares α‖x‖²
is some 800 there against about 1, and the noise would only shrink; ``form="difference"`` therefore takes norms. The official code
draws eight noises and uses those that get below the threshold; here each sample keeps its own noise, however far it came.

**Adjusted noise** makes M steps without a gradient, and does without guidance at first:

    x ← x - γ(Δ(x + ρΔ̂) - Δ(x))

Norms of Δ and x grow with the square root of the number D of latent elements. Threshold, δ and ρ are given per image at the scale of
4×64×64 and multiplied by √(D/16384).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..bounds import COUNT, POSITIVE, SHARE, SIZE, within
from ..detect.magnitude import per_dimension
from ..errors import UnknownName
from ..models.base import Condition, Target
from ..models.sampling import same_where
from ..types import Latents, PerSample, precise
from .base import Generation
from .guidance import DelayedGuidance

FORMS = ("moved", "difference")
TINY = 1e-12


def norm(x: Latents) -> PerSample:
    """‖x‖₂ of each sample."""
    return x.flatten(1).norm(dim=1)


def unit(delta: Latents) -> Latents:
    """Δ̂ = Δ/‖Δ‖ of each sample; 0 where Δ is, as for an empty prompt."""
    return delta / norm(delta).clamp(min=TINY)[:, None, None, None]


def objective(delta: Latents, moved: Latents, x: Latents, alpha: float, form: str = "moved") -> PerSample:
    """J of each sample.

    Args:
        delta: Δ(x).
        moved: Δ(x + δΔ̂).
        x: The noise.
        alpha: α.
        form: ``"moved"`` or ``"difference"``.
    """
    return norm(moved if form == "moved" else moved - delta) + alpha * norm(x)


def adjust(x: Latents, delta: Latents, moved: Latents, gamma: float) -> Latents:
    """x - γ(Δ(x + ρΔ̂) - Δ(x))."""
    return x - gamma * (moved - delta)


class Pair(NamedTuple):
    """Both predictions at a noise."""

    null: Latents
    cond: Latents
    """Raw."""
    delta: Latents
    """Δ, in the target's space, float32 or better."""


def differences(target: Target, g: Generation) -> Callable[[Latents, Tensor], Pair]:
    """The pair of predictions at noises for rows ``index`` of a generation, at its first step; differentiable in the noise."""
    plan = target.schedule(g.steps)
    t = plan.timesteps[0]
    empty = g.cond.same_as(g.null)

    def at(noise: Latents, index: Tensor) -> Pair:
        x = plan.scale(plan.start(noise), t)
        pair = Condition.cat([g.null.expand(len(x)), g.cond.select(index)])
        null, cond = target.output(torch.cat([x, x]), t, pair).chunk(2)
        cond = same_where(
            empty[index.to(empty.device)], null, cond
        )  # else Δ̂ of an empty prompt would be that of rounding
        return Pair(null, cond, target.to_space(cond, x, t) - target.to_space(null, x, t))

    return at


def _scale(target: Target) -> float:
    """√(D/16384)."""
    return 1 / float(per_dimension(torch.ones((), dtype=torch.float64), target.latent_shape))


class SAIL:
    """Walk down sharpness on the starting noise.

    Args:
        threshold: Where to stop, per image at the scale of 4×64×64: α‖x‖ is 6.4 there, and the rest is left for the model. None: all
            updates.
        updates: At most that many.
        lr: Adam's learning rate.
        alpha: α, how much the noise's own norm counts.
        delta: δ, at the scale of 4×64×64.
        form: ``"moved"`` as in the official code, or ``"difference"``.

    k updates of n samples cost 4·(k + 1)·n F and 4·k·n B, and spare the 2·n F of the first step, whose predictions are known.
    """

    name = "sail"
    changes = frozenset({"noise"})
    needs = frozenset({"grad"})
    costs = "up to 40 F + 40 B per sample"
    strength, strengths = "threshold", (16.0, 13.0, 10.0, 8.2, 7.4)

    @within(threshold=POSITIVE, updates=COUNT, lr=POSITIVE, alpha=SIZE, delta=POSITIVE)
    def __init__(
        self,
        threshold: float | None = 8.2,
        *,
        updates: int = 10,
        lr: float = 0.05,
        alpha: float = 0.05,
        delta: float = 1.0,
        form: str = "moved",
    ):
        if form not in FORMS:
            raise UnknownName("form of SAIL's objective", form, FORMS)
        self.threshold, self.updates, self.lr = threshold, updates, lr
        self.alpha, self.delta, self.form = alpha, delta, form

    def prepare(self, target: Target, generation: Generation) -> Generation:
        """The same generation with other noise, and both predictions of its first step."""
        g = generation
        before = target.forwards
        at = differences(target, g)
        scale = _scale(target)
        # One leaf for each sample: those that are done leave the batch, and Adam forgets them.
        leaves = [row.clone().requires_grad_() for row in precise(g.noise).to(target.device)]
        optimizer = torch.optim.Adam(leaves, lr=self.lr)
        nulls, conds = [], []
        order: list[int] = []
        backwards, active = 0, list(range(len(g)))

        for update in range(self.updates + 1):
            index = torch.tensor(active)
            with torch.set_grad_enabled(update < self.updates):
                x = torch.stack([leaves[i] for i in active])
                here = at(x, index)
                if update == self.updates:
                    done = [True] * len(active)
                else:
                    moved = at(x + self.delta * scale * unit(here.delta), index)
                    loss = objective(here.delta, moved.delta, x, self.alpha, self.form)
                    done = self._reached(loss, scale)
            leaving = torch.tensor(done)
            order += index[leaving].tolist()
            nulls.append(here.null.detach()[leaving])
            conds.append(here.cond.detach()[leaving])
            active = [i for i, stop in zip(active, done, strict=True) if not stop]
            if not active:
                break
            # A sample's objective depends on its own noise alone, so that those that are done only have to be left out.
            going = [leaves[i] for i in active]
            with torch.enable_grad():
                slopes = torch.autograd.grad(loss[~leaving.to(loss.device)].sum(), going)
            for leaf, slope in zip(going, slopes, strict=True):
                leaf.grad = slope
            backwards += 4 * len(index)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        noise = torch.stack([leaf.detach() for leaf in leaves]).to(g.noise.device)
        back = torch.tensor(order).argsort()
        out = g.with_noise(noise, forwards=target.forwards - before, backwards=backwards)
        return replace(out, first_null=torch.cat(nulls)[back], first_cond=torch.cat(conds)[back])

    def _reached(self, loss: PerSample, scale: float) -> list[bool]:
        if self.threshold is None:
            return [False] * len(loss)
        bar: list[bool] = (loss.detach() <= self.threshold * scale).tolist()
        return bar


class AdjustedNoise:
    """Step away from where the difference is sharp, without a gradient; then let guidance wait.

    Args:
        gamma: γ, how far.
        rho: ρ, where the difference is probed, at the scale of 4×64×64.
        iterations: M.
        wait: Share of the schedule without guidance, as in :class:`~mnemoscope.mitigate.guidance.DelayedGuidance`. The official code
            starts at the sixth of 50 steps. 0, or a generation that has a rule of its own: as it is.

    Of its options ``wait`` is the one whose strength is swept: how long guidance waits acts on any model, and γ only where the noise
    decides what comes.

    Costs 2·M pairs, 4·M F per sample; the first pair is spared where both predictions of the first step are known.
    """

    name = "adjusted-noise"
    changes = frozenset({"noise", "guidance"})
    needs: frozenset[str] = frozenset()
    costs = "8 F per sample"
    strength, strengths = "wait", (0.05, 0.1, 0.2, 0.35, 0.5)

    @within(gamma=SIZE, rho=POSITIVE, iterations=COUNT, wait=SHARE)
    def __init__(self, gamma: float = 0.7, *, rho: float = 50.0, iterations: int = 2, wait: float = 0.1):
        self.gamma, self.rho, self.iterations = gamma, rho, iterations
        self.delayed, self.wait = DelayedGuidance(wait), float(wait)

    def prepare(self, target: Target, generation: Generation) -> Generation:
        """The same generation with other noise, and a guidance scale that is 0 at first."""
        g = generation
        before = target.forwards
        at = differences(target, g)
        everyone = torch.arange(len(g))
        x = precise(g.noise).to(target.device)
        with torch.no_grad():
            for i in range(self.iterations):
                delta = self._known(target, g) if i == 0 else None
                delta = at(x, everyone).delta if delta is None else delta
                moved = at(x + self.rho * _scale(target) * unit(delta), everyone).delta
                x = adjust(x, delta, moved, self.gamma)
        out = g.with_noise(x.to(g.noise.device), forwards=target.forwards - before)
        if not self.wait or not (g.guidance is None or isinstance(g.guidance, int | float)):
            return out
        return self.delayed.prepare(target, out)

    @staticmethod
    def _known(target: Target, g: Generation) -> Latents | None:
        """Δ on the generation's own noise, where both predictions have been made."""
        if g.first_null is None or g.first_cond is None:
            return None
        plan = target.schedule(g.steps)
        t = plan.timesteps[0]
        x = plan.scale(plan.start(g.noise), t)
        return target.to_space(g.first_cond, x, t) - target.to_space(g.first_null, x, t)
