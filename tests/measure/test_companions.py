"""Companions of InvMM where the answer is known: dimensions, mean shift, losses and DDIM steps by formula."""

from __future__ import annotations

import math

import pytest
import torch

from mnemoscope.errors import UsageError
from mnemoscope.measure.base import common, time_at
from mnemoscope.measure.critical_noise import CriticalNoise, grid, withstands
from mnemoscope.measure.denoising_loss import DenoisingLoss
from mnemoscope.measure.flipd import FLIPD, flipd
from mnemoscope.measure.secmi import SecMI, moved, t_error
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.models.mixture import Mixture
from mnemoscope.models.noising import split

SHAPE = (3, 8, 8)
SIZE = math.prod(SHAPE)
SPACES = pytest.mark.parametrize(
    "space",
    [{"betas": "ddpm"}, {"betas": "ddpm", "v_prediction": True}, {"space": "velocity"}],
    ids=["eps", "v", "velocity"],
)


def gaussian(mean=0.0, std=0.5, **options) -> Gaussian:
    return Gaussian({}, null=(mean, std), latent_shape=SHAPE, has_text=False, dtype=torch.float64, **options)


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


# The forward process


@SPACES
def test_split_is_the_posterior_mean_and_the_noise(space):
    world = gaussian(0.2, 0.4, **space)
    t = time_at(world, [10, 500, 900])
    x = torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0, eps = split(world, x, t, None)
    torch.testing.assert_close(x0, world.posterior_mean(x, t, None))
    sigma = world.alpha_sigma(t)[1].view(-1, 1, 1, 1)
    torch.testing.assert_close(eps, -sigma * world.score(x, t, None))


# FLIPD


@SPACES
def test_dimension_is_the_number_of_free_elements(space):
    """At little noise a direction of spread s counts 1, one of spread 0 counts 0; on the mean, ‖ε‖² adds nothing."""
    for free in (0, 1, 7, SIZE):
        std = torch.zeros(SIZE, dtype=torch.float64)
        std[:free] = 0.5
        world = gaussian(0.0, std.view(SHAPE), **space)
        images = torch.full((1, *SHAPE), 0.5)
        found = FLIPD(time=0, probes=3)(world, images)
        assert found.item() == pytest.approx(free, abs=2e-2 * free + 1e-9)


@SPACES
def test_dimension_by_formula_off_the_mean(space):
    """Σ α²s²/v + Σ σ²(α(x₀ − μ))²/v², exact for any probes, as the Jacobian is diagonal."""
    std = torch.linspace(0, 0.8, SIZE, dtype=torch.float64).view(SHAPE)
    world = gaussian(0.3, std, **space)
    images = pictures(3)
    x0 = world.encode_images(images)
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in world.alpha_sigma(time_at(world, [50])))
    v = alpha**2 * std**2 + sigma**2
    each = alpha**2 * std**2 / v + (sigma * alpha * (x0 - 0.3) / v) ** 2
    torch.testing.assert_close(FLIPD()(world, images), each.flatten(1).sum(1))


def test_a_stored_point_has_dimension_zero():
    world = Mixture.memorizer(2 * pictures(4) - 1, dtype=torch.float64, betas="ddpm")
    found = FLIPD(time=20)(world, torch.cat([pictures(4), pictures(1, seed=9)]))
    assert found[:4].abs().max() < 1e-6
    assert found[4] > 100


