"""The guard in a user's pipeline: what passes keeps its bits, what does not is observed, mitigated or refused, row by row."""

from __future__ import annotations

import functools
import io
import json
import threading
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

import mnemoscope
from mnemoscope.demo.world import World
from mnemoscope.detect.calibrate import Calibration, setting_of
from mnemoscope.detect.magnitude import Magnitude, per_dimension
from mnemoscope.errors import CannotAudit, UnknownName, UsageError
from mnemoscope.mitigate.base import Generation, sample
from mnemoscope.mitigate.guidance import DelayedGuidance, DynamicGuidance
from mnemoscope.mitigate.prompt import PromptOptimization
from mnemoscope.models.identity import plain
from mnemoscope.models.load import open_pipeline
from mnemoscope.models.watch import watch
from mnemoscope.serve.guard import Decision, GuardError, Refused, guard
from mnemoscope.serve.metrics import Metrics

PROMPTS = ("a cat", "a dog", "a red apple")
STEPS = 4


def generate(pipe, prompts=PROMPTS, **options):
    """Through the pipeline, or through a guard of it."""
    rows = (len(prompts) if prompts else len(options["prompt_embeds"])) * options.get("num_images_per_prompt", 1)
    generator = [torch.Generator().manual_seed(j) for j in range(rows)]
    if prompts:
        options["prompt"] = list(prompts)
    return pipe(**{"num_inference_steps": STEPS, "output_type": "pt", "generator": generator, **options}).images


def scores_of(pipe, **options):
    looking = guard(pipe, 1e9)
    generate(looking, **options)
    return [d.score for d in looking.last]


def between(scores):
    """A threshold that the largest score alone exceeds."""
    *_, second, first = sorted(scores)
    return (second + first) / 2


@dataclass
class Halved:
    """Half the embedding: a mitigation that costs nothing."""

    name = "halved"
    changes = frozenset({"embedding"})
    needs = frozenset()
    costs = "nothing"
    strength, strengths = "", ()
    seen = None

    def prepare(self, target, generation):
        self.seen = generation
        return generation.with_tokens(generation.cond.tokens / 2)


class Broken(Halved):
    def prepare(self, target, generation):
        raise ZeroDivisionError("broken")


@pytest.fixture(params=["sd", "sd-v", "sd2"])
def pipe(request, build_pipe):
    return build_pipe(request.param)


@pytest.fixture
def sd(build_pipe):
    return build_pipe("sd")


# What passes


def test_pictures_that_pass_keep_their_bits(pipe):
    plain = generate(pipe)
    guarded = guard(pipe, 1e9, on_hit="mitigate", mitigation=Halved())
    assert torch.equal(generate(guarded), plain)
    with guarded:
        assert torch.equal(generate(pipe), plain)
    assert [d.action for d in guarded.last] == ["passed"] * 3
    assert torch.equal(generate(guard(pipe, 0, on_hit="observe")), plain)


def test_scores_are_those_of_a_watched_pipeline(pipe):
    detector = Magnitude()
    with watch(pipe, detector):
        generate(pipe, num_inference_steps=1)
    assert scores_of(pipe, num_inference_steps=1) == detector.compute().tolist()


def test_the_empty_prompt_scores_exactly_0(sd):
    assert scores_of(sd, prompts=["", "a cat"])[0] == 0


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(sd, half):
    whole = scores_of(sd)
    sd.to(half)
    plain, scores = generate(sd), scores_of(sd)
    assert scores == pytest.approx(whole, abs=0.1)
    guarded = guard(sd, between(scores), on_hit="mitigate", mitigation=Halved())
    pictures, hit = generate(guarded), scores.index(max(scores))
    assert [d.score for d in guarded.last] == scores
    others = [i for i in range(3) if i != hit]
    assert torch.equal(pictures[others], plain[others])
    assert not torch.equal(pictures[hit], plain[hit])


# Mitigation in place


