"""Steering a user's pipeline: a driver that does nothing changes nothing, and one that acts changes its own rows alone."""

from __future__ import annotations

import threading

import pytest
import torch
from diffusers import StableDiffusionPipeline

from mnemoscope.errors import CannotAudit
from mnemoscope.models.steer import frozen, steer, target_around


def generate(pipe, prompt=("a cat", "a dog", "a red apple"), **options):
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    rows = len(prompts) * options.get("num_images_per_prompt", 1)
    options = {"num_inference_steps": 3, "output_type": "latent", **options}
    return pipe(prompts, generator=[torch.Generator().manual_seed(j) for j in range(rows)], **options).images


class Notes:
    """A driver that only looks."""

    def __init__(self):
        self.orders, self.calls, self.pairs = [], [], []

    def begin(self, order):
        self.orders.append(order)

    def tokens(self, call):
        self.calls.append(call)

    def outputs(self, call, uncond, cond):
        self.pairs.append((uncond.clone(), cond.clone()))


class Exchange(Notes):
    """A driver that gives row 1 the embedding of row 0."""

    def tokens(self, call):
        super().tokens(call)
        tokens = call.prompt.clone()
        tokens[1] = tokens[0]
        return tokens


@pytest.fixture
def pipe(build_pipe):
    return build_pipe("sd")


def compiled_inside(pipe):
    pipe.unet.compile(backend="eager")
    return pipe


def compiled_outside(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    return pipe


PIPES = {"plain": lambda pipe: pipe, "module.compile": compiled_inside, "torch.compile": compiled_outside}


@pytest.mark.parametrize("prepared", PIPES)
def test_a_driver_that_looks_changes_nothing_and_sees_everything(build_pipe, prepared):
    pipe = PIPES[prepared](build_pipe("sd"))
    plain, notes = generate(pipe), Notes()
    with steer(pipe, notes):
        steered = generate(pipe)
    assert torch.equal(plain, steered)
    assert torch.equal(plain, generate(pipe))
    (order,) = notes.orders
    assert (order.rows, order.prompts, order.guided) == (3, ("a cat", "a dog", "a red apple"), True)
    assert order.negative == (False,) * 3
    assert [c.index for c in notes.calls] == [0, 1, 2]
    assert notes.calls[0].times.tolist() == [c.t.item() for c in notes.calls] == pipe.scheduler.timesteps.tolist()
    assert all(c.guidance == 7.5 and c.others == () for c in notes.calls)
    assert len(notes.pairs) == 3


@pytest.mark.parametrize("prepared", PIPES)
def test_other_rows_keep_their_bits(build_pipe, prepared):
    pipe = PIPES[prepared](build_pipe("sd"))
    plain = generate(pipe)
    with steer(pipe, Exchange()):
        steered = generate(pipe)
    assert torch.equal(plain[[0, 2]], steered[[0, 2]])
    assert not torch.equal(plain[1], steered[1])
    wanted = generate(pipe, ("a cat", "a cat", "a red apple"))
    assert torch.allclose(steered, wanted, atol=1e-5)


def test_a_call_can_be_made_again(pipe):
    class Again(Notes):
        def outputs(self, call, uncond, cond):
            super().outputs(call, uncond, cond)
            made = call.predict(torch.cat([call.x, call.x]), torch.cat([call.null, call.prompt]))
            assert torch.equal(made, torch.cat([uncond, cond]))
            return cond

    plain, again = generate(pipe), Again()
    with steer(pipe, again):
        assert torch.equal(plain, generate(pipe))
    assert len(again.calls) == 3, "a driver's own calls are seen by nobody"


def test_outputs_that_are_exchanged(pipe):
    class Unguided(Notes):
        def outputs(self, call, uncond, cond):
            other = cond.clone()
            other[2] = uncond[2]
            return other

    plain = generate(pipe)
    with steer(pipe, Unguided()):
        steered = generate(pipe)
    assert torch.equal(plain[:2], steered[:2])
    wanted = generate(pipe, ("a cat", "a dog", ""))
    assert torch.allclose(steered[2], wanted[2], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "prompts", "negative"),
    [
        ({"num_images_per_prompt": 2}, ("a cat", "a cat", "a dog", "a dog"), (False,) * 4),
        ({"negative_prompt": ["", "blurry"]}, ("a cat", "a dog"), (False, True)),
        ({"negative_prompt": ["", "blurry"], "num_images_per_prompt": 2}, None, (False, False, True, True)),
    ],
)
def test_orders(pipe, options, prompts, negative):
    notes = Notes()
    with steer(pipe, notes):
        generate(pipe, ("a cat", "a dog"), **options)
    (order,) = notes.orders
    assert order.prompts == prompts or prompts is None
    assert order.negative == negative
    assert order.rows == len(negative)
    assert torch.equal(order.empty(), pipe.encode_prompt("", "cpu", 1, False)[0])


