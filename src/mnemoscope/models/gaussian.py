"""Closed-form models: worlds in which every answer is known.

Data are Gaussian, or a finite mixture of Gaussians, for each prompt; a memorized prompt is one whose spread is 0. No
network, no weights, yet a whole :class:`~mnemoscope.models.base.Target`, so that every method can be held against a
formula first.

With x_t = α x₀ + σ ε, the posterior mean x̂₀ = E[x₀ | x_t] and the posterior covariance C = Cov[x₀ | x_t], the exact

    noise       ε = (x_t − α x̂₀) / σ                 velocity    u = ε − x̂₀
    score       ∇ log p_t(x_t) = −ε / σ              Hessian     ∇² log p_t(x_t) = (α² C / σ² − I) / σ²

follow for any data (Robbins 1956; Efron 2011, Tweedie's formula), so that a world has to know x̂₀ and C only. ∂ε/∂x =
−σ·Hessian.

**The text.** The parameters θ of a prompt's distribution are a linear read-out of its tokens, θ = θ_∅ + Σᵢ wᵢ eᵢ.
Word i is one token with embedding eᵢ = θ_p − θ_∅ and share wᵢ > 0, Σᵢ wᵢ = 1: what the word adds is known, zeroing
its token takes exactly its share away, and the empty prompt *is* the null distribution. Everything is differentiable
in the tokens. They are as free as the distribution itself: whoever optimizes them without a cost can make any picture
"memorized".

Everything here needs σ(t) > 0, which holds at each step of each sampler.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import hardshrink

from ..errors import CannotAudit, UnknownName, UsageError
from ..types import Latents, PerSample, Space
from .base import Condition, noise_from_seeds
from .sampling import denoise

__all__ = ["ClosedForm", "Gaussian", "Mixture", "Options", "Replications"]

Value: TypeAlias = int | float | Tensor
"""A number, or a tensor that broadcasts to the latent shape."""

Theta: TypeAlias = Float[Tensor, "batch dim"]
"""The parameters of each row's distribution."""

Weights: TypeAlias = Sequence[int | float] | Tensor
"""One number for each component of a mixture."""

BETAS: dict[str, tuple[str, float, float]] = {
    "stable-diffusion": ("scaled_linear", 0.00085, 0.012),
    "latent-diffusion": ("scaled_linear", 0.0015, 0.0195),
    "ddpm": ("linear", 0.0001, 0.02),
}
TRAIN_STEPS = 1000
CLEAN = -1
"""The timestep of clean data in eps-space."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all closed-form worlds have in common; each field is a keyword argument of their constructors.

    Attributes:
        latent_shape: Channel, height, width of x.
        space: ``"eps"``: variance-preserving diffusion (α = √ᾱ_t, DDIM); ``"velocity"``: rectified flow (α = 1 − t, σ
            = t, Euler).
        v_prediction: The raw output is v = α ε − σ x₀ instead of ε. Only in eps-space.
        betas: Noise schedule of eps-space: ``"stable-diffusion"``, ``"latent-diffusion"`` or ``"ddpm"``.
        spacing: DDIM timesteps as diffusers names them: ``"leading"`` with offset 1 (981, 961, …, 1), ``"trailing"``
            (999, 979, …, 19).
        shift: Timestep shift of velocity space, t ← shift·t / (1 + (shift − 1)·t).
        guidance: The scale the world is meant to be used with.
        has_text: Without text there is the null distribution only.
        context: Number of words the encoder can see.
        word_weights: How much a word counts before shares are normalized; other words draw theirs from [½, 3/2] by
            hash.
        strict: Refuse prompts that were not given at construction, instead of drawing an ordinary distribution by hash.
        seed: Seed of whatever is drawn by hash.
        dtype: Of raw outputs and states. Arithmetic is float32 at least, and ``torch.float64`` makes everything
            float64.
        device: Where the parameters live.
    """

    latent_shape: tuple[int, int, int] = (3, 8, 8)
    space: str = "eps"
    v_prediction: bool = False
    betas: str = "stable-diffusion"
    spacing: str = "leading"
    shift: float = 1.0
    guidance: float = 7.5
    has_text: bool = True
    context: int = 24
    word_weights: Mapping[str, float] = field(default_factory=dict)
    strict: bool = False
    seed: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if self.space not in ("eps", "velocity"):
            raise UnknownName("prediction space", self.space, ("eps", "velocity"))
        if self.betas not in BETAS:
            raise UnknownName("noise schedule", self.betas, BETAS)
        if self.spacing not in ("leading", "trailing"):
            raise UnknownName("timestep spacing", self.spacing, ("leading", "trailing"))
        if self.v_prediction and self.space == "velocity":
            raise UsageError("v_prediction belongs to space='eps'; a rectified flow already predicts its velocity.")
        if self.context < 1 or self.shift <= 0:
            raise UsageError(f"context={self.context} and shift={self.shift:g} must be positive.")
        for word, weight in self.word_weights.items():
            if not 0 < weight < math.inf:
                raise UsageError(f"word_weights: {word!r} has weight {weight:g}; a weight is positive and finite.")