@pytest.mark.parametrize(
    "mitigation", [Halved(), DelayedGuidance(), DynamicGuidance(latest=0.8), PromptOptimization(target=1e-3, updates=2)]
)
def test_one_row_is_mitigated_and_the_others_keep_their_bits(pipe, mitigation):
    plain, scores = generate(pipe), scores_of(pipe)
    guarded = guard(pipe, between(scores), on_hit="mitigate", mitigation=mitigation)
    pictures, hit = generate(guarded), scores.index(max(scores))
    others = [i for i in range(3) if i != hit]
    assert torch.equal(pictures[others], plain[others])
    assert not torch.equal(pictures[hit], plain[hit])
    assert [d.score for d in guarded.last] == scores
    assert [d.action for d in guarded.last] == ["mitigated" if i == hit else "passed" for i in range(3)]
    assert [d.mitigation for d in guarded.last] == [mitigation.name if i == hit else None for i in range(3)]
    assert torch.equal(generate(pipe), plain)


@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler])
@pytest.mark.parametrize(
    "mitigation", [Halved(), DelayedGuidance(), DynamicGuidance(latest=0.8), PromptOptimization(target=1e-3, updates=2)]
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers' Euler
def test_a_mitigated_row_is_what_our_own_loop_makes_of_the_mitigation(build_pipe, adapt, mitigation, scheduler):
    pipe = build_pipe("sd-v")
    if scheduler:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    target = adapt(pipe, sampler="own")
    pictures = generate(guard(pipe, 0, on_hit="mitigate", mitigation=mitigation), output_type="latent")
    generation = Generation.of(target, PROMPTS, range(3), steps=STEPS, guidance=7.5)
    *_, last = sample(target, mitigation.prepare(target, generation))
    assert torch.allclose(pictures, last.x_next, atol=1e-3)
    assert not torch.allclose(pictures, generate(pipe, output_type="latent"), atol=1e-2)


def test_what_a_mitigation_is_given(sd):
    halved = Halved()
    generate(guard(sd, 0, on_hit="mitigate", mitigation=halved), PROMPTS[:2], num_images_per_prompt=2)
    seen = halved.seen
    assert seen.prompts == ("a cat", "a cat", "a dog", "a dog")
    assert (seen.steps, seen.guidance) == (STEPS, 7.5)
    assert torch.equal(
        seen.noise, torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(j)) for j in range(4)])
    )
    assert len(set(seen.keys)) == 4
    generate(guard(sd, 0, on_hit="mitigate", mitigation=halved), PROMPTS[:1])
    assert halved.seen.keys == seen.keys[:1], "the same generation gets the same draws"


def test_policies_by_row(sd):
    scores = scores_of(sd)

    def policy(decision):
        assert decision.action == "observed"
        return "mitigate" if decision.row == 1 else "observe"

    plain, guarded = generate(sd), guard(sd, 0, on_hit=policy, mitigation=Halved())
    pictures = generate(guarded)
    assert [d.action for d in guarded.last] == ["observed", "mitigated", "observed"]
    assert torch.equal(pictures[[0, 2]], plain[[0, 2]])
    assert not torch.equal(pictures[1], plain[1])
    assert [d.score for d in guarded.last] == scores


def test_refusing_stops_the_batch_at_its_first_step(sd):
    scores = scores_of(sd)
    guarded = guard(sd, between(scores), on_hit="refuse")
    hit, calls = scores.index(max(scores)), []
    handle = sd.unet.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(Refused, match=f"refused: row {hit} scored .* whole batch of 3 was stopped") as refused:
        generate(guarded)
    handle.remove()
    assert len(calls) == 1
    assert refused.value.decisions == guarded.last
    assert [d.action for d in guarded.last] == ["refused" if i == hit else "passed" for i in range(3)]
    with pytest.raises(Refused) as alone:
        generate(guard(sd, 0, on_hit="refuse"), ["a cat"])
    assert "batch" not in str(alone.value)


# How pipelines are called


def test_pictures_per_prompt(sd):
    plain = generate(sd, num_images_per_prompt=2)
    guarded = guard(sd, between(scores_of(sd, num_images_per_prompt=2)), on_hit="mitigate", mitigation=Halved())
    pictures = generate(guarded, num_images_per_prompt=2)
    changed = [d.row for d in guarded.last if d.hit]
    assert len(changed) == 1
    assert [i for i in range(6) if not torch.equal(plain[i], pictures[i])] == changed


def test_a_negative_prompt_does_not_move_the_score(sd):
    plain, negative = scores_of(sd), ["", "blurry", "blurry"]
    assert scores_of(sd, negative_prompt=negative) == pytest.approx(plain, rel=1e-5)
    guarded = guard(sd, between(plain), on_hit="mitigate", mitigation=Halved())
    before, after = generate(sd, negative_prompt=negative), generate(guarded, negative_prompt=negative)
    assert [i for i in range(3) if not torch.equal(before[i], after[i])] == [d.row for d in guarded.last if d.hit]


