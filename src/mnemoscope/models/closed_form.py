"""What the closed-form worlds share: models of which every answer is known.

For each prompt, data are Gaussian (``gaussian.py``) or a finite mixture of Gaussians (``mixture.py``); a memorized
prompt is one whose spread is 0. No network, no weights, yet a whole :class:`~mnemoscope.models.base.Target`, so that
every method can be held against a formula first.

**Predictions.** A sampler shows x_t = α x₀ + σ ε, σ > 0. Write x̂₀ = E[x₀ | x_t] and C = Cov[x₀ | x_t]. The exact

    noise       ε = (x_t − α x̂₀) / σ                 velocity    u = ε − x̂₀
    score       ∇ log p_t(x_t) = −ε / σ              Hessian     ∇² log p_t(x_t) = (α² C / σ² − I) / σ²

follow for any data (Robbins 1956; Efron 2011, Tweedie's formula), and ∂ε/∂x = −σ·Hessian. A world has to know x̂₀ and C,
log p_t itself, and how x̂₀ moves with its parameters.

**Text.** The parameters θ of a prompt's distribution are a linear read-out of its tokens, θ = θ_∅ + Σᵢ wᵢ eᵢ. Word i is
one token with embedding eᵢ = θ_p − θ_∅ and share wᵢ > 0, Σᵢ wᵢ = 1: what the word adds is known, zeroing its token takes
exactly its share away, and the empty prompt *is* the null distribution. Everything is differentiable in the tokens. They
are as free as the distribution itself: whoever optimizes them without a cost can make any picture "memorized".

**Sampling** is the usual one, DDIM or Euler, x' = α' x̂₀ + σ' ε. Every prediction is exact; the steps are finite, as in
any sampler.
"""

from __future__ import annotations

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import CannotAudit, UnknownName, UsageError
from ..types import Latents, PerSample, Space
from . import identity
from .base import Condition, Piece, noise_from_seeds
from .sampling import denoise, final

Value: TypeAlias = int | float | Sequence[int | float] | Tensor
"""A number, or numbers that broadcast to where they belong."""

Theta: TypeAlias = Float[Tensor, "batch dim"]
"""The parameters of each row's distribution."""

BETAS: dict[str, tuple[str, float, float]] = {
    "stable-diffusion": ("scaled_linear", 0.00085, 0.012),
    "latent-diffusion": ("scaled_linear", 0.0015, 0.0195),
    "ddpm": ("linear", 0.0001, 0.02),
}
TRAIN_STEPS = 1000
WORDS = 4096
"""Made-up words of a world's vocabulary."""
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

    def generator(self, *key: str) -> torch.Generator:
        """A CPU generator for one purpose, seeded by hashing ``seed`` and ``key``: drawing "by hash"."""
        digest = hashlib.sha256("/".join((str(self.seed), *key)).encode("utf-8", "surrogatepass")).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


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


class ClosedFormSchedule:
    """One sampler run: DDIM (η = 0) in eps-space, Euler in velocity space. ``knots`` are its times, clean data last."""

    def __init__(self, world: ClosedForm, knots: Tensor):
        self._world, self.knots, self.timesteps = world, knots, knots[:-1]

    def start(self, noise: Latents) -> Latents:
        """The noise itself."""
        return noise

    def scale(self, x: Latents, t: Tensor) -> Latents:
        """The state itself."""
        return x

    def step(self, output: Latents, t: Tensor, x: Latents) -> Latents:
        """x' = α' x̂₀ + σ' ε̂: the DDIM step, and with α + σ = 1 Euler's step x + (t' − t) u of a rectified flow."""
        alpha, sigma = self._world.alpha_sigma(self.knots[(self.timesteps > t).sum() + 1])
        x0, eps = self._world._split(output, x, t)
        return (alpha * x0 + sigma * eps).to(x.dtype)


