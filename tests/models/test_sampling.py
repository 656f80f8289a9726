"""Our own loop: the same pictures as the untouched pipeline, bit for bit, and its guards.

Targets are made before the pipelines run: a target freezes its weights, and for frozen weights PyTorch picks another
convolution kernel on the CPU, which alone moves results by 2e-7.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMPipeline, EulerDiscreteScheduler, LDMPipeline

from mnemoscope.errors import CannotAudit, ModelFault, UsageError
from mnemoscope.models.sampling import denoise, null_output


def last(steps):
    *_, step = steps
    return step


def generators(n):
    return [torch.Generator().manual_seed(j) for j in range(n)]


@pytest.fixture(scope="module", params=["sd", "sd-v", "sd-x0", "sd2"])
def pair(request, build_pipe, adapt):
    pipe = build_pipe(request.param)
    return pipe, adapt(pipe)


def test_same_latents_and_pictures_as_the_pipeline(pair):
    pipe, target = pair
    for prompts, images in ((["a cat"], 2), (["a cat", "three white dots"], 1)):
        options = {"num_images_per_prompt": images, "num_inference_steps": 5, "guidance_scale": 7.5}
        latents = pipe(prompts, generator=generators(2), output_type="latent", **options).images
        pictures = pipe(prompts, generator=generators(2), output_type="pt", **options).images
        cond = target.encode(prompts).select(torch.arange(len(prompts)).repeat_interleave(images))
        x0 = last(denoise(target, target.noise([0, 1]), cond, target.encode([""]), steps=5)).x_next
        assert torch.equal(x0, latents)
        assert torch.equal(target.decode(x0), pictures)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers' Euler
def test_same_latents_with_the_pipeline_s_own_sampler(build_pipe, adapt):
    """A sampler that keeps its state in σ-space: the state stays inside the schedule, steps show what the UNet is shown."""
    pipe = build_pipe("sd-v")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    own, ddim = adapt(pipe, sampler="own"), adapt(pipe)
    latents = pipe("a cat", generator=generators(1), output_type="latent", num_inference_steps=5).images
    steps = list(denoise(own, own.noise([0]), own.encode(["a cat"]), own.encode([""]), steps=5))
    assert torch.equal(steps[-1].x_next, latents)
    # The same x at the same time is the same prediction, whichever sampler got there.
    t = torch.tensor(steps[2].t)
    torch.testing.assert_close(ddim.predict(steps[2].x, t, ddim.encode(["a cat"])), steps[2].cond, rtol=1e-5, atol=1e-6)
    a, s = own.alpha_sigma(torch.tensor(steps[0].t))
    assert steps[0].x.std() == pytest.approx(float((a**2 + s**2).sqrt()), abs=0.2)


def test_same_pictures_as_an_unconditional_pixel_pipeline(build_pipe, adapt):
    pipe = build_pipe("pixel")
    ddim = DDIMPipeline(pipe.unet, pipe.scheduler)
    ddim.set_progress_bar_config(disable=True)
    targets = [adapt(pipe), adapt(ddim)]
    pictures = ddim(batch_size=2, generator=generators(2), num_inference_steps=5, output_type="np").images
    for target in targets:
        x0 = last(denoise(target, target.noise([0, 1]), None, steps=5)).x_next
        assert torch.equal(target.decode(x0), torch.from_numpy(pictures).permute(0, 3, 1, 2))


@pytest.mark.parametrize("kind", ["ldm-kl", "ldm-vq"])
def test_same_pictures_as_a_latent_unconditional_pipeline(kind, build_pipe, adapt):
    pipe = build_pipe(kind)
    assert isinstance(pipe, LDMPipeline)
    target = adapt(pipe)
    pictures = pipe(batch_size=2, generator=generators(2), num_inference_steps=5, output_type="np").images
    x0 = last(denoise(target, target.noise([0, 1]), None, steps=5)).x_next
    assert torch.equal(target.decode(x0), torch.from_numpy(pictures).permute(0, 3, 1, 2))


def test_cached_null_saves_exactly_its_forwards(target_of):
    target = target_of("sd")
    noise, cond, null = target.noise([0, 1]), target.encode(["a cat", "a dog"]), target.encode([""])
    before = target.forwards
    first = null_output(target, noise, null, steps=10)
    assert target.forwards - before == 2
    next(denoise(target, noise, cond, null, steps=10, first_null=first))
    assert target.forwards - before == 4  # n for the bank, P·n for the prompts


def test_step_says_where_it_is(target_of):
    target = target_of("sd")
    steps = list(denoise(target, target.noise([0]), target.encode(["a"]), target.encode([""]), steps=50))
    assert [s.index for s in steps] == list(range(50))
    assert [s.t for s in steps] == list(range(981, 0, -20))  # Stable Diffusion's fifty
    for a, b in pairwise(steps):
        assert torch.equal(a.x_next, b.x)
    assert all(s.space == "eps" for s in steps)


def test_without_a_null_condition_the_prompt_alone_drives(target_of):
    target = target_of("sd")
    cond = target.encode(["a cat"])
    (step,) = denoise(target, target.noise([0]), cond, steps=1)
    assert step.uncond is None
    assert torch.equal(step.cond, target.predict(step.x, torch.tensor(1), cond))


@pytest.mark.parametrize("guidance", [1.0, 0.0, -1.0, float("nan")])
def test_guidance_off_has_nothing_to_compare(target_of, guidance):
    target = target_of("sd")
    with pytest.raises(CannotAudit, match=r"nothing to compare; set guidance above 1"):
        denoise(target, target.noise([0]), target.encode(["a"]), target.encode([""]), guidance=guidance)


def test_sizes_that_disagree(target_of):
    target = target_of("sd")
    cond, null = target.encode(["a"]), target.encode([""])
    with pytest.raises(CannotAudit, match="1 prompts for 2 noises"):
        denoise(target, target.noise([0, 1]), cond, null)
    with pytest.raises(CannotAudit, match="1 null predictions for 2 noises"):
        denoise(target, target.noise([0, 1]), cond.expand(2), null, first_null=target.noise([0]))
    for steps in (0, 1001):
        with pytest.raises(UsageError, match=f"steps={steps}: tiny was trained on 1000"):
            next(denoise(target, target.noise([0]), cond, null, steps=steps))


def test_nan_is_named_with_its_step(build_pipe, adapt):
    target = adapt(build_pipe("sd"))
    cond, null, noise = target.encode(["a", "b"]), target.encode([""]), target.noise([0, 1])
    calls = []

    def poison(module, args, output):
        calls.append(1)
        if len(calls) == 3:
            output[0][3, 0, 0, 0] = float("nan")

    target.unet.register_forward_hook(poison)
    with pytest.raises(ModelFault, match=r"tiny predicted NaN or infinity at step 2 \(t = 251\) for sample 1"):
        list(denoise(target, noise, cond, null, steps=4))
    calls.clear()
    steps = list(denoise(target, noise, cond, null, steps=4, check=False))
    assert [bool(s.cond[1].isnan().any()) for s in steps] == [False, False, True, True]
    assert not any(s.cond[0].isnan().any() for s in steps)  # the neighbor is unharmed


def test_empty_prompt_is_exact_even_where_rows_of_a_batch_differ(build_pipe, adapt, monkeypatch):
    """GPUs and other batch sizes compute equal rows differently in the last bits; tiny models on a CPU happen not to."""
    target = adapt(build_pipe("sd"))

    def uneven(rows):
        return rows + 1e-6 * torch.arange(len(rows)).view(-1, *[1] * (rows.ndim - 1))

    embed, output = target._embed, target.output
    monkeypatch.setattr(target, "_embed", lambda ids: uneven(embed(ids)))
    monkeypatch.setattr(target, "output", lambda x, t, cond: uneven(output(x, t, cond)))
    cond, null, noise = target.encode(["a cat", "", "a dog", " "]), target.encode([""]), target.noise(range(4))
    assert cond.same_as(null).tolist() == [False, True, False, True]
    for first_null in (None, null_output(target, noise, null, steps=3)):
        for step in denoise(target, noise, cond, null, steps=3, first_null=first_null):
            assert [bool((c == u).all()) for c, u in zip(step.cond, step.uncond, strict=True)] == [
                False,
                True,
                False,
                True,
            ]
