"""The numbers of the first screen: from rows, thresholds and the manifest of a run, each with its interval.

One :class:`Summary` feeds the terminal, the page, Markdown and JSON, so that they cannot disagree. The words are chosen here as
well: a prompt has a *score*, it is *above threshold* at a stated false-positive rate, or a *copy* was *found* under a named
descriptor in *k of n seeds*; what was not tested is listed, and finding nothing comes with the bound that n allows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from .. import stats
from ..errors import RunError, UsageError
from ..records.schema import Manifest, Nearest, Row, Thresholds
from ..records.store import Run
from ..records.table import PromptScore, prompt_scores
from .svg import percent

__all__ = ["Baseline", "Discrimination", "Figure", "Finding", "Group", "Share", "Shot", "Summary", "read_summary", "summarize"]

FALSE_DISCOVERIES = 0.05
"""Expected share of false calls among the prompts that stay after Benjamini and Hochberg's correction."""

WORST = 100
"""How many prompts the exports list one by one; all others are in ``samples.jsonl``."""


# What a summary is made of ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """k of n prompts, with the exact (Clopper–Pearson) 95 % interval; for k = 0 ``upper`` is the one-sided bound."""

    k: int
    n: int
    low: float
    high: float
    upper: float

    @classmethod
    def of(cls, k: int, n: int) -> Share:
        """The share k/n; with n = 0 nothing is known."""
        if n == 0:
            return cls(0, 0, 0.0, 1.0, 1.0)
        both = stats.clopper_pearson(k, n)
        return cls(k, n, both.low, both.high, stats.upper_bound(k, n).high)

    @property
    def bounds(self) -> str:
        """``95 % interval 5.5–57 %``, or for none ``95 % upper bound 22 %``."""
        if self.k == 0:
            return f"95 % upper bound {percent(self.upper)}"
        low, high = percent(self.low), percent(self.high)
        return f"95 % interval {low.removesuffix(' %')}–{high}"

    @property
    def words(self) -> str:
        """``3 of 12 (25 %, 95 % interval 5.5–57 %)``, or ``none found among 12 (95 % upper bound 22 %)``."""
        if self.n == 0:
            return "not tested"
        if self.k == 0:
            return f"none found among {self.n:,} ({self.bounds})"
        return f"{self.k:,} of {self.n:,} ({percent(self.k / self.n)}, {self.bounds})"


@dataclass(frozen=True)
class Shot:
    """One generated sample: what its row says about picture and score."""

    seed: int
    score: float | None
    image: str | None
    nearest: Nearest | None


