"""What a guard counts, in Prometheus' text format 0.0.4.

Written here, because a guard counts whether or not a metrics client is installed, and what is left of one for a handful of fixed
families is the text; its tests read it with the official client's parser.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TypeAlias

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of the answer to a scrape."""

SCORES = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
"""Upper bounds of the histogram of scores, as multiples of the guard's threshold."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the histogram of decision times."""

Labels: TypeAlias = tuple[tuple[str, str], ...]

FAMILIES = {
    "mnemoscope_guard_generations_total": ("counter", "Generations, by the strongest action on one of their rows."),
    "mnemoscope_guard_rows_total": ("counter", "Rows of generations, by action."),
    "mnemoscope_guard_errors_total": ("counter", "Failures inside the guard, by kind."),
    "mnemoscope_guard_score": ("histogram", "Score of each row at the first step."),
    "mnemoscope_guard_decision_seconds": (
        "histogram",
        "Time a generation's decision took, mitigation included, and the wait for the device.",
    ),
    "mnemoscope_guard_threshold": ("gauge", "A score above it is a hit."),
    "mnemoscope_guard_drift_p": (
        "gauge",
        "p-value of the newest window of passed scores against the calibration's.",
    ),
    "mnemoscope_guard_drift_alarms_total": ("counter", "Windows whose p-value was below the level of the alarm."),
}


class _Histogram:
    def __init__(self, bounds: Sequence[float]):
        self.bounds = sorted(set(bounds))
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def add(self, value: float | int) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Metrics:
    """Counters, histograms and gauges of one or several guards; every method may be called from any thread.

    Every family has the label ``guard``, the guard's name.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: dict[str, dict[Labels, float]] = {}
        self._histograms: dict[str, dict[Labels, _Histogram]] = {}

    def attached(self, guard: str, threshold: float) -> None:
        """A guard with this threshold is there."""
        with self._lock:
            self._set("mnemoscope_guard_threshold", threshold, guard=guard)
            for kind in ("generations", "rows"):
                self._add(f"mnemoscope_guard_{kind}_total", 0, guard=guard, action="passed")

    def decided(
        self,
        guard: str,
        action: str,
        rows: Mapping[str, int],
        scores: Sequence[float],
        threshold: float,
        seconds: float,
    ) -> None:
        """A generation was decided on.

        Args:
            guard: The guard's name.
            action: What became of the generation: the strongest action on one of its rows.
            rows: Action → on how many rows.
            scores: Of the rows that have one.
            threshold: The guard's.
            seconds: What deciding took.
        """
        with self._lock:
            self._add("mnemoscope_guard_generations_total", 1, guard=guard, action=action)
            for name, n in rows.items():
                self._add("mnemoscope_guard_rows_total", n, guard=guard, action=name)
            for score in scores:
                self._observe("mnemoscope_guard_score", score, [threshold * x for x in SCORES], guard=guard)
            self._observe("mnemoscope_guard_decision_seconds", seconds, SECONDS, guard=guard)

    def failed(self, guard: str, kind: str) -> None:
        """Something inside the guard failed; ``kind`` is one of a few words."""
        with self._lock:
            self._add("mnemoscope_guard_errors_total", 1, guard=guard, kind=kind)

    def drifted(self, guard: str, p: float, alarm: bool) -> None:
        """A window of passed scores was compared with the calibration's."""
        with self._lock:
            self._set("mnemoscope_guard_drift_p", p, guard=guard)
            self._add("mnemoscope_guard_drift_alarms_total", int(alarm), guard=guard)

    def value(self, family: str, **labels: str) -> float:
        """A counter's or a gauge's value; 0 where there is none yet."""
        with self._lock:
            return self._numbers.get(family, {}).get(_key(labels), 0.0)

    def text(self) -> str:
        """All of it, in text format 0.0.4."""
        with self._lock:
            return "".join(self._family(name, *about) for name, about in FAMILIES.items())

    def _add(self, family: str, amount: float | int, **labels: str) -> None:
        values = self._numbers.setdefault(family, {})
        values[_key(labels)] = values.get(_key(labels), 0.0) + amount

    def _set(self, family: str, value: float | int, **labels: str) -> None:
        self._numbers.setdefault(family, {})[_key(labels)] = value

    def _observe(self, family: str, value: float, bounds: Sequence[float], **labels: str) -> None:
        found = self._histograms.setdefault(family, {})
        if _key(labels) not in found:
            found[_key(labels)] = _Histogram(bounds)
        found[_key(labels)].add(value)

    def _family(self, name: str, kind: str, about: str) -> str:
        lines = [f"{name}{_written(labels)} {_number(v)}" for labels, v in sorted(self._numbers.get(name, {}).items())]
        for labels, histogram in sorted(self._histograms.get(name, {}).items(), key=lambda item: item[0]):
            below = 0
            for bound, count in zip([*histogram.bounds, float("inf")], histogram.counts, strict=True):
                below += count
                lines.append(f"{name}_bucket{_written((*labels, ('le', _number(bound))))} {below}")
            lines += [
                f"{name}_sum{_written(labels)} {_number(histogram.sum)}",
                f"{name}_count{_written(labels)} {below}",
            ]
        if not lines:
            return ""
        return "\n".join([f"# HELP {name} {_escaped(about)}", f"# TYPE {name} {kind}", *lines, ""])


def _key(labels: Mapping[str, str]) -> Labels:
    return tuple(sorted(labels.items()))


def _written(labels: Labels) -> str:
    return "{" + ",".join(f'{k}="{_escaped(v, quotes=True)}"' for k, v in labels) + "}"


def _escaped(text: str, *, quotes: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quotes else text


def _number(value: float | int) -> str:
    if value == float("inf"):
        return "+Inf"
    if value == float("-inf"):
        return "-Inf"
    if value != value:
        return "NaN"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))
