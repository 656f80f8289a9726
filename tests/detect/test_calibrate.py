"""Calibration: what it promises of a threshold, where it refuses to go, and what becomes of the file."""

import doctest
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemoscope import stats
from mnemoscope.detect import calibrate
from mnemoscope.detect.calibrate import Calibration, method_of, read_log, setting_of
from mnemoscope.detect.magnitude import Magnitude
from mnemoscope.errors import RunError, UsageError
from mnemoscope.records.schema import Thresholds

IDENTITY = {"unet": "ab12", "dtype": "float32", "resolution": 64, "scheduler": {"name": "DDIM", "steps_offset": 1}}
OTHERWISE = {
    "guidance": 7.5,
    "steps": 50,
    "window": (0, 1),
    "seeds": 4,
    "seed_mode": "shared",
    "base_seed": 0,
    "method": method_of(Magnitude()),
}


class Sharper(Magnitude):
    """Another method under the same name."""


class Varied(Magnitude):
    """The same method with an option."""

    def __init__(self, steps=1, variant="plain"):
        super().__init__(steps)
        self.variant = variant


def made_with(**changes):
    identity = IDENTITY | {k: v for k, v in changes.items() if k in IDENTITY}
    return setting_of(identity, **OTHERWISE | {k: v for k, v in changes.items() if k in OTHERWISE})


def fit(scores=range(200), fpr=0.05, **changes):
    return Calibration.fit(scores, made_with(**changes), detector="magnitude", fpr=fpr, source="200 captions")


# What a threshold means


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-100, 100) | st.integers(0, 3).map(float), min_size=20, max_size=80),
    st.sampled_from([0.05, 0.07, 0.29, 1 / 3]),
    st.floats(-200, 200),
)
def test_above_is_greater_is_p_at_most_the_rate(ordinary, fpr, score):
    made = fit(ordinary, fpr)
    for s in (score, *ordinary):
        assert made.above(s) == (s > made.threshold) == (made.p_value(s) <= fpr)
    assert np.mean([made.above(s) for s in ordinary]) <= fpr
    assert made.record.scores == sorted(ordinary)
    low, high = made.record.interval
    assert low is None or low <= made.threshold
    assert high is None or high >= made.threshold


def test_numbers_of_a_calibration():
    made = fit()
    # ⌊0.05 · 201⌋ = 10: the tenth largest of 0 … 199.
    assert made.threshold == 190
    assert made.p_values([190.5, 300, -5]).tolist() == [10 / 201, 1 / 201, 1]
    assert made.realized == stats.realized_fpr(200, 0.05)
    assert made.record.interval == (183, 196)  # ranks 184 and 197 of Binomial(200, 0.95), tails ≤ 2.5 %
    assert doctest.testmod(calibrate).failed == 0


def test_too_few_scores_to_bound_the_threshold(tmp_path):
    made = Calibration.fit([*range(99)], made_with(), detector="magnitude", fpr=0.01)
    assert made.record.interval[1] is None
    assert Calibration.load(made.save(tmp_path / "t.json")).record == made.record


def test_borderline_is_flagged_by_the_models_rounding():
    at = fit().threshold
    for dtype, rtol in (("float32", 2**-11.5), ("bfloat16", 2**-3.5), ("torch.float16", 2**-5)):
        made = fit(dtype=dtype)
        assert made.borderline(at)
        assert made.borderline(at * (1 + 0.99 * rtol))
        assert made.borderline(at * (1 - 0.99 * rtol))
        assert not made.borderline(at * (1 + 1.01 * rtol))
        assert made.record.rounding == pytest.approx(rtol)
    assert not fit().borderline(at + 0.01, rtol=1e-6)
    assert not Calibration.fit(range(200), {"target": "by name"}, detector="m").borderline(at + 1)
    # What is stored decides; a file of before it was stored goes by its dtype.
    record = fit(dtype="float16").record
    assert Calibration(record.model_copy(update={"rounding": 1e-6})).borderline(at * (1 + 1e-5)) is False
    assert Calibration(record.model_copy(update={"rounding": None})).borderline(at * (1 + 1e-2)) is True
    # The flag never changes the call.
    assert fit().above(at * (1 + 1e-9))
    assert not fit().above(at)


# Where it refuses to go


def test_the_same_setting_passes():
    made = fit()
    assert made.check(made_with()) == []
    assert made.check(json.loads(json.dumps(made_with()))) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"unet": "cd34"}, 'target.unet: was "ab12", now "cd34"'),
        ({"dtype": "float16"}, 'target.dtype: was "float32", now "float16"'),
        ({"resolution": 512}, "target.resolution: was 64, now 512"),
        ({"scheduler": {"name": "PNDM", "steps_offset": 1}}, 'target.scheduler.name: was "DDIM", now "PNDM"'),
        ({"guidance": 3.0}, "guidance: was 7.5, now 3.0"),
        ({"steps": 20}, "steps: was 50, now 20"),
        ({"window": (0, 50)}, "window: was [0, 1], now [0, 50]"),
        ({"seeds": 1}, "seeds: was 4, now 1"),
        ({"base_seed": 1}, "base_seed: was 0, now 1"),
        ({"seeds": [4, 5, 6, 7]}, "seeds: was 4, now [4, 5, 6, 7]"),
        ({"method": method_of(Sharper())}, 'method.class: was "Magnitude", now "Sharper"'),
        ({"method": method_of(Magnitude()) | {"name": "size"}}, 'method.name: was "magnitude", now "size"'),
    ],
)
def test_another_setting_is_refused_by_name(change, named):
    made = fit()
    with pytest.raises(UsageError) as caught:
        made.check(made_with(**change))
    assert f"({named}); recalibrate with `mnemoscope calibrate`, or pass --accept-threshold" in str(caught.value)
    assert made.check(made_with(**change), accept=True) == [named]


