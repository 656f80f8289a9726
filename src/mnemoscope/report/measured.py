"""Measured pictures as a reader sees them: words, figures, and how their scores stand beside an audit's.

The pages are put together in ``measured_page.py`` and, for the section of an audit, in ``html.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..records.measures import DRAWS, Entry, Levels, Measures, draw_file, measured_with, target_file
from ..records.store import MEASURES
from .findings import Finding, Share
from .pictures import Picture, Pictures
from .plots import WIDTH
from .svg import Scale, drawing, fit, line, polyline, tag, text, tick_label, x_axis, y_axis
from .words import Number, percent, prompts, verb

__all__ = [
    "Beside",
    "Card",
    "Pair",
    "beside",
    "beside_run",
    "bound_words",
    "cards",
    "headline",
    "missed_words",
    "plain",
    "score_words",
    "strip",
    "trace",
    "untested",
]

SMALL = 128
"""Longest side of the pictures in the audit's section, in pixels."""


# Words --------------------------------------------------------------------------------------------------------------------


def score_words(entry: Entry) -> str:
    """``0.0123``; ``> 0.0713`` for a picture that was not reached; never infinity."""
    r = entry.numbers
    if entry.status == "screened out":
        return "not tried"
    value = r.score if entry.status == "reproduced" else r.paid
    if value is None:
        return "unknown"
    digits = f"{value:.4f}" if value >= 0.01 else f"{value:.2g}"
    return digits if entry.status == "reproduced" else f"> {digits}"


def status_words(entry: Entry) -> str:
    """What became of a picture, in a sentence without its full stop."""
    r = entry.numbers
    if entry.status == "screened out":
        return "not tried: a cheap measure found others more suspicious"
    if entry.status == "censored":
        near = "" if r.similarity is None else f"; the nearest test had similarity {r.similarity:.2f}"
        return f"not reproduced within {r.update:,} updates{near}"
    return f"reproduced after {r.update:,} updates"


def rate_words(entry: Entry) -> str:
    """How many fresh draws succeeded, with the interval."""
    found = entry.numbers.succeeded
    if found is None:
        return "not confirmed on fresh draws"
    return f"fresh draws that succeeded: {Share.of(*found).words}"


def bound_words(entry: Entry) -> str:
    """What the bound on plain noise means."""
    p = entry.numbers.at_least
    if entry.status != "reproduced":
        return "How often plain noise leads to it is not known."
    if p is None:
        return "Without fresh draws nothing bounds how often plain noise leads to it."
    same = "under the same prompt, guidance and sampler"
    if p >= 0.1:
        return f"Plain noise leads to it in at least {percent(p)} of draws, {same}."
    if p >= 1e-6:
        return f"Plain noise leads to it at least once in {_about(1 / p)} draws, {same}."
    size = "less than any number here can say" if p <= 0 else f"{p:.0e}"
    return f"The bound on how often plain noise leads to it is so small ({size}) that it says next to nothing: it may be rare or common."


def _about(value: float) -> str:
    """A count with two digits that count."""
    digits = max(0, math.floor(math.log10(value)) - 1)
    return f"{round(value, -digits):,.0f}"


def headline(measures: Measures) -> str:
    """One sentence: how many pictures, of which model, by which preset, and what became of them."""
    r = measures.request
    model = r.model + (f" (fingerprint {r.fingerprint})" if r.fingerprint else "")
    counts = [f"{measures.count('reproduced')} reproduced", f"{measures.count('censored')} not within the budget"]
    if out := measures.count("screened out"):
        counts.append(f"{out} screened out")
    if measures.waiting:
        counts.append(f"{measures.waiting} still to be measured")
    asked = len(measures.entries) + measures.waiting
    return f"{prompts(asked, 'picture')} measured on {model} by preset {r.preset.get('name', '?')}: {', '.join(counts)}"


