"""Starting noise: on a Gaussian, Δ is affine in the noise, and every answer a formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mnemoscope.errors import UnknownName, UsageError
from mnemoscope.mitigate.base import Generation
from mnemoscope.mitigate.guidance import Static
from mnemoscope.mitigate.noise import SAIL, AdjustedNoise, adjust, differences, norm, objective, unit
from mnemoscope.models.gaussian import Gaussian

SHAPE = (4, 8, 8)
SCALE = (4 * 8 * 8 / 16384) ** 0.5
PROMPTS = ("the mona lisa", "a cat")


@pytest.fixture
def world():
    return Gaussian.world(["a cat"], ["the mona lisa"], latent_shape=SHAPE, dtype=torch.float64)


def start(target, prompts=PROMPTS):
    n = len(prompts)
    return Generation(target.noise(range(n)), target.encode(list(prompts)), target.encode([""]), prompts, steps=10)


def affine(world, g):
    """Slope and offset of Δ(x) = a x + b, element by element: ε = σ(x - αμ)/(α²s² + σ²) for each of the two."""
    alpha, sigma = world.alpha_sigma(world.schedule(g.steps).timesteps[0])

    def one(cond):
        mean, std = world.mean(cond), world.std(cond)
        slope = sigma / ((alpha * std) ** 2 + sigma**2)
        return slope, -slope * alpha * mean

    (a, b), (a0, b0) = one(g.cond), one(g.null)
    return a - a0, b - b0


def test_the_difference_is_minus_the_scores_times_sigma(world):
    g = start(world)
    pair = differences(world, g)(g.noise, torch.arange(2))
    t = world.schedule(g.steps).timesteps[0]
    score = world.score(g.noise, t, g.cond) - world.score(g.noise, t, g.null.expand(2))
    torch.testing.assert_close(pair.delta, -world.alpha_sigma(t)[1] * score)


def test_along_itself_the_difference_of_a_memorized_prompt_grows(world):
    """Its slope a is positive, because its variance is smaller; so a step along Δ̂ makes ‖Δ‖ larger, a step back smaller."""
    g = start(world)
    a, b = affine(world, g)
    assert bool((a[0] > 0).all())
    delta = a * g.noise + b
    moved = differences(world, g)(g.noise + 0.3 * unit(delta), torch.arange(2)).delta
    torch.testing.assert_close(moved, delta + a * 0.3 * unit(delta))
    assert bool((norm(moved) > norm(delta)).all())


def test_objective():
    delta, moved, x = torch.tensor([3.0, 4.0, 0.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2).clone().unbind(0)
    delta, moved, x = delta[None], moved[None], x[None] + 1
    assert float(objective(delta, moved, x, 0.5)) == 8 + 1
    assert float(objective(delta, moved, x, 0.5, "difference")) == 2 + 1
    assert float(norm(unit(torch.zeros(1, 1, 2, 2)))) == 0


@pytest.mark.parametrize("form", ["moved", "difference"])
def test_the_first_update_is_adams_on_the_exact_slope(world, form):
    """Adam's first step is lr against the sign of the slope, up to its ε; the slope is that of the formula."""
    g = start(world)
    a, b = affine(world, g)
    x = g.noise.clone().requires_grad_()
    delta = a * x + b
    moved = a * (x + SCALE * unit(delta)) + b
    objective(delta, moved, x, 0.05, form).sum().backward()
    found = SAIL(None, updates=1, form=form).prepare(world, g).noise
    torch.testing.assert_close(found, g.noise - 0.05 * x.grad / (x.grad.abs() + 1e-8))


def test_sail_stops_each_sample_by_itself(world):
    g = start(world, ("the mona lisa", "a cat", "a cat"))
    a, b = affine(world, g)
    delta = a * g.noise + b
    value = objective(delta, a * (g.noise + SCALE * unit(delta)) + b, g.noise, 0.05) / SCALE
    low, high = value.min(), value.max()
    prepared = SAIL(float((low + high) / 2)).prepare(world, g)
    moved = (prepared.noise != g.noise).flatten(1).any(1)
    assert torch.equal(moved, value > (low + high) / 2)
    assert 0 < int(moved.sum()) < 3
    untouched = SAIL(float(high) + 1).prepare(world, g)
    assert torch.equal(untouched.noise, g.noise)
    assert (untouched.forwards, untouched.backwards) == (12, 0)


