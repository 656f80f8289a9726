"""What is known about one prompt, over all its seeds; and about k of n prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import stats
from ..records import tally
from ..records.schema import Manifest, Nearest, Row, Thresholds
from ..records.store import known_differences
from ..records.table import PromptScore
from .words import percent, reference


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
        templates: Seeds with a template copy found: most of a reference, not the whole of it.
        layouts: Seeds whose layout was compared under a calibrated threshold.
        dropped: Tokens of the prompt that the encoder never saw.
        fpr: The false-positive rate that ``above`` refers to.
        foreign: The threshold was made under another setting than the run's.
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
    templates: int
    layouts: int
    dropped: int
    fpr: float | None
    foreign: bool
    steps: np.ndarray
    shots: tuple[Shot, ...]

    @property
    def best(self) -> Nearest | None:
        """The nearest reference over all seeds."""
        return next((shot.nearest for shot in self.shots if shot.nearest is not None), None)

    @property
    def severity(self) -> tuple[int, int, bool, float]:
        """Larger is worse: more seeds with a copy found, then with a template copy, then above threshold before not, then the score."""
        return self.copies, self.templates, bool(self.above), -math.inf if self.score is None else self.score

    @property
    def score_words(self) -> str:
        """``above threshold at 1 % FPR (p = 0.005)``, and what else can be said about the score."""
        if self.score is None:
            return "no score: every seed failed" if self.failed and not self.seeds else "not scored"
        if self.fpr is None:
            return "score only, not calibrated"
        if self.above is None:
            return f"not judged: that takes another number of seeds than {self.seeds}"
        where, at = "above" if self.above else "not above", f"{percent(self.fpr)} FPR (p = {self.p:.2g})"
        words = (
            f"{where} a threshold made under another setting, where it means {at}"
            if self.foreign
            else f"{where} threshold at {at}"
        )
        return words + (", borderline: within rounding of it" if self.borderline else "")

    @property
    def copy_words(self) -> str:
        """``copy found (pixels 0.93, reference #17) in 3 of 4 seeds``, or why there is none."""
        best = self.best
        if best is None:
            return "copies: not tested"
        beside = "" if best.reconstruction is None else f" ({best.reconstruction:.2f} to its reconstruction)"
        named = f"{best.descriptor} {best.similarity:.2f}{beside}, reference {reference(best.reference)}"
        if not self.compared:
            return f"nearest {named}; not calibrated, so no copy is called"
        if not self.copies:
            return f"no copy found in {self.compared} of {self.seeds} seeds (nearest {named})"
        return f"copy found ({named}) in {self.copies} of {self.compared} seeds"

    @property
    def template_words(self) -> str:
        """``template copy (layout 0.91, reference #17) in 2 of 4 seeds``; empty: none, or not tested."""
        if not self.templates:
            return ""
        found = [n for shot in self.shots if (n := shot.nearest) is not None and n.template_found]
        best = max(found, key=lambda n: n.layout or 0.0)
        named = f"layout {best.layout or 0.0:.2f}, reference {reference(str(best.layout_reference))}"
        return f"template copy ({named}) in {self.templates} of {self.layouts} seeds"

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
            "threshold_of_another_setting": self.foreign,
            "copies": self.copies,
            "compared": self.compared,
            "templates": self.templates,
            "nearest": None if best is None else best.model_dump(),
            "tokens_dropped": self.dropped,
            "words": [words for words in (self.score_words, self.copy_words, self.template_words) if words],
        }


# From rows to findings ----------------------------------------------------------------------------------------------------


@dataclass
class Evidence:
    """What the rows of one prompt say, apart from the score."""

    row: Row
    ok: int = 0
    failed: int = 0
    copies: int = 0
    compared: int = 0
    templates: int = 0
    layouts: int = 0
    dropped: int = 0
    steps: dict[str, list[np.ndarray]] = field(default_factory=dict)
    shots: list[tuple[Shot, dict[str, float]]] = field(default_factory=list)

    def take(self, row: Row) -> None:
        """Add one row."""
        self.dropped = max(self.dropped, row.tokens_dropped)
        if row.status == "error":
            self.failed += 1
            return
        self.ok += 1
        if row.nearest is not None and row.nearest.copy_found is not None:
            self.compared += 1
            self.copies += row.nearest.copy_found
        if row.nearest is not None and row.nearest.template_found is not None:
            self.layouts += 1
            self.templates += row.nearest.template_found
        for name, score in row.scores.items():
            self.steps.setdefault(name, []).append(np.asarray(score.per_step, dtype=np.float32))
        values = {name: score.value for name, score in row.scores.items()}
        self.shots.append((Shot(row.seed, None, row.image, row.nearest), values))