def untested(measures: Measures, levels: Levels) -> list[str]:
    """What the scores leave open, in sentences."""
    p, found = measures.request.preset, []
    if n := measures.waiting:
        found.append(
            f"{prompts(n, 'picture')} that {verb(n, 'was', 'were')} asked for {verb(n, 'is', 'are')} not finished; the same command "
            f"continues."
        )
    if n := measures.count("censored"):
        found.append(
            f"{prompts(n, 'picture')} {verb(n, 'was', 'were')} not reached within {p.get('updates', 'the budget of')} updates. "
            f"{verb(n, 'Its score is', 'Their scores are')} more than the number after “>”; how much more, nobody knows."
        )
    if n := measures.count("screened out"):
        names = sorted({str(e.screen["name"]) for e in measures.entries if e.screen and "name" in e.screen})
        by = f" ({', '.join(names)})" if names else ""
        found.append(
            f"{prompts(n, 'picture')} {verb(n, 'was', 'were')} not tried, because a cheap measure{by} found "
            f"others more suspicious: nothing is known of {verb(n, 'its score', 'their scores')}."
        )
        found.append(missed_words([e.status == "reproduced" for e in measures.entries if e.checked]))
    if levels.why:
        found.append(levels.why)
    if scales := p.get("scales"):
        tried = ", ".join(f"{s:g}" for s in scales)
        found.append(f"Other captions, and guidance scales other than {tried}, were not tried.")
    return [*found, *ALWAYS_OPEN]


ALWAYS_OPEN = (
    "A low score of one picture alone is no finding: a model that merely generalizes can be forced to draw any picture that it could "
    "draw. Compare with pictures of known dose, or with pictures that the model certainly never saw.",
    "Whether plain noise does lead to a picture was tried only where the score is 0, whose fresh draws are of plain noise; elsewhere the "
    "bound is what follows from the score.",
    "Whether a picture was in training is another question: most training pictures of a model that generalizes cost as much as pictures "
    "that it never saw.",
)
"""What no score of one picture says."""


def missed_words(reproduced: Sequence[bool]) -> str:
    """What a screen misses: whether each picture that it left out, and that was measured by chance, was reproduced."""
    if not reproduced:
        return "What the screen misses was not looked at: none of the pictures that it left out was measured."
    share = Share.of(sum(reproduced), len(reproduced))
    return (
        f"Of pictures that the screen left out, drawn by chance and measured, this many were reproduced: {share.words}."
    )


def companion_names(entries: Iterable[Entry]) -> list[str]:
    """Companion measures that any of the pictures has, in the order in which they come."""
    return list(dict.fromkeys(name for e in entries for name in e.companions))


def companion_words(entry: Entry, name: str) -> str:
    """A companion's value; a dash where there is none, or it was not finite."""
    value = entry.companions.get(name)
    return "–" if value is None else f"{value:.4g}"


# One picture --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """One picture with what the noise found leads to, and how the search went."""

    rank: int
    entry: Entry
    name: str
    score: str
    said: list[str]
    bound: str
    target: Picture
    draws: list[Picture]
    guidance: str
    trace: Markup | None


def cards(measures: Measures, shown: int) -> list[Card]:
    """The first so many pictures that were tried, the most strongly stored first."""
    kept = Pictures(measures.folder)
    tried = [e for e in measures.entries if e.status != "screened out"]
    return [_card(i + 1, e, measures, kept) for i, e in enumerate(tried[:shown])]


def _card(rank: int, entry: Entry, measures: Measures, kept: Pictures) -> Card:
    r = entry.numbers
    there = [k for k in range(DRAWS) if (measures.folder / draw_file(entry.id, k)).is_file()]
    said = [status_words(entry)]
    if entry.status == "reproduced":
        said.append(rate_words(entry))
    if r.nats is not None:
        said.append(f"{r.nats:,.2f} nats in all")
    said += [f"{name}: {companion_words(entry, name)}" for name in entry.companions]
    return Card(
        rank, entry, Path(entry.image).name, score_words(entry), said, bound_words(entry), kept.kept(target_file(entry.id), 256),
        [kept.kept(draw_file(entry.id, k), 256) for k in there], _guidance(entry, measures),
        trace(entry, measures.request.beta) if len(r.curve) > 1 else None,
    )  # fmt: skip


def _guidance(entry: Entry, measures: Measures) -> str:
    """Under which guidance the draws that are shown were made."""
    if entry.numbers.scale is not None:
        return f"guidance {entry.numbers.scale:g}"
    g = measures.request.guidance
    return f"guidance {g:g}, as none that was tried reached it" if entry.status == "censored" and g is not None else ""


# Figures ------------------------------------------------------------------------------------------------------------------


