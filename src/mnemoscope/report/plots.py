"""The figures of the report, as inline SVG: no script, no font, no file.

Colors are CSS variables (:data:`CSS`), so that a figure follows dark mode and prints in black on white. The palette is
Okabe and Ito's, which people with any common color vision can tell apart; whatever color says is also said by position,
dash pattern or words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from markupsafe import Markup

from .svg import (
    Scale,
    band,
    drawing,
    fit,
    line,
    polyline,
    spread,
    tag,
    text,
    tick_label,
    x_axis,
    y_axis,
)
from .words import Number, percent

WIDTH = 1000.0
LEFT = 168.0
"""Room for row names left of the axis."""

CSS = (
    """
:root{--p-ink:#22262b;--p-soft:#5f6872;--p-line:#8b949e;--p-grid:#e4e7ea;
--p-0:#0072b2;--p-1:#d55e00;--p-2:#00805d;--p-3:#a8568b;--p-4:#9a6b00;--p-5:#3f6fa8;--p-plain:#9aa4ae}
@media screen and (prefers-color-scheme:dark){:root{--p-ink:#e6e8ea;--p-soft:#a3abb4;--p-line:#7d8691;--p-grid:#2b3138;
--p-0:#56b4e9;--p-1:#ff8b4a;--p-2:#3cc79b;--p-3:#e39bc6;--p-4:#e6b84a;--p-5:#9fc5ee;--p-plain:#717b86}}
.plot{display:block;max-width:100%;height:auto;font:12px system-ui,sans-serif}
.plot text{fill:var(--p-ink)} .plot .tick,.plot .axis-name,.plot .note{fill:var(--p-soft)}
.plot .strong{font-weight:600} .plot .axis{stroke:var(--p-line);fill:none} .plot .grid{stroke:var(--p-grid)}
.plot .mark{stroke:var(--p-ink);stroke-width:1.5;stroke-dasharray:5 3} .plot .zone{fill:var(--p-ink);opacity:.07}
.plot .bar.plain{fill:var(--p-plain)} .plot .bar.audited{fill:var(--p-0)} .plot .bar.hit{fill:var(--p-1)}
.plot .rug{stroke-width:1;opacity:.55} .plot .rug.plain{stroke:var(--p-plain)} .plot .rug.audited{stroke:var(--p-0)}
.plot .rug.hit{stroke:var(--p-1);opacity:1}
.plot polyline{fill:none;stroke-width:2;stroke-linejoin:round} .plot polygon{stroke:none;opacity:.16}
.plot circle{stroke:none} .plot .whisker{stroke-width:2;fill:none}
.plot .single{stroke:var(--p-ink);stroke-width:1;opacity:.5} .plot circle.single{fill:var(--p-ink)}
.plot .chance{stroke:var(--p-line);stroke-width:1;stroke-dasharray:2 3} .plot .thin{stroke-width:1;opacity:.8}
"""
    + "".join(
        f".plot polyline.c{i},.plot .whisker.c{i}{{stroke:var(--p-{i})}}"
        f".plot polygon.c{i},.plot circle.c{i},.plot text.c{i}{{fill:var(--p-{i})}}\n"
        for i in range(6)
    )
    + ".plot polyline.c1{stroke-dasharray:7 3}.plot polyline.c2{stroke-dasharray:2 3}.plot polyline.c3{stroke-dasharray:9 3 2 3}\n"
)


@dataclass(frozen=True)
class Threshold:
    """The line that a figure draws, and how sure it is; a bound that is None is out of sight."""

    value: Number
    low: Number | None
    high: Number | None
    fpr: Number

    @property
    def words(self) -> str:
        """threshold 4.2 (1 % false positives)."""
        return f"threshold {self.value:.3g} ({percent(self.fpr)} false positives)"


@dataclass(frozen=True)
class Series:
    """Scores of one set of prompts; ``hits`` is the subset of them for which a copy was found."""

    name: str
    values: Sequence[Number]
    hits: Sequence[Number] = ()
    kind: str = "audited"
    """``audited`` or ``plain`` (the ordinary prompts)."""


def distribution(series: Sequence[Series], threshold: Threshold | None = None, axis: str = "score") -> Markup:
    """One histogram per series over a shared axis, with the threshold and its interval through all of them.

    Bar heights are shares of their own series, so that 20 audited prompts compare with 500 ordinary ones. Every prompt is a
    tick under the bars when there are at most 400.
    """
    values = [v for s in series for v in s.values if math.isfinite(v)]
    marked = [] if threshold is None else [threshold.value]
    x = fit([*values, *marked], LEFT, WIDTH - 24)
    row, top = 88.0, 46.0
    bottom = top + row * max(len(series), 1)
    edges = _edges(x, len(values))
    rows = [_histogram(s, x, edges, top + row * (i + 1) - 12, row - 34) for i, s in enumerate(series)]
    limit = [] if threshold is None else [_threshold(threshold, x, top - 14, bottom)]
    hits = sum(len(s.hits) for s in series)
    key = [_key(["audited", *(["hit"] if hits else [])], WIDTH - 24, 14)] if hits else []
    told = "; ".join(f"{s.name}: {_told(s.values)}" for s in series) or "no scores"
    if threshold is not None:
        told += f"; {threshold.words}"
    return drawing(
        WIDTH, bottom + 48, "Distribution of scores", told, *limit, *rows, *key, x_axis(x, bottom, _axis_name(axis, x))
    )


def _edges(x: Scale, count: int) -> list[float]:
    """Bin edges, even in position, so that bars look equally wide on either kind of axis."""
    bins = int(min(48, max(12, 2 * math.sqrt(count))))
    if x.log:
        return [float(e) for e in np.geomspace(x.low, x.high, bins + 1)]
    return [float(e) for e in np.linspace(x.low, x.high, bins + 1)]


def _histogram(series: Series, x: Scale, edges: Sequence[Number], base: Number, height: Number) -> Markup:
    finite = [v for v in series.values if math.isfinite(v)]
    every, _ = np.histogram(np.clip(finite, x.low, x.high), edges)
    hit, _ = np.histogram(np.clip([v for v in series.hits if math.isfinite(v)], x.low, x.high), edges)
    unit = height / max(int(every.max()), 1)
    marks = []
    for i, (n, k) in enumerate(zip(every.tolist(), hit.tolist(), strict=True)):
        if n:
            where = f"between {edges[i]:.3g} and {edges[i + 1]:.3g}"
            left, wide = x(edges[i]) + 0.5, x(edges[i + 1]) - x(edges[i]) - 1
            if n > k:
                tip = f"{_count(n - k)} {where}" + (", no copy found" if series.hits else "")
                marks.append(_bar(left, base - n * unit, wide, (n - k) * unit, series.kind, tip))
            if k:
                marks.append(_bar(left, base - k * unit, wide, k * unit, "hit", f"{_count(k)} {where}, copy found"))
    if len(finite) <= 400:
        copied = set(series.hits)
        marks += [line(x(v), base + 2, x(v), base + 8, f"rug {'hit' if v in copied else series.kind}") for v in finite]
    marks.append(line(x.start, base, x.stop, base, "axis"))
    shown = series.name if len(series.name) <= 24 else series.name[:23] + "…"
    names = [text(0, base - 16, shown, "strong"), text(0, base, f"{_count(len(finite))}", "note")]
    return tag("g", *names, *marks, class_="row")


def _bar(x: Number, y: Number, width: Number, height: Number, kind: str, tip: str) -> Markup:
    return tag("rect", tag("title", tip), x=x, y=y, width=width, height=height, class_=f"bar {kind}")


def _threshold(threshold: Threshold, x: Scale, top: Number, bottom: Number) -> Markup:
    left = x.start if threshold.low is None else x(threshold.low)
    right = x.stop if threshold.high is None else x(threshold.high)
    at = x(threshold.value)
    zone = tag("rect", x=left, y=top, width=max(right - left, 0), height=bottom - top, class_="zone")
    anchor, shift = ("end", -6) if at > (x.start + x.stop) / 2 else ("start", 6)
    return tag(
        "g",
        zone,
        line(at, top, at, bottom, "mark"),
        text(at + shift, top + 9, threshold.words, "strong", anchor),
        class_="limit",
    )


def _key(kinds: Sequence[str], right: Number, y: Number) -> Markup:
    """Which color means what, right-aligned above a figure."""
    words = {"audited": "no copy found", "hit": "copy found"}
    marks, x = [], right
    for kind in reversed(kinds):
        marks.append(text(x, y, words[kind], "label", "end"))
        x -= 7.2 * len(words[kind]) + 14
        marks.append(tag("rect", x=x, y=y - 9, width=10, height=10, class_=f"bar {kind}"))
        x -= 16
    return tag("g", *marks, class_="key")


@dataclass(frozen=True)
class Curve:
    """One line of an ROC figure: false- and true-positive rates, both ascending, and how to name it (a second line is small)."""

    name: str
    fpr: Sequence[Number]
    tpr: Sequence[Number]


def roc(curves: Sequence[Curve], *, mark: Number = 0.01, log_x: bool = True) -> Markup:
    """ROC curves; the first is the detector, later ones (the text-only baseline) are dashed.

    On a logarithmic axis the smallest rate shown is half of the smallest one that the data can resolve; a curve that is
    above 0 at false-positive rate 0 starts at that edge.
    """
    size, left, top = 380.0, 64.0, 40.0
    rates = [f for c in curves for f in c.fpr if f > 0]
    floor = min([mark / 2, *(r / 2 for r in rates)])
    x = Scale(floor, 1.0, left, left + size, log=True) if log_x else Scale(0.0, 1.0, left, left + size)
    y = Scale(0.0, 1.0, top + size * 0.8, top)
    lines = [_roc_line(curve, x, y, i) for i, curve in enumerate(curves)]
    grid = [x(v) for v in np.geomspace(floor, 1.0, 60)] if log_x else [x.start, x.stop]
    rising = [y(v) for v in np.geomspace(floor, 1.0, 60)] if log_x else [y.start, y.stop]
    chance = polyline(zip(grid, rising, strict=True), "chance", "what guessing reaches")
    at = x(mark)
    marks = [
        line(at, y.start, at, top, "mark"),
        text(at + 6, (y.start + top) / 2, f"{percent(mark)} false positives", "note"),
    ]
    key = [_key_line(left + size + 24, top + 12 + 46 * i, c.name, i) for i, c in enumerate(curves)]
    return drawing(
        WIDTH,
        y.start + 48,
        "ROC: true against false positives",
        "; ".join(c.name.replace("\n", ": ") for c in curves) or "no curve",
        x_axis(x, y.start, "false-positive rate" + (", logarithmic" if log_x else ""), as_percent=True, top=top),
        y_axis(y, left, "true-positive rate", as_percent=True, right=left + size),
        chance,
        *marks,
        *lines,
        *key,
    )


def _roc_line(curve: Curve, x: Scale, y: Scale, index: int) -> Markup:
    """A staircase: between two false-positive rates the true-positive rate stays where it was."""
    points: list[tuple[Number, Number]] = []
    for f, t in zip(curve.fpr, curve.tpr, strict=True):
        if points:
            points.append((x(f), points[-1][1]))
        points.append((x(f), y(t)))
    return polyline(points, f"c{min(index, 5)}", curve.name.replace("\n", ": "))


def _key_line(x: Number, y: Number, words: str, index: int) -> Markup:
    sample = polyline([(x, y - 4), (x + 22, y - 4)], f"c{min(index, 5)}")
    lines = [text(x + 30, y + 16 * i, part, "note" if i else "label") for i, part in enumerate(words.split("\n"))]
    return tag("g", sample, *lines, class_="key")


@dataclass(frozen=True)
class Bundle:
    """Per-step values of the prompts of one group, ``[prompt][step]``; lengths may differ."""

    name: str
    curves: Sequence[Sequence[Number] | np.ndarray] = ()

    def quantiles(self) -> list[tuple[float, float, float]]:
        """At each step: the 10 % quantile, the median and the 90 % quantile over the prompts that reached it."""
        table = np.full((len(self.curves), max((len(c) for c in self.curves), default=0)), np.nan)
        for row, curve in zip(table, self.curves, strict=True):
            row[: len(curve)] = curve
        seen = table[:, np.isfinite(table).any(0)]
        low, middle, high = np.nanquantile(seen, [0.1, 0.5, 0.9], axis=0).tolist() if seen.size else ([], [], [])
        return list(zip(low, middle, high, strict=True))


def steps(bundles: Sequence[Bundle], worst: Sequence[Bundle] = (), axis: str = "score") -> Markup:
    """The score at each denoising step: median and 10–90 % band per group, and single worst prompts as thin lines.

    At most six groups; a caller with more passes the six that matter.
    """
    groups = [(b.name, q) for b in bundles[:6] if (q := b.quantiles())]
    singles = [(b.name, [middle for _, middle, _ in q]) for b in worst if (q := b.quantiles())]
    length = max([len(q) for _, q in groups] + [len(c) for _, c in singles], default=0)
    values = [v for _, q in groups for triple in q for v in triple] + [v for _, c in singles for v in c]
    x = Scale(1, max(length, 2), 56, WIDTH - 190)
    y = fit(values, 300, 40, zero=True)
    drawn: list[Markup] = []
    for i, (name, q) in enumerate(groups):
        xs = [x(s + 1) for s in range(len(q))]
        drawn.append(band(xs, [y(a) for a, _, _ in q], [y(c) for _, _, c in q], f"c{i}"))
        drawn.append(_trace(xs, [y(b) for _, b, _ in q], f"c{i}", f"median of {name}"))
    for name, curve in singles:
        drawn.append(_trace([x(s + 1) for s in range(len(curve))], [y(v) for v in curve], "single", name))
    ends = [(name, f"c{i}", y(q[-1][1])) for i, (name, q) in enumerate(groups)]
    heights = spread([h for _, _, h in ends], 15, 44, 300)
    labels = [text(x.stop + 10, h + 4, name[:26], f"label {c}") for (name, c, _), h in zip(ends, heights, strict=True)]
    if singles:
        labels.append(text(x.stop, 26, "thin lines: the worst prompts", "note", "end"))
    told = "; ".join(f"{name}: median {q[0][1]:.3g} at step 1, {q[-1][1]:.3g} at step {len(q)}" for name, q in groups)
    whole = Scale(x.low, x.high, x.start, x.stop)
    return drawing(
        WIDTH,
        348,
        "Score at each denoising step",
        told or "no per-step values",
        _step_axis(whole, length, 300),
        y_axis(y, 56, _axis_name(axis, y), right=x.stop),
        *drawn,
        *labels,
    )


def _step_axis(x: Scale, length: int, y: Number) -> Markup:
    """Steps are counted, so ticks are whole numbers and the first is 1."""
    stride = max(1, math.ceil(length / 10))
    shown = sorted({1, *range(stride if stride > 1 else 1, length + 1, stride)})
    marks = [line(x.start, y, x.stop, y, "axis")]
    for step in shown:
        marks += [line(x(step), y, x(step), y + 5, "axis"), text(x(step), y + 18, str(step), "tick", "middle")]
    marks.append(text((x.start + x.stop) / 2, y + 38, "denoising step (1 is pure noise)", "axis-name", "middle"))
    return tag("g", *marks, class_="x-axis")


def _trace(xs: Sequence[Number], ys: Sequence[Number], class_: str, title: str) -> Markup:
    """A line; a single point, which has no line, becomes a dot."""
    if len(xs) == 1:
        return tag("circle", tag("title", title), cx=xs[0], cy=ys[0], r=4.0, class_=class_)
    return polyline(zip(xs, ys, strict=True), class_, title)


@dataclass(frozen=True)
class Dose:
    """How many of ``n`` prompts whose picture was in training ``copies`` times gave a copy, with an interval of the share."""

    copies: int
    k: int
    n: int
    low: Number
    high: Number


def dose_response(doses: Sequence[Dose]) -> Markup:
    """Share of prompts with a copy found against the number of copies in training; doses are evenly spaced, in order."""
    doses = sorted(doses, key=lambda d: d.copies)
    x = Scale(-0.5, max(len(doses), 1) - 0.5, 64, 64 + min(120.0 * max(len(doses), 3), WIDTH - 100))
    y = Scale(0.0, 1.0, 270, 40)
    marks = []
    for i, dose in enumerate(doses):
        at, share = x(i), dose.k / dose.n if dose.n else 0.0
        tip = f"{dose.copies} copies in training: {dose.k} of {dose.n}, 95 % interval {percent(dose.low)} to {percent(dose.high)}"
        whisker = "".join(
            f"M{a:.2f} {b:.2f}H{c:.2f}" for a, b, c in ((at - 6, y(dose.low), at + 6), (at - 6, y(dose.high), at + 6))
        )
        path = f"M{at:.2f} {y(dose.low):.2f}V{y(dose.high):.2f}{whisker}"
        marks += [
            tag("path", d=path, class_="whisker c0"),
            tag("circle", tag("title", tip), cx=at, cy=y(share), r=5.0, class_="c0"),
            text(at + 9, y(share) - 7, f"{dose.k}/{dose.n}"),
            text(at, 288, str(dose.copies), "tick", "middle"),
        ]
    joined = polyline([(x(i), y(d.k / d.n)) for i, d in enumerate(doses) if d.n], "c0 thin")
    return drawing(
        WIDTH,
        318,
        "Copies found against copies in training",
        "; ".join(f"{d.copies} copies: {d.k} of {d.n}" for d in doses) or "no doses",
        y_axis(y, 64, "share of prompts with a copy found", as_percent=True, right=x.stop),
        line(x.start, 270, x.stop, 270, "axis"),
        text((x.start + x.stop) / 2, 308, "times the picture was in the training set", "axis-name", "middle"),
        joined,
        *marks,
    )


def sparkline(values: Sequence[Number] | np.ndarray, width: Number = 132.0, height: Number = 30.0) -> Markup:
    """The score over the steps, as large as a word; the dot is the first step."""
    finite = [float(v) for v in values if math.isfinite(v)]
    if not finite:
        return drawing(width, height, "Score over the steps: not recorded", "", class_="plot spark")
    x = Scale(0, max(len(finite) - 1, 1), 5, width - 5)
    y = fit(finite, height - 5, 5, log=False)
    xs, ys = [x(i) for i in range(len(finite))], [y(v) for v in finite]
    first = tag("circle", cx=xs[0], cy=ys[0], r=3.0, class_="c0")
    told = f"from {finite[0]:.3g} at step 1 to {finite[-1]:.3g} at step {len(finite)}, largest {max(finite):.3g}"
    return drawing(
        width,
        height,
        f"Score over the steps: {told}",
        "",
        polyline(zip(xs, ys, strict=True), "c0"),
        first,
        class_="plot spark",
    )


def interval(k: int, n: int, low: Number, high: Number, width: Number = 150.0) -> Markup:
    """A share and its interval on a line from 0 to 100 %, for a table cell."""
    x = Scale(0.0, 1.0, 6, width - 6)
    share = k / n if n else 0.0
    return drawing(
        width,
        18,
        f"{k} of {n}, 95 % interval {percent(low)} to {percent(high)}",
        "",
        line(x.start, 9, x.stop, 9, "grid"),
        line(x(low), 9, x(high), 9, "whisker c0"),
        tag("circle", cx=x(share), cy=9.0, r=4.0, class_="c0"),
        class_="plot cell",
    )


def _axis_name(name: str, x: Scale) -> str:
    return f"{name}, logarithmic" if x.log else name


def _count(n: int) -> str:
    return f"{n:,} prompt" if n == 1 else f"{n:,} prompts"


def _told(values: Sequence[Number]) -> str:
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return "no scores"
    return f"{_count(len(finite))}, from {min(finite):.3g} to {max(finite):.3g}, median {median(finite):.3g}"


__all__ = [
    "CSS",
    "Bundle",
    "Curve",
    "Dose",
    "Series",
    "Threshold",
    "distribution",
    "dose_response",
    "interval",
    "roc",
    "sparkline",
    "steps",
    "tick_label",
]
