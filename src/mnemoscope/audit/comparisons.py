"""What is left of a detector's AUC where wording, letters, captions and families are held fast: the table of the controls.

An AUC against ordinary prompts cannot tell *sees memorization* from *sees the text style, the specific caption, the brand*. Each
row of the table takes one of these away and asks the same question again:

``overall``
    AUC over all labeled prompts, with nothing held fast.
``given-text``
    P(memorized outscores ordinary), ties half, over the pairs of prompts within one of :data:`STRATA` quantile strata of the
    out-of-fold text score: AUC = Σₛ mₛ oₛ AUCₛ / Σₛ mₛ oₛ, with mₛ memorized and oₛ ordinary prompts in stratum s. Five strata
    remove nine tenths of the bias of a confounder (Cochran 1968), not all of it: the text score's own row says what is left.
``matched``
    AUC over the memorized prompts and, for each, the ordinary prompt of the nearest text score: greedy, without replacement,
    starting from the memorized prompt of the highest text score, for which there are fewest. Where ordinary prompts are the fewer,
    each of them gets a memorized one. A match farther than :data:`CALIPER` standard deviations of the text score is none (Austin
    2011), and prompts without a match are left out, which the numbers of prompts show.
``within-family``
    As ``given-text`` with families for strata: the families of the prompt source, else clusters of near-duplicate prompts. Only
    families that hold both labels count.
``swap``
    AUC of memorized prompts against other captions of the same pictures, which were not shown with them.
``case-fold``, ``title-case``
    ``overall``, with every prompt in other letters and its label kept.

Intervals resample near-duplicate clusters within each class (:func:`mnemoscope.stats.stratified_auc`), ``within-family`` whole
families. Strata and matches are found once, on all prompts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from .. import stats
from ..errors import UsageError
from ..records.schema import Row
from ..records.store import Run
from ..records.table import PromptScore, prompt_scores
from .controls import TextBaseline, text_baseline
from .variants import RESTYLED

__all__ = ["Comparison", "Controls", "matches", "measure", "text_strata"]

STRATA = 5

CALIPER = 0.2

TEXT = "ngrams"
"""What the text score is called beside the detectors, as in the file of the baseline."""

NO_TEXT = "there is no text score"


@dataclass(frozen=True)
class Comparison:
    """One row of the table: one score under one control.

    Attributes:
        detector: The score; ``ngrams`` is the out-of-fold text score.
        control: What was held fast.
        positives: Memorized prompts that were compared.
        negatives: What they were compared with.
        auc: None: not measured.
        note: Why it was not, or what else there is to say.
    """

    detector: str
    control: str
    positives: int
    negatives: int
    auc: stats.Interval | None
    note: str = ""


@dataclass(frozen=True)
class Controls:
    """``controls.json``: the text-only baseline, and the table where it was asked for."""

    baseline: TextBaseline
    table: tuple[Comparison, ...] = ()

    def to_json(self) -> str:
        """Plain values, for readers without this class: the baseline's, and ``table`` beside them."""
        rows = {"table": [asdict(row) for row in self.table]} if self.table else {}
        return json.dumps(asdict(self.baseline) | rows, ensure_ascii=False, allow_nan=False)


def measure(run: Run, *, table: bool = True, resamples: int = 1000, seed: int = 0) -> Controls | None:
    """The controls of a finished run, from its rows alone.

    Args:
        run: The run; rows of variants (:mod:`~mnemoscope.audit.variants`) are found by what they say of themselves.
        table: Whether the table is made, or only the baseline.
        resamples: Of each interval.
        seed: Of folds and resamples; equal rows give equal numbers, in whatever order they stand.

    Returns:
        None: the rows do not hold prompts of both labels.
    """
    labels = {row.prompt: bool(row.label) for row in run.rows() if row.label is not None and row.prompt}
    if set(labels.values()) != {True, False}:
        return None
    prompts = sorted(labels)
    baseline = text_baseline(prompts, [labels[p] for p in prompts], resamples=resamples, seed=seed)
    if not table:
        return Controls(baseline)
    names = list(dict.fromkeys(name for row in run.rows() for name in row.scores))
    rows: list[Comparison] = []
    for name in names:
        scored = {p.prompt: p for p in prompt_scores(run.rows(), name)}
        if scored.keys() >= labels.keys():
            rows += _Judge(name, scored, baseline, resamples, seed).rows()
    if baseline.scores:
        rows += _Judge(TEXT, _text_scored(run.rows(), baseline), baseline, resamples, seed).rows()
    return Controls(baseline, tuple(rows))


def _text_scored(rows: Iterator[Row], baseline: TextBaseline) -> dict[str, PromptScore]:
    """The text score as if a detector had given it."""
    score = dict(zip(baseline.prompts, baseline.scores, strict=True))
    first = {row.prompt: row for row in rows if row.prompt in score}
    return {
        text: PromptScore(r.prompt_id, text, r.group, r.label, score[text], (score[text],), (0,), "text", r.family)
        for text, r in first.items()
    }


