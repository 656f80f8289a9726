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
code (its settings differ by model family). ``improved`` looks at plain noise before it learns anything; learns from opposite noises at
stratified times, which cancels most of what a single noise says by chance; looks often with a short sampler, few draws first, with the
same test noises for every picture; walks back from a success to the smallest departure from plain noise that still succeeds with the
full sampler, and counts it if five of eight fresh draws agree; it gives up early where nothing improves.

Models with text are given a caption, the empty prompt, or (the authors' way) a prompt of their own: a mixture of tokens in every place,
learned along with the noise. It costs the score nothing and nobody can type it, so a score names how its picture was prompted.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import stats
from ..bounds import AMOUNT, COUNT, FINITE, POSITIVE, SCALE, STEPS, within
from ..errors import CannotAudit, ModelFault, UnknownName, UsageError
from ..models.base import Condition, SoftText, Target, Trained, mix
from ..models.noising import noised, split
from ..models.sampling import denoise, final
from ..similarity.base import Descriptor
from ..types import Latents, PerSample, precise

__all__ = [
    "FAMILIES",
    "Course",
    "InvMM",
    "Preset",
    "Stored",
    "Weight",
    "bound",
    "divergence",
    "family_of",
    "preset",
    "varied",
]

WINDOW = 100
"""Losses that a check averages over, whatever the distance of checks."""

FINE = 16
SHARES = (0.0, *(2 ** (k / FINE - 4) for k in range(4 * FINE + 1)))
"""Of (μ, s), for the walk back: plain noise, then from 1/16 to 1, finely enough that a score is not a rung of this ladder."""

RAISED = 4
"""Levels that are tried with the full sampler and fresh draws before learning goes on: a quarter of a doubling apart, and the highest."""


PRESET = {
    "updates": AMOUNT, "batch": COUNT, "lr": POSITIVE, "every": COUNT, "draws": COUNT, "beta": FINITE, "steps": STEPS,
    "preview": AMOUNT, "search": AMOUNT, "confirm": AMOUNT, "patience": AMOUNT,
}  # fmt: skip
"""What numbers of a preset may be."""


@dataclass(frozen=True)
class Preset:
    """Every number of the algorithm.

    Attributes:
        name: What a score is labelled with.
        updates: Budget of Adam updates.
        batch: B, noises and times in an update.
        lr: Adam's learning rate, for μ, s and the prompt.
        weight: λ at the start.
        every: C, updates between checks of λ, each with a test.
        progress: ξ, by how much the loss must have fallen since the last check.
        increment: δ, what λ grows by otherwise.
        draws: Test draws.
        enough: Share of them that must succeed; also of the draws of the walk back.
        beta: β, similarity from which a draw succeeds; None: the descriptor's caller says.
        steps: Length of the sampler's schedule in tests.
        scales: Guidance scales that are tried, for models with text.
        whole: Begin sampling at the last training time, where the noise was fitted, whatever the model's own sampler leaves out.
        tau: Temperature of the learned prompt.
        paired: Noises in opposite pairs, each pair at a time from a stratum of its own, instead of B independent noises and times.
        sequential: Drop a guidance scale as soon as too many draws have failed, and use the same noises in every test.
        preview: Length of the short sampler that tests begin with; what fails there is not tested further. 0: none.
        search: Draws of each step of the walk back; 0: none, and the score is that of the first success. With a walk back there is
            a test of plain noise before the first update.
        confirm: Fresh draws after a success; 0: none.
        confirmed: Share of them that must succeed for it to count.
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
    enough: float = 1.0
    beta: float | None = 0.5
    steps: int = 50
    scales: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
    whole: bool = True
    tau: float = 2.0
    paired: bool = False
    sequential: bool = False
    preview: int = 0
    search: int = 0
    confirm: int = 0
    confirmed: float = 0.0
    patience: int = 0

    def __post_init__(self) -> None:
        for name, bound in PRESET.items():
            if getattr(self, name) is not None:
                bound.judge(name, getattr(self, name))
        for scale in self.scales:
            SCALE.judge("a guidance scale", scale)

    def spare(self, draws: int) -> int:
        """How many of so many draws may fail."""
        return draws - math.ceil(self.enough * draws)

    def most(self, *, text: bool) -> tuple[int, int]:
        """F and B that one picture can cost; several times what it is likely to.

        Args:
            text: Whether the model takes text, so that guidance scales are tried.
        """
        scales = [2 if scale > 1 else 1 for scale in self.scales] if text else [1]
        short = self.preview or self.steps
        test = self.draws * sum(scales) * short
        last = self.confirm * self.steps
        if self.search:
            bisection = self.search * len(SHARES).bit_length() * short
            test += max(scales) * (bisection + RAISED * (self.draws * self.steps + last))
        looks = self.updates // self.every + bool(self.search)
        learning = self.updates * self.batch
        return learning + looks * test + (0 if self.search else max(scales) * last), learning


FAMILIES: dict[str, Preset] = {
    "pixel": Preset("official", batch=32, increment=1e-4, steps=200),
    "latent": Preset("official", every=10, increment=5e-4),
    "text": Preset("official", whole=False),
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
            official, name="improved", updates=320, batch=16, every=8, increment=1e-3 if family == "text" else 1e-4, steps=16,
            scales=(1.0, 3.0, 5.0, 7.0), enough=7 / 8, paired=True, sequential=True, preview=8, search=16, confirm=32, confirmed=5 / 8,
            patience=5,
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
        now = self.mean
        if self._before - now < self.preset.progress:
            self.value /= 2
            self.stalled += 1
        else:
            self.value += self.preset.increment
            self.stalled = 0
        self._before = now
        return True

    @property
    def mean(self) -> float:
        """Of the last losses."""
        return sum(self._recent) / max(len(self._recent), 1)

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
    return stats.replication_bound(nats, rate)


@dataclass(frozen=True)
class Stored:
    """How strongly one picture is stored.

    Attributes:
        preset: Which algorithm; scores of different ones do not compare.
        passed: Whether noise drawn from q led to the picture within the budget.
        score: Nats per dimension; where the picture was not reached, infinity.
        nats: In all.
        paid: KL per dimension when it ended, also of a censored picture.
        similarity: How near it came: what a test's draws, but for those that may fail, all came to, in the best test.
        loss: Mean loss at the end; None: plain noise did, and nothing was learned.
        prompt: What the picture was prompted with: ``none`` (a model without text), ``given`` or ``learned``.
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
        tokens: The encoded prompt that was learned, one draw of it; None: it was given, or there is none.
    """

    preset: str
    passed: bool
    score: float
    nats: float
    paid: float
    similarity: float
    loss: float | None
    prompt: str
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
    tokens: Tensor | None = field(default=None, repr=False)

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


@dataclass(frozen=True)
class Course:
    """How pictures that are still on their way get on.

    Attributes:
        update: Updates so far.
        pictures: How many they are.
        loss: Median of their mean losses.
        weight: Median λ.
        similarity: The best that any of them has come to.
    """

    update: int
    pictures: int
    loss: float
    weight: float
    similarity: float


@dataclass(frozen=True)
class _Trial:
    """Noises of which a picture wants to know where they lead."""

    noise: Latents
    cond: Condition | None
    scale: float | None
    steps: int


_Talk = Generator[_Trial, Tensor, None]
"""A picture's test: it asks for trials and is told the similarities."""


class InvMM:
    """Measures pictures one batch at a time; each picture has its own λ, history, draws and end.

    Args:
        target: The model; its weights take no part.
        descriptor: What says how similar two pictures are.
        preset: See :func:`preset`; default: ``improved`` for the target's family.
        beta: Similarity from which a draw is the picture; default the preset's, which is of SSCD.
        rows: Samples that are drawn at a time in tests.

    Raises:
        CannotAudit: the target does not say at which times it was trained.
    """

    @within(beta=FINITE, rows=COUNT)
    def __init__(
        self, target: Target, descriptor: Descriptor, preset: Preset | None = None, *, beta: float | None = None, rows: int = 32
    ):  # fmt: skip
        if not isinstance(target, Trained):
            raise CannotAudit(
                f"{target.name} does not say at which times it was trained; give its adapter training_times and whole_schedule."
            )
        self.target, self.descriptor, self.rows = target, descriptor, rows
        self.preset = varied(target) if preset is None else preset
        found = self.preset.beta if beta is None else beta
        if found is None:
            raise UsageError(
                "beta: from which similarity on is a draw the picture? Give a calibrated one of the descriptor."
            )
        self.beta: float = found

    def __call__(
        self, images: Float[Tensor, "batch 3 rows columns"], *, prompts: Sequence[str] | None = None, keys: Sequence[int] | None = None,
        progress: Callable[[int, int, Stored], object] | None = None, watch: Callable[[Course], object] | None = None,
    ) -> list[Stored]:  # fmt: skip
        """Measure pictures.

        Args:
            images: In [0, 1].
            prompts: Captions, for a model with text; ``""`` is the empty prompt. Default: prompts are learned.
            keys: One number per picture, from which all its draws come; default 0, 1, ….
            progress: Told of each picture that is done: how many are, of how many, and its result.
            watch: Told after each test how the pictures that are still on their way get on.
        """
        n = len(images)
        keys = list(range(n)) if keys is None else list(keys)
        for what, rows in (("captions", prompts), ("keys", keys)):
            if rows is not None and len(rows) != n:
                raise UsageError(f"{len(rows)} {what} for {n} pictures: give one per picture.")
        if prompts is not None and not self.target.has_text:
            raise CannotAudit(f"{self.target.name} takes no text; measure its pictures without captions.")
        if prompts is None and self.target.has_text and not isinstance(self.target, SoftText):
            raise CannotAudit(f"{self.target.name} reads no mixtures of tokens; give captions, or empty ones.")
        cond = None if prompts is None else self.target.encode(list(prompts))
        x0 = precise(self.target.encode_images(images)).to(self.target.device)
        own = self.descriptor(images)
        runs = [
            _Run(self, x0[i], own[i], None if cond is None else cond.select(torch.tensor([i])), keys[i])
            for i in range(n)
        ]
        return self._all(runs, progress, watch)

    def _all(
        self, runs: list[_Run], progress: Callable[[int, int, Stored], object] | None = None,
        watch: Callable[[Course], object] | None = None,
    ) -> list[Stored]:  # fmt: skip
        optimizer = torch.optim.Adam([leaf for run in runs for leaf in run.leaves], lr=self.preset.lr)
        active, told = list(runs), count(1)

        def unended() -> list[_Run]:
            for run in active:
                if run.result is not None and progress is not None:
                    progress(next(told), len(runs), run.result)
            return [run for run in active if run.result is None]

        if self.preset.search:  # before anything is learned: plain noise may do
            self._serve(active)
            active = unended()
        while active:
            losses = self._update(active, optimizer)
            for run, loss in zip(active, losses, strict=True):
                run.weight.add(loss)
            updates = active[0].weight.updates
            if looked := updates % self.preset.every == 0:
                self._serve(active)
            if updates >= self.preset.updates:
                for run in active:
                    if run.result is None:
                        run.end(passed=False)
            active = unended()
            if watch is not None and looked and active:
                loss, weight = (
                    sorted(column)[len(active) // 2] for column in zip(*(r.course for r in active), strict=True)
                )
                watch(Course(updates, len(active), loss, weight, max(r.best for r in active)))
        return [run.result for run in runs if run.result is not None]

    def _update(self, active: list[_Run], optimizer: torch.optim.Optimizer) -> list[float]:
        """One Adam update of every picture that is still on its way; their losses, off the device at once."""
        b = self.preset.batch
        drawn = [run.draw(b) for run in active]
        eps, t = torch.cat([e for e, _ in drawn]), torch.cat([u for _, u in drawn])
        x0 = torch.stack([run.x0 for run in active]).repeat_interleave(b, 0)
        with torch.enable_grad():
            conds = [c for run in active if (c := run.prompted(b)) is not None]
            cond = Condition.cat(conds) if conds else None
            mu, s = (torch.stack([getattr(run, name) for run in active]) for name in ("mu", "s"))
            noise = mu.repeat_interleave(b, 0) + (s / 2).exp().repeat_interleave(b, 0) * eps
            guess, _ = split(self.target, noised(self.target, x0, t, noise), t, cond)
            wrong = (guess - x0).square().flatten(1).mean(1)
            loss = wrong.unflatten(0, (len(active), b)).mean(1)
            weight = torch.tensor([run.weight.value for run in active], dtype=loss.dtype).to(loss.device)
            total = (loss + weight * divergence(mu, s)).sum()
            leaves = [leaf for run in active for leaf in run.leaves]
            for leaf, slope in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
                leaf.grad = slope
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for run in active:
            run.forwards += b
            run.backwards += b
        losses = loss.detach().tolist()
        _require_finite(losses, self.target)
        return losses

    # Tests

    def _serve(self, runs: list[_Run]) -> None:
        """Carry out the tests of several pictures; trials that can be sampled together are."""
        talks: list[tuple[_Run, _Talk, _Trial]] = []
        for run in runs:
            talk = run.check()
            if (trial := next(talk, None)) is not None:
                talks.append((run, talk, trial))
        while talks:
            kinds: dict[tuple[float | None, int], list[tuple[_Run, _Talk, _Trial]]] = {}
            for row in talks:
                kinds.setdefault((row[2].scale, row[2].steps), []).append(row)
            talks = []
            for same in kinds.values():
                answers = self._similar([(run, trial) for run, _, trial in same])
                for (run, talk, _), answer in zip(same, answers, strict=True):
                    with suppress(StopIteration):
                        talks.append((run, talk, talk.send(answer)))

    def _similar(self, asked: list[tuple[_Run, _Trial]]) -> list[Tensor]:
        """How similar to each picture is what its noises lead to; all at one guidance scale and length."""
        trial = asked[0][1]
        noise = torch.cat([t.noise for _, t in asked])
        conds = [t.cond.expand(len(t.noise)) for _, t in asked if t.cond is not None]
        cond = Condition.cat(conds) if conds else None
        own = torch.cat([run.own.expand(len(t.noise), -1) for run, t in asked])
        before, found = self.target.forwards, []
        for rows in torch.arange(len(noise)).split(self.rows):
            part = None if cond is None else cond.select(rows)
            pictures = self.drawn(noise[rows.to(noise.device)], part, trial.scale, trial.steps)
            found.append((self.descriptor(pictures) * own[rows.to(own.device)]).sum(1))
        each = (self.target.forwards - before) // len(noise)
        for run, t in asked:
            run.forwards += each * len(t.noise)
        similar = torch.cat(found)
        _require_finite(similar.tolist(), self.target)  # a picture of NaN is not "not reproduced"
        return list(similar.split([len(t.noise) for _, t in asked]))

    @torch.no_grad()
    def drawn(
        self, noise: Latents, cond: Condition | None, scale: float | None, steps: int | None = None
    ) -> Float[Tensor, "batch 3 rows columns"]:
        """Pictures that noises lead to, sampled as tests do.

        Args:
            noise: Of q.
            cond: A prompt for each; None: a model without text.
            scale: Guidance scale; None: a model without text.
            steps: Length of the sampler's schedule; default the preset's.
        """
        target, steps = self.target, steps or self.preset.steps
        guided = scale is not None and scale > 1
        options: dict[str, Any] = {"guidance": scale} if guided else {}
        schedule: Any = getattr(target, "whole_schedule" if self.preset.whole else "schedule")
        null = target.encode([""]) if guided else None
        return target.decode(final(denoise(target, noise, cond, null, plan=schedule(steps), **options)))


class _Run:
    """One picture on its way."""

    def __init__(self, method: InvMM, x0: Tensor, own: Tensor, cond: Condition | None, key: int):
        self.method, self.preset, self.x0, self.own, self.cond = method, method.preset, x0, own, cond
        self.mu, self.s = torch.zeros_like(x0).requires_grad_(), torch.zeros_like(x0).requires_grad_()
        self.leaves = [self.mu, self.s]
        self.logits: Tensor | None = None
        if cond is None and method.target.has_text:
            target: Any = method.target
            self.logits = torch.zeros(target.mixture_shape, device=x0.device).requires_grad_()
            self.leaves.append(self.logits)
        self.weight = Weight(method.preset)
        self._training = torch.Generator("cpu").manual_seed(mix(1, key))
        self._testing = torch.Generator("cpu").manual_seed(mix(2, key))
        # The same for all pictures and all tests: whether one passes must not hang on the luck of its noises.
        self._common = torch.randn(method.preset.draws, *x0.shape, generator=_common(0)).to(x0)
        self.scales: list[float | None] = list(method.preset.scales) if method.target.has_text else [None]
        self.forwards = self.backwards = 0
        self.best = -1.0
        self.curve: list[tuple[int, float, float, float, float]] = []
        self.result: Stored | None = None

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """Standard normal noises and training times of an update."""
        pairs = (n + 1) // 2 if self.preset.paired else n
        eps = torch.randn(pairs, *self.x0.shape, generator=self._training)
        u = torch.rand(pairs, generator=self._training)
        if self.preset.paired:
            eps, u = torch.cat([eps, -eps])[:n], ((torch.arange(pairs) + u) / pairs).repeat(2)[:n]
        target: Any = self.method.target
        return eps.to(self.x0), target.training_times(u).to(self.x0.device)

    def prompted(self, n: int, generator: torch.Generator | None = None) -> Condition | None:
        """The given prompt n times, or n draws of the learned one: softmax((A + Gumbel noise)/τ) mixes the tokens."""
        if self.logits is None:
            return None if self.cond is None else self.cond.expand(n)
        u = torch.rand(n, *self.logits.shape, generator=generator or self._training).clamp(1e-20, 1 - 1e-7)
        gumbel = -(-u.log()).log()
        shares = ((self.logits + gumbel.to(self.logits)) / self.preset.tau).softmax(-1)
        target: Any = self.method.target
        return target.encode_mixture(shares)

    # Does noise from q lead to the picture by now?

    def check(self) -> _Talk:
        """A test, and what follows from it."""
        mu, s = self.mu.detach().clone(), self.s.detach().clone()
        with torch.no_grad():
            # One draw of the prompt for the whole test: what the noise found is worth, it is worth under this prompt.
            cond = self.prompted(1, self._testing)
        eps = self._common if self.preset.sequential else self._fresh(self.preset.draws)
        short = self.preset.preview or self.preset.steps
        passed = yield from self._passes(mu, s, eps, cond, self.scales, steps=short)
        if self.weight.updates:
            self.curve.append((self.weight.updates, *self.course, float(divergence(mu[None], s[None])[0]), self.best))
        if passed is not None:
            shares = (yield from self._shares(mu, s, cond, *passed)) if self.preset.search else [1.0]
            for share in shares:
                if (yield from self._holds(share * mu, share * s, cond, *passed)):
                    return
        if self.preset.patience and self.weight.low and self.weight.stalled >= self.preset.patience:
            self.end(passed=False)

    @property
    def course(self) -> tuple[float, float]:
        """Mean loss and λ."""
        return self.weight.mean, self.weight.value

    def _fresh(self, n: int) -> Tensor:
        return torch.randn(n, *self.x0.shape, generator=self._testing).to(self.x0)

    def _passes(
        self, mu: Tensor, s: Tensor, eps: Tensor, cond: Condition | None, scales: Sequence[float | None], *, steps: int | None = None,
    ) -> Generator[_Trial, Tensor, tuple[float | None] | None]:  # fmt: skip
        """The first guidance scale at which enough draws succeed, in a tuple; None: at none."""
        noise, good, spare = mu + (s / 2).exp() * eps, [], self.preset.spare(len(eps))
        # As few draws first as can fail a test: most tests of a picture that is not there yet end with them.
        first = min(1 + spare, len(noise)) if self.preset.sequential else len(noise)
        for scale in scales:
            seen: list[float] = []
            for part in filter(len, (noise[:first], noise[first:])):
                seen += (yield _Trial(part, cond, scale, steps or self.preset.steps)).tolist()
                near = sorted(seen)[spare]
                if near < self.method.beta:
                    break
            self.best = max(self.best, near)
            if near >= self.method.beta:
                good.append(scale)
                if self.preset.sequential:
                    break  # the authors' code tries every scale
        if not good:
            return None
        if self.preset.sequential:  # the scale that passed is the likeliest to pass again
            self.scales = [good[0], *(other for other in self.scales if other != good[0])]
        return (good[0],)

    def _shares(
        self, mu: Tensor, s: Tensor, cond: Condition | None, scale: float | None
    ) -> Generator[_Trial, Tensor, list[float]]:
        """The smallest share of (μ, s) of which noise still leads to the picture by the short sampler, and some above it."""
        draws, short = self.preset.search, self.preset.preview or self.preset.steps
        eps = torch.randn(draws, *self.x0.shape, generator=_common(1)).to(self.x0)

        def succeed(some: list[int], level: int) -> Generator[_Trial, Tensor, list[bool]]:
            share = SHARES[level]
            noise = share * mu + (share * s / 2).exp() * eps[some]
            similar = yield _Trial(noise, cond, scale, short)
            return (similar >= self.method.beta).tolist()

        spare = self.preset.spare(draws)
        if not self.weight.updates:  # all shares of nothing are plain noise
            passed = yield from succeed(list(range(draws)), 0)
            return [0.0] if passed.count(False) <= spare else []
        # Plain noise was looked at before; but a prompt that was learned since then may have made it enough.
        level = yield from _least(succeed, draws, spare, 0 if self.logits is None else -1)
        top = len(SHARES) - 1
        return [SHARES[k] for k in sorted({*(min(level + k * FINE // 4, top) for k in range(RAISED - 1)), top})]

    def _holds(
        self, mu: Tensor, s: Tensor, cond: Condition | None, scale: float | None
    ) -> Generator[_Trial, Tensor, bool]:
        """Whether noise from there leads to the picture by the full sampler and on fresh draws; if it does, that is the end."""
        if self.preset.search and (yield from self._passes(mu, s, self._common, cond, [scale])) is None:
            return False
        succeeded, n = None, self.preset.confirm
        if n:
            similar = yield _Trial(mu + (s / 2).exp() * self._fresh(n), cond, scale, self.preset.steps)
            succeeded = int((similar >= self.method.beta).sum()), n
            if succeeded[0] < self.preset.confirmed * n:
                return False
        learned = None if self.logits is None or cond is None else cond.tokens
        self.end(passed=True, mu=mu, s=s, scale=scale, succeeded=succeeded, tokens=learned)
        return True

    def end(
        self, *, passed: bool, mu: Tensor | None = None, s: Tensor | None = None, scale: float | None = None,
        succeeded: tuple[int, int] | None = None, tokens: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Write down what was found."""
        if self.logits is not None and tokens is None:
            with torch.no_grad():  # a picture that was not reached can be looked at as well
                prompt = self.prompted(1, self._testing)
            tokens = None if prompt is None else prompt.tokens
        mu = self.mu.detach().clone() if mu is None else mu
        s = self.s.detach().clone() if s is None else s
        paid = float(divergence(mu[None], s[None])[0])
        _require_finite([paid], self.method.target)
        rate = None if succeeded is None else stats.clopper_pearson(*succeeded)
        nats = paid * mu.numel()
        self.result = Stored(
            self.preset.name, passed, paid if passed else math.inf, nats if passed else math.inf, paid, self.best,
            self.weight.mean if self.weight.updates else None, self._prompt, scale, self.weight.updates, succeeded, rate,
            None if rate is None else bound(nats, rate.low), self.forwards, self.backwards, self.curve, mu, s, tokens,
        )  # fmt: skip

    @property
    def _prompt(self) -> str:
        if self.logits is not None:
            return "learned"
        return "none" if self.cond is None else "given"


def _require_finite(values: Sequence[float], target: Target) -> None:
    """Refuse to go on with a model that has stopped predicting numbers."""
    if not all(map(math.isfinite, values)):
        raise ModelFault(
            f"{target.name} predicted NaN or infinity while a picture was measured; load it in float32 or bfloat16, or check the "
            f"checkpoint."
        )


def _least(
    succeed: Callable[[list[int], int], Generator[_Trial, Tensor, list[bool]]], n: int, spare: int, low: int
) -> Generator[_Trial, Tensor, int]:
    """The lowest level of :data:`SHARES` above ``low`` at which all of n draws but ``spare`` succeed; the highest is taken to be one.

    By bisection with those draws alone of which it is not known yet: what succeeds at a level is taken to succeed above it.
    """
    high, unknown, failing = len(SHARES) - 1, list(range(n)), 0
    while high - low > 1:
        middle = (low + high) // 2
        passed = yield from succeed(unknown, middle)
        bad = [draw for draw, good in zip(unknown, passed, strict=True) if not good]
        if failing + len(bad) > spare:
            low, unknown = middle, bad
        else:
            high, failing, unknown = middle, failing + len(bad), [draw for draw in unknown if draw not in bad]
    return high


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