@dataclass(frozen=True, eq=False)
class Finding:
    """One prompt, over all its seeds.

    Attributes:
        prompt_id: Its id.
        prompt: Its text, as it stands in the rows.
        group: Its group in the prompt source.
        label: Known ground truth, or None.
        seeds: Seeds that gave a result.
        failed: Seeds that failed.
        score: Mean score over the seeds; None: nothing was scored.
        p: Conformal p-value against ordinary prompts; None: not calibrated, or too few seeds to compare.
        q: p, adjusted for the number of prompts (Benjamini–Hochberg).
        above: Score above the threshold; None as for ``p``.
        borderline: The score is within rounding of the threshold: another machine may call it differently.
        copies: Seeds with a copy found.
        compared: Seeds whose picture was compared with references under a calibrated descriptor.
        dropped: Tokens of the prompt that the encoder never saw.
        fpr: The false-positive rate that ``above`` refers to.
        steps: Mean score at each step, ``[step]``.
        shots: The samples, those with a copy first, then by similarity.
    """

    prompt_id: str
    prompt: str
    group: str | None
    label: bool | None
    seeds: int
    failed: int
    score: float | None
    p: float | None
    q: float | None
    above: bool | None
    borderline: bool
    copies: int
    compared: int
    dropped: int
    fpr: float | None
    steps: np.ndarray
    shots: tuple[Shot, ...]

    @property
    def best(self) -> Nearest | None:
        """The nearest reference over all seeds."""
        return next((shot.nearest for shot in self.shots if shot.nearest is not None), None)

    @property
    def severity(self) -> tuple[bool, bool, int, float]:
        """Larger is worse: a copy found before none, above threshold before not, then more seeds, then the score."""
        score = -math.inf if self.score is None else self.score
        return self.copies > 0, bool(self.above), self.copies, score

    @property
    def score_words(self) -> str:
        """``above threshold at 1 % FPR (p = 0.005)``, and what else can be said about the score."""
        if self.score is None:
            return "no score: every seed failed" if self.failed and not self.seeds else "not scored"
        if self.above is None or self.fpr is None:
            return "score only, not calibrated" if self.fpr is None else f"not judged: {_of(self.seeds, self.failed)} seeds"
        where = "above" if self.above else "not above"
        words = f"{where} threshold at {percent(self.fpr)} FPR (p = {self.p:.2g})"
        return words + (", borderline: within rounding of it" if self.borderline else "")

    @property
    def copy_words(self) -> str:
        """``copy found (pixels 0.93, reference #17) in 3 of 4 seeds``, or why there is none."""
        best = self.best
        if best is None:
            return "copies: not tested"
        named = f"{best.descriptor} {best.similarity:.2f}, reference {_reference(best.reference)}"
        if not self.compared:
            return f"nearest {named}; not calibrated, so no copy is called"
        if not self.copies:
            return f"no copy found in {self.compared} of {self.seeds} seeds (nearest {named})"
        return f"copy found ({named}) in {self.copies} of {self.compared} seeds"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        best = self.best
        return {
            "prompt_id": self.prompt_id,
            "prompt": self.prompt,
            "group": self.group,
            "label": self.label,
            "seeds": self.seeds,
            "failed": self.failed,
            "score": self.score,
            "p": self.p,
            "q": self.q,
            "above": self.above,
            "borderline": self.borderline,
            "copies": self.copies,
            "compared": self.compared,
            "nearest": None if best is None else best.model_dump(),
            "tokens_dropped": self.dropped,
            "words": [self.score_words, self.copy_words],
        }


@dataclass(frozen=True)
class Figure:
    """One of the three numbers of the first screen, with what it means."""

    name: str
    share: Share | None
    """None: not tested."""
    meaning: str
    detail: str = ""

    @property
    def words(self) -> str:
        """The number with its interval, or ``not tested``."""
        return "not tested" if self.share is None else self.share.words


@dataclass(frozen=True)
class Group:
    """One row of the group table."""

    name: str
    prompts: int
    median: float | None
    above: Share | None
    copies: Share | None
    dose: int | None
    """Copies of each picture in training, where known."""


@dataclass(frozen=True)
class Baseline:
    """What the wording alone can tell: out-of-fold scores per prompt text, and clusters of near-duplicate prompts."""

    scores: Mapping[str, float]
    clusters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Discrimination:
    """How well one score separates prompts of known label."""

    name: str
    positives: int
    negatives: int
    auc: stats.Interval
    tpr: stats.Interval
    """True-positive rate at a false-positive rate strictly below 1 %."""
    roc: stats.Roc