def gather(rows: Iterable[Row]) -> tuple[dict[tuple[str, str], Evidence], list[str]]:
    """Evidence per prompt, in the order of first appearance, and the names of all scores."""
    found: dict[tuple[str, str], Evidence] = {}
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row.scores)
        key = (row.prompt_id, row.prompt)
        if key not in found:
            found[key] = Evidence(row.model_copy(update={"scores": {}, "nearest": None}))
        found[key].take(row)
    return found, list(names)


def seeds_of(evidence: Mapping[tuple[str, str], Evidence]) -> int:
    """Seeds per prompt: the most that any prompt has."""
    return max((e.ok for e in evidence.values()), default=0)


def seeds_to_judge(thresholds: Thresholds | None, manifest: Manifest, seeds: int) -> int:
    """Seeds that a prompt must have to be judged: as many as the calibration used.

    A threshold that was accepted across settings judges the number that the run was asked for.
    """
    asked = manifest.config if manifest.accepted else thresholds.setting if thresholds else {}
    n = asked.get("seeds")
    return n if isinstance(n, int) else seeds


def other_setting(thresholds: Thresholds | None, manifest: Manifest) -> list[str]:
    """Where the threshold was made under another setting than the run's, as ``guidance: was 7.5, now 3``."""
    if thresholds is None:
        return []
    method = dict(manifest.setting.get("detectors", {}).get(thresholds.detector, {}))
    options = dict(method.get("options", {}))
    own = manifest.setting | {"window": options.pop("window", None), "seeds": manifest.config.get("seeds")}
    own |= {"method": {**method, "options": options} if method else None}
    # Either side may not say: runs and calibrations of earlier versions, and a bank where prompts have their own noises.
    return list(dict.fromkeys([*manifest.accepted, *known_differences(thresholds.setting, own)]))


def rounding_of(manifest: Manifest, thresholds: Thresholds | None) -> float:
    """Relative rounding within which a score and the threshold may change places: the coarser of the run's and the calibration's.

    That of float32 where neither says.
    """
    own = tally.rounding_of(manifest)
    return max(own, (thresholds.rounding if thresholds else None) or 0.0)


def findings_of(
    evidence: Mapping[tuple[str, str], Evidence],
    scored: Mapping[tuple[str, str], PromptScore],
    detector: str | None,
    thresholds: Thresholds | None,
    seeds: int,
    rtol: float,
    foreign: bool,
) -> list[Finding]:
    """One finding per prompt; p-values for those with as many seeds as it takes. ``foreign``: a threshold of another setting."""
    comparable = [key for key, s in scored.items() if len(s.values) == seeds] if thresholds else []
    judged = dict(zip(comparable, _judge([scored[k].score for k in comparable], thresholds, rtol), strict=True))
    return [_finding(e, scored.get(key), detector, judged.get(key), thresholds, foreign) for key, e in evidence.items()]


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
        _Verdict(float(a), float(b), s > line, stats.borderline(s, line, rtol))
        for s, a, b in zip(scores, p, q, strict=True)
    ]


def _finding(
    e: Evidence,
    scored: PromptScore | None,
    detector: str | None,
    verdict: _Verdict | None,
    thresholds: Thresholds | None,
    foreign: bool,
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
        templates=e.templates,
        layouts=e.layouts,
        dropped=e.dropped,
        fpr=thresholds.fpr if thresholds else None,
        foreign=foreign,
        steps=_mean_steps(e.steps.get(detector or "", [])),
        shots=tuple(sorted(shots, key=_closeness, reverse=True)),
    )


def _mean_steps(curves: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over seeds of the per-step scores, up to the step that all seeds reached."""
    length = min((len(c) for c in curves), default=0)
    return np.mean([c[:length] for c in curves], axis=0) if length else np.empty(0, dtype=np.float32)


def _closeness(shot: Shot) -> tuple[bool, bool, float, int]:
    near = shot.nearest
    if near is None:
        return False, False, -math.inf, -shot.seed
    return bool(near.copy_found), bool(near.template_found), near.similarity, -shot.seed
