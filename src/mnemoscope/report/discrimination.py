"""How well the score separates prompts of known label, next to what their wording alone can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .. import stats
from ..errors import UsageError
from ..parsing import parse_json
from ..records.schema import Finite, Rate, Whole
from ..records.store import first_error
from ..records.wording import capitals_and_digits
from .findings import Finding

TEXT_SCORES = {"ngrams": "text only: character n-grams", "capitals": "text only: capitals and digits"}
"""How the two text-only scores are called."""

CONTROLS = {
    "overall": "all labeled prompts",
    "given-text": "within strata of the text score",
    "matched": "against ordinary prompts of like text score",
    "within-family": "within families",
    "swap": "against other captions of the same pictures",
    "case-fold": "all in lower case",
    "title-case": "all with every word capitalized",
}
"""What is compared with what, under each control."""


@dataclass(frozen=True)
class Comparison:
    """One score under one control, as ``controls.json`` holds it.

    Attributes:
        detector: The score.
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

    @property
    def name(self) -> str:
        """What to call the score."""
        return TEXT_SCORES.get(self.detector, self.detector)

    @property
    def words(self) -> str:
        """What was compared with what."""
        return CONTROLS.get(self.control, self.control)


@dataclass(frozen=True)
class Baseline:
    """The stored text-only baseline: what the wording of the prompts alone can tell (``controls.json`` of a run).

    The file holds ``dataclasses.asdict`` of the baseline's result, with the list ``prompts`` that its scores belong to.

    Attributes:
        prompts: The prompts of known label, in the order of ``scores`` and ``clusters``.
        scores: Out-of-fold score of each prompt; empty where there are too few prompts for folds.
        clusters: Near-duplicate cluster of each prompt: the unit that intervals resample.
        separations: AUC and TPR by the name of the score, for those that could be computed.
        reason: Why something could not be computed, in a sentence.
        table: AUCs under controls, where the audit was asked for them.
    """

    prompts: Sequence[str]
    scores: Sequence[float]
    clusters: Sequence[int]
    separations: Mapping[str, stats.Separation]
    reason: str = ""
    table: Sequence[Comparison] = ()

    @classmethod
    def parse(cls, data: bytes) -> Baseline:
        """Read ``controls.json``; raises ValueError when it is something else: one line, which names the key."""
        try:
            stored = _Stored.model_validate(parse_json(data))
        except ValidationError as e:
            raise ValueError(f"no text-only baseline: {first_error(e)}") from None
        separations = {
            name: value.separation for key, name in TEXT_SCORES.items() if (value := getattr(stored, key)) is not None
        }
        table = tuple(row.comparison for row in stored.table)
        return cls(stored.prompts, stored.scores, stored.clusters, separations, stored.reason, table)

    def clusters_of(self, prompts: Sequence[str]) -> list[int]:
        """The cluster of each prompt; a prompt the baseline has not seen stands alone."""
        known = dict(zip(self.prompts, self.clusters, strict=True))
        free = max(self.clusters, default=-1) + 1
        return [known.get(prompt, free + i) for i, prompt in enumerate(prompts)]


class _Part(BaseModel):
    """Of the file. Later versions may write more beside it."""

    model_config = ConfigDict(extra="ignore", frozen=True)


ROUNDED = 1e-9
"""Difference of numbers that are the same but for the order of additions."""

_AboutShare = Annotated[Finite, Field(ge=-ROUNDED, le=1 + ROUNDED)]


class _Bounded(_Part):
    """An interval of a share: low ≤ value ≤ high."""

    value: _AboutShare
    low: _AboutShare
    high: _AboutShare
    confidence: Rate = 0.95
    method: str = ""
    note: str = ""

    @model_validator(mode="after")
    def _in_order(self) -> _Bounded:
        if not self.low - ROUNDED <= self.value <= self.high + ROUNDED:
            raise ValueError(f"{self.value:g} lies outside of its own interval, {self.low:g} to {self.high:g}")
        return self

    @property
    def interval(self) -> stats.Interval:
        return stats.Interval(self.value, self.low, self.high, self.confidence, self.method, self.note)


class _Separated(_Part):
    auc: _Bounded
    tpr: _Bounded
    fpr: Rate

    @property
    def separation(self) -> stats.Separation:
        return stats.Separation(self.auc.interval, self.tpr.interval, self.fpr)


class _Compared(_Part):
    detector: str
    control: str
    positives: Whole
    negatives: Whole
    auc: _Bounded | None
    note: str = ""

    @property
    def comparison(self) -> Comparison:
        auc = None if self.auc is None else self.auc.interval
        return Comparison(self.detector, self.control, self.positives, self.negatives, auc, self.note)


