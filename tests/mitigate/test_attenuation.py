"""Attention that is changed: logits become factor·logit + bias, rows apart, and the network is as before afterwards."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import pytest
import torch

from mnemoscope.errors import CannotAudit, UnknownName, UsageError
from mnemoscope.mitigate.attention import Attenuation, Masking, attenuated, carried, change_of, masked, spikes
from mnemoscope.mitigate.base import Generation, sample
from mnemoscope.models.attention import scaled_attention, token_attention
from mnemoscope.models.base import ATTENTION, Condition, ScalesAttention
from mnemoscope.models.gaussian import Gaussian

PROMPTS = ("a cat", "three white dots on a red field")


def start(target, prompts=PROMPTS, **options):
    g = Generation(target.noise([0, 1]), target.encode(list(prompts)), target.encode([""]), prompts, (3, 4), steps=4)
    return replace(g, guidance=3.0, **options)


def shown(target, g):
    plan = target.schedule(g.steps)
    return plan.scale(plan.start(g.noise), plan.timesteps[0]), plan.timesteps[0]


@torch.no_grad()
def output(target, g, cond):
    return target.output(*shown(target, g), cond)


def with_change(cond, change):
    return replace(cond, extra={**cond.extra, ATTENTION: change})


def hooks(unet):
    return [m for m in unet.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_who_can_be_changed(target_of):
    assert isinstance(target_of("sd"), ScalesAttention)
    assert not isinstance(Gaussian.tiny(), ScalesAttention)
    assert not isinstance(target_of("pixel"), ScalesAttention)


@pytest.mark.parametrize("kind", ["sd", "sd2"])
def test_neutral_rows_are_the_untouched_model(kind, target_of):
    target = target_of(kind)
    g = start(target)
    plain, change = output(target, g, g.cond), change_of(g.cond)
    torch.testing.assert_close(output(target, g, with_change(g.cond, change)), plain, rtol=1e-5, atol=1e-6)
    change[1, :, 0, 2] = 0.2
    mixed = output(target, g, with_change(g.cond, change))
    torch.testing.assert_close(mixed[0], plain[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(mixed[1], plain[1], atol=1e-4)


def test_without_a_change_the_model_is_not_touched(target_of, monkeypatch):
    target = target_of("sd")
    g = start(target)
    plain = output(target, g, g.cond)
    output(target, g, with_change(g.cond, 2 * change_of(g.cond)))
    assert torch.equal(output(target, g, g.cond), plain)

    def never(*args):
        raise AssertionError("the attention was reached")

    monkeypatch.setattr("mnemoscope.models.stable_diffusion.scaled_attention", never)
    assert torch.equal(output(target, g, g.cond), plain)


def classic(attn, hidden, text, mask, factor, bias):
    """softmax(factor·q kᵀ/√d + bias + mask) v, written out."""
    query, key, value = (
        part.unflatten(2, (attn.heads, -1)).transpose(1, 2)
        for part in (attn.to_q(hidden), attn.to_k(text), attn.to_v(text))
    )
    logits = query @ key.transpose(2, 3) * attn.scale
    logits = factor[:, None, None] * logits + bias[:, None, None] + (0 if mask is None else mask[:, None])
    return attn.to_out[0]((logits.softmax(3) @ value).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("block", ["down", "up"])
@pytest.mark.parametrize("masks", [False, True])
def test_logits_become_factor_times_logit_plus_bias(block, masks, build_pipe):
    unet = build_pipe("sd").unet
    layer = next(m for n, m in unet.named_modules() if n.startswith(block) and getattr(m, "is_cross_attention", False))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, layer.to_q.in_features, generator=generator)
    text = torch.randn(2, 5, layer.to_k.in_features, generator=generator)
    change = torch.randn(2, 3, 2, 5, generator=generator)
    mask = torch.randn(2, 1, 5, generator=generator) if masks else None
    factor, bias = change[:, {"down": 0, "up": 2}[block]].unbind(1)
    for processor in (layer.processor, classic_processor()):
        layer.set_processor(processor)
        with torch.no_grad(), scaled_attention(unet, change):
            found = layer(hidden, encoder_hidden_states=text, attention_mask=mask)
        with torch.no_grad():
            torch.testing.assert_close(found, classic(layer, hidden, text, mask, factor, bias), rtol=1e-4, atol=1e-5)


def classic_processor():
    from diffusers.models.attention_processor import AttnProcessor

    return AttnProcessor()


def test_keys_that_are_normalized_are_scaled_after_it(build_pipe):
    unet = build_pipe("sd").unet
    layer = next(m for n, m in unet.named_modules() if n.startswith("down") and getattr(m, "is_cross_attention", False))
    dim = layer.to_k.out_features // layer.heads
    layer.norm_k, layer.norm_q = torch.nn.LayerNorm(dim), torch.nn.Identity()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 9, layer.to_q.in_features, generator=generator)
    text = torch.randn(1, 5, layer.to_k.in_features, generator=generator)
    change = torch.zeros(1, 3, 2, 5)  # all logits 0: what comes out is the mean of the values
    with torch.no_grad(), scaled_attention(unet, change):
        found = layer(hidden, encoder_hidden_states=text)
    expected = layer.to_out[0](layer.to_v(text).mean(1, keepdim=True)).expand_as(found)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


def test_keys_that_join_the_pictures_own():
    """Attention of pixel models to text and picture at once: only the text's keys are changed."""
    from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.down_blocks = torch.nn.ModuleList([
                Attention(8, cross_attention_dim=8, heads=2, dim_head=4, added_kv_proj_dim=6, norm_num_groups=2,
                          residual_connection=True, bias=True, processor=AttnAddedKVProcessor2_0())
            ])  # fmt: skip

    torch.manual_seed(0)
    net = Net().eval()
    layer = net.down_blocks[0]
    layer.is_cross_attention = True
    picture, text = torch.randn(1, 8, 3, 3), torch.randn(1, 4, 6)
    change = torch.tensor([1.0, 0.0]).repeat(1, 3, 1)[..., None].expand(-1, -1, -1, 4).clone()
    with torch.no_grad():
        plain = layer(picture, encoder_hidden_states=text)
        with scaled_attention(net, change):
            torch.testing.assert_close(layer(picture, encoder_hidden_states=text), plain, rtol=1e-5, atol=1e-6)
        change[..., 1, 1:] = -torch.inf
        with scaled_attention(net, change):
            found = layer(picture, encoder_hidden_states=text)
        torch.testing.assert_close(found, layer(picture, encoder_hidden_states=text[:, :1]), rtol=1e-5, atol=1e-6)


