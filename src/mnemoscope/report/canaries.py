"""Canaries over a training, drawn: magnitude and copy rate of each number of copies, at every look.

At most six numbers of copies, the highest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from .. import stats
from ..errors import UsageError
from ..records.canaries import LevelReading, Reading
from .plots import WIDTH, _trace
from .svg import Scale, band, drawing, fit, spread, text, x_axis, y_axis
from .words import Number

__all__ = ["copy_rate", "magnitude"]

BOTTOM, TOP, LEFT = 300.0, 40.0, 64.0


def copy_rate(history: Sequence[Reading]) -> Markup:
    """Share of canaries copied at each look, with its 95 % Clopper–Pearson interval, one line per number of copies."""
    if any(level.copied is None for reading in history for level in reading.levels):
        raise UsageError("these readings made no pictures: give the watch copied=, or draw the magnitude.")
    return _figure(
        history, "Canaries copied", "share of canaries copied", _rate, Scale(0.0, 1.0, BOTTOM, TOP), as_percent=True
    )


def magnitude(history: Sequence[Reading]) -> Markup:
    """Mean magnitude of the canaries at each look, one line per number of copies."""
    values = [level.magnitude for reading in history for level in reading.levels]
    return _figure(
        history, "Magnitude of canaries", "magnitude at the first step", _size, fit(values, BOTTOM, TOP, zero=True)
    )


def _rate(level: LevelReading) -> tuple[Number, Number, Number]:
    found = stats.clopper_pearson(level.copied or 0, level.n)
    return found.low, found.value, found.high


def _size(level: LevelReading) -> tuple[Number, Number, Number]:
    return level.magnitude, level.magnitude, level.magnitude


def _figure(
    history: Sequence[Reading],
    title: str,
    axis: str,
    value: Callable[[LevelReading], tuple[Number, Number, Number]],
    y: Scale,
    *,
    as_percent: bool = False,
) -> Markup:
    steps = [reading.step for reading in history]
    x = Scale(min(steps, default=0), max([*steps, min(steps, default=0) + 1]), LEFT, WIDTH - 190)
    levels = sorted({level.copies for reading in history for level in reading.levels}, reverse=True)[:6]
    marks, told, ends = [], [], []
    for i, copies in enumerate(levels):
        seen = [(r.step, value(level)) for r in history for level in r.levels if level.copies == copies]
        xs = [x(step) for step, _ in seen]
        lows, middles, highs = ([y(at[k]) for _, at in seen] for k in range(3))
        name = "kept out" if copies == 0 else f"{copies:,} copies" if copies > 1 else "1 copy"
        marks += [band(xs, lows, highs, f"c{i}"), _trace(xs, middles, f"c{i}", name)]
        ends.append((name, f"c{i}", middles[-1]))
        told.append(f"{name}: {seen[0][1][1]:.3g} at step {seen[0][0]:,}, {seen[-1][1][1]:.3g} at step {seen[-1][0]:,}")
    heights = spread([h for _, _, h in ends], 15, TOP + 4, BOTTOM)
    labels = [text(x.stop + 10, h + 4, name, f"label {c}") for (name, c, _), h in zip(ends, heights, strict=True)]
    return drawing(
        WIDTH, 348, title, "; ".join(told) or "no readings", x_axis(x, BOTTOM, "training step"),
        y_axis(y, LEFT, axis, as_percent=as_percent, right=x.stop), *marks, *labels,
    )  # fmt: skip
