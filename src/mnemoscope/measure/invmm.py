"""InvMM: Ma et al., ICCV 2025, *An Inversion-based Measure of Memorization for Diffusion Models*.

A picture is memorized as far as starting noise that is nearly standard normal leads to it. So learn q = N(μ, diag eˢ) over the starting
noise, for one picture x₀ of D elements, that trades off

    sensitivity    L = E_t E_{n∼q} ‖x̂₀(α_t x₀ + σ_t n, t) − x₀‖² / D
    normality      KL(q ‖ N(0, I)) / D = ½ mean(μ² + eˢ − s − 1)

as L + λ·KL/D, with a λ that is halved when L has stopped falling and grows a little otherwise, until noise drawn from q makes the model
draw the picture. The score is the KL that this took, in nats per dimension: low is strongly stored, 0 is "plain noise will do". A picture
that is not reached within the budget is *censored*: its score is at least what had been paid by then, and nobody knows more.

What the total number of nats means: with S the noises that lead to the picture, p = P(S) under plain noise and r = q(S),

    p ≥ exp(−(KL + h(r)) / r),    h the binary entropy in nats,

so that a picture's score bounds how rarely plain sampling draws it (data processing inequality), under the same condition, guidance and
sampler. Forcing a picture on a model that merely generalizes also succeeds at a price of a fraction of a nat per dimension: a finite
score alone says nothing; compare it with pictures of which the dose is known.

Two presets, whose scores are on different scales, so that a score always names its own. ``official`` is the algorithm of the authors'
code (its settings differ by model family). ``improved`` draws times from strata, stops a guidance scale at its first failing
draw, uses the same test noises for every picture, walks back from the first success to the smallest departure from plain noise that
still succeeds, and confirms it on fresh draws; it gives up early where nothing improves.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import stats
from ..errors import CannotAudit, UnknownName, UsageError
from ..models.base import Condition, Target, Trained, mix
from ..models.sampling import denoise
from ..similarity.base import Descriptor
from ..types import Latents, PerSample, precise

__all__ = [
    "FAMILIES",
    "InvMM",
    "Preset",
    "Stored",
    "Weight",
    "bound",
    "divergence",
    "family_of",
    "preset",
    "varied",
    "x0_of",
]

WINDOW = 100
"""Losses that a check averages over, whatever the distance of checks."""


@dataclass(frozen=True)
class Preset:
    """Every number of the algorithm.

    Attributes:
        name: What a score is labelled with.
        updates: Budget of Adam updates.
        batch: B, noises and times in an update.
        lr: Adam's learning rate, for μ and s.
        weight: λ at the start.
        every: C, updates between checks.
        progress: ξ, by how much the loss must have fallen since the last check.
        increment: δ, what λ grows by otherwise.
        draws: Test draws, all of which must succeed.
        beta: β, similarity from which a draw succeeds; None: the descriptor's caller says.
        steps: Length of the sampler's schedule in tests.
        scales: Guidance scales that are tried, for models with text.
        stratified: One time from each of B strata, instead of B independent ones.
        sequential: Drop a guidance scale at its first failing draw, and use the same noises in every test.
        search: Draws of each step of the walk back; 0: none, and the score is that of the first success.
        confirm: Fresh draws after a success; 0: none.
        patience: Give up after so many checks without progress at the floor of λ; 0: never.
    """

    name: str
    updates: int = 2000
    batch: int = 16
    lr: float = 0.1
    weight: float = 1.0
    every: int = 50
    progress: float = 1e-3
    increment: float = 1e-3
    draws: int = 8
    beta: float | None = 0.5
    steps: int = 50
    scales: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
    stratified: bool = False
    sequential: bool = False
    search: int = 0
    confirm: int = 0
    patience: int = 0


FAMILIES: dict[str, Preset] = {
    "pixel": Preset("official", batch=32, increment=1e-4, steps=200),
    "latent": Preset("official", every=10, increment=5e-4),
    "text": Preset("official"),
}
"""The authors' settings for unconditional pixel models, unconditional latent models and Stable Diffusion."""


