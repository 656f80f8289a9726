"""What every detector promises, ours and plugins': found by entry point, fed hand-made steps."""

from __future__ import annotations

import json
from importlib.metadata import entry_points

import pytest
import torch

from mnemoscope.detect.base import Detector, build
from mnemoscope.errors import MnemoscopeError, UnknownName, UsageError
from mnemoscope.plugins import installed
from mnemoscope.types import Step

NAMES = sorted({entry.name for entry in entry_points(group="mnemoscope.detectors")})
BATCH, STEPS = 4, 6


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


def trajectory(rows=range(BATCH), steps=STEPS, **changes):
    """Steps of random predictions; the batch holds the given rows of one fixed run."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor(list(rows))
    for i in range(steps):
        x, cond, uncond, x_next = torch.randn(4, BATCH, 3, 4, 4, generator=generator)
        fields = {"cond": cond[rows], "uncond": uncond[rows], "x_next": x_next[rows], **changes}
        yield Step(index=i, t=1000.0 - i, x=x[rows], **fields)


def shown(name, steps, options=None):
    detector = build(name, options)
    for step in steps:
        detector.update(step)
    return detector


def whole(name):
    """Options that make a detector look at every step of the trajectory, where it has a window."""
    try:
        return {"steps": STEPS} if build(name, {"steps": STEPS}).steps_needed == STEPS else {}
    except UnknownName:
        return {}


def test_some_are_installed():
    assert "magnitude" in NAMES
    assert set(NAMES) == set(installed("detector"))


def test_conforms(name):
    detector = build(name)
    assert isinstance(detector, Detector)
    assert detector.name == name
    assert detector.steps_needed >= 1
    assert detector.needs <= {"uncond", "grad", "attention", "reference"}
    assert isinstance(detector.higher_is_more_memorized, bool)


def test_scores_each_sample_on_its_own(name):
    together = shown(name, trajectory(), whole(name))
    scores, per_step = together.compute(), together.per_step()
    assert scores.shape == (BATCH,)
    assert per_step.shape[0] == BATCH
    assert scores.dtype == torch.float32
    for row in range(BATCH):
        alone = shown(name, trajectory([row]), whole(name))
        torch.testing.assert_close(alone.compute(), scores[row : row + 1])
        torch.testing.assert_close(alone.per_step(), per_step[row : row + 1])


def test_order_of_the_batch_is_irrelevant(name):
    order = [2, 0, 3, 1]
    torch.testing.assert_close(
        shown(name, trajectory(order), whole(name)).compute(),
        shown(name, trajectory(), whole(name)).compute()[torch.tensor(order)],
    )


def test_is_computed_from_a_leading_part_of_the_run(name):
    """Steps beyond ``steps_needed`` change nothing, so a longer run of another detector may be shared."""
    needed = build(name).steps_needed
    assert torch.equal(
        shown(name, trajectory(steps=needed)).compute(), shown(name, trajectory(steps=needed + 3)).compute()
    )


def test_windows_are_slices_of_the_longest_run(name):
    if not whole(name):
        pytest.skip("has no step window")
    per_step = shown(name, trajectory(), whole(name)).per_step()
    assert per_step.shape == (BATCH, STEPS)
    for stop in range(1, STEPS + 1):
        short = shown(name, trajectory(steps=stop), {"steps": stop})
        torch.testing.assert_close(short.per_step(), per_step[:, :stop])


def test_says_what_it_lacks(name):
    if "uncond" in build(name).needs:
        with pytest.raises(MnemoscopeError, match="guidance"):
            shown(name, trajectory(uncond=None))


def test_order_of_steps_is_kept(name):
    steps = list(trajectory())
    for wrong in ([steps[1]], [steps[0], steps[0]], [steps[0], steps[2]]):
        with pytest.raises(UsageError, match="step"):
            shown(name, wrong)


def test_asking_before_anything_was_seen(name):
    for ask in ("compute", "per_step"):
        with pytest.raises(UsageError, match=r"no step|No step"):
            getattr(build(name), ask)()


def test_names_the_space_it_compared(name):
    detector = build(name)
    assert detector.space is None
    detector.update(next(trajectory(space="velocity")))
    assert detector.space == "velocity"


def test_nan_stays_in_its_sample(name):
    steps = list(trajectory())
    steps[0].cond[1, 0, 0, 0] = float("nan")
    scores = shown(name, steps).compute()
    assert torch.isnan(scores).tolist() == [False, True, False, False]


def test_is_made_again_from_plain_values(name):
    spec = json.loads(json.dumps({"name": name, "options": whole(name)}))
    again = build(spec["name"], spec["options"])
    assert again.steps_needed == build(name, whole(name)).steps_needed


def test_wrong_names_get_help(name):
    with pytest.raises(UnknownName, match=f"no detector named '{name[:-1]}'. Did you mean '{name}'"):
        build(name[:-1])
    with pytest.raises(UnknownName, match=f"option of detector {name}"):
        build(name, {"setps": 3})