def trace(entry: Entry, beta: float) -> Markup:
    """Loss, λ, KL and similarity over the updates: four small panels side by side, a dot at each check."""
    curve = entry.numbers.curve
    updates = [row[0] for row in curve]
    panels = [("loss", 1), ("weight λ", 2), ("KL, nats per dimension", 3), ("nearest similarity", 4)]
    width, gap, top, bottom = 182.0, 66.0, 34.0, 134.0
    marks: list[Markup] = []
    for i, (name, column) in enumerate(panels):
        left = 48 + i * (width + gap)
        values = [float(row[column]) for row in curve]
        near = column == 4
        x = Scale(0, max(*updates, 1), left, left + width)
        y = fit([*values, beta] if near else values, bottom, top, zero=not near)
        points = [(x(u), y(v)) for u, v in zip(updates, values, strict=True)]
        dots = [tag("circle", cx=a, cy=b, r=2.2, class_="c0") for a, b in points]
        limit = [line(left, y(beta), left + width, y(beta), "mark")] if near else []
        marks += [
            y_axis(y, left, f"{name}, logarithmic" if y.log else name, right=left + width),
            *_short_axis(x, bottom), *limit, polyline(points, "c0", name), *dots,
        ]  # fmt: skip
    last = curve[-1]
    told = f"after {last[0]:,} updates: loss {last[1]:.3g}, λ {last[2]:.3g}, KL {last[3]:.3g}, nearest similarity {last[4]:.2f}"
    return drawing(WIDTH, 172, "How the search went", told, *marks)


def _short_axis(x: Scale, y: Number) -> list[Markup]:
    marks = [line(x.start, y, x.stop, y, "axis")]
    for value in x.ticks(3):
        marks += [
            line(x(value), y, x(value), y + 5, "axis"),
            text(x(value), y + 18, tick_label(value), "tick", "middle"),
        ]
    return [*marks, text((x.start + x.stop) / 2, y + 34, "updates", "axis-name", "middle")]


@dataclass(frozen=True)
class _Row:
    """A row of the strip: scores, and lower bounds of scores."""

    name: str
    note: str
    scores: list[float]
    more: list[float]
    class_: str


def strip(measures: Measures, levels: Levels) -> Markup:
    """The pictures' scores above those of pictures of known dose, one row for each dose; ▸ is "more than this"."""
    mine = [e for e in measures.entries if e.status != "screened out"]
    scores = [e.numbers.score for e in mine if e.status == "reproduced" and e.numbers.score is not None]
    more = [e.numbers.paid for e in mine if e.status == "censored" and e.numbers.paid is not None]
    rows = [_Row("these pictures", _reached(len(scores), len(mine)), scores, more, "c1")]
    for copies, values in levels.scores.items():
        known = [v for v in values if v is not None]
        rows.append(_Row(_dose(copies), _reached(len(known), len(values)), known, [], "c0"))
    x = fit([v for row in rows for v in row.scores + row.more], 168, WIDTH - 130, zero=True)
    height, top = 36.0, 20.0
    bottom = top + height * len(rows)
    marks: list[Markup] = []
    for i, row in enumerate(rows):
        at = top + height * (i + 0.5)
        dots = [
            tag("circle", tag("title", f"{v:.4f}"), cx=x(v), cy=at, r=4.0, class_=row.class_, opacity=0.7)
            for v in row.scores
        ]
        beyond = [_arrow(x(v), at, f"more than {v:.4f}", row.class_) for v in row.more]
        marks += [text(0, at + 4, row.name, "strong" if i == 0 else "label"), line(x.start, at, x.stop, at, "grid"), *dots, *beyond,
                  text(WIDTH, at + 4, row.note, "note", "end")]  # fmt: skip
    name = "nats per dimension" + (", logarithmic" if x.log else "")
    told = "; ".join(f"{row.name}: {row.note}" for row in rows)
    return drawing(
        WIDTH, bottom + 48, "Scores beside those of known dose", told, *marks, x_axis(x, bottom, name, top=top)
    )


def _dose(copies: int) -> str:
    return "never trained on" if copies == 0 else f"{copies:,} {verb(copies, 'copy', 'copies')} in training"


def _reached(k: int, n: int) -> str:
    return f"{k:,} of {n:,} reached"


def _arrow(x: Number, y: Number, title: str, class_: str, *, up: bool = False) -> Markup:
    """A small triangle that points to where the true value lies."""
    ends = [(x - 4, y + 4), (x + 4, y + 4), (x, y - 5)] if up else [(x - 4, y - 4), (x - 4, y + 4), (x + 5, y)]
    points = " ".join(f"{a:.2f},{b:.2f}" for a, b in ends)
    # Polygons of the figures are faint bands.
    return tag("polygon", tag("title", title), points=points, class_=class_, style="opacity:.85")