def preset(name: str, family: str) -> Preset:
    """A preset of a family of models.

    Args:
        name: ``official`` or ``improved``.
        family: A key of :data:`FAMILIES`.

    Raises:
        UnknownName: there is none of that name.
    """
    if family not in FAMILIES:
        raise UnknownName("family of models", family, FAMILIES)
    official = FAMILIES[family]
    made = {
        "official": official,
        "improved": replace(
            official, name="improved", every=50, increment=1e-3 if family == "text" else 1e-4, steps=min(official.steps, 50),
            stratified=True, sequential=True, search=32, confirm=32, patience=5,
        ),
    }  # fmt: skip
    if name not in made:
        raise UnknownName("preset", name, made)
    return made[name]


class Weight:
    """λ, adapted on line: halved at a check where the loss has not fallen by ξ since the last one, else grown by δ."""

    def __init__(self, preset: Preset):
        self.preset, self.value, self.updates = preset, preset.weight, 0
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._before = math.inf
        self.stalled = 0
        """Checks in a row without progress."""

    def add(self, loss: float) -> bool:
        """Take the loss of an update; whether a check is due."""
        self._recent.append(loss)
        self.updates += 1
        if self.updates % self.preset.every or self.updates < 2:
            self.value += self.preset.increment
            return False
        now = sum(self._recent) / len(self._recent)
        if self._before - now < self.preset.progress:
            self.value /= 2
            self.stalled += 1
        else:
            self.value += self.preset.increment
            self.stalled = 0
        self._before = now
        return True

    @property
    def low(self) -> bool:
        """Whether λ is in the cycle it cannot leave downwards: C·δ, twice at most."""
        return self.value <= 2 * self.preset.every * self.preset.increment


def divergence(mu: Latents, s: Latents) -> PerSample:
    """KL(N(μ, diag eˢ) ‖ N(0, I)) / D = ½ mean(μ² + eˢ − s − 1) of each sample, in nats per dimension; exactly 0 at μ = s = 0."""
    return 0.5 * (mu.square() + torch.expm1(s) - s).flatten(1).mean(1)


def bound(nats: float, rate: float) -> float:
    """exp(−(KL + h(r)) / r), below which the probability p that plain noise leads to the picture cannot lie.

    Args:
        nats: KL in all, not per dimension.
        rate: r, the share of draws from q that succeed. 0 bounds nothing.
    """
    if rate <= 0:
        return 0.0
    entropy = 0.0 if rate >= 1 else -rate * math.log(rate) - (1 - rate) * math.log1p(-rate)
    return math.exp(-(nats + entropy) / rate)


def x0_of(target: Target, x: Latents, t: Tensor, cond: Condition | None) -> Latents:
    """x̂₀ at x, float32 or better: (x − σ ε)/α, or x − σ u of a rectified flow. Costs batch F."""
    alpha, sigma = (precise(c).to(x.device).view(-1, 1, 1, 1) for c in target.alpha_sigma(t))
    predicted = target.predict(x, t, cond)
    return x - sigma * predicted if target.space == "velocity" else (x - sigma * predicted) / alpha


@dataclass(frozen=True)
class Stored:
    """How strongly one picture is stored.

    Attributes:
        preset: Which algorithm; scores of different ones do not compare.
        passed: Whether noise drawn from q led to the picture within the budget.
        score: Nats per dimension; where the picture was not reached, infinity.
        nats: In all.
        paid: KL per dimension when it ended, also of a censored picture.
        similarity: The largest smallest similarity of a test: how near it came.
        loss: Mean loss at the end.
        scale: Guidance scale that passed; None for models without text, and where none did.
        update: Updates spent.
        succeeded: Fresh draws that succeeded, and how many there were; None: not confirmed.
        rate: r with its Clopper–Pearson interval.
        at_least: Probability that plain noise leads to the picture is at least this, by the lower end of ``rate``; None: unknown.
        forwards: F spent on this picture.
        backwards: B.
        curve: (update, loss, λ, KL per dimension, best similarity) at each check.
        mu: μ of the noise found.
        s: Its log-variance.
    """

    preset: str
    passed: bool
    score: float
    nats: float
    paid: float
    similarity: float
    loss: float
    scale: float | None
    update: int
    succeeded: tuple[int, int] | None
    rate: stats.Interval | None
    at_least: float | None
    forwards: int
    backwards: int
    curve: list[tuple[int, float, float, float, float]] = field(repr=False)
    mu: Tensor = field(repr=False)
    s: Tensor = field(repr=False)

    @property
    def words(self) -> str:
        """In one sentence; never a verdict."""
        if not self.passed:
            return (
                f"not reproduced within {self.update} updates ({self.preset}): more than {self.paid:.4f} nats per dimension, "
                f"nearest {self.similarity:.2f}"
            )
        found = f"reproduced at {self.score:.4f} nats per dimension, {self.nats:.1f} in all ({self.preset})"
        if self.succeeded is not None:
            found += f"; {self.succeeded[0]} of {self.succeeded[1]} fresh draws"
        return found


