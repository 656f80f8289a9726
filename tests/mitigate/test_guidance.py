"""Guidance that starts late: the rules by hand, no extra forward, and the same pictures from a user's own pipeline."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mnemoscope.errors import CannotAudit, UsageError
from mnemoscope.mitigate.attention import Attenuation, Masking
from mnemoscope.mitigate.base import Generation, sample
from mnemoscope.mitigate.guidance import DelayedGuidance, Dynamic, DynamicGuidance, OppositeGuidance, Static, first_rise
from mnemoscope.mitigate.noise import AdjustedNoise
from mnemoscope.mitigate.pipeline import prepared
from mnemoscope.mitigate.prompt import PromptOptimization
from mnemoscope.models.mixture import Mixture
from mnemoscope.models.sampling import denoise

METHODS = [DelayedGuidance(0.4), DynamicGuidance(0.6), OppositeGuidance(0.3), OppositeGuidance(None)]


def sizes(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def test_first_rise():
    assert first_rise(sizes([3, 2, 1], [3, 2, 2.5], [1, 2, 0], [1, 1, 1])).tolist() == [False, True, True, False]
    assert first_rise(sizes([5], [7])).tolist() == [False, False]


def test_static_rule():
    rule = Static(0.35, 1000.0)
    assert rule(651.0, sizes([1.0]), 7.5).tolist() == [0.0]
    assert rule(649.0, sizes([1.0]), 7.5).tolist() == [7.5]
    assert replace(rule, scale=3.0)(1.0, sizes([1.0]), 7.5).tolist() == [3.0]
    assert OppositeGuidance(0.35, before=-2.0).rule(1000.0)(900.0, sizes([1.0]), 7.5).tolist() == [-2.0]


def test_dynamic_rule_is_each_samples_own():
    rule = Dynamic(0.5, 1000.0)
    assert rule(900.0, sizes([3, 2, 1], [3, 2, 4]), 7.5).tolist() == [0.0, 7.5]
    assert rule(500.0, sizes([3, 2, 1], [3, 2, 4]), 7.5).tolist() == [7.5, 7.5]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.strength}")
def test_costs_no_forward(build_pipe, adapt, method):
    target = adapt(build_pipe("sd"))
    g = Generation.of(target, ["three white dots", "a cat"], [0, 1], steps=6)
    out = method.prepare(target, g)
    assert (out.forwards, out.backwards, target.forwards) == (0, 0, 0)
    for _ in sample(target, out):
        pass
    assert target.forwards == 2 * 6 * len(g)
    assert out.cond is g.cond
    assert out.noise is g.noise
    assert g.guidance is None


def test_without_a_delay_it_is_the_ordinary_generation(target_of):
    target = target_of("sd")
    g = Generation.of(target, ["three white dots"], [0], steps=5)
    *_, plain = sample(target, g)
    *_, ruled = sample(target, DelayedGuidance(0.0).prepare(target, g))
    assert torch.equal(plain.x_next, ruled.x_next)


def test_a_number_and_a_rule_meet(target_of):
    """The rule goes to the generation's own scale, not to the target's."""
    target = target_of("sd")
    g = Generation.of(target, ["three white dots"], [0], steps=5, guidance=3.0)
    *_, plain = sample(target, g)
    *_, ruled = sample(target, DelayedGuidance(0.0).prepare(target, g))
    torch.testing.assert_close(plain.x_next, ruled.x_next)


def test_it_leaves_the_basin_where_the_truth_is_known():
    """A memorized prompt of the mixture world draws its picture; with guidance late enough, the common pictures win."""
    world = Mixture.world(["a cat"], ["the mona lisa"], rare=0.05, latent_shape=(2, 4, 4))
    g = Generation.of(world, ["the mona lisa"] * 32, list(range(32)), steps=25)
    picture = world.points[0]

    def copies(generation):
        *_, last = sample(world, generation)
        return float(((last.x_next - picture).flatten(1).norm(dim=1) < 0.5).float().mean())  # fmt: skip

    assert copies(g) > 0.95
    assert copies(DelayedGuidance(1.0).prepare(world, g)) < 0.5


@pytest.mark.parametrize("options", [{"start": 1.5}, {"start": -0.1}])
def test_a_share_is_a_share(options):
    with pytest.raises(UsageError, match=r"start is .*, and must be a share from 0 to 1"):
        DelayedGuidance(**options)


def test_a_rule_needs_something_to_guide(target_of):
    target = target_of("sd")
    noise = target.noise([0])
    with pytest.raises(CannotAudit, match="nothing to guide"):
        denoise(target, noise, target.encode(["a cat"]), guidance=Static(0.5, 1000.0))


@pytest.mark.parametrize(
    "method",
    [*METHODS, PromptOptimization(1.0, updates=3), AdjustedNoise(), Attenuation(0.1), Masking()],
    ids=lambda m: m.name,
)
def test_the_users_own_pipeline_gives_the_same_pictures(build_pipe, adapt, method):
    pipe = build_pipe("sd")
    target = adapt(pipe)
    g = method.prepare(target, Generation.of(target, ["three white dots", "a cat"], [0, 1], steps=6))
    *_, last = sample(target, g)
    with prepared(pipe, target, g) as arguments:
        found = pipe(**arguments, output_type="latent").images
    torch.testing.assert_close(found, last.x_next, rtol=1e-4, atol=1e-4)
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks


def test_the_pipeline_is_left_as_it_was_also_after_an_exception(build_pipe, adapt):
    pipe = build_pipe("sd")
    target = adapt(pipe)
    g = DelayedGuidance(0.4).prepare(target, Generation.of(target, ["three white dots"], [0], steps=3))
    with pytest.raises(RuntimeError, match="mine"), prepared(pipe, target, g):
        raise RuntimeError("mine")
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks
