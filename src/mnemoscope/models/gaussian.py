"""One Gaussian for each prompt, x₀ ~ N(μ, diag s²): a model whose every answer fits in a line.

α, σ are the levels of the noising x_t = α x₀ + σ ε; squares, products and quotients are element by element.

    marginal                x_t ~ N(αμ, v)           v = α² s² + σ²
    posterior mean          x̂₀ = μ + α s² (x − αμ) / v
    posterior variance      C  = s² σ² / v
    noise                   ε  = σ (x − αμ) / v
    how x̂₀ moves with θ     ∂x̂₀/∂μ = σ² / v          ∂x̂₀/∂s = 2 α s σ² (x − αμ) / v²
    probability-flow ODE    z = (x − αμ) / √v stays as it is from pure noise to clean data
    one sampler step        x' = α' x̂₀ + σ' ε = [(α'α s² + σ'σ) x + (α'σ − σ'α) σ μ] / v

A prompt is memorized where s = 0: then x̂₀ = μ at every time, whatever the noise. A spread that is 0 in some elements only
is a template: these elements come out alike every time, and the intrinsic dimension is the number of the others.

All of it is exact, and so is the whole sampler: its steps are affine in x, guided or not, and so generations of a prompt
are Gaussian too (:meth:`Gaussian.sampler_map`), with a known probability of coming out close to a given picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import hardshrink

from ..errors import UsageError
from ..types import Latents, PerSample
from .base import Condition
from .closed_form import ClosedForm, Options, Theta, Value, pictures_of, probability_inside


class Gaussian(ClosedForm):
    """Each prompt is N(μ, diag s²); memorized where s = 0. θ = (μ, s).

    Args:
        prompts: ``{prompt: (μ, s)}``, numbers or tensors that broadcast to the latent shape; None draws an ordinary
            one by hash.
        null: (μ, s) of the empty prompt. Default (0, √(scatter² + spread²)): what ordinary prompts amount to, all
            together.
        spread: s of ordinary prompts.
        scatter: Standard deviation of their means.
        **options: See :class:`~mnemoscope.models.closed_form.Options`.

    >>> from mnemoscope import Gaussian, denoise
    >>> target = Gaussian.world(["a cat"], memorized=["the mona lisa"])
    >>> cond, null = target.encode(["the mona lisa"]), target.encode([""])
    >>> step = next(denoise(target, target.noise([0]), cond, null))
    """

    kind = "gaussian"

    def __init__(
        self,
        prompts: Mapping[str, tuple[Value, Value] | None] | None = None,
        null: tuple[Value, Value] | None = None,
        *,
        spread: float = 0.5,
        scatter: float = 0.2,
        **options: Any,
    ):
        super().__init__(Options(**options))
        self.ordinary_spread, self.ordinary_scatter = spread, scatter
        self._learn((0.0, math.hypot(spread, scatter)) if null is None else null, prompts)

    @classmethod
    def world(
        cls,
        prompts: Sequence[str] = (),
        memorized: Sequence[str] | Mapping[str, Tensor] = (),
        *,
        spread: float = 0.5,
        scatter: float = 0.2,
        **options: Any,
    ) -> Gaussian:
        """Ordinary prompts, and memorized ones, whose spread is 0.

        Args:
            prompts: Ordinary prompts; others are as welcome, unless the world is strict.
            memorized: Prompts, or prompts with their pictures (x₀ in [-1, 1]; blocks of color by hash when not given).
            spread: s of ordinary prompts.
            scatter: Standard deviation of their means.
            **options: See :class:`~mnemoscope.models.closed_form.Options`.
        """
        known: dict[str, tuple[Value, Value] | None] = dict.fromkeys(prompts)
        known |= {p: (x0, 0.0) for p, x0 in pictures_of(memorized, Options(**options)).items()}
        return cls(known, spread=spread, scatter=scatter, **options)

    @classmethod
    def tiny(cls, **options: Any) -> Gaussian:
        """A small world for tests: two ordinary prompts and a memorized one."""
        return cls.world(["a cat", "two dogs on a beach"], ["the mona lisa"], **options)

    def mean(self, cond: Condition | None) -> Latents:
        """μ of each prompt; a memorized prompt's picture."""
        return self._moments(self._theta(cond))[0].unflatten(1, self.latent_shape)

    def std(self, cond: Condition | None) -> Latents:
        """s of each prompt."""
        return self._moments(self._theta(cond))[1].abs().unflatten(1, self.latent_shape)

    def draw(self, cond: Condition | None, generator: torch.Generator) -> Latents:
        """One exact sample of x₀ for each prompt (one sample without text)."""
        mean, std = self.mean(cond), self.std(cond)
        z = torch.randn(mean.shape, generator=generator, dtype=self._exact).to(self.device)
        return (mean + std * z).to(self.dtype)

    def ode_map(self, x: Latents, t: Tensor, cond: Condition | None, to: Tensor | None = None) -> Latents:
        """Where the exact probability-flow ODE takes ``x`` from time ``t`` to time ``to`` (None: to clean data).

        z = (x − αμ)/√v never changes on the way, so x' = α'μ + √v' z. DDIM and Euler converge to it.
        """
        flat, alpha, sigma, theta = self._open(x, t, cond)
        mean, std = self._moments(theta)
        z = (flat - alpha * mean) / torch.hypot(alpha * std, sigma)
        if to is None:
            return (mean + std.abs() * z).view(x.shape)
        alpha_to, sigma_to = self._levels(to)
        return (alpha_to * mean + torch.hypot(alpha_to * std, sigma_to) * z).view(x.shape)

    def sampler_map(
        self, cond: Condition | None, null: Condition | None = None, *, steps: int = 50, guidance: float | None = None
    ) -> tuple[Latents, Latents]:
        """(gain, offset): the finite sampler's final state is gain · starting noise + offset, element by element.

        x̂₀ and ε are affine in x, guided or not, so every step is, and so is the whole run: generations of a prompt
        are exactly N(offset, gain²). One row for each prompt; ``null`` has one row.
        """
        g = self.guidance if guidance is None else guidance
        branches = [(1.0, cond)] if null is None else [(g, cond), (1 - g, null)]
        weight = torch.tensor([w for w, _ in branches], dtype=self._exact, device=self.device).view(-1, 1, 1)
        mean, std = self._moments(torch.stack(torch.broadcast_tensors(*(self._theta(c) for _, c in branches))))
        gain, offset = torch.ones_like(mean[0]), torch.zeros_like(mean[0])
        for t, later in pairwise(self.schedule(steps).knots):
            (alpha, sigma), (alpha_to, sigma_to) = self._levels(t), self._levels(later)
            share = weight / ((alpha * std) ** 2 + sigma**2)
            slope = (share * (alpha_to * alpha * std**2 + sigma_to * sigma)).sum(0)
            shift = (share * (alpha_to * sigma - sigma_to * alpha) * sigma * mean).sum(0)
            gain, offset = slope * gain, slope * offset + shift
        return gain.unflatten(1, self.latent_shape), offset.unflatten(1, self.latent_shape)

    def replication_probability(
        self,
        cond: Condition | None,
        image: Float[Tensor, "channel height width"],
        *,
        radius: float = 0.1,
        null: Condition | None = None,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> PerSample:
        """P(a generation lies within ``radius`` of ``image``); exact, float64, one for each prompt.

        Without ``steps`` for exact sampling from N(μ, s²), with them for the finite sampler of :meth:`sampler_map`
        (and with ``null`` under guidance). ``radius`` is a root mean square per element; the squared distance is
        non-central χ² where all positive spreads are equal.

        Raises:
            UsageError: Positive spreads differ, so there is no closed form; use :meth:`estimate_replication`.
        """
        if steps is None:
            if null is not None:
                raise UsageError("guidance has no exact distribution of its own: give steps=… with null=….")
            std, mean = self.std(cond), self.mean(cond)
        else:
            std, mean = self.sampler_map(cond, null, steps=steps, guidance=guidance)
        return probability_inside((mean - image.to(mean)).flatten(1), std.flatten(1).abs(), radius)

    def _describe(self) -> dict[str, Any]:
        return super()._describe() | {"spread": self.ordinary_spread, "scatter": self.ordinary_scatter}

    # Parameters.

    def _pack(self, given: tuple[Value, Value]) -> Tensor:
        mean, std = given
        return torch.cat([self._tensor(mean, self.latent_shape), self._spread(std, self.latent_shape)])

    def _ordinary(self, prompt: str) -> Tensor:
        z = torch.randn(self.latent_shape, generator=self.options.generator("mean", prompt), dtype=torch.float64)
        return self._pack((self.ordinary_scatter * z, self.ordinary_spread))

    def _moments(self, theta: Float[Tensor, "*rows dim"]) -> tuple[Tensor, Tensor]:
        """μ and s. What rounding left of a spread is 0; its sign means nothing, as formulas know s² alone."""
        mean, std = theta.chunk(2, dim=-1)
        return mean, hardshrink(std, self._rounding)

    # The formulas, as in the table above.

    def _posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta) -> Tensor:
        mean, std = self._moments(theta)
        return mean + alpha * std**2 * (x - alpha * mean) / ((alpha * std) ** 2 + sigma**2)

    def _posterior_variance(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta) -> Tensor:
        _, std = self._moments(theta)
        return (std * sigma) ** 2 / ((alpha * std) ** 2 + sigma**2)

    def _posterior_covariance(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta, v: Tensor) -> Tensor:
        return self._posterior_variance(x, alpha, sigma, theta) * v

    def _log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta) -> Tensor:
        mean, std = self._moments(theta)
        var = (alpha * std) ** 2 + sigma**2
        return -0.5 * ((x - alpha * mean) ** 2 / var + (2 * math.pi * var).log()).sum(1)

    def _pull_back(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta, v: Tensor) -> Theta:
        mean, std = self._moments(theta)
        var = (alpha * std) ** 2 + sigma**2
        by_mean, by_std = sigma**2 / var, 2 * alpha * std * sigma**2 * (x - alpha * mean) / var**2
        return torch.cat([v * by_mean, v * by_std], dim=1)