class InvMM:
    """Measures pictures one batch at a time; each picture has its own λ, history, draws and end.

    Args:
        target: The model; its weights take no part.
        descriptor: What says how similar two pictures are.
        preset: See :func:`preset`; default: ``improved`` for the target's family.
        beta: Similarity from which a draw is the picture; default the preset's, which is of SSCD.

    Raises:
        CannotAudit: the target does not say at which times it was trained.
    """

    def __init__(
        self, target: Target, descriptor: Descriptor, preset: Preset | None = None, *, beta: float | None = None
    ):
        if not isinstance(target, Trained):
            raise CannotAudit(
                f"{target.name} does not say at which times it was trained; give its adapter training_times."
            )
        self.target, self.descriptor = target, descriptor
        self.preset = varied(target) if preset is None else preset
        found = self.preset.beta if beta is None else beta
        if found is None:
            raise UsageError(
                "beta: from which similarity on is a draw the picture? Give a calibrated one of the descriptor."
            )
        self.beta: float = found

    def __call__(
        self, images: Float[Tensor, "batch 3 rows columns"], *, prompts: Sequence[str] | None = None, keys: Sequence[int] | None = None,
        progress: Callable[[int, int, Stored], object] | None = None,
    ) -> list[Stored]:  # fmt: skip
        """Measure pictures.

        Args:
            images: In [0, 1].
            prompts: Fixed captions, for a model with text; default: the empty prompt.
            keys: One number per picture, from which all its draws come; default 0, 1, ….
            progress: Told of each picture that is done: how many are, of how many, and its result.
        """
        n = len(images)
        keys = list(range(n)) if keys is None else list(keys)
        for what, rows in (("captions", prompts), ("keys", keys)):
            if rows is not None and len(rows) != n:
                raise UsageError(f"{len(rows)} {what} for {n} pictures: give one per picture.")
        if prompts is not None and not self.target.has_text:
            raise CannotAudit(f"{self.target.name} takes no text; measure its pictures without captions.")
        cond = self.target.encode(list(prompts or [""] * n)) if self.target.has_text else None
        x0 = precise(self.target.encode_images(images)).to(self.target.device)
        own = self.descriptor(images)
        runs = [
            _Run(self, x0[i], own[i], None if cond is None else cond.select(torch.tensor([i])), keys[i])
            for i in range(n)
        ]
        return self._all(runs, progress)

    def _all(self, runs: list[_Run], progress: Callable[[int, int, Stored], object] | None) -> list[Stored]:
        active, done = list(runs), 0
        optimizer = torch.optim.Adam([leaf for run in runs for leaf in (run.mu, run.s)], lr=self.preset.lr)
        while active:
            losses = self._update(active, optimizer)
            for run, loss in zip(active, losses, strict=True):
                if not run.weight.add(loss):
                    continue
                run.check()
                if run.result is not None and progress is not None:
                    done += 1
                    progress(done, len(runs), run.result)
            for run in active:
                if run.result is None and run.weight.updates >= self.preset.updates:
                    run.end(passed=False)
                    done += 1
                    if progress is not None and run.result is not None:
                        progress(done, len(runs), run.result)
            active = [run for run in active if run.result is None]
        return [run.result for run in runs if run.result is not None]

    def _update(self, active: list[_Run], optimizer: torch.optim.Optimizer) -> list[float]:
        """One Adam update of every picture that is still on its way; their losses, off the device at once."""
        b = self.preset.batch
        drawn = [run.draw(b) for run in active]
        eps, t = torch.cat([e for e, _ in drawn]), torch.cat([u for _, u in drawn])
        x0 = torch.stack([run.x0 for run in active]).repeat_interleave(b, 0)
        conds = [run.cond for run in active if run.cond is not None]
        cond = Condition.cat(conds).select(torch.arange(len(active)).repeat_interleave(b)) if conds else None
        with torch.enable_grad():
            mu, s = (torch.stack([getattr(run, name) for run in active]) for name in ("mu", "s"))
            noise = mu.repeat_interleave(b, 0) + (s / 2).exp().repeat_interleave(b, 0) * eps
            alpha, sigma = (precise(c).to(x0.device).view(-1, 1, 1, 1) for c in self.target.alpha_sigma(t))
            wrong = (x0_of(self.target, alpha * x0 + sigma * noise, t, cond) - x0).square().flatten(1).mean(1)
            loss = wrong.unflatten(0, (len(active), b)).mean(1)
            weight = torch.tensor([run.weight.value for run in active], dtype=loss.dtype).to(loss.device)
            total = (loss + weight * divergence(mu, s)).sum()
            leaves = [leaf for run in active for leaf in (run.mu, run.s)]
            for leaf, slope in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
                leaf.grad = slope
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for run in active:
            run.forwards += b
            run.backwards += b
        return loss.detach().tolist()