def test_embeddings_instead_of_prompts(pipe):
    cond, null = pipe.encode_prompt(["a cat", "a dog"], "cpu", 1, True)
    notes = Notes()
    with steer(pipe, notes):
        pipe(prompt_embeds=cond, negative_prompt_embeds=null, num_inference_steps=1, output_type="latent")
    (order,) = notes.orders
    assert (order.rows, order.prompts, order.negative) == (2, None, (True, True))


def test_without_guidance_there_is_no_pair(pipe):
    notes = Notes()
    with steer(pipe, notes):
        generate(pipe, guidance_scale=1.0)
    assert all(c.null is None and len(c.x) == 3 for c in notes.calls)
    assert len(notes.calls) == 3
    assert notes.pairs == []


def test_guidance_that_a_callback_switches_off(pipe):
    """As diffusers' own guide does it: the batch is halved on the way."""

    def off(pipe, index, t, kwargs):
        if index == 0:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    options = {"callback_on_step_end": off, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    plain, exchange = generate(pipe, **options), Exchange()
    with steer(pipe, exchange):
        steered = generate(pipe, **options)
    assert [c.null is None for c in exchange.calls] == [False, True, True]
    assert len(exchange.pairs) == 1
    assert torch.equal(plain[[0, 2]], steered[[0, 2]])


def test_nothing_is_left(pipe):
    def state():
        flags = [p.requires_grad for p in pipe.unet.parameters()]
        return set(vars(pipe)), set(vars(pipe.unet)), flags, dict(pipe.scheduler.config)

    before = state()
    with pytest.raises(KeyError), steer(pipe, Notes()):
        raise KeyError
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks
    generate(pipe)
    before = state()
    with steer(pipe, Notes()):
        generate(pipe)
    assert state() == before
    assert not pipe.unet._forward_hooks


def test_blocks_may_close_in_any_order(build_pipe):
    pipe = compiled_inside(build_pipe("sd"))
    generate(pipe)
    before = pipe.unet._compiled_call_impl
    one, two = steer(pipe, Notes()), steer(pipe, Notes())
    one.__enter__(), two.__enter__()
    one.__exit__(None, None, None), two.__exit__(None, None, None)
    assert pipe.unet._compiled_call_impl is before
    assert "encode_prompt" not in vars(pipe)


def test_what_a_driver_raises_ends_the_generation(pipe):
    class Stop(Notes):
        def outputs(self, call, uncond, cond):
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"), steer(pipe, Stop()):
        generate(pipe)
    assert not pipe.unet._forward_hooks
    assert "encode_prompt" not in vars(pipe)


def test_a_sibling_on_the_same_denoiser_is_not_seen(pipe):
    sibling = StableDiffusionPipeline.from_pipe(pipe)
    sibling.set_progress_bar_config(disable=True)
    assert sibling.unet is pipe.unet
    plain, notes = generate(sibling), Exchange()
    with steer(pipe, notes):
        assert torch.equal(generate(sibling), plain)
        generate(pipe)
        assert torch.equal(generate(sibling), plain)
        generate(pipe)
    assert [c.index for c in notes.calls] == [0, 1, 2] * 2


def test_threads_on_one_denoiser_do_not_meet(pipe):
    sibling = StableDiffusionPipeline.from_pipe(pipe, scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config))
    sibling.set_progress_bar_config(disable=True)
    plain, both = generate(pipe, num_inference_steps=20), threading.Barrier(2)
    drivers = {}

    def work(own, driver):
        both.wait()
        with steer(own, driver):
            drivers[driver] = generate(own, num_inference_steps=20)

    look, exchange = Notes(), Exchange()
    threads = [threading.Thread(target=work, args=a) for a in ((pipe, look), (sibling, exchange))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(drivers[look], plain)
    assert torch.equal(drivers[exchange][[0, 2]], plain[[0, 2]])
    assert not torch.equal(drivers[exchange][1], plain[1])
    assert [c.index for c in look.calls] == [c.index for c in exchange.calls] == list(range(20))
    assert not pipe.unet._forward_hooks


def test_unknown_pipelines():
    class FluxPipeline:
        pass

    with pytest.raises(CannotAudit, match="its guidance is distilled"), steer(FluxPipeline(), Notes()):
        pass


def test_a_target_around_a_pipeline_leaves_its_flags(pipe):
    pipe.vae.train()
    next(pipe.unet.parameters()).requires_grad_(False)
    before = [p.requires_grad for p in pipe.unet.parameters()]
    target = target_around(pipe)
    assert (target.sampler, target.unet) == ("own", pipe.unet)
    assert [p.requires_grad for p in pipe.unet.parameters()] == before
    assert pipe.vae.training
    with frozen(pipe.unet), frozen(pipe.unet):
        assert not any(p.requires_grad for p in pipe.unet.parameters())
    assert [p.requires_grad for p in pipe.unet.parameters()] == before


def test_a_target_around_a_pipeline_that_draws_noise(pipe):
    from diffusers import DDPMScheduler

    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    assert target_around(pipe).sampler == "ddim"
