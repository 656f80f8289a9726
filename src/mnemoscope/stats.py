"""Numbers with their uncertainty: ROC and rates, intervals, p-values, thresholds. No torch.

Conventions, everywhere in the project:

* A higher score means *more memorized*. Label True: known to be memorized; False: ordinary. Scores may be ±∞, not NaN.
* A point of the ROC calls a prompt when score ≥ its threshold (scikit-learn's rule). A *calibrated* threshold calls it
  when score > threshold, which is the same as conformal p ≤ stated rate (:func:`threshold_at_fpr`).
* Prompts come in near-duplicates, so intervals resample clusters of prompts, not prompts (:func:`cluster_bootstrap`).
* Randomness comes from a numpy ``Generator`` made from an explicit seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import beta, binomtest, false_discovery_control, quantile_test, rankdata
from sklearn.metrics import roc_curve

from .errors import UnknownName, UsageError

__all__ = [
    "Interval",
    "Numbers",
    "Roc",
    "Separation",
    "Threshold",
    "auc",
    "balanced_accuracy",
    "benjamini_hochberg",
    "bootstrap_ratio",
    "borderline",
    "clopper_pearson",
    "cluster_bootstrap",
    "clustered",
    "conformal_p",
    "least_ordinary",
    "pairs_within",
    "realized_fpr",
    "replication_bound",
    "require_enough",
    "roc",
    "rounding",
    "separation",
    "stratified_auc",
    "threshold_at_fpr",
    "tpr_at_fpr",
    "tpr_at_nearest_fpr",
    "upper_bound",
]

Numbers: TypeAlias = Sequence[float | int] | np.ndarray
"""A row of numbers as callers have it."""

Statistic: TypeAlias = Callable[[np.ndarray, np.ndarray], float]
"""A number from (scores, labels); scores may have further columns."""

FEW_CLUSTERS = 10
"""Below this many clusters in a class the percentile bootstrap is known to be too narrow, and the interval says so."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its bounds. ``dataclasses.asdict`` gives its stored form, ``Interval(**stored)`` reads it back.

    Attributes:
        value: The point estimate; low ≤ value ≤ high.
        low: Lower bound.
        high: Upper bound; ∞ where the data cannot bound it.
        confidence: Of the interval, in (0, 1).
        method: In words, for the reader of a report.
        note: What the reader must know about this interval, or nothing.
    """

    value: float
    low: float
    high: float
    confidence: float = 0.95
    method: str = ""
    note: str = ""

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, eq=False, slots=True)
class Roc:
    """The ROC from (0, 0) to (1, 1), one point per distinct score: tied scores move together.

    Attributes:
        fpr: False-positive rate, increasing.
        tpr: True-positive rate, increasing.
        threshold: A prompt is called when its score ≥ threshold. The first point, nobody called, stands at ∞.
    """

    fpr: Float[np.ndarray, " point"]
    tpr: Float[np.ndarray, " point"]
    threshold: Float[np.ndarray, " point"]


def roc(scores: Numbers, labels: Numbers) -> Roc:
    """The ROC of scores against known labels.

    Raises:
        UsageError: a score is NaN, the lengths differ, or a class is empty.
    """
    scores, labels = _labelled(scores, labels)
    # Ranks instead of scores: an infinite score is then as good as any, and ties stay ties.
    levels, rank = np.unique(scores, return_inverse=True)
    fpr, tpr, at = roc_curve(labels, rank, drop_intermediate=False)
    return Roc(fpr, tpr, np.concatenate([[np.inf], levels[at[1:].astype(int)]]))


def auc(scores: Numbers, labels: Numbers) -> float:
    """Area under the ROC: the chance that a memorized prompt outscores an ordinary one, ties counted half.

    Never flipped: below 0.5 means that the score points the wrong way.
    """
    scores, labels = _labelled(scores, labels)
    positives = int(labels.sum())
    # Mann & Whitney's U, not a trapezoid sum: ranks are whole or half, so that perfect is exactly 1.
    u = rankdata(scores)[labels].sum() - positives * (positives + 1) / 2
    return float(u / (positives * (len(labels) - positives)))


def tpr_at_fpr(scores: Numbers, labels: Numbers, fpr: float = 0.01) -> float:
    """TPR at the last ROC point whose FPR is *strictly below* ``fpr`` (the rule of Wen et al. 2024).

    With 500 ordinary prompts and 1 %, four false positives are allowed; five are exactly 1 % and too many.
    """
    _rate("fpr", fpr)
    curve = roc(scores, labels)
    return float(curve.tpr[curve.fpr < fpr][-1])


def tpr_at_nearest_fpr(scores: Numbers, labels: Numbers, fpr: float = 0.01) -> float:
    """TPR at the ROC point whose FPR is *nearest* to ``fpr``, which may exceed it (the rule of Jeon et al. 2025).

    Of equally near points the last one counts. For comparison with published numbers; prefer :func:`tpr_at_fpr`.
    """
    _rate("fpr", fpr)
    curve = roc(scores, labels)
    distance = np.abs(curve.fpr - fpr)
    return float(curve.tpr[np.isclose(distance, distance.min(), rtol=0, atol=1e-12)][-1])


def balanced_accuracy(scores: Numbers, labels: Numbers) -> float:
    """The best 1 − (FPR + FNR)/2 over all thresholds: what Wen et al. 2024 call ACC.

    The threshold is picked on the very data it is judged on, so this is optimistic on few prompts.
    """
    curve = roc(scores, labels)
    return float(np.max(1 + curve.tpr - curve.fpr) / 2)


def cluster_bootstrap(
    statistic: Statistic,
    scores: Numbers,
    labels: Numbers,
    clusters: Sequence[int | str] | np.ndarray | None = None,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    share: bool = True,
) -> Interval:
    """Percentile interval of ``statistic(scores, labels)``, resampling clusters within each class.

    Whole clusters are drawn with replacement among the memorized and, apart from them, among the ordinary rows; both
    keep their number of clusters. Percentile and not BCa: AUC and TPR lie at or near 1, where the jackknife that BCa
    needs is constant. The interval is widened to the point estimate where bias would exclude it.

    Args:
        statistic: For instance :func:`auc`, or ``functools.partial(tpr_at_fpr, fpr=0.05)``.
        scores: ``[row]``, or ``[row, k]`` to compare k scores on the same resamples, for instance
            ``lambda s, y: auc(s[:, 0], y) - auc(s[:, 1], y)``.
        labels: ``[row]``, True for memorized.
        clusters: ``[row]``, equal for rows that are not independent; None: each row stands alone.
        resamples: How many.
        confidence: Of the interval.
        seed: Of the resampling; equal seeds give equal intervals.
        share: The statistic is a share of cases in [0, 1], as AUC, TPR and balanced accuracy are. Where it is exactly
            0 or 1 in every resample the bootstrap sees no spread at all, and the exact binomial bound for as many
            cases as the smaller class has clusters takes its place. (For the AUC: that many disjoint pairs, all in
            the right order, were seen.) Say False for a difference.

    Raises:
        UsageError: a class has fewer than two clusters, or see :func:`roc`.
    """
    _rate("confidence", confidence)
    scores, labels = _labelled(scores, labels, columns=True)
    unit, sizes = _units(labels, clusters)
    value = float(statistic(scores, labels))
    rng = np.random.default_rng(seed)
    drawn = np.array([statistic(scores[rows], labels[rows]) for rows in _resampled(unit, sizes, resamples, rng)])
    return _percentile(value, drawn, min(sizes), confidence, share=share)


def clustered(
    statistic: Callable[[np.ndarray], float],
    rows: Numbers,
    clusters: Sequence[int | str] | np.ndarray,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    share: bool = False,
) -> Interval:
    """Percentile interval of a statistic of rows of one kind, resampling whole clusters.

    Args:
        statistic: Of ``rows`` or a resample of them. Paired comparisons hand over two columns and their statistic takes the
            difference: both columns of a row are drawn together.
        rows: ``[row]`` or ``[row, column]``.
        clusters: ``[row]``, equal for rows that are not independent.
        resamples, confidence, seed: As in :func:`cluster_bootstrap`; equal seeds draw the same clusters.
        share: As in :func:`cluster_bootstrap`: a share of 0 or 1 gets the exact bound for as many cases as there are clusters.

    Raises:
        UsageError: there is no row, or clusters are not one per row.
    """
    _rate("confidence", confidence)
    rows = _numbers(rows, "value", columns=True)
    unit = np.unique(np.asarray(clusters), return_inverse=True)[1] if len(rows) else np.zeros(0, int)
    if len(unit) != len(rows) or not len(rows):
        raise UsageError(f"{len(rows)} rows for {len(unit)} clusters; give at least one row, and one cluster per row.")
    n, rng = int(unit.max()) + 1, np.random.default_rng(seed)
    drawn = np.array([statistic(rows[i]) for i in _resampled(unit, [n], resamples, rng)])
    return _percentile(float(statistic(rows)), drawn, n, confidence, share=share)


def _percentile(value: float, drawn: np.ndarray, least: int, confidence: float, *, share: bool = True) -> Interval:
    """The interval that values of resamples give; ``least``: clusters of the smaller class."""
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    method, note = f"cluster bootstrap, percentile, {len(drawn)} resamples", ""
    if share and value in (0.0, 1.0) and np.ptp(drawn) == 0:
        exact = clopper_pearson(round(value * least), least, confidence)
        low, high, method = exact.low, exact.high, exact.method
        note = f"no resample differs from {value:g}; the bound is exact for {least} independent cases"
    elif least < FEW_CLUSTERS:
        note = f"only {least} clusters in a class: the interval is likely too narrow"
    return Interval(value, min(float(low), value), max(float(high), value), confidence, method, note)


def pairs_within(
    scores: Numbers, labels: Numbers, strata: Numbers
) -> tuple[Float[np.ndarray, " stratum"], Float[np.ndarray, " stratum"]]:
    """Pairs of a memorized and an ordinary prompt of one stratum: those the memorized one wins (ties half), and all.

    Strata that lack a class have no pair and are left out; the others come in the order of their numbers.
    """
    scores, labels = _labelled(scores, labels)
    strata = _numbers(strata, "stratum")
    won, pairs = [], []
    for stratum in np.intersect1d(strata[labels], strata[~labels]):
        inside = strata == stratum
        positives = int(labels[inside].sum())
        pairs.append(positives * (int(inside.sum()) - positives))
        won.append(pairs[-1] * auc(scores[inside], labels[inside]))
    return np.array(won, dtype=float), np.array(pairs, dtype=float)


ROWS_AT_ONCE = 256
"""Memorized prompts whose pairs with all ordinary ones are in memory together."""


def stratified_auc(
    scores: Numbers,
    labels: Numbers,
    clusters: Sequence[int | str] | np.ndarray | None = None,
    strata: Numbers | None = None,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The chance that a memorized prompt outscores an ordinary one of its stratum, ties half: Σ m o AUC / Σ m o over strata.

    The interval is that of :func:`cluster_bootstrap`, on the same resamples, but the pairs are compared once and counted as often
    as a resample holds them, which makes it as cheap for many strata as for one. A resample without any pair says nothing and is
    left out.

    Args:
        scores: ``[row]``.
        labels: ``[row]``, True for memorized.
        clusters: As for :func:`cluster_bootstrap`.
        strata: ``[row]``, fixed over resamples; None: all rows are one stratum, which makes it :func:`auc`.
        resamples, confidence, seed: As for :func:`cluster_bootstrap`.

    Raises:
        UsageError: a class has fewer than two clusters, or no stratum holds both classes.
    """
    _rate("confidence", confidence)
    scores, labels = _labelled(scores, labels)
    strata = np.zeros(len(scores)) if strata is None else _numbers(strata, "stratum")
    unit, sizes = _units(labels, clusters)
    drawn = np.array(list(_times(unit, sizes, resamples, np.random.default_rng(seed))), dtype=float)
    times = np.concatenate([np.ones((1, len(scores))), drawn])  # the first is the sample itself
    won, pairs = np.zeros(resamples + 1), np.zeros(resamples + 1)
    memorized, ordinary = np.flatnonzero(labels), np.flatnonzero(~labels)
    for start in range(0, len(memorized), ROWS_AT_ONCE):
        rows = memorized[start : start + ROWS_AT_ONCE]
        same = (strata[rows][:, None] == strata[ordinary]).astype(float)
        one, other = scores[rows][:, None], scores[ordinary]  # no difference, which two infinities do not have
        won += ((times[:, rows] @ (same * ((one > other) + 0.5 * (one == other)))) * times[:, ordinary]).sum(1)
        pairs += ((times[:, rows] @ same) * times[:, ordinary]).sum(1)
    if not pairs[0]:
        raise UsageError("there is no pair to compare: no stratum holds memorized and ordinary prompts.")
    drawn = won[pairs > 0] / pairs[pairs > 0]  # the sample itself is there, so one is
    return _percentile(float(drawn[0]), drawn[min(1, len(drawn) - 1) :], min(sizes), confidence)