class _Run:
    """One picture on its way."""

    def __init__(self, method: InvMM, x0: Tensor, own: Tensor, cond: Condition | None, key: int):
        self.method, self.preset, self.x0, self.own, self.cond = method, method.preset, x0, own, cond
        self.mu, self.s = torch.zeros_like(x0).requires_grad_(), torch.zeros_like(x0).requires_grad_()
        self.weight = Weight(method.preset)
        self._training = torch.Generator("cpu").manual_seed(mix(1, key))
        self._testing = torch.Generator("cpu").manual_seed(mix(2, key))
        # The same for all pictures and all tests: whether one passes must not hang on the luck of its noises.
        self._common = torch.randn(method.preset.draws, *x0.shape, generator=_common(0)).to(x0)
        self.scales: list[float | None] = list(method.preset.scales) if method.target.has_text else [None]
        self.forwards = self.backwards = 0
        self.best = -1.0
        self.curve: list[tuple[int, float, float, float, float]] = []
        self.recent: list[float] = []
        self.result: Stored | None = None

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """Standard normal noises and training times of an update."""
        eps = torch.randn(n, *self.x0.shape, generator=self._training)
        u = torch.rand(n, generator=self._training)
        if self.preset.stratified:
            u = (torch.arange(n) + u) / n
        target: Any = self.method.target
        return eps.to(self.x0), target.training_times(u).to(self.x0.device)

    def check(self) -> None:
        """Does noise from q lead to the picture by now?"""
        mu, s = self.mu.detach(), self.s.detach()
        eps = self._common if self.preset.sequential else self._fresh(self.preset.draws)
        found = self._passes(mu, s, eps, self.scales)
        loss = sum(self.weight._recent) / len(self.weight._recent)
        self.curve.append(
            (self.weight.updates, loss, self.weight.value, float(divergence(mu[None], s[None])[0]), self.best)
        )
        if found is not None:
            self._succeed(*found)
        elif self.preset.patience and self.weight.low and self.weight.stalled >= self.preset.patience:
            self.end(passed=False)

    def _fresh(self, n: int) -> Tensor:
        return torch.randn(n, *self.x0.shape, generator=self._testing).to(self.x0)

    def _passes(self, mu: Tensor, s: Tensor, eps: Tensor, scales: Sequence[float | None]) -> tuple[float | None] | None:
        """The first guidance scale at which all draws succeed, in a tuple; None: at none."""
        for scale in scales:
            least = math.inf
            # One draw first: most tests of a picture that is not there yet end with it.
            parts = [eps[:1], eps[1:]] if self.preset.sequential else [eps]
            for part in parts:
                least = min(least, float(self._similar(mu, s, part, scale).min()))
                if least < self.method.beta:
                    break
            self.best = max(self.best, least)
            if least >= self.method.beta:
                if self.preset.sequential:  # the scale that passed is the likeliest to pass again
                    self.scales = [scale, *(other for other in self.scales if other != scale)]
                return (scale,)
        return None

    def _similar(self, mu: Tensor, s: Tensor, eps: Tensor, scale: float | None) -> PerSample:
        """Similarity of what noises of q lead to."""
        target, n = self.method.target, len(eps)
        before = target.forwards
        noise = mu + (s / 2).exp() * eps
        cond = None if self.cond is None else self.cond.expand(n)
        null = target.encode([""]) if scale is not None and scale > 1 else None
        options: dict[str, Any] = {} if null is None else {"guidance": float(scale or 1)}
        for step in denoise(target, noise, cond, null, steps=self.preset.steps, **options):
            last = step.x_next
        assert last is not None
        self.forwards += target.forwards - before
        return self.method.descriptor(target.decode(last)) @ self.own

    def _succeed(self, scale: float | None) -> None:
        mu, s = self.mu.detach().clone(), self.s.detach().clone()
        if self.preset.search:
            mu, s = self._walked_back(mu, s, scale)
        succeeded = None
        if self.preset.confirm:
            similar = self._similar(mu, s, self._fresh(self.preset.confirm), scale)
            succeeded = int((similar >= self.method.beta).sum()), self.preset.confirm
        self.end(passed=True, mu=mu, s=s, scale=scale, succeeded=succeeded)

    def _walked_back(self, mu: Tensor, s: Tensor, scale: float | None, halvings: int = 6) -> tuple[Tensor, Tensor]:
        """The smallest share a of (μ, s) of which noise still leads to the picture, by bisection."""
        eps = torch.randn(self.preset.search, *self.x0.shape, generator=_common(1)).to(self.x0)
        low, high = 0.0, 1.0
        if self._passes(0 * mu, 0 * s, eps, [scale]) is not None:
            return 0 * mu, 0 * s
        for _ in range(halvings):
            middle = (low + high) / 2
            if self._passes(middle * mu, middle * s, eps, [scale]) is not None:
                high = middle
            else:
                low = middle
        return high * mu, high * s

    def end(
        self, *, passed: bool, mu: Tensor | None = None, s: Tensor | None = None, scale: float | None = None,
        succeeded: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        """Write down what was found."""
        mu = self.mu.detach().clone() if mu is None else mu
        s = self.s.detach().clone() if s is None else s
        paid = float(divergence(mu[None], s[None])[0])
        rate = None if succeeded is None else stats.clopper_pearson(*succeeded)
        nats = paid * mu.numel()
        recent = self.weight._recent
        self.result = Stored(
            self.preset.name, passed, paid if passed else math.inf, nats if passed else math.inf, paid, self.best,
            sum(recent) / max(len(recent), 1), scale, self.weight.updates, succeeded, rate,
            None if rate is None else bound(nats, rate.low), self.forwards, self.backwards, self.curve, mu, s,
        )  # fmt: skip


def _common(number: int) -> torch.Generator:
    """Noises that all pictures share. Their seeds are hashed: a picture that somebody drew from seed 0 must not be kin to them."""
    return torch.Generator("cpu").manual_seed(mix(3, number))


def family_of(target: Target) -> str:
    """The key of :data:`FAMILIES` that a target belongs to."""
    if target.has_text:
        return "text"
    return "pixel" if getattr(target, "factor", 1) == 1 else "latent"


def varied(target: Target, name: str = "improved", **changes: Any) -> Preset:
    """A preset of the target's family, with other values where they are not None; it is then named after what was changed.

    Raises:
        UnknownName: as for :func:`preset`.
    """
    made = preset(name, family_of(target))
    other = {k: v for k, v in changes.items() if v is not None and v != getattr(made, k)}
    told = ", ".join(f"{k} {v}" for k, v in other.items())
    return replace(made, **other, name=f"{made.name} with {told}") if other else made
