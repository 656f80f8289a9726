"""What every target promises, on tiny random networks and on the closed-form worlds."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import takewhile

import pytest
import torch

from mnemoscope.detect.magnitude import Magnitude, magnitude
from mnemoscope.errors import CannotAudit, ModelFault, UsageError
from mnemoscope.models.base import Condition, Schedule, Target, mix, noise_from_seeds
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.models.mixture import Mixture
from mnemoscope.models.sampling import denoise, null_output

CLOSED = {
    "gaussian": Gaussian.tiny,
    "gaussian-flow": lambda **options: Gaussian.tiny(space="velocity", **options),
    "mixture": Mixture.tiny,
}
TEXT = ["sd", "sd-v", "sd-x0", "sd2", "sd3", "sd35", *CLOSED]
NETWORKS = ["sd", "sd2", "sd3", "pixel", "gray", "ldm-kl", "ldm-vq"]
ALL = [*TEXT, "pixel", "gray", "ldm-kl", "ldm-vq"]
PROMPTS = ["a cat", "three white dots on a red field"]


@pytest.fixture
def target(request, target_of) -> Target:
    return CLOSED[request.param]() if request.param in CLOSED else target_of(request.param)


@pytest.fixture
def double(request, build_pipe, adapt) -> Target:
    """The same in float64, where differences are derivatives."""
    if request.param in CLOSED:
        return CLOSED[request.param](dtype=torch.float64)
    return adapt(build_pipe(request.param).to(torch.float64))


def every(*names):
    return pytest.mark.parametrize("target", names or ALL, indirect=True)


def conditions(target, n=2):
    return target.encode((PROMPTS * n)[:n]) if target.has_text else None


def null_of(target):
    return target.encode([""]) if target.has_text else None


def run(target, noise, cond, **options):
    return list(denoise(target, noise, cond, null_of(target), guidance=3.0, **{"steps": 4, **options}))


def times(target, n=2):
    return target.schedule(4).timesteps[1].repeat(n)


@every()
def test_is_a_target(target):
    assert isinstance(target, Target)
    assert isinstance(target.schedule(3), Schedule)
    assert len(target.latent_shape) == 3
    assert target.name


@every()
def test_noise_depends_on_base_and_seed_alone(target):
    four = target.noise([0, 1, 2, 3])
    assert four.shape == (4, *target.latent_shape)
    assert torch.equal(four, noise_from_seeds([0, 1, 2, 3], 0, target.latent_shape))
    assert torch.equal(target.noise([0]), four[:1])
    assert torch.equal(target.noise([3, 1]), four[[3, 1]])
    assert not torch.equal(target.noise([0], base=1), four[:1])
    assert not torch.equal(target.noise([0], base=1), target.noise([1], base=0))


@every()
def test_one_seed_is_the_first_of_four(target):
    alone = run(target, target.noise([0]), conditions(target, 1))
    four = run(target, target.noise([0, 1, 2, 3]), conditions(target, 1).expand(4) if target.has_text else None)
    torch.testing.assert_close(alone[-1].x_next, four[-1].x_next[:1], rtol=1e-4, atol=1e-4)


@every()
def test_batch_size_does_not_matter(target):
    noise, cond = target.noise([0, 1]), conditions(target)
    together = run(target, noise, cond)
    for i in (0, 1):
        alone = run(target, noise[i : i + 1], None if cond is None else cond.select(torch.tensor([i])))
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a.cond, b.cond[i : i + 1], rtol=1e-4, atol=1e-4)


@every()
def test_counts_forwards_of_single_latents(target):
    before = target.forwards
    target.output(target.noise([0, 1]), times(target), conditions(target))
    assert target.forwards - before == 2
    before = target.forwards
    run(target, target.noise([0, 1]), conditions(target), steps=3)
    assert target.forwards - before == 3 * 2 * (2 if target.has_text else 1)


@every()
def test_work_is_done_when_asked_for(target):
    before = target.forwards
    next(denoise(target, target.noise([0]), conditions(target, 1), steps=50))
    assert target.forwards - before == 1


@every()
def test_caller_keeps_its_grad_mode(target):
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            for step in denoise(target, target.noise([0]), conditions(target, 1), steps=2):
                assert torch.is_grad_enabled() is mode
                assert not step.cond.requires_grad
            target.encode_images(target.decode(step.x_next))
            assert torch.is_grad_enabled() is mode


@every()
def test_gradients_flow_to_the_state(target):
    x = target.noise([0, 1]).to(target.dtype).requires_grad_()
    target.predict(x, times(target), conditions(target)).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@every(*TEXT)
def test_every_position_stands_for_something(target):
    for prompt in ["", *PROMPTS]:
        pieces = target.pieces(prompt)
        assert len(pieces) == target.encode([prompt]).tokens.shape[1]
        # Further encoders spell the prompt once more.
        first = list(takewhile(lambda p: p.kind in ("start", "text"), pieces))
        assert [p.text for p in first if p.kind == "text"] == target.tokens(prompt)
        spelled = {i for p in first for i in range(p.start, p.end)}
        assert {i for p in pieces for i in range(p.start, p.end)} == spelled
        for piece in pieces:
            assert 0 <= piece.start <= piece.end <= len(prompt)
            assert (piece.kind == "text") is (piece.end > piece.start)


@every(*TEXT)
def test_gradients_flow_to_the_tokens(target):
    cond = target.encode(PROMPTS)
    tokens = cond.tokens.clone().requires_grad_()
    x = target.noise([0, 1]).to(target.dtype)
    target.predict(x, times(target), replace(cond, tokens=tokens)).square().sum().backward()
    assert tokens.grad is not None
    assert (tokens.grad.abs().sum((1, 2)) > 0).all()


# Not the mixture: an ordinary prompt excludes the memorized picture, and at the weight 0 its gradient is one-sided. Not sd35: its
# norms of queries and keys compute in float32.
@pytest.mark.parametrize("double", [kind for kind in TEXT if kind not in ("mixture", "sd35")], indirect=True)
def test_gradient_of_the_magnitude_is_its_finite_difference(double):
    """∂‖ε(x, e_p) − ε(x, e_∅)‖/∂e_p, per image: along itself, along single tokens, and not at all along the null prompt."""
    noise, cond, null = double.noise([0, 1]), double.encode(PROMPTS), double.encode([""])
    t = double.schedule(50).timesteps[0]
    null = replace(null, tokens=null.tokens.clone().requires_grad_())
    u = double.to_space(null_output(double, noise, null), noise, t)

    def score(tokens):
        return magnitude(double.predict(noise.to(double.dtype), t, replace(cond, tokens=tokens)), u)

    leaf = cond.tokens.clone().requires_grad_()
    d = score(leaf)
    d.sum().backward()
    assert d.dtype == torch.float64
    assert null.tokens.grad is None
    seen = leaf.grad.flatten(2).norm(dim=2).argsort(dim=1, descending=True)
    directions = [leaf.grad, torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)]
    for rank in (0, 1):  # the two tokens that matter most
        single = torch.zeros_like(leaf)
        for row, token in enumerate(seen[:, rank]):
            single[row, token] = directions[1][row, token]
        directions.append(single)
    for direction in directions:
        unit = direction / direction.flatten(1).norm(dim=1)[:, None, None]
        h = 1e-4
        with torch.no_grad():
            difference = (score(leaf + h * unit) - score(leaf - h * unit)) / (2 * h)
        torch.testing.assert_close((leaf.grad * unit).sum((1, 2)), difference, rtol=1e-5, atol=1e-8)
    assert (leaf.grad.flatten(1).norm(dim=1) > 1e-3).all()


@pytest.mark.parametrize("double", TEXT, indirect=True)
def test_order_of_null_and_prompt_in_the_batch_is_irrelevant(double):
    """Published code has had them swapped: neither the magnitude nor its gradient may notice, and the null row has none."""
    noise, cond, null = double.noise([0]).to(double.dtype), double.encode(["a cat"]), double.encode([""])
    t = double.schedule(50).timesteps[0]
    found = []
    for order in (1, -1):
        batch = Condition.cat([null, cond][::order])
        tokens = batch.tokens.clone().requires_grad_()
        out = double.predict(noise.expand(2, -1, -1, -1), t, replace(batch, tokens=tokens))
        u, c = out.split(1)[::order]
        d = magnitude(c, u.detach())
        d.sum().backward()
        gradient = tokens.grad.split(1)[::order]
        assert (gradient[0] == 0).all()
        found.append((d.detach(), gradient[1]))
    step = next(denoise(double, noise, cond, null, guidance=3.0))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(magnitude(step.cond, step.uncond), found[0][0], rtol=1e-9, atol=0)


@every()
def test_schedules_are_independent(target):
    one, other = target.schedule(4), target.schedule(4)
    noise = target.noise([0])
    x, y = one.start(noise), other.start(noise)
    cond = conditions(target, 1)
    with torch.no_grad():
        for t in one.timesteps:
            x = one.step(target.output(one.scale(x, t), t, cond), t, x)
        for t in other.timesteps:
            y = other.step(target.output(other.scale(y, t), t, cond), t, y)
    assert torch.equal(x, y)
    target.schedule(7)
    assert len(one.timesteps) == 4


@every()
def test_predict_is_the_output_in_the_target_s_space(target):
    x, t, cond = target.noise([0, 1]).to(target.dtype), times(target), conditions(target)
    with torch.no_grad():
        assert torch.equal(target.predict(x, t, cond), target.to_space(target.output(x, t, cond), x, t))
        assert target.predict(x, t, cond).dtype in (torch.float32, torch.float64)


@every()
def test_time_may_be_shared_or_per_sample(target):
    x, cond = target.noise([0, 1]).to(target.dtype), conditions(target)
    shared, own = target.schedule(4).timesteps[1], times(target)
    with torch.no_grad():
        torch.testing.assert_close(target.predict(x, shared, cond), target.predict(x, own, cond), rtol=1e-4, atol=1e-5)


@every()
def test_alpha_and_sigma_mix_signal_and_noise(target):
    """x_t = α x₀ + σ ε round trips: the true noise gives x₀ back, and the scales go the right way."""
    t = target.schedule(4).timesteps
    alpha, sigma = target.alpha_sigma(t)
    assert alpha.shape == sigma.shape == t.shape
    assert (alpha.diff() > 0).all()  # sampling goes from noise to signal
    assert (sigma.diff() < 0).all()
    x0, eps = target.noise([0] * len(t)), target.noise(range(1, len(t) + 1))
    a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    x = a * x0 + s * eps
    inside = alpha > 0.05  # at pure noise x₀ is lost, whatever the arithmetic
    torch.testing.assert_close(((x - s * eps) / a)[inside], x0[inside], rtol=1e-3, atol=1e-4)
    scalar_alpha, scalar_sigma = target.alpha_sigma(t[0])
    assert scalar_alpha.shape == scalar_sigma.shape == ()
    if target.space == "eps":
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=1e-5, atol=1e-5)


@every()
def test_identity_is_plain_json(target):
    identity = target.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity == target.identity()
    assert {"name", "kind", "dtype", "fingerprint"} <= identity.keys()
    assert identity["name"] == target.name
    assert getattr(torch, identity["dtype"]) == target.dtype


@every()
def test_pictures_are_between_0_and_1_on_the_cpu(target):
    x = target.noise([0, 1]) * 3
    pictures = target.decode(x)
    assert pictures.dtype == torch.float32
    assert pictures.device.type == "cpu"
    assert pictures.shape[:2] == (2, 3)
    assert 0 <= pictures.min() <= pictures.max() <= 1
    assert target.encode_images(pictures).shape == x.shape


@every(*TEXT)
def test_empty_prompt_scores_exactly_0(target):
    """Alone, beside other prompts, in any position, with the null pass cached or not."""
    for prompts in ([""], ["a cat", "", "a dog"], ["", "a cat", "", "", "a dog"]):
        cond, noise = target.encode(prompts), target.noise(range(len(prompts)))
        first = null_output(target, noise, null_of(target), steps=4)
        for cached in (None, first):
            for step in run(target, noise, cond, first_null=cached):
                d = magnitude(step.cond, step.uncond)
                blank = torch.tensor([not p for p in prompts])
                assert (d[blank] == 0).all()
                assert step.index > 0 or (d[~blank] > 0).all()


@every(*TEXT)
def test_magnitude_does_not_depend_on_order_sharding_or_the_cached_null(target):
    prompts, seeds = ["a cat", "a dog on a wall", "x"], [0, 1]
    cond = target.encode(prompts)
    which = torch.arange(3).repeat_interleave(2)
    noise = target.noise(seeds).repeat(3, 1, 1, 1)
    first = null_output(target, target.noise(seeds), null_of(target), steps=4)

    def scores(rows, cached):
        cached = first[rows % 2] if cached else None
        steps = run(target, noise[rows], cond.select(which[rows]), first_null=cached)
        return torch.stack([magnitude(s.cond, s.uncond) for s in steps], 1)

    rows = torch.arange(6)
    reference = scores(rows, False)
    # Rounding of the first steps is carried along by the guided trajectory.
    close = {"rtol": 2e-4, "atol": 1e-6}
    torch.testing.assert_close(scores(rows, True), reference, **close)
    torch.testing.assert_close(scores(rows.flip(0), False).flip(0), reference, **close)
    torch.testing.assert_close(torch.cat([scores(rows[:2], True), scores(rows[2:], False)]), reference, **close)
    torch.testing.assert_close(torch.cat([scores(r[None], False) for r in rows]), reference, **close)


@every(*TEXT)
def test_later_windows_and_more_seeds_are_slices_of_one_run(target):
    cond, noise = target.encode(["a cat"]), target.noise([0, 1, 2, 3])

    def scores(seeds, steps):
        detector = Magnitude(steps=steps)
        for step in denoise(target, noise[:seeds], cond.expand(seeds), null_of(target), steps=6, guidance=3.0):
            if step.index >= steps:
                break
            detector.update(step)
        return detector.per_step(), detector.compute()

    whole, _ = scores(4, 6)
    for seeds, steps in ((1, 1), (2, 3), (4, 2), (3, 6)):
        per_step, score = scores(seeds, steps)
        torch.testing.assert_close(per_step, whole[:seeds, :steps], rtol=2e-4, atol=1e-6)
        torch.testing.assert_close(score, whole[:seeds, :steps].mean(1), rtol=2e-4, atol=1e-6)


@every(*TEXT)
def test_joint_norm_is_root_n_times_the_rms(target):
    """What a norm over a whole batch (as published in places) has to do with norms per image."""
    step = run(target, target.noise([0, 1, 2]), target.encode(["a cat"]).expand(3))[0]
    joint = (step.cond.float() - step.uncond.float()).norm()
    rms = magnitude(step.cond, step.uncond).square().mean().sqrt()
    torch.testing.assert_close(joint, 3**0.5 * rms)


@every(*TEXT)
def test_text_is_told_apart_and_counted(target):
    a, b, none = (target.encode([p]).tokens for p in ("a cat", "a dog", ""))
    assert not torch.equal(a, b)
    assert not torch.equal(a, none)
    assert target.tokens("") == []
    assert target.tokens("a cat")
    assert target.dropped("a cat") == 0
    assert len(target.encode([])) == 0
    assert len(target.encode(PROMPTS)) == 2


@every("pixel", "ldm-kl")
def test_without_text_says_so(target):
    assert not target.has_text
    for call in (lambda: target.encode(["a cat"]), lambda: target.tokens("a cat"), lambda: target.dropped("a cat")):
        with pytest.raises(CannotAudit, match="takes no text"):
            call()


# One sentence with the cure


@every(*TEXT)
@pytest.mark.parametrize("guidance", [1.0, 0.0])
def test_guidance_off_says_so_before_anything_is_computed(target, guidance):
    before = target.forwards
    with pytest.raises(CannotAudit, match=r"Guidance is off \([01]\).*set guidance above 1, for instance 7\.5"):
        denoise(target, target.noise([0]), conditions(target, 1), null_of(target), guidance=guidance)
    assert target.forwards == before


@every()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_prediction_that_is_not_finite_is_named_with_its_step(target, value, monkeypatch):
    output, times = target.output, target.schedule(4).timesteps

    def broken(x, t, cond=None):
        out = output(x, t, cond)
        if t == times[2]:
            out[-1, 0, 0, 0] = value
        return out

    monkeypatch.setattr(target, "output", broken)
    where = rf"at step 2 \(t = {float(times[2]):g}\) for sample 1 of the batch"
    with pytest.raises(ModelFault, match=rf"{target.name} predicted NaN or infinity {where}; load it in float32"):
        run(target, target.noise([0, 1]), conditions(target), check=True)


@pytest.mark.parametrize("kind", NETWORKS)
def test_sizes_out_of_range_are_refused_with_those_that_fit(kind, build_pipe, adapt):
    pipe = build_pipe(kind)
    own = adapt(pipe)
    side = own.latent_shape[1] * own.factor
    for wrong in (side + 1, side // 4, side * 4, 0):
        with pytest.raises(
            UsageError, match=rf"resolution {wrong}×{wrong}: tiny was trained at {side}×{side}; use multiples"
        ):
            adapt(pipe, resolution=wrong)


def test_mixed_seeds():
    assert mix(0, 7) == 7
    assert mix(1, 0) != mix(0, 1)
    assert 0 <= mix(5, 5) < 2**63
    assert noise_from_seeds([], 0, (1, 2, 2)).shape == (0, 1, 2, 2)