def test_a_detector_of_the_same_name_and_other_options_has_a_threshold_of_its_own():
    made = fit(method=method_of(Varied(variant="plain")))
    assert made.check(made_with(method=method_of(Varied(variant="plain")))) == []
    with pytest.raises(UsageError, match=r'\(method\.options\.variant: was "plain", now "squared"\)'):
        made.check(made_with(method=method_of(Varied(variant="squared"))))
    # The window stands for itself, once.
    other = made_with(method=method_of(Varied(steps=5)), window=(0, 5))
    assert made.check(other, accept=True) == ["window: was [0, 1], now [0, 5]"]


def test_another_bank_of_noises_needs_another_threshold_and_own_noises_do_not():
    assert fit(base_seed=3).check(made_with(base_seed=3)) == []
    own = {"seed_mode": "per-prompt"}
    assert fit(**own, base_seed=3).check(made_with(**own, base_seed=4)) == []
    assert fit().check(made_with(**own), accept=True) == [
        "base_seed: was 0, now null",
        'seed_mode: was "shared", now "per-prompt"',
    ]
    assert fit().check(made_with(seeds=[0, 1, 2, 3])) == []
    assert fit().check(made_with(seeds=[1, 0, 2, 3]), accept=True)


def mean_of_bank(base, prompts):
    """Scores whose noises are those of one bank: what the bank adds is the same for every prompt."""
    return np.random.default_rng([1, base]).normal() + np.random.default_rng([2, *prompts]).normal(size=len(prompts))


def test_why_the_bank_matters():
    """In shared mode a threshold keeps its rate under its own bank, and loses it under another."""
    rates = {}
    for same in (True, False):
        above = [
            Calibration.fit(mean_of_bank(base, range(base, base + 99)), made_with(), detector="m", fpr=0.05).above(
                mean_of_bank(base if same else base + 5000, [100_000 + base])[0]
            )
            for base in range(400)
        ]
        rates[same] = np.mean(above)
    assert rates[True] <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5
    assert rates[False] > 0.1


def test_every_difference_is_named_and_so_is_the_file(tmp_path):
    made = Calibration.load(fit().save(tmp_path / "thresholds.json"))
    with pytest.raises(UsageError, match=r"^thresholds\.json was made under .*detector: .*guidance: .*target\.dtype: "):
        made.check(made_with(dtype="float16", guidance=2.0), detector="sharpness")
    lacking = {k: v for k, v in made_with().items() if k != "seeds"}
    assert made.check(lacking, accept=True) == ["seeds: was 4, now null"]
    assert made.check(made_with() | {"lora": "style"}, accept=True) == ['lora: was null, now "style"']


# The file


def test_the_file_comes_back_and_is_read_without_this_class(tmp_path):
    made = fit(np.random.default_rng(0).normal(size=300) / 3)
    path = made.save(tmp_path / "new" / "thresholds.json")
    again = Calibration.load(path)
    assert again.record.scores == made.record.scores  # to the last bit
    assert again.threshold == made.threshold
    assert again.check(made_with()) == []
    plain = Thresholds.model_validate_json(path.read_bytes())
    assert stats.conformal_p([0.4], plain.scores)[0] == made.p_value(0.4)
    assert [p.name for p in path.parent.iterdir()] == ["thresholds.json"]


def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = fit().save(tmp_path / "thresholds.json")
    before = path.read_bytes()

    def killed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(fpr=0.1).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    with path.open("rb") as reader:  # who opened the old file before goes on reading it
        fit(fpr=0.1).save(path)
        assert reader.read() == before
    assert Calibration.load(path).threshold == 180


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        fit().save(tmp_path / "file" / "thresholds.json")


def damaged(tmp_path, **changes):
    path = fit().save(tmp_path / "thresholds.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"threshold": 150.0},
            "threshold is 150.0, and 190.0 follows from its 200 scores at a false-positive rate of 0.05",
        ),
        ({"fpr": 0.1}, "threshold is 190.0, and 180.0 follows from its 200 scores at a false-positive rate of 0.1"),
        ({"fpr": 0.001}, "200 ordinary scores cannot state a false-positive rate of 0.001"),
        ({"scores": [1.0, "x"]}, "is no calibration (scores.1: "),
        ({"scores": [1.0, float("nan")]}, "is no calibration (it holds NaN"),
        ({"treshold": 1}, "is no calibration (treshold: "),
        ({"format": 99, "new key": 1}, "has format 99, not 1"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, changes, sentence):
    path = damaged(tmp_path, **changes)
    with pytest.raises(UsageError) as caught:
        Calibration.load(path)
    assert sentence in str(caught.value)


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=40) | st.sampled_from([b"", b"null", b"[]", b"{}", b'"\\ud800"', b"[" * 5000, b"\xff\xfe"]))
def test_no_bytes_crash_the_reader(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("t") / "thresholds.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is no calibration"):
        Calibration.load(path)