@dataclass(frozen=True, eq=False)
class Summary:
    """Everything that a report says about one run. ``str(summary)`` is its headline.

    Attributes:
        name: Name of the run folder.
        manifest: The run's manifest.
        detector: Name of the score; None: the run has none.
        space: Space of the predictions that were compared.
        thresholds: Where the threshold comes from; None: not calibrated.
        seeds: Seeds per prompt.
        rows: Samples in the run, failed ones included.
        findings: All prompts, worst first.
        figures: The three numbers: above threshold, copy found, both.
        significant: Prompts that stay after the correction for many prompts; None: not calibrated.
        groups: The group table; empty without groups.
        discrimination: AUC and TPR of the detector and of the text-only baseline; empty without labels.
        untested: What was not tested, and why, in sentences.
    """

    name: str
    manifest: Manifest
    detector: str | None
    space: str | None
    thresholds: Thresholds | None
    seeds: int
    rows: int
    findings: list[Finding]
    figures: tuple[Figure, Figure, Figure]
    significant: int | None
    groups: list[Group]
    discrimination: list[Discrimination]
    untested: list[str]

    def __str__(self) -> str:
        return self.headline

    @property
    def above(self) -> Share | None:
        """Prompts above threshold; None: not calibrated."""
        return self.figures[0].share

    @property
    def copies(self) -> Share | None:
        """Prompts with a copy found in at least one seed; None: not tested."""
        return self.figures[1].share

    @property
    def headline(self) -> str:
        """One sentence: the strongest thing that can be said, with its interval."""
        seeds = f"{self.seeds} seed each" if self.seeds == 1 else f"{self.seeds} seeds each"
        if self.copies is not None:
            return self._copies_sentence(seeds)
        if self.above is not None:
            return self._above_sentence() + f", on {seeds}."
        scored = sum(f.score is not None for f in self.findings)
        return f"{_prompts(scored)} {'was' if scored == 1 else 'were'} scored, on {seeds}; there is no threshold, so only their order means something."

    @property
    def subline(self) -> str:
        """The second sentence, where there is more to say."""
        return self._above_sentence() + "." if self.copies is not None and self.above is not None else ""

    def _copies_sentence(self, seeds: str) -> str:
        share = self.copies
        assert share is not None
        if share.k == 0:
            return f"No copy of a reference image was found among {_prompts(share.n)}, on {seeds} ({share.bounds})."
        return f"A copy of a reference image was found for {share.k:,} of {_prompts(share.n)} ({share.bounds}), on {seeds}."

    def _above_sentence(self) -> str:
        share, fpr = self.above, self.thresholds.fpr if self.thresholds else math.nan
        assert share is not None
        chance = f"{_expected(share.n * fpr)} would by chance"
        if share.k == 0:
            return f"None of {_prompts(share.n)} scores above the threshold for {percent(fpr)} false positives ({share.bounds}); {chance}"
        verb = "scores" if share.k == 1 else "score"
        return f"{share.k:,} of {_prompts(share.n)} {verb} above the threshold for {percent(fpr)} false positives ({share.bounds}); {chance}"

    @property
    def worst(self) -> list[Finding]:
        """The first :data:`WORST` findings."""
        return self.findings[:WORST]

    def copies_in(self, k: int) -> int:
        """Prompts with a copy found in at least k seeds."""
        return sum(f.copies >= k for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: no NaN, no infinity (None stands for them), the worst prompts only."""
        out = {
            "format": 1,
            "run": self.name,
            "headline": self.headline,
            "subline": self.subline,
            "detector": self.detector,
            "space": self.space,
            "prompts": len(self.findings),
            "seeds": self.seeds,
            "rows": self.rows,
            "above_threshold": _share(self.above),
            "copy_found": _share(self.copies),
            "both": _share(self.figures[2].share),
            "copies_in_at_least": {str(k): self.copies_in(k) for k in range(1, self.seeds + 1)} if self.copies else {},
            "significant": self.significant,
            "false_discovery_rate": FALSE_DISCOVERIES if self.significant is not None else None,
            "threshold": _threshold(self.thresholds),
            "groups": [
                {**asdict(g), "above": _share(g.above), "copies": _share(g.copies)} for g in self.groups
            ],
            "discrimination": [
                {
                    "score": d.name,
                    "positives": d.positives,
                    "negatives": d.negatives,
                    "auc": asdict(d.auc),
                    "tpr_below_1_percent_fpr": asdict(d.tpr),
                    "roc": {"fpr": d.roc.fpr.tolist(), "tpr": d.roc.tpr.tolist(), "threshold": d.roc.threshold.tolist()},
                }
                for d in self.discrimination
            ],
            "worst": [f.to_dict() for f in self.worst],
            "not_tested": self.untested,
            "manifest": self.manifest.model_dump(mode="json"),
        }
        return _finite(out)


# From a run to a summary --------------------------------------------------------------------------------------------------


def read_summary(folder: str | Path, *, detector: str | None = None) -> Summary:
    """The summary of a run folder: its rows, and ``thresholds.json`` and ``controls.json`` where they are.

    Args:
        folder: A run folder.
        detector: Which score; None: the calibrated one, else the first one of the run.

    Raises:
        RunError: the folder holds no run, or a file of it is damaged.
        UnknownName: the run has no such score.
    """
    run = Run(folder)
    thresholds = _load(run.folder / "thresholds.json", Thresholds.model_validate_json)
    baseline = _load(run.folder / "controls.json", _baseline)
    return summarize(_Rows(run), run.manifest, thresholds, baseline, detector=detector, name=run.folder.resolve().name)


def summarize(
    rows: Iterable[Row],
    manifest: Manifest,
    thresholds: Thresholds | None = None,
    baseline: Baseline | None = None,
    *,
    detector: str | None = None,
    name: str = "run",
) -> Summary:
    """Summarize rows.

    Args:
        rows: The samples; iterated twice, so a list or an object that can start over, not a generator.
        manifest: The run's manifest.
        thresholds: Scores of ordinary prompts of the same model and setting.
        baseline: Scores of the text-only baseline.
        detector: Which score; None: the calibrated one, else the first one seen.
        name: What to call the run.

    Raises:
        UsageError: ``rows`` can be iterated only once.
        UnknownName: the rows have no such score.
    """
    if isinstance(rows, Iterator):
        raise UsageError("summarize reads the rows twice: give a list, or a Run through read_summary, not a generator.")
    evidence, names = _gather(rows)
    chosen = detector or (thresholds.detector if thresholds and thresholds.detector in names else next(iter(names), None))
    strange = thresholds is not None and thresholds.detector != chosen
    used = None if strange else thresholds
    scored = {} if chosen is None else {(s.prompt_id, s.prompt): s for s in prompt_scores(rows, chosen)}
    seeds = _seeds(used, evidence)
    findings = _findings(evidence, scored, chosen, used, seeds, _rounding(manifest))
    judged = _discriminations(findings, chosen, baseline)
    untested = list(_untested(manifest, findings, used, seeds, evidence))
    if strange and thresholds is not None:
        untested.insert(0, f"The thresholds belong to {thresholds.detector}, the scores shown to {chosen}; they were not used.")
    if isinstance(judged, str):
        untested.append(judged)
    q = [f.q for f in findings if f.q is not None]
    return Summary(
        name=name,
        manifest=manifest,
        detector=chosen,
        space=next((s.space for s in scored.values()), None),
        thresholds=used,
        seeds=seeds,
        rows=sum(e.ok + e.failed for e in evidence.values()),
        findings=sorted(findings, key=lambda f: f.severity, reverse=True),
        figures=_figures(findings, used, seeds),
        significant=sum(v <= FALSE_DISCOVERIES for v in q) if used else None,
        groups=_groups(findings, manifest.doses),
        discrimination=[] if isinstance(judged, str) else judged,
        untested=untested,
    )


class _Rows:
    """The rows of a run, from the start each time."""

    def __init__(self, run: Run):
        self.run = run

    def __iter__(self) -> Iterator[Row]:
        return self.run.rows()


@dataclass
class _Evidence:
    """What the rows of one prompt say, apart from the score."""

    row: Row
    ok: int = 0
    failed: int = 0
    copies: int = 0
    compared: int = 0
    dropped: int = 0
    steps: dict[str, list[np.ndarray]] = field(default_factory=dict)
    shots: list[tuple[Shot, dict[str, float]]] = field(default_factory=list)

    def take(self, row: Row) -> None:
        self.dropped = max(self.dropped, row.tokens_dropped)
        if row.status == "error":
            self.failed += 1
            return
        self.ok += 1
        if row.nearest is not None and row.nearest.copy_found is not None:
            self.compared += 1
            self.copies += row.nearest.copy_found
        for name, score in row.scores.items():
            self.steps.setdefault(name, []).append(np.asarray(score.per_step, dtype=np.float32))
        values = {name: score.value for name, score in row.scores.items()}
        self.shots.append((Shot(row.seed, None, row.image, row.nearest), values))


def _gather(rows: Iterable[Row]) -> tuple[dict[tuple[str, str], _Evidence], list[str]]:
    """Evidence per prompt, in the order of first appearance, and the names of all scores."""
    found: dict[tuple[str, str], _Evidence] = {}
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row.scores)
        key = (row.prompt_id, row.prompt)
        if key not in found:
            found[key] = _Evidence(row.model_copy(update={"scores": {}, "nearest": None}))
        found[key].take(row)
    return found, list(names)


def _seeds(thresholds: Thresholds | None, evidence: Mapping[tuple[str, str], _Evidence]) -> int:
    """Seeds that a prompt must have to be judged: what the calibration used, else the most that any prompt has."""
    asked = thresholds.setting.get("seeds") if thresholds else None
    return asked if isinstance(asked, int) else max((e.ok for e in evidence.values()), default=0)


def _rounding(manifest: Manifest) -> float:
    """Relative rounding of a score under the run's dtype; that of float32 when the run does not say."""
    dtype = str(manifest.target.get("dtype") or manifest.machine.get("dtype") or "float32").removeprefix("torch.")
    return stats.rounding(dtype) if dtype in ("float64", "float32", "float16", "bfloat16") else stats.rounding("float32")


def _findings(
    evidence: Mapping[tuple[str, str], _Evidence],
    scored: Mapping[tuple[str, str], PromptScore],
    detector: str | None,
    thresholds: Thresholds | None,
    seeds: int,
    rtol: float,
) -> list[Finding]:
    """One finding per prompt; p-values for those with as many seeds as the calibration had."""
    comparable = [key for key, s in scored.items() if len(s.values) == seeds] if thresholds else []
    judged = dict(zip(comparable, _judge([scored[k].score for k in comparable], thresholds, rtol), strict=True))
    return [_finding(e, scored.get(key), detector, judged.get(key), thresholds) for key, e in evidence.items()]


@dataclass(frozen=True)
class _Verdict:
    p: float
    q: float
    above: bool
    borderline: bool


def _judge(scores: Sequence[float], thresholds: Thresholds | None, rtol: float) -> list[_Verdict]:
    """p, adjusted p and the call for each score; the adjustment is over exactly these scores."""
    if thresholds is None or not scores:
        return []
    p = stats.conformal_p(scores, thresholds.scores)
    q = stats.benjamini_hochberg(p)
    line = thresholds.threshold
    return [
        _Verdict(float(a), float(b), s > line, stats.borderline(s, line, rtol)) for s, a, b in zip(scores, p, q, strict=True)
    ]


def _finding(
    e: _Evidence, scored: PromptScore | None, detector: str | None, verdict: _Verdict | None, thresholds: Thresholds | None
) -> Finding:
    shots = [Shot(s.seed, values.get(detector or ""), s.image, s.nearest) for s, values in e.shots]
    return Finding(
        prompt_id=e.row.prompt_id,
        prompt=e.row.prompt,
        group=e.row.group,
        label=e.row.label,
        seeds=e.ok,
        failed=e.failed,
        score=scored.score if scored else None,
        p=verdict.p if verdict else None,
        q=verdict.q if verdict else None,
        above=verdict.above if verdict else None,
        borderline=verdict.borderline if verdict else False,
        copies=e.copies,
        compared=e.compared,
        dropped=e.dropped,
        fpr=thresholds.fpr if thresholds else None,
        steps=_mean_steps(e.steps.get(detector or "", [])),
        shots=tuple(sorted(shots, key=_closeness, reverse=True)),
    )


def _mean_steps(curves: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over seeds of the per-step scores, up to the step that all seeds reached."""
    length = min((len(c) for c in curves), default=0)
    return np.mean([c[:length] for c in curves], axis=0) if length else np.empty(0, dtype=np.float32)


def _closeness(shot: Shot) -> tuple[bool, float, int]:
    if shot.nearest is None:
        return False, -math.inf, -shot.seed
    return bool(shot.nearest.copy_found), shot.nearest.similarity, -shot.seed


# The first screen ---------------------------------------------------------------------------------------------------------


def _figures(findings: Sequence[Finding], thresholds: Thresholds | None, seeds: int) -> tuple[Figure, Figure, Figure]:
    above, copies = _above(findings), _copies(findings)
    both = [f for f in findings if f.above is not None and f.compared]
    joint = Share.of(sum(bool(f.above) and f.copies > 0 for f in both), len(both)) if above and copies and both else None
    copied = sum(f.copies > 0 for f in both)
    return (
        Figure("Above threshold", above, _above_meaning(thresholds), _above_detail(findings, thresholds)),
        Figure(
            "Copy found",
            copies,
            "An image generated from the prompt is at least as similar to a reference image as the descriptor's threshold asks, "
            "in at least one seed.",
            _copies_detail(findings, seeds) if copies else "",
        ),
        Figure(
            "Both",
            joint,
            "The score is above the threshold and a copy was found: two kinds of evidence that do not use each other.",
            f"of {_prompts(copied)} with a copy found, the score flagged {joint.k:,}" if joint and copied else "",
        ),
    )


def _above(findings: Iterable[Finding]) -> Share | None:
    judged = [f for f in findings if f.above is not None]
    return Share.of(sum(bool(f.above) for f in judged), len(judged)) if judged else None


def _copies(findings: Iterable[Finding]) -> Share | None:
    compared = [f for f in findings if f.compared]
    return Share.of(sum(f.copies > 0 for f in compared), len(compared)) if compared else None


def _above_meaning(thresholds: Thresholds | None) -> str:
    if thresholds is None:
        return "Needs the scores of ordinary prompts of the same model."
    return (
        f"The score exceeds {thresholds.threshold:.3g}, which ordinary prompts of this model exceed in at most "
        f"{percent(thresholds.fpr)} of cases."
    )


def _above_detail(findings: Sequence[Finding], thresholds: Thresholds | None) -> str:
    q = [f.q for f in findings if f.q is not None]
    if thresholds is None or not q:
        return ""
    kept = sum(v <= FALSE_DISCOVERIES for v in q)
    return f"{kept:,} stay after correction for {_prompts(len(q))} (Benjamini–Hochberg, {percent(FALSE_DISCOVERIES)} false discoveries)"


def _copies_detail(findings: Sequence[Finding], seeds: int) -> str:
    if seeds < 2:
        return ""
    counts = [f"{sum(f.copies >= k for f in findings):,} in at least {k}" for k in range(2, min(seeds, 4))]
    return "; ".join([*counts, f"{sum(f.copies >= seeds for f in findings):,} in all {seeds} seeds"])


def _groups(findings: Sequence[Finding], doses: Mapping[str, int]) -> list[Group]:
    names = list(dict.fromkeys(f.group for f in findings))
    if names in ([], [None]):
        return []
    return [_group(name, [f for f in findings if f.group == name], doses) for name in names]


def _group(name: str | None, members: Sequence[Finding], doses: Mapping[str, int]) -> Group:
    scores = [f.score for f in members if f.score is not None]
    middle = float(np.median(scores)) if scores else None
    dose = None if name is None else doses.get(name)
    return Group(name or "(no group)", len(members), middle, _above(members), _copies(members), dose)


# Known labels -------------------------------------------------------------------------------------------------------------


def _discriminations(findings: Sequence[Finding], detector: str | None, baseline: Baseline | None) -> list[Discrimination] | str:
    """AUC and TPR of the detector, then of the text-only baseline on the same prompts; a sentence where labels do not allow it."""
    known = [f for f in findings if f.label is not None and f.score is not None]
    if not known or detector is None:
        return []
    labels = [bool(f.label) for f in known]
    clusters = [baseline.clusters.get(f.prompt, -1 - i) for i, f in enumerate(known)] if baseline else None
    try:
        out = [_discriminate(detector, [f.score for f in known if f.score is not None], labels, clusters)]
    except UsageError as e:
        return f"How well the score separates labeled prompts was not computed: {e}"
    text = [] if baseline is None else [baseline.scores.get(f.prompt) for f in known]
    values = [v for v in text if v is not None]
    if values and len(values) == len(known):
        out.append(_discriminate("text only", values, labels, clusters))
    return out


def _discriminate(name: str, scores: Sequence[float], labels: Sequence[bool], clusters: Sequence[int] | None) -> Discrimination:
    tpr = partial(stats.tpr_at_fpr, fpr=0.01)
    return Discrimination(
        name,
        sum(labels),
        len(labels) - sum(labels),
        stats.cluster_bootstrap(stats.auc, scores, labels, clusters),
        stats.cluster_bootstrap(tpr, scores, labels, clusters),
        stats.roc(scores, labels),
    )


# What was not tested ------------------------------------------------------------------------------------------------------


def _untested(
    manifest: Manifest,
    findings: Sequence[Finding],
    thresholds: Thresholds | None,
    seeds: int,
    evidence: Mapping[tuple[str, str], _Evidence],
) -> Iterator[str]:
    """Sentences, the gravest first."""
    rows = sum(e.ok + e.failed for e in evidence.values())
    if manifest.status != "done":
        yield f"The run is {manifest.status}: {rows:,} of {manifest.asked:,} samples are there."
    failed = sum(f.failed for f in findings)
    if failed:
        lost = sum(not f.seeds for f in findings)
        yield f"{failed:,} of {rows:,} samples failed; {_prompts(lost)} {_have(lost)} no result at all."
    if thresholds is None and any(f.score is not None for f in findings):
        yield "Scores are not calibrated for this model: their order means something, a verdict does not. Run `mnemoscope calibrate`."
    if thresholds is not None:
        yield from _unjudged(findings, thresholds, seeds)
    yield from _uncompared(findings)
    truncated = sum(f.dropped > 0 for f in findings)
    if truncated:
        yield f"{_prompts(truncated)} {_have(truncated)} more tokens than the encoder can see; what lies beyond was not tested."
    if seeds and any(f.compared for f in findings):
        chance = 0.9**seeds
        yield (
            f"Other seeds: a prompt that gives a copy in 1 of 10 seeds is missed with probability {percent(chance)} "
            f"when {seeds} {'is' if seeds == 1 else 'are'} tried."
        )
    yield from manifest.notes


def _unjudged(findings: Sequence[Finding], thresholds: Thresholds, seeds: int) -> Iterator[str]:
    few = sum(f.score is not None and f.above is None for f in findings)
    if few:
        yield f"{_prompts(few)} {_have(few)} other than {seeds} seeds, which the threshold is made for, and {'was' if few == 1 else 'were'} not judged."
    close = sum(f.borderline for f in findings)
    if close:
        yield f"{_prompts(close)} {'is' if close == 1 else 'are'} borderline: within rounding of the threshold, so another machine may call {'it' if close == 1 else 'them'} differently."
    n = len(thresholds.scores)
    try:
        true = stats.realized_fpr(n, thresholds.fpr)
    except UsageError:
        return
    yield (
        f"The threshold rests on {_prompts(n, 'ordinary prompt')}: its true false-positive rate lies between "
        f"{percent(true.low)} and {percent(true.high)} (95 %), and no p-value can be below {1 / (n + 1):.2g}."
    )


def _uncompared(findings: Sequence[Finding]) -> Iterator[str]:
    near, compared = sum(f.best is not None for f in findings), sum(f.compared > 0 for f in findings)
    if not near:
        yield "No reference images were given, so whether an image is a copy was not tested."
        return
    if not compared:
        yield "The descriptor is not calibrated, so similarities are listed and no copy is called."
    elif compared < len(findings):
        yield f"{_prompts(len(findings) - compared)} of {len(findings):,} {_have(len(findings) - compared)} no image that was compared with references."
    yield "A copy of an image outside the reference set cannot be found."


# Small words --------------------------------------------------------------------------------------------------------------


def _prompts(n: int, noun: str = "prompt") -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _have(n: int) -> str:
    return "has" if n == 1 else "have"


def _of(seeds: int, failed: int) -> str:
    return f"{seeds} of {seeds + failed}"


def _expected(count: float) -> str:
    return "fewer than 1" if count < 0.95 else f"about {count:.0f}"


def _reference(name: str) -> str:
    return f"#{name}" if name.isdigit() else name


def _share(share: Share | None) -> dict[str, Any] | None:
    return None if share is None else {**asdict(share), "words": share.words}


def _threshold(thresholds: Thresholds | None) -> dict[str, Any] | None:
    if thresholds is None:
        return None
    return {**thresholds.model_dump(exclude={"scores"}), "ordinary_prompts": len(thresholds.scores)}


def _finite(value: Any) -> Any:
    """JSON has no infinity: None stands for it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _load(path: Path, read: Callable[[bytes], Any]) -> Any:
    """What a file of the run holds, or None where there is no such file."""
    if not path.exists():
        return None
    try:
        return read(path.read_bytes())
    except (OSError, ValueError, ValidationError) as e:
        raise RunError(f"{path} cannot be read ({str(e).splitlines()[0]}); restore it, or delete it to go without.") from e


def _baseline(data: bytes) -> Baseline:
    content = json.loads(data)
    return Baseline({k: float(v) for k, v in content["scores"].items()}, content.get("clusters", {}))
