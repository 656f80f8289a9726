"""What a score means, in words for somebody who has never heard of diffusion; never a verdict about training data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..detect.calibrate import Calibration
from ..explain.tokens import Explanation
from ..explain.words import Word
from ..report.words import percent, verb
from .drawing import Drawn

__all__ = ["Scale", "Verdict", "copies", "pull", "scale", "verdict"]

BINS = 40
"""Bars of the picture of ordinary scores."""


@dataclass(frozen=True)
class Verdict:
    """A score in words.

    Attributes:
        tone: ``above`` or ``under`` the threshold, or ``open`` where there is none.
        headline: The result in a few words.
        sentences: What it rests on, and what it does not say.
    """

    tone: str
    headline: str
    sentences: tuple[str, ...]


def verdict(look: Explanation, calibration: Calibration | None, model: str) -> Verdict:
    """The score of one prompt against its model's threshold, with the p-value and k of n seeds."""
    n = len(look.scores)
    starts = f"{n} random start{'s' if n > 1 else ''}"
    cut = [f"The prompt is too long for the model: its last {look.dropped} tokens were never read."] * bool(
        look.dropped
    )
    if calibration is None or look.p is None or look.threshold is None:
        return Verdict(
            "open",
            f"Score {look.score:.2f}, and nothing to hold it against",
            (
                f"This is the mean over {starts} (seeds). Scores are uncalibrated for this model: that one prompt scores higher than "
                f"another is meaningful, “high” is not.",
                f"A threshold comes from ordinary prompts: mnemoscope calibrate {model} --prompts ordinary.txt",
                *cut,
            ),
        )
    total = len(calibration.record.scores)
    as_high = round(look.p * (total + 1)) - 1
    among = f"{as_high:,} of {total:,} ordinary prompts" if as_high else f"None of {total:,} ordinary prompts"
    k = sum(s > look.threshold for s in look.scores)
    seeds = f"On their own, {k} of {starts} (seeds) {verb(k, 'is', 'are')} above it."
    held = (
        f"Score {look.score:.2f}; the threshold of this model is {look.threshold:.2f}, which {percent(calibration.record.fpr)} of "
        f"ordinary prompts exceed. {among} scored as high (p = {look.p:.2g}). {seeds}"
    )
    unsure = []
    if calibration.borderline(look.score):
        unsure.append(
            "It is borderline: within rounding of the threshold, so another machine may put it on the other side."
        )
    if look.accepted:
        unsure.append(
            f"The threshold was made under another setting ({'; '.join(look.accepted)}), so p may mean nothing here."
        )
    if look.above:
        meaning = (
            "Prompts that pull this hard are where models bring back pictures from their training. Whether this one does, the pictures "
            "tell: draw them below."
        )
        return Verdict("above", "This prompt pulls unusually hard", (held, *unsure, *cut, meaning))
    meaning = (
        "Nothing stands out with these seeds. That is no proof that the model knows no picture behind these words."
    )
    return Verdict("under", "This prompt pulls no harder than ordinary ones", (held, *unsure, *cut, meaning))


def pull(look: Explanation) -> list[tuple[Word, float]]:
    """Each word with its part of the pull that words have, from 0 to 1; a word that weakens the pull has 0."""
    total = sum(max(w.value, 0.0) for w in look.words) or 1.0
    return [(w, max(w.value, 0.0) / total) for w in look.words]


def copies(drawn: Drawn) -> str:
    """What was found when the pictures were compared."""
    n = len(drawn.shots)
    if all(shot.nearest is None for shot in drawn.shots):
        return f"{n} pictures drawn. Copies: not tested, because no reference pictures were given."
    if not drawn.compared:
        return f"{n} pictures drawn. The reference set has no threshold: similarities are shown, and no copy is called."
    if drawn.copies:
        return f"Copy found in {drawn.copies} of {n} seeds."
    return f"No copy found in {n} seeds."


@dataclass(frozen=True)
class Scale:
    """Where a score lies among ordinary ones; places are shares of the line's length.

    Attributes:
        outline: Points (x, height) of the histogram of ordinary scores, both from 0 to 1.
        limit: Place of the threshold.
        here: Place of the score.
        before: Place of the score before the edits; None: not edited.
        words: The same, for those who do not see it.
    """

    outline: tuple[tuple[float, float], ...]
    limit: float
    here: float
    before: float | None
    words: str


def scale(look: Explanation, first: Explanation | None, calibration: Calibration) -> Scale:
    """The line from 0 to the largest score there is."""
    ordinary = calibration.record.scores
    shown = [look.score, calibration.threshold, *([first.score] if first else [])]
    most = 1.08 * max([*shown, ordinary[-1]]) or 1.0
    counts, edges = np.histogram(ordinary, bins=BINS, range=(0, most))
    heights = (counts / counts.max()).tolist()
    outline = [(float(edges[i + j]) / most, h) for i, h in enumerate(heights) for j in (0, 1)]
    low, high = (_quantile(ordinary, q) for q in (0.05, 0.95))
    words = (
        f"Score {look.score:.2f}, {'above' if look.above else 'not above'} the threshold {calibration.threshold:.2f}; "
        f"nine in ten ordinary prompts lie between {low:.2f} and {high:.2f}."
    )
    return Scale(
        tuple(outline), calibration.threshold / most, look.score / most, first.score / most if first else None, words
    )


def _quantile(ordered: Sequence[float], q: float) -> float:
    return float(np.quantile(ordered, q))