def test_no_file(tmp_path):
    with pytest.raises(UsageError, match=r"cannot be read .*mnemoscope calibrate"):
        Calibration.load(tmp_path / "thresholds.json")
    with pytest.raises(UsageError, match=r"holds no thresholds\.json; write one with `mnemoscope calibrate`"):
        Calibration.load(tmp_path)


# Guards


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: fit([1.0, float("nan")] * 100), "ordinary score 1 of 200 is NaN"),
        (lambda: fit([1.0, float("inf")] * 100), "an ordinary score is infinite"),
        (
            lambda: fit(range(10), 0.05),
            "10 ordinary scores cannot state a false-positive rate of 0.05: give at least 19",
        ),
        (lambda: fit(fpr=5.0), "fpr = 5 is not a rate"),
        (lambda: Calibration.fit(range(200), {}, detector="magnitude"), "needs its setting"),
        (lambda: fit().above(float("nan")), "score 0 of 1 is NaN"),
        (lambda: fit().borderline(float("nan")), "score 0 of 1 is NaN"),
        (lambda: fit(dtype="float23").borderline(1.0), "no dtype named 'float23'"),
    ],
)
def test_what_users_can_do_wrong_gets_a_sentence(call, sentence):
    with pytest.raises(UsageError) as caught:
        call()
    assert sentence in str(caught.value)


# A host's own traffic


def of_traffic(scores, budget=0.05, **options):
    return Calibration.of_traffic(scores, made_with(), detector="magnitude", budget=budget, **options)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0, 10), min_size=40, max_size=80),
    st.lists(st.floats(10, 20), max_size=20),
    st.sampled_from([0.05, 0.1, 0.3]),
)
def test_memorized_prompts_in_the_traffic_only_raise_the_threshold(ordinary, memorized, budget):
    clean, mixed = fit(ordinary, budget), of_traffic([*memorized, *ordinary], budget)
    assert mixed.threshold >= clean.threshold
    assert np.mean([mixed.above(s) for s in [*memorized, *ordinary]]) <= budget
    assert np.mean([mixed.above(s) for s in ordinary]) <= budget


def test_a_calibration_on_traffic_says_so():
    made = of_traffic(range(200), source="200 generations in guard.jsonl")
    assert made.threshold == fit().threshold
    assert made.record.source.startswith(
        "200 generations in guard.jsonl; unlabelled traffic: the rate is a budget of alarms"
    )
    trimmed = of_traffic(range(200), trim=0.1)
    assert len(trimmed.record.scores) == 180
    assert trimmed.threshold < made.threshold
    assert "the 20 highest of 200 scores were left out (10 %)" in trimmed.record.source
    with pytest.raises(UsageError, match="share of the traffic"):
        of_traffic(range(200), trim=0.5)


def test_logs_of_a_guard(tmp_path):
    log = tmp_path / "guard.jsonl"
    rows = [{"name": "a", "score": s, "t": 981.0, "hit": s is not None and s > 2} for s in (1.5, 2.5, None)]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "amended": True}])
    log.write_text(text + '{"name": "a", "sco')
    found = read_log(log)
    assert (found.scores, found.times, found.names) == ([1.5, 2.5], {981.0}, {"a"})
    nameless = '{"name": [1], "score": 1.0, "t": 1.0}'
    for bad in ("{", "3", '{"name": "a"}', '{"name": "a", "score": "high", "t": 1}', nameless, '"' + "x" * (16 << 20)):
        log.write_text(f"{text}{bad}\n{text}")
        with pytest.raises(UsageError, match=r"line 5 (is not a guard's|has more than 16,777,216 bytes)"):
            read_log(log)
    with pytest.raises(UsageError, match="cannot be read"):
        read_log(tmp_path / "none.jsonl")
    os.truncate(log, 6 << 30)
    with pytest.raises(UsageError, match="has more than 16,777,216 bytes"):
        read_log(log)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_of_a_run_folder_only_its_own_file_is_read(tmp_path):
    path = fit().save(tmp_path / "thresholds.json")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thresholds.json").symlink_to(path)
    with pytest.raises(UsageError, match="leads out of its folder"):
        Calibration.load(tmp_path / "run")
    assert Calibration.load(tmp_path / "run" / "thresholds.json"), "a file that is named may be a link"
    (tmp_path / "run" / "thresholds.json").unlink()
    os.mkfifo(tmp_path / "run" / "thresholds.json")
    with pytest.raises(UsageError, match=r"holds no thresholds\.json"):
        Calibration.load(tmp_path / "run")