def test_a_masked_token_is_as_good_as_gone(target_of):
    target = target_of("sd")
    g = start(target)
    change = change_of(g.cond)
    change[:, :, 1, 5:] = -torch.inf
    cut = Condition(g.cond.tokens[:, :5])
    torch.testing.assert_close(
        output(target, g, with_change(g.cond, change)), output(target, g, cut), rtol=1e-4, atol=1e-5
    )


def test_hooks_are_gone_however_the_block_ends(target_of):
    unet = target_of("sd").unet
    processors = dict(unet.attn_processors)

    def fail():
        with scaled_attention(unet, torch.ones(1, 3, 2, 77)):
            assert hooks(unet)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not hooks(unet)
    g = start(target_of("sd"))
    with pytest.raises(UsageError, match="one per row"):
        output(target_of("sd"), g, with_change(g.cond, torch.ones(1, 3, 2, 77)))
    assert not hooks(unet)
    assert dict(unet.attn_processors) == processors


def test_other_threads_do_not_notice(target_of):
    target = target_of("sd")
    g = start(target)
    plain, found = output(target, g, g.cond), []
    with scaled_attention(target.unet, torch.zeros(2, 3, 2, g.cond.tokens.shape[1])):
        thread = threading.Thread(target=lambda: found.append(output(target, g, g.cond)))
        thread.start()
        thread.join()
        assert not torch.allclose(output(target, g, g.cond), plain, atol=1e-4)
    assert torch.equal(found[0], plain)


def test_a_pipeline_of_your_own(build_pipe):
    """Rows are those of its doubled batch; a neutral change leaves its picture as it is."""
    pipe = build_pipe("sd")

    def picture():
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        return pipe("a cat", latents=noise, num_inference_steps=2, output_type="latent").images

    plain = picture()
    change = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1).repeat(2, 3, 1, 77)
    with scaled_attention(pipe.unet, change):
        torch.testing.assert_close(picture(), plain, rtol=1e-4, atol=1e-4)
    change[1, :, 0] = 0
    with scaled_attention(pipe.unet, change):
        assert not torch.allclose(picture(), plain, atol=1e-3)
    assert torch.equal(picture(), plain)


def test_a_network_without_text_is_refused(target_of):
    with (
        pytest.raises(CannotAudit, match="no cross-attention"),
        scaled_attention(target_of("pixel").unet, torch.ones(1, 3, 2, 4)),
    ):
        pass


def test_mass_sums_to_one_and_the_output_is_the_models_own(target_of):
    target = target_of("sd")
    g = start(target)
    plain = output(target, g, g.cond)
    with target.token_attention() as seen:
        assert torch.equal(output(target, g, g.cond), plain)
    assert seen.mass().shape == g.cond.tokens.shape[:2]
    torch.testing.assert_close(seen.mass().sum(1), torch.ones(2))
    with token_attention(target.unet) as unseen, pytest.raises(UsageError, match="No attention seen"):
        unseen.mass()


def test_mass_under_a_change_is_the_changed_one(target_of):
    target = target_of("sd")
    g = start(target)
    change = change_of(g.cond)
    change[:, :, 1, 3] = -torch.inf
    with target.token_attention() as seen:
        output(target, g, with_change(g.cond, change))
    assert not bool(seen.mass()[:, 3].any())


