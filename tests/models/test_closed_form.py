"""What every closed-form world gets exactly right: they are the ruler of all else."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import DOUBLE, PROMPTS, SMALL, WORLDS, noised, rms, sample, small_gaussian, small_mixture, times

from mnemoscope.detect.magnitude import Magnitude, magnitude
from mnemoscope.errors import CannotAudit, UnknownName, UsageError
from mnemoscope.models.base import Schedule, Target
from mnemoscope.models.closed_form import ClosedForm
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.models.mixture import Mixture
from mnemoscope.models.sampling import denoise, null_output


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> ClosedForm:
    return WORLDS[request.param]()


# Exact quantities against autograd and finite differences.


def test_eps_is_minus_sigma_times_the_gradient_of_the_log_density(world: ClosedForm) -> None:
    cond = world.encode(PROMPTS)
    for t in times(world):
        x = noised(world, PROMPTS, t).requires_grad_()
        alpha, sigma = world.alpha_sigma(t)
        (score,) = torch.autograd.grad(world.log_density(x, t, cond).sum(), x)
        prediction, x0 = world.predict(x, t, cond), world.posterior_mean(x, t, cond)
        eps = prediction + x0 if world.space == "velocity" else prediction
        torch.testing.assert_close(eps, -sigma * score, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(world.score(x, t, cond), score, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(x0, (x + sigma**2 * score) / alpha, rtol=1e-8, atol=1e-8)


def test_score_matches_finite_differences(world: ClosedForm) -> None:
    t = times(world)[1]
    cond, x, h = world.encode(["a cat"]), noised(world, ["a cat"], t), 1e-5
    steps = h * torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape[1:])
    many = cond.expand(len(steps))
    slope = (world.log_density(x + steps, t, many) - world.log_density(x - steps, t, many)) / (2 * h)
    torch.testing.assert_close(world.score(x, t, cond).flatten(), slope, rtol=1e-6, atol=1e-7)


def test_hessian_matches_autograd(world: ClosedForm) -> None:
    generator = torch.Generator().manual_seed(1)
    for t in times(world):
        for prompt in PROMPTS:
            cond, x = world.encode([prompt]), noised(world, [prompt], t)
            full = torch.autograd.functional.hessian(lambda y, t=t, c=cond: world.log_density(y, t, c).sum(), x)
            full = full.reshape(x.numel(), x.numel())
            v = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            scale = float(full.abs().max())
            product = world.hessian_vector(x, t, cond, v).flatten()
            torch.testing.assert_close(product, full @ v.flatten(), rtol=1e-7, atol=1e-9 * scale)
            diagonal = world.hessian_diagonal(x, t, cond).flatten()
            torch.testing.assert_close(diagonal, full.diagonal(), rtol=1e-7, atol=1e-9 * scale)


def test_jacobian_of_eps_is_minus_sigma_hessian() -> None:
    world = small_mixture()
    t = torch.tensor(500)
    cond, x = world.encode(["a cat"]), noised(world, ["a cat"], t)
    v = torch.ones_like(x)
    _, pushed = torch.autograd.functional.jvp(lambda y: world.predict(y, t, cond), x, v)
    torch.testing.assert_close(pushed, -world.alpha_sigma(t)[1] * world.hessian_vector(x, t, cond, v))


def test_times_may_differ_within_a_batch(world: ClosedForm) -> None:
    each = torch.stack(times(world))
    x, cond = world.noise([0, 1, 2]), world.encode(PROMPTS)
    together = world.predict(x, each, cond)
    apart = [world.predict(x[i : i + 1], each[i], cond.select(torch.tensor([i]))) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(apart))


# Magnitude and significance.


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


@pytest.mark.parametrize("make", [small_gaussian, small_mixture])
def test_flow_identities(make: Any) -> None:
    """Δε = (1 − t) Δu, Δx̂₀ = −t Δu; at t = 1 Δε is exactly 0, and Δu is not."""
    world = make(space="velocity")
    cond, null = world.encode(["the mona lisa"]), world.encode([""])
    for t in (1.0, 0.98, 0.5, 0.1):
        time = torch.tensor(t, dtype=torch.float64)
        x = noised(world, ["the mona lisa"], time)
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
    plain, v_world = small_gaussian(), small_gaussian(v_prediction=True)
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
    for t in times(world):
        cond = world.encode([prompt]).expand(2)
        tokens = cond.tokens.requires_grad_()
        x = noised(world, [prompt] * 2, t)
        d = (world.predict(x, t, replace(cond, tokens=tokens)) - world.predict(x, t, null)).flatten(1).norm(dim=1)
        (gradient,) = torch.autograd.grad(d.sum(), tokens)
        with torch.no_grad():
            exact = world.significance(x, t, cond)
        torch.testing.assert_close(exact, gradient.norm(dim=2), rtol=1e-6, atol=1e-12)
        if float(d.detach().min()) > 1e-6:
            assert float(exact[:, : len(prompt.split())].min()) > 0


def test_significance_ranks_words_by_their_share() -> None:
    world = small_gaussian(word_weights={"the": 1.0, "mona": 6.0, "lisa": 3.0})
    assert world.shares("the mona lisa") == pytest.approx([0.1, 0.6, 0.3])
    x, t = world.noise([0]), torch.tensor(981)
    found = world.significance(x, t, world.encode(["the mona lisa"]))[0, :4]
    torch.testing.assert_close(found / found.sum(), torch.tensor([0.1, 0.6, 0.3, 0.0], dtype=torch.float64))
    assert float(world.significance(x, t, world.encode([""])).abs().max()) == 0


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


def test_tokens_of_the_null_can_be_learned() -> None:
    """An empty prompt has no effect, yet its places are open to a soft prompt."""
    world = small_gaussian()
    null, t, x = world.encode([""]), torch.tensor(500), world.noise([0])
    tokens = null.tokens.requires_grad_()
    (gradient,) = torch.autograd.grad(world.predict(x, t, replace(null, tokens=tokens)).sum(), tokens)
    assert bool((gradient.norm(dim=2) > 0).all())


@given(st.lists(st.text(alphabet="abcdé", min_size=1, max_size=4), min_size=1, max_size=24))
@settings(max_examples=50, deadline=None)
def test_shares_are_positive_and_sum_to_one(words: list[str]) -> None:
    shares = Gaussian().shares(" ".join(words))
    assert len(shares) == len(words)
    assert min(shares) > 0
    assert sum(shares) == pytest.approx(1)


# Sampling.


@pytest.mark.parametrize("space", ["eps", "velocity"])
@pytest.mark.parametrize("make", [Gaussian, Mixture])
def test_memorized_prompt_collapses_to_its_image(make: Any, space: str) -> None:
    picture = torch.rand((3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    target = make.world(["a cat"], {"the mona lisa": picture}, latent_shape=(3, 4, 4), space=space, **DOUBLE)
    noise = target.noise(range(4))
    finals = {}
    for prompt in ("the mona lisa", "a cat"):
        finals[prompt] = sample(target, noise, target.encode([prompt]).expand(4), steps=20)
    assert float((finals["the mona lisa"] - picture).abs().max()) < 1e-9
    assert float(finals["a cat"].std(0).mean()) > 0.2
    shown = target.decode(finals["the mona lisa"])
    torch.testing.assert_close(shown, ((picture + 1) / 2).float().expand(4, -1, -1, -1))


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


# The promises of a Target.


@pytest.mark.parametrize("make", [Gaussian.tiny, Mixture.tiny, lambda: Mixture.memorizer(3), Gaussian])
def test_worlds_are_targets(make: Any) -> None:
    assert isinstance(make(), Target)


def test_forwards_are_counted_and_exact_answers_are_free() -> None:
    for world in (small_gaussian(), small_mixture()):
        cond, null, noise = world.encode(["a cat"]).expand(3), world.encode([""]), world.noise(range(3))
        final = sample(world, noise, cond, null, steps=2)
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
        assert rms(pictures[0], pictures[2]) > 0.3
        assert torch.equal(unheard[0], unheard[1])
        assert not torch.equal(unheard[0], unheard[2])
        assert not torch.equal(unheard, other.encode(["never heard of", "never heard of", "heard of never"]).tokens)


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
        make.world(["a cat", "two dogs on a beach"], ["the mona lisa"], spread=0.3),
    ]
    fingerprints = {each.identity()["fingerprint"] for each in others}
    assert len(fingerprints | {identity["fingerprint"]}) == 1 + len(others)


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
        (lambda: Gaussian().schedule(0), "steps=0"),
        (lambda: Gaussian().schedule(1001), "steps=1001"),
        (lambda: Gaussian().predict(torch.zeros(1, 1, 1, 1), torch.tensor(1), Gaussian().encode([""])), "built for"),
        (lambda: Gaussian().predict(torch.zeros(2, 3, 8, 8), torch.tensor(1), Gaussian().encode([""])), "2 samples"),
    ],
)
def test_faults_are_named(fault: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fault()
