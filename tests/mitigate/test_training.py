"""The filter inside a training loop: what is kept, what the loss is, and where the gradient goes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mnemoscope.detect.magnitude import magnitude
from mnemoscope.errors import UnknownName, UsageError
from mnemoscope.mitigate.training import Below, MemorizationFilter, per_sample
from mnemoscope.models.base import Condition
from mnemoscope.models.mixture import Mixture
from mnemoscope.models.noising import noised

SHAPE = (2, 4, 4)


class Tiny(nn.Module):
    """ε = x·a + (mean of the caption's tokens)·b: the magnitude is |b|·‖mean token‖·√(number of elements)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(1.0))
        self.calls = 0
        self.shapes: set[tuple[int, ...]] = set()

    def forward(self, x, t, cond):
        self.calls += len(x)
        self.shapes.add(tuple(x.shape))
        tokens = cond.tokens if isinstance(cond, Condition) else cond
        return self.a * x + self.b * tokens.mean((1, 2))[:, None, None, None]


def captions(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1).expand(-1, 3, 5).contiguous()


def a_batch(*values: float):
    generator = torch.Generator().manual_seed(0)
    n = len(values)
    x, noise = (torch.randn(n, *SHAPE, generator=generator) for _ in range(2))
    return x, noise, torch.arange(n) * 10, captions(*values)


NULL = captions(0.0)
ROOT = 32**0.5  # of the number of elements
FOUR = (0.1, 1.0, 0.2, -2.0)  # magnitudes times √32; τ = 0.5·√32 keeps the first and the third


def step(model: nn.Module, threshold, values=FOUR, **options):
    x, noise, t, cond = a_batch(*values)
    memory = MemorizationFilter(model, NULL, threshold, **options)
    output = model(x, t, cond)
    found = memory(x, t, output, cond=cond)
    return found, output, noise


def gradients(model: nn.Module, loss: torch.Tensor) -> list[float]:
    return [float(g) for g in torch.autograd.grad(loss, list(model.parameters()))]


def test_magnitudes_and_weights_by_hand():
    found, _, _ = step(Tiny(), 0.5 * ROOT)
    torch.testing.assert_close(found.sizes, torch.tensor(FOUR).abs() * ROOT)
    assert found.weights.tolist() == [1, 0, 1, 0]
    assert (float(found.kept), float(found.total)) == (2, 2)
    assert not found.weights.requires_grad
    assert not found.sizes.requires_grad


def test_a_sample_at_the_threshold_is_dropped():
    sizes = torch.tensor([1.9999, 2.0, 2.0001])
    assert Below(2.0).keeps(sizes, torch.zeros(3)).tolist() == [True, False, False]


@pytest.mark.parametrize(("over", "by"), [("kept", 2), ("batch", 4)])
def test_the_loss_is_that_of_the_kept_samples_by_indexing(over, by):
    model = Tiny()
    found, output, noise = step(model, 0.5 * ROOT, over=over)
    loss = found.mean(per_sample(output, noise))
    indexed = ((output - noise)[[0, 2]] ** 2).flatten(1).mean(1).sum() / by
    torch.testing.assert_close(loss, indexed)
    model2 = Tiny()
    _, output2, _ = step(model2, 0.5 * ROOT)
    again = ((output2 - noise)[[0, 2]] ** 2).flatten(1).mean(1).sum() / by
    assert gradients(model, loss) == pytest.approx(gradients(model2, again))


def test_a_dropped_sample_gets_no_gradient_at_all():
    found, output, noise = step(Tiny(), 0.5 * ROOT)
    leaf = output.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(found.mean(per_sample(leaf, noise)), leaf)
    assert torch.equal(grad[[1, 3]], torch.zeros(2, *SHAPE))
    torch.testing.assert_close(grad[[0, 2]], (2 * (leaf - noise) / (32 * 2))[[0, 2]].detach())


def test_all_kept_is_the_plain_loss():
    found, output, noise = step(Tiny(), 1e6)
    torch.testing.assert_close(found.mean(per_sample(output, noise)), nn.functional.mse_loss(output, noise))
    torch.testing.assert_close(found.mean((output - noise).square()), nn.functional.mse_loss(output, noise))


@pytest.mark.parametrize("over", ["kept", "batch"])
def test_nothing_kept_is_loss_zero_with_gradients_zero(over):
    model = Tiny()
    found, output, noise = step(model, 1e-6, over=over)
    loss = found.mean(per_sample(output, noise))
    assert loss.requires_grad
    assert float(loss.detach()) == 0
    assert gradients(model, loss) == [0, 0]
    assert float(found.kept) == 0


def test_a_model_that_has_diverged_does_not_look_calm():
    model = Tiny()
    with torch.no_grad():
        model.b.fill_(torch.nan)
    found, output, noise = step(model, 2.0)
    assert found.weights.tolist() == [0, 0, 0, 0]
    assert not torch.isfinite(found.mean(per_sample(output, noise)))


def test_it_costs_one_forward_per_sample_in_one_shape_whatever_is_kept():
    for threshold in (1e-6, 0.5 * ROOT, 1e6):
        model = Tiny()
        step(model, threshold)
        assert model.calls == 8
        assert model.shapes == {(4, *SHAPE)}


def test_the_second_pass_keeps_no_graph():
    x, _, t, cond = a_batch(*FOUR)
    modes = []

    def output(x, t, null):
        modes.append(torch.is_grad_enabled())
        return x

    MemorizationFilter(output, NULL, 2.0)(x, t, x, cond=cond)
    assert modes == [False]
    assert torch.is_grad_enabled()


def test_a_dropped_caption_has_magnitude_zero_exactly():
    def noisy(x, t, cond):  # as if dropout were on: two passes never agree
        return x + torch.randn(x.shape)

    x, _, t, cond = a_batch(0.0, 1.0)
    memory = MemorizationFilter(noisy, NULL, 1.0)
    found = memory(x, t, noisy(x, t, cond), cond=cond)
    assert float(found.sizes[0]) == 0
    assert float(found.sizes[1]) > 0
    assert found.weights.tolist()[0] == 1
    assert float(memory(x, t, noisy(x, t, cond)).sizes[0]) > 0  # without the captions it cannot know


def test_half_precision_is_compared_in_float32():
    x, _, t, cond = a_batch(*FOUR)
    half = [value.bfloat16() for value in (x, cond)]
    model = Tiny().bfloat16()
    found = MemorizationFilter(model, NULL, 2.0)(half[0], t, model(half[0], t, half[1]), cond=half[1])
    assert found.sizes.dtype == torch.float32


def test_the_layout_of_the_diffusers_example():
    model = Tiny()
    x, noise, t, cond = a_batch(*FOUR)
    memory = MemorizationFilter(model, NULL, 0.5 * ROOT)
    noise_pred = model(x, t, cond)
    loss = memory.loss(noise_pred, noise, x, t, cond)
    torch.testing.assert_close(loss, ((noise_pred - noise)[[0, 2]] ** 2).mean())


@pytest.mark.parametrize("v", [False, True])
def test_a_memorized_prompt_is_dropped_and_ordinary_ones_are_kept(v):
    world = Mixture.world(["a cat", "two dogs"], ["the mona lisa"], v_prediction=v)
    prompts = ["a cat", "the mona lisa", "two dogs", "the mona lisa"]
    cond, generator = world.encode(prompts), torch.Generator().manual_seed(0)
    x0 = world.draw(cond, generator)
    t = torch.tensor([950, 900, 800, 700])
    x = noised(world, x0, t, torch.randn(x0.shape, generator=generator))
    exact = magnitude(world.predict(x, t, cond), world.predict(x, t, world.encode([""]).expand(4)))
    split = float((exact[[0, 2]].max() + exact[[1, 3]].min()) / 2)
    before = world.forwards
    found = MemorizationFilter.on(world, split)(x, t, world.output(x, t, cond), cond=cond)
    assert world.forwards - before == 8  # the step's own four, and four
    torch.testing.assert_close(found.sizes, exact)
    assert exact[[0, 2]].max() < exact[[1, 3]].min()
    assert found.weights.tolist() == [1, 0, 1, 0]


def test_models_that_predict_v_and_their_eps_twins_agree():
    worlds = [Mixture.world(["a cat"], ["the mona lisa"], v_prediction=v, dtype=torch.float64) for v in (False, True)]
    t, sizes = torch.tensor([981, 500]), []
    for world in worlds:
        cond = world.encode(["a cat", "the mona lisa"])
        x = world.noise([0, 1])
        sizes.append(MemorizationFilter.on(world, 2.0)(x, t, world.output(x, t, cond)).sizes)
    torch.testing.assert_close(*sizes)


@pytest.mark.parametrize("kind", ["sd", "sd-v", "sd-x0"])
def test_a_unet_is_filtered_as_its_target_is_scored(kind, target_of):
    target = target_of(kind)
    cond = target.encode(["a cat", "two dogs", ""])
    x, t = target.noise([0, 1, 2]), torch.tensor([900, 500, 100])
    memory = MemorizationFilter.of_unet(target.unet, target._scheduler, target.encode([""]).tokens, 2.0)
    output = target.unet(x, t, cond.tokens, return_dict=False)[0]
    found = memory(x, t, output, cond=cond.tokens)
    with torch.no_grad():
        exact = magnitude(target.predict(x, t, cond), target.predict(x, t, target.encode([""]).expand(3)))
    torch.testing.assert_close(found.sizes[:2], exact[:2])
    assert float(found.sizes[2]) == 0


def test_the_second_pass_does_not_go_through_the_synchronizing_wrapper(build_pipe, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        pipe = build_pipe("sd")
        wrapped = nn.parallel.DistributedDataParallel(pipe.unet)
        memory = MemorizationFilter.of_unet(wrapped, pipe.scheduler, torch.zeros(1, 5, 16), 1e6)
        calls = []
        wrapped.register_forward_hook(lambda *_: calls.append("outer"))
        pipe.unet.register_forward_hook(lambda *_: calls.append("inner"))
        x, t, tokens = torch.ones(2, 4, 8, 8), torch.tensor([900, 100]), torch.ones(2, 5, 16)
        output = wrapped(x, t, tokens, return_dict=False)[0]
        found = memory(x, t, output, cond=tokens)
        found.mean(per_sample(output, x)).backward()
        assert calls == ["inner", "outer", "inner"]
        assert bool((found.sizes > 0).all())
        assert float(pipe.unet.conv_in.weight.grad.abs().sum()) > 0
    finally:
        torch.distributed.destroy_process_group()


def test_added_conditions_of_the_null_pass():
    """Sizes are the sample's own, pooled text is the null prompt's."""
    seen = {}

    def output(x, t, cond):
        seen.update(cond.extra)
        return x

    x, _, t, cond = a_batch(*FOUR)
    null = Condition(NULL, {"text_embeds": torch.zeros(1, 6)})
    extra = {"text_embeds": torch.ones(4, 6), "time_ids": torch.arange(4.0)[:, None]}
    MemorizationFilter(output, null, 2.0)(x, t, x, cond=Condition(cond, extra))
    assert torch.equal(seen["text_embeds"], torch.zeros(4, 6))
    assert torch.equal(seen["time_ids"], extra["time_ids"])


class Operations(TorchDispatchMode):
    """What was computed, in order, and how large it was."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen.append((str(func), tuple(result.shape) if isinstance(result, torch.Tensor) else ()))
        return result


def test_the_same_operations_in_the_same_shapes_whatever_is_kept():
    traces = []
    for threshold in (1e-6, 0.5 * ROOT, 1e6):
        with Operations() as operations:
            found, output, noise = step(Tiny(), threshold)
            found.mean(per_sample(output, noise)).backward()
        traces.append(operations.seen)
    assert len(traces[0]) > 30
    assert traces[0] == traces[1] == traces[2]
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "index.Tensor_hacked")
    assert not [name for name, _ in traces[0] if any(w in name for w in waits)]


def test_what_makes_no_sense_gets_a_sentence():
    x, _, t, cond = a_batch(*FOUR)
    with pytest.raises(UsageError, match="one row for all"):
        MemorizationFilter(Tiny(), cond, 2.0)
    with pytest.raises(UnknownName, match="batch"):
        MemorizationFilter(Tiny(), NULL, 2.0, over="batches")
    for threshold in (0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="keeps nothing"):
            MemorizationFilter(Tiny(), NULL, threshold)
    with pytest.raises(UsageError, match="raw output"):
        MemorizationFilter(Tiny(), NULL, 2.0)(x, t, x[:2])
