"""Stable Diffusion: parameterizations, text, pictures, and what cannot be audited."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemoscope.detect.magnitude import Magnitude
from mnemoscope.errors import CannotAudit, UnknownName, UsageError
from mnemoscope.models.host import Diffusion
from mnemoscope.models.sampling import denoise


def scheduler(pipe, **changes):
    return type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)


class Twin(UNet2DConditionModel):
    """The same network, asked for v or x₀ instead of ε."""

    def forward(self, sample, timestep, **kwargs):
        (eps,) = super().forward(sample, timestep, **kwargs)
        bar = self.bar[torch.as_tensor(timestep)].double()
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        x, eps = sample.double(), eps.double()
        x0 = (x - sigma * eps) / alpha
        return ((alpha * eps - sigma * x0 if self.wanted == "v_prediction" else x0).float(),)


@pytest.mark.parametrize("wanted", ["v_prediction", "sample"])
def test_any_parameterization_scores_like_its_eps_twin(wanted, build_pipe, adapt):
    eps = adapt(build_pipe("sd"))
    pipe = build_pipe("sd")
    pipe.unet.__class__, pipe.unet.wanted, pipe.unet.bar = Twin, wanted, pipe.scheduler.alphas_cumprod
    pipe.scheduler = scheduler(pipe, prediction_type=wanted)
    other = adapt(pipe)
    scores = []
    for target in (eps, other):
        detector = Magnitude(steps=10)
        cond = target.encode(["a cat", "", "three dots"])
        for step in denoise(target, target.noise([0, 1, 2]), cond, target.encode([""]), steps=10):
            detector.update(step)
        scores.append(detector.per_step())
        final = step.x_next
    torch.testing.assert_close(scores[1], scores[0], rtol=2e-3, atol=1e-5)  # x₀ = (x − σε)/α loses digits at α = 0.07
    assert torch.isfinite(final).all()
    assert (scores[1][1] == 0).all()


@given(seed=st.integers(0, 2**31), t=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_raw_outputs_convert_exactly(seed, t):
    """From x₀ and ε, the three outputs a network could give are known; each must lead back to ε."""
    x0, eps = torch.randn((2, 2, 4, 3, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for name in ("epsilon", "v_prediction", "sample"):
        diffusion = Diffusion(DDIMScheduler(prediction_type=name))
        alpha, sigma = diffusion.alpha_sigma(torch.tensor([t, t]))
        alpha, sigma = (c.double().view(2, 1, 1, 1) for c in (alpha, sigma))
        raw = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[name]
        back = diffusion.to_eps(raw.float(), (alpha * x0 + sigma * eps).float(), torch.tensor(t))
        torch.testing.assert_close(back, eps.float(), rtol=1e-4, atol=1e-4 if t > 50 else 2e-3)
        assert back.dtype == torch.float32


def test_times_between_training_steps_are_interpolated():
    diffusion = Diffusion(DDIMScheduler())
    whole = diffusion.alpha_sigma(torch.tensor([100, 101]))
    floating = diffusion.alpha_sigma(torch.tensor([100.0, 100.5, 101.0]))
    for exact, between in zip(whole, floating, strict=True):
        torch.testing.assert_close(between[[0, 2]], exact)
        assert min(exact) < between[1] < max(exact)
    torch.testing.assert_close(floating[0] ** 2 + floating[1] ** 2, torch.ones(3))


def test_v_is_13_times_larger_at_the_first_step():
    """√ᾱ = 0.0760 at t = 981: why an unconverted v-difference is no score (spec 1.2)."""
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    alpha, _ = Diffusion(DDIMScheduler(**config)).alpha_sigma(torch.tensor([981, 999, 481, 1]))
    torch.testing.assert_close(alpha, torch.tensor([0.0760, 0.0683, 0.5498, 0.9991]), rtol=0, atol=5e-5)


# Text


def test_long_prompts_are_cut_and_counted(target_of):
    target = target_of("sd")
    long = "cat " * 80
    counts = target.dropped(long), len(target.tokens(long))
    assert sum(counts) == len(target.tokenizer("cat " * 80, add_special_tokens=False, verbose=False).input_ids)
    assert counts[1] == 75
    assert torch.equal(target.encode([long]).tokens, target.encode([long + "dog"]).tokens)
    assert target.dropped("") == 0


def test_encoding_is_the_pipeline_s(build_pipe, adapt):
    for kind in ("sd", "sd2"):
        pipe = build_pipe(kind)
        target = adapt(pipe)
        cond, null = pipe.encode_prompt("three white dots", "cpu", 1, True)
        assert torch.equal(target.encode(["three white dots"]).tokens, cond)
        assert torch.equal(target.encode([""]).tokens, null)


def test_padding_comes_from_the_tokenizer(target_of):
    assert target_of("sd")._ids(["a"])[0, -1] == target_of("sd").tokenizer.eos_token_id
    assert target_of("sd2")._ids(["a"])[0, -1] == target_of("sd2").tokenizer.pad_token_id
    assert target_of("sd2").tokenizer.pad_token_id != target_of("sd2").tokenizer.eos_token_id


@pytest.mark.parametrize("prompt", ["", " ", "\n", "\t  "])
def test_blank_prompts_are_the_null_prompt(target_of, prompt):
    target = target_of("sd")
    both = target.encode(["a cat", prompt])
    assert both.same_as(target.encode([""])).tolist() == [False, True]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
@settings(max_examples=30, deadline=None)
def test_any_text_is_encoded(target_of, prompt):
    target = target_of("sd")
    tokens = target.encode([prompt]).tokens
    assert tokens.shape == (1, 77, 16)
    assert torch.isfinite(tokens).all()
    assert len(target.tokens(prompt)) + target.dropped(prompt) == len(target._content(prompt))


def test_broken_characters_get_a_sentence(target_of):
    with pytest.raises(UsageError, match="broken character at position 2"):
        target_of("sd").encode(["a \ud800 cat"])


def test_condition_rows(target_of):
    target = target_of("sd")
    abc = target.encode(["a", "b", "c"])
    assert torch.equal(abc.select(torch.tensor([2, 0, 0])).tokens, abc.tokens[[2, 0, 0]])
    assert torch.equal(type(abc).cat([abc, abc]).tokens, abc.tokens.repeat(2, 1, 1))
    with pytest.raises(UsageError, match="encode"):
        target.output(target.noise([0]), torch.tensor(1), None)


# Pictures and sizes


@pytest.mark.parametrize(("kind", "side", "factor"), [("sd", 16, 2), ("sd2", 64, 8)])
def test_resolution(kind, side, factor, build_pipe, adapt):
    pipe = build_pipe(kind)
    assert adapt(pipe).latent_shape[1:] == (8, 8)
    assert adapt(pipe, resolution=side * 2).latent_shape[1:] == (16, 16)
    target = adapt(pipe, resolution=(side, side // 2))
    assert target.latent_shape[1:] == (8, 4)
    assert target.identity()["resolution"] == [side, side // 2]
    assert target.decode(target.noise([0])).shape == (1, 3, side, side // 2)
    assert target.encode_images(target.decode(target.noise([0]))).shape == (1, *target.latent_shape)
    for wrong in (side + 1, side * 4, factor, 0, -side):
        with pytest.raises(UsageError, match=f"trained at {side}×{side}; use multiples of {factor}"):
            adapt(pipe, resolution=wrong)


def test_pictures_pass_the_autoencoder_in_parts(target_of, monkeypatch):
    import mnemoscope.models.host as host

    target = target_of("sd")
    pictures = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, latents = target.encode_images(pictures), target.noise(range(5))
    decoded = target.decode(latents)
    monkeypatch.setattr(host, "IMAGE_BATCH", 2)
    torch.testing.assert_close(target.encode_images(pictures), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(target.decode(latents), decoded, rtol=1e-4, atol=1e-5)
    assert torch.equal(target.encode_images(pictures), target.encode_images(pictures))  # the mean: nothing is drawn
    scale = target.vae.config.scaling_factor
    mean = target.vae.encode(pictures * 2 - 1).latent_dist.mean * scale
    torch.testing.assert_close(whole, mean, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="multiples of 2"):
        target.encode_images(torch.rand(1, 3, 15, 16))


# Samplers


@pytest.mark.parametrize("kind", [PNDMScheduler, DDPMScheduler, DPMSolverMultistepScheduler])
def test_ddim_is_built_from_whatever_the_checkpoint_brings(kind, build_pipe, adapt):
    pipe = build_pipe("sd")
    expected = adapt(pipe).identity()["scheduler"]
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    target = adapt(pipe)
    assert type(pipe.scheduler) is kind  # the user's object is not touched
    assert target.identity()["scheduler"]["class"] == "DDIMScheduler"
    for key in ("beta_start", "beta_end", "beta_schedule", "clip_sample", "steps_offset", "prediction_type"):
        assert target.identity()["scheduler"][key] == expected[key]
    assert target.schedule(50).timesteps[0] == 981


def test_own_sampler(build_pipe, adapt):
    pipe = build_pipe("sd")
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    target = adapt(pipe, sampler="own")
    assert target.identity()["scheduler"]["class"] == "PNDMScheduler"
    assert target.identity()["fingerprint"] != adapt(pipe).identity()["fingerprint"]
    first, second = (
        list(denoise(target, target.noise([0]), target.encode(["a"]), target.encode([""]), steps=5)) for _ in "ab"
    )
    assert len(first) == 6  # PNDM repeats a step to warm up
    assert torch.equal(first[-1].x_next, second[-1].x_next)


def test_samplers_that_draw_are_refused(build_pipe, adapt):
    pipe = build_pipe("sd")
    config = pipe.scheduler.config
    pipe.scheduler = DDPMScheduler.from_config(config)
    with pytest.raises(CannotAudit, match=r"DDPMScheduler, draws noise while it samples.*use sampler='ddim'"):
        adapt(pipe, sampler="own")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(config, algorithm_type="sde-dpmsolver++")
    with pytest.raises(CannotAudit, match=r"DPMSolverMultistepScheduler \(sde-dpmsolver\+\+\)"):
        adapt(pipe, sampler="own")
    with pytest.raises(UnknownName, match="Did you mean 'ddim'"):
        adapt(pipe, sampler="dim")


def test_zero_terminal_snr_starts_where_prompts_can_be_told_apart(build_pipe, adapt):
    """At ᾱ = 0 every prompt scores 0, so the schedule must not begin there."""
    pipe = build_pipe("sd-v")
    pipe.scheduler = scheduler(pipe, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert pipe.scheduler.alphas_cumprod[-1] == 0
    target = adapt(pipe)
    step = next(denoise(target, target.noise([0]), target.encode(["a cat"]), target.encode([""]), steps=50))
    assert step.t == 981
    assert (step.cond - step.uncond).norm() > 0


# What cannot be audited


def unet_with(pipe, **changes):
    config = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")}
    return UNet2DConditionModel.from_config({**config, **changes})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"time_cond_proj_dim": 8}, "distilled with guidance inside"),
        ({"in_channels": 9}, "takes 9 channels and its latents have 4: inpainting"),
        ({"class_embed_type": "timestep"}, "needs more than a prompt"),
    ],
)
def test_denoisers_that_need_more_than_a_prompt(change, sentence, build_pipe, adapt):
    pipe = build_pipe("sd")
    pipe.unet = unet_with(pipe, **change)
    with pytest.raises(CannotAudit, match=sentence):
        adapt(pipe)


def test_missing_parts(build_pipe, adapt):
    pipe = build_pipe("sd")
    pipe.text_encoder = None
    with pytest.raises(CannotAudit, match="without its text_encoder"):
        adapt(pipe)


def test_prediction_types_of_other_families(build_pipe, adapt):
    pipe = build_pipe("sd")
    pipe.scheduler.register_to_config(prediction_type="flow_prediction")
    with pytest.raises(CannotAudit, match="prediction type 'flow_prediction'"):
        adapt(pipe)


def test_weights_are_frozen(build_pipe, adapt):
    pipe = build_pipe("sd")
    target = adapt(pipe)
    tokens = target.encode(["a cat"]).tokens.requires_grad_()
    target.predict(target.noise([0]), torch.tensor(981), type(target.encode([""]))(tokens)).sum().backward()
    assert tokens.grad is not None
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert not module.training
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model_scores_in_float32(dtype, build_pipe, adapt):
    pipe = build_pipe("sd")
    full = adapt(pipe)
    reference = next(denoise(full, full.noise([0]), full.encode(["a cat"]), full.encode([""])))
    half = adapt(build_pipe("sd").to(dtype))
    x = half.noise([0])
    step = next(denoise(half, x, half.encode(["a cat"]), half.encode([""])))
    assert x.dtype == step.cond.dtype == step.uncond.dtype == torch.float32
    assert half.output(x, torch.tensor(981), half.encode([""])).dtype == dtype
    assert half.decode(x).dtype == torch.float32
    torch.testing.assert_close(step.cond, reference.cond, rtol=0.1, atol=0.1)