def test_embeddings_instead_of_prompts(sd):
    cond, null = sd.encode_prompt(list(PROMPTS), "cpu", 1, True)
    given = {"prompts": None, "prompt_embeds": cond, "negative_prompt_embeds": null}
    scores = scores_of(sd)
    assert scores_of(sd, **given) == pytest.approx(scores, rel=1e-5)
    halved = Halved()
    plain, guarded = generate(sd, **given), guard(sd, between(scores), on_hit="mitigate", mitigation=halved)
    pictures = generate(guarded, **given)
    assert [i for i in range(3) if not torch.equal(plain[i], pictures[i])] == [d.row for d in guarded.last if d.hit]
    assert halved.seen.prompts is None
    editing = Halved()
    editing.needs = frozenset({"prompts"})
    with pytest.raises(GuardError, match="only its embedding is known here"):
        generate(guard(sd, 0, on_hit="mitigate", mitigation=editing, on_error="closed"), **given)


def test_lora(sd):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_v"])
    bare = scores_of(sd)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sd.unet.add_adapter(config, "cats")
    plain, scores = generate(sd), scores_of(sd)
    assert scores != bare
    guarded = guard(sd, between(scores), on_hit="mitigate", mitigation=PromptOptimization(target=1e-3, updates=1))
    pictures = generate(guarded)
    assert [i for i in range(3) if not torch.equal(plain[i], pictures[i])] == [d.row for d in guarded.last if d.hit]
    half = {"cross_attention_kwargs": {"scale": 0.5}}
    assert scores_of(sd, **half) not in (scores, bare)
    plain, pictures = generate(sd, **half), generate(guard(sd, 0, on_hit="mitigate", mitigation=Halved()), **half)
    assert not any(torch.equal(a, b) for a, b in zip(plain, pictures, strict=True))


def offloaded(pipe):
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe


def offloaded_one_by_one(pipe):
    """What enable_sequential_cpu_offload() does to a denoiser; to the text encoder it does not work without an accelerator."""
    from accelerate import cpu_offload

    cpu_offload(pipe.unet, execution_device="cpu")
    return pipe


def sliced(pipe):
    pipe.enable_attention_slicing()
    pipe.vae.enable_slicing()
    return pipe


def compiled_inside(pipe):
    pipe.unet.compile(backend="eager")
    return pipe


