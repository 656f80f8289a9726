"""Padding: which positions get which content."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mnemoscope.errors import CannotAudit, UnknownName, UsageError
from mnemoscope.mitigate.base import Generation
from mnemoscope.mitigate.padding import CONTENTS, Padding, chosen
from mnemoscope.models.base import Pads
from mnemoscope.models.gaussian import Gaussian

PROMPTS = ("a cat", "three white dots on a red field")


def start(target, prompts=PROMPTS):
    return Generation(target.noise([0, 1]), target.encode(list(prompts)), target.encode([""]), prompts, (3, 4))


def where(target, *kinds):
    return torch.tensor([[p.kind in kinds for p in target.pieces(prompt)] for prompt in PROMPTS])


def differs(a, b):
    return (a.cond.tokens != b.cond.tokens).any(2)


def test_shares_are_whole_positions_and_nested():
    padding = torch.arange(20).expand(2, -1) >= 10
    picked = [chosen(padding, share, (1, 2), "test") for share in (0.0, 0.3, 0.7, 1.0)]
    assert [p.sum(1).tolist() for p in picked] == [[0, 0], [3, 3], [7, 7], [10, 10]]
    for fewer, more in pairwise(picked):
        assert bool((more | ~fewer).all())
    assert torch.equal(picked[-1], padding)
    assert not torch.equal(picked[1][0], picked[1][1])


@pytest.mark.parametrize("kind", ["sd", "sd2"])
def test_words_and_start_stay(kind, target_of):
    target = target_of(kind)
    g = start(target)
    for content in CONTENTS:
        changed = differs(g, Padding(content=content).prepare(target, g))
        assert not bool((changed & where(target, "start", "text")).any())


def test_content_of_the_empty_prompt(target_of):
    target = target_of("sd")
    g = start(target)
    tokens = Padding(content="null").prepare(target, g).cond.tokens
    after = where(target, "end", "padding")
    expected = g.null.tokens.expand_as(tokens)
    assert torch.equal(tokens[after], expected[after])
    kept = Padding(content="null", end=False).prepare(target, g).cond.tokens
    end = where(target, "end")
    assert torch.equal(kept[end], g.cond.tokens[end])


def test_content_zero(target_of):
    target = target_of("sd")
    tokens = Padding(content="zero").prepare(target, start(target)).cond.tokens
    assert not bool(tokens[where(target, "end", "padding")].any())


def test_exclamation_marks_are_what_the_encoder_writes_when_it_pads_with_them(target_of, build_pipe, adapt):
    target = target_of("sd")
    assert isinstance(target, Pads)
    pipe = build_pipe("sd")
    pipe.tokenizer.pad_token = "!"
    other = adapt(pipe)
    g = start(target)
    tokens, expected = Padding(content="!").prepare(target, g).cond.tokens, other.encode(list(PROMPTS)).tokens
    padding, end = where(target, "padding"), where(target, "end")
    torch.testing.assert_close(tokens[padding], expected[padding])
    assert not torch.allclose(tokens[padding], g.cond.tokens[padding], atol=1e-3)
    assert not bool(tokens[end].any())
    with pytest.raises(UsageError, match="no token"):
        target.encode_padded(["a cat"], "no such token")


def test_an_empty_prompt_stays(target_of):
    target = target_of("sd")
    g = start(target, ("", "a cat"))
    for content in CONTENTS:
        assert differs(g, Padding(content=content).prepare(target, g)).any(1).tolist() == [False, True]


def test_padding_of_a_closed_form_world_carries_nothing():
    target = Gaussian.tiny()
    g = start(target, ("a cat", "the mona lisa"))
    for content in CONTENTS:
        assert torch.equal(Padding(content=content).prepare(target, g).cond.tokens, g.cond.tokens)


def test_a_target_that_cannot_pad_is_told_what_to_use(bare):
    target = Gaussian.tiny()
    with pytest.raises(CannotAudit, match="content='null'"):
        Padding().prepare(bare(target), start(target, ("a cat", "the mona lisa")))


def test_values_that_mean_nothing():
    with pytest.raises(UsageError, match="share"):
        Padding(1.5)
    with pytest.raises(UnknownName, match="content"):
        Padding(content="ones")
