"""Watching a user's pipeline: nothing changes, and what is seen is what our own loop sees."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, EulerDiscreteScheduler

from mnemoscope.detect.magnitude import Magnitude, magnitude
from mnemoscope.errors import CannotAudit, UsageError
from mnemoscope.models.sampling import denoise
from mnemoscope.models.watch import watch


def generate(pipe, prompt="a cat", **options):
    generator = [torch.Generator().manual_seed(j) for j in range(2)]
    options = {"num_inference_steps": 4, "num_images_per_prompt": 2, "output_type": "latent", **options}
    return pipe(prompt, generator=generator, **options).images


@pytest.fixture(scope="module", params=["sd", "sd-v", "sd2"])
def pipe(request, build_pipe):
    return build_pipe(request.param)


def test_pictures_stay_bit_identical(pipe):
    plain = generate(pipe)
    with watch(pipe) as steps:
        watched = generate(pipe)
    assert torch.equal(plain, watched)
    assert len(steps) == 4


def test_sees_what_our_own_loop_sees(pipe, adapt):
    target = adapt(pipe)  # first, for it freezes the weights: see test_sampling.py
    with watch(pipe) as steps:
        latents = generate(pipe)
    own = list(denoise(target, target.noise([0, 1]), target.encode(["a cat"]).expand(2), target.encode([""]), steps=4))
    assert torch.equal(own[-1].x_next, latents)
    for seen, ours in zip(steps, own, strict=True):
        assert (seen.index, seen.t, seen.space) == (ours.index, ours.t, ours.space)
        assert torch.equal(seen.x, ours.x)
        assert torch.equal(seen.cond, ours.cond)
        assert torch.equal(seen.uncond, ours.uncond)
    for seen, ours in zip(steps[:-1], own[:-1], strict=True):
        assert torch.equal(seen.x_next, ours.x_next)
    assert steps[-1].x_next is None


def test_leaves_the_pipeline_as_it_was(build_pipe):
    pipe = build_pipe("sd")
    scheduler, config = pipe.scheduler, dict(pipe.scheduler.config)
    with watch(pipe):
        generate(pipe)
    assert pipe.scheduler is scheduler
    assert dict(scheduler.config) == config
    assert all(p.requires_grad for p in pipe.unet.parameters())
    assert not pipe.unet._forward_hooks
    with pytest.raises(KeyError), watch(pipe):
        raise KeyError
    assert not pipe.unet._forward_hooks


def test_empty_prompt_scores_exactly_0(pipe):
    detector = Magnitude(steps=4)
    with watch(pipe, detector):
        generate(pipe, ["", "a cat"], num_images_per_prompt=1)
    empty, cat = detector.compute()
    assert empty == 0
    assert cat > 0


def test_empty_prompt_is_exact_even_where_rows_of_a_batch_differ(build_pipe):
    """As in test_sampling.py: the pipeline's own two halves may differ in the last bits."""
    pipe, detector = build_pipe("sd"), Magnitude(steps=4)

    def uneven(module, args, output):
        return (output[0] + 1e-6 * torch.arange(len(output[0])).view(-1, 1, 1, 1),)

    pipe.unet.register_forward_hook(uneven)
    with watch(pipe, detector):
        generate(pipe, ["", "a cat"], num_images_per_prompt=1)
    empty, cat = detector.compute()
    assert empty == 0
    assert cat > 0


def test_observers_see_each_step_at_once(pipe):
    detector, seen = Magnitude(steps=2), []
    with watch(pipe, detector, lambda step: seen.append(step.index)) as steps:
        generate(pipe)
        assert seen == [0, 1, 2, 3]
    expected = torch.stack([magnitude(s.cond, s.uncond) for s in steps[:2]]).mean(0)
    assert torch.equal(detector.compute(), expected)


def test_each_generation_starts_at_0(pipe):
    with watch(pipe) as steps:
        generate(pipe)
        generate(pipe, num_inference_steps=1)
        generate(pipe, num_inference_steps=1)
        generate(pipe, num_inference_steps=2)
    assert [s.index for s in steps] == [0, 1, 2, 3, 0, 0, 0, 1]
    assert [len(run) for run in steps.runs] == [4, 1, 1, 2]
    assert [s.x_next is None for s in steps] == [False, False, False, True, True, True, False, True]


def test_guidance_off_shows_no_second_prediction(pipe):
    with watch(pipe) as steps:
        generate(pipe, guidance_scale=1.0)
    assert all(s.uncond is None for s in steps)
    assert steps[0].cond.shape[0] == 2
    with pytest.raises(CannotAudit, match="set guidance above 1"), watch(pipe, Magnitude()):
        generate(pipe, guidance_scale=1.0)
    assert not pipe.unet._forward_hooks


def test_forgetting_the_context_manager(pipe):
    with watch(pipe) as steps:
        pass
    generate(pipe)
    assert len(steps) == 0
    for ask in (lambda: steps[0], lambda: list(steps), lambda: steps.runs):
        with pytest.raises(UsageError, match="No steps seen: the pipeline ran outside `with watch"):
            ask()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers' Euler
def test_own_sampler_of_the_pipeline(build_pipe, adapt):
    pipe = build_pipe("sd-v")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    target = adapt(pipe, sampler="own")
    with watch(pipe) as steps:
        generate(pipe)
    own = list(denoise(target, target.noise([0, 1]), target.encode(["a cat"]).expand(2), target.encode([""]), steps=4))
    for seen, ours in zip(steps, own, strict=True):
        assert torch.equal(seen.x, ours.x)
        assert torch.equal(seen.cond, ours.cond)


def test_unconditional_pipelines(build_pipe, adapt):
    pipe = build_pipe("pixel")
    ddim = DDIMPipeline(pipe.unet, pipe.scheduler)
    target = adapt(ddim)
    with watch(ddim) as steps:
        ddim(batch_size=2, generator=[torch.Generator().manual_seed(j) for j in range(2)], num_inference_steps=4)
    for seen, ours in zip(steps, denoise(target, target.noise([0, 1]), None, steps=4), strict=True):
        assert torch.equal(seen.x, ours.x)
        assert torch.equal(seen.cond, ours.cond)
        assert seen.uncond is None
    ancestral = DDPMPipeline(pipe.unet, pipe.scheduler)
    with watch(ancestral) as steps:
        ancestral(num_inference_steps=3)
    assert [s.index for s in steps] == [0, 1, 2]


def test_pipeline_with_an_unknown_layout():
    class FluxPipeline:
        pass

    with (
        pytest.raises(CannotAudit, match="FluxPipeline cannot be audited yet: its guidance is distilled"),
        watch(FluxPipeline()),
    ):
        pass
