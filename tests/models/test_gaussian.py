"""The closed-form worlds against autograd, quadrature, scipy, sampling and each other: they are the ruler of all else."""

from __future__ import annotations

import doctest
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import Tensor

from mnemoscope.detect.magnitude import Magnitude, magnitude
from mnemoscope.errors import CannotAudit, UnknownName, UsageError
from mnemoscope.models import gaussian
from mnemoscope.models.base import Schedule, Target
from mnemoscope.models.gaussian import ClosedForm, Gaussian, Mixture
from mnemoscope.models.sampling import denoise, null_output

SMALL = (2, 2, 3)
DOUBLE: dict[str, Any] = {"dtype": torch.float64}
PROMPTS = ["the mona lisa", "a cat", ""]


def _gaussian(**options: Any) -> Gaussian:
    return Gaussian.world(["a cat"], ["the mona lisa"], latent_shape=SMALL, **DOUBLE, **options)


def _template(**options: Any) -> Gaussian:
    """Half of the elements come out alike every time."""
    spread = torch.tensor([0.0, 0.3, 0.7]).expand(SMALL)
    return Gaussian({"the mona lisa": (0.4, spread)}, latent_shape=SMALL, **DOUBLE, **options)


def _mixture(**options: Any) -> Mixture:
    return Mixture.world(["a cat"], ["the mona lisa"], components=3, rare=0.1, latent_shape=SMALL, **DOUBLE, **options)


WORLDS = {
    "gaussian": _gaussian,
    "gaussian-flow": lambda: _gaussian(space="velocity"),
    "gaussian-v": lambda: _gaussian(v_prediction=True),
    "template": _template,
    "mixture": _mixture,
    "mixture-flow": lambda: _mixture(space="velocity"),
}


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> ClosedForm:
    return WORLDS[request.param]()


def _times(world: ClosedForm) -> list[Tensor]:
    """From almost pure noise to little."""
    return [torch.tensor(t) for t in ((0.98, 0.5, 0.1) if world.space == "velocity" else (981, 500, 100))]


def _noised(world: ClosedForm, prompts: list[str], t: Tensor, seed: int = 0) -> Tensor:
    """x_t of exact samples x₀ of the prompts."""
    generator = torch.Generator().manual_seed(seed)
    x0 = world.draw(world.encode(prompts), generator)
    alpha, sigma = world.alpha_sigma(t)
    return alpha * x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=x0.dtype)


def _sample(world: ClosedForm, noise: Tensor, cond: Any, null: Any = None, **options: Any) -> Tensor:
    """The final state."""
    last = None
    for step in denoise(world, noise, cond, null, **options):
        last = step.x_next
    assert last is not None
    return last


def _rms(a: Tensor, b: Tensor | float = 0.0) -> float:
    return float((a - b).square().mean().sqrt())


# Exact quantities against autograd, finite differences, quadrature and scipy.