class ClosedForm(ABC):
    """A :class:`~mnemoscope.models.base.Target` whose predictions are formulas.

    A world defines the parameters θ of each prompt and, for data distributed by θ, the abstract methods below, on
    flattened samples ``[batch, size]`` with α and σ as ``[batch or 1, 1]``. ``forwards`` counts ``output`` and
    ``predict`` alone: the exact quantities (``score``, ``log_density``, …) are answers to check against, not work a
    method would do.
    """

    kind: ClassVar[str]

    def __init__(self, options: Options):
        self.options = options
        self.name = self.kind
        self.space: Space = "velocity" if options.space == "velocity" else "eps"
        self.has_text = options.has_text
        self.guidance = options.guidance
        self.latent_shape = options.latent_shape
        self.dtype = options.dtype
        self.device = torch.device(options.device)
        self.forwards = 0
        self._exact = torch.float64 if options.dtype == torch.float64 else torch.float32
        # Shares sum to 1 up to rounding: a parameter within this of 0 was meant to be 0.
        self._rounding = 8 * torch.finfo(self._exact).eps
        self._size = math.prod(options.latent_shape)
        self._abar = _alphas_cumprod(options.betas).to(self.device)

    def _learn(self, null: Any, prompts: Mapping[str, Any] | None) -> None:
        """Take the distribution of the empty prompt and of the given ones; None draws one by hash."""
        self._null = self._pack(null)
        self._known: dict[str, Tensor] = {}
        for prompt, given in (prompts or {}).items():
            words = prompt.split()
            key = " ".join(words)
            if not words:
                raise UsageError("The empty prompt is the null distribution: give it as null=….")
            if len(words) > self.options.context:
                raise UsageError(
                    f"{prompt!r} has {len(words)} words, the encoder sees {self.options.context}: raise context=…."
                )
            if key in self._known:
                raise UsageError(f"{prompt!r} was given twice; prompts that differ in white space alone are the same.")
            self._known[key] = self._ordinary(key) if given is None else self._pack(given)

    # What a world is.

    @abstractmethod
    def _pack(self, given: Any) -> Tensor:
        """Parameters ``[dim]`` from what a user wrote down for a prompt."""

    @abstractmethod
    def _ordinary(self, prompt: str) -> Tensor:
        """Parameters ``[dim]`` of a prompt that was never given, drawn by hash."""

    @abstractmethod
    def _posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta) -> Tensor:
        """x̂₀ = E[x₀ | x_t]."""

    @abstractmethod
    def _posterior_covariance(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta, v: Tensor) -> Tensor:
        """C v, with C = Cov[x₀ | x_t]."""

    @abstractmethod
    def _posterior_variance(self, x: Tensor, alpha: Tensor, sigma: Tensor, theta: Theta) -> Tensor:
        """The diagonal of C."""

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
        """Kind, every option that changes an answer, a hash of all parameters; ``fingerprint`` over all of it."""
        return identity.with_fingerprint(self._describe())

    def _describe(self) -> dict[str, Any]:
        options = asdict(self.options) | {"dtype": str(self.dtype).removeprefix("torch.")}
        del options["device"]
        parameters = identity.hash_tensors(self._parameters())
        return identity.plain({"name": self.name, "kind": self.kind, **options, "parameters": parameters})

    def _parameters(self) -> list[tuple[str, Tensor]]:
        return [("null", self._null), *((f"prompt {prompt!a}", theta) for prompt, theta in self._known.items())]

    def encode(self, prompts: list[str]) -> Condition:
        """θ_p − θ_∅ at the place of each word, ``[batch, context, dim]``, else zeros; shares w are ``extra["share"]``.

        Raises:
            CannotAudit: This world has no text.
            UnknownName: A prompt was not given at construction and the world is strict.
        """
        tokens = torch.zeros(len(prompts), self.options.context, len(self._null), dtype=self._exact, device=self.device)
        # An empty prompt listens to all places alike, so that a soft prompt can start from it.
        share = torch.full(tokens.shape[:2], 1 / self.options.context, dtype=self._exact, device=self.device)
        for row, prompt in enumerate(prompts):
            if words := self.tokens(prompt):
                tokens[row, : len(words)] = self._look_up(" ".join(words)) - self._null
                share[row] = 0
                share[row, : len(words)] = torch.tensor(self.shares(prompt), dtype=self._exact)
        return Condition(tokens, {"share": share})

    def tokens(self, prompt: str) -> list[str]:
        """The words the encoder sees; word i is token i of the condition. Raises CannotAudit on a world without text."""
        return self._words(prompt)[: self.options.context]

    def pieces(self, prompt: str) -> list[Piece]:
        """Word i at place i, then padding, which carries nothing. Raises CannotAudit on a world without text."""
        visible = self.tokens(prompt)
        found = zip(visible, re.finditer(r"\S+", prompt), strict=False)
        words = [Piece(word, "text", *at.span()) for word, at in found]
        return words + [Piece("", "padding")] * (self.options.context - len(words))

    def dropped(self, prompt: str) -> int:
        """How many words lie beyond the context. Raises CannotAudit on a world without text."""
        return max(0, len(self._words(prompt)) - self.options.context)

    def encode_padded(self, prompts: list[str], pad: str) -> Condition:
        """``encode(prompts)``: what follows the words carries nothing, whatever it is."""
        return self.encode(prompts)

    @property
    def entries(self) -> int:
        """How many words there are to draw from; a world understands any word, and these are made up."""
        return WORDS

    def entry(self, index: int) -> str:
        """Word number ``index`` of them."""
        return f"word{index}"

    def shares(self, prompt: str) -> list[float]:
        """wᵢ, which part of the prompt's effect each visible word carries; they sum to 1."""
        known = self.options.word_weights
        weights = [
            known[word]
            if word in known
            else 0.5 + float(torch.rand((), generator=self.options.generator("word", word)))
            for word in self.tokens(prompt)
        ]
        return [w / sum(weights) for w in weights]

    def noise(self, seeds: Sequence[int], base: int = 0) -> Latents:
        """Unit-variance starting noise; row j depends on (base, seeds[j]) alone."""
        return noise_from_seeds(seeds, base, self.latent_shape).to(self.device, self.dtype)

    def schedule(self, steps: int) -> ClosedFormSchedule:
        """DDIM (eps) or Euler (velocity). The last step lands on clean data, α = 1 and σ = 0."""
        if not 1 <= steps <= TRAIN_STEPS:
            raise UsageError(f"steps={steps} is out of range; use 1 to {TRAIN_STEPS}.")
        if self.space == "velocity":
            t = torch.linspace(1, 0, steps + 1, dtype=self._exact, device=self.device)
            return ClosedFormSchedule(self, self.options.shift * t / (1 + (self.options.shift - 1) * t))
        if self.options.spacing == "trailing":
            grid = _trailing(steps)
        else:
            stride = TRAIN_STEPS // steps
            grid = np.arange(steps)[::-1] * stride + min(1, stride - 1)
        return ClosedFormSchedule(self, torch.tensor([*grid.tolist(), CLEAN], device=self.device))

    def whole_schedule(self, steps: int) -> ClosedFormSchedule:
        """A run that begins at the last training time; in velocity space every run does."""
        plan = self.schedule(steps)
        if self.space == "velocity" or self.options.spacing == "trailing":
            return plan
        return ClosedFormSchedule(self, torch.tensor([*_trailing(steps).tolist(), CLEAN], device=self.device))

    def training_times(self, u: Float[Tensor, " batch"]) -> Tensor:
        """Timestep ⌊1000·u⌋ (eps), or one of 1000 shifted times (velocity)."""
        step = (u * TRAIN_STEPS).long().clamp(0, TRAIN_STEPS - 1)
        if self.space == "eps":
            return step
        t = (step + 1).to(u.dtype) / TRAIN_STEPS
        return self.options.shift * t / (1 + (self.options.shift - 1) * t)

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
        is gray.
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

        Δ = −c Δx̂₀ with c = α/σ for ε and 1/σ for u (where α + σ = 1), and θ is linear in the tokens, so that this is
        wᵢ c ‖(Δx̂₀/‖Δx̂₀‖)ᵀ ∂x̂₀/∂θ‖₂. It is 0 where Δ is.
        """
        flat, alpha, sigma, theta = self._open(x, t, cond)
        null = self._null.expand_as(theta)
        change = self._posterior_mean(flat, alpha, sigma, theta) - self._posterior_mean(flat, alpha, sigma, null)
        direction = normalize(change, dim=1, eps=torch.finfo(self._exact).tiny)
        slope = self._pull_back(flat, alpha, sigma, theta, direction).norm(dim=1, keepdim=True)
        gain = (1 if self.space == "velocity" else alpha) / sigma
        return cond.extra["share"] * gain * slope

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
            last = final(denoise(self, noise, rows, null, steps=steps, guidance=guidance))
            off = (last - image.to(last)).flatten(1).square().mean(1).sqrt()
            found += int((off <= radius).sum())
        interval = binomtest(found, n).proportion_ci(confidence, method="exact")
        return Replications(found, n, float(interval.low), float(interval.high))

    # Inside.

    def _open(self, x: Latents, t: Tensor, cond: Condition | None) -> tuple[Tensor, Tensor, Tensor, Theta]:
        """x as ``[batch, size]``, α and σ as ``[batch or 1, 1]``, θ as ``[batch, dim]``."""
        if tuple(x.shape[1:]) != self.latent_shape:
            raise UsageError(
                f"x has shape {tuple(x.shape[1:])} per sample, {self.name} was built for {self.latent_shape}."
            )
        if cond is not None and len(cond) != len(x):
            raise UsageError(
                f"{len(cond)} encoded prompts for {len(x)} samples: give one per sample (Condition.expand)."
            )
        return x.flatten(1).to(self._exact), *self._levels(t), self._theta(cond).expand(len(x), -1)

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(t)
        return alpha.reshape(-1, 1), sigma.reshape(-1, 1)

    def _theta(self, cond: Condition | None) -> Theta:
        """θ = θ_∅ + Σᵢ wᵢ eᵢ; one row without text."""
        if cond is None:
            if self.has_text:
                raise CannotAudit(f"{self.name} takes text: pass encode(['']) for the prediction without a prompt.")
            return self._null[None]
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

    def _look_up(self, key: str) -> Tensor:
        if key in self._known:
            return self._known[key]
        if self.options.strict:
            raise UnknownName("prompt", key, self._known)
        return self._ordinary(key)

    def _colors(self, *, to_picture: bool) -> Tensor:
        """Means over the channels of each color ``[3, channel]``, or over the colors of each channel ``[channel, 3]``."""
        channels = self.latent_shape[0]
        shows = (torch.arange(channels) - torch.arange(3)[:, None]) % min(3, channels) == 0
        shows = (shows if to_picture else shows.T).to(self.device, self._exact)
        return shows / shows.sum(1, keepdim=True)

    def _tensor(self, value: Value, shape: tuple[int, ...]) -> Tensor:
        """A value given by the user, spread over ``shape`` and flattened."""
        try:
            full = torch.as_tensor(value, dtype=self._exact, device=self.device).expand(shape)
        except RuntimeError as error:
            raise UsageError(f"a value of shape {np.shape(value)} does not fit {shape}.") from error
        if not bool(torch.isfinite(full).all()):
            raise UsageError("means, spreads and weights must be finite.")
        return full.flatten()

    def _spread(self, value: Value, shape: tuple[int, ...]) -> Tensor:
        """The same for a standard deviation."""
        std = self._tensor(value, shape)
        if bool((std < 0).any()):
            raise UsageError(f"a spread of {float(std.min()):g} was given; spreads are 0 (memorized) or positive.")
        return std


def _trailing(steps: int) -> np.ndarray:
    """DDIM timesteps from the last training timestep on: 999, …"""
    return np.round(np.arange(TRAIN_STEPS, 0, -TRAIN_STEPS / steps)).astype(int)[:steps] - 1


def pictures_of(memorized: Sequence[str] | Mapping[str, Tensor], options: Options) -> dict[str, Tensor]:
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
        generator = options.generator("picture", " ".join(prompt.split()))
        blocks = 2 * torch.rand((channels, 4, 4), generator=generator, dtype=torch.float64) - 1
        pictures[prompt] = blocks.repeat_interleave(block_h, 1).repeat_interleave(block_w, 2)[:, :height, :width]
    return pictures


def probability_inside(
    away: Float[Tensor, "rows size"], std: Float[Tensor, "rows size"], radius: float
) -> Float[Tensor, " rows"]:
    """P(√mean((away + std · z)²) ≤ radius) for z ~ N(0, I): exact, float64 on the CPU.

    Where std is 0 the distance is fixed; if std is the same wherever it is not, the rest is a non-central χ².

    Raises:
        UsageError: Positive spreads of a row differ, so that there is no closed form.
    """
    rows = zip(away.detach().double().cpu().numpy(), std.detach().double().cpu().numpy(), strict=True)
    return torch.tensor([_ball(a, s, radius) for a, s in rows], dtype=torch.float64)


def _ball(away: np.ndarray, std: np.ndarray, radius: float) -> float:
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


def _alphas_cumprod(name: str) -> Tensor:
    """ᾱ_0 … ᾱ_999, and 1 at the end, so that index −1 is clean data; float64."""
    kind, first, last = BETAS[name]
    if kind == "scaled_linear":
        betas = torch.linspace(first**0.5, last**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    else:
        betas = torch.linspace(first, last, TRAIN_STEPS, dtype=torch.float64)
    return torch.cat([(1 - betas).cumprod(0), torch.ones(1, dtype=torch.float64)])
