"""Mixtures against quadrature, scipy, sampling and the Gaussian."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from worlds import DOUBLE, SMALL, noised, rms, small_mixture, times

from mnemoscope.detect.magnitude import Magnitude
from mnemoscope.errors import UsageError
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.models.mixture import Mixture
from mnemoscope.models.sampling import denoise


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
    for t in times(plain):
        for ask in ("predict", "score", "posterior_mean", "log_density", "hessian_diagonal"):
            torch.testing.assert_close(getattr(mixed, ask)(x, t, None), getattr(plain, ask)(x, t, None))
        v = torch.ones_like(x)
        torch.testing.assert_close(mixed.hessian_vector(x, t, None, v), plain.hessian_vector(x, t, None, v))
    image = point[0] + 0.1
    torch.testing.assert_close(
        mixed.replication_probability(None, image, radius=0.3), plain.replication_probability(None, image, radius=0.3)
    )


@pytest.mark.parametrize("t", [50, 500, 981])
def test_log_density_is_normalized_as_scipy_has_it(t: int) -> None:
    world, time = small_mixture(), torch.tensor(t)
    cond, x = world.encode(["a cat"]), noised(world, ["a cat"], time)
    alpha, sigma = (float(v) for v in world.alpha_sigma(time))
    parts = [
        math.log(weight) + stats.norm.logpdf(x.flatten(), alpha * mu.flatten(), math.hypot(alpha * s, sigma)).sum()
        for weight, mu, s in zip(world.weights(cond)[0].tolist(), world.points, world.spread.tolist(), strict=True)
        if weight > 0
    ]
    assert float(world.log_density(x, time, cond)) == pytest.approx(np.logaddexp.reduce(parts), rel=1e-10)


def test_responsibilities_are_posterior_probabilities() -> None:
    world = small_mixture()
    cond, t = world.encode(["a cat"]), torch.tensor(300)
    x = noised(world, ["a cat"], t)
    alpha, sigma = (float(v) for v in world.alpha_sigma(t))
    likelihood = [
        stats.norm.pdf(x.flatten(), alpha * mu.flatten(), math.hypot(alpha * s, sigma)).prod()
        for mu, s in zip(world.points, world.spread.tolist(), strict=True)
    ]
    expected = world.weights(cond)[0].numpy() * np.array(likelihood)
    found = world.responsibilities(x, t, cond)[0]
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-8, atol=1e-15)


def test_exact_draws_follow_their_distribution() -> None:
    world, n = small_mixture(), 4000
    cond = world.encode(["a cat"])
    drawn = world.draw(cond.expand(n), torch.Generator().manual_seed(0))
    copies = int((drawn == world.points[0]).flatten(1).all(1).sum())
    interval = stats.binomtest(copies, n).proportion_ci(0.999)
    assert interval.low < float(world.weights(cond)[0, 0]) < interval.high


def test_zeroing_a_word_takes_its_share_away() -> None:
    world = small_mixture()
    cond, null = world.encode(["the mona lisa"]), world.encode([""])
    tokens = cond.tokens.clone()
    tokens[:, 1] = 0
    share = world.shares("the mona lisa")[1]
    blend = (1 - share) * world.weights(cond) + share * world.weights(null)
    torch.testing.assert_close(world.weights(replace(cond, tokens=tokens)), blend)


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
        assert min(rms(found, point) for point in world.points[1:]) < 1e-4
    (gradient,) = torch.autograd.grad(x0.sum(), tokens)
    assert bool(torch.isfinite(gradient).all())


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


# Replication.


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


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda: Mixture.world([], {"a": torch.zeros(3, 4, 4)}), "latent_shape"),
        (lambda: Mixture.world([], ["a"], rare=1.5), "0 or more"),
        (lambda: Mixture(torch.zeros(0, 1, 1, 1)), "empty"),
        (lambda: Mixture(torch.zeros(2, 1, 1, 1), -0.5), "spread of -0.5"),
        (lambda: Mixture(torch.zeros(2, 1, 1, 1), null=[0, 0]), "not all 0"),
        (lambda: Mixture(torch.zeros(2, 1, 1, 1), null=[1, 2, 3]), "does not fit"),
    ],
)
def test_faults_are_named(fault: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fault()