class _Stored(_Part):
    """``controls.json``."""

    prompts: list[str]
    scores: list[Finite]
    clusters: list[Whole]
    ngrams: _Separated | None
    capitals: _Separated | None
    reason: str
    table: list[_Compared] = []

    @model_validator(mode="after")
    def _as_many(self) -> _Stored:
        n = len(self.prompts)
        if len(self.clusters) != n or len(self.scores) not in (0, n):
            raise ValueError(f"{len(self.clusters)} clusters and {len(self.scores)} scores for {n} prompts")
        if len(set(self.prompts)) < n:
            raise ValueError("prompts has one of them twice")
        return self


@dataclass(frozen=True, eq=False)
class Discrimination:
    """How well one score separates prompts of known label.

    Attributes:
        name: The score.
        positives: Prompts known to be memorized.
        negatives: Prompts known to be ordinary.
        separation: AUC, and TPR at a false-positive rate strictly below 1 %, with cluster-bootstrap intervals.
        roc: The curve; None where only its numbers are stored.
    """

    name: str
    positives: int
    negatives: int
    separation: stats.Separation
    roc: stats.Roc | None

    @property
    def auc(self) -> stats.Interval:
        """Area under the ROC, with its interval."""
        return self.separation.auc

    @property
    def tpr(self) -> stats.Interval:
        """True-positive rate strictly below 1 % false positives, with its interval."""
        return self.separation.tpr

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the first threshold of the curve is ∞."""
        curve = None if self.roc is None else {k: getattr(self.roc, k).tolist() for k in ("fpr", "tpr", "threshold")}
        counts = {"positives": self.positives, "negatives": self.negatives}
        return {"score": self.name, **counts, **asdict(self.separation), "roc": curve}


def discriminations(
    findings: Sequence[Finding], detector: str | None, baseline: Baseline | None
) -> tuple[list[Discrimination], str]:
    """AUC and TPR of the detector, then of the text-only baseline on the same prompts; and what is missing, in a sentence."""
    known = [(f.prompt, f.score, f.label) for f in findings if f.label is not None and f.score is not None]
    if not known or detector is None:
        return [], ""
    labels = [bool(label) for _, _, label in known]
    clusters = baseline.clusters_of([prompt for prompt, _, _ in known]) if baseline else None
    try:
        found = _discriminate(detector, [score for _, score, _ in known], labels, clusters)
    except UsageError as e:
        return [], f"How well the score separates prompts of known label was not computed: {e}"
    if baseline is None:
        return [found], "Whether the wording of the prompts alone tells the labeled groups apart was not tested."
    if sorted(baseline.prompts) != sorted(prompt for prompt, _, _ in known):
        return [
            found
        ], "The stored text-only baseline belongs to other prompts than those scored here; it is not shown."
    label_of = dict(zip((prompt for prompt, _, _ in known), labels, strict=True))
    sorted_labels = [label_of[p] for p in baseline.prompts]
    if apart := _apart(baseline, sorted_labels):
        return [found], f"The stored text-only baseline contradicts its own scores ({apart}); it is not shown."
    return [found, *_text_only(baseline, sorted_labels)], baseline.reason


def _apart(baseline: Baseline, labels: Sequence[bool]) -> str:
    """Where a stored AUC or TPR of the wording is not that of the scores it is about; empty: nowhere."""
    scores_of = {"ngrams": list(baseline.scores), "capitals": capitals_and_digits(baseline.prompts)}
    for key, scores in scores_of.items():
        stated = baseline.separations.get(TEXT_SCORES[key])
        if stated is None:
            continue
        if not scores:
            return f"{key} has an AUC, and no scores"
        derived = {"auc": stats.auc(scores, labels), "tpr": stats.tpr_at_fpr(scores, labels, stated.fpr)}
        for name, value in derived.items():
            if abs(getattr(stated, name).value - value) > ROUNDED:
                return f"{key}.{name} is {getattr(stated, name).value:g}, and {value:g} follows"
    return ""


def _discriminate(
    name: str, scores: Sequence[float], labels: Sequence[bool], clusters: Sequence[int] | None
) -> Discrimination:
    separation = stats.separation(scores, labels, clusters)
    return Discrimination(name, sum(labels), len(labels) - sum(labels), separation, stats.roc(scores, labels))


def _text_only(baseline: Baseline, labels: Sequence[bool]) -> list[Discrimination]:
    """The stored results, in the order of :data:`TEXT_SCORES`; only the classifier's curve can be drawn."""
    drawable = TEXT_SCORES["ngrams"] if len(baseline.scores) == len(labels) else None
    positives = sum(labels)
    return [
        Discrimination(
            name,
            positives,
            len(labels) - positives,
            found,
            stats.roc(baseline.scores, labels) if name == drawable else None,
        )
        for name, found in baseline.separations.items()
    ]
