"""Drift: do the scores a guard lets pass still look like those its threshold was calibrated on?

Passed scores are gathered in windows that do not overlap. Each full window is compared with the calibration's scores by the
two-sample Kolmogorov-Smirnov test. A score passes only when it is not above the threshold, so the calibration's scores are cut off
there as well: both samples are then draws of one law as long as nothing has changed.

Looking again and again finds something in the end. The level of one look is therefore alpha / looks (Bonferroni): over any ``looks``
windows in a row, a false alarm comes with probability at most alpha, whatever the windows have in common (they share the
calibration). The guarantee presumes that passed scores are independent; a prompt that is generated over and over makes a window
look unlike any calibration, which is a change of traffic too, and is reported as one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import ks_2samp

from ..detect.calibrate import Calibration
from ..errors import UsageError

__all__ = ["Drift", "Look"]

LEAST = 50
"""Scores below which neither a window nor a calibration says much about a distribution."""


@dataclass(frozen=True)
class Look:
    """One window of passed scores against the calibration.

    Attributes:
        number: Which look, counted from 1.
        p: The test's p-value.
        level: A p-value at or below it is an alarm.
        distance: The largest difference of the two distribution functions.
        shift: Median of the window minus that of the calibration's scores.
    """

    number: int
    p: float
    level: float
    distance: float
    shift: float

    @property
    def alarm(self) -> bool:
        """Whether the passed scores no longer look like the calibration's."""
        return self.p <= self.level

    @property
    def words(self) -> str:
        """In one sentence."""
        found = f"window {self.number} of passed scores: p = {self.p:.3g} against the calibration"
        if not self.alarm:
            return f"{found}, no alarm (level {self.level:.3g})"
        side = "higher" if self.shift > 0 else "lower"
        return (
            f"{found} (level {self.level:.3g}): scores run {side} than the threshold was made for, median by {abs(self.shift):.3g}; "
            f"recalibrate on present traffic (`mnemoscope calibrate --unlabelled`)"
        )


class Drift:
    """Watches passed scores; safe to feed from several threads.

    Args:
        calibration: The threshold, and the scores it was made of.
        window: Passed scores that are looked at together.
        alpha: Probability of a false alarm over ``looks`` windows in a row, at most.
        looks: See ``alpha``.
        on_alarm: Called with the look, in the thread that completed the window.

    Raises:
        UsageError: a window or a calibration that is too small, or no rate.
    """

    def __init__(
        self,
        calibration: Calibration,
        *,
        window: int = 200,
        alpha: float = 0.01,
        looks: int = 100,
        on_alarm: Callable[[Look], object] | None = None,
    ):
        scores = np.asarray(calibration.record.scores, dtype=float)
        self._ordinary = scores[scores <= calibration.threshold]
        if window < LEAST or len(self._ordinary) < LEAST:
            raise UsageError(
                f"drift over windows of {window} scores against {len(self._ordinary)} calibrated ones: use {LEAST} or more of each."
            )
        if not 0 < alpha < 1 or looks < 1:
            raise UsageError(f"alpha={alpha:g} over looks={looks}: use for instance 0.01 over 100.")
        self.window, self.alpha, self.looks, self.on_alarm = window, alpha, looks, on_alarm
        self.last: Look | None = None
        self.count = 0
        self._passed: list[float] = []
        self._lock = threading.Lock()

    @property
    def level(self) -> float:
        """Level of one look."""
        return self.alpha / self.looks

    def add(self, scores: Sequence[float]) -> list[Look]:
        """Take passed scores; the looks that they completed."""
        with self._lock:
            self._passed += scores
            full = len(self._passed) // self.window
            windows = [self._passed[i * self.window : (i + 1) * self.window] for i in range(full)]
            del self._passed[: full * self.window]
            found = [self._look(window) for window in windows]
        for look in found:
            if look.alarm and self.on_alarm is not None:
                self.on_alarm(look)
        return found

    def _look(self, window: Sequence[float]) -> Look:
        # The limiting law: the exact one takes seconds for large samples, at the same power.
        test = ks_2samp(window, self._ordinary, method="asymp")
        self.count += 1
        shift = float(np.median(window) - np.median(self._ordinary))
        self.last = Look(self.count, float(test.pvalue), self.level, float(test.statistic), shift)
        return self.last
