"""A mixture of Gaussians for each prompt: one pool of training pictures for all, and for each prompt its weights.

    x₀ ~ Σⱼ πⱼ N(μⱼ, sⱼ² I)           x_t = α x₀ + σ ε ~ Σⱼ πⱼ N(αμⱼ, vⱼ I)           vⱼ = α² sⱼ² + σ²

Given that x_t came from component j, all is as with one Gaussian, and the components are weighed by Bayes' rule:

    responsibility          rⱼ = πⱼ Nⱼ / Σₖ πₖ Nₖ    Nⱼ = N(x; αμⱼ, vⱼ I)
    mean of x₀ in j         mⱼ = (σ² μⱼ + α sⱼ² x) / vⱼ
    posterior mean          x̂₀ = Σⱼ rⱼ mⱼ
    posterior covariance    C  = Σⱼ rⱼ [(sⱼ² σ² / vⱼ) I + (mⱼ − x̂₀)(mⱼ − x̂₀)ᵀ]
    how x̂₀ moves with π     ∂x̂₀/∂πⱼ = (Nⱼ / Σₖ πₖ Nₖ) (mⱼ − x̂₀)

θ = π: a prompt whose words of share w are zeroed has exactly the distribution (1 − w)·p(x₀ | prompt) + w·p(x₀ | empty
prompt).

With all spreads 0 this is the exact memorizer: the minimizer of the training loss on a finite set, which draws picture j
with probability πⱼ. Predictions, scores, Hessians and the probability of drawing a picture are exact. What guidance, or a
sampler with finite steps, makes of them has no closed form: :meth:`Mixture.estimate_replication` counts it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UsageError
from ..types import Latents, PerSample
from .base import Condition
from .closed_form import ClosedForm, Options, Theta, Value, pictures_of, probability_inside

Weights: TypeAlias = Sequence[int | float] | Tensor
"""One number for each component of a mixture."""


class Mixture(ClosedForm):
    """Each prompt is Σⱼ πⱼ N(μⱼ, sⱼ² I), a weighing of one pool of components. θ = π.

    Args:
        points: μ, ``[component, channel, height, width]``; they give the latent shape.
        spread: s, one number or one for each component.
        prompts: ``{prompt: weights}``, one weight ≥ 0 for each component (copies, say); None draws ordinary ones by
            hash.
        null: Weights of the empty prompt; default: all alike.
        **options: See :class:`~mnemoscope.models.closed_form.Options`.

    Ordinary prompts that are drawn by hash have weights ∝ null weight × Exp(1).
    """

    kind = "mixture"

    def __init__(
        self,
        points: Float[Tensor, "component channel height width"],
        spread: Value = 0.0,
        prompts: Mapping[str, Weights | None] | None = None,
        null: Weights | None = None,
        **options: Any,
    ):
        channel, height, width = points.shape[1:]
        super().__init__(Options(**{**options, "latent_shape": (channel, height, width)}))
        if not len(points):
            raise UsageError("a mixture needs at least one component; points is empty.")
        self.points = points.to(self.device, self._exact)
        self.spread = self._spread(spread, (len(points),))
        self._mu = self.points.flatten(1)
        # Distances are taken from the middle of the pool: ‖x − αμ‖² expanded around a far origin would lose digits.
        self._middle = self._mu.mean(0)
        self._learn([1.0] * len(points) if null is None else null, prompts)

    @classmethod
    def world(
        cls,
        prompts: Sequence[str] = (),
        memorized: Sequence[str] | Mapping[str, Tensor] = (),
        *,
        components: int = 8,
        spread: float = 0.4,
        scatter: float = 0.1,
        rare: float = 0.0,
        **options: Any,
    ) -> Mixture:
        """Ordinary prompts mix ``components`` common Gaussians; a memorized prompt is one picture with spread 0.

        Args:
            prompts: Ordinary prompts.
            memorized: Prompts, or prompts with their pictures (x₀ in [-1, 1]; blocks of color by hash when not given).
            components: Number of common components, their means drawn from N(0, scatter²) by hash.
            spread: s of common components.
            scatter: Standard deviation of their means.
            rare: Total weight of all memorized pictures in the null distribution. In real models copies are rare but
                present; where they are not rare, the null prediction knows them too and the magnitude vanishes late
                in the trajectory.
            **options: See :class:`~mnemoscope.models.closed_form.Options`.
        """
        common = Options(**options)
        pictures = pictures_of(memorized, common)
        shape, generator = (components, *common.latent_shape), common.generator("components")
        means = scatter * torch.randn(shape, generator=generator, dtype=torch.float64)
        kept = len(pictures)
        known: dict[str, Weights | None] = dict.fromkeys(prompts)
        known |= dict(zip(pictures, torch.eye(kept, kept + components), strict=True))
        return cls(
            torch.cat([*(picture[None].double() for picture in pictures.values()), means]),
            [0.0] * kept + [spread] * components,
            known,
            [rare / max(kept, 1)] * kept + [(1 - rare) / components] * components,
            **options,
        )

    @classmethod
    def memorizer(cls, points: int | Tensor, copies: int | Sequence[int] = 1, **options: Any) -> Mixture:
        """The exact memorizer of a finite training set, without text unless asked for.

        Args:
            points: Training pictures x₀, ``[component, channel, height, width]``, or how many to draw uniformly from
                [-1, 1].
            copies: How often each was in the set; one number m is for the first, the others once: π₀ = m / (K − 1 + m).
            **options: See :class:`~mnemoscope.models.closed_form.Options`.
        """
        common = Options(**options)
        if isinstance(points, int):
            shape, generator = (points, *common.latent_shape), common.generator("points")
            points = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
        weights = [copies, *[1] * (len(points) - 1)] if isinstance(copies, int) else copies
        return cls(points, 0.0, null=weights, **{"has_text": False, **options})

    @classmethod
    def tiny(cls, **options: Any) -> Mixture:
        """A small world for tests: two ordinary prompts and a memorized one."""
        return cls.world(["a cat", "two dogs on a beach"], ["the mona lisa"], components=4, scatter=0.05, **options)

    def weights(self, cond: Condition | None) -> Float[Tensor, "batch component"]:
        """πⱼ of each prompt."""
        return self._prior(self._theta(cond))

    def responsibilities(self, x: Latents, t: Tensor, cond: Condition | None) -> Float[Tensor, "batch component"]:
        """rⱼ = P(component j | x_t = x)."""
        return self._responsible(*self._open(x, t, cond))[0]

    def draw(self, cond: Condition | None, generator: torch.Generator) -> Latents:
        """One exact sample of x₀ for each prompt (one sample without text)."""
        pick = torch.multinomial(self.weights(cond).detach().cpu(), 1, generator=generator)[:, 0].to(self.device)
        z = torch.randn((len(pick), *self.latent_shape), generator=generator, dtype=self._exact).to(self.device)
        return (self.points[pick] + self.spread[pick].view(-1, 1, 1, 1) * z).to(self.dtype)

    def replication_probability(
        self, cond: Condition | None, image: Float[Tensor, "channel height width"], *, radius: float = 0.1
    ) -> PerSample:
        """P(x₀ lies within ``radius`` of ``image``) = Σⱼ πⱼ Pⱼ; float64, one for each prompt.

        ``radius`` is a root mean square per element. Exact for exact sampling from the prompt's distribution: for a
        memorizer the natural weight m / (K − 1 + m). The unguided ODE run from N(0, I) comes arbitrarily close with
        finer steps where α_T = 0. Under guidance, or for a coarse sampler, there is no closed form: see
        :meth:`estimate_replication`.
        """
        away = (self.points - image.to(self.points)).flatten(1)
        inside = probability_inside(away, self.spread[:, None].expand_as(away), radius)
        return self.weights(cond).detach().double().cpu() @ inside

    def _describe(self) -> dict[str, Any]:
        return super()._describe() | {"components": len(self.points)}

    def _parameters(self) -> list[tuple[str, Tensor]]:
        return [("points", self.points), ("spread", self.spread), *super()._parameters()]

    # Parameters.

    def _pack(self, given: Weights) -> Tensor:
        full = self._tensor(given, (len(self.points),))
        if bool((full < 0).any()) or not bool(full.sum() > 0):
            raise UsageError("mixture weights must be 0 or more, and not all 0.")
        return full / full.sum()

    def _ordinary(self, prompt: str) -> Tensor:
        generator = self.options.generator("weights", prompt)
        uniform = torch.rand(len(self.points), generator=generator, dtype=torch.float64)
        return self._pack(self._null.double().cpu() * -torch.log1p(-uniform))

    def _prior(self, theta: Theta) -> Tensor:
        """π ∝ max(θ, 0). What rounding left of a weight is 0: close to its μ, even a weight of 1e-15 would win."""
        tiny = theta.abs() < self._rounding
        weights = torch.where(tiny, theta - theta.detach(), theta).clamp(min=0)  # an excluded one can be learned back
        return weights / weights.sum(1, keepdim=True)

    # The formulas, as in the table above.

    def _likelihood(self, x: Tensor, alpha: Tensor, sigma: Tensor, prior: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nⱼ / exp(top), ``[batch, component]``, then top ``[batch, 1]`` and v."""
        var = (alpha * self.spread) ** 2 + sigma**2
        # Relative to N(x; α·middle, least v): the large terms that all components share would drown what tells them apart.
        least = var.amin(1, keepdim=True)
        y, nu = x - alpha * self._middle, self._mu - self._middle
        length = (y * y).sum(1, keepdim=True)
        cross = alpha**2 * (nu * nu).sum(1) - 2 * alpha * self._product(y, nu)
        exponent = -0.5 * (length * (1 / var - 1 / least) + cross / var + self._size * (var / least).log())
        top = (exponent + prior.log()).detach().amax(1, keepdim=True)
        # Only a component of weight 0 can rise far above the top; the ceiling keeps 0 · ∞ out of values and gradients.
        ceiling = 0.4 * math.log(torch.finfo(self._exact).max)
        relative = (exponent - top).clamp(max=ceiling).exp()
        return relative, top - 0.5 * (length / least + self._size * (2 * math.pi * least).log()), var

    def _responsible(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta) -> tuple[Tensor, Tensor, Tensor]:
        """r, and the two factors of mⱼ = Aⱼ μⱼ + Bⱼ x: A = σ²/v, B = α s²/v."""
        prior = self._prior(theta)
        likelihood, _, var = self._likelihood(x, alpha, sigma, prior)
        joint = prior * likelihood
        return joint / joint.sum(1, keepdim=True), sigma**2 / var, alpha * self.spread**2 / var

    def _mix(self, x: Tensor, by_mu: Tensor, by_x: Tensor) -> Tensor:
        """Σⱼ (aⱼ μⱼ + bⱼ x)."""
        return self._product(by_mu, self._mu.T) + by_x.sum(1, keepdim=True) * x

    def _along(self, x: Tensor, v: Tensor, r: Tensor, by_mu: Tensor, by_x: Tensor) -> Tensor:
        """(mⱼ − x̂₀)·v for each component."""
        means = by_mu * self._product(v, self._mu) + by_x * (x * v).sum(1, keepdim=True)
        return means - (r * means).sum(1, keepdim=True)

    def _posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta) -> Tensor:
        r, by_mu, by_x = self._responsible(x, alpha, sigma, theta)
        return self._mix(x, r * by_mu, r * by_x)

    def _posterior_covariance(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta, v: Tensor) -> Tensor:
        r, by_mu, by_x = self._responsible(x, alpha, sigma, theta)
        pull = r * self._along(x, v, r, by_mu, by_x)  # sums to 0, so that Σⱼ pullⱼ (mⱼ − x̂₀) = Σⱼ pullⱼ mⱼ
        within = (r * self.spread**2 * by_mu).sum(1, keepdim=True) * v
        return within + self._mix(x, pull * by_mu, pull * by_x)

    def _posterior_variance(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta) -> Tensor:
        r, by_mu, by_x = self._responsible(x, alpha, sigma, theta)
        means = by_mu[..., None] * self._mu + by_x[..., None] * x[:, None]
        off = means - (r[..., None] * means).sum(1, keepdim=True)
        return (r[..., None] * off**2).sum(1) + (r * self.spread**2 * by_mu).sum(1, keepdim=True)

    def _log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta) -> Tensor:
        prior = self._prior(theta)
        likelihood, top, _ = self._likelihood(x, alpha, sigma, prior)
        return top[:, 0] + (prior * likelihood).sum(1).log()

    def _pull_back(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta, v: Tensor) -> Theta:
        # As in the table, for π = θ / Σ max(θ, 0); a negative weight counts as 0 and does not move x̂₀.
        prior = self._prior(theta)
        likelihood = self._likelihood(x, alpha, sigma, prior)[0]
        total = theta.clamp(min=0).sum(1, keepdim=True) * (prior * likelihood).sum(1, keepdim=True)
        counts = theta > -self._rounding
        along = self._along(x, v, *self._responsible(x, alpha, sigma, theta))
        return counts * likelihood / total * along

    def _product(self, rows: Tensor, matrix: Tensor) -> Tensor:
        """rows @ matrix.T. With text, each row is summed on its own: BLAS rounds a row by its place in the batch, and the
        empty prompt would score 1e-7 instead of 0."""
        return (rows[:, None] * matrix).sum(-1) if self.has_text else rows @ matrix.T