class Replications(NamedTuple):
    """How many of ``n`` generations came out as a given picture, and a Clopper–Pearson interval of their probability."""

    found: int
    n: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """The share found."""
        return self.found / self.n


class _Run:
    """One sampler run: DDIM (η = 0) in eps-space, Euler in velocity space."""

    def __init__(self, world: ClosedForm, knots: Tensor):
        self.world, self.knots, self.timesteps = world, knots, knots[:-1]

    def start(self, noise: Latents) -> Latents:
        return noise

    def scale(self, x: Latents, t: Tensor) -> Latents:
        return x

    def step(self, output: Latents, t: Tensor, x: Latents) -> Latents:
        """x' = α' x̂₀ + σ' ε̂: the DDIM step, and with α + σ = 1 Euler's step x + (t' − t) u of a rectified flow."""
        alpha, sigma = self.world.alpha_sigma(self.knots[(self.timesteps > t).sum() + 1])
        x0, eps = self.world._split(output, x, t)
        return (alpha * x0 + sigma * eps).to(x.dtype)


class ClosedForm(ABC):
    """A :class:`~mnemoscope.models.base.Target` whose predictions are formulas.

    A world defines the parameters θ of each prompt and, for data distributed by θ, the abstract methods below, on
    flattened samples ``[batch, size]`` with α and σ as ``[batch or 1, 1]``. ``forwards`` counts ``output`` and
    ``predict`` alone: the exact quantities (``score``, ``log_density``, …) are answers to check against, not work a
    method would do.
    """

    name: str = "closed-form"

    def __init__(self, options: Options):
        self.options = options
        self.space: Space = "velocity" if options.space == "velocity" else "eps"
        self.has_text = options.has_text
        self.guidance = options.guidance
        self.latent_shape = options.latent_shape
        self.dtype = options.dtype
        self.device = torch.device(options.device)
        self.forwards = 0
        self._exact = torch.float64 if options.dtype == torch.float64 else torch.float32
        self._size = math.prod(options.latent_shape)
        self._abar = _alphas_cumprod(options.betas).to(self.device)

    def _learn(self, null: Tensor, prompts: Mapping[str, Tensor]) -> None:
        """Take the parameters of the empty prompt and of the known ones."""
        self._null = null
        self._known: dict[str, Tensor] = {}
        for prompt, theta in prompts.items():
            words = prompt.split()
            if not words:
                raise UsageError("The empty prompt is the null distribution: give it as null=….")
            if len(words) > self.options.context:
                raise UsageError(
                    f"{prompt!r} has {len(words)} words, the encoder sees {self.options.context}: raise context=…."
                )
            if " ".join(words) in self._known:
                raise UsageError(f"{prompt!r} was given twice; prompts that differ in white space alone are the same.")
            self._known[" ".join(words)] = theta

    # What a world is: the five things its data distribution must know.

    @abstractmethod
    def _ordinary(self, prompt: str) -> Tensor:
        """Parameters ``[dim]`` of a prompt that was never given, drawn by hash."""

    @abstractmethod
    def _posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta) -> Tensor:
        """x̂₀ = E[x₀ | x_t]."""

    @abstractmethod
    def _posterior_covariance(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta, v: Tensor) -> Tensor:
        """Cov[x₀ | x_t] v."""

    @abstractmethod
    def _posterior_variance(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta) -> Tensor:
        """The diagonal of Cov[x₀ | x_t]."""

    @abstractmethod
    def _log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta) -> Tensor:
        """log p_t(x_t), ``[batch]``."""

    @abstractmethod
    def _pull_back(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta, v: Tensor) -> Theta:
        """vᵀ ∂x̂₀/∂θ."""

    @abstractmethod
    def draw(self, cond: Condition | None, generator: torch.Generator) -> Latents:
        """One exact sample of x₀ for each prompt (one sample without text)."""

    # The promises of a Target.

    def identity(self) -> dict[str, Any]:
        """Every option that changes an answer, and a hash of all parameters."""
        digest = hashlib.sha256()
        for key, theta in [("", self._null), *sorted(self._known.items())]:
            digest.update(f"{len(key)}/".encode() + key.encode("utf-8", "surrogatepass") + _bytes(theta))
        options = asdict(self.options) | {"dtype": str(self.dtype).removeprefix("torch.")}
        options |= {"latent_shape": list(self.latent_shape), "word_weights": dict(self.options.word_weights)}
        del options["device"]
        return {"target": self.name, **options, "parameters": digest.hexdigest()}

    def encode(self, prompts: list[str]) -> Condition:
        """θ_p − θ_∅ at the place of each word, ``[batch, context, dim]``, else zeros; shares w are ``extra["share"]``.

        Raises:
            CannotAudit: This world has no text.
            UnknownName: A prompt was not given at construction and the world is strict.
        """
        seen = [self.tokens(prompt) for prompt in prompts]
        tokens = torch.zeros(len(prompts), self.options.context, len(self._null), dtype=self._exact, device=self.device)
        # An empty prompt listens to all places alike, so that a soft prompt can start from it.
        share = torch.full(tokens.shape[:2], 1 / self.options.context, dtype=self._exact, device=self.device)
        for row, words in enumerate(seen):
            if words:
                tokens[row, : len(words)] = self._parameters(" ".join(words)) - self._null
                share[row] = 0
                share[row, : len(words)] = torch.tensor(self.shares(" ".join(words)), dtype=self._exact)
        return Condition(tokens, {"share": share})

    def tokens(self, prompt: str) -> list[str]:
        """The words the encoder sees; word i is token i of the condition. Raises CannotAudit on a world without text."""
        return self._words(prompt)[: self.options.context]

    def dropped(self, prompt: str) -> int:
        """How many words lie beyond the context. Raises CannotAudit on a world without text."""
        return max(0, len(self._words(prompt)) - self.options.context)

    def shares(self, prompt: str) -> list[float]:
        """wᵢ, which part of the prompt's effect each visible word carries; they sum to 1."""
        weights = [self._word_weight(word) for word in self.tokens(prompt)]
        return [w / sum(weights) for w in weights]

    def noise(self, seeds: Sequence[int], base: int = 0) -> Latents:
        """Unit-variance starting noise; row j depends on (base, seeds[j]) alone."""
        return noise_from_seeds(seeds, base, self.latent_shape).to(self.device, self.dtype)

    def schedule(self, steps: int) -> _Run:
        """DDIM (eps) or Euler (velocity). The last step lands on clean data, α = 1 and σ = 0."""
        if not 1 <= steps <= TRAIN_STEPS:
            raise UsageError(f"steps={steps} is out of range; use 1 to {TRAIN_STEPS}.")
        if self.space == "velocity":
            t = torch.linspace(1, 0, steps + 1, dtype=self._exact, device=self.device)
            return _Run(self, self.options.shift * t / (1 + (self.options.shift - 1) * t))
        if self.options.spacing == "trailing":
            grid = np.round(np.arange(TRAIN_STEPS, 0, -TRAIN_STEPS / steps)).astype(int)[:steps] - 1
        else:
            stride = TRAIN_STEPS // steps
            grid = np.arange(steps)[::-1] * stride + min(1, stride - 1)
        return _Run(self, torch.tensor([*grid.tolist(), CLEAN], device=self.device))

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at training timesteps 0…999 (eps; −1 is clean data), or at times in [0, 1] (velocity).

        Float32, float64 for a float64 world.
        """
        if self.space == "velocity":
            sigma = t.to(self.device, self._exact)
            return 1 - sigma, sigma
        abar = self._abar[t.to(self.device).long()]
        return abar.sqrt().to(self._exact), (1 - abar).sqrt().to(self._exact)

    def output(self, x: Latents, t: Tensor, cond: Condition | None) -> Latents:
        """ε (or v = α ε − σ x̂₀, on request) in eps-space, u = ε − x̂₀ in velocity space; exact, in ``dtype``."""
        self.forwards += len(x)
        flat, alpha, sigma, theta = self._open(x, t, cond)
        x0, eps = self._answer(flat, alpha, sigma, theta)
        if self.space == "velocity":
            return (eps - x0).view(x.shape).to(self.dtype)
        raw = alpha * eps - sigma * x0 if self.options.v_prediction else eps
        return raw.view(x.shape).to(self.dtype)

    def to_space(self, output: Latents, x: Latents, t: Tensor) -> Latents:
        """ε or u from the raw output; float32, float64 for a float64 world."""
        return output.to(self._exact) if self.space == "velocity" else self._split(output, x, t)[1]

    def predict(self, x: Latents, t: Tensor, cond: Condition | None) -> Latents:
        """``to_space(output(x, t, cond), x, t)``."""
        return self.to_space(self.output(x, t, cond), x, t)

    def encode_images(self, images: Float[Tensor, "batch 3 height width"]) -> Latents:
        """x₀ = 2·picture − 1; with other than 3 channels, each channel is the mean of the colors it shows as."""
        if images.shape[2:] != self.latent_shape[1:]:
            height, width = self.latent_shape[1:]
            raise UsageError(
                f"pictures are {images.shape[3]}×{images.shape[2]}, this world is {width}×{height}: resize them."
            )
        x0 = torch.einsum("ck,bkhw->bchw", self._colors(to_picture=False), images.to(self.device, self._exact))
        return (2 * x0 - 1).to(self.dtype)

    def decode(self, x: Latents) -> Float[Tensor, "batch 3 height width"]:
        """(x + 1) / 2 in [0, 1], float32 on the CPU.

        With other than 3 channels, color k is the mean of the channels j ≡ k modulo min(3, channels); a single channel
        is grey.
        """
        pictures = torch.einsum("kc,bchw->bkhw", self._colors(to_picture=True), x.to(self._exact))
        return ((pictures + 1) / 2).clamp(0, 1).float().cpu()

    # What is known exactly.

    def posterior_mean(self, x: Latents, t: Tensor, cond: Condition | None) -> Latents:
        """x̂₀ = E[x₀ | x_t = x]."""
        return self._posterior_mean(*self._open(x, t, cond)).view(x.shape)

    def score(self, x: Latents, t: Tensor, cond: Condition | None) -> Latents:
        """∇ log p_t(x) = −ε / σ."""
        flat, alpha, sigma, theta = self._open(x, t, cond)
        return (-self._answer(flat, alpha, sigma, theta)[1] / sigma).view(x.shape)

    def log_density(self, x: Latents, t: Tensor, cond: Condition | None) -> PerSample:
        """log p_t(x) of the noised data, in nats over all elements."""
        return self._log_density(*self._open(x, t, cond))

    def hessian_vector(self, x: Latents, t: Tensor, cond: Condition | None, v: Latents) -> Latents:
        """∇² log p_t(x) v = (α² C v / σ² − v) / σ². The Jacobian of ε is −σ times this."""
        flat, alpha, sigma, theta = self._open(x, t, cond)
        u = v.flatten(1).to(self._exact)
        covered = self._posterior_covariance(flat, alpha, sigma, theta, u)
        return ((alpha**2 * covered / sigma**2 - u) / sigma**2).view(x.shape)

    def hessian_diagonal(self, x: Latents, t: Tensor, cond: Condition | None) -> Latents:
        """The diagonal of ∇² log p_t(x); its sum is the trace of the score's Jacobian."""
        flat, alpha, sigma, theta = self._open(x, t, cond)
        variance = self._posterior_variance(flat, alpha, sigma, theta)
        return ((alpha**2 * variance / sigma**2 - 1) / sigma**2).view(x.shape)

    def significance(self, x: Latents, t: Tensor, cond: Condition) -> Float[Tensor, "batch token"]:
        """Word significance ‖∂‖Δ‖₂/∂eᵢ‖₂ (Wen et al. 2024) for Δ = prediction with the prompt − prediction without.

        θ is linear in the tokens, so that this is wᵢ·‖(Δ/‖Δ‖)ᵀ ∂Δ/∂θ‖₂, with ∂ε/∂θ = −(α/σ) ∂x̂₀/∂θ and
        ∂u/∂θ = −((α + σ)/σ) ∂x̂₀/∂θ. It is 0 where Δ is.
        """
        flat, alpha, sigma, theta = self._open(x, t, cond)
        (x0_c, eps_c), (x0_u, eps_u) = (
            self._answer(flat, alpha, sigma, each) for each in (theta, self._null.expand_as(theta))
        )
        delta, gain = (eps_c - eps_u, alpha / sigma)
        if self.space == "velocity":
            delta, gain = delta - (x0_c - x0_u), 1 / sigma
        direction = torch.nn.functional.normalize(delta, dim=1, eps=torch.finfo(self._exact).tiny)
        slope = gain * self._pull_back(flat, alpha, sigma, theta, direction)
        return cond.extra["share"] * slope.norm(dim=1, keepdim=True)

    def estimate_replication(
        self,
        cond: Condition | None,
        image: Float[Tensor, "channel height width"],
        *,
        radius: float = 0.1,
        n: int = 256,
        null: Condition | None = None,
        steps: int = 50,
        guidance: float | None = None,
        base: int = 0,
        confidence: float = 0.95,
    ) -> Replications:
        """Monte Carlo: generate n times with the real sampler and count what falls within ``radius`` of ``image``.

        Args:
            cond: One encoded prompt (None without text).
            image: x₀ to look for, in the world's units.
            radius: Root mean square distance per element.
            n: Number of generations, from seeds 0 … n − 1 under ``base``.
            null: The empty prompt, for guidance; without it there is none.
            steps: Sampler steps.
            guidance: Guidance scale; default is the world's own.
            base: Base seed.
            confidence: Of the two-sided Clopper–Pearson interval.

        Use it where ``replication_probability`` has no closed form: mixtures under guidance or a coarse sampler.
        """
        from scipy.stats import binomtest  # slow to import

        found = 0
        for start in range(0, n, 256):
            noise = self.noise(range(start, min(start + 256, n)), base)
            rows = None if cond is None else cond.expand(len(noise))
            for step in denoise(self, noise, rows, null, steps=steps, guidance=guidance):
                last = step.x_next
            assert last is not None
            off = (last - image.to(last)).flatten(1).square().mean(1).sqrt()
            found += int((off <= radius).sum())
        interval = binomtest(found, n).proportion_ci(confidence, method="exact")
        return Replications(found, n, float(interval.low), float(interval.high))

    # Inside.

    def _open(self, x: Latents, t: Tensor, cond: Condition | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x as ``[batch, size]``, α and σ as ``[batch or 1, 1]``, θ as ``[batch, dim]``."""
        if tuple(x.shape[1:]) != self.latent_shape:
            raise UsageError(
                f"x has shape {tuple(x.shape[1:])} per sample, {self.name} was built for {self.latent_shape}."
            )
        alpha, sigma = self._levels(t)
        return x.flatten(1).to(self._exact), alpha, sigma, self._theta(cond, len(x))

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(t)
        return alpha.reshape(-1, 1), sigma.reshape(-1, 1)

    def _theta(self, cond: Condition | None, n: int) -> Theta:
        """θ = θ_∅ + Σᵢ wᵢ eᵢ."""
        if cond is None:
            if self.has_text:
                raise CannotAudit(f"{self.name} takes text: pass encode(['']) for the prediction without a prompt.")
            return self._null.expand(n, -1)
        if len(cond) != n:
            raise UsageError(f"{len(cond)} encoded prompts for {n} samples: give one per sample (Condition.expand).")
        # Summed over places, not by a matrix product, which would round a row by its place in the batch.
        return self._null + (cond.extra["share"][..., None] * cond.tokens).sum(1)

    def _answer(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        """x̂₀ and ε."""
        x0 = self._posterior_mean(x, alpha, sigma, theta)
        return x0, (x - alpha * x0) / sigma

    def _split(self, output: Latents, x: Latents, t: Tensor) -> tuple[Latents, Latents]:
        """x̂₀ and ε̂ from a raw output, which may be a guided one."""
        alpha, sigma = (level.reshape(-1, 1, 1, 1) for level in self.alpha_sigma(t))
        raw, x = output.to(self._exact), x.to(self._exact)
        if self.space == "velocity":
            return x - sigma * raw, x + alpha * raw
        if self.options.v_prediction:
            return alpha * x - sigma * raw, sigma * x + alpha * raw
        return (x - sigma * raw) / alpha, raw

    def _words(self, prompt: str) -> list[str]:
        if not self.has_text:
            raise CannotAudit(f"{self.name} takes no text: it was built with has_text=False; pass cond=None.")
        return prompt.split()

    def _parameters(self, key: str) -> Tensor:
        if key not in self._known and self.options.strict:
            raise UnknownName("prompt", key, self._known)
        return self._known[key] if key in self._known else self._ordinary(key)

    def _word_weight(self, word: str) -> float:
        known = self.options.word_weights.get(word)
        return known if known is not None else 0.5 + float(torch.rand((), generator=self._generator("word", word)))

    def _generator(self, *key: object) -> torch.Generator:
        return _generator(self.options.seed, *key)

    def _colors(self, *, to_picture: bool) -> Tensor:
        """Means over the channels of each color ``[3, channel]``, or over the colors of each channel ``[channel, 3]``."""
        channels = self.latent_shape[0]
        shows = (torch.arange(channels) - torch.arange(3)[:, None]) % min(3, channels) == 0
        shows = (shows if to_picture else shows.T).to(self.device, self._exact)
        return shows / shows.sum(1, keepdim=True)

    def _tensor(self, value: Value | Weights, shape: tuple[int, ...]) -> Tensor:
        """A value given by the user, spread over ``shape`` and flattened."""
        try:
            full = torch.as_tensor(value, dtype=self._exact, device=self.device).expand(shape)
        except RuntimeError as error:
            raise UsageError(f"a value of shape {np.shape(value)} does not fit {shape}.") from error
        if not bool(torch.isfinite(full).all()):
            raise UsageError("means, spreads and weights must be finite.")
        return full.flatten()


class Gaussian(ClosedForm):
    """Each prompt is N(μ, diag s²); memorized where s = 0. θ = (μ, s).

    x̂₀ = μ + α s² (x − αμ) / v and ε = σ (x − αμ) / v with v = α² s² + σ². A spread that is 0 in some elements only
    is a template: these elements come out alike every time, and the intrinsic dimension is the number of the others.

    Args:
        prompts: ``{prompt: (μ, s)}``, numbers or tensors that broadcast to the latent shape; None draws an ordinary
            one by hash.
        null: (μ, s) of the empty prompt. Default (0, √(scatter² + spread²)): what ordinary prompts amount to, all
            together.
        spread: s of ordinary prompts.
        scatter: Standard deviation of their means.
        **options: See :class:`Options`.

    >>> target = Gaussian.world(["a cat"], memorized=["the mona lisa"])
    >>> cond, null = target.encode(["the mona lisa"]), target.encode([""])
    >>> step = next(denoise(target, target.noise([0]), cond, null))
    """

    name = "gaussian"

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
        null = (0.0, math.hypot(spread, scatter)) if null is None else null
        given = {
            p: self._ordinary(" ".join(p.split())) if ms is None else self._pack(*ms)
            for p, ms in (prompts or {}).items()
        }
        self._learn(self._pack(*null), given)

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
            **options: See :class:`Options`.
        """
        known: dict[str, tuple[Value, Value] | None] = dict.fromkeys(prompts)
        known |= {p: (x0, 0.0) for p, x0 in _pictures(memorized, Options(**options)).items()}
        return cls(known, spread=spread, scatter=scatter, **options)

    @classmethod
    def tiny(cls, **options: Any) -> Gaussian:
        """A small world for tests: two ordinary prompts and a memorized one."""
        return cls.world(["a cat", "two dogs on a beach"], ["the mona lisa"], **options)

    def identity(self) -> dict[str, Any]:
        """Every option that changes an answer, and a hash of all parameters."""
        return super().identity() | {"spread": self.ordinary_spread, "scatter": self.ordinary_scatter}

    def mean(self, cond: Condition | None) -> Latents:
        """μ of each prompt; a memorized prompt's picture."""
        return self._moments(self._theta(cond, _rows(cond)))[0].unflatten(1, self.latent_shape)

    def std(self, cond: Condition | None) -> Latents:
        """s of each prompt."""
        return self._moments(self._theta(cond, _rows(cond)))[1].abs().unflatten(1, self.latent_shape)

    def draw(self, cond: Condition | None, generator: torch.Generator) -> Latents:
        """One exact sample of x₀ for each prompt (one sample without text)."""
        z = torch.randn((_rows(cond), *self.latent_shape), generator=generator, dtype=self._exact).to(self.device)
        return (self.mean(cond) + self.std(cond) * z).to(self.dtype)

    def ode_map(self, x: Latents, t: Tensor, cond: Condition | None, to: Tensor | None = None) -> Latents:
        """Where the exact probability-flow ODE takes ``x`` from time ``t`` to time ``to`` (None: to clean data).

        z = (x − αμ)/√(α² s² + σ²) never changes on the way, so x' = α'μ + √(α'² s² + σ'²) z. DDIM and Euler converge
        to it.
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
        plan, g = self.schedule(steps), self.guidance if guidance is None else guidance
        n = _rows(cond)
        branches = [(1.0, self._theta(cond, n))]
        if null is not None:
            branches = [(g, branches[0][1]), (1 - g, self._theta(null.expand(n), n))]
        gain = torch.ones(n, self._size, dtype=self._exact, device=self.device)
        offset = torch.zeros_like(gain)
        for t, later in pairwise(plan.knots):
            (alpha, sigma), (alpha_to, sigma_to) = self._levels(t), self._levels(later)
            slope, shift = torch.zeros_like(gain), torch.zeros_like(gain)
            for weight, theta in branches:
                mean, std = self._moments(theta)
                var = (alpha * std) ** 2 + sigma**2
                slope = slope + weight * (alpha_to * alpha * std**2 + sigma_to * sigma) / var
                shift = shift + weight * (alpha_to * sigma**2 - sigma_to * alpha * sigma) * mean / var
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
        away = (mean - image.to(mean)).flatten(1).double().cpu().numpy()
        pairs = zip(away, std.flatten(1).abs().double().cpu().numpy(), strict=True)
        return torch.tensor([_ball(each, s, radius) for each, s in pairs], dtype=torch.float64)

    def _pack(self, mean: Value, std: Value) -> Tensor:
        packed = self._tensor(mean, self.latent_shape), self._tensor(std, self.latent_shape)
        if bool((packed[1] < 0).any()):
            raise UsageError(
                f"a spread of {float(packed[1].min()):g} was given; spreads are 0 (memorized) or positive."
            )
        return torch.cat(packed)

    def _ordinary(self, prompt: str) -> Tensor:
        mean = torch.randn(self._size, generator=self._generator("mean", prompt), dtype=torch.float64)
        return self._pack((self.ordinary_scatter * mean).view(self.latent_shape), self.ordinary_spread)

    def _moments(self, theta: Theta) -> tuple[Tensor, Tensor]:
        """μ and s. A spread of a few rounding errors is 0; its sign means nothing, as formulas know s² alone."""
        mean, std = theta.chunk(2, dim=1)
        return mean, hardshrink(std, 8 * torch.finfo(self._exact).eps)

    def _posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta) -> Tensor:
        mean, std = self._moments(theta)
        return mean + alpha * std**2 * (x - alpha * mean) / ((alpha * std) ** 2 + sigma**2)

    def _posterior_variance(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta) -> Tensor:
        std = self._moments(theta)[1]
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


class Mixture(ClosedForm):
    """Each prompt is Σⱼ πⱼ N(μⱼ, sⱼ² I): one pool of training pictures for all prompts, and weights for each prompt.

    θ = π, so that the prompt whose words of share w are zeroed has exactly the distribution (1 − w)·p(x₀ | prompt) +
    w·p(x₀ | empty prompt). With vⱼ = α² sⱼ² + σ² and responsibilities rⱼ ∝ πⱼ N(x; αμⱼ, vⱼ I), x̂₀ = Σⱼ rⱼ mⱼ with
    mⱼ = (σ² μⱼ + α sⱼ² x) / vⱼ. With all spreads 0 this is the exact memorizer: the minimizer of the training loss on a
    finite set, which draws picture j with probability πⱼ.

    Args:
        points: μ, ``[component, channel, height, width]``; they give the latent shape.
        spread: s, one number or one for each component.
        prompts: ``{prompt: weights}``, one weight ≥ 0 for each component (copies, say); None draws ordinary ones by
            hash.
        null: Weights of the empty prompt; default: all alike.
        **options: See :class:`Options`.

    Ordinary prompts that are drawn by hash have weights ∝ null weight × Exp(1).
    """

    name = "mixture"

    def __init__(
        self,
        points: Float[Tensor, "component channel height width"],
        spread: int | float | Weights = 0.0,
        prompts: Mapping[str, Weights | None] | None = None,
        null: Weights | None = None,
        **options: Any,
    ):
        channel, height, width = points.shape[1:]
        super().__init__(Options(**{**options, "latent_shape": (channel, height, width)}))
        if not len(points):
            raise UsageError("a mixture needs at least one component; points is empty.")
        self.points = points.to(self.device, self._exact)
        self.spread = self._tensor(spread, (len(points),))
        if bool((self.spread < 0).any()):
            raise UsageError(
                f"a spread of {float(self.spread.min()):g} was given; spreads are 0 (memorized) or positive."
            )
        self._mu = self.points.flatten(1)
        # Distances are taken from the middle of the pool: ‖x − αμ‖² expanded around a far origin would lose digits.
        self._middle = self._mu.mean(0)
        self._null = self._normalized([1.0] * len(points) if null is None else null)
        given = {
            p: self._ordinary(" ".join(p.split())) if w is None else self._normalized(w)
            for p, w in (prompts or {}).items()
        }
        self._learn(self._null, given)

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
            **options: See :class:`Options`.
        """
        common = Options(**options)
        pictures = _pictures(memorized, common)
        means = torch.randn(
            (components, *common.latent_shape), generator=_generator(common.seed, "components"), dtype=torch.float64
        )
        kept = len(pictures)
        known: dict[str, Weights | None] = dict.fromkeys(prompts)
        known |= dict(zip(pictures, torch.eye(kept, kept + components), strict=True))
        return cls(
            torch.cat([torch.stack([*pictures.values()]).double(), scatter * means]) if kept else scatter * means,
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
            **options: See :class:`Options`.
        """
        common = Options(**options)
        if isinstance(points, int):
            generator = _generator(common.seed, "points")
            points = 2 * torch.rand((points, *common.latent_shape), generator=generator, dtype=torch.float64) - 1
        weights = [copies, *[1] * (len(points) - 1)] if isinstance(copies, int) else copies
        return cls(points, 0.0, null=weights, **{"has_text": False, **options})

    @classmethod
    def tiny(cls, **options: Any) -> Mixture:
        """A small world for tests: two ordinary prompts and a memorized one."""
        return cls.world(["a cat", "two dogs on a beach"], ["the mona lisa"], components=4, scatter=0.05, **options)

    def identity(self) -> dict[str, Any]:
        """Every option that changes an answer, and a hash of all parameters."""
        pool = hashlib.sha256(_bytes(self._mu) + _bytes(self.spread)).hexdigest()
        return super().identity() | {"components": len(self.points), "pool": pool}

    def weights(self, cond: Condition | None) -> Float[Tensor, "batch component"]:
        """πⱼ of each prompt."""
        return self._prior(self._theta(cond, _rows(cond)))

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
        away = (self.points - image.to(self.points)).flatten(1).double().cpu().numpy()
        spread = self.spread.double().cpu().numpy()
        inside = [_ball(each, np.full_like(each, s), radius) for each, s in zip(away, spread, strict=True)]
        return self.weights(cond).detach().double().cpu() @ torch.tensor(inside, dtype=torch.float64)

    def _normalized(self, weights: Weights) -> Tensor:
        full = self._tensor(weights, (len(self.points),))
        if bool((full < 0).any()) or not bool(full.sum() > 0):
            raise UsageError("mixture weights must be 0 or more, and not all 0.")
        return full / full.sum()

    def _ordinary(self, prompt: str) -> Tensor:
        uniform = torch.rand(len(self.points), generator=self._generator("weights", prompt), dtype=torch.float64)
        return self._normalized(self._null.double().cpu() * -torch.log1p(-uniform))

    def _prior(self, theta: Theta) -> Tensor:
        """π ∝ max(θ, 0). A weight of a few rounding errors is 0: close to its μ, even a weight of 1e-15 would win."""
        tiny = theta.abs() < 8 * torch.finfo(self._exact).eps
        weights = torch.where(tiny, theta - theta.detach(), theta).clamp(min=0)  # an excluded one can be learned back
        return weights / weights.sum(1, keepdim=True)

    def _likelihood(self, x: Tensor, alpha: Tensor, sigma: Tensor, prior: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """N(x; αμⱼ, vⱼ I) / exp(top), ``[batch, component]``, then top ``[batch, 1]`` and v."""
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

    def _along(self, x: Tensor, v: Tensor, r: Tensor, by_mu: Tensor, by_x: Tensor) -> Tensor:
        """(mⱼ − x̂₀)·v for each component."""
        means = by_mu * self._product(v, self._mu) + by_x * (x * v).sum(1, keepdim=True)
        return means - (r * means).sum(1, keepdim=True)

    def _posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta) -> Tensor:
        r, by_mu, by_x = self._responsible(x, alpha, sigma, theta)
        return self._product(r * by_mu, self._mu.T) + (r * by_x).sum(1, keepdim=True) * x

    def _posterior_covariance(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta, v: Tensor) -> Tensor:
        r, by_mu, by_x = self._responsible(x, alpha, sigma, theta)
        pull = r * self._along(x, v, r, by_mu, by_x)
        within = (r * self.spread**2 * by_mu).sum(1, keepdim=True) * v
        return within + self._product(pull * by_mu, self._mu.T) + (pull * by_x).sum(1, keepdim=True) * x

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
        # ∂x̂₀/∂θⱼ = (Nⱼ / Σₖ θₖ Nₖ) (mⱼ − x̂₀), with Nⱼ the likelihood of component j; a negative weight counts as 0.
        prior = self._prior(theta)
        likelihood = self._likelihood(x, alpha, sigma, prior)[0]
        total = theta.clamp(min=0).sum(1, keepdim=True) * (prior * likelihood).sum(1, keepdim=True)
        counts = theta > -8 * torch.finfo(self._exact).eps
        along = self._along(x, v, *self._responsible(x, alpha, sigma, theta))
        return counts * likelihood / total * along

    def _product(self, rows: Tensor, matrix: Tensor) -> Tensor:
        """rows @ matrix.T. With text, each row is summed on its own: BLAS rounds a row by its place in the batch, and the
        empty prompt would score 1e-7 instead of 0."""
        return (rows[:, None] * matrix).sum(-1) if self.has_text else rows @ matrix.T


def _alphas_cumprod(name: str) -> Tensor:
    """ᾱ_0 … ᾱ_999, and 1 at the end, so that index −1 is clean data; float64."""
    kind, first, last = BETAS[name]
    if kind == "scaled_linear":
        betas = torch.linspace(first**0.5, last**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    else:
        betas = torch.linspace(first, last, TRAIN_STEPS, dtype=torch.float64)
    return torch.cat([(1 - betas).cumprod(0), torch.ones(1, dtype=torch.float64)])


def _ball(away: np.ndarray, std: np.ndarray, radius: float) -> float:
    """P(‖away + std · z‖² ≤ D radius²) for z ~ N(0, I)."""
    free = std > 0
    left = away.size * radius**2 - float((away[~free] ** 2).sum())
    if left < 0:
        return 0.0
    if not free.any():
        return 1.0
    from scipy.stats import chi2, ncx2  # slow to import

    s = float(std[free].mean())
    if not np.allclose(std[free], s, rtol=1e-6, atol=0):
        raise UsageError("the spreads differ, so this probability has no closed form: use estimate_replication.")
    noncentral = float((away[free] ** 2).sum()) / s**2
    law = ncx2(int(free.sum()), noncentral) if noncentral else chi2(int(free.sum()))
    return float(law.cdf(left / s**2))


def _pictures(memorized: Sequence[str] | Mapping[str, Tensor], options: Options) -> dict[str, Tensor]:
    """Pictures of memorized prompts; where none is given, 4×4 blocks of color by hash, which survive resizing."""
    if isinstance(memorized, Mapping):
        for prompt, picture in memorized.items():
            if tuple(picture.shape) != options.latent_shape:
                raise UsageError(
                    f"the picture of {prompt!r} has shape {tuple(picture.shape)}: give latent_shape=… to match, "
                    f"it is {options.latent_shape}."
                )
        return dict(memorized)
    channels, height, width = options.latent_shape
    block_h, block_w = -(-height // 4), -(-width // 4)
    pictures = {}
    for prompt in memorized:
        generator = _generator(options.seed, "picture", " ".join(prompt.split()))
        blocks = 2 * torch.rand((channels, 4, 4), generator=generator, dtype=torch.float64) - 1
        pictures[prompt] = blocks.repeat_interleave(block_h, 1).repeat_interleave(block_w, 2)[:, :height, :width]
    return pictures


def _generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by hashing the key."""
    digest = hashlib.sha256("/".join(map(str, key)).encode("utf-8", "surrogatepass")).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _rows(cond: Condition | None) -> int:
    return 1 if cond is None else len(cond)


def _bytes(values: Tensor) -> bytes:
    return values.double().cpu().numpy().tobytes()
