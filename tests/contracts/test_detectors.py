"""What every detector promises, ours and plugins': found by entry point, fed hand-made steps or pictures.

Two shapes: ``name`` are detectors that watch the steps of a trajectory, ``comparer`` those that compare the pictures of a prompt.
"""

from __future__ import annotations

import json
from importlib.metadata import entry_points

import pytest
import torch

from mnemoscope.detect.base import Detector, PictureDetector, build, describe
from mnemoscope.detect.calibrate import method_of
from mnemoscope.errors import MnemoscopeError, UnknownName, UsageError
from mnemoscope.plugins import installed
from mnemoscope.types import Step

NAMES = sorted({entry.name for entry in entry_points(group="mnemoscope.detectors")})
COMPARERS = [name for name in NAMES if "pictures" in build(name).needs]
BATCH, STEPS = 4, 6


@pytest.fixture(params=[name for name in NAMES if name not in COMPARERS])
def name(request) -> str:
    return request.param


@pytest.fixture(params=COMPARERS)
def comparer(request) -> str:
    return request.param


@pytest.fixture(params=NAMES)
def any_name(request) -> str:
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
    assert "density" in COMPARERS
    assert set(NAMES) == set(installed("detector"))


def test_conforms(any_name):
    detector = build(any_name)
    compares = any_name in COMPARERS
    assert isinstance(detector, PictureDetector if compares else Detector)
    assert detector.name == any_name
    assert detector.steps_needed == 0 if compares else detector.steps_needed >= 1
    assert detector.needs <= {"uncond", "grad", "attention", "reference", "pictures"}
    assert isinstance(detector.higher_is_more_memorized, bool)
    needs, costs = describe(installed("detector")[any_name])
    assert needs
    assert costs


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


def pictures(n=5, size=24):
    """Pictures of one prompt: two that are nearly alike, the others not."""
    made = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(3))
    made[1] = (made[0] + 0.01).clamp(0, 1)
    return made


def test_each_picture_gets_a_score(comparer):
    scores = build(comparer).score(pictures())
    assert scores.shape == (5,)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


def test_order_of_the_pictures_is_irrelevant(comparer):
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(build(comparer).score(pictures()[order]), build(comparer).score(pictures())[order])


def test_pictures_that_are_all_alike_score_most_extremely(comparer):
    detector = build(comparer)
    alike, different = detector.score(pictures()[:1].expand(4, -1, -1, -1)), detector.score(pictures())
    further = alike.min() > different.max() if detector.higher_is_more_memorized else alike.max() < different.min()
    assert further


def test_a_picture_alone_cannot_be_compared(comparer):
    with pytest.raises(UsageError, match="at least 2 seeds"):
        build(comparer).score(pictures(2)[:1])


def test_comparing_changes_nothing(comparer):
    """One object serves all prompts, so it must not remember; and the pictures are not its own."""
    detector, shown = build(comparer), pictures()
    before = method_of(detector)
    first = detector.score(shown)
    detector.score(pictures(3))
    assert torch.equal(detector.score(shown), first)
    assert torch.equal(shown, pictures())
    assert method_of(detector) == before
    assert json.loads(json.dumps(before)) == before


def test_is_made_again_from_plain_values(name):
    spec = json.loads(json.dumps({"name": name, "options": whole(name)}))
    again = build(spec["name"], spec["options"])
    assert again.steps_needed == build(name, whole(name)).steps_needed


def test_wrong_names_get_help(any_name):
    with pytest.raises(UnknownName, match=f"no detector named '{any_name[:-1]}'. Did you mean '{any_name}'"):
        build(any_name[:-1])
    with pytest.raises(UnknownName, match=f"option of detector {any_name}"):
        build(any_name, {"setps": 3})
