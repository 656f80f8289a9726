"""InvMM beyond pixels of closed forms: learned prompts, rectified flow, where sampling begins."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from test_invmm import SHAPE, Whole, measure, memorizer, small

from mnemoscope.errors import CannotAudit
from mnemoscope.measure.invmm import InvMM, bound, preset, varied
from mnemoscope.models.mixture import Mixture

KINDS = ["sd", "pixel", "kl", "vq"]


@pytest.fixture
def sd(target_of):
    return target_of("sd")


def pictures(target, n=2):
    _, rows, columns = target.latent_shape
    side = rows * target.factor, columns * target.factor
    return torch.rand(n, 3, *side, generator=torch.Generator().manual_seed(3))


# Learned prompts


def test_a_mixture_of_one_token_is_that_token(sd):
    """Each place filled with one token of a prompt: the prompt's own encoding."""
    slots, words = sd.mixture_shape
    prompts = ["a cat", "three dots and a line"]
    shares = torch.nn.functional.one_hot(sd._ids(prompts)[:, 1 : 1 + slots], words).float()
    torch.testing.assert_close(sd.encode_mixture(shares).tokens, sd.encode(prompts).tokens, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_mixture_against_finite_differences(sd):
    shares = torch.rand(1, *sd.mixture_shape, generator=torch.Generator().manual_seed(0))
    away = torch.randn(shares.shape, generator=torch.Generator().manual_seed(1))
    target = sd.encode([""]).tokens

    def loss(at):
        return (sd.encode_mixture(at).tokens - target).double().square().sum()

    shares.requires_grad_()
    (slope,) = torch.autograd.grad(loss(shares), shares)
    h = 1e-2
    with torch.no_grad():
        numeric = (loss(shares + h * away) - loss(shares - h * away)) / (2 * h)
    assert float((slope * away).sum()) == pytest.approx(float(numeric), rel=1e-2)


def test_other_threads_encode_what_they_are_given(sd):
    """The same encoder may serve a page meanwhile."""
    expected, found = sd.encode(["a cat"]).tokens, []
    inner = sd.text_encoder.forward

    def forward(*args, **kwargs):
        if threading.current_thread() is threading.main_thread() and not found:
            other = threading.Thread(target=lambda: found.append(sd.encode(["a cat"]).tokens))
            other.start()
            other.join()
        return inner(*args, **kwargs)

    sd.text_encoder.forward = forward
    sd.encode_mixture(torch.full((1, *sd.mixture_shape), 1.0))
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0)


def test_a_prompt_is_learned_where_none_is_given(sd):
    chosen = replace(varied(sd), updates=20, every=10, steps=3, preview=2, scales=(1.0, 3.0))
    method = InvMM(sd, Whole(), chosen, beta=2.0)
    images = pictures(sd)
    (learned, _) = method(images, keys=[4, 5])
    (given, _) = method(images, prompts=["", ""], keys=[4, 5])
    assert (learned.prompt, given.prompt) == ("learned", "given")
    assert not torch.equal(learned.mu, given.mu)
    (alone,) = method(images[1:], keys=[5])
    (_, together) = method(images, keys=[4, 5])
    torch.testing.assert_close(alone.mu, together.mu, rtol=1e-3, atol=1e-4)
    assert alone.forwards == together.forwards


def test_the_learned_prompt_is_kept_with_the_noise(sd):
    """Noise is worth its score under the prompt it was found with, so that the picture can be drawn again from both."""
    method = InvMM(sd, Whole(), replace(varied(sd), steps=3, preview=0), beta=-1.0)
    (found,) = method(pictures(sd, 1))
    assert found.passed
    assert found.score == 0
    assert found.tokens.shape == sd.encode([""]).tokens.shape
    (given,) = method(pictures(sd, 1), prompts=["a cat"])
    assert given.tokens is None


def test_models_without_mixtures_want_captions():
    world = Mixture.world(["a cat"], ["the mona lisa"], rare=0.1, latent_shape=SHAPE)
    with pytest.raises(CannotAudit, match="give captions, or empty ones"):
        measure(world, world.decode(world.points[:1].float()), preset("improved", "text"))


# Rectified flow


def test_flow_memorizers_pass_and_the_bound_holds():
    nats = []
    for copies in (1, 30):
        world = memorizer(32, copies, space="velocity")
        (found,) = measure(world, world.decode(world.points[:1].float()), small("improved"))
        assert found.passed
        assert bound(found.nats, 0.99) <= copies / (31 + copies)
        nats.append(found.nats)
    assert nats[0] > nats[1]


def test_one_picture_of_a_flow_costs_nothing():
    world = memorizer(1, space="velocity", shift=3.0)
    (found,) = measure(world, world.decode(world.points.float()), small("improved"))
    assert found.score == 0


# Where sampling begins


@pytest.mark.parametrize("kind", KINDS)
def test_whole_schedules_begin_at_the_last_training_time(kind, target_of):
    """The grids of the authors' code: 999, 994, …, 4 of 200 steps, 999, 979, …, 19 of 50."""
    target = target_of(kind)
    assert target.whole_schedule(200).timesteps.tolist() == list(range(999, 0, -5))
    assert target.whole_schedule(50).timesteps.tolist() == list(range(999, 0, -20))


def test_closed_forms_have_the_same_grid():
    world = memorizer(2)
    assert world.schedule(50).timesteps[0] < 999
    assert world.whole_schedule(50).timesteps[:50].tolist() == list(range(999, 0, -20))


@pytest.mark.parametrize(("kind", "whole"), [("pixel", True), ("kl", True), ("vq", True), ("sd", False)])
def test_each_family_begins_where_its_authors_do(kind, whole, target_of):
    assert varied(target_of(kind), "official").whole is whole


# Many pictures at once


def test_tests_of_pictures_are_sampled_together():
    """Four pictures' trials share denoiser calls; each is charged for its own."""
    world = memorizer(16)
    images, calls, inner = world.decode(world.points[:4].float()), [], world.output

    def output(x, t, cond):
        calls.append(len(x))
        return inner(x, t, cond)

    world.output = output
    found = measure(world, images, small("improved", updates=8, search=0))
    tests = calls[8:]  # after the updates
    assert tests[0] == 4 * 2  # the first draws of each
    assert sum(calls) == sum(f.forwards for f in found)


def test_no_more_rows_than_allowed():
    world = memorizer(4)
    calls, inner = [], world.output

    def output(x, t, cond):
        calls.append(len(x))
        return inner(x, t, cond)

    world.output = output
    method = InvMM(world, Whole(), small("improved"), beta=0.5, rows=8)
    (found,) = method(world.decode(world.points[:1].float()))
    learning = [n for n in calls if n == method.preset.batch]
    assert len(learning) == found.update
    assert max(n for n in calls if n != method.preset.batch) == 8