def compiled_outside(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    return pipe


@pytest.mark.parametrize("prepare", [offloaded, sliced, compiled_inside, compiled_outside])
def test_pipelines_as_people_run_them(build_pipe, prepare):
    reference = scores_of(build_pipe("sd"))
    pipe = prepare(build_pipe("sd"))
    plain = generate(pipe)
    for mitigation in (DelayedGuidance(), PromptOptimization(target=1e-3, updates=1)):
        guarded = guard(pipe, between(reference), on_hit="mitigate", mitigation=mitigation, on_error="closed")
        pictures = generate(guarded)
        assert [d.score for d in guarded.last] == pytest.approx(reference, rel=1e-5)
        assert [i for i in range(3) if not torch.equal(plain[i], pictures[i])] == [d.row for d in guarded.last if d.hit]
    assert torch.equal(generate(pipe), plain)


def test_weights_that_are_offloaded_one_by_one(build_pipe):
    reference = scores_of(build_pipe("sd"))
    pipe = offloaded_one_by_one(build_pipe("sd"))
    assert pipe.unet.device.type == "meta"
    plain, guarded = generate(pipe), guard(pipe, between(reference), on_error="closed")
    assert torch.equal(generate(guarded), plain)
    assert [d.score for d in guarded.last] == pytest.approx(reference, rel=1e-5)
    with pytest.raises(GuardError, match="enable_model_cpu_offload"):
        generate(guard(pipe, 0, on_hit="mitigate", mitigation=Halved(), on_error="closed"))
    made = calibrated(build_pipe("sd"))
    with pytest.raises(UsageError, match="make the guard before enable_sequential_cpu_offload"):
        guard(pipe, made)
    assert guard(pipe, made, accept=True).accepted == ["weights: not compared, they are offloaded"]


def test_inference_mode(sd):
    plain = generate(sd)
    guarded = guard(
        sd, between(scores_of(sd)), on_hit="mitigate", mitigation=PromptOptimization(target=1e-3, updates=1)
    )
    with torch.inference_mode():
        pictures = generate(guarded)
    assert [i for i in range(3) if not torch.equal(plain[i], pictures[i])] == [d.row for d in guarded.last if d.hit]


def test_samplers_of_other_kinds(sd):
    from diffusers import DDPMScheduler, PNDMScheduler

    for scheduler in (PNDMScheduler, DDPMScheduler):
        sd.scheduler = scheduler.from_config(sd.scheduler.config)
        plain, scores = generate(sd), scores_of(sd)
        guarded = guard(sd, between(scores), on_hit="mitigate", mitigation=Halved(), on_error="closed")
        pictures = generate(guarded)
        assert [i for i in range(3) if not torch.equal(plain[i], pictures[i])] == [d.row for d in guarded.last if d.hit]


def test_threads_on_one_denoiser(sd):
    own = type(sd.scheduler).from_config(sd.scheduler.config)
    sibling = StableDiffusionPipeline.from_pipe(sd, scheduler=own)
    for pipe in (sd, sibling):
        pipe.set_progress_bar_config(disable=True)
    plain, scores, both = (
        generate(sd, num_inference_steps=15),
        scores_of(sd, num_inference_steps=15),
        threading.Barrier(2),
    )
    metrics, pictures = Metrics(), {}
    guards = {
        "looking": guard(sd, 1e9, name="looking", metrics=metrics),
        "acting": guard(
            sibling, between(scores), on_hit="mitigate", mitigation=Halved(), name="acting", metrics=metrics
        ),
    }
    last = {}

    def work(name):
        both.wait()
        for _ in range(3):
            pictures[name] = generate(guards[name], num_inference_steps=15)
        last[name] = guards[name].last

    threads = [threading.Thread(target=work, args=(name,)) for name in guards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(pictures["looking"], plain)
    assert [d.score for d in last["looking"]] == [d.score for d in last["acting"]] == scores
    changed = [i for i in range(3) if not torch.equal(pictures["acting"][i], plain[i])]
    assert changed == [d.row for d in last["acting"] if d.hit] != []
    for name, action in (("looking", "passed"), ("acting", "mitigated")):
        assert metrics.value("mnemoscope_guard_generations_total", guard=name, action=action) == 3
    assert guards["looking"].last == [], "decisions are those of the thread that asks"
    assert not sd.unet._forward_hooks


# Counting

ROWS, GENERATIONS = "mnemoscope_guard_rows_total", "mnemoscope_guard_generations_total"


def counted(guarded, family):
    """Action → how many, where there are any."""
    actions = ("passed", "observed", "mitigated", "failed-open", "unfinished", "refused")
    return {a: int(n) for a in actions if (n := guarded.metrics.value(family, guard="", action=a))}


def gives_up(pipe, index, t, kept):
    raise KeyError("nobody waits")


def interrupts(pipe, index, t, kept):
    pipe._interrupt = True
    return kept


@pytest.mark.parametrize("end", [gives_up, interrupts])
@pytest.mark.parametrize("inside", [False, True], ids=["called", "inside its block"])
def test_what_was_not_drawn_to_the_end_is_counted_as_that(sd, end, inside):
    guarded = guard(sd, 1e9)
    pipe = sd if inside else guarded
    with guarded if inside else nullcontext():
        with suppress(KeyError):
            generate(pipe, callback_on_step_end=end)
        generate(pipe)
    assert counted(guarded, ROWS) == {"passed": 3, "unfinished": 3}
    assert counted(guarded, GENERATIONS) == {"passed": 1, "unfinished": 1}
    assert "failed-open" not in {d.action for d in guarded.last}


def test_what_fails_after_the_last_step_was_not_drawn(sd, monkeypatch):
    guarded = guard(sd, 1e9)
    monkeypatch.setattr(sd.vae, "decode", None)
    with pytest.raises(TypeError):
        generate(guarded, output_type="pt")
    assert counted(guarded, ROWS) == {"unfinished": 3}


def test_beside_a_refused_row_nothing_was_drawn(sd):
    scores = scores_of(sd)
    guarded = guard(sd, between(scores), on_hit="refuse")
    with pytest.raises(Refused):
        generate(guarded)
    assert counted(guarded, ROWS) == {"refused": 1, "unfinished": 2}
    assert counted(guarded, GENERATIONS) == {"refused": 1}


# Leaving no trace


def test_nothing_is_left(sd):
    sd.vae.train()
    next(sd.unet.parameters()).requires_grad_(False)

    def state():
        flags = [(p.requires_grad, p.grad) for m in (sd.unet, sd.vae, sd.text_encoder) for p in m.parameters()]
        training = [m.training for m in sd.unet.modules()] + [sd.vae.training]
        return set(vars(sd)), set(vars(sd.unet)), sd.unet.attn_processors, flags, training, dict(sd.scheduler.config)

    generate(sd)
    before = state()
    guarded = guard(sd, 0, on_hit="mitigate", mitigation=PromptOptimization(target=1e-3, updates=1))
    generate(guarded)
    assert state() == before
    with pytest.raises(KeyError), guarded:
        raise KeyError
    with pytest.raises(Refused):
        generate(guard(sd, 0, on_hit="refuse"))
    assert state() == before
    assert not sd.unet._forward_hooks
    assert not sd.unet._forward_pre_hooks


def test_blocks_may_be_nested(sd):
    guarded = guard(sd, 1e9)
    with guarded, guarded:
        generate(guarded)
        generate(sd)
    assert guarded.metrics.value("mnemoscope_guard_generations_total", guard="", action="passed") == 2
    assert "encode_prompt" not in vars(sd)


# Failing


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"guidance_scale": 1.0}, "set guidance_scale above 1"),
        ({"cross_attention_kwargs": {}, "ip_adapter_image_embeds": "given"}, "added_cond_kwargs beside the prompt"),
    ],
)
def test_what_cannot_be_judged(sd, options, says, monkeypatch):
    if "ip_adapter_image_embeds" in options:
        monkeypatch.setattr(sd, "prepare_ip_adapter_image_embeds", lambda *_: [torch.zeros(6, 1, 16)])
        monkeypatch.setattr(sd, "check_inputs", lambda *_: None)
        sd.unet.config["encoder_hid_dim_type"] = None
    plain, guarded = generate(sd, **options), guard(sd, 0, on_hit="mitigate", mitigation=Halved())
    assert torch.equal(generate(guarded, **options), plain)
    assert [(d.action, d.score, d.hit) for d in guarded.last] == [("failed-open", None, False)] * 3
    assert guarded.metrics.value("mnemoscope_guard_errors_total", guard="", kind="CannotAudit") == 1
    assert guarded.metrics.value("mnemoscope_guard_rows_total", guard="", action="failed-open") == 3
    with pytest.raises(GuardError, match=says):
        generate(guard(sd, 0, on_error="closed"), **options)
    assert not sd.unet._forward_hooks


