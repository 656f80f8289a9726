"""Stable Diffusion 3: the flow's conventions, three text encoders, the untouched pipeline's own bits, and what cannot be audited."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
)

from mnemoscope.audit.check import check
from mnemoscope.detect.magnitude import Magnitude, magnitude
from mnemoscope.errors import CannotAudit, UsageError
from mnemoscope.explain.tokens import Block, explain_prompt
from mnemoscope.measure.invmm import InvMM, preset
from mnemoscope.mitigate.pipeline import GuidanceDriver
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.models.load import load
from mnemoscope.models.noising import noised, split
from mnemoscope.models.sampling import denoise
from mnemoscope.models.steer import steer, target_around
from mnemoscope.models.watch import watch
from whole import Whole

KINDS = ["sd3", "sd35"]
PROMPTS = ["a cat", "three white dots on a red field"]


def generate(pipe, prompt="a cat", **options):
    generator = [torch.Generator().manual_seed(j) for j in range(2)]
    options = {"num_inference_steps": 4, "num_images_per_prompt": 2, "output_type": "latent", **options}
    return pipe(prompt, generator=generator, **options).images


def ours(target, prompts=("a cat", "a cat"), **options):
    noise, null = target.noise(range(len(prompts))), target.encode([""])
    cond = target.encode(list(prompts)) if len(set(prompts)) > 1 else target.encode([prompts[0]]).expand(len(prompts))
    return list(denoise(target, noise, cond, null, **{"steps": 4, **options}))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(kind, build_pipe):
    return build_pipe(kind)


@pytest.fixture
def target(kind, target_of):
    return target_of(kind)


# The untouched pipeline


def test_own_loop_and_watching_give_the_pipeline_s_bits(pipe, adapt):
    plain = generate(pipe)
    target = adapt(pipe)
    with watch(pipe) as steps:
        watched = generate(pipe)
    own = ours(target)
    assert torch.equal(plain, watched)
    assert torch.equal(plain, own[-1].x_next)
    for seen, mine in zip(steps, own, strict=True):
        assert (seen.index, seen.t, seen.space) == (mine.index, mine.t, "velocity")
        for field in ("x", "cond", "uncond"):
            assert torch.equal(getattr(seen, field), getattr(mine, field))
    assert not pipe.transformer._forward_hooks


def test_pictures_are_the_pipeline_s(pipe, adapt):
    target = adapt(pipe)
    pictures = generate(pipe, output_type="pt")
    assert torch.equal(target.decode(ours(target)[-1].x_next), pictures)


def test_autoencoder_s_shift_and_scale(target):
    """Latents are (z − shift)·scale."""
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean = target.vae.encode(pictures * 2 - 1).latent_dist.mean
    assert torch.equal(target.encode_images(pictures), (mean - 0.0609) * 1.5305)


def test_empty_prompt_scores_0_in_a_watched_pipeline(pipe):
    detector = Magnitude(steps=4)
    with watch(pipe, detector):
        generate(pipe, ["", "a cat"], num_images_per_prompt=1)
    empty, cat = detector.compute()
    assert empty == 0
    assert cat > 0
    assert detector.space == "velocity"


def test_another_pooled_text_is_another_prompt(pipe, target):
    """The sequence of the empty prompt with the pooled text of another does not score 0."""
    null, cat = target.encode([""]), target.encode(["a cat"])
    arguments = {
        "prompt_embeds": null.tokens,
        "pooled_prompt_embeds": cat.extra["pooled"],
        "negative_prompt_embeds": null.tokens,
        "negative_pooled_prompt_embeds": null.extra["pooled"],
    }
    with watch(pipe) as steps:
        generate(pipe, None, num_images_per_prompt=1, **{k: v.expand(2, *v.shape[1:]) for k, v in arguments.items()})
    assert (magnitude(steps[0].cond, steps[0].uncond) > 0).all()


def test_guidance_off_and_guidance_by_layers(pipe):
    with watch(pipe) as steps:
        generate(pipe, guidance_scale=1.0)
    assert all(step.uncond is None for step in steps)
    plain = generate(pipe, skip_guidance_layers=[0], skip_layer_guidance_stop=1.0)
    with watch(pipe) as steps:
        watched = generate(pipe, skip_guidance_layers=[0], skip_layer_guidance_stop=1.0)
    assert torch.equal(plain, watched)
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert not torch.equal(plain, generate(pipe))


@pytest.mark.parametrize("kind_of_shift", ["exponential", "linear"])
def test_times_shifted_by_the_number_of_patches(kind_of_shift, build_pipe, adapt):
    pipe = build_pipe("sd3")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind_of_shift)
    plain = generate(pipe, height=24, width=16)
    target = adapt(pipe, resolution=(24, 16))
    assert torch.equal(ours(target)[-1].x_next, plain)
    assert torch.equal(target.schedule(4).timesteps, pipe.scheduler.timesteps)
    every = target.training_times(torch.arange(1000) / 1000 + 5e-4)
    tabulated = pipe.scheduler.time_shift(target._spacing["mu"], 1.0, torch.arange(1, 1001) / 1000) * 1000
    torch.testing.assert_close(every, tabulated)


def test_from_a_picture(build_pipe, adapt):
    pipe = StableDiffusion3Img2ImgPipeline(**build_pipe("sd3").components)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with watch(pipe) as steps:
        pipe("a cat", image=picture, strength=0.5, num_inference_steps=4, output_type="latent")
    assert [step.index for step in steps] == [0, 1]
    assert adapt(pipe).encode(["a cat"]).tokens.shape[1] == 77 + 256


# Conventions of the flow


def test_forward_process_is_the_scheduler_s_and_that_of_closed_forms(target):
    """x_t = (1 − σ) x₀ + σ ε at t = 1000 σ."""
    x0, eps = target.noise([0, 1]), target.noise([2, 3])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    t = scheduler.timesteps[[200, 999]]
    torch.testing.assert_close(noised(target, x0, t, eps), scheduler.scale_noise(x0, t, eps))
    world = Gaussian.tiny(space="velocity")
    for ours, theirs in zip(target.alpha_sigma(t), world.alpha_sigma(t / 1000), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_splits_what_it_predicts_into_picture_and_noise(target, monkeypatch):
    """A network that answers ε − x₀ has found both, and it is told 1000 σ."""
    x0, eps, t = target.noise([0, 1]), target.noise([2, 3]), torch.tensor([900.0, 20.0])
    told = {}

    def oracle(**given):
        told.update(given)
        return ((eps - x0).to(torch.float32),)

    monkeypatch.setattr(target.unet, "forward", oracle)
    cond = target.encode(PROMPTS)
    found = split(target, noised(target, x0, t, eps), t, cond)
    torch.testing.assert_close(found[0], x0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], eps, rtol=1e-4, atol=1e-5)
    assert torch.equal(told["timestep"], t)
    assert torch.equal(told["pooled_projections"], cond.extra["pooled"])


def test_training_times_are_the_scheduler_s_table(target):
    table = FlowMatchEulerDiscreteScheduler(shift=3.0).timesteps.flip(0)
    torch.testing.assert_close(target.training_times(torch.arange(1000) / 1000 + 5e-4), table)
    assert target.whole_schedule(10).timesteps[0] == target.schedule(50).timesteps[0] == 1000
    with pytest.raises(UsageError, match="trained on 1000 timesteps"):
        target.schedule(1001)


# Text


def test_encoding_is_the_pipeline_s(pipe, adapt):
    target = adapt(pipe)
    cond, null, pooled, none = pipe.encode_prompt("three white dots", None, None, device="cpu")
    found, empty = target.encode(["three white dots"]), target.encode([""])
    for ours, tokens, vector in ((found, cond, pooled), (empty, null, none)):
        assert torch.equal(ours.tokens, tokens)
        assert torch.equal(ours.extra["pooled"], vector)
    assert (found.tokens[:, 77:] == 0).all() == (pipe.text_encoder_3 is None)


@pytest.mark.parametrize("prompt", ["", " ", "\n", "\t  "])
def test_blank_prompts_are_the_null_prompt(target, prompt):
    both = target.encode(["a cat", prompt])
    assert both.same_as(target.encode([""])).tolist() == [False, True]
    assert len(target.encode([])) == 0


def test_long_prompts_are_cut_without_remark(target, caplog):
    long = "cat " * 80
    with caplog.at_level(logging.WARNING):
        both = target.encode([long, long + "dog"])
    assert not [r for r in caplog.records if "truncated" in r.getMessage()]
    assert (len(target.tokens(long)), target.dropped(""), target.dropped("a cat")) == (75, 0, 0)
    assert target.dropped(long) == len(target.tokenizer("cat " * 80, add_special_tokens=False).input_ids) - 75
    clip, t5 = both.tokens.split([77, 256], dim=1)
    assert torch.allclose(clip[0], clip[1], atol=1e-5)
    assert torch.allclose(t5[0], t5[1], atol=1e-5) == ("tokenizer_3" not in target.tokenizers)
    with pytest.raises(UsageError, match="broken character at position 2"):
        target.encode(["a \ud800 cat"])


def test_a_word_stands_in_both_sequences(target_of):
    for kind, places in (("sd3", 2), ("sd35", 1)):
        block = Block(target_of(kind), ["a cat, xyz"], 1)
        words = {word.text: word.positions for word in block.words[0]}
        assert list(words) == ["a", "cat", ",", "xyz"]
        assert len({p // 77 > 0 for p in words["cat"]}) == places
        assert sum(p.kind == "end" for p in block.pieces[0]) == 2


@pytest.mark.parametrize("method", ["edit", "wen", "integrated-gradients", "leave-one-out"])
def test_explains(target, method):
    found = explain_prompt(target, "a cat on a red field", method=method, seeds=2, steps=4)
    assert [word.text for word in found.words] == ["a", "cat", "on", "a", "red", "field"]
    assert found.space == "velocity"
    assert any(word.value != 0 for word in found.words)


def test_edits_are_aligned_in_each_encoder(target_of):
    """Without a word, what stood after it stands one place further ahead in each sequence: encoders that do not mix see no other change."""
    target = target_of("sd3")
    block = Block(target, ["a cat on"], 1)
    cat = next(i for i, word in enumerate(block.words[0]) if word.text == "cat")
    (places,) = [p for p, word in zip(block._aligned, block.words[0], strict=True) if word is block.words[0][cat]]
    texts = [p.text for p in target.pieces("a on")]
    for i, piece in enumerate(block.pieces[0]):
        if i not in block.words[0][cat].positions:
            assert texts[places[i]] == piece.text
    alone = Block(target_of("sd35"), ["a cat on"], 1)
    assert (alone.edits[0, :-1, 77:] == 0).all()  # without T5 nothing is there to change


# What else reads a target


def test_check_names_its_space(target):
    found = check(target, "a cat", seeds=2, steps=4)
    assert found.space == "velocity"
    assert found.score > 0
    assert check(target, "", seeds=2, steps=4).score == 0


def test_invmm_measures_under_a_caption_and_asks_for_one(target):
    few = {"updates": 4, "every": 2, "batch": 2, "draws": 1, "steps": 2, "scales": (1.0, 3.0)}
    brief = replace(preset("official", "text"), **few)
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    method = InvMM(target, Whole(), brief, beta=-2.0)
    with pytest.raises(CannotAudit, match=f"{target.name} reads no mixtures of tokens; give captions, or empty ones"):
        method(pictures)
    for stored in method(pictures, prompts=["a cat", ""]):
        assert stored.passed
        assert stored.prompt == "given"
        assert 0 < stored.score < 1
    (censored, _) = InvMM(target, Whole(), brief, beta=2.0)(pictures, prompts=["a cat", ""])
    assert not censored.passed
    assert censored.update == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model_scores_in_float32(dtype, kind, build_pipe, adapt):
    full, half = adapt(build_pipe(kind)), adapt(build_pipe(kind).to(dtype))
    reference, step = (ours(t, ("a cat",))[0] for t in (full, half))
    assert step.cond.dtype == step.uncond.dtype == torch.float32
    assert half.output(half.noise([0]), torch.tensor(981.0), half.encode([""])).dtype == dtype
    torch.testing.assert_close(step.cond, reference.cond, rtol=0.1, atol=0.1)


# Samplers


def test_default_takes_euler_s_steps_whatever_the_checkpoint_brings(build_pipe, adapt):
    pipe = build_pipe("sd3")
    plain, expected = generate(pipe), adapt(pipe).identity()
    assert adapt(pipe, sampler="own").identity() == expected
    for other in (
        FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ):
        pipe.scheduler = other
        target = adapt(pipe)
        assert target.identity() == expected
        assert torch.equal(ours(target)[-1].x_next, plain)
        with pytest.raises(CannotAudit, match=r"own sampler, (FlowMatchEuler|DPMSolverMultistep).*sampler"):
            adapt(pipe, sampler="own")


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), FlowMatchEulerDiscreteScheduler(invert_sigmas=True)])
def test_what_is_no_flow_is_refused(scheduler, build_pipe, adapt):
    pipe = build_pipe("sd3")
    pipe.scheduler = scheduler
    with pytest.raises(CannotAudit, match=f"{type(scheduler).__name__} that does not run a rectified flow"):
        adapt(pipe)


# Opening


def test_folder_and_pipeline_are_the_same_model(kind, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / kind)
    target, ready = load(tmp_path / kind), load(pipe)
    assert target.identity()["fingerprint"] == ready.identity()["fingerprint"]
    encoders = ["text_encoder", "text_encoder_2", "text_encoder_3"][: 3 if kind == "sd3" else 2]
    assert sorted(target.identity()["weights"]) == [*encoders, "transformer", "vae"]
    files = {f"{name}/model.safetensors" for name in encoders} | {"transformer/diffusion_pytorch_model.safetensors"}
    assert files < set(target.identity()["files"])
    with pytest.raises(UsageError, match=r"unet=x: .* has a transformer in its place"):
        load(tmp_path / kind, unet="x")
    if kind == "sd3":
        without = load(tmp_path / kind, text_encoder_3=None, tokenizer_3=None)
        assert without.identity()["fingerprint"] != target.identity()["fingerprint"]
        assert (without.encode(["a cat"]).tokens[:, 77:] == 0).all()


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2", "tokenizer_3"])
def test_parts_of_another_family_are_refused(part, official_wen):
    with pytest.raises(UsageError, match=f"{part}=…: a StableDiffusionPipeline has no such part"):
        load(official_wen / "model", **{part: None})


def test_lora_is_named(kind, build_pipe, adapt):
    peft = pytest.importorskip("peft")
    pipe = build_pipe(kind)
    plain = adapt(build_pipe(kind)).identity()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.transformer.add_adapter(config, "cats")
    found = adapt(pipe).identity()
    (adapter,) = found["adapters"]
    assert (adapter["name"], adapter["active"]) == ("cats", True)
    assert found["weights"] == plain["weights"]
    assert found["fingerprint"] != plain["fingerprint"]


def test_missing_parts(build_pipe, adapt):
    for part in ("text_encoder_2", "tokenizer", "tokenizer_3", "vae"):
        pipe = build_pipe("sd3")
        setattr(pipe, part, None)
        with pytest.raises(CannotAudit, match=f"without its {part}; load the whole pipeline"):
            adapt(pipe)
    pipe = build_pipe("sd3")
    config = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")}
    pipe.transformer = SD3Transformer2DModel.from_config({**config, "in_channels": 32})
    with pytest.raises(CannotAudit, match="takes 32 channels and its latents have 16"):
        adapt(pipe)


def test_sizes(build_pipe, adapt):
    """Half to twice the native 16, in steps of a patch, and no more than 12 patches a side."""
    pipe = build_pipe("sd3")
    assert [list(side) for side in adapt(pipe).sides()] == [[8, 12, 16, 20, 24, 28, 32]] * 2
    pipe.transformer.register_to_config(pos_embed_max_size=5)
    assert adapt(pipe).sides()[0][-1] == 20


def test_steering_is_refused_in_a_sentence(pipe, target):
    driver = GuidanceDriver(target, lambda t, sizes, scale: sizes[:, -1], 7.0)
    for ask in (lambda: steer(pipe, driver).__enter__(), lambda: target_around(pipe)):
        with pytest.raises(CannotAudit, match="has a transformer in place of a UNet: it can be watched"):
            ask()