def test_spikes_are_counted_without_the_start():
    mass = torch.full((2, 12), 0.01)
    mass[:, 0] = 0.7
    mass[0, 5] = 0.19
    found = spikes(mass, 1.0)
    assert found.nonzero().tolist() == [[0, 5]]
    z = (0.19 - mass[0, 1:].mean()) / mass[0, 1:].std()
    assert bool(spikes(mass, float(z) - 0.01)[0, 5])
    assert not bool(spikes(mass, float(z) + 0.01).any())


def test_odds_are_multiplied_whatever_the_logits_sign():
    cond = Condition(torch.zeros(1, 4, 2))
    where = torch.tensor([[False, True, False, False]])
    for logits in (torch.tensor([0.3, 2.0, 0.1, -1.0]), torch.tensor([0.3, -2.0, 0.1, -1.0])):
        before = logits.softmax(0)[1]
        factor, bias = attenuated(change_of(cond), where, 0.3, "odds")[0, 0]
        after = (factor * logits + bias).softmax(0)[1]
        torch.testing.assert_close(after / (1 - after), 0.3 * before / (1 - before))
        factor, bias = attenuated(change_of(cond), where, 0.3, "logit")[0, 1]
        assert bool(((factor * logits + bias).softmax(0)[1] < before) == (logits[1] > 0))
    assert torch.equal(attenuated(change_of(cond), where, 0.3, "odds")[:, 2], change_of(cond)[:, 2])


def test_changes_add_up():
    cond = Condition(torch.zeros(1, 4, 2))
    where, first = torch.tensor([[False, True, False, False]]), torch.tensor([[True, False, False, False]])
    both = masked(
        attenuated(change_of(cond), where, 0.5, "odds"), torch.tensor([[False, False, False, True]]), first, 1.2
    )
    torch.testing.assert_close(both[0, 0, 1], torch.tensor([0.0, math.log(0.5), 0.0, -torch.inf]))
    torch.testing.assert_close(both[0, 2, 0], torch.tensor([1.2, 1.0, 1.0, 1.0]))


def test_changes_travel_with_their_rows(target_of):
    target = target_of("sd")
    g = Masking().prepare(target, start(target))
    turned = g.select(torch.tensor([1, 0]))
    assert torch.equal(turned.cond.extra[ATTENTION], g.cond.extra[ATTENTION].flip(0))
    pair = Condition.cat([g.null.expand(2), g.cond])
    assert torch.equal(pair.extra[ATTENTION][:2], change_of(g.null).expand(2, -1, -1, -1))
    assert torch.equal(pair.split()[3].extra[ATTENTION][0], g.cond.extra[ATTENTION][1])


def test_masking_hides_end_and_padding(target_of):
    target = target_of("sd")
    g = Masking(c=1.2).prepare(target, start(target))
    for prompt, change in zip(PROMPTS, g.cond.extra[ATTENTION], strict=True):
        kinds = [piece.kind for piece in target.pieces(prompt)]
        assert [bool(b) for b in torch.isinf(change[1, 1])] == [k in ("end", "padding") for k in kinds]
        torch.testing.assert_close(change[2, 0], torch.tensor([1.2 if k == "start" else 1.0 for k in kinds]))
    assert bool(torch.isfinite(list(sample(target, g))[-1].x_next).all())


def test_the_measuring_forward_is_kept_where_nothing_is_attenuated(target_of):
    target = target_of("sd")
    none = Attenuation(threshold=100.0).prepare(target, start(target))
    assert none.forwards == 2
    torch.testing.assert_close(none.first_cond, output(target, start(target), none.cond), rtol=1e-4, atol=1e-5)
    some = Attenuation(threshold=0.5).prepare(target, start(target))
    assert some.first_cond is None
    assert bool((some.cond.extra[ATTENTION] != none.cond.extra[ATTENTION]).any())


@pytest.mark.parametrize("method", [Attenuation(threshold=0.0), Masking()])
def test_an_empty_prompt_pays_attention_as_before(method, target_of):
    target = target_of("sd")
    g = method.prepare(target, start(target, ("", "a cat")))
    assert torch.equal(g.cond.extra[ATTENTION][:1], change_of(g.null))
    assert g.cond.same_as(g.null).tolist() == [True, False]


def test_what_a_carried_change_keeps(target_of):
    target = target_of("sd")
    g = start(target, first_null=torch.zeros(2, 4, 8, 8))
    assert carried(g, change_of(g.cond)).first_null is g.first_null


def test_closed_form_worlds_pay_no_attention():
    target = Gaussian.tiny()
    for method in (Attenuation(), Masking()):
        with pytest.raises(CannotAudit, match=r"changes attention .* use a mitigation of"):
            method.prepare(target, start(target, ("a cat", "the mona lisa")))


def test_values_that_mean_nothing():
    with pytest.raises(UsageError, match="alpha"):
        Attenuation(0.0)
    with pytest.raises(UnknownName, match="form"):
        Attenuation(form="softmax")
    with pytest.raises(UsageError, match="share"):
        Masking(-0.1)
    with pytest.raises(UsageError, match=r"c is 0.5, and must be a number from 1"):
        Masking(c=0.5)
