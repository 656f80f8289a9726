"""SVG by hand: an element, a scale, an axis. Figures are put together in ``plots.py``.

Every function returns ``Markup`` (text that is already escaped); whatever comes from a run is escaped on its way in, and a
number that is not finite is an error here rather than a ``NaN`` in somebody's browser.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from .words import Number, percent, printable

Attribute = str | float | int | None


def number(value: Number) -> str:
    """A coordinate with at most two decimals. Raises ValueError for NaN and infinity."""
    if not math.isfinite(value):
        raise ValueError(f"a figure was given the coordinate {value}")
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def tag(name: str, *children: str, **attributes: Attribute) -> Markup:
    """One element. ``class_`` is ``class``, ``stroke_width`` is ``stroke-width``; None leaves an attribute out."""
    pairs = [
        f' {key.rstrip("_").replace("_", "-")}="{escape(printable(value) if isinstance(value, str) else number(value))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    inside = Markup("").join(child if isinstance(child, Markup) else escape(printable(child)) for child in children)
    head = Markup(f"<{name}{''.join(pairs)}")
    return Markup(f"{head}>{inside}</{name}>") if children else Markup(f"{head}/>")


def drawing(width: Number, height: Number, title: str, describe: str, *marks: Markup, class_: str = "plot") -> Markup:
    """A figure that scales to its container, with a name and a description for those who cannot see it."""
    return tag(
        "svg",
        tag("title", title),
        tag("desc", describe),
        *marks,
        class_=class_,
        role="img",
        viewBox=f"0 0 {number(width)} {number(height)}",
        width=width,
        height=height,
        xmlns="http://www.w3.org/2000/svg",
    )


def text(x: Number, y: Number, words: str, class_: str = "label", anchor: str = "start") -> Markup:
    """Words at a point; ``anchor`` is start, middle or end."""
    return tag("text", words, x=x, y=y, class_=class_, text_anchor=anchor)


def line(x1: Number, y1: Number, x2: Number, y2: Number, class_: str) -> Markup:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def polyline(points: Iterable[tuple[Number, Number]], class_: str, title: str | None = None) -> Markup:
    """A line through the points, or nothing when there are none."""
    spots = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    if not spots:
        return Markup("")
    children = () if title is None else (tag("title", title),)
    return tag("polyline", *children, points=spots, class_=class_)


def band(xs: Sequence[Number], lows: Sequence[Number], highs: Sequence[Number], class_: str) -> Markup:
    """The area between two lines over the same ``xs``."""
    there = [f"{number(x)},{number(y)}" for x, y in zip(xs, lows, strict=True)]
    back = [f"{number(x)},{number(y)}" for x, y in zip(xs, highs, strict=True)][::-1]
    return tag("polygon", points=" ".join(there + back), class_=class_) if there else Markup("")


@dataclass(frozen=True)
class Scale:
    """From values in [low, high] to positions in [start, stop], straight or logarithmic; values outside are clipped."""

    low: Number
    high: Number
    start: Number
    stop: Number
    log: bool = False

    def __call__(self, value: Number) -> float:
        """The position of a value."""
        value = min(max(value, self.low), self.high)
        value, low, high = (math.log(v) if self.log else v for v in (value, self.low, self.high))
        share = (value - low) / (high - low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, count: int = 6) -> list[float]:
        """About ``count`` round numbers inside [low, high], ascending."""
        return log_ticks(self.low, self.high, count) if self.log else linear_ticks(self.low, self.high, count)


def fit(values: Iterable[Number], start: Number, stop: Number, *, log: bool | None = None, zero: bool = False) -> Scale:
    """A scale that shows all finite ``values``.

    Args:
        values: What must be visible; may be empty or all equal.
        start: Position of the smallest value.
        stop: Position of the largest.
        log: Logarithmic or not; None: logarithmic when the values are positive and span more than a factor of 30.
        zero: A straight scale begins at 0 (for bar heights and magnitudes).
    """
    seen = [v for v in values if math.isfinite(v)]
    low, high = (min(seen), max(seen)) if seen else (0.0, 1.0)
    log = low > 0 and high > 30 * low if log is None else log and low > 0
    if log:
        pad = min(max(high / low, 1.5), sys.float_info.max) ** 0.04  # the ratio may overflow
        return Scale(low / pad, high * pad, start, stop, log=True)
    low = min(low, 0.0) if zero else low
    spread = (high - low) or abs(high) or 1.0
    pad = 0.04 * spread if high > low else 0.5 * spread
    bottom = low if zero and low == 0 else low - pad
    if bottom < 0 <= low:  # padding must not suggest negative scores
        bottom = 0.0
    return Scale(bottom, high + pad, start, stop)


def linear_ticks(low: Number, high: Number, count: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten inside [low, high]: at most ``count + 1``, at least one when possible."""
    if not high > low:
        return [float(low)]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(float(i * step), digits) for i in range(first, last + 1)]


def log_ticks(low: Number, high: Number, count: int = 6) -> list[float]:
    """Powers of ten inside [low, high], with 2 and 5 between them where the range is short."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for multiples in ((1, 2, 5), (1, 3), (1,)):
        found = [float(f"{m}e{e}") for e in exponents for m in multiples]
        found = [v for v in found if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
        if len(found) <= count + 2:
            break
    stride = max(1, math.ceil(len(found) / (count + 2)))
    return found[::stride] or linear_ticks(low, high, count)


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def tick_label(value: Number) -> str:
    """A tick as people write it: 0.05, 12, 10,000, 2×10⁻⁶."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.10g}"
    mantissa, exponent = f"{value:.5e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
    return power if mantissa == "1" else f"{mantissa}×{power}"


def x_axis(scale: Scale, y: Number, name: str, *, as_percent: bool = False, top: Number | None = None) -> Markup:
    """A horizontal axis at height ``y``; ``top`` draws the grid up to there."""
    marks = [line(scale.start, y, scale.stop, y, "axis")]
    for value in scale.ticks():
        x = scale(value)
        if top is not None:
            marks.append(line(x, y, x, top, "grid"))
        marks += [line(x, y, x, y + 5, "axis"), text(x, y + 18, _name(value, as_percent), "tick", "middle")]
    marks.append(text((scale.start + scale.stop) / 2, y + 38, name, "axis-name", "middle"))
    return tag("g", *marks, class_="x-axis")


def y_axis(scale: Scale, x: Number, name: str, *, as_percent: bool = False, right: Number | None = None) -> Markup:
    """A vertical axis at ``x``, its name above it; ``right`` draws the grid up to there."""
    marks = [line(x, scale.start, x, scale.stop, "axis")]
    for value in scale.ticks(5):
        y = scale(value)
        if right is not None:
            marks.append(line(x, y, right, y, "grid"))
        marks.append(text(x - 8, y + 4, _name(value, as_percent), "tick", "end"))
    marks.append(text(x - 40, min(scale.start, scale.stop) - 14, name, "axis-name"))
    return tag("g", *marks, class_="y-axis")


def _name(value: Number, as_percent: bool) -> str:
    return percent(value) if as_percent else tick_label(value)


def spread(wanted: Sequence[Number], gap: Number, low: Number, high: Number) -> list[Number]:
    """Positions near ``wanted`` that keep ``gap`` between neighbors (for labels at line ends), inside [low, high]."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    floor = low
    for i in order:
        placed[i] = floor = max(placed[i], floor)
        floor += gap
    ceiling = high
    for i in reversed(order):
        placed[i] = ceiling = min(placed[i], ceiling)
        ceiling -= gap
    return placed
