"""Our magnitude against the official code's, on the same weights and starting noise (README.md says how they were made)."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from mnemoscope.detect.magnitude import Magnitude, magnitude
from mnemoscope.models.base import Condition
from mnemoscope.models.load import load
from mnemoscope.models.sampling import denoise, null_output


@pytest.fixture(scope="module")
def reference(official_wen):
    return json.loads((official_wen / "reference.json").read_text())


@pytest.fixture(scope="module")
def tensors(official_wen):
    return load_file(official_wen / "tensors.safetensors")


@pytest.fixture(scope="module")
def ours(official_wen, reference, tensors):
    """All five prompts with four seeds each, as one batch of 20: norms [5, 4, 50] with and without the prompt, and x₀."""
    target = load(official_wen / "model", guidance=reference["guidance_scale"])
    cond = target.encode(reference["prompts"])
    cond = Condition.cat([cond.select(torch.tensor([i])).expand(4) for i in range(len(cond))])
    noise = torch.cat([tensors[f"xT.{i}"] for i in range(5)])
    detector, null_norms = Magnitude(steps=50), []
    for step in denoise(target, noise, cond, target.encode([""]), steps=reference["num_inference_steps"]):
        detector.update(step)
        null_norms.append(step.uncond.flatten(1).norm(dim=1))
    shape = (5, 4, 50)
    return detector.per_step().view(shape), torch.stack(null_norms, 1).view(shape), step.x_next.view(5, 4, 4, 16, 16)


def theirs(reference, key):
    return torch.tensor([row[key] for row in reference["rows"]])


def test_magnitude_at_every_step(reference, ours):
    torch.testing.assert_close(ours[0], theirs(reference, "cond_minus_uncond_norm"), rtol=1e-5, atol=0)


def test_empty_prompt_is_exactly_0_in_both(reference, ours):
    assert reference["prompts"][4] == ""
    assert (ours[0][4] == 0).all()
    assert (theirs(reference, "cond_minus_uncond_norm")[4] == 0).all()


def test_norm_of_the_null_prediction_at_every_step(reference, ours):
    torch.testing.assert_close(ours[1], theirs(reference, "uncond_norm"), rtol=1e-5, atol=0)


def test_final_latents(tensors, ours):
    """Their scale is about 10; the guided trajectory carries rounding along for fifty steps."""
    expected = torch.stack([tensors[f"x0.{i}"] for i in range(5)])
    torch.testing.assert_close(ours[2], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("i", range(4))
def test_gradient_with_respect_to_each_token(official_wen, reference, tensors, i):
    """One embedding shared by four images, the norm over all of them, and 2n: as the official code has it."""
    target = load(official_wen / "model")
    noise, cond, null = tensors[f"xT.{i}"], target.encode([reference["prompts"][i]]), target.encode([""])
    leaf = Condition(cond.tokens.requires_grad_())
    uncond = null_output(target, noise, null)  # ε-prediction: the raw output is ε
    d = magnitude(target.predict(noise, target.schedule(50).timesteps[0], leaf.expand(4)), uncond)
    (gradient,) = torch.autograd.grad(d.square().sum().sqrt(), leaf.tokens)
    expected = torch.tensor(reference["rows"][i]["token_grad_step0_joint_over_2n"])
    torch.testing.assert_close(gradient[0].norm(dim=1) / 8, expected, rtol=1e-4, atol=1e-6)
