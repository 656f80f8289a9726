"""Gaussians against their formulas, scipy and sampling."""

from __future__ import annotations

import doctest
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from worlds import DOUBLE, WORLDS, noised, rms, sample, small_gaussian, template

from mnemoscope.detect.magnitude import magnitude
from mnemoscope.errors import UsageError
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.models.sampling import denoise


def test_gaussian_follows_the_formula_on_its_page() -> None:
    world = template()
    cond, t = world.encode(["the mona lisa"]), torch.tensor(300)
    x = noised(world, ["the mona lisa"], t)
    alpha, sigma = world.alpha_sigma(t)
    expected = sigma * (x - alpha * 0.4) / ((alpha * world.std(cond)) ** 2 + sigma**2)
    torch.testing.assert_close(world.predict(x, t, cond), expected)


@pytest.mark.parametrize("t", [50, 500, 981])
def test_log_density_is_normalized_as_scipy_has_it(t: int) -> None:
    world, time = small_gaussian(), torch.tensor(t)
    cond, x = world.encode(["a cat"]), noised(world, ["a cat"], time)
    alpha, sigma = (float(v) for v in world.alpha_sigma(time))
    scale = np.sqrt((alpha * world.std(cond).flatten().numpy()) ** 2 + sigma**2)
    expected = stats.norm.logpdf(x.flatten(), alpha * world.mean(cond).flatten(), scale).sum()
    assert float(world.log_density(x, time, cond)) == pytest.approx(expected, rel=1e-10)


def test_exact_draws_follow_their_distribution() -> None:
    world, n = small_gaussian(), 4000
    cond = world.encode(["a cat"])
    drawn = world.draw(cond.expand(n), torch.Generator().manual_seed(0))
    assert (drawn.mean(0) - world.mean(cond)[0]).abs().max() < 5 * 0.5 / math.sqrt(n)
    assert (drawn.std(0) / world.std(cond)[0] - 1).abs().max() < 5 / math.sqrt(2 * n)


@pytest.mark.parametrize("prompt", ["the mona lisa", "a cat", "something never heard of"])
def test_magnitude_of_the_first_step_has_a_closed_form(prompt: str) -> None:
    world = small_gaussian()
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


def test_null_is_what_ordinary_prompts_amount_to() -> None:
    world = Gaussian(spread=0.4, scatter=0.3, latent_shape=(3, 16, 16))
    cond, null = world.encode([f"prompt {i}" for i in range(50)]), world.encode([""])
    total = world.std(cond) ** 2 + world.mean(cond) ** 2
    assert float(total.mean()) == pytest.approx(float((world.std(null) ** 2).mean()), rel=0.02)
    assert float(world.std(null).mean()) == pytest.approx(0.5)


def test_zeroing_a_word_takes_its_share_away() -> None:
    world = small_gaussian()
    cond, null = world.encode(["the mona lisa"]), world.encode([""])
    tokens = cond.tokens.clone()
    tokens[:, 1] = 0
    without, share = replace(cond, tokens=tokens), world.shares("the mona lisa")[1]
    torch.testing.assert_close(world.mean(without), (1 - share) * world.mean(cond) + share * world.mean(null))
    torch.testing.assert_close(world.std(without), share * world.std(null))


# Sampling.


def test_guidance_still_finds_the_memorized_picture() -> None:
    target = Gaussian.tiny()
    cond, null = target.encode(["the mona lisa"]), target.encode([""])
    final = sample(target, target.noise(range(4)), cond.expand(4), null)
    assert float(final.std(0).max()) < 0.01
    assert rms(final, target.mean(cond)) < 0.1


@pytest.mark.parametrize("name", ["gaussian", "gaussian-flow", "gaussian-v", "template"])
@pytest.mark.parametrize("guided", [False, True])
def test_sampler_is_the_affine_map_it_is_said_to_be(name: str, guided: bool) -> None:
    world = WORLDS[name]()
    noise, cond = world.noise(range(6)), world.encode(["the mona lisa", "a cat"])
    null = world.encode([""]) if guided else None
    gain, offset = world.sampler_map(cond, null, steps=30, guidance=4.0)
    rows = torch.tensor([0, 1, 0, 1, 0, 1])
    final = sample(world, noise, cond.select(rows), null, steps=30, guidance=4.0)
    torch.testing.assert_close(final, gain[rows] * noise + offset[rows], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["gaussian", "gaussian-flow", "template"])
def test_fine_sampling_converges_to_the_ode_map(name: str) -> None:
    world = WORLDS[name]()
    cond, noise = world.encode(["the mona lisa", "a cat"]), world.noise([0, 1])

    def error(steps: int) -> float:
        start = world.schedule(steps).timesteps[0]
        return rms(sample(world, noise, cond, steps=steps), world.ode_map(noise, start, cond))

    assert error(1000) < 0.2 * error(100)
    assert error(1000) < 2e-3


def test_ode_map_composes_and_transports_the_density() -> None:
    world = small_gaussian()
    cond = world.encode(["a cat"])
    early, late = torch.tensor(900), torch.tensor(200)
    x = noised(world, ["a cat"], early)
    middle = world.ode_map(x, early, cond, to=late)
    torch.testing.assert_close(world.ode_map(middle, late, cond), world.ode_map(x, early, cond))
    jacobian = torch.autograd.functional.jacobian(lambda y: world.ode_map(y, early, cond, to=late), x)
    volume = jacobian.reshape(x.numel(), x.numel()).det().log()
    torch.testing.assert_close(world.log_density(middle, late, cond) + volume, world.log_density(x, early, cond))


def test_sampled_moments_of_an_ordinary_prompt_match_the_closed_form() -> None:
    world = Gaussian(spread=0.5, latent_shape=(1, 2, 2), betas="ddpm", spacing="trailing", **DOUBLE)
    cond, n = world.encode(["a cat"]), 4000
    final = sample(world, world.noise(range(n)), cond.expand(n), steps=200)
    assert (final.mean(0) - world.mean(cond)[0]).abs().max() < 5 * 0.5 / math.sqrt(n) + 0.005
    assert (final.std(0) / 0.5 - 1).abs().max() < 5 / math.sqrt(2 * n) + 0.01


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
    world = template()
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
    world = small_gaussian()
    cond = world.encode(["the mona lisa", "a cat"])
    picture = world.mean(cond)[0]
    found = world.replication_probability(cond, picture)
    assert found.dtype == torch.float64
    assert float(found[0]) == 1
    assert float(found[1]) < 1e-3
    assert float(world.replication_probability(cond, picture + 0.2)[0]) == 0
    with pytest.raises(UsageError, match="steps"):
        world.replication_probability(cond, picture, null=world.encode([""]))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda: Gaussian({"a": (0.0, -1.0)}), "spread of -1"),
        (lambda: Gaussian({"a": (math.nan, 1.0)}), "finite"),
        (lambda: Gaussian({"a": (torch.zeros(5), 1.0)}), "does not fit"),
        (lambda: Gaussian.world([], {"a": torch.zeros(3, 4, 4)}), "latent_shape"),
    ],
)
def test_faults_are_named(fault: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fault()


def test_the_example_runs() -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(Gaussian, "Gaussian")
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
