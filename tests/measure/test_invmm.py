"""InvMM where the answer is known: λ by hand, KL by formula, the closed-form optimum, exact memorizers, a model that generalizes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mnemoscope.errors import CannotAudit, ModelFault, UnknownName, UsageError
from mnemoscope.measure.invmm import FAMILIES, SHARES, InvMM, Preset, Weight, _least, _Run, bound, divergence, preset
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.models.mixture import Mixture
from mnemoscope.models.noising import noised, split
from whole import Whole

SHAPE = (3, 16, 16)


def memorizer(k: int, copies: int = 1, **options) -> Mixture:
    """K points uniform in a cube; the first one with that many copies."""
    generator = torch.Generator().manual_seed(k)
    points = torch.rand(k, *SHAPE, generator=generator) * 2 - 1
    return Mixture.memorizer(points, [copies] + [1] * (k - 1), betas="ddpm", **options)


def small(name: str, **changes) -> Preset:
    return replace(preset(name, "pixel"), steps=20, **changes)


def measure(world, images, chosen, **options):
    return InvMM(world, Whole(), chosen, beta=0.5)(images, **options)


# λ and KL

EXPECTED = {
    "pixel": {50: 1.0050, 100: 0.5049, 150: 0.2549, 200: 0.1299, 300: 0.0362, 400: 0.0127, 500: 0.0069, 1000: 0.0049},
    "latent": {50: 0.0670, 100: 0.0065, 200: 0.0045},
    "text": {50: 1.0500, 100: 0.5495, 150: 0.2992, 200: 0.1741, 300: 0.0803, 400: 0.0568, 500: 0.0510, 1000: 0.0490},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_lambda_where_the_loss_never_falls(family):
    """Regression values of the authors' settings: the first check grows, every later one halves."""
    weight, found = Weight(FAMILIES[family]), {}
    for update in range(1, max(EXPECTED[family]) + 1):
        due = weight.add(1.0)
        assert due == (update % FAMILIES[family].every == 0)
        found[update] = round(weight.value, 4)
    assert {k: found[k] for k in EXPECTED[family]} == pytest.approx(EXPECTED[family], abs=1.01e-4)
    assert weight.low


def test_lambda_where_the_loss_always_falls():
    weight = Weight(FAMILIES["text"])
    for update in range(2000):
        weight.add(1000.0 - update)
    assert weight.value == pytest.approx(1 + 2000 * 1e-3)
    assert weight.stalled == 0


def test_divergence():
    zero, one = torch.zeros(2, *SHAPE), torch.ones(2, *SHAPE)
    assert divergence(zero, zero).tolist() == [0, 0]
    assert divergence(one, zero) == pytest.approx(0.5)
    assert divergence(zero, math.log(4) * one) == pytest.approx(0.806853, abs=1e-6)


def test_bound_by_hand():
    assert bound(0.0, 1.0) == 1
    assert bound(2.0, 1.0) == pytest.approx(math.exp(-2))
    assert bound(3.0, 0.5) == pytest.approx(math.exp(-(3 + math.log(2)) / 0.5))
    assert bound(1.0, 0.0) == 0


# Against formulas


@pytest.mark.parametrize(
    ("betas", "v", "weight", "share", "var", "kl"),
    [
        ("ddpm", 1 / 3, 0.1, 1.029, 0.686, 0.208),
        ("stable-diffusion", 1.0, 0.1, 1.062, 0.288, 0.830),
        ("latent-diffusion", 1.0, 0.05, 1.280, 0.203, 1.219),
    ],
)
def test_optimum_of_a_gaussian_at_fixed_lambda(betas, v, weight, share, var, kl):
    """μ* = 2A x₀/(2B + λ), e^{s*} = λ/(λ + 2B), with A and B means over the schedule."""
    world = Gaussian({}, null=(0.0, v**0.5), latent_shape=SHAPE, betas=betas, has_text=False)
    chosen = Preset("fixed", updates=700, batch=250, lr=0.02, weight=weight, every=10**6, increment=0.0, paired=True)
    method = InvMM(world, Whole(), chosen, beta=2.0)
    x0 = v**0.5 * torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    x0 *= v**0.5 / x0.square().mean().sqrt()
    run = _Run(method, x0[0], Whole()(world.decode(x0))[0], None, 0)
    (found,) = method._all([run], None)
    mu, s = found.mu, found.s
    assert float((mu * x0[0]).sum() / x0.square().sum()) == pytest.approx(share, rel=0.03)
    assert float(s.exp().mean()) == pytest.approx(var, rel=0.03)
    assert found.paid == pytest.approx(kl, rel=0.04)