def test_a_mitigation_that_breaks(sd):
    plain, scores = generate(sd), scores_of(sd)
    guarded = guard(sd, between(scores), on_hit="mitigate", mitigation=Broken())
    assert torch.equal(generate(guarded), plain)
    hit = scores.index(max(scores))
    assert [d.action for d in guarded.last] == ["failed-open" if i == hit else "passed" for i in range(3)]
    assert [d.score for d in guarded.last] == scores
    assert guarded.metrics.value("mnemoscope_guard_errors_total", guard="", kind="ZeroDivisionError") == 1
    closed = guard(sd, between(scores), on_hit="mitigate", mitigation=Broken(), on_error="closed")
    with pytest.raises(GuardError, match="fails closed: broken") as failed:
        generate(closed)
    assert isinstance(failed.value.__cause__, ZeroDivisionError)
    assert closed.metrics.value("mnemoscope_guard_errors_total", guard="", kind="ZeroDivisionError") == 1
    assert generate(guarded, num_inference_steps=1) is not None


def test_a_rule_that_breaks_on_the_way(sd):
    class Late(Halved):
        def prepare(self, target, generation):
            return replace(generation, guidance=breaks)

    def breaks(t, sizes, scale):
        return torch.full_like(sizes[:, -1], 1 / (sizes.shape[1] < 3))

    guarded = guard(sd, 0, on_hit="mitigate", mitigation=Late())
    generate(guarded)
    assert [d.action for d in guarded.last] == ["failed-open"] * 3
    assert guarded.metrics.value("mnemoscope_guard_errors_total", guard="", kind="ZeroDivisionError") == 1
    assert guarded.metrics.value("mnemoscope_guard_rows_total", guard="", action="failed-open") == 3
    assert guarded.metrics.value("mnemoscope_guard_rows_total", guard="", action="mitigated") == 0


