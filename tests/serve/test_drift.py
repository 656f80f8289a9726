"""Drift: silent at its stated rate while nothing changes, loud when something does."""

from __future__ import annotations

import numpy as np
import pytest

from mnemoscope.detect.calibrate import Calibration
from mnemoscope.errors import UsageError
from mnemoscope.serve.drift import Drift


def calibrated(scores, fpr=0.01):
    return Calibration.fit(scores, {"target": "a model"}, detector="magnitude", fpr=fpr)


def draw(rng, n, shift=1.0):
    return shift * rng.lognormal(size=n)


def passed(rng, calibration, n, shift=1.0):
    """Scores of a traffic that a guard lets pass."""
    found = draw(rng, 3 * n, shift)
    return found[found <= calibration.threshold][:n].tolist()


def alarms(trials, *, shift=1.0, looks=10, alpha=0.2, window=60, n=300, windows=10, seed=0):
    """In how many trials an alarm came within so many windows."""
    rng, count = np.random.default_rng(seed), 0
    for _ in range(trials):
        calibration = calibrated(draw(rng, n), fpr=0.05)
        drift = Drift(calibration, window=window, alpha=alpha, looks=looks)
        count += any(look.alarm for look in drift.add(passed(rng, calibration, window * windows, shift)))
    return count


def test_false_alarms_stay_below_the_stated_rate():
    """150 trials of 10 looks at a rate of 20 % over 10 looks: at 20 %, more than 45 alarms have probability < 0.2 %."""
    assert 0 < alarms(150) <= 45


def test_cut_traffic_is_compared_with_a_cut_calibration():
    """At a threshold that half of the ordinary scores exceed, passed scores alone would look shifted."""
    rng = np.random.default_rng(1)
    calibration = calibrated(draw(rng, 400), fpr=0.5)
    looks = Drift(calibration, window=200).add(passed(rng, calibration, 1000))
    assert len(looks) == 5
    assert not any(look.alarm for look in looks)


@pytest.mark.parametrize(("shift", "sign"), [(2.0, 1), (0.5, -1)])
def test_a_shift_is_found(shift, sign):
    assert alarms(20, shift=shift, window=200, looks=100, alpha=0.01, windows=1) >= 18
    rng = np.random.default_rng(2)
    calibration = calibrated(draw(rng, 300))
    heard = []
    drift = Drift(calibration, window=200, on_alarm=heard.append)
    (look,) = drift.add(passed(rng, calibration, 200, shift))
    assert look.alarm
    assert heard == [look]
    assert np.sign(look.shift) == sign
    assert ("higher" if sign > 0 else "lower") in look.words


def test_windows_do_not_overlap():
    rng = np.random.default_rng(3)
    calibration = calibrated(draw(rng, 300))
    scores = passed(rng, calibration, 500)
    drift, whole = Drift(calibration, window=100), Drift(calibration, window=100)
    one_by_one = [look for s in scores for look in drift.add([s])]
    assert [look.number for look in one_by_one] == [1, 2, 3, 4, 5]
    assert one_by_one == whole.add(scores)
    assert whole.last == one_by_one[-1]
    assert drift.level == 0.01 / 100
    assert "no alarm" in one_by_one[0].words


def test_arguments():
    calibration = calibrated(range(300))
    with pytest.raises(UsageError, match="use 50 or more of each"):
        Drift(calibration, window=10)
    with pytest.raises(UsageError, match="against 39 calibrated ones"):
        Drift(calibrated(range(40), fpr=0.05))
    with pytest.raises(UsageError, match=r"for instance 0\.01 over 100"):
        Drift(calibration, alpha=0.0)
    with pytest.raises(UsageError, match=r"for instance 0\.01 over 100"):
        Drift(calibration, looks=0)
