"""What every measure of one picture promises, ours and plugins': found by entry point, on closed-form worlds and tiny networks."""

from __future__ import annotations

import json
from importlib.metadata import entry_points

import pytest
import torch

from mnemoscope.errors import CannotAudit, UnknownName, UsageError
from mnemoscope.measure.base import NEEDS, Measure, build, costs_of, describe, spec_of
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.plugins import installed

NAMES = sorted({entry.name for entry in entry_points(group="mnemoscope.measures")})
NETWORKS = ("sd", "sd-v", "sd-x0", "sd3", "pixel", "gray", "ldm-kl")
WORLDS = {"gaussian": {}, "gaussian-v": {"v_prediction": True}, "gaussian-flow": {"space": "velocity"}}
BRIEF = {"critical-noise": {"iterations": 2, "levels": 3}, "denoising-loss": {"draws": 4}, "secmi": {"time": 30}}
"""Options that make a contract no weaker and a network's work less."""
KEYS = [7, 2**62 + 5]
CAPTIONS = ["the mona lisa", ""]


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(params=[*WORLDS, *NETWORKS])
def target(request, target_of):
    return Gaussian.tiny(**WORLDS[request.param]) if request.param in WORLDS else target_of(request.param)


def brief(name) -> Measure:
    return build(name, BRIEF.get(name))


def pictures(target, n=2) -> torch.Tensor:
    _, height, width = target.latent_shape
    factor = getattr(target, "factor", 1)
    return torch.rand(n, 3, height * factor, width * factor, generator=torch.Generator().manual_seed(5))


def captions(target) -> list[str] | None:
    return CAPTIONS if target.has_text else None


def test_some_are_installed():
    assert {"flipd", "critical-noise", "denoising-loss", "secmi"} <= set(NAMES)
    assert set(NAMES) == set(installed("measure"))


def test_conforms(name):
    measure = build(name)
    assert isinstance(measure, Measure)
    assert measure.name == name
    assert isinstance(measure.low_is_stored, bool)
    assert measure.needs <= set(NEEDS)
    assert ("grad" in measure.needs) == (measure.backwards > 0)
    assert measure.forwards >= 1
    reads, needs, costs = describe(installed("measure")[name])
    assert reads.startswith(measure.reads)
    assert needs
    assert costs == costs_of(measure)


def test_one_number_for_each_picture_at_the_cost_it_states(name, target):
    measure, before, shown = brief(name), target.forwards, pictures(target)
    spec, state, mode = spec_of(measure), torch.random.get_rng_state(), torch.is_grad_enabled()
    found = measure(target, shown, prompts=captions(target), keys=KEYS)
    assert target.forwards - before == 2 * measure.forwards
    assert found.shape == (2,)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert not found.requires_grad
    # Nothing else was touched.
    assert spec_of(measure) == spec
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.is_grad_enabled() == mode
    assert torch.equal(shown, pictures(target))


def test_the_same_again_and_alone_and_in_another_order(name, target):
    measure, shown, told = brief(name), pictures(target), captions(target)
    together = measure(target, shown, prompts=told, keys=KEYS)
    turned = brief(name)(target, shown.flip(0), prompts=None if told is None else told[::-1], keys=KEYS[::-1])
    alone = measure(target, shown[1:], prompts=None if told is None else told[1:], keys=KEYS[1:])
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(turned.flip(0), together, **close)
    torch.testing.assert_close(alone, together[1:], **close)
    assert torch.equal(measure(target, shown, prompts=told, keys=KEYS), together)


def test_the_cost_of_default_options(name):
    world, measure = Gaussian.tiny(), build(name)
    measure(world, pictures(world))
    assert world.forwards == 2 * measure.forwards


def test_without_a_caption_the_prompt_is_empty(name):
    world, measure = Gaussian.tiny(), build(name)
    shown = pictures(world)
    assert torch.equal(measure(world, shown), measure(world, shown, prompts=["", ""]))


def test_a_caption_matters_where_the_model_reads_it(name):
    """Two captions of a closed-form world are two distributions."""
    world = Gaussian.tiny()
    shown = world.decode(world.mean(world.encode(["the mona lisa"])))
    found = [build(name)(world, shown, prompts=[p]).item() for p in ("the mona lisa", "a cat")]
    assert found[0] != found[1] or name == "secmi"


def test_a_stored_picture_is_on_the_side_of_stored_pictures(name):
    """The picture of a memorized caption against noise, both under that caption. SecMI is of membership and sees no difference."""
    if name == "secmi":
        pytest.skip("a score of membership")
    world = Gaussian.tiny()
    measure = build(name)
    shown = torch.cat([world.decode(world.mean(world.encode(["the mona lisa"]))), pictures(world, 1)])
    stored, other = measure(world, shown, prompts=["the mona lisa", "a cat"]).tolist()
    assert stored < other if measure.low_is_stored else stored > other


def test_a_caption_for_a_model_without_text_is_refused(name):
    world = Gaussian.tiny(has_text=False)
    with pytest.raises(CannotAudit, match="takes no text; measure its pictures without captions"):
        build(name)(world, pictures(world), prompts=CAPTIONS)


def test_as_many_captions_as_pictures(name):
    world = Gaussian.tiny()
    with pytest.raises(UsageError, match="1 captions for 2 pictures: give one per picture"):
        build(name)(world, pictures(world), prompts=["a"])


def test_a_target_that_hides_its_times_is_refused(name):
    if "times" not in build(name).needs:
        pytest.skip("needs no times")

    class Hidden:
        def __init__(self, world):
            self._world = world

        def __getattr__(self, what):
            if what == "training_times":
                raise AttributeError(what)
            return getattr(self._world, what)

    world = Gaussian.tiny()
    with pytest.raises(CannotAudit, match="does not say at which times it was trained"):
        build(name)(Hidden(world), pictures(world))


def test_is_made_again_from_plain_values(name):
    for made in (build(name), brief(name)):
        spec = json.loads(json.dumps(spec_of(made)))
        again = build(spec["name"], spec["options"])
        assert spec_of(again) == spec_of(made)
        assert (again.forwards, again.backwards) == (made.forwards, made.backwards)


def test_wrong_names_get_help(name):
    with pytest.raises(UnknownName, match=f"no measure named '{name[:-1]}'. Did you mean '{name}'"):
        build(name[:-1])
    with pytest.raises(UnknownName, match=f"option of measure {name}"):
        build(name, {"tmie": 3})