def test_policies_and_logs_that_break(sd):
    plain = generate(sd)
    guarded = guard(sd, 0, on_hit=lambda d: "ignore", mitigation=Halved())
    assert torch.equal(generate(guarded), plain)
    assert [d.action for d in guarded.last] == ["failed-open"] * 3
    lost = io.StringIO()
    lost.close()
    guarded = guard(sd, 0, on_hit="mitigate", mitigation=Halved(), log=lost)
    assert not torch.equal(generate(guarded), plain), "what was decided is done all the same"
    assert guarded.metrics.value("mnemoscope_guard_errors_total", guard="", kind="ValueError") == 1
    with pytest.raises(GuardError, match="closed file"):
        generate(guard(sd, 0, log=lost, on_error="closed"))


def test_predictions_that_are_not_finite(sd):
    sd.unet.register_forward_hook(lambda m, args, out: (out[0] * float("nan"),))
    guarded = guard(sd, 1e9)
    generate(guarded, output_type="latent")
    assert [d.action for d in guarded.last] == ["failed-open"] * 3
    with pytest.raises(GuardError, match="NaN or infinity"):
        generate(guard(sd, 1e9, on_error="closed"))


def test_a_pipeline_whose_steps_are_not_seen(sd):
    class Other(StableDiffusionPipeline):
        def __call__(self, *args, **kwargs):
            return "a picture"

    other = Other(**sd.components, requires_safety_checker=False)
    guarded = guard(other, 1e9)
    assert guarded("a cat") == "a picture"
    assert [d.action for d in guarded.last] == ["failed-open"]
    with pytest.raises(GuardError, match="no denoising step of Other was seen"):
        guard(other, 1e9, on_error="closed")("a cat")


def test_arguments(sd, build_pipe):
    class Noise(Halved):
        name, changes = "noisy", frozenset({"noise"})

    class Attention(Halved):
        name, changes = "attentive", frozenset({"attention"})

    with pytest.raises(
        CannotAudit, match="noisy changes the starting noise, which a running pipeline cannot be given any more"
    ):
        guard(sd, 1, on_hit="mitigate", mitigation=Noise())
    with pytest.raises(CannotAudit, match="attentive changes attention"):
        guard(sd, 1, on_hit="mitigate", mitigation=Attention())
    with pytest.raises(UnknownName, match="Did you mean 'refuse'"):
        guard(sd, 1, on_hit="refused")
    with pytest.raises(UnknownName, match="open"):
        guard(sd, 1, on_error="ope")
    for number in (float("nan"), float("inf"), True):
        with pytest.raises(UsageError, match="is no finite number"):
            guard(sd, number)
    with pytest.raises(CannotAudit, match="takes no text"):
        guard(build_pipe("pixel"), 1)
    with pytest.raises(CannotAudit, match="starts from a picture"):
        guard(StableDiffusionImg2ImgPipeline.from_pipe(sd), 1, on_hit="mitigate", mitigation=Halved())
    assert guard(sd, 1, on_hit="mitigate").mitigation.name == "prompt"
    named = {"name": "delayed-guidance", "options": {"start": 0.5}}
    assert guard(sd, 1, on_hit="mitigate", mitigation=named).mitigation.start == 0.5
    assert mnemoscope.guard is guard


# Calibrations


def calibrated(pipe, scores=None, fpr=0.05, steps=STEPS, **changes):
    from mnemoscope.models.steer import target_around

    target = target_around(pipe, sampler="ddim")
    setting = setting_of(
        plain(target.identity()), **{"guidance": 7.5, "steps": steps, "window": (0, 1), "seeds": 1, "seed_mode": "per-prompt", **changes}
    )  # fmt: skip
    return Calibration.fit(
        [i / 100 for i in range(200)] if scores is None else scores, setting, detector="magnitude", fpr=fpr
    )