@pytest.mark.parametrize("space", ["eps", "velocity"])
def test_x0_of_a_single_point_is_that_point(space):
    point = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    world = Mixture.memorizer(point, space=space)
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    t = world.training_times(torch.tensor([0.2, 0.5, 0.9]))
    torch.testing.assert_close(split(world, x, t, None)[0], point.expand(3, -1, -1, -1), rtol=1e-3, atol=1e-3)


def test_gradient_against_finite_differences():
    """Through the model, with respect to μ: in float64."""
    world = memorizer(6, dtype=torch.float64)
    x0, eps = world.points[:1], torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.tensor([700])

    def loss(mu):
        return (split(world, noised(world, x0, t, mu + eps), t, None)[0] - x0).square().mean()

    mu = (0.1 * x0).requires_grad_()
    (slope,) = torch.autograd.grad(loss(mu), mu)
    v = torch.randn(mu.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    h = 1e-5
    with torch.no_grad():
        numeric = (loss(mu + h * v) - loss(mu - h * v)) / (2 * h)
    assert float((slope * v).sum()) == pytest.approx(float(numeric), rel=1e-4)


# Memorizers and generalizers


def test_one_training_picture_costs_nothing():
    """All noise leads to it. Adam turns rounding into steps, which λ pulls back; the walk back ends at plain noise, exactly."""
    world = memorizer(1)
    image = world.decode(world.points.float())
    (official,), (improved,) = (measure(world, image, small(name)) for name in ("official", "improved"))
    assert official.passed
    assert official.nats < 0.02
    assert improved.score == improved.nats == 0
    assert improved.at_least == pytest.approx(bound(0.0, improved.rate.low))


@pytest.mark.parametrize("name", ["official", "improved"])
def test_a_memorizer_passes_at_the_first_check_and_the_bound_holds(name):
    """p = m/(K − 1 + m) is exact; the score in all bounds its surprisal."""
    for k, copies in ((16, 1), (16, 10), (128, 1)):
        world = memorizer(k, copies)
        (found,) = measure(world, world.decode(world.points[:1].float()), small(name))
        assert found.passed
        assert found.update <= 50
        p = copies / (k - 1 + copies)
        assert bound(found.nats, 0.99) <= p
        if found.at_least is not None:
            assert found.at_least <= p
            assert found.rate.high >= 0.9  # the walk back stops near the edge, where 14 of 16 draws succeed


def test_the_improved_score_falls_with_the_number_of_copies():
    scores = []
    for copies in (1, 10, 100):
        world = memorizer(64, copies)
        (found,) = measure(world, world.decode(world.points[:1].float()), small("improved"))
        scores.append(found.nats)
    assert scores[0] > scores[1] > scores[2]


def test_improved_is_steadier_and_cheaper_than_official():
    """Over seeds, on the same picture of a memorizer: less spread around a smaller score."""
    world = memorizer(64)
    image = world.decode(world.points[:1].float()).expand(5, -1, -1, -1)
    nats = {}
    for name in ("official", "improved"):
        found = measure(world, image, small(name, confirm=0), keys=range(5))
        nats[name] = torch.tensor([f.nats for f in found])
    assert nats["improved"].std() < 0.5 * nats["official"].std()
    assert nats["improved"].mean() < nats["official"].mean()


def test_a_model_that_generalizes_is_forced_late_and_pays():
    world = Gaussian({}, null=(0.0, 0.577), latent_shape=SHAPE, betas="ddpm", has_text=False)
    image = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    for name, late in (("official", 200), ("improved", 64)):  # after four checks of λ, or eight
        (found,) = measure(world, image, small(name))
        assert found.passed
        assert found.update >= late
        assert found.score > 0.1


def test_the_impossible_is_censored():
    world = memorizer(4)
    image = world.decode(world.points[:1].float())
    (found,) = InvMM(world, Whole(), small("official", updates=120), beta=1.5)(image)
    assert not found.passed
    assert found.score == found.nats == math.inf
    assert found.update == 120
    assert 0.9 < found.similarity < 1.5
    assert found.paid >= 0
    assert "not reproduced within 120 updates" in found.words


def test_giving_up_early_spends_less():
    world = memorizer(4)
    image = world.decode(world.points[:1].float())
    early, late = (
        InvMM(world, Whole(), small("improved", updates=800, patience=p), beta=1.5)(image)[0] for p in (3, 0)
    )
    assert early.update < late.update
    assert early.forwards < late.forwards


def test_a_batch_equals_one_at_a_time():
    """Each picture has its own λ, draws and end; a picture that is done leaves the batch."""
    world = memorizer(16, 4)
    images = world.decode(world.points[:3].float())
    images[2] = torch.rand(SHAPE, generator=torch.Generator().manual_seed(9))  # never to be reached
    chosen = small("improved", updates=150)
    together = measure(world, images, chosen, keys=[5, 6, 7])
    assert [f.passed for f in together] == [True, True, False]
    for i, key in enumerate((5, 6, 7)):
        (alone,) = measure(world, images[i : i + 1], chosen, keys=[key])
        assert alone.passed == together[i].passed
        assert alone.update == together[i].update
        assert alone.forwards == together[i].forwards
        assert together[i].paid == pytest.approx(alone.paid, rel=1e-3)


def test_forwards_are_counted_and_divided_among_pictures():
    world = memorizer(16)
    before = world.forwards
    found = measure(world, world.decode(world.points[:2].float()), small("improved"))
    assert sum(f.forwards for f in found) == world.forwards - before
    assert all(f.backwards == f.update * 16 for f in found)


def test_with_a_caption_and_guidance():
    """A memorized caption's own picture is nearly free; under the empty prompt it is not."""
    world = Mixture.world(["a cat"], ["the mona lisa"], rare=0.01, latent_shape=SHAPE, guidance=3.0)
    image = world.decode(world.points[:1].float())
    chosen = replace(preset("improved", "text"), steps=20, scales=(1.0, 3.0), updates=400)
    (own,) = measure(world, image, chosen, prompts=["the mona lisa"])
    (empty,) = measure(world, image, chosen, prompts=[""])
    assert own.score == 0
    assert own.scale == 1
    assert own.prompt == "given"
    assert empty.paid > own.paid


def test_progress_and_words():
    world, told = memorizer(8), []
    (found,) = measure(
        world,
        world.decode(world.points[:1].float()),
        small("improved"),
        progress=lambda done, n, f: told.append((done, n, f)),
    )
    assert told == [(1, 1, found)]
    assert "fresh draws" in found.words
    assert [row[0] for row in found.curve] == [8]


def test_the_course_is_told_at_each_test():
    world, told = memorizer(4), []
    image = world.decode(world.points[:2].float())
    InvMM(world, Whole(), small("improved", updates=60), beta=1.5)(image, watch=told.append)
    assert [(c.update, c.pictures) for c in told] == [(8 * k, 2) for k in range(1, 8)]
    assert told[-1].loss > 0
    assert 0.9 < told[-1].similarity < 1.5


def test_refuses():
    world = memorizer(2)
    images = world.decode(world.points.float())
    with pytest.raises(CannotAudit, match="takes no text"):
        measure(world, images, small("official"), prompts=["a", "b"])
    with pytest.raises(UsageError, match="one per picture"):
        measure(world, images, small("official"), keys=[1])
    with pytest.raises(UnknownName, match="Did you mean 'official'"):
        preset("offical", "pixel")
    with pytest.raises(UnknownName, match="family"):
        preset("official", "video")


# The parts of ``improved``


@given(
    own=st.lists(st.integers(1, len(SHARES) - 1), min_size=1, max_size=16),
    spare=st.integers(0, 3),
    low=st.sampled_from([-1, 0]),
)
def test_the_walk_back_finds_the_least_level_at_which_enough_draws_succeed(own, spare, low):
    """Against a count at every level, where each draw succeeds from a level of its own on."""
    spare = min(spare, len(own) - 1)
    asked = 0

    def succeed(draws, level):
        nonlocal asked
        asked += len(draws)
        return [level >= own[draw] for draw in draws]
        yield  # a generator that asks nobody

    walk = _least(succeed, len(own), spare, low)
    with pytest.raises(StopIteration) as end:
        next(walk)
    levels = range(low + 1, len(SHARES))
    assert end.value.value == next(k for k in levels if sum(k < least for least in own) <= spare)
    assert asked <= len(own) * len(SHARES).bit_length()


def test_noises_come_in_opposite_pairs_at_the_times_of_all_strata():
    world = memorizer(2)
    method = InvMM(world, Whole(), small("improved"), beta=0.5)
    run = _Run(method, world.points[0].float(), torch.ones(1), None, 0)
    eps, t = run.draw(16)
    assert torch.equal(eps[:8], -eps[8:])
    assert torch.equal(t[:8], t[8:])
    assert (t[:8] * 8 // 1000).tolist() == list(range(8))
    assert len(run.draw(5)[0]) == 5
    assert not torch.equal(eps, run.draw(16)[0])


def test_where_plain_noise_does_nothing_is_learned():
    world = memorizer(1)
    (found,) = measure(world, world.decode(world.points.float()), small("improved"))
    assert (found.update, found.backwards, found.loss, found.curve) == (0, 0, None, [])
    assert found.score == 0
    assert torch.equal(found.mu, torch.zeros_like(found.mu))


def test_a_success_counts_only_if_fresh_draws_agree():
    world = memorizer(64)
    image = world.decode(world.points[:1].float())
    (found,) = measure(world, image, small("improved"))
    assert found.succeeded[0] >= 5 / 8 * found.succeeded[1]
    (never,) = measure(world, image, small("improved", updates=16, confirmed=1.1))
    assert not never.passed
    assert never.similarity >= 0.5  # its tests passed


def test_few_draws_may_fail():
    chosen = preset("improved", "pixel")
    assert [chosen.spare(n) for n in (1, 8, 16)] == [0, 1, 2]
    assert preset("official", "pixel").spare(8) == 0


@pytest.mark.parametrize("name", ["official", "improved"])
def test_no_picture_costs_more_than_is_told_before(name):
    world = memorizer(4)
    image = world.decode(world.points[:1].float())
    chosen = small(name, updates=100)
    forwards, backwards = chosen.most(text=False)
    for beta in (0.5, 1.5):
        (found,) = InvMM(world, Whole(), chosen, beta=beta)(image)
        assert found.forwards <= forwards
        assert found.backwards <= backwards


@pytest.mark.parametrize("search", ["improved", "official"])
def test_a_model_that_predicts_no_numbers_is_not_a_picture_that_was_not_reproduced(monkeypatch, search):
    world = memorizer(2)
    output = world.output
    monkeypatch.setattr(world, "output", lambda *args: output(*args) * math.nan)
    with pytest.raises(ModelFault, match="predicted NaN or infinity"):
        measure(world, torch.rand(1, *SHAPE), small(search))