def test_eps_is_minus_sigma_times_the_gradient_of_the_log_density(world: ClosedForm) -> None:
    cond = world.encode(PROMPTS)
    for t in _times(world):
        x = _noised(world, PROMPTS, t).requires_grad_()
        alpha, sigma = world.alpha_sigma(t)
        (score,) = torch.autograd.grad(world.log_density(x, t, cond).sum(), x)
        prediction, x0 = world.predict(x, t, cond), world.posterior_mean(x, t, cond)
        eps = prediction + x0 if world.space == "velocity" else prediction
        torch.testing.assert_close(eps, -sigma * score, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(world.score(x, t, cond), score, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(x0, (x + sigma**2 * score) / alpha, rtol=1e-8, atol=1e-8)


def test_score_matches_finite_differences(world: ClosedForm) -> None:
    t = _times(world)[1]
    cond, x, h = world.encode(["a cat"]), _noised(world, ["a cat"], t), 1e-5
    steps = h * torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape[1:])
    many = cond.expand(len(steps))
    slope = (world.log_density(x + steps, t, many) - world.log_density(x - steps, t, many)) / (2 * h)
    torch.testing.assert_close(world.score(x, t, cond).flatten(), slope, rtol=1e-6, atol=1e-7)


def test_hessian_matches_autograd(world: ClosedForm) -> None:
    generator = torch.Generator().manual_seed(1)
    for t in _times(world):
        for prompt in PROMPTS:
            cond, x = world.encode([prompt]), _noised(world, [prompt], t)
            full = torch.autograd.functional.hessian(lambda y, t=t, c=cond: world.log_density(y, t, c).sum(), x)
            full = full.reshape(x.numel(), x.numel())
            v = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            scale = float(full.abs().max())
            product = world.hessian_vector(x, t, cond, v).flatten()
            torch.testing.assert_close(product, full @ v.flatten(), rtol=1e-7, atol=1e-9 * scale)
            diagonal = world.hessian_diagonal(x, t, cond).flatten()
            torch.testing.assert_close(diagonal, full.diagonal(), rtol=1e-7, atol=1e-9 * scale)


def test_jacobian_of_eps_is_minus_sigma_hessian() -> None:
    world = _mixture()
    t = torch.tensor(500)
    cond, x = world.encode(["a cat"]), _noised(world, ["a cat"], t)
    v = torch.ones_like(x)
    _, pushed = torch.autograd.functional.jvp(lambda y: world.predict(y, t, cond), x, v)
    torch.testing.assert_close(pushed, -world.alpha_sigma(t)[1] * world.hessian_vector(x, t, cond, v))


def test_gaussian_follows_the_formula_on_its_page() -> None:
    world = _template()
    cond, t = world.encode(["the mona lisa"]), torch.tensor(300)
    x = _noised(world, ["the mona lisa"], t)
    alpha, sigma = world.alpha_sigma(t)
    expected = sigma * (x - alpha * 0.4) / ((alpha * world.std(cond)) ** 2 + sigma**2)
    torch.testing.assert_close(world.predict(x, t, cond), expected)


@pytest.mark.parametrize("t", [50, 500, 981])
def test_log_densities_are_normalized_as_scipy_has_them(t: int) -> None:
    time = torch.tensor(t)
    ordinary, mixed = _gaussian(), _mixture()
    x = _noised(ordinary, ["a cat"], time)
    alpha, sigma = (float(v) for v in ordinary.alpha_sigma(time))

    cond = ordinary.encode(["a cat"])
    scale = np.sqrt((alpha * ordinary.std(cond).flatten().numpy()) ** 2 + sigma**2)
    expected = stats.norm.logpdf(x.flatten(), alpha * ordinary.mean(cond).flatten(), scale).sum()
    assert float(ordinary.log_density(x, time, cond)) == pytest.approx(expected, rel=1e-10)

    cond = mixed.encode(["a cat"])
    parts = [
        math.log(weight) + stats.norm.logpdf(x.flatten(), alpha * mu.flatten(), math.hypot(alpha * s, sigma)).sum()
        for weight, mu, s in zip(mixed.weights(cond)[0].tolist(), mixed.points, mixed.spread.tolist(), strict=True)
        if weight > 0
    ]
    assert float(mixed.log_density(x, time, cond)) == pytest.approx(np.logaddexp.reduce(parts), rel=1e-10)


@pytest.mark.parametrize("space", ["eps", "velocity"])
def test_posterior_mean_and_variance_match_quadrature_in_one_dimension(space: str) -> None:
    points, spread, weights = [-0.8, 0.1, 0.7], [0.05, 0.4, 0.2], [1.0, 5.0, 2.0]
    world = Mixture(torch.tensor(points).view(3, 1, 1, 1), spread, null=weights, has_text=False, space=space, **DOUBLE)
    t = torch.tensor(0.6) if space == "velocity" else torch.tensor(600)
    alpha, sigma = (float(v) for v in world.alpha_sigma(t))
    x = 0.35

    def moment(k: int) -> float:
        def integrand(x0: float) -> float:
            prior = sum(w * stats.norm.pdf(x0, m, s) for w, m, s in zip(weights, points, spread, strict=True))
            return x0**k * prior * stats.norm.pdf(x, alpha * x0, sigma)

        return integrate.quad(integrand, -4, 4, points=points, epsabs=1e-13, limit=200)[0]

    mean = moment(1) / moment(0)
    variance = moment(2) / moment(0) - mean**2
    state = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
    assert float(world.posterior_mean(state, t, None)) == pytest.approx(mean, rel=1e-7)
    hessian = (alpha**2 * variance / sigma**2 - 1) / sigma**2
    assert float(world.hessian_diagonal(state, t, None)) == pytest.approx(hessian, rel=1e-6)
    eps = (x - alpha * mean) / sigma
    expected = eps - mean if space == "velocity" else eps
    assert float(world.predict(state, t, None)) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("space", ["eps", "velocity"])
def test_mixture_of_one_component_is_the_gaussian(space: str) -> None:
    point = torch.linspace(-1, 1, 12, dtype=torch.float64).view(1, *SMALL)
    mixed = Mixture(point, 0.3, has_text=False, space=space, **DOUBLE)
    plain = Gaussian(null=(point[0], 0.3), has_text=False, latent_shape=SMALL, space=space, **DOUBLE)
    x = plain.noise([0, 1])
    for t in _times(plain):
        for ask in ("predict", "score", "posterior_mean", "log_density", "hessian_diagonal"):
            torch.testing.assert_close(getattr(mixed, ask)(x, t, None), getattr(plain, ask)(x, t, None))
        v = torch.ones_like(x)
        torch.testing.assert_close(mixed.hessian_vector(x, t, None, v), plain.hessian_vector(x, t, None, v))
    image = point[0] + 0.1
    torch.testing.assert_close(
        mixed.replication_probability(None, image, radius=0.3), plain.replication_probability(None, image, radius=0.3)
    )


def test_times_may_differ_within_a_batch(world: ClosedForm) -> None:
    times = torch.stack(_times(world))
    x, cond = world.noise([0, 1, 2]), world.encode(PROMPTS)
    together = world.predict(x, times, cond)
    apart = [world.predict(x[i : i + 1], times[i], cond.select(torch.tensor([i]))) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(apart))


# Magnitude and significance.


@pytest.mark.parametrize("prompt", ["the mona lisa", "a cat", "something never heard of"])
def test_magnitude_of_the_first_step_has_a_closed_form(prompt: str) -> None:
    world = _gaussian()
    cond, null, noise = world.encode([prompt]), world.encode([""]), world.noise([3])
    step = next(denoise(world, noise, cond, null))
    assert step.t == 981
    alpha, sigma = 0.07602, math.sqrt(1 - 0.07602**2)  # √ᾱ_981
    eps = [
        sigma * (noise - alpha * mean) / ((alpha * std) ** 2 + sigma**2)
        for mean, std in ((world.mean(each), world.std(each)) for each in (cond, null))
    ]
    expected = float((eps[0] - eps[1]).norm())
    assert float(magnitude(step.cond, step.uncond)) == pytest.approx(expected, rel=1e-3)


def test_memorized_prompts_stand_out_at_the_first_step() -> None:
    for make in (Gaussian, Mixture):
        target = make.tiny()
        null = target.encode([""])
        prompts = ["the mona lisa"] * 4 + ["a cat"] * 4 + ["anything else"] * 4
        step = next(denoise(target, target.noise([0, 1, 2, 3] * 3), target.encode(prompts), null))
        d = magnitude(step.cond, step.uncond)
        assert d[:4].min() > d[4:].max()


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("n", [1, 3, 8, 13])
def test_empty_prompt_scores_exactly_zero(name: str, n: int) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        make = Mixture if "mixture" in name else Gaussian
        world = make.tiny(space="velocity" if "flow" in name else "eps", v_prediction=name.endswith("-v"), dtype=dtype)
        null, noise = world.encode([""]), world.noise(range(n))
        bank = null_output(world, noise, null, steps=4)
        for first in (None, bank):
            detector = Magnitude(steps=4)
            for step in denoise(world, noise, null.expand(n), null, steps=4, first_null=first):
                detector.update(step)
            assert torch.equal(detector.per_step(), torch.zeros(n, 4))


@pytest.mark.parametrize("make", [_gaussian, _mixture])
def test_flow_identities(make: Any) -> None:
    """Δε = (1 − t) Δu, Δx̂₀ = −t Δu; at t = 1 Δε is exactly 0, and Δu is not."""
    world = make(space="velocity")
    cond, null = world.encode(["the mona lisa"]), world.encode([""])
    for t in (1.0, 0.98, 0.5, 0.1):
        time = torch.tensor(t, dtype=torch.float64)
        x = _noised(world, ["the mona lisa"], time)
        du = world.predict(x, time, cond) - world.predict(x, time, null)
        dx0 = world.posterior_mean(x, time, cond) - world.posterior_mean(x, time, null)
        deps = -world.alpha_sigma(time)[1] * (world.score(x, time, cond) - world.score(x, time, null))
        torch.testing.assert_close(deps, (1 - t) * du, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(dx0, -t * du, rtol=1e-9, atol=1e-12)
        if t == 1.0:
            assert torch.equal(deps, torch.zeros_like(deps))
            torch.testing.assert_close(du, -dx0)
            assert float(du.norm()) > 0.5


def test_v_prediction_differs_by_alpha() -> None:
    plain, v_world = _gaussian(), _gaussian(v_prediction=True)
    cond, null, t, x = plain.encode(["the mona lisa"]), plain.encode([""]), torch.tensor(981), plain.noise([0])
    alpha, sigma = plain.alpha_sigma(t)
    raw = v_world.output(x, t, cond)
    torch.testing.assert_close(raw, alpha * plain.predict(x, t, cond) - sigma * plain.posterior_mean(x, t, cond))
    delta = raw - v_world.output(x, t, null)
    torch.testing.assert_close(alpha * delta, plain.predict(x, t, cond) - plain.predict(x, t, null))
    torch.testing.assert_close(v_world.predict(x, t, cond), plain.predict(x, t, cond))


@pytest.mark.parametrize("prompt", ["the mona lisa", "a cat", "seven words that nobody ever wrote down"])
def test_significance_matches_autograd(world: ClosedForm, prompt: str) -> None:
    null = world.encode([""]).expand(2)
    for t in _times(world):
        cond = world.encode([prompt]).expand(2)
        tokens = cond.tokens.requires_grad_()
        x = _noised(world, [prompt] * 2, t)
        d = (world.predict(x, t, replace(cond, tokens=tokens)) - world.predict(x, t, null)).flatten(1).norm(dim=1)
        (gradient,) = torch.autograd.grad(d.sum(), tokens)
        with torch.no_grad():
            exact = world.significance(x, t, cond)
        torch.testing.assert_close(exact, gradient.norm(dim=2), rtol=1e-6, atol=1e-12)
        if float(d.detach().min()) > 1e-6:
            assert float(exact[:, : len(prompt.split())].min()) > 0


@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_tokens_pushed_too_far_stay_meaningful(name: str) -> None:
    """Three times the prompt: spreads and weights go below 0, where s counts as |s| and π as 0."""
    world, t = WORLDS[name](), torch.tensor(700)
    cond, x = world.encode(["the mona lisa"]), world.noise([0])
    tokens = (3 * cond.tokens).requires_grad_()
    pushed = replace(cond, tokens=tokens)
    d = (world.predict(x, t, pushed) - world.predict(x, t, world.encode([""]))).norm()
    (gradient,) = torch.autograd.grad(d, tokens)
    with torch.no_grad():
        torch.testing.assert_close(world.significance(x, t, pushed), gradient.norm(dim=2), rtol=1e-6, atol=1e-12)
        if isinstance(world, Mixture):
            torch.testing.assert_close(world.weights(pushed)[0], torch.tensor([1.0, 0, 0, 0], dtype=torch.float64))
        else:
            assert float(world.std(pushed).min()) > 0


def test_significance_ranks_words_by_their_share() -> None:
    world = _gaussian(word_weights={"the": 1.0, "mona": 6.0, "lisa": 3.0})
    assert world.shares("the mona lisa") == pytest.approx([0.1, 0.6, 0.3])
    x, t = world.noise([0]), torch.tensor(981)
    found = world.significance(x, t, world.encode(["the mona lisa"]))[0, :4]
    torch.testing.assert_close(found / found.sum(), torch.tensor([0.1, 0.6, 0.3, 0.0], dtype=torch.float64))
    assert float(world.significance(x, t, world.encode([""])).abs().max()) == 0


@given(st.lists(st.text(alphabet="abcdé", min_size=1, max_size=4), min_size=1, max_size=24))
@settings(max_examples=50, deadline=None)
def test_shares_are_positive_and_sum_to_one(words: list[str]) -> None:
    shares = Gaussian().shares(" ".join(words))
    assert len(shares) == len(words)
    assert min(shares) > 0
    assert sum(shares) == pytest.approx(1)


def test_zeroing_a_word_takes_its_share_away() -> None:
    world = _gaussian()
    cond, null = world.encode(["the mona lisa"]), world.encode([""])
    tokens = cond.tokens.clone()
    tokens[:, 1] = 0
    without, share = replace(cond, tokens=tokens), world.shares("the mona lisa")[1]
    torch.testing.assert_close(world.mean(without), (1 - share) * world.mean(cond) + share * world.mean(null))
    torch.testing.assert_close(world.std(without), share * world.std(null))

    mixed = _mixture()
    cond, null = mixed.encode(["the mona lisa"]), mixed.encode([""])
    tokens = cond.tokens.clone()
    tokens[:, 1] = 0
    blend = (1 - share) * mixed.weights(cond) + share * mixed.weights(null)
    torch.testing.assert_close(mixed.weights(replace(cond, tokens=tokens)), blend)


def test_tokens_of_the_null_can_be_learned() -> None:
    """An empty prompt has no effect, yet its places are open to a soft prompt."""
    world = _gaussian()
    null, t, x = world.encode([""]), torch.tensor(500), world.noise([0])
    tokens = null.tokens.requires_grad_()
    (gradient,) = torch.autograd.grad(world.predict(x, t, replace(null, tokens=tokens)).sum(), tokens)
    assert bool((gradient.norm(dim=2) > 0).all())


# Sampling.


@pytest.mark.parametrize("space", ["eps", "velocity"])
@pytest.mark.parametrize("make", [Gaussian, Mixture])
def test_memorized_prompt_collapses_to_its_image(make: Any, space: str) -> None:
    picture = torch.rand((3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    target = make.world(["a cat"], {"the mona lisa": picture}, latent_shape=(3, 4, 4), space=space, **DOUBLE)
    noise = target.noise(range(4))
    finals = {}
    for prompt in ("the mona lisa", "a cat"):
        finals[prompt] = _sample(target, noise, target.encode([prompt]).expand(4), steps=20)
    assert float((finals["the mona lisa"] - picture).abs().max()) < 1e-9
    assert float(finals["a cat"].std(0).mean()) > 0.2
    shown = target.decode(finals["the mona lisa"])
    torch.testing.assert_close(shown, ((picture + 1) / 2).float().expand(4, -1, -1, -1))


def test_guidance_still_finds_the_memorized_picture() -> None:
    target = Gaussian.tiny()
    cond, null = target.encode(["the mona lisa"]), target.encode([""])
    final = _sample(target, target.noise(range(4)), cond.expand(4), null)
    assert float(final.std(0).max()) < 0.01
    assert _rms(final, target.mean(cond)) < 0.1


@pytest.mark.parametrize("name", ["gaussian", "gaussian-flow", "gaussian-v", "template"])
@pytest.mark.parametrize("guided", [False, True])
def test_sampler_is_the_affine_map_it_is_said_to_be(name: str, guided: bool) -> None:
    world = WORLDS[name]()
    noise, cond = world.noise(range(6)), world.encode(["the mona lisa", "a cat"])
    null = world.encode([""]) if guided else None
    gain, offset = world.sampler_map(cond, null, steps=30, guidance=4.0)
    rows = torch.tensor([0, 1, 0, 1, 0, 1])
    final = _sample(world, noise, cond.select(rows), null, steps=30, guidance=4.0)
    torch.testing.assert_close(final, gain[rows] * noise + offset[rows], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["gaussian", "gaussian-flow", "template"])
def test_fine_sampling_converges_to_the_ode_map(name: str) -> None:
    world = WORLDS[name]()
    cond, noise = world.encode(["the mona lisa", "a cat"]), world.noise([0, 1])

    def error(steps: int) -> float:
        start = world.schedule(steps).timesteps[0]
        return _rms(_sample(world, noise, cond, steps=steps), world.ode_map(noise, start, cond))

    assert error(1000) < 0.2 * error(100)
    assert error(1000) < 2e-3


def test_ode_map_composes_and_transports_the_density() -> None:
    world = _gaussian()
    cond = world.encode(["a cat"])
    early, late = torch.tensor(900), torch.tensor(200)
    x = _noised(world, ["a cat"], early)
    middle = world.ode_map(x, early, cond, to=late)
    torch.testing.assert_close(world.ode_map(middle, late, cond), world.ode_map(x, early, cond))
    jacobian = torch.autograd.functional.jacobian(lambda y: world.ode_map(y, early, cond, to=late), x)
    volume = jacobian.reshape(x.numel(), x.numel()).det().log()
    torch.testing.assert_close(world.log_density(middle, late, cond) + volume, world.log_density(x, early, cond))


def test_sampled_moments_of_an_ordinary_prompt_match_the_closed_form() -> None:
    world = Gaussian(spread=0.5, latent_shape=(1, 2, 2), betas="ddpm", spacing="trailing", **DOUBLE)
    cond, n = world.encode(["a cat"]), 4000
    final = _sample(world, world.noise(range(n)), cond.expand(n), steps=200)
    assert (final.mean(0) - world.mean(cond)[0]).abs().max() < 5 * 0.5 / math.sqrt(n) + 0.005
    assert (final.std(0) / 0.5 - 1).abs().max() < 5 / math.sqrt(2 * n) + 0.01


def test_exact_draws_follow_their_distribution() -> None:
    generator, n = torch.Generator().manual_seed(0), 4000
    plain, mixed = _gaussian(), _mixture()
    cond = plain.encode(["a cat"])
    drawn = plain.draw(cond.expand(n), generator)
    assert (drawn.mean(0) - plain.mean(cond)[0]).abs().max() < 5 * 0.5 / math.sqrt(n)
    assert (drawn.std(0) / plain.std(cond)[0] - 1).abs().max() < 5 / math.sqrt(2 * n)
    cond = mixed.encode(["a cat"])
    drawn = mixed.draw(cond.expand(n), generator)
    copies = int((drawn == mixed.points[0]).flatten(1).all(1).sum())
    interval = stats.binomtest(copies, n).proportion_ci(0.999)
    assert interval.low < float(mixed.weights(cond)[0, 0]) < interval.high


# Replication.


def test_replication_probability_of_gaussians_matches_sampling() -> None:
    world = Gaussian({"a cat": (0.2, 0.3)}, latent_shape=(1, 2, 2), **DOUBLE)
    cond, null, image = world.encode(["a cat"]), world.encode([""]), torch.full((1, 2, 2), 0.3, dtype=torch.float64)
    for options in ({"radius": 0.3}, {"radius": 0.13, "null": null, "guidance": 2.0}):
        exact = float(world.replication_probability(cond, image, steps=20, **options))
        found = world.estimate_replication(cond, image, n=1000, steps=20, confidence=0.999, base=7, **options)
        assert 0.05 < exact < 0.95
        assert found.n == 1000
        assert found.low < exact < found.high
        assert found.low < found.rate < found.high


def test_replication_probability_of_exact_sampling() -> None:
    world = _template()
    cond, generator = world.encode(["the mona lisa", "an ordinary one"]), torch.Generator().manual_seed(0)
    ordinary = cond.select(torch.tensor([1]))
    image = world.mean(ordinary)[0] + 0.1
    exact = float(world.replication_probability(ordinary, image, radius=0.5))
    drawn = world.draw(ordinary.expand(2000), generator)
    inside = int(((drawn - image).square().flatten(1).mean(1) <= 0.25).sum())
    interval = stats.binomtest(inside, 2000).proportion_ci(0.999)
    assert interval.low < exact < interval.high
    with pytest.raises(UsageError, match="estimate_replication"):
        world.replication_probability(cond, world.mean(cond)[0])


def test_replication_probability_at_its_ends() -> None:
    world = _gaussian()
    cond = world.encode(["the mona lisa", "a cat"])
    picture = world.mean(cond)[0]
    found = world.replication_probability(cond, picture)
    assert found.dtype == torch.float64
    assert float(found[0]) == 1
    assert float(found[1]) < 1e-3
    assert float(world.replication_probability(cond, picture + 0.2)[0]) == 0
    with pytest.raises(UsageError, match="steps"):
        world.replication_probability(cond, picture, null=world.encode([""]))


@pytest.mark.parametrize(("size", "copies", "expected"), [(16, 1, 0.0625), (16, 10, 0.40), (128, 100, 0.44)])
def test_natural_weight_of_a_memorizer(size: int, copies: int, expected: float) -> None:
    world = Mixture.memorizer(size, copies)
    natural = float(world.replication_probability(None, world.points[0]))
    assert natural == pytest.approx(copies / (size - 1 + copies), rel=1e-5)
    assert natural == pytest.approx(expected, abs=0.005)
    assert world.replication_probability(None, torch.zeros(3, 8, 8)).item() == 0


@pytest.mark.parametrize("options", [{"space": "velocity"}, {"betas": "ddpm", "spacing": "trailing"}])
def test_memorizer_replicates_with_its_natural_weight(options: dict[str, Any]) -> None:
    world = Mixture.memorizer(4, copies=5, latent_shape=(1, 4, 4), **options)
    exact = float(world.replication_probability(None, world.points[0]))
    found = world.estimate_replication(None, world.points[0], n=600, steps=100, confidence=0.999)
    assert exact == pytest.approx(5 / 8)
    assert found.low < exact < found.high


def test_every_generation_of_a_memorizer_is_a_training_picture() -> None:
    world = Mixture.memorizer(5, latent_shape=(1, 4, 4))
    found = [world.estimate_replication(None, point, n=100, radius=1e-3) for point in world.points]
    assert sum(each.found for each in found) == 100


# Mixtures.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_excluded_components_stay_excluded_even_on_top_of_them(dtype: torch.dtype) -> None:
    points = Mixture.memorizer(3, latent_shape=(3, 16, 16)).points
    # Shares of many lengths: their sums round up and down, and a weight of 1e-8 left by rounding would win here.
    prompts = [" ".join(["word"] * n) for n in range(1, 25)]
    world = Mixture(points, prompts={p: [0, 1, 2] for p in prompts}, null=[3, 2, 2], dtype=dtype)
    cond, t = world.encode(prompts), torch.tensor(1)
    assert float(world.weights(cond)[:, 0].abs().max()) == 0
    tokens = cond.tokens.requires_grad_()
    x = (world.alpha_sigma(t)[0] * world.points[:1]).to(dtype).expand(len(prompts), -1, -1, -1)
    x0 = world.posterior_mean(x, t, replace(cond, tokens=tokens))
    for found in x0.detach():
        assert min(_rms(found, point) for point in world.points[1:]) < 1e-4
    (gradient,) = torch.autograd.grad(x0.sum(), tokens)
    assert bool(torch.isfinite(gradient).all())


def test_responsibilities_are_posterior_probabilities() -> None:
    world = _mixture()
    cond, t = world.encode(["a cat"]), torch.tensor(300)
    x = _noised(world, ["a cat"], t)
    alpha, sigma = (float(v) for v in world.alpha_sigma(t))
    likelihood = [
        stats.norm.pdf(x.flatten(), alpha * mu.flatten(), math.hypot(alpha * s, sigma)).prod()
        for mu, s in zip(world.points, world.spread.tolist(), strict=True)
    ]
    expected = world.weights(cond)[0].numpy() * np.array(likelihood)
    found = world.responsibilities(x, t, cond)[0]
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-8, atol=1e-15)


def test_magnitude_vanishes_late_where_the_null_knows_the_picture_too() -> None:
    """The inverted case: copies that are not rare teach the null prediction as well."""
    late = {}
    for rare in (0.0, 0.5):
        world = Mixture.world([], ["the mona lisa"], rare=rare)
        detector = Magnitude(steps=50)
        cond, null = world.encode(["the mona lisa"]), world.encode([""])
        for step in denoise(world, world.noise(range(4)), cond.expand(4), null):
            detector.update(step)
        late[rare] = detector.per_step()[:, 40:].mean()
    assert late[0.5] < 1e-3
    assert late[0.0] > 1


# Schedules.


def test_noise_schedule_has_the_known_values() -> None:
    plan = Gaussian().schedule(50)
    assert isinstance(plan, Schedule)
    assert plan.timesteps.tolist() == list(range(981, 0, -20))
    alpha, sigma = Gaussian(**DOUBLE).alpha_sigma(torch.tensor([981, 999, 481, 1]))
    np.testing.assert_allclose(alpha, [0.0760, 0.0683, 0.5498, 0.9991], atol=5e-5)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(4, dtype=torch.float64))
    assert Gaussian(spacing="trailing").schedule(50).timesteps.tolist() == list(range(999, 0, -20))
    for steps in (1, 7, 999, 1000):
        for spacing in ("leading", "trailing"):
            times = Gaussian(spacing=spacing).schedule(steps).timesteps
            assert len(times) == steps
            assert int(times.min()) >= 0
            assert int(times.max()) <= 999


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_ddim_steps_are_those_of_diffusers(spacing: str, kind: str) -> None:
    from diffusers import DDIMScheduler

    world = Gaussian(spacing=spacing, v_prediction=kind == "v_prediction")
    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1 if spacing == "leading" else 0,
        timestep_spacing=spacing,
        prediction_type=kind,
    )
    theirs.set_timesteps(10)
    plan, x, out = world.schedule(10), world.noise([0]), world.noise([1])
    assert plan.timesteps.tolist() == theirs.timesteps.tolist()
    for t in plan.timesteps:
        expected = theirs.step(out, int(t), x).prev_sample
        torch.testing.assert_close(plan.step(out, t, x), expected, rtol=1e-4, atol=1e-4)


def test_flow_steps_are_euler_steps() -> None:
    world = Gaussian(space="velocity", shift=3.0, **DOUBLE)
    plan, x, u = world.schedule(4), world.noise([0]), world.noise([1])
    torch.testing.assert_close(plan.timesteps, torch.tensor([1.0, 0.9, 0.75, 0.5], dtype=torch.float64))
    for t, later in zip(plan.timesteps, [0.9, 0.75, 0.5, 0.0], strict=True):
        torch.testing.assert_close(plan.step(u, t, x), x + (later - t) * u)


@pytest.mark.parametrize(
    ("betas", "variance", "a", "b"),
    [
        ("ddpm", 1 / 3, 0.0750, 0.0229),
        ("stable-diffusion", 1.0, 0.1844, 0.1237),
        ("latent-diffusion", 1.0, 0.1579, 0.0984),
    ],
)
def test_constants_of_the_inversion_based_measure(betas: str, variance: float, a: float, b: float) -> None:
    """A = mean[(1 − kα) kσ] and B = mean[k²σ²] with x̂₀ = k x for data N(0, v): known for three schedules."""
    world = Gaussian(null=(0.0, math.sqrt(variance)), has_text=False, betas=betas, latent_shape=(1, 1, 1), **DOUBLE)
    t = torch.arange(1000)
    alpha, sigma = world.alpha_sigma(t)
    k = world.posterior_mean(torch.ones(1000, 1, 1, 1, dtype=torch.float64), t, None).flatten()
    assert float(((1 - k * alpha) * k * sigma).mean()) == pytest.approx(a, abs=6e-5)
    assert float((k**2 * sigma**2).mean()) == pytest.approx(b, abs=6e-5)


# The promises of a Target.


@pytest.mark.parametrize("make", [Gaussian.tiny, Mixture.tiny, lambda: Mixture.memorizer(3), Gaussian])
def test_worlds_are_targets(make: Any) -> None:
    assert isinstance(make(), Target)


def test_forwards_are_counted_and_exact_answers_are_free() -> None:
    for world in (_gaussian(), _mixture()):
        cond, null, noise = world.encode(["a cat"]).expand(3), world.encode([""]), world.noise(range(3))
        final = _sample(world, noise, cond, null, steps=2)
        assert world.forwards == 12
        t = torch.tensor(500)
        world.score(noise, t, cond)
        world.log_density(noise, t, cond)
        world.significance(noise, t, cond)
        assert world.forwards == 12
        world.predict(final, t, cond)
        assert world.forwards == 15


@pytest.mark.parametrize("make", [Gaussian, Mixture])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_sample_is_the_first_of_four(make: Any, dtype: torch.dtype) -> None:
    world = make.tiny(dtype=dtype)
    assert torch.equal(world.noise([5]), world.noise([5, 6, 7, 8])[:1])
    cond, null = world.encode(["the mona lisa"]), world.encode([""])
    one = list(denoise(world, world.noise([5]), cond, null, steps=5))
    four = list(denoise(world, world.noise([5, 6, 7, 8]), cond.expand(4), null, steps=5))
    for alone, among in zip(one, four, strict=True):
        assert torch.equal(alone.cond, among.cond[:1])
        assert torch.equal(alone.x_next, among.x_next[:1])


def test_unknown_prompts_are_ordinary_and_always_the_same() -> None:
    for make in (Gaussian, Mixture):
        one, two, other = make.tiny(), make.tiny(), make.tiny(seed=1)
        unheard = one.encode(["never heard of", "never  heard\tof", "heard of never"]).tokens
        assert torch.equal(unheard, two.encode(["never heard of", "never heard of", "heard of never"]).tokens)
        pictures = [world.draw(world.encode(["the mona lisa"]), torch.Generator()) for world in (one, two, other)]
        assert torch.equal(pictures[0], pictures[1])
        assert _rms(pictures[0], pictures[2]) > 0.3
        assert torch.equal(unheard[0], unheard[1])
        assert not torch.equal(unheard[0], unheard[2])
        assert not torch.equal(unheard, other.encode(["never heard of", "never heard of", "heard of never"]).tokens)


def test_null_is_what_ordinary_prompts_amount_to() -> None:
    world = Gaussian(spread=0.4, scatter=0.3, latent_shape=(3, 16, 16))
    cond, null = world.encode([f"prompt {i}" for i in range(50)]), world.encode([""])
    total = world.std(cond) ** 2 + world.mean(cond) ** 2
    assert float(total.mean()) == pytest.approx(float((world.std(null) ** 2).mean()), rel=0.02)
    assert float(world.std(null).mean()) == pytest.approx(0.5)


def test_strict_worlds_refuse_unknown_prompts() -> None:
    world = Gaussian.world(["a cat"], ["the mona lisa"], strict=True)
    world.encode(["the  mona lisa", "a cat", ""])
    with pytest.raises(UnknownName, match="Did you mean 'the mona lisa'"):
        world.encode(["the mona lise"])


def test_words_beyond_the_context_are_not_seen() -> None:
    world = Gaussian({"a b c": (0.1, 0.0)}, context=3, latent_shape=SMALL)
    assert world.tokens("a b c d e") == ["a", "b", "c"]
    assert world.dropped("a b c d e") == 2
    assert world.dropped("a b") == 0
    assert torch.equal(world.encode(["a b c d e"]).tokens, world.encode(["a b c"]).tokens)


@pytest.mark.parametrize("make", [Gaussian, Mixture])
def test_identity_is_plain_and_tells_worlds_apart(make: Any) -> None:
    identity = make.tiny().identity()
    assert json.loads(json.dumps(identity)) == identity
    assert make.tiny().identity() == identity
    others = [
        make.tiny(seed=1),
        make.tiny(space="velocity"),
        make.tiny(dtype=torch.float64),
        make.tiny(betas="ddpm"),
        make.tiny(word_weights={"cat": 2.0}),
        make.world(["a cat"], ["the mona lisa"]),
        make.world(["a cat", "two dogs on a beach"], {"the mona lisa": torch.zeros(3, 8, 8)}),
    ]
    assert len({json.dumps(each.identity(), sort_keys=True) for each in others} | {json.dumps(identity)}) == 8


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 16])
def test_pictures_go_in_and_out(channels: int) -> None:
    world = Gaussian(latent_shape=(channels, 4, 6))
    images = torch.rand((2, 3, 4, 6), generator=torch.Generator().manual_seed(0))
    x0 = world.encode_images(images)
    assert x0.shape == (2, channels, 4, 6)
    shown = world.decode(x0)
    assert shown.dtype == torch.float32
    if channels >= 3:
        torch.testing.assert_close(shown, images)
    if channels == 1:
        torch.testing.assert_close(shown, images.mean(1, keepdim=True).expand(-1, 3, -1, -1))
    loud = world.decode(100 * world.noise([0]))
    assert (float(loud.min()), float(loud.max())) == (0, 1)
    with pytest.raises(UsageError, match="6×4"):
        world.encode_images(torch.zeros(1, 3, 8, 8))


