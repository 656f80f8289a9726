"""Study: the duplication law. How often is a picture drawn from its own caption, by how often it lay in the training set?

The bundled text model was shown pictures at planted numbers of copies per epoch. Their captions are drawn, and those of held-out pictures,
which no copy was ever shown of. Two questions of each drawing: is it *this* picture (the similarity that one pair of different
pictures in a thousand reaches), and is it a copy (this picture is the nearest of all training pictures, above the threshold of the
search)? The law is a logistic one in the logarithm of the copies,

    P(drawing is the picture | c copies) = 1 / (1 + exp(−(a + b ln c))),    half of the drawings from c½ = exp(−a/b) copies on,

fitted by maximum likelihood to the counts of all pictures; intervals resample pictures. The onset is the least level whose interval lies
above that of held-out pictures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from .. import stats
from ..demo.world import Row, World
from ..errors import UsageError
from ..models.base import Target
from ..models.load import load
from ..records.documents import read_json
from ..records.store import digest, write_whole
from ..report import svg
from .pages import Finding, alone, machine, table
from .protection import drawings

__all__ = ["duplication", "law"]

SEEDS, SAMPLER = 4, 50
RESAMPLES = 1000

QUESTIONS = {"the picture": "drawings that are the picture", "copies": "drawings that are copies of it"}


def duplication(model: str, work: Path, n: int) -> Finding:
    """Drawings of each level of copies, the law, and the onset."""
    if model != "demo":
        raise UsageError(
            "the duplication law is of captions whose pictures were planted in the bundled text model; name demo."
        )
    world, target = World(), load(model)
    levels = [0, *world.levels]
    rows = [
        row for level in levels for row in (world.of("planted", copies=level) if level else world.of("heldout"))[:n]
    ]
    doses = np.array([row.copies if row.group == "planted" else 0 for row in rows])
    under = digest([target.identity(), SEEDS, SAMPLER])  # drawings of another model or sampler are others
    counts = _counted(world, target, rows, work / f"duplication-{under}.json")
    rates = {
        question: {level: _rate(counts[:, k][doses == level]) for level in levels}
        for k, question in enumerate(QUESTIONS)
    }
    planted = doses > 0
    laws = {q: law(doses[planted], counts[planted, k]) for k, q in enumerate(QUESTIONS)}
    lines = [
        [
            str(level) if level else "held out",
            str(int((doses == level).sum())),
            *(_share(rates[q][level]) for q in QUESTIONS),
        ]
        for level in levels[::-1]
    ]
    text = "\n\n".join([
        f"Measured by `python -m mnemoscope.lab duplication {model} --pictures {n}` on {machine()}: {SEEDS} drawings of each caption (DDIM "
        f"{SAMPLER}, the model's own guidance), the picture at a similarity of {world.same_picture:.3f}, copies above "
        f"{world.reference.threshold:.3f} in a search of all {len(world.reference):,} training "
        "pictures. Intervals (95 %) are over pictures.",
        table(["copies per epoch", "pictures", *QUESTIONS.values()], lines),
        *(_in_words(q, laws[q], rates[q]) for q in QUESTIONS),
    ])  # fmt: skip
    facts = {
        "rates": {q: {str(level): [r.value, r.low, r.high] for level, r in some.items()} for q, some in rates.items()},
        "laws": {q: {name: [x.value, x.low, x.high] for name, x in found.items()} for q, found in laws.items()},
    }
    return Finding("duplication", "duplication.md", text, facts, _drawn(rates, laws))


def law(copies: np.ndarray, hits: np.ndarray, *, resamples: int = RESAMPLES) -> dict[str, stats.Interval]:
    """The logistic law of counts of :data:`SEEDS` drawings each.

    Args:
        copies: ``[picture]``, above 0.
        hits: ``[picture]``, how many of its drawings.
        resamples: Of pictures, for the intervals.

    Returns:
        ``slope`` b, and ``half``: c½, in copies.
    """
    counts = np.stack([np.log(copies), hits], 1)

    def fitted(rows: np.ndarray) -> tuple[float, float]:
        x, k = rows.T

        def loss(ab: np.ndarray) -> float:
            z = ab[0] + ab[1] * x
            # A weak normal prior: counts that one threshold separates have no finite maximum.
            return float((SEEDS * np.logaddexp(0, z) - k * z).sum() + 0.005 * (ab**2).sum())

        a, b = minimize(loss, np.array([0.0, 1.0]), method="BFGS").x
        return b, math.exp(min(-a / b, 50.0)) if b > 0 else math.inf

    rng = np.random.default_rng(0)
    again = np.array([fitted(counts[rng.integers(len(counts), size=len(counts))]) for _ in range(resamples)])
    low, high = np.quantile(again, [0.025, 0.975], axis=0, method="nearest")
    method = f"percentile bootstrap over pictures, {resamples} resamples"
    return {
        name: stats.Interval(value, float(low[k]), float(high[k]), method=method)
        for k, (name, value) in enumerate(zip(("slope", "half"), fitted(counts), strict=True))
    }


def _counted(world: World, target: Target, rows: Sequence[Row], file: Path) -> np.ndarray:
    """``[row, question]``: drawings that are the picture, and copies of it; what was drawn before is not drawn again."""
    kept: dict[str, list[int]] = read_json(file) if file.exists() else {}
    todo = [row for row in rows if row.id not in kept]
    for start in range(0, len(todo), 8):
        some = todo[start : start + 8]
        made = drawings(target, [row.caption for row in some], seeds=SEEDS, steps=SAMPLER)
        own = world.reference.descriptor(world.pictures([row.picture for row in some])).repeat_interleave(SEEDS, 0)
        same = (world.reference.descriptor(made) * own).sum(1) >= world.same_picture
        near = world.reference.nearest(made)
        # A held-out picture is none of the references: there any copy counts.
        wanted = [row.picture if row.copies else None for row in some for _ in range(SEEDS)]
        copied = [
            bool(m.copy_found) and own_name in (None, m.reference) for m, own_name in zip(near, wanted, strict=True)
        ]
        for k, row in enumerate(some):
            here = slice(k * SEEDS, (k + 1) * SEEDS)
            kept[row.id] = [int(same[here].sum()), sum(copied[here])]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(kept).encode())
        print(f"{start + len(some)}/{len(todo)} captions drawn", flush=True)
    return np.array([kept[row.id] for row in rows])


def _rate(hits: np.ndarray) -> stats.Interval:
    return stats.clustered(lambda v: float(np.mean(v)), hits / SEEDS, np.arange(len(hits)), share=True)


def _share(rate: stats.Interval) -> str:
    return f"{rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}]"


def _in_words(question: str, found: dict[str, stats.Interval], rates: dict[int, stats.Interval]) -> str:
    half, slope = found["half"], found["slope"]
    above = [level for level, rate in rates.items() if level and rate.low > rates[0].high]
    onset = f"the onset is at {min(above)} copies" if above else "no level stands out from held-out pictures"
    return (
        f"{QUESTIONS[question].capitalize()}: half of them from c½ = {half.value:.1f} [{half.low:.1f}, {half.high:.1f}] copies on, "
        f"slope b = {slope.value:.2f} [{slope.low:.2f}, {slope.high:.2f}]; {onset}."
    )


def _drawn(rates: dict[str, dict[int, stats.Interval]], laws: dict[str, dict[str, stats.Interval]]) -> str:
    """Rates over copies, with the law; held-out pictures on the left, beyond the logarithmic axis."""
    levels = [level for level in rates["the picture"] if level]
    x, y = svg.fit(levels, 130, 560, log=True), svg.Scale(0, 1, 290, 30)
    marks = [svg.x_axis(x, 290, "copies per epoch"), svg.y_axis(y, 70, "drawings", as_percent=True, right=560)]
    marks.append(svg.text(95, 308, "held out", "tick", "middle"))
    for k, (question, some) in enumerate(rates.items()):
        mark = f"c{4 * k}"
        for level, rate in some.items():
            at = (x(level) if level else 95) + 5 * k
            marks.append(svg.line(at, y(rate.low), at, y(rate.high), "line"))
            marks.append(
                svg.tag(
                    "circle",
                    svg.tag("title", f"{level} copies: {_share(rate)}"),
                    cx=at,
                    cy=y(rate.value),
                    r=4,
                    class_=mark,
                )
            )
        b, half = laws[question]["slope"].value, laws[question]["half"].value
        over = np.geomspace(x.low, x.high, 60)
        if math.isfinite(half):
            marks.append(
                svg.polyline([(x(c), y(float(expit(b * (math.log(c) - math.log(half)))))) for c in over], mark)
            )
        marks.append(svg.text(140, 44 + 18 * k, QUESTIONS[question], mark))
    return alone(
        str(
            svg.drawing(
                600, 340, "Drawings that are the picture, by copies", "Rates with intervals, and the law.", *marks
            )
        )
    )