# Beside an audit ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A measured picture, and the audited prompt that is its caption."""

    entry: Entry
    finding: Finding | None
    name: str
    score: str
    status: str
    target: Picture


@dataclass(frozen=True)
class Beside:
    """The section of an audit's report about pictures that were measured with it.

    Attributes:
        headline: What was measured.
        pairs: All pictures, those first whose caption was audited, then by score.
        joined: How many have an audited caption.
        scatter: Prompt score against picture score; None: fewer than two pictures have both.
        preset: What scores are labelled with.
        notes: What this leaves open.
    """

    headline: str
    pairs: list[Pair]
    joined: int
    scatter: Markup | None
    preset: str
    notes: list[str]


def beside_run(run: Path) -> Measures | None:
    """Pictures that were measured with a run's model, in its ``measures/``; None: none were.

    Raises:
        RunError: the measures are damaged.
    """
    folder = measured_with(run)
    return None if folder is None else Measures.read(folder)


def beside(run: Path, findings: Sequence[Finding], axis: str, *, pictures: bool = True) -> Beside | None:
    """What ``measures/`` of a run says beside its prompts; None: no pictures were measured.

    Args:
        run: The run folder.
        findings: Its prompts.
        axis: What their scores are called.
        pictures: Whether pictures and the plot are made.

    Raises:
        RunError: the measures are damaged.
    """
    found = beside_run(run)
    if found is None:
        return None
    audited = {f.prompt: f for f in reversed(findings)}
    kept = Pictures(run / MEASURES)
    pairs = [
        Pair(e, audited.get(e.caption) if e.caption else None, Path(e.image).name, score_words(e), status_words(e),
             kept.kept(target_file(e.id), SMALL) if pictures else Picture(None))
        for e in found.entries
    ]  # fmt: skip
    pairs.sort(key=lambda p: p.finding is None)
    both = [
        p for p in pairs if p.finding is not None and p.finding.score is not None and p.entry.status != "screened out"
    ]
    return Beside(
        headline(found), pairs, sum(p.finding is not None for p in pairs),
        _scatter(both, axis) if pictures and len(both) > 1 else None,
        str(found.request.preset.get("name", "")), untested(found, found.levels()),
    )  # fmt: skip


def _scatter(pairs: Sequence[Pair], axis: str) -> Markup:
    """Prompt score to the right, picture score upwards; a triangle is a picture that was not reached, whose score is higher yet."""
    spots: list[tuple[Pair, float, float]] = []
    for p in pairs:
        value = p.entry.numbers.score if p.entry.status == "reproduced" else p.entry.numbers.paid
        if value is not None and p.finding is not None and p.finding.score is not None:
            spots.append((p, p.finding.score, value))
    x = fit([a for _, a, _ in spots], 64, 664)
    y = fit([b for _, _, b in spots], 290, 40, zero=True)
    marks = []
    for p, a, b in spots:
        title = f"{p.name}: prompt {a:.4g}, picture {p.score}"
        dot = tag("circle", tag("title", title), cx=x(a), cy=y(b), r=5.0, class_="c0", opacity=0.75)
        marks.append(dot if p.entry.status == "reproduced" else _arrow(x(a), y(b), title, "c1", up=True))
    key = [tag("circle", cx=700, cy=60, r=5.0, class_="c0"), text(714, 64, "reproduced"),
           _arrow(700, 84, "not reached", "c1", up=True), text(714, 88, "not reached: the score is higher yet")]  # fmt: skip
    told = "; ".join(f"{p.name}: {a:.3g}, {p.score}" for p, a, _ in spots[:40])
    return drawing(
        WIDTH, 338, "Prompt scores and picture scores", told,
        x_axis(x, 290, f"{axis}, logarithmic" if x.log else axis, top=40),
        y_axis(y, 64, "picture: nats per dimension" + (", logarithmic" if y.log else ""), right=664), *marks, *key,
    )  # fmt: skip


def plain(measures: Measures) -> dict[str, Any]:
    """The numbers as plain values: a censored picture has no score, and ``paid``, which its score is above."""
    rows = [
        {"id": e.id, "image": e.image, "caption": e.caption, "status": e.status, "companions": e.companions}
        | e.numbers.model_dump(mode="json", exclude={"curve"})
        for e in measures.entries
    ]
    return {
        "headline": headline(measures), "request": measures.request.model_dump(mode="json", exclude={"asked", "levels"}),
        "waiting": measures.waiting, "pictures": rows,
    }  # fmt: skip