def test_a_calibration_gives_p_values_and_its_threshold(sd, tmp_path):
    scores = scores_of(sd)
    made = calibrated(sd, [between(scores) * (0.5 + i / 400) for i in range(200)])
    path = made.save(tmp_path / "thresholds.json")
    for given in (made, path, tmp_path, str(path)):
        guarded = guard(sd, given, on_error="closed", drift=False)
        generate(guarded)
        assert guarded.threshold == made.threshold
        assert [d.p for d in guarded.last] == made.p_values(scores).tolist()
        assert [d.hit for d in guarded.last] == [made.above(s) for s in scores]
    assert any(d.hit for d in guarded.last)
    assert not all(d.hit for d in guarded.last)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seeds": 4}, "seeds: was 4, now 1"),
        ({"window": (0, 3)}, r"window: was \[0, 3\], now \[0, 1\]"),
        ({"seed_mode": "shared"}, 'seed_mode: was "shared", now "per-prompt"'),
    ],
)
def test_calibrations_of_another_kind(sd, changes, says):
    made = calibrated(sd, **changes)
    with pytest.raises(UsageError, match=f"{says}.*mnemoscope calibrate MODEL .*--seeds 1 --seed-mode per-prompt"):
        guard(sd, made)
    lines = []
    guarded = guard(sd, made, accept=True, log=lines.append)
    generate(guarded)
    assert any(next(iter(changes)) in a for a in guarded.accepted)
    assert json.loads(lines[0])["accepted"] == guarded.accepted


def test_calibrations_of_another_model(sd, build_pipe):
    with pytest.raises(UsageError, match=r"target\.weights\.unet"):
        guard(build_pipe("sd", seed=1), calibrated(sd))
    made = calibrated(sd)
    with pytest.raises(UsageError, match=r'target\.dtype: was "float32", now "bfloat16"'):
        guard(build_pipe("sd").to(torch.bfloat16), made)
    with pytest.raises(UsageError, match="does not say what its scores depend on"):
        guard(sd, Calibration.fit(range(99), {"target": "a model"}, detector="magnitude"))


def test_a_compiled_pipeline_is_still_the_model_that_was_calibrated(sd):
    made = calibrated(sd)
    guarded = guard(compiled_outside(sd), made, on_error="closed")
    generate(guarded)
    assert all(d.p is not None for d in guarded.last)


