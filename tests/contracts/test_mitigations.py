"""What every mitigation promises, ours and plugins': found by entry point, tried on a closed-form world and on a tiny network."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from importlib.metadata import entry_points

import pytest
import torch

from mnemoscope.errors import CannotAudit, UnknownName
from mnemoscope.mitigate.base import CHANGES, Generation, Mitigation, build, describe, sample
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.plugins import installed

NAMES = sorted({entry.name for entry in entry_points(group="mnemoscope.mitigations")})
PROMPTS = ["the mona lisa", "two dogs on a beach", ""]
KEYS = (7, 2**62 + 5, 11)
STEPS = 4

BELONGS = {
    "prompt": {"prompts", "cond"},
    "embedding": {"cond"},
    "noise": {"noise"},
    "guidance": {"guidance"},
    "attention": {"cond", "null"},
}
"""Which fields of a generation hold what a mitigation may change."""
BOOKS = {"first_null", "first_cond", "forwards", "backwards"}
"""Fields that any may write, because they hold what follows from the others."""


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(params=["gaussian", "sd", "sd2"])
def target(request, target_of):
    return Gaussian.tiny() if request.param == "gaussian" else target_of(request.param)


@pytest.fixture
def mitigation(name, target) -> Mitigation:
    usual = build(name)
    if "attention" in usual.needs and isinstance(target, Gaussian):
        pytest.skip("a closed-form world pays no attention")
    return build(name, {usual.strength: usual.strengths[-1]})  # a tiny network may be below the usual thresholds


def start(target, **changes) -> Generation:
    g = Generation(
        target.noise([0, 1, 2]), target.encode(PROMPTS), target.encode([""]), tuple(PROMPTS), KEYS, steps=STEPS
    )
    return replace(g, guidance=3.0, **changes)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if hasattr(a, "extra"):
        return (
            same(a.tokens, b.tokens)
            and a.extra.keys() == b.extra.keys()
            and all(same(v, b.extra[k]) for k, v in a.extra.items())
        )
    return a == b


def changed(a: Generation, b: Generation) -> set[str]:
    return {f.name for f in fields(a) if not same(getattr(a, f.name), getattr(b, f.name))}


def copy(g: Generation) -> Generation:
    def again(c):
        return replace(c, tokens=c.tokens.clone(), extra={k: v.clone() for k, v in c.extra.items()})

    return replace(g, noise=g.noise.clone(), cond=again(g.cond), null=again(g.null))


def final(target, g: Generation) -> torch.Tensor:
    *_, last = sample(target, g)
    assert last.x_next is not None
    return last.x_next


def test_some_are_installed():
    assert {"padding", "sail", "attention"} <= set(NAMES)
    assert set(NAMES) == set(installed("mitigation"))


def test_conforms(name):
    mitigation = build(name)
    assert isinstance(mitigation, Mitigation)
    assert mitigation.name == name
    assert mitigation.changes
    assert mitigation.changes <= set(CHANGES)
    assert mitigation.needs <= {"grad", "prompts", "attention"}
    assert all(describe(installed("mitigation")[name]))


def test_strengths_are_values_of_an_option(name):
    mitigation = build(name)
    assert mitigation.strength in inspect.signature(type(mitigation)).parameters
    assert len(set(mitigation.strengths)) >= 5
    for value in mitigation.strengths:
        assert getattr(build(name, {mitigation.strength: value}), mitigation.strength) == value


def test_changes_what_it_says_and_nothing_else(mitigation, target):
    given = start(target)
    before = copy(given)
    prepared = mitigation.prepare(target, given)
    assert not changed(given, before)
    allowed = set.union(*(BELONGS[c] for c in mitigation.changes))
    assert changed(given, prepared) <= allowed | BOOKS
    # Padding carries nothing in a closed-form world.
    assert changed(given, prepared) & allowed or (mitigation.name == "padding" and isinstance(target, Gaussian))
    if "embedding" not in mitigation.changes and "prompt" not in mitigation.changes:
        assert torch.equal(given.cond.tokens, prepared.cond.tokens)
        assert torch.equal(given.null.tokens, prepared.null.tokens)


def test_a_batch_is_its_samples_one_by_one(mitigation, target):
    given = start(target)
    together = mitigation.prepare(target, given)
    assert len(together) == len(given)
    for row in range(len(given)):
        index = torch.tensor([row])
        alone, part = mitigation.prepare(target, given.select(index)), together.select(index)
        assert alone.prompts == part.prompts
        assert alone.keys == part.keys
        close = {"rtol": 1e-3, "atol": 1e-3}  # an optimizer's steps have the size of its rate, however small the slope
        torch.testing.assert_close(alone.noise, part.noise, **close)
        torch.testing.assert_close(alone.cond.tokens, part.cond.tokens, **close)
        for key, value in part.cond.extra.items():
            torch.testing.assert_close(alone.cond.extra[key], value)
        torch.testing.assert_close(final(target, alone), final(target, part), rtol=1e-2, atol=1e-2)


def test_the_same_keys_give_the_same_draws(mitigation, target):
    first, again = (mitigation.prepare(target, start(target)) for _ in range(2))
    assert not changed(replace(first, guidance=None), replace(again, guidance=None))


def test_costs_are_what_the_target_counted(mitigation, target):
    given = start(target, forwards=100, backwards=10)
    before = target.forwards
    prepared = mitigation.prepare(target, given)
    assert prepared.forwards - 100 == target.forwards - before
    assert prepared.backwards >= 10
    assert prepared.backwards == 10 or "grad" in mitigation.needs


def test_predictions_it_hands_on_are_those_of_its_first_step(mitigation, target):
    prepared = mitigation.prepare(target, start(target))
    bare = replace(prepared, first_null=None, first_cond=None)
    with_them, without = next(iter(sample(target, prepared))), next(iter(sample(target, bare)))
    torch.testing.assert_close(with_them.cond, without.cond, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(with_them.uncond, without.uncond, rtol=1e-4, atol=1e-4)


def test_the_caller_keeps_its_grad_mode(mitigation, target):
    given = start(target)
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            prepared = mitigation.prepare(target, given)
            assert torch.is_grad_enabled() is mode
            assert not prepared.noise.requires_grad
            assert not prepared.cond.tokens.requires_grad


def test_says_what_it_lacks(name, target):
    mitigation = build(name)
    if "prompts" in mitigation.needs:
        with pytest.raises(CannotAudit, match="prompt"):
            mitigation.prepare(target, start(target, prompts=None))
    elif "attention" in mitigation.needs and isinstance(target, Gaussian):
        with pytest.raises(CannotAudit, match="attention"):
            mitigation.prepare(target, start(target))
    else:
        assert len(mitigation.prepare(target, start(target, prompts=None))) == 3


def test_wrong_names_get_help(name):
    with pytest.raises(UnknownName, match=f"no mitigation named '{name[:-1]}'"):
        build(name[:-1])
    with pytest.raises(UnknownName, match=f"option of mitigation {name}"):
        build(name, {"strentgh": 1})
