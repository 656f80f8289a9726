"""Comparing mitigations: numbers with paired intervals, tables, and the trade-off between copying and fidelity as a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from .. import stats
from ..records.trials import NONE, Attack, Cell, Trial
from .plots import WIDTH
from .svg import Scale, drawing, fit, polyline, tag, text, x_axis, y_axis
from .words import percent

__all__ = [
    "FPR",
    "Numbers",
    "Rows",
    "attacks_table",
    "groups_of",
    "numbers",
    "ordinary_table",
    "tradeoff",
    "worst_table",
]

FPR = 0.01
"""The gate's share of false alarms on ordinary prompts."""


@dataclass(frozen=True)
class Rows:
    """Which samples of a trial a number is about."""

    index: np.ndarray
    clusters: list[str]

    @classmethod
    def of(cls, trial: Trial, *groups: str) -> Rows:
        """Samples of the named groups."""
        samples = [case for case in trial.cases for _ in range(trial.seeds)]
        index = [i for i, case in enumerate(samples) if case.group in groups]
        return cls(np.array(index, dtype=int), [samples[i].cluster for i in index])


@dataclass(frozen=True)
class Numbers:
    """One cell on some samples, beside the same samples without the method.

    Attributes:
        copies: Share of pictures that are copies.
        templates: Share that repeat the layout of a reference, not being copies.
        similarity: Mean similarity to the nearest reference.
        top: Its 95th percentile.
        fidelity: Mean image–text score with the original prompt.
        loss: Fidelity lost, relative to the same pictures without the method.
        change: Mean distance of each picture to the one without the method.
        fired: Share of samples that the method was applied to.
    """

    copies: stats.Interval
    templates: stats.Interval
    similarity: stats.Interval
    top: stats.Interval
    fidelity: stats.Interval
    loss: stats.Interval
    change: stats.Interval
    fired: float


def groups_of(trial: Trial) -> list[str]:
    """Groups in the order of the cases."""
    return list(dict.fromkeys(case.group for case in trial.cases))


@dataclass(frozen=True)
class Gate:
    """Applies a method to samples whose magnitude, mean over the first ``steps`` steps, is greater than ``above``."""

    steps: int
    above: float

    @classmethod
    def of(cls, trial: Trial, steps: int = 1, fpr: float = FPR) -> Gate:
        """The gate that fires for ordinary prompts with probability ``fpr``."""
        return cls(steps, stats.threshold_at_fpr(trial.ordinary[str(steps)], fpr).value)

    def fires(self, cell: Cell) -> np.ndarray:
        """For each sample of a trial, from its cell without any method."""
        return np.array(cell.sizes[str(self.steps)]) > self.above


def numbers(trial: Trial, cell: Cell, rows: Rows, gate: Gate | None = None) -> Numbers:
    """What a cell comes to on some samples.

    Args:
        trial: Where the cell is from; its first cell is doing nothing.
        cell: The method.
        rows: The samples.
        gate: Decides which samples the method is applied to; None: all of them.
    """
    nothing, i = trial.cells[0], rows.index
    fires = np.ones(len(i), bool) if gate is None else gate.fires(nothing)[i]

    def both(name: str) -> np.ndarray:
        plain, made = (np.array(getattr(c, name), dtype=float)[i] for c in (nothing, cell))
        return np.stack([np.where(fires, made, plain), plain], 1)

    def interval(statistic: Callable[[np.ndarray], float], name: str, *, share: bool = False) -> stats.Interval:
        return stats.clustered(statistic, both(name), rows.clusters, share=share)

    change = np.where(fires, np.array(cell.change)[i], 0.0)
    return Numbers(
        interval(lambda x: x[:, 0].mean(), "copied", share=True),
        interval(lambda x: x[:, 0].mean(), "template", share=True),
        interval(lambda x: x[:, 0].mean(), "similarity"),
        interval(lambda x: float(np.quantile(x[:, 0], 0.95)), "similarity"),
        interval(lambda x: x[:, 0].mean(), "fidelity"),
        interval(lambda x: 1 - x[:, 0].mean() / x[:, 1].mean(), "fidelity"),
        stats.clustered(np.mean, change, rows.clusters),
        float(fires.mean()),
    )


def _share(interval: stats.Interval) -> str:
    return f"{percent(interval.value)} [{percent(max(0, interval.low))}, {percent(interval.high)}]"


def _signed(interval: stats.Interval) -> str:
    return f"{100 * interval.value:+.1f} % [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def _plain(interval: stats.Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def worst_table(trial: Trial, group: str, gate: Gate | None = None) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: every cell on one group of repeated pictures."""
    rows = Rows.of(trial, group)
    columns = [
        "method",
        "applied to",
        "copies",
        "template copies",
        "mean similarity",
        "95th percentile",
        "fidelity lost",
    ]
    made = []
    for cell in trial.cells:
        n = numbers(trial, cell, rows, gate)
        nothing = cell.method == NONE
        made.append([
            cell.label, "" if nothing else percent(n.fired), _share(n.copies), _share(n.templates), _plain(n.similarity),
            f"{n.top.value:.3f}", "" if nothing else _signed(n.loss),
        ])  # fmt: skip
    return columns, made