def test_sail_spends_what_it_says(world):
    g = start(world)
    prepared = SAIL(None, updates=3).prepare(world, g)
    assert (prepared.forwards, prepared.backwards) == (2 * (4 * 3 + 2), 2 * 4 * 3)


def test_sail_goes_down(world):
    g = start(world)
    a, b = affine(world, g)

    def value(x):
        delta = a * x + b
        return objective(delta, a * (x + SCALE * unit(delta)) + b, x, 0.05)

    assert bool((value(SAIL(None).prepare(world, g).noise) < value(g.noise)).all())


def test_adjusted_noise_is_the_formula(world):
    """For Δ = a x + b a step is x - γρ a Δ̂: against the difference, towards where prompt and no prompt agree."""
    g = start(world)
    a, b = affine(world, g)
    delta = a * g.noise + b
    one = g.noise - 0.7 * 50 * SCALE * a * unit(delta)
    torch.testing.assert_close(AdjustedNoise(iterations=1).prepare(world, g).noise, one)
    torch.testing.assert_close(adjust(g.noise, delta, delta + 1, 0.5), g.noise - 0.5)
    two = AdjustedNoise(gamma=0.1).prepare(world, g)
    assert two.forwards == 2 * 8
    small = AdjustedNoise(gamma=1e-3, rho=1.0).prepare(world, g).noise
    assert bool((norm(a * small + b)[:1] < norm(delta)[:1]).all())


def test_predictions_that_are_known_are_not_made_again(world):
    g = start(world)
    pair = differences(world, g)(g.noise, torch.arange(2))
    known = AdjustedNoise().prepare(world, replace(g, first_null=pair.null, first_cond=pair.cond))
    assert known.forwards == 2 * 6
    torch.testing.assert_close(known.noise, AdjustedNoise().prepare(world, g).noise)


def test_guidance_waits_where_it_may(world):
    g = replace(start(world), guidance=3.0)
    rule = AdjustedNoise().prepare(world, g).guidance
    assert isinstance(rule, Static)
    assert (rule.start, rule.before, rule.scale) == (0.1, 0.0, 3.0)
    assert AdjustedNoise(wait=0.0).prepare(world, g).guidance == 3.0
    assert AdjustedNoise().prepare(world, replace(g, guidance=rule)).guidance is rule


def test_the_official_wait_is_five_steps_of_fifty():
    """Guidance is off at steps 0 to 4."""
    world = Gaussian.tiny()
    times = world.schedule(50).timesteps
    rule = AdjustedNoise().prepare(world, replace(start(world, ("a cat", "a cat")), steps=50)).guidance
    scales = [float(rule(float(t), torch.zeros(1, 1), 7.5)) for t in times]
    assert scales == [0.0] * 5 + [7.5] * 45


@pytest.mark.parametrize("method", [SAIL(None, updates=2), AdjustedNoise()])
def test_an_empty_prompts_noise_has_no_direction(method, target_of):
    target = target_of("sd")
    g = start(target, ("", "a cat"))
    x = method.prepare(target, g).noise
    assert x.dtype == torch.float32
    # What is left for SAIL is ‖x‖ itself, whose slope shrinks the noise alike everywhere.
    assert bool((x[0].abs() <= g.noise[0].abs() + 0.1).all())
    if isinstance(method, AdjustedNoise):
        assert torch.equal(x[0], g.noise[0])


def test_noise_keeps_its_precision_whatever_the_models(build_pipe, adapt):
    target = adapt(build_pipe("sd").to(torch.bfloat16))
    for method in (SAIL(None, updates=1), AdjustedNoise()):
        prepared = method.prepare(target, start(target))
        assert prepared.noise.dtype == torch.float32
        assert not torch.equal(prepared.noise, prepared.noise.bfloat16().float())


def test_values_that_mean_nothing():
    with pytest.raises(UsageError, match="threshold"):
        SAIL(-1.0)
    with pytest.raises(UsageError, match="updates"):
        SAIL(updates=0)
    with pytest.raises(UnknownName, match="objective"):
        SAIL(form="squares")
    with pytest.raises(UsageError, match="rho"):
        AdjustedNoise(rho=0.0)
