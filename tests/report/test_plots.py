"""Figures: well-formed, complete, in the right order, and never a NaN."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mnemoscope.report import plots, svg
from mnemoscope.report.words import percent, printable

NS = "{http://www.w3.org/2000/svg}"


def parse(figure: str) -> ElementTree.Element:
    """The figure as XML; every one has a name, a description, and numbers only."""
    root = ElementTree.fromstring(figure)
    assert [child.tag for child in root[:2]] == [f"{NS}title", f"{NS}desc"]
    assert root[0].text
    assert root.get("role") == "img"
    for element in root.iter():
        geometry = {"x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "r", "width", "height", "points", "d", "viewBox"}
        words = " ".join(v for k, v in element.attrib.items() if k in geometry)
        assert not re.search(r"nan|inf|e[+-]?\d", words, re.IGNORECASE), words
        if element.tag == f"{NS}rect":
            assert float(element.get("width")) >= 0
            assert float(element.get("height")) >= 0
    return root


def of(root: ElementTree.Element, tag: str, class_: str) -> list[ElementTree.Element]:
    wanted = set(class_.split())
    return [e for e in root.iter(NS + tag) if wanted <= set(e.get("class", "").split())]


def points(element: ElementTree.Element) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in element.get("points").split()]


def counted(root: ElementTree.Element, class_: str) -> int:
    """The prompts that the bars of a class say they hold."""
    return sum(int(bar[0].text.split()[0].replace(",", "")) for bar in of(root, "rect", f"bar {class_}") if len(bar))


# Distribution ---------------------------------------------------------------------------------------------------------


def test_every_prompt_is_in_a_bar_and_on_the_rug():
    rng = np.random.default_rng(0)
    ordinary, audited = rng.normal(2, 0.3, 150).tolist(), rng.normal(4, 1, 40).tolist()
    series = [plots.Series("ordinary", ordinary, kind="plain"), plots.Series("audited", audited, audited[:9])]
    root = parse(plots.distribution(series, plots.Threshold(2.8, 2.6, 3.1, 0.01)))
    assert (counted(root, "plain"), counted(root, "audited"), counted(root, "hit")) == (150, 31, 9)
    assert len(of(root, "line", "rug plain")) == 150
    assert len(of(root, "line", "rug hit")) == 9


def test_bars_stand_on_the_side_of_the_threshold_where_their_scores_are():
    root = parse(plots.distribution([plots.Series("a", [1.0, 1.1, 9.0, 9.5])], plots.Threshold(5.0, 4.5, 5.5, 0.01)))
    (mark,) = of(root, "line", "mark")
    (zone,) = of(root, "rect", "zone")
    at = float(mark.get("x1"))
    assert float(zone.get("x")) < at < float(zone.get("x")) + float(zone.get("width"))
    left = [bar for bar in of(root, "rect", "bar") if float(bar.get("x")) < at]
    assert sum(int(bar[0].text.split()[0]) for bar in left) == 2


def test_an_unbounded_threshold_is_drawn_to_the_edge():
    series = [plots.Series("a", [1.0, 2.0, 3.0])]
    bounded = parse(plots.distribution(series, plots.Threshold(2.0, 1.5, 2.5, 0.05)))
    unbounded = parse(plots.distribution(series, plots.Threshold(2.0, 1.5, None, 0.05)))
    width = [float(of(root, "rect", "zone")[0].get("width")) for root in (bounded, unbounded)]
    assert width[1] > width[0]


@pytest.mark.parametrize(
    "values",
    [
        [],
        [1.0],
        [2.0] * 5,
        [0.0],
        [0.0, 0.0],
        [0.0, 1e9],
        [-1.0, 1.0],
        [1e-12, 1e12],
        [math.nan, 1.0],
        [math.nan, math.inf],
    ],
)
def test_degenerate_scores_draw(values):
    for threshold in (None, plots.Threshold(3.0, None, None, 0.01)):
        root = parse(plots.distribution([plots.Series("a", values, values[:1])], threshold))
        finite = sum(math.isfinite(v) for v in values)
        assert counted(root, "audited") + counted(root, "hit") == finite


def test_no_series_is_a_figure_that_says_so():
    assert "no scores" in parse(plots.distribution([]))[1].text


def test_hostile_names_stay_text():
    root = parse(plots.distribution([plots.Series("<script>\x00&\"'</script>", [1.0, 2.0])]))
    assert not list(root.iter(f"{NS}script"))
    assert any("<script>␀&" in (e.text or "") for e in root.iter(f"{NS}text"))


# ROC ------------------------------------------------------------------------------------------------------------------


def test_roc_lines_climb_from_left_to_right():
    curve = plots.Curve("score\nAUC 0.9", [0.0, 0.0, 0.1, 0.5, 1.0], [0.0, 0.4, 0.6, 0.9, 1.0])
    for log_x in (True, False):
        root = parse(plots.roc([curve, plots.Curve("text only", [0.0, 1.0], [0.0, 1.0])], log_x=log_x))
        (line,) = [e for e in of(root, "polyline", "c0") if e.find(f"{NS}title") is not None]
        xs, ys = zip(*points(line), strict=True)
        assert list(xs) == sorted(xs)
        assert list(ys) == sorted(ys, reverse=True)
        assert len(of(root, "polyline", "c1")) == 2  # the curve and its sample in the key


def test_the_one_percent_mark_is_where_one_percent_is():
    root = parse(plots.roc([plots.Curve("a", [0.0, 0.01, 1.0], [0.0, 0.5, 1.0])]))
    (line,) = [e for e in of(root, "polyline", "c0") if e.find(f"{NS}title") is not None]
    (mark,) = of(root, "line", "mark")
    assert float(mark.get("x1")) == points(line)[2][0]


def test_roc_without_curves_draws():
    assert parse(plots.roc([]))[1].text == "no curve"


# Steps, doses, sparklines ---------------------------------------------------------------------------------------------


def test_median_lies_in_its_band_at_every_step():
    curves = np.random.default_rng(1).lognormal(0, 0.5, (30, 12))
    root = parse(plots.steps([plots.Bundle("a", list(curves))], [plots.Bundle("worst", [curves[0]])]))
    (middle,) = of(root, "polyline", "c0")
    (zone,) = of(root, "polygon", "c0")
    low, high = points(zone)[:12], points(zone)[12:][::-1]
    for (x, y), (x_low, y_low), (x_high, y_high) in zip(points(middle), low, high, strict=True):
        assert x == x_low == x_high
        assert y_high <= y <= y_low
    assert len(of(root, "polyline", "single")) == 1


def test_quantiles_are_over_the_prompts_that_reached_the_step():
    found = plots.Bundle("a", [[1.0, 2.0], [3.0], [5.0, math.nan]]).quantiles()
    assert found == [(pytest.approx(1.4), 3.0, pytest.approx(4.6)), (2.0, 2.0, 2.0)]


@pytest.mark.parametrize("curves", [[], [[]], [[1.0]], [[2.0, 2.0]], [[0.0, 0.0]], [[math.nan]], [[1.0, 2.0], [3.0]]])
def test_degenerate_curves_draw(curves):
    parse(plots.steps([plots.Bundle("a", curves)], [plots.Bundle("w", curves)]))
    parse(plots.sparkline(curves[0] if curves else []))


def test_step_axis_counts_from_one_and_ends_within_the_run():
    root = parse(plots.steps([plots.Bundle("a", [[1.0] * 50, [2.0] * 50])]))
    shown = [int(e.text) for e in of(root, "text", "tick") if e.get("text-anchor") == "middle"]
    assert shown[0] == 1
    assert shown == sorted(set(shown))
    assert shown[-1] == 50


def test_doses_stand_in_order_with_whiskers_around_them():
    doses = [plots.Dose(16, 11, 12, 0.6, 0.99), plots.Dose(2, 1, 12, 0.01, 0.4), plots.Dose(4, 0, 12, 0.0, 0.26)]
    root = parse(plots.dose_response(doses))
    dots = of(root, "circle", "c0")
    assert [dot[0].text.split()[0] for dot in dots] == ["2", "4", "16"]
    assert [float(dot.get("cx")) for dot in dots] == sorted(float(dot.get("cx")) for dot in dots)
    for dot, whisker in zip(dots, of(root, "path", "whisker"), strict=True):
        low, high = map(float, re.match(r"M\S+ (\S+?)V(\S+?)M", whisker.get("d")).groups())
        assert high <= float(dot.get("cy")) <= low


def test_no_dose_draws():
    assert parse(plots.dose_response([]))[1].text == "no doses"
    parse(plots.dose_response([plots.Dose(2, 0, 0, 0.0, 1.0)]))


def test_sparkline_is_this_drawing():
    figure = plots.sparkline([3.0, 1.0, 2.0], width=110, height=30)
    assert points(of(parse(figure), "polyline", "c0")[0]) == [(5, 5.74), (55, 24.26), (105, 15)]
    assert "from 3 at step 1 to 2 at step 3, largest 3" in figure


def test_interval_says_its_numbers():
    figure = plots.interval(3, 12, 0.055, 0.572)
    assert parse(figure)[0].text == "3 of 12, 95 % interval 5.5 % to 57 %"


# Scales, ticks, words -------------------------------------------------------------------------------------------------

FINITE = st.floats(-1e9, 1e9, allow_subnormal=False)


@given(st.lists(FINITE, max_size=20), st.booleans())
@example([2.3e-308, 1e9], False)  # their ratio is beyond all floats
def test_scales_keep_order_and_stay_inside(values, zero):
    scale = svg.fit(values, 10.0, 90.0, zero=zero)
    positions = [scale(v) for v in sorted(values)]
    assert positions == sorted(positions)
    assert all(10 <= p <= 90 for p in positions)
    ticks = scale.ticks()
    assert ticks == sorted(set(ticks))
    assert all(scale.low - 1e-6 * abs(scale.low) <= t <= scale.high + 1e-6 * abs(scale.high) for t in ticks)
    assert len(ticks) <= 12


@given(st.floats(1e-9, 1e9), st.floats(1.01, 1e12))
def test_log_ticks_are_inside_and_told_apart(low, ratio):
    ticks = svg.log_ticks(low, low * ratio)
    assert ticks == sorted(set(ticks))
    assert all(low * 0.999 <= t <= low * ratio * 1.001 for t in ticks)
    labels = [svg.tick_label(t) for t in ticks]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.3, 0.95, [0.4, 0.6, 0.8]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (0, 1234, [0, 500, 1000]),
    ],
)
def test_ticks_are_the_ones_a_person_would_choose(low, high, ticks):
    assert svg.linear_ticks(low, high, 5) == ticks


@pytest.mark.parametrize(
    ("value", "label"),
    [(0, "0"), (0.05, "0.05"), (10000, "10,000"), (2e-6, "2×10⁻⁶"), (1e7, "10⁷"), (2.5, "2.5"), (-0.5, "-0.5")],
)
def test_tick_labels(value, label):
    assert svg.tick_label(value) == label


@pytest.mark.parametrize(
    ("share", "words"),
    [(0, "0 %"), (0.0003, "0.03 %"), (0.005, "0.5 %"), (0.03, "3 %"), (0.055, "5.5 %"), (0.572, "57 %"), (1, "100 %")],
)
def test_percent(share, words):
    assert percent(share) == words


def test_a_coordinate_that_is_no_number_is_an_error():
    with pytest.raises(ValueError, match="nan"):
        svg.line(math.nan, 0, 1, 1, "axis")


def test_labels_at_line_ends_keep_their_distance():
    placed = svg.spread([100.0, 101.0, 99.0, 300.0], 15, 0, 300)
    assert sorted(placed) == [99.0, 114.0, 129.0, 300.0]
    assert placed[2] < placed[0] < placed[1]


def test_hidden_characters_are_shown():
    assert printable("a\x00\u202eb\ud800") == "a␀⟨U+202E⟩b\ufffd"
    assert printable("صورة 👩‍👧\n\t") == "صورة 👩‍👧\n\t"