def bootstrap_ratio(
    won: Numbers, pairs: Numbers, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile interval of Σ won / Σ pairs, resampling strata: for :func:`pairs_within` where strata are independent cases.

    Where every stratum is won, or none, the exact binomial bound for as many cases as there are strata takes its place, as in
    :func:`cluster_bootstrap`.

    Raises:
        UsageError: there is no pair.
    """
    won, pairs = _numbers(won, "won"), _numbers(pairs, "pair")
    n = len(pairs)
    if not n or not pairs.sum() > 0:
        raise UsageError("there is no pair to compare: no stratum holds memorized and ordinary prompts.")
    value = float(won.sum() / pairs.sum())
    if value in (0.0, 1.0):
        exact = clopper_pearson(round(value * n), n, confidence)
        return Interval(value, exact.low, exact.high, confidence, exact.method, f"exact for {n} independent cases")
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))
    ratios = won[drawn].sum(1) / pairs[drawn].sum(1)
    tail = (1 - _rate("confidence", confidence)) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    note = f"only {n} strata: the interval is likely too narrow" if n < FEW_CLUSTERS else ""
    method = f"bootstrap of strata, percentile, {resamples} resamples"
    return Interval(value, min(float(low), value), max(float(high), value), confidence, method, note)


@dataclass(frozen=True, slots=True)
class Separation:
    """How well one score tells memorized from ordinary prompts: what stands in a table beside its name.

    Attributes:
        auc: See :func:`auc`.
        tpr: See :func:`tpr_at_fpr`.
        fpr: The rate that ``tpr`` stays strictly below.
    """

    auc: Interval
    tpr: Interval
    fpr: float


def separation(
    scores: Numbers,
    labels: Numbers,
    clusters: Sequence[int | str] | np.ndarray | None = None,
    *,
    fpr: float = 0.01,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Separation:
    """AUC and TPR at a fixed FPR, each with its :func:`cluster_bootstrap` interval, on the same resamples.

    The same numbers as from :func:`auc` and :func:`tpr_at_fpr` there, without sorting every resample anew.
    """
    area = stratified_auc(scores, labels, clusters, resamples=resamples, confidence=confidence, seed=seed)
    return Separation(area, _tpr_interval(scores, labels, clusters, fpr, resamples, confidence, seed), fpr)


def _tpr_interval(
    scores: Numbers,
    labels: Numbers,
    clusters: Sequence[int | str] | np.ndarray | None,
    fpr: float,
    resamples: int,
    confidence: float,
    seed: int,
) -> Interval:
    """:func:`tpr_at_fpr` with its interval: the ROC of a resample is that of the sample, its rows counted as often as they come."""
    _rate("fpr", fpr)
    scores, labels = _labelled(scores, labels)
    unit, sizes = _units(labels, clusters)
    order = np.argsort(-scores, kind="stable")
    level = scores[order]
    last_of_level = np.flatnonzero(np.append(level[1:] != level[:-1], True))

    def tpr(times: np.ndarray) -> float:
        false, true = (np.cumsum((times * of)[order])[last_of_level] for of in (~labels, labels))
        called = int((false / false[-1] < fpr).sum())  # levels that may be called; rates never fall
        return float(true[called - 1] / true[-1]) if called else 0.0

    drawn = [tpr(times) for times in _times(unit, sizes, resamples, np.random.default_rng(seed))]
    return _percentile(tpr(np.ones(len(scores), dtype=int)), np.array(drawn), min(sizes), confidence)


def replication_bound(nats: float, rate: float) -> float:
    """exp(−(KL + h(r)) / r): plain noise leads to a picture at least so often (:func:`mnemoscope.measure.invmm.bound`).

    Args:
        nats: KL in all, of the noise that was found.
        rate: r, the share of its draws that succeed.
    """
    if rate <= 0:
        return 0.0
    entropy = 0.0 if rate >= 1 else -rate * math.log(rate) - (1 - rate) * math.log1p(-rate)
    return math.exp(-(nats + entropy) / rate)


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Exact two-sided interval of a share, k of n independent cases (Clopper & Pearson 1934)."""
    low, high = _exact(k, n, confidence, "two-sided")
    return Interval(k / n, low, high, confidence, "Clopper–Pearson")


def upper_bound(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Exact one-sided upper bound of a share: 0 of 300 still allows 0.99 %, 299 are the least that can show ≤ 1 %."""
    low, high = _exact(k, n, confidence, "less")
    return Interval(k / n, low, high, confidence, "Clopper–Pearson, one-sided upper")


def conformal_p(scores: Numbers, ordinary: Numbers) -> Float[np.ndarray, " score"]:
    """p = (1 + #{ordinary ≥ score}) / (1 + N) for each score.

    If a prompt is ordinary too (exchangeable with the N ordinary ones), P(p ≤ α) ≤ α for every α. The smallest p
    possible is 1/(1 + N).
    """
    scores, ordinary = _numbers(scores, "score"), np.sort(_numbers(ordinary, "ordinary score"))
    if not len(ordinary):
        raise UsageError("no ordinary scores to compare with: calibrate on ordinary prompts of this model first.")
    return (1 + len(ordinary) - np.searchsorted(ordinary, scores, side="left")) / (1 + len(ordinary))


def benjamini_hochberg(p: Numbers) -> Float[np.ndarray, " score"]:
    """Adjusted p-values: calling those ≤ q keeps the expected share of false calls among the calls ≤ q.

    Valid for conformal p-values that share one calibration set (Bates et al. 2023: they are positively dependent).
    """
    p = _numbers(p, "p-value")
    if ((p < 0) | (p > 1)).any():
        raise UsageError(f"{p[(p < 0) | (p > 1)][0]:g} is no p-value; p-values lie in [0, 1].")
    return np.asarray(false_discovery_control(p, method="bh"), dtype=float)


@dataclass(frozen=True, slots=True)
class Threshold:
    """A threshold at a stated false-positive rate; a prompt is above it when score > ``value``.

    Attributes:
        value: The threshold, one of the ordinary scores.
        interval: Distribution-free interval of the (1 − fpr) quantile that the threshold estimates. Its upper bound is
            ∞ when there are too few ordinary prompts to have one.
        fpr: The stated rate.
        realized: What the rate really is, see :func:`realized_fpr`.
        n: Number of ordinary scores.
    """

    value: float
    interval: Interval
    fpr: float
    realized: Interval
    n: int


def threshold_at_fpr(ordinary: Numbers, fpr: float = 0.01, *, confidence: float = 0.95) -> Threshold:
    """The threshold that a further ordinary prompt exceeds with probability ≤ ``fpr``.

    It is the m-th largest of N ordinary scores with m = ⌊fpr·(N + 1)⌋, so that score > threshold exactly when
    :func:`conformal_p` ≤ fpr, ties included. The guarantee holds on average over calibration sets; ``realized`` says
    how far one set can be off.

    Raises:
        UsageError: N is too small for the stated rate.
    """
    scores = np.sort(_numbers(ordinary, "ordinary score"))
    n, m = len(scores), _allowed(len(scores), fpr)
    value = float(scores[n - m])
    bounds = quantile_test(scores, p=1 - fpr).confidence_interval(_rate("confidence", confidence))
    # NaN is scipy's word for a bound that no order statistic can give.
    low, high = (unbounded if np.isnan(x) else float(x) for x, unbounded in zip(bounds, (-np.inf, np.inf), strict=True))
    note = f"{n} ordinary scores are too few for an upper bound at this rate" if np.isnan(bounds.high) else ""
    interval = Interval(value, min(low, value), max(high, value), confidence, "binomial order statistics", note)
    return Threshold(value, interval, fpr, realized_fpr(n, fpr, confidence), n)


def realized_fpr(n: int, fpr: float, confidence: float = 0.95) -> Interval:
    """The true false-positive rate of a threshold set on ``n`` ordinary scores at a stated ``fpr``.

    The probability beyond the m-th largest of n independent scores without ties is Beta(m, n + 1 − m); with ties the
    true rate is lower still. ``value`` is the mean, m/(n + 1) ≤ fpr.
    """
    m = _allowed(n, fpr)
    tail = (1 - _rate("confidence", confidence)) / 2
    low, high = beta.ppf([tail, 1 - tail], m, n + 1 - m)
    return Interval(m / (n + 1), float(low), float(high), confidence, "Beta law of an order statistic")


def require_enough(n: int, fpr: float) -> None:
    """Refuse a false-positive rate that n ordinary scores cannot state, before any of them is computed.

    Raises:
        UsageError: with how many it takes, and which rate they can state.
    """
    _allowed(n, fpr)


def least_ordinary(fpr: float) -> int:
    """How many ordinary prompts a threshold at this false-positive rate needs: 99 for 1 %."""
    n = round(min(1 / _rate("fpr", fpr), 1e18))  # a rate near the smallest float has no reciprocal
    return n - 1 if 1 / n <= fpr else n


def borderline(score: float, threshold: float, rtol: float) -> bool:
    """Whether ``score`` is within rounding of ``threshold``: another batch size or machine may flip the call."""
    return bool(np.isclose(_scalar(score), threshold, rtol=rtol, atol=0))


def rounding(dtype: str) -> float:
    """Relative rounding to expect of a score computed by a model in ``dtype``: √ε of the dtype.

    A score is the norm of a small difference between two large predictions, and such a difference keeps about half of
    the digits: 3e-4 in float32, 3e-2 in float16, 9e-2 in bfloat16.
    """
    bits = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}
    name = dtype.removeprefix("torch.")
    if name not in bits:
        raise UnknownName("dtype", name, bits)
    return 2.0 ** (-bits[name] / 2)


def _numbers(values: Numbers, what: str, *, columns: bool = False) -> np.ndarray:
    """float64, one row per case, no NaN."""
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 and not (columns and array.ndim == 2):
        raise UsageError(f"the {what}s have shape {array.shape}; give one number per prompt.")
    bad = np.isnan(array).any(axis=tuple(range(1, array.ndim)))
    if bad.any():
        raise UsageError(
            f"{what} {bad.argmax()} of {len(array)} is NaN ({bad.sum()} in all); "
            "leave failed samples out before asking for statistics."
        )
    return array


def _scalar(score: float) -> float:
    return float(_numbers([score], "score")[0])


def _labelled(scores: Numbers, labels: Numbers, *, columns: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Scores as float64, labels as bool, of equal length and with both classes."""
    scores, labels = _numbers(scores, "score", columns=columns), np.asarray(labels)
    if labels.shape != scores.shape[:1]:
        raise UsageError(f"{len(scores)} scores for {labels.size} labels; give one label per score.")
    if labels.dtype != bool and not np.isin(labels, (0, 1)).all():
        raise UsageError(
            f"labels must be True (memorized) or False (ordinary), not {labels[~np.isin(labels, (0, 1))][0]!r}."
        )
    labels = labels.astype(bool)
    positives = int(labels.sum())
    if positives in (0, len(labels)):
        raise UsageError(
            f"{positives} memorized and {len(labels) - positives} ordinary prompts: a ROC needs at least one of each."
        )
    return scores, labels


def _units(
    labels: np.ndarray, clusters: Sequence[int | str] | np.ndarray | None
) -> tuple[Int[np.ndarray, " row"], list[int]]:
    """The number of each row's (class, cluster), ordinary ones first, and how many there are in each class."""
    cluster = np.arange(len(labels)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    if cluster.shape != labels.shape:
        raise UsageError(f"{len(labels)} labels for {cluster.size} clusters; give one cluster per score.")
    names, unit = np.unique(labels * (cluster.max() + 1) + cluster, return_inverse=True)
    ordinary = int((names <= cluster.max()).sum())
    sizes = [ordinary, len(names) - ordinary]
    if min(sizes) < 2:
        raise UsageError(
            f"{sizes[1]} independent clusters of memorized and {sizes[0]} of ordinary prompts: "
            "an interval needs at least two of each; add prompts that are not near-duplicates."
        )
    return unit, sizes


def _resampled(
    unit: np.ndarray, sizes: list[int], resamples: int, rng: np.random.Generator
) -> Iterator[Int[np.ndarray, " drawn"]]:
    """Row numbers of each resample; a row comes as often as its cluster was drawn."""
    rows = np.arange(len(unit))
    for times in _times(unit, sizes, resamples, rng):
        yield np.repeat(rows, times)


def _times(
    unit: np.ndarray, sizes: list[int], resamples: int, rng: np.random.Generator
) -> Iterator[Int[np.ndarray, " row"]]:
    """How often each row comes in each resample."""
    if resamples < 1:
        raise UsageError(f"resamples = {resamples} gives no interval; 1000 is usual.")
    for _ in range(resamples):
        yield np.concatenate([np.bincount(rng.integers(k, size=k), minlength=k) for k in sizes])[unit]


def _exact(k: int, n: int, confidence: float, alternative: str) -> tuple[float, float]:
    if not 0 <= k <= n or n < 1:
        raise UsageError(f"{k} of {n} is no share; give 0 ≤ k ≤ n and at least one case.")
    test = binomtest(int(k), int(n), alternative=alternative)
    bounds = test.proportion_ci(_rate("confidence", confidence), method="exact")
    return float(bounds.low), float(bounds.high)


def _rate(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise UsageError(f"{name} = {value:g} is not a rate strictly between 0 and 1; write 0.01 for 1 %.")
    return float(value)


def _allowed(n: int, fpr: float) -> int:
    """m = ⌊fpr·(n + 1)⌋ ≥ 1: the rank, from the top, of the threshold among n ordinary scores."""
    # Counted as p-values are, because in binary 0.29 · 100 is a little less than 29.
    m = int((np.arange(1, n + 2) / (n + 1) <= _rate("fpr", fpr)).sum())
    if m < 1:
        reach = math.ceil(1000 / (n + 1)) / 1000  # rounded up, so that it works
        raise UsageError(
            f"{n} ordinary scores cannot state a false-positive rate of {fpr:g}: give at least {least_ordinary(fpr)}"
            + (f", or state a rate of {reach:g} or more." if reach < 1 else ".")
        )
    return m
