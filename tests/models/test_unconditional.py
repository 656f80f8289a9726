"""Models without text."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from mnemoscope.errors import CannotAudit, UsageError


def plain(config):
    return {k: v for k, v in config.items() if not k.startswith("_")}


def test_pixel_models_map_pictures_to_minus_one_and_one(target_of):
    target = target_of("pixel")
    pictures = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(target.encode_images(pictures), pictures * 2 - 1)
    torch.testing.assert_close(target.decode(target.encode_images(pictures)), pictures)
    assert target.latent_shape == (3, 8, 8)


def test_gray_models_show_gray_pictures(target_of):
    target = target_of("gray")
    pictures = target.decode(target.noise([0]))
    assert torch.equal(pictures[:, 0], pictures[:, 2])
    torch.testing.assert_close(target.decode(target.encode_images(pictures)), pictures)


def test_learned_variance_is_left_out(target_of):
    target = target_of("gray")
    x = target.noise([0])
    assert target.unet.config.out_channels == 2
    whole = target.unet(x, torch.tensor(5)).sample
    assert torch.equal(target.output(x, torch.tensor(5)), whole[:, :1])


def test_vq_latents_are_taken_before_quantization(target_of):
    target = target_of("ldm-vq")
    pictures = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    z = target.encode_images(pictures)
    assert torch.equal(z, target.vae.encode(pictures * 2 - 1).latents * target.vae.config.scaling_factor)
    quantized, *_ = target.vae.quantize(z)
    assert not torch.equal(z, quantized)


def test_kl_latents_are_the_mean(target_of):
    target = target_of("ldm-kl")
    pictures = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean = target.vae.encode(pictures * 2 - 1).latent_dist.mean
    assert torch.equal(target.encode_images(pictures), mean * target.vae.config.scaling_factor)


def test_resolution_fits_the_halvings_of_the_unet(build_pipe, adapt):
    pipe = build_pipe("pixel")
    target = adapt(pipe, resolution=12)
    assert target.output(target.noise([0]), torch.tensor(1)).shape == (1, 3, 12, 12)
    with pytest.raises(UsageError, match="trained at 8×8; use multiples of 2"):
        adapt(pipe, resolution=9)
    assert adapt(build_pipe("ldm-kl"), resolution=24).latent_shape == (3, 12, 12)


def test_no_prompt_may_be_given(target_of, adapt, build_pipe):
    cond = target_of("sd").encode(["a"])
    with pytest.raises(CannotAudit, match="takes no text"):
        target_of("pixel").output(target_of("pixel").noise([0]), torch.tensor(1), cond)
    with pytest.raises(UsageError, match="guidance=3: tiny takes no text, so there is nothing to guide"):
        adapt(build_pipe("pixel"), guidance=3.0)


def test_class_conditional_models_are_refused(build_pipe, adapt):
    pipe = build_pipe("pixel")
    unet = UNet2DModel.from_config({**plain(pipe.unet.config), "num_class_embeds": 10})
    with pytest.raises(CannotAudit, match="conditioned on 10 classes"):
        adapt(DDPMPipeline(unet, DDPMScheduler()))


def test_latent_model_without_its_autoencoder(build_pipe, adapt):
    pipe = build_pipe("pixel")
    unet = UNet2DModel.from_config({**plain(pipe.unet.config), "in_channels": 4, "out_channels": 4})
    with pytest.raises(CannotAudit, match="works on 4 channels and has no autoencoder"):
        adapt(DDPMPipeline(unet, DDPMScheduler()))
