"""Canaries: where they are planted, what is read off them, and when to stop."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.data import Subset

from mnemoscope.detect.magnitude import magnitude
from mnemoscope.errors import RunError, UsageError
from mnemoscope.mitigate.canaries import CanaryPlan, CanaryWatch, Onset, near
from mnemoscope.models.mixture import Mixture
from mnemoscope.records.canaries import Canary, LevelReading, Planted, Reading, read_history, write_history
from mnemoscope.report import canaries as figures
from mnemoscope.similarity.pixels import Pixels
from mnemoscope.stats import clopper_pearson

LEVELS = {0: 3, 1: 2, 8: 4}


def test_the_training_list_has_every_row_as_often_as_planned():
    plan = CanaryPlan.draw(30, LEVELS, seed=3)
    times = Counter(Subset(range(30), plan.indices()))
    planned = {c.row: c.copies for c in plan.canaries}
    assert Counter(planned.values()) == LEVELS
    assert {row: times[row] for row in range(30)} == {row: planned.get(row, 1) for row in range(30)}
    assert len(plan.indices()) == 30 - 9 + 2 * 1 + 4 * 8


def test_candidates_seeds_and_files(tmp_path):
    plan = CanaryPlan.draw(100, LEVELS, candidates=range(50, 60), seed=1)
    assert {c.row for c in plan.canaries} <= set(range(50, 60))
    assert CanaryPlan.draw(100, LEVELS, candidates=range(50, 60), seed=1).canaries == plan.canaries
    assert CanaryPlan.draw(100, LEVELS, candidates=range(50, 60), seed=2).canaries != plan.canaries
    path = plan.save(tmp_path / "canaries.json")
    assert CanaryPlan.load(path).indices() == plan.indices()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RunError, match="draw a new one") as e:
        CanaryPlan.load(path)
    assert "\n" not in str(e.value)
    with pytest.raises(RunError, match="there is no"):
        CanaryPlan.load(tmp_path / "other.json")


def test_plans_that_cannot_be():
    for levels, candidates in (({}, None), ({-1: 2}, None), ({1: 11}, range(10))):
        with pytest.raises(UsageError, match="candidates"):
            CanaryPlan.draw(20, levels, candidates=candidates)
    with pytest.raises(UsageError, match="different rows of 0 to 2"):
        CanaryPlan(Planted(rows=3, seed=0, canaries=[Canary(row=3, copies=1)]))


def test_a_reading_sums_up_by_level():
    plan = CanaryPlan(Planted(rows=9, seed=0, canaries=[Canary(row=r, copies=c) for r, c in ((4, 0), (7, 5), (1, 5))]))
    copied = torch.tensor([[False, False], [True, False], [False, False]])
    reading = plan.reading(
        70, torch.tensor([[1.0, 2.0], [3.0, 5.0], [4.0, 4.0]]), copied, torch.tensor([0.5, 1.0, 3.0])
    )
    low, high = reading.levels
    assert (low.copies, low.n, low.magnitude, low.copied, low.screen) == (0, 1, 1.5, 0, 0.5)
    assert (high.copies, high.n, high.magnitude, high.copied, high.screen) == (5, 2, 4.0, 1, 2.0)
    assert reading.generations == 2


def reading(step: int, k: int | None, n: int = 20) -> Reading:
    levels = [
        LevelReading(copies=c, n=n, magnitude=c / 10 + step / 100, copied=v)
        for c, v in ((0, 20 if k is not None else None), (9, k))
    ]
    return Reading(step=step, generations=4, levels=levels)


def test_training_stops_when_the_lower_end_at_the_highest_level_passes_the_rate():
    for k in range(21):
        assert Onset(0.05)(reading(0, k)) == (clopper_pearson(k, 20).low > 0.05)
    assert [Onset(0.05)(reading(0, k)) for k in (0, 3, 4, 20)] == [False, False, True, True]
    assert not Onset(0.0)(reading(0, None))


@pytest.fixture(scope="module")
def world():
    """Two memorized canaries and two that were kept out."""
    return Mixture.world(["a cat", "two dogs"], ["the mona lisa", "starry night"])


PLAN = CanaryPlan(
    Planted(rows=5, seed=0, canaries=[Canary(row=r, copies=c) for r, c in ((0, 0), (1, 0), (2, 50), (3, 50))])
)
CAPTIONS = ["a cat", "two dogs", "the mona lisa", "starry night"]


def pictures(world):
    """Of each canary: for memorized captions the one picture that they lead to."""
    return dict(enumerate(world.decode(world.draw(world.encode(CAPTIONS), torch.Generator().manual_seed(9)))))


def test_a_world_that_memorized_its_canaries_is_seen_to(world):
    watch = CanaryWatch(
        PLAN,
        CAPTIONS,
        copied=near(Pixels(8), pictures(world), 0.98),
        screen=lambda t, row: row + 0.0,
        seeds=2,
        steps=50,
        batch=3,
        stop=Onset(0.1),
    )
    before, forwards = torch.get_rng_state(), world.forwards
    assert watch.look(world, 500)
    assert torch.equal(torch.get_rng_state(), before)
    out, planted = watch.history[0].levels
    assert (out.copied, planted.copied) == (0, 2)
    assert (out.screen, planted.screen) == (0.5, 2.5)
    assert planted.magnitude > 3 * out.magnitude
    # 2 null predictions shared, 8 with a caption, then 49 further steps of both for all 8.
    assert world.forwards - forwards == 2 + 8 + 49 * 2 * 8


def test_without_pictures_it_costs_one_forward_each_and_never_stops(world):
    watch = CanaryWatch(PLAN, CAPTIONS, seeds=3, stop=Onset(0.0))
    forwards = world.forwards
    assert not watch.look(world, 1)
    assert world.forwards - forwards == 3 + 12
    x, t = world.noise([0, 1, 2]), world.schedule(50).timesteps[0]
    null = world.predict(x, t, world.encode([""]).expand(3))
    exact = [float(magnitude(world.predict(x, t, world.encode([c]).expand(3)), null).mean()) for c in CAPTIONS]
    found = [level.magnitude for level in watch.history[0].levels]
    assert found == pytest.approx([sum(exact[:2]) / 2, sum(exact[2:]) / 2], rel=1e-5)


def test_a_watch_that_cannot_be():
    with pytest.raises(UsageError, match="3 captions for 4 canaries"):
        CanaryWatch(PLAN, CAPTIONS[:3])
    with pytest.raises(UsageError, match="seeds=0"):
        CanaryWatch(PLAN, CAPTIONS, seeds=0)


def test_a_history_is_lines_and_comes_back(tmp_path):
    history = [reading(0, 0), reading(100, 12)]
    path = write_history(tmp_path / "canaries.jsonl", history)
    assert read_history(path) == history
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UsageError, match="holds no readings of canaries") as e:
        read_history(path)
    assert "\n" not in str(e.value)
    path.write_text('{"step": 1}\n')
    with pytest.raises(UsageError, match="generations"):
        read_history(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_history(tmp_path / "none.jsonl")


def test_a_history_can_be_drawn():
    history = [reading(0, 0), reading(100, 12), reading(200, 20)]
    for figure in (
        figures.magnitude(history),
        figures.copy_rate(history),
        figures.magnitude(history[:1]),
        figures.magnitude([]),
    ):
        assert str(figure).startswith("<svg")
        assert "nan" not in str(figure)
    drawn = str(figures.copy_rate(history))
    assert "9 copies: 0 at step 0, 1 at step 200" in drawn
    assert "kept out: 1 at step 0" in drawn
    assert "no readings" in str(figures.magnitude([]))
    with pytest.raises(UsageError, match="made no pictures"):
        figures.copy_rate([reading(0, None)])