def test_generations_of_another_kind_than_was_calibrated(sd, monkeypatch):
    guarded = guard(sd, calibrated(sd), on_error="closed")
    generate(guarded)
    with pytest.raises(GuardError, match=r"starts at t = 801, the calibration at 751; .*its own --steps"):
        generate(guarded, num_inference_steps=5)
    with pytest.raises(GuardError, match="its latents are"):
        generate(guarded, height=24, width=16)

    @functools.wraps(sd.encode_prompt)
    def encode(*args, clip_skip=None, **options):  # with clip_skip, diffusers' own needs an older transformers
        return StableDiffusionPipeline.encode_prompt(sd, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(sd, "encode_prompt", encode)
        with pytest.raises(GuardError, match="clip_skip"):
            generate(guarded, clip_skip=1)
    sd.scheduler = type(sd.scheduler).from_config(sd.scheduler.config, beta_end=0.02)
    with pytest.raises(GuardError, match="noise schedule"):
        generate(guarded)
    generate(guard(sd, calibrated(sd), accept=True, on_error="closed"), num_inference_steps=5)


def test_another_denoiser_than_was_calibrated(sd, build_pipe):
    guarded = guard(sd, calibrated(sd), on_error="closed")
    own, sd.unet = sd.unet, build_pipe("sd", seed=1).unet
    with pytest.raises(GuardError, match="another denoiser is in the pipeline"):
        generate(guarded)
    sd.unet = torch.compile(own, backend="eager")
    generate(guarded)


# Telling


def test_log_lines(sd):
    written = io.StringIO()
    guarded = guard(sd, between(scores_of(sd)), name="images", log=written)
    generate(guarded)
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    assert [line["score"] for line in lines] == [d.score for d in guarded.last]
    assert set(lines[0]) == {
        "time",
        "name",
        "row",
        "score",
        "threshold",
        "p",
        "hit",
        "action",
        "mitigation",
        "seconds",
        "t",
    }
    assert lines[0]["name"] == "images"
    assert lines[0]["t"] == 751
    assert lines[0]["time"].endswith("+00:00")
    assert sum(line["hit"] for line in lines) == 1
    assert all(line["seconds"] > 0 for line in lines)
    assert "cat" not in written.getvalue()
    assert all(d.prompt is None for d in guarded.last)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_log_may_be_the_path_of_a_file(sd, tmp_path, kind):
    file = tmp_path / "guard.jsonl"
    file.write_text("earlier\n")
    guarded = guard(sd, 1e9, log=kind(file))
    generate(guarded)
    earlier, *lines = file.read_text().splitlines()
    assert earlier == "earlier"
    assert [json.loads(line)["score"] for line in lines] == [d.score for d in guarded.last]
    with pytest.raises(UsageError, match=r"the log .* cannot be written .*; name a file in a folder that exists"):
        guard(sd, 1e9, log=kind(tmp_path / "nowhere" / "guard.jsonl"))


def test_prompts_are_kept_on_request_only(sd):
    lines = []
    guarded = guard(sd, 1e9, log=lines.append, log_prompts=True)
    generate(guarded)
    assert [json.loads(line)["prompt"] for line in lines] == list(PROMPTS)
    assert [d.prompt for d in guarded.last] == list(PROMPTS)
    assert isinstance(guarded.last[0], Decision)


def test_passed_scores_are_watched_for_drift(sd, caplog):
    scores = scores_of(sd)
    made = calibrated(sd, [10 * max(scores) + i / 100 for i in range(200)])
    from mnemoscope.serve.drift import Drift

    found = []
    watching = Drift(made, window=50, on_alarm=found.append)
    guarded = guard(sd, made, drift=watching, name="images")
    for _ in range(17):
        generate(guarded, num_inference_steps=STEPS, output_type="latent")
    assert len(found) == 1
    assert found[0].alarm
    assert found[0].shift < 0
    assert guarded.metrics.value("mnemoscope_guard_drift_alarms_total", guard="images") == 1
    assert guarded.metrics.value("mnemoscope_guard_drift_p", guard="images") == found[0].p
    assert "guard images: drift, window 1 of passed scores" in caplog.text
    assert guard(sd, made).drift is not None
    assert guard(sd, made, drift=False).drift is None
    assert guard(sd, 1).drift is None


def test_the_prompt_is_optimized_to_where_ordinary_prompts_are(sd):
    """Published targets are of Stable Diffusion 1; without options the calibration says where to stop."""
    scores = scores_of(sd)
    made = calibrated(sd, [float(min(scores)) * (0.5 + i / 200) for i in range(101)])
    for thresholds, aim in ((made, min(scores) * 0.75), (2.0, 1.0)):
        found = guard(sd, thresholds, on_hit="mitigate", accept=True)
        assert found.mitigation.target == pytest.approx(
            float(per_dimension(torch.tensor(aim), found.target.latent_shape))
        )
    assert (
        guard(sd, 2.0, on_hit="mitigate", mitigation={"name": "prompt", "options": {"target": 3.0}}).mitigation.target
        == 3.0
    )


def test_watch_does_not_see_what_the_guard_does_itself(sd):
    """Only the pipeline's own steps, each once, also where a row is mitigated."""
    threshold = between(scores_of(sd))
    with watch(sd) as steps, guard(sd, threshold, on_hit="mitigate", mitigation=PromptOptimization(updates=2)):
        generate(sd)
    assert [s.index for s in steps] == list(range(STEPS))


# The bundled model


def test_a_planted_caption_is_mitigated_and_refused():
    """It was trained with 48 copies of the picture; the other caption is of an ordinary one."""
    pipe, _, recommended = open_pipeline("demo")
    pipe.set_progress_bar_config(disable=True)
    world = World()
    planted, ordinary = world.of("planted", copies=max(world.levels))[0], world.captions("ordinary")[0]
    prompts = [planted.caption, ordinary.caption]
    options = {"guidance_scale": recommended["guidance"], "num_inference_steps": 12}
    plain = generate(pipe, prompts, **options)
    assert [m.copy_found for m in world.reference.nearest(plain)] == [True, False]

    guarded = guard(pipe, between(scores_of(pipe, prompts=prompts, **options)), on_hit="mitigate", on_error="closed")
    pictures = generate(guarded, prompts, **options)
    assert [(d.action, d.mitigation) for d in guarded.last] == [("mitigated", "prompt"), ("passed", None)]
    assert not any(m.copy_found for m in world.reference.nearest(pictures))
    assert torch.equal(pictures[1], plain[1])

    with pytest.raises(Refused, match="row 0 scored"):
        generate(guard(pipe, guarded.threshold, on_hit="refuse"), prompts, **options)
