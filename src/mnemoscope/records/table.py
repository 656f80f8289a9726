"""From rows (one per prompt and seed) to prompts: the unit that audits, calibrations and reports speak about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import UnknownName, UsageError
from .schema import Row

__all__ = ["PromptScore", "prompt_scores"]


@dataclass(frozen=True)
class PromptScore:
    """One prompt under one detector.

    Attributes:
        prompt_id: The prompt's id.
        prompt: Its text.
        group: Its group in the source, if any.
        label: Its known ground truth, if any.
        score: Mean of ``values``.
        values: The score of each seed, in the order of seeds.
        seeds: The seeds that ``values`` belong to.
        space: Space of the predictions that were compared.
        family: Its family in the source, if any.
        control: The control that it was made for; None: it was asked for.
        origin: For a control: the id of the prompt that it was made from.
    """

    prompt_id: str
    prompt: str
    group: str | None
    label: bool | None
    score: float
    values: tuple[float, ...]
    seeds: tuple[int, ...]
    space: str
    family: str | None = None
    control: str | None = None
    origin: str | None = None


def prompt_scores(
    rows: Iterable[Row], detector: str, window: tuple[int, int] | None = None, n: int | None = None
) -> list[PromptScore]:
    """Scores of prompts: D(p; n, S) = (1/n) Σ_j (1/|S|) Σ_{i∈S} d[j, i] (Wen et al. 2024, the detection metric).

    Args:
        rows: Rows of one run; failed ones are left out.
        detector: The score's name in the rows.
        window: Half-open window S of step indices, within the steps that were run; None: the detector's own.
        n: Only the first n seeds (0 … n − 1); None: all.

    Returns:
        One entry per prompt with at least one score, in the order in which prompts first appear. Seeds that failed are
        missing from ``values``: compare ``len(values)`` with n before calling two prompts comparable.

    Raises:
        UnknownName: no row has a score of that name.
        UsageError: the window is empty or goes beyond the steps that were run.
    """
    if window is not None and not 0 <= window[0] < window[1]:
        raise UsageError(f"window {window} is empty; give (start, stop) with 0 ≤ start < stop.")
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    facts: dict[tuple[str, str], tuple[Row, str]] = {}
    names: set[str] = set()
    for row in rows:
        names |= row.scores.keys()
        if row.status != "ok" or detector not in row.scores or (n is not None and row.seed >= n):
            continue
        key = (row.prompt_id, row.prompt)
        found.setdefault(key, []).append((row.seed, _value(row, detector, window)))
        facts.setdefault(key, (row, row.scores[detector].space))
    if names and detector not in names:
        raise UnknownName("score in this run", detector, names)
    return [_prompt(*facts[key], sorted(values)) for key, values in found.items()]


def _value(row: Row, detector: str, window: tuple[int, int] | None) -> float:
    score = row.scores[detector]
    if window is None:
        return score.value
    if window[1] > len(score.per_step):
        raise UsageError(
            f"window {window} needs {window[1]} steps and {detector} kept {len(score.per_step)}; audit again with more steps."
        )
    inside = score.per_step[slice(*window)]
    return sum(inside) / len(inside)


def _prompt(row: Row, space: str, values: list[tuple[int, float]]) -> PromptScore:
    seeds, scores = tuple(s for s, _ in values), tuple(v for _, v in values)
    mean = sum(scores) / len(scores)
    return PromptScore(
        prompt_id=row.prompt_id,
        prompt=row.prompt,
        group=row.group,
        label=row.label,
        score=mean,
        values=scores,
        seeds=seeds,
        space=space,
        family=row.family,
        control=row.control,
        origin=row.origin,
    )