def test_the_trace_is_exact_on_average():
    """A mixture's Jacobian is not diagonal: probes differ, and their mean is the trace of the exact Hessian."""
    points = 0.3 * torch.randn(6, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    world = Mixture(points, 0.4, has_text=False, dtype=torch.float64, betas="ddpm")
    x0, t = world.points[:1] + 0.1, time_at(world, [500])
    alpha, sigma = (c.item() for c in world.alpha_sigma(t))
    probes = common("test", 4000, x0).sign()
    each = torch.cat([flipd(world, x0, t, None, v[None]) for v in probes[:400]])
    x = alpha * x0
    trace = world.hessian_diagonal(x, t, None).sum().item()
    exact = SIZE + sigma**2 * (trace + world.score(x, t, None).square().sum().item())
    assert each.std() > 0
    assert each.mean().item() == pytest.approx(exact, abs=4 * each.std().item() / 20)
    torch.testing.assert_close(flipd(world, x0, t, None, probes[:400]), each.mean()[None])


def test_dimension_leaves_the_grad_mode_alone():
    with torch.no_grad():
        FLIPD()(gaussian(), pictures(1))
        assert not torch.is_grad_enabled()
    assert not FLIPD()(gaussian(), pictures(1)).requires_grad


# Critical noise


def pair(half: float, **options) -> tuple[Mixture, torch.Tensor]:
    """Two points ±a with ‖a‖ = ``half``, and a picture of the first."""
    points = torch.full((2, *SHAPE), half / SIZE**0.5, dtype=torch.float64)
    points[1] *= -1
    world = Mixture(points, 0.0, has_text=False, dtype=torch.float64, **options)
    return world, world.decode(points[:1])


@SPACES
@pytest.mark.parametrize("half", [0.5, 6.0])
def test_two_points_merge_where_mean_shift_says(space, half):
    """σ_c² = a² (1 − r)/artanh(1 − r) for many iterations: the largest level of the grid below it."""
    world, image = pair(half, **space)
    for radius in (0.1, 0.5):
        exact = half * math.sqrt((1 - radius) / math.atanh(1 - radius))
        method = CriticalNoise(iterations=60, radius=radius, levels=127)
        found = method(world, image).item()
        _, sigmas = grid(world, 127)
        after = sigmas[sigmas > found][0].item()
        assert found <= exact * 1.001
        assert after >= exact * 0.999


def test_sixteen_iterations_are_nearly_enough():
    world, image = pair(2.0, betas="ddpm")
    few, many = (CriticalNoise(iterations=k)(world, image).item() for k in (16, 60))
    assert many <= few < 1.3 * many


def test_farther_neighbors_stand_more_noise():
    found = [CriticalNoise()(*pair(half, betas="ddpm")).item() for half in (0.5, 1.0, 2.0, 4.0)]
    assert found == sorted(found)
    assert len(set(found)) == 4


def test_a_picture_that_is_no_point_stands_nothing():
    world, _ = pair(2.0, betas="ddpm")
    assert CriticalNoise()(world, pictures(2)).tolist() == [0, 0]


def test_a_single_point_stands_all_there_is():
    world = gaussian(0.4, 0.0, betas="ddpm")
    sigmas = grid(world, 31)[1]
    assert CriticalNoise()(world, torch.full((1, *SHAPE), 0.7)).item() == sigmas[-1].item()


@pytest.mark.parametrize("levels", [1, 2, 6, 7, 8])
def test_bisection_finds_the_level_that_a_walk_over_the_grid_finds(levels):
    world, image = pair(1.5, betas="ddpm")
    method = CriticalNoise(levels=levels)
    times, sigmas = grid(world, levels)
    x0 = world.encode_images(image)
    walked = 0.0
    for t, sigma in zip(times, sigmas, strict=True):
        if withstands(world, x0, t.view(1), None, iterations=method.iterations, radius=method.radius).item():
            walked = sigma.item()
    before = world.forwards
    assert method(world, image).item() == walked
    assert world.forwards - before == method.forwards


def test_the_grid_rises_and_ends_where_a_flow_would_not():
    for options in ({"betas": "stable-diffusion"}, {"space": "velocity"}, {"space": "velocity", "shift": 3.0}):
        times, sigmas = grid(gaussian(**options), 31)
        assert len(times) == len(sigmas) == 31
        assert (sigmas.diff() >= 0).all()
        assert sigmas.isfinite().all()
        assert sigmas[-1] <= 50


# Denoising loss


@SPACES
def test_loss_of_a_single_point_by_formula(space):
    """With s = 0, ε̂ − ε = α(x₀ − μ)/σ and û − u = (x₀ − μ)/σ, whatever the noise."""
    world = gaussian(0.2, 0.0, **space)
    images = pictures(3)
    off = (world.encode_images(images) - 0.2).square().flatten(1).mean(1)
    alpha, sigma = world.alpha_sigma(time_at(world, [125, 375, 625, 875]))
    gain = 1 / sigma if world.space == "velocity" else alpha / sigma
    torch.testing.assert_close(DenoisingLoss(draws=4)(world, images), off * gain.square().mean())
    assert DenoisingLoss()(world, torch.full((1, *SHAPE), 0.6)).item() < 1e-12


def test_loss_of_a_gaussian_on_average():
    """(α²s²/v)² + σ²α²(x₀ − μ)²/v² per element, in expectation over noises."""
    world = gaussian(0.0, 0.5, betas="ddpm")
    images = pictures(2)
    off = world.encode_images(images).square().flatten(1).mean(1)
    alpha, sigma = world.alpha_sigma(time_at(world, range(1000)))
    v = alpha**2 * 0.25 + sigma**2
    exact = ((alpha**2 * 0.25 / v) ** 2).mean() + off * (sigma * alpha / v).square().mean()
    torch.testing.assert_close(DenoisingLoss(draws=1000)(world, images), exact, rtol=0.01, atol=0)
    torch.testing.assert_close(DenoisingLoss()(world, images), exact, rtol=0.1, atol=0)


# SecMI


@SPACES
def test_t_error_of_a_gaussian_by_formula(space):
    """A step's gain is (α'α s² + σ'σ)/v about the mean of 0, so that the error is ‖x̃_t‖² (gain there · gain back − 1)²."""
    s = 0.5
    world = gaussian(0.0, s, **space)
    images = pictures(3)

    def gain(here: int, there: int) -> float:
        (a, b), (c, d) = ([level.item() for level in world.alpha_sigma(time_at(world, [k]))] for k in (here, there))
        return (c * a * s**2 + d * b) / (a**2 * s**2 + b**2)

    led = math.prod(gain(k, k + 10) for k in range(0, 100, 10))
    wrong = led * (gain(100, 110) * gain(110, 100) - 1)
    expected = (world.encode_images(images) * wrong).square().flatten(1).mean(1)
    found = SecMI()(world, images)
    torch.testing.assert_close(found, expected)
    assert (found > 0).all()


def test_where_one_picture_is_all_there_is_every_picture_comes_back():
    """Membership is not memorization: the path to the one stored picture is straight, from wherever it starts."""
    found = SecMI()(gaussian(0.2, 0.0, betas="ddpm"), torch.cat([torch.full((1, *SHAPE), 0.6), pictures(2)]))
    assert found.max() < 1e-12


def test_smaller_strides_come_back_better():
    world, images = gaussian(betas="ddpm"), pictures(1)
    coarse, fine = (SecMI(stride=k)(world, images).item() for k in (20, 5))
    assert fine < coarse / 10


def test_there_and_back_is_the_sampler_s_own_step():
    """Towards clean data, the step is the schedule's."""
    world = gaussian(0.1, 0.3, betas="ddpm")
    plan = world.schedule(10)
    x = torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    t, to = plan.timesteps[3], plan.timesteps[4]
    theirs = plan.step(world.output(x, t, None), t, x)
    torch.testing.assert_close(moved(world, x, t.view(1), to.view(1), None), theirs)
    assert t_error(world, x, torch.tensor([0, 10, 20]), None).shape == (2,)


# Refusals


@pytest.mark.parametrize(
    "make",
    [
        lambda: FLIPD(time=1000),
        lambda: FLIPD(probes=0),
        lambda: CriticalNoise(iterations=0),
        lambda: CriticalNoise(radius=0.0),
        lambda: CriticalNoise(levels=0),
        lambda: DenoisingLoss(draws=0),
        lambda: SecMI(time=105),
        lambda: SecMI(time=990),
        lambda: SecMI(stride=0),
    ],
)
def test_options_out_of_range_are_named(make):
    with pytest.raises(UsageError, match=r"must be|use a time"):
        make()