class _Judge:
    """One score under all controls."""

    def __init__(self, name: str, scored: Mapping[str, PromptScore], baseline: TextBaseline, resamples: int, seed: int):
        self.name, self.scored, self.resamples, self.seed = name, scored, resamples, seed
        self.prompts = [scored[text] for text in baseline.prompts]
        self.scores = np.array([p.score for p in self.prompts])
        self.labels = np.array([bool(p.label) for p in self.prompts])
        self.clusters = np.array(baseline.clusters)
        self.text = np.array(baseline.scores) if baseline.scores else None
        self._named_families = any(p.family for p in self.prompts)

    def rows(self) -> list[Comparison]:
        """All that the rows allow; of controls that need further prompts, those whose prompts are there."""
        made = [self._overall(), self._given_text(), self._matched(), self._within_family()]
        there = {p.control for p in self.scored.values()}
        if "swap" in there:
            made.append(self._swapped())
        return made + [self._restyled(control) for control in RESTYLED if control in there]

    def _overall(self) -> Comparison:
        return self._compared("overall", self.scores, self.labels, self.clusters)

    def _given_text(self) -> Comparison:
        if self.text is None:
            return self._missing("given-text", NO_TEXT)
        strata = text_strata(self.text)
        counted = _mixed(strata, self.labels)
        if not counted.any():
            return self._missing("given-text", "the text score separates the labels so far that no stratum holds both")
        of = self.scores[counted], self.labels[counted], self.clusters[counted]
        return self._compared("given-text", *of, strata=strata[counted])

    def _matched(self) -> Comparison:
        if self.text is None:
            return self._missing("matched", NO_TEXT)
        kept = matches(self.text, self.labels)
        if not len(kept):
            return self._missing("matched", "no two prompts of different labels have like text scores")
        return self._compared("matched", self.scores[kept], self.labels[kept], self.clusters[kept])

    def _within_family(self) -> Comparison:
        families = _families(self.prompts) if self._named_families else self.clusters
        counted = _mixed(families, self.labels)
        if not counted.any():
            return self._missing("within-family", "no family holds prompts of both labels")
        won, pairs = stats.pairs_within(self.scores[counted], self.labels[counted], families[counted])
        interval = stats.bootstrap_ratio(won, pairs, resamples=self.resamples, seed=self.seed)
        positives = int(self.labels[counted].sum())
        n = f"{len(pairs)} {'families of the source' if self._named_families else 'clusters of near-duplicates'}"
        return Comparison(self.name, "within-family", positives, int(counted.sum()) - positives, interval, n)

    def _swapped(self) -> Comparison:
        place = {p.prompt_id: i for i, p in enumerate(self.prompts)}
        pairs = [(place[p.origin], p.score) for p in self.scored.values() if p.control == "swap" and p.origin in place]
        at, swapped = np.array([i for i, _ in pairs], dtype=int), np.array([s for _, s in pairs])
        higher = int((self.scores[at] > swapped).sum())
        scores, labels = np.concatenate([self.scores[at], swapped]), np.arange(2 * len(at)) < len(at)
        note = f"the memorized caption scores higher in {higher} of {len(at)} pairs"
        return self._compared("swap", scores, labels, np.tile(self.clusters[at], 2), note=note)

    def _restyled(self, control: str) -> Comparison:
        texts = [RESTYLED[control](p.prompt) for p in self.prompts]
        if not all(text in self.scored for text in texts):
            return self._missing(control, "not every prompt was scored in these letters")
        scores = np.array([self.scored[text].score for text in texts])
        moved = float(np.abs(scores - self.scores).mean())
        gap = float(self.scores[self.labels].mean() - self.scores[~self.labels].mean())
        note = f"a score moves by {moved:.2g} on average; the groups' means are {gap:.2g} apart"
        return self._compared(control, scores, self.labels, self.clusters, note=note)

    def _compared(
        self,
        control: str,
        scores: Float[np.ndarray, " case"],
        labels: Bool[np.ndarray, " case"],
        clusters: Int[np.ndarray, " case"],
        strata: Int[np.ndarray, " case"] | None = None,
        note: str = "",
    ) -> Comparison:
        """With its interval, where there are clusters enough for one."""
        try:
            interval = stats.stratified_auc(scores, labels, clusters, strata, resamples=self.resamples, seed=self.seed)
        except UsageError as e:
            return self._missing(control, str(e))
        return Comparison(self.name, control, int(labels.sum()), int((~labels).sum()), interval, note)

    def _missing(self, control: str, why: str) -> Comparison:
        return Comparison(self.name, control, 0, 0, None, why)


def text_strata(text: Float[np.ndarray, " prompt"]) -> Int[np.ndarray, " prompt"]:
    """The quantile stratum of each prompt's text score, from 0; equal scores share a stratum."""
    edges = np.quantile(text, np.arange(1, STRATA) / STRATA)
    return np.searchsorted(edges, text, side="right")


def matches(text: Float[np.ndarray, " prompt"], labels: Bool[np.ndarray, " prompt"]) -> Int[np.ndarray, " kept"]:
    """Places of the prompts of the smaller class that have a match in the other, and of the matches, in order."""
    fewer = bool(labels.sum() <= (~labels).sum())
    few, free = np.flatnonzero(labels == fewer), np.flatnonzero(labels != fewer)
    hardest_first = np.argsort(-text[few] if fewer else text[few], kind="stable")
    farthest = CALIPER * float(text.std())
    kept: list[int] = []
    for i in few[hardest_first]:
        away = np.abs(text[free] - text[i])
        nearest = int(away.argmin())
        if away[nearest] <= farthest:
            kept += [int(i), int(free[nearest])]
            free = np.delete(free, nearest)
        if not len(free):
            break
    return np.sort(np.array(kept, dtype=int))


def _families(prompts: Sequence[PromptScore]) -> Int[np.ndarray, " prompt"]:
    """The families of the source; a prompt without one stands alone."""
    names = [("family", p.family) if p.family else ("prompt", p.prompt) for p in prompts]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names])


def _mixed(strata: Int[np.ndarray, " prompt"], labels: Bool[np.ndarray, " prompt"]) -> Bool[np.ndarray, " prompt"]:
    """Which prompts are in a stratum that holds both labels."""
    both = np.intersect1d(strata[labels], strata[~labels])
    return np.isin(strata, both)
