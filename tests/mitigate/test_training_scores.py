"""Thresholds for ranges of t, and every image's own record."""

from __future__ import annotations

import json

import pytest
import torch

from mnemoscope.errors import UnknownName, UsageError
from mnemoscope.mitigate.timesteps import TimestepThresholds
from mnemoscope.mitigate.training import MemorizationFilter
from mnemoscope.mitigate.visits import RunningScores, write_worst
from mnemoscope.models.base import Condition
from mnemoscope.models.mixture import Mixture
from mnemoscope.models.noising import noised


def clean_sizes(n: int = 4000):
    """m ~ N(1 + t/1000, 0.1²)."""
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(1000, (n,), generator=generator)
    return 1 + t / 1000 + 0.1 * torch.randn(n, generator=generator), t


@pytest.fixture(scope="module")
def thresholds() -> TimestepThresholds:
    return TimestepThresholds.fit(*clean_sizes(), source="drawn by a test")


def test_the_share_of_further_clean_samples_that_is_dropped_is_the_stated_one(thresholds):
    sizes, t = clean_sizes(8000)
    further, times = sizes[4000:], t[4000:]
    dropped = ~thresholds.keeps(further, times)
    assert abs(float(dropped.float().mean()) - 0.05) < 4 * (0.05 * 0.95 / 4000 + 0.05 * 0.95 / 4000) ** 0.5
    for i in range(10):  # in every range, not only on average
        here = dropped[times // 100 == i].float()
        assert float(here.mean()) < 0.05 + 4 * (2 * 0.05 * 0.95 / len(here)) ** 0.5


def test_a_threshold_is_the_order_statistic_of_its_range():
    sizes, t = torch.arange(1.0, 41.0), torch.tensor([100] * 20 + [900] * 20)
    found = TimestepThresholds.fit(sizes, t, drop=0.1, ranges=2)
    assert found.at(torch.tensor([0, 499, 500, 999])).tolist() == [19, 19, 39, 39]  # the ⌊0.1·21⌋ = 2nd largest of 20
    kept = found.keeps(torch.tensor([19.0, 19.1, 39.0, 39.1]), torch.tensor([0, 0, 999, 999]))
    assert kept.tolist() == [True, False, True, False]
    z = found.standardized(torch.tensor([10.5, 30.5]), torch.tensor([100, 900]))
    torch.testing.assert_close(z, torch.zeros(2))


def test_a_flow_has_times_up_to_one():
    t = (torch.arange(200) % 20 + 1) / 20
    found = TimestepThresholds.fit(
        torch.rand(200, generator=torch.Generator().manual_seed(1)) + 10 * t, t, ranges=4, horizon=1, drop=0.1
    )
    assert found.at(torch.tensor([1.0])) == found.at(torch.tensor([0.8]))
    assert found.at(torch.tensor([0.2])) < found.at(torch.tensor([0.3]))


def test_thresholds_are_plain_json_and_come_back(thresholds, tmp_path):
    path = thresholds.save(tmp_path / "tau.json")
    assert json.loads(path.read_text())["source"] == "drawn by a test"
    again = TimestepThresholds.load(path)
    assert again.record == thresholds.record
    sizes, t = clean_sizes(50)
    assert torch.equal(again.keeps(sizes, t), thresholds.keeps(sizes, t))


@pytest.mark.parametrize("cut", [0, 1, 40, -2])
def test_a_torn_file_gets_one_sentence(thresholds, tmp_path, cut):
    path = thresholds.save(tmp_path / "tau.json")
    path.write_bytes(path.read_bytes().rstrip()[:cut])
    with pytest.raises(UsageError, match="holds no thresholds for timesteps") as e:
        TimestepThresholds.load(path)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def test_files_that_hold_something_else(thresholds, tmp_path):
    path = tmp_path / "tau.json"
    with pytest.raises(UsageError, match="cannot be read"):
        TimestepThresholds.load(path)
    content = json.loads(thresholds.record.model_dump_json())
    for change, words in (
        ({"format": 99}, "format 99"),
        ({"means": [1.0]}, "equally long"),
        ({"horizon": 0}, "horizon"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(UsageError, match=words):
            TimestepThresholds.load(path)


def test_too_little_clean_data_says_how_much_is_needed():
    sizes, t = torch.rand(30), torch.arange(30) * 33
    with pytest.raises(UsageError, match=r"t from 0 to 500 has 16 clean magnitudes, and dropping at most 5 % needs 19"):
        TimestepThresholds.fit(sizes, t, ranges=2)
    with pytest.raises(UsageError, match="all alike"):
        TimestepThresholds.fit(torch.zeros(30), t, ranges=1)
    with pytest.raises(UsageError, match="one time for each"):
        TimestepThresholds.fit(sizes, t[:3], ranges=1)


def test_on_a_world_with_known_magnitudes_it_drops_the_memorized_and_keeps_the_ordinary():
    world = Mixture.world(["a cat", "two dogs"], ["the mona lisa"])
    generator = torch.Generator().manual_seed(0)

    def batch(prompts):
        cond = world.encode(prompts)
        x0, t = world.draw(cond, generator), torch.randint(600, 1000, (len(prompts),), generator=generator)
        x = noised(world, x0, t, torch.randn(x0.shape, generator=generator))
        return x, t, world.output(x, t, cond)

    clean = batch(["a cat", "two dogs"] * 200)
    fitted = TimestepThresholds.fit(
        MemorizationFilter.on(world, 1.0)(*clean).sizes, clean[1] - 600, ranges=4, horizon=400
    )
    shifted = TimestepThresholds(fitted.record)
    x, t, output = batch(["a cat", "the mona lisa"] * 50)
    sizes = MemorizationFilter.on(world, 1.0)(x, t, output).sizes
    kept = shifted.keeps(sizes, t - 600).float()
    assert float(kept[1::2].mean()) == 0
    assert float(kept[0::2].mean()) > 0.85


def at_mean(thresholds, t, z):
    """Magnitudes that are z standard deviations away from clean ones."""
    row = torch.tensor(thresholds.record.means), torch.tensor(thresholds.record.spreads)
    place = t // 100
    return (row[0][place] + torch.tensor(z) * row[1][place]).float()


def test_the_running_score_by_hand(thresholds):
    record = RunningScores(3, thresholds, decay=0.5)
    for z in ([1.0, 4.0], [2.0, 8.0], [6.0, 0.0]):
        t = torch.tensor([100, 900])
        record.update(torch.tensor([2, 0]), at_mean(thresholds, t, z), t)
    expected = [(4 * 0.25 + 8 * 0.5 + 0) / 1.75, 0.0, (1 * 0.25 + 2 * 0.5 + 6) / 1.75]
    torch.testing.assert_close(record.scores(), torch.tensor(expected), atol=1e-4, rtol=0)
    assert [row.visits for row in record.worst()] == [3, 3]
    assert [row.id for row in record.worst()] == [2, 0]


def test_an_image_twice_in_a_batch_was_visited_twice(thresholds):
    t = torch.tensor([300, 300, 300])
    record = RunningScores(2, thresholds, decay=0.5)
    record.update(torch.tensor([1, 0, 1]), at_mean(thresholds, t, [2.0, 5.0, 4.0]), t)
    torch.testing.assert_close(record.scores(), torch.tensor([5.0, 3.0]), atol=1e-4, rtol=0)
    assert {row.id: row.visits for row in record.worst()} == {1: 2, 0: 1}


def test_what_does_not_count_leaves_no_trace(thresholds):
    t = torch.tensor([300, 300])
    record = RunningScores(2, thresholds)
    record.update(torch.tensor([0, 1]), torch.tensor([9.0, float("nan")]), t, torch.tensor([False, True]))
    assert record.scores().tolist() == [0, 0]
    assert record.worst() == []


@pytest.mark.parametrize(("action", "weight"), [("flag", 1.0), ("down-weight", 0.25), ("drop", 0.0)])
def test_an_image_is_flagged_after_enough_visits_and_comes_back(thresholds, action, weight):
    record = RunningScores(2, thresholds, decay=0.5, least=3, action=action, weight=0.25)
    ids, t, history = torch.tensor([0, 1]), torch.tensor([300, 700]), []
    for z in ([9.0, 0.0],) * 3 + ([-9.0, 0.0],) * 2:
        record.update(ids, at_mean(thresholds, t, z), t)
        history.append(record.weights(ids).tolist())
    assert history == [[1, 1], [1, 1], [weight, 1], [1, 1], [1, 1]]


def test_a_weighed_down_image_counts_less_and_not_as_one_of_few(thresholds):
    """Alone in its batch it must not be scaled up to a full weight again."""
    record = RunningScores(1, thresholds, least=1, action="down-weight", weight=0.25)

    def output(x, t, cond):
        return x + cond.tokens.mean((1, 2))[:, None, None, None]

    memory = MemorizationFilter(output, torch.zeros(1, 2, 3), 1e6, scores=record)
    x, t, cond = torch.zeros(1, 2, 4, 4), torch.tensor([300]), torch.full((1, 2, 3), 5.0)
    found = memory(x, t, output(x, t, Condition(cond)), cond=cond, ids=torch.tensor([0]))
    assert float(found.mean(torch.tensor([8.0]))) == 2
    with pytest.raises(UsageError, match="give ids="):
        memory(x, t, x)


def test_thresholds_never_cross_spaces(thresholds):
    flow = Mixture.world(["a cat"], space="velocity")
    for options in ({"threshold": thresholds}, {"threshold": 2.0, "scores": RunningScores(1, thresholds)}):
        with pytest.raises(UsageError, match="fitted in eps space, and this filter compares in velocity"):
            MemorizationFilter.on(flow, **options)
    fitted = TimestepThresholds.fit(torch.rand(60), torch.rand(60), ranges=1, horizon=1, space="velocity")
    x, t, cond = flow.noise([0]), torch.tensor([0.9]), flow.encode(["a cat"])
    assert MemorizationFilter.on(flow, fitted)(x, t, flow.output(x, t, cond)).weights.shape == (1,)


def visited(thresholds, batches):
    record = RunningScores(6, thresholds, action="drop")
    for ids, sizes, t in batches:
        record.update(ids, sizes, t)
    return record


def some_batches(thresholds):
    generator = torch.Generator().manual_seed(5)
    for _ in range(6):
        t = torch.randint(1000, (4,), generator=generator)
        yield (
            torch.randint(6, (4,), generator=generator),
            at_mean(thresholds, t, torch.randn(4, generator=generator).tolist()),
            t,
        )


def test_resumed_in_the_middle_it_is_as_if_never_stopped(thresholds, tmp_path):
    batches = list(some_batches(thresholds))
    whole = visited(thresholds, batches)
    first = MemorizationFilter(lambda x, t, c: x, torch.zeros(1, 2, 3), 2.0, scores=visited(thresholds, batches[:3]))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = MemorizationFilter(
        lambda x, t, c: x, torch.zeros(1, 2, 3), 2.0, scores=RunningScores(6, thresholds, action="drop")
    )
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for batch in batches[3:]:
        second.scores.update(*batch)
    assert torch.equal(second.scores.scores(), whole.scores())
    assert second.scores.worst() == whole.worst()
    whole.save(tmp_path / "scores.safetensors")
    third = RunningScores(6, thresholds)
    third.load(tmp_path / "scores.safetensors")
    assert third.worst() == whole.worst()


def test_states_of_something_else(thresholds, tmp_path):
    record = visited(thresholds, some_batches(thresholds))
    with pytest.raises(UsageError, match="of 6 images, this training set 7"):
        RunningScores(7, thresholds).load_state_dict(record.state_dict())
    with pytest.raises(UsageError, match="nothing"):
        record.load_state_dict({})
    plain = MemorizationFilter(lambda x, t, c: x, torch.zeros(1, 2, 3), 2.0)
    assert plain.state_dict() == {}
    with pytest.raises(UsageError, match="build it as it was"):
        plain.load_state_dict({"scores": record.state_dict()})
    path = record.save(tmp_path / "scores.safetensors")
    for cut in (0, 5, 60, -1):
        torn = tmp_path / "torn.safetensors"
        torn.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(UsageError, match="cannot be read as running scores") as e:
            record.load(torn)
        assert "\n" not in str(e.value)


def test_the_worst_images_are_written_as_lines(thresholds, tmp_path):
    record = RunningScores(3, thresholds, least=1)
    t = torch.tensor([300, 300, 300])
    record.update(torch.arange(3), at_mean(thresholds, t, [1.0, 7.0, 7.0]), t)
    path = write_worst(tmp_path / "worst.jsonl", record.worst(2), ["a.png", "b.png", "ç.png"])
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["name"] for line in lines] == ["b.png", "ç.png"]
    assert [line["flagged"] for line in lines] == [True, True]
    assert lines[0]["score"] == pytest.approx(7, abs=1e-3)
    assert "name" not in json.loads(write_worst(path, record.worst(1)).read_text())


def test_values_that_mean_nothing(thresholds):
    for options in ({"images": 0}, {"least": 0}, {"decay": 1.0}, {"weight": 0.0}):
        with pytest.raises(UsageError):
            RunningScores(**{"images": 3, "clean": thresholds, **options})
    with pytest.raises(UnknownName, match="down-weight"):
        RunningScores(3, thresholds, action="downweight")
    with pytest.raises(UsageError, match="0 to 2"):
        RunningScores(3, thresholds).update(torch.tensor([3]), torch.tensor([1.0]), torch.tensor([5]))
