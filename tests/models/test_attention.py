"""Watching attention: it is the model's own, and the picture does not know."""

from __future__ import annotations

import pytest
import torch

from mnemoscope.models.attention import end_token_attention
from mnemoscope.models.base import AttendsToEnd
from mnemoscope.models.gaussian import Gaussian

PROMPTS = ["a cat", "three white dots on a red field"]


def setting(target):
    cond, plan = target.encode(PROMPTS), target.schedule(10)
    ends = [[p.kind for p in target.pieces(prompt)].index("end") for prompt in PROMPTS]
    return target.noise([0, 1]), plan.timesteps[-1], cond, ends


@pytest.mark.parametrize("kind", ["sd", "sd2"])
def test_pictures_are_bit_identical_while_watched_and_after(target_of, kind):
    target = target_of(kind)
    x, t, cond, ends = setting(target)
    before = [layer.processor for layer in layers(target)]
    with torch.no_grad():
        plain = target.output(x, t, cond)
        with target.end_token_attention(ends):
            assert torch.equal(target.output(x, t, cond), plain)
        assert torch.equal(target.output(x, t, cond), plain)
    assert [layer.processor for layer in layers(target)] == before


def layers(target):
    return [m for m in target.unet.modules() if getattr(m, "is_cross_attention", False)]


def test_processors_are_put_back_after_an_exception(target_of):
    target = target_of("sd")
    before = [layer.processor for layer in layers(target)]

    def fail():
        with target.end_token_attention([3]):
            assert [layer.processor for layer in layers(target)] != before
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [layer.processor for layer in layers(target)] == before


def test_it_is_the_attention_the_layer_pays(target_of):
    """With values that are 1 at the end token and 0 elsewhere, attention itself comes out of the layer."""
    target = target_of("sd")
    x, t, cond, ends = setting(target)
    seen = {}

    def keep(module, args, kwargs, output):
        hidden, text = args[0], kwargs["encoder_hidden_states"]
        query, key = (
            m.unflatten(2, (module.heads, -1)).transpose(1, 2) for m in (module.to_q(hidden), module.to_k(text))
        )
        value = torch.zeros(*key.shape[:3], 1)
        for row, end in enumerate(ends):
            value[row, :, end] = 1
        paid = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        seen.setdefault(hidden.shape[1], []).append(paid[..., 0].mean(1))

    inside = [m for m in target.unet.down_blocks.modules() if getattr(m, "is_cross_attention", False)]
    hooks = [m.register_forward_hook(keep, with_kwargs=True) for m in inside]
    try:
        with torch.no_grad(), target.end_token_attention(ends) as watched:
            target.output(x, t, cond)
    finally:
        for hook in hooks:
            hook.remove()
    expected = torch.stack(seen[max(seen)]).mean(0)
    found = watched.maps()
    assert found.shape == (2, 8, 8)
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-5, atol=1e-7)
    assert bool((found > 0).all() and (found < 1).all())


def test_sizes_that_are_not_square(build_pipe, adapt):
    target = adapt(build_pipe("sd"), resolution=(16, 24))
    x, t, cond, ends = setting(target)
    with torch.no_grad(), target.end_token_attention(ends) as watched:
        target.output(x, t, cond)
    assert watched.maps().shape == (2, 8, 12)


def test_who_can_be_watched(target_of):
    assert isinstance(target_of("sd"), AttendsToEnd)
    assert not isinstance(Gaussian.tiny(), AttendsToEnd)
    assert not isinstance(target_of("pixel"), AttendsToEnd)
    with end_token_attention(target_of("sd").unet, [0], (8, 8)) as watched:
        assert watched.latent_size == (8, 8)