def ordinary_table(trial: Trial, gate: Gate) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: what every cell does to prompts without a repeated picture, and what it costs."""
    rows = Rows.of(trial, *trial.plain)
    columns = ["method", "picture changed by", "fidelity lost", "Fréchet distance to real pictures", "pictures changed when gated",
               "fidelity lost when gated", "seconds", "F", "B", "peak MB"]  # fmt: skip
    made = []
    for cell in trial.cells:
        n, gated = numbers(trial, cell, rows), numbers(trial, cell, rows, gate)
        nothing = cell.method == NONE
        made.append([
            cell.label, "" if nothing else _plain(n.change), "" if nothing else _signed(n.loss),
            "not computed" if cell.frechet is None else f"{cell.frechet:.3f}", "" if nothing else percent(gated.fired),
            "" if nothing else _signed(gated.loss), f"{cell.seconds:.3f}", f"{cell.forwards:.1f}", f"{cell.backwards:.1f}",
            "unknown" if cell.peak is None else f"{cell.peak:,.0f}",
        ])  # fmt: skip
    return columns, made


def attacks_table(trial: Trial, gate: Gate) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: what an attack on embeddings brings back."""
    columns = ["method", "copies before the attack", "copies that come back", "controls that turn into copies",
               "attacked samples that the gate sees"]  # fmt: skip
    return columns, [_attack_row(attack, gate.above) for attack in trial.attacks]


def _attack_row(attack: Attack, above: float) -> list[str]:
    def share(hits: Sequence[bool]) -> str:
        found = stats.clopper_pearson(sum(hits), len(hits))
        return f"{sum(hits)}/{len(hits)} = {_share(found)}"

    label = attack.method if attack.strength is None else f"{attack.method} {attack.strength:g}"
    seen = percent(float(np.mean(np.array(attack.size) > above)))
    return [label, share(attack.before), share(attack.after), share(attack.controls), seen]


def tradeoff(trial: Trial, group: str, gate: Gate | None = None) -> Markup:
    """Copies against fidelity, a small figure for each method: its strengths joined, all others' in gray, doing nothing as a ring."""
    rows = Rows.of(trial, group)
    found = {id(c): numbers(trial, c, rows, gate) for c in trial.cells}
    nothing = found[id(trial.cells[0])]
    methods = [m for m in dict.fromkeys(c.method for c in trial.cells) if m != NONE]
    lines = {
        m: [(found[id(c)].fidelity.value, found[id(c)].copies.value) for c in trial.cells if c.method == m]
        for m in methods
    }
    across, width, height, gap = 3, 270.0, 150.0, 62.0
    values = [f for line in lines.values() for f, _ in line] + [nothing.fidelity.value]
    marks: list[Markup] = []
    for k, method in enumerate(methods):
        left, top = 56 + (k % across) * (width + 52), 52 + (k // across) * (height + gap + 22)
        x, y = fit(values, left, left + width, log=False), Scale(0.0, 1.0, top + height, top)
        others = [polyline([(x(f), y(c)) for f, c in lines[m]], "chance", m) for m in methods if m != method]
        mine = [(x(f), y(c)) for f, c in lines[method]]
        cells = [c for c in trial.cells if c.method == method]
        dots = [
            tag(
                "circle",
                tag("title", f"{c.label}: {percent(p[1])} copies, fidelity {p[0]:.3f}"),
                cx=at[0],
                cy=at[1],
                r=4.0,
                class_="c0",
            )
            for c, p, at in zip(cells, lines[method], mine, strict=True)
        ]
        ring = tag("circle", tag("title", "without any method"), cx=x(nothing.fidelity.value), cy=y(nothing.copies.value), r=5.0,
                   class_="ring")  # fmt: skip
        marks += [
            text(left, top - 12, method, "label strong"),
            x_axis(x, top + height, "fidelity to the prompt" if k + across >= len(methods) else "", top=top),
            y_axis(y, left, "", as_percent=True, right=left + width),
            *others, polyline(mine, "c0", method), *dots, ring,
        ]  # fmt: skip
    bottom = 52 + -(-len(methods) // across) * (height + gap + 22)
    return drawing(
        WIDTH, bottom, f"Copies against fidelity: {group}",
        "; ".join(f"{m}: " + ", ".join(f"{percent(c)} at {f:.3f}" for f, c in lines[m]) for m in methods) or "no method",
        *marks,
    )  # fmt: skip