def test_bfloat16_rounds_outputs_only() -> None:
    rough, fine = Gaussian.tiny(dtype=torch.bfloat16), Gaussian.tiny()
    x, t = rough.noise([0]), torch.tensor(981)
    cond = rough.encode(["the mona lisa"])
    assert rough.output(x, t, cond).dtype == torch.bfloat16
    assert rough.predict(x, t, cond).dtype == torch.float32
    torch.testing.assert_close(rough.predict(x, t, cond), fine.predict(x.float(), t, cond), rtol=0.01, atol=1e-6)


def test_worlds_without_text() -> None:
    world = Gaussian(null=(0.3, 0.2), has_text=False, latent_shape=SMALL)
    x, t = world.noise([0, 1]), torch.tensor(500)
    assert world.predict(x, t, None).shape == x.shape
    for ask in (lambda: world.encode(["a cat"]), lambda: world.tokens("a cat"), lambda: world.dropped("a cat")):
        with pytest.raises(CannotAudit, match="has_text"):
            ask()
    with pytest.raises(CannotAudit, match="encode"):
        Gaussian.tiny().predict(torch.zeros(1, 3, 8, 8), t, None)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda: Gaussian(betas="sd"), "noise schedule"),
        (lambda: Gaussian(space="x0"), "prediction space"),
        (lambda: Gaussian(spacing="linear"), "spacing"),
        (lambda: Gaussian(space="velocity", v_prediction=True), "v_prediction"),
        (lambda: Gaussian(context=0), "context"),
        (lambda: Gaussian(word_weights={"a": 0.0}), "word_weights"),
        (lambda: Gaussian({"": (0.0, 1.0)}), "null"),
        (lambda: Gaussian({"a b": (0.0, 1.0), "a  b": (0.0, 1.0)}), "twice"),
        (lambda: Gaussian({"a b c": (0.0, 1.0)}, context=2), "3 words"),
        (lambda: Gaussian({"a": (0.0, -1.0)}), "spread of -1"),
        (lambda: Gaussian({"a": (math.nan, 1.0)}), "finite"),
        (lambda: Gaussian({"a": (torch.zeros(5), 1.0)}), "does not fit"),
        (lambda: Gaussian.world([], {"a": torch.zeros(3, 4, 4)}), "latent_shape"),
        (lambda: Mixture.world([], {"a": torch.zeros(3, 4, 4)}), "latent_shape"),
        (lambda: Mixture.world([], ["a"], rare=1.5), "0 or more"),
        (lambda: Gaussian().schedule(0), "steps=0"),
        (lambda: Gaussian().schedule(1001), "steps=1001"),
        (lambda: Mixture(torch.zeros(0, 1, 1, 1)), "empty"),
        (lambda: Mixture(torch.zeros(2, 1, 1, 1), -0.5), "spread of -0.5"),
        (lambda: Mixture(torch.zeros(2, 1, 1, 1), null=[0, 0]), "not all 0"),
        (lambda: Mixture(torch.zeros(2, 1, 1, 1), null=[1, 2, 3]), "does not fit"),
        (lambda: Gaussian().predict(torch.zeros(1, 1, 1, 1), torch.tensor(1), Gaussian().encode([""])), "built for"),
        (lambda: Gaussian().predict(torch.zeros(2, 3, 8, 8), torch.tensor(1), Gaussian().encode([""])), "2 samples"),
    ],
)
def test_faults_are_named(fault: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fault()


def test_the_example_runs() -> None:
    found = doctest.DocTestFinder().find(Gaussian, "Gaussian", globs={"Gaussian": Gaussian, "denoise": denoise})
    results = [doctest.DocTestRunner().run(each) for each in found if each.examples]
    assert [each.failed for each in results] == [0]
    assert gaussian.__all__ == sorted(gaussian.__all__)
