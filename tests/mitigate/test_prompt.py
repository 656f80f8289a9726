"""Optimizing the embedding: the official numbers, stops, a batch as one at a time, and what it costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mnemoscope.detect.magnitude import magnitude, per_dimension
from mnemoscope.errors import UsageError
from mnemoscope.mitigate.base import Generation, first_sizes, sample
from mnemoscope.mitigate.prompt import PromptOptimization
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.models.load import load

PROMPTS = ["three white dots", "a photo of a cat", "dots"]


@pytest.fixture
def tiny(target_of):
    return target_of("sd")


def generation(target, prompts=PROMPTS, seeds=None, **options) -> Generation:
    return Generation.of(target, prompts, list(range(len(prompts))) if seeds is None else seeds, steps=5, **options)


def sizes(target, g: Generation) -> torch.Tensor:
    """Per image, at the scale of a 4×64×64 latent, computed anew."""
    return per_dimension(first_sizes(target, replace(g, first_null=None, first_cond=None))[0], target.latent_shape)


@pytest.mark.parametrize("i", range(4))
def test_official_embedding(official_wen, i):
    """10 AdamW updates at 0.05 without a target, on four images that share one embedding; start token decayed."""
    import json

    reference = json.loads((official_wen / "reference.json").read_text())
    tensors = load_file(official_wen / "tensors.safetensors")
    target = load(official_wen / "model", guidance=reference["guidance_scale"])
    prompts = [reference["prompts"][i]] * 4
    start = replace(Generation.of(target, prompts, range(4)), noise=tensors[f"xT.{i}"])
    found = PromptOptimization(None, official=True).prepare(target, start).cond.tokens
    for row in found:
        torch.testing.assert_close(row[None], tensors[f"emb.{i}"], rtol=1e-3, atol=1e-3 * float(found.std()))
    step = next(iter(sample(target, replace(start, cond=replace(start.cond, tokens=found)))))
    after = torch.tensor(reference["rows"][i]["after_mitigation_norm"])[:, 0]
    torch.testing.assert_close(magnitude(step.cond, step.uncond), after, rtol=1e-3, atol=1e-4)


def test_one_update_is_adamw_by_hand(tiny):
    """The first step of Adam is lr·sign(g) up to eps; decay shrinks by lr·0.01; the start token stays."""
    g = generation(tiny, PROMPTS[:1])
    method = PromptOptimization(None, updates=1, lr=0.05)
    before, after = g.cond.tokens, method.prepare(tiny, g).cond.tokens
    moved = after - before * (1 - 0.05 * 0.01)
    assert torch.equal(after[:, 0], before[:, 0])
    assert ((moved[:, 1:].abs() - 0.05).abs() < 1e-3).float().mean() > 0.95
    official = PromptOptimization(None, updates=1, lr=0.05, official=True).prepare(tiny, g).cond.tokens
    torch.testing.assert_close(official[:, 0], before[:, 0] * (1 - 0.05 * 0.01))
    torch.testing.assert_close(official[:, 1:], after[:, 1:])


def test_stops_at_the_target(tiny):
    g = generation(tiny)
    start = sizes(tiny, g)
    aim = 0.8 * float(start.min())
    out = PromptOptimization(aim, updates=200).prepare(tiny, g)
    assert (sizes(tiny, out) <= aim * (1 + 1e-4)).all()


def test_what_is_below_the_target_stays_as_it_is(tiny):
    g = generation(tiny)
    start = sizes(tiny, g)
    order = start.argsort()
    between = float(start[order[0]] + start[order[1]]) / 2
    out = PromptOptimization(between).prepare(tiny, g)
    same = (out.cond.tokens == g.cond.tokens).flatten(1).all(1)
    assert same[order[0]]
    assert not same[order[1:]].any()


def test_a_batch_equals_one_at_a_time(tiny):
    """Rows stop at different updates; those that go on must not notice."""
    g, method = generation(tiny, [*PROMPTS, ""]), PromptOptimization(1.2)
    together = method.prepare(tiny, g)
    for i in range(len(g)):
        alone = method.prepare(tiny, g.select(torch.tensor([i])))
        torch.testing.assert_close(together.cond.tokens[i], alone.cond.tokens[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "updates"), [(PromptOptimization(None, updates=3), 3), (PromptOptimization(1e9), 0)]
)
def test_costs_k_forwards_and_backwards_on_top_of_sampling(build_pipe, adapt, method, updates):
    target = adapt(build_pipe("sd"))
    g = generation(target)
    for _ in sample(target, g):
        pass
    plain, target.forwards = target.forwards, 0
    out = method.prepare(target, g)
    assert out.forwards == target.forwards == (updates + 2) * len(g)
    assert out.backwards == updates * len(g)
    for _ in sample(target, out):
        pass
    assert target.forwards == plain + updates * len(g)


def test_the_kept_predictions_are_those_of_the_new_embedding(tiny):
    out = PromptOptimization(1.0, updates=4).prepare(tiny, generation(tiny))
    kept, anew = (list(sample(tiny, g)) for g in (out, replace(out, first_null=None, first_cond=None)))
    torch.testing.assert_close(kept[0].cond, anew[0].cond, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept[-1].x_next, anew[-1].x_next, rtol=1e-4, atol=1e-4)


def test_weights_and_argument_stay_as_they_are(tiny):
    g = generation(tiny)
    before = g.cond.tokens.clone()
    weights = [p.detach().clone() for p in tiny.unet.parameters()]
    PromptOptimization(None, updates=2).prepare(tiny, g)
    assert torch.equal(g.cond.tokens, before)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(weights, tiny.unet.parameters(), strict=True))


def test_walks_straight_down_where_the_answer_is_known():
    """On the Gaussian world L is proportional to the distance from the empty prompt, so that the embedding must come nearer to it."""
    world = Gaussian.world(["a cat"], ["the mona lisa"])
    g = Generation.of(world, ["the mona lisa"], [0], steps=10)
    aim = 0.5 * float(sizes(world, g))
    out = PromptOptimization(aim, updates=500, lr=0.01).prepare(world, g)
    assert float(sizes(world, out)) <= aim * (1 + 1e-4)
    apart = [float((c.tokens.sum(1) - g.null.tokens.sum(1)).norm()) for c in (g.cond, out.cond)]
    assert apart[1] < 0.7 * apart[0]


@pytest.mark.parametrize("options", [{"target": 0.0}, {"target": -1.0}, {"updates": 0}, {"lr": 0.0}])
def test_refuses(options):
    with pytest.raises(UsageError, match=r"must be a (whole )?number (above 0|from 1)"):
        PromptOptimization(**options)
