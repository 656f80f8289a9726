"""The numbers of the first screen: from rows, thresholds and the manifest of a run, each with its interval.

One :class:`Summary` feeds the terminal, the page, Markdown and JSON, so that they cannot disagree. The words are chosen here as
well: a prompt has a *score*, it is *above threshold* at a stated false-positive rate, or a *copy* was *found* under a named
descriptor in *k of n seeds*; what was not tested is listed, and finding nothing comes with the bound that n allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from pydantic import ValidationError

from ..errors import RunError, UsageError
from ..records.files import folder_name, read_inside
from ..records.schema import Manifest, Row, Thresholds
from ..records.store import Run, first_error
from ..records.table import prompt_scores
from ..records.tally import Count, Tally
from ..records.thresholds import parse_thresholds
from .discrimination import Baseline, Comparison, Discrimination, discriminations
from .findings import (
    Evidence,
    Finding,
    Share,
    findings_of,
    gather,
    other_setting,
    rounding_of,
    seeds_of,
    seeds_to_judge,
)
from .limits import untested
from .words import NO_GROUP, expected, percent, prompts, verb

__all__ = ["Figure", "Finding", "Group", "Share", "Summary", "read_summary", "summarize"]

FALSE_DISCOVERIES = 0.05
"""Expected share of false calls among the prompts that stay after Benjamini and Hochberg's correction."""

WORST = 100
"""How many prompts the exports list one by one; all others are in ``samples.jsonl``."""


# What a summary is made of ------------------------------------------------------------------------------------------------


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
    templates: Share | None = None
    """Prompts with a template copy and no verbatim one; None: layouts were not compared."""


@dataclass(frozen=True, eq=False)
class Summary:
    """Everything that a report says about one run. ``str(summary)`` is its headline.

    Attributes:
        name: Name of the run folder.
        manifest: The run's manifest, as it states itself.
        tally: How far the run is, counted from its rows; its status is the one to show.
        detector: Name of the score; None: the run has none.
        space: Space of the predictions that were compared.
        thresholds: Where the threshold comes from; None: not calibrated.
        foreign: Where it was made under another setting than the run's, as ``guidance: was 7.5, now 3``.
        rounding: Relative rounding within which a score is borderline.
        seeds: Seeds per prompt.
        rows: Samples in the run, failed ones included.
        findings: All prompts, worst first.
        figures: The three numbers: above threshold, copy found, both.
        significant: Prompts that stay after the correction for many prompts; None: not calibrated under this setting.
        groups: The group table; empty without groups.
        discrimination: AUC and TPR of the detector and of the text-only baseline; empty without labels.
        untested: What was not tested, and why, in sentences.
        unseparated: That of them which says why AUC and TPR are missing, of the detector or the baseline; else empty.
        controls: AUCs under controls, where the audit was asked for them.
        variants: Prompts that controls made from others. They stand in the group table, and are no part of any other number.
    """

    name: str
    manifest: Manifest
    tally: Tally
    detector: str | None
    space: str | None
    thresholds: Thresholds | None
    foreign: list[str]
    rounding: float
    seeds: int
    rows: int
    findings: list[Finding]
    figures: tuple[Figure, Figure, Figure]
    significant: int | None
    groups: list[Group]
    discrimination: list[Discrimination]
    untested: list[str]
    unseparated: str = ""
    controls: Sequence[Comparison] = ()
    variants: Sequence[Finding] = ()

    def __str__(self) -> str:
        return self.headline

    @property
    def status(self) -> str:
        """The run's status, as far as its rows bear it out."""
        return self.tally.status

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
        on = f"on {prompts(self.seeds, 'seed')} each"
        if self.copies is not None and self.copies.k:
            found = f"{self.copies.k:,} of {prompts(self.copies.n)}"
            return f"A copy of a reference image was found for {found} ({self.copies.bounds}), {on}."
        if self.copies is not None:
            return (
                f"No copy of a reference image was found among {prompts(self.copies.n)}, {on} ({self.copies.bounds})."
            )
        if self.above is not None:
            return f"{self._above_words(self.above)}, {on}{self._foreign_words}."
        scored = sum(f.score is not None for f in self.findings)
        if not scored:
            return f"Nothing could be scored or compared, for {prompts(len(self.findings))}."
        only = f"{prompts(scored)} {verb(scored, 'was', 'were')} scored, {on}"
        why = "the threshold could judge none" if self.thresholds else "there is no threshold"
        return f"{only}; {why}, so only their order means something."

    @property
    def subline(self) -> str:
        """The second sentence, where there is more to say."""
        if self.copies is None or self.above is None:
            return ""
        by_chance = f"; {expected(self.above.n * self._fpr)} would by chance"
        return f"{self._above_words(self.above)}{self._foreign_words or by_chance}."

    @property
    def _foreign_words(self) -> str:
        """What must be said wherever the threshold is."""
        return f"; the threshold was made under another setting ({_few(self.foreign)})" if self.foreign else ""

    @property
    def _fpr(self) -> float:
        return self.thresholds.fpr if self.thresholds else math.nan

    def _above_words(self, share: Share) -> str:
        who = (
            f"{share.k:,} of {prompts(share.n)} {verb(share.k, 'scores', 'score')}"
            if share.k
            else f"None of {prompts(share.n)} scores"
        )
        return f"{who} above the threshold for {percent(self._fpr)} false positives ({share.bounds})"

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
            "status": self.status,
            "asked": self.tally.asked,
            "contradictions": list(self.tally.faults),
            "above_threshold": _share(self.above),
            "copy_found": _share(self.copies),
            "both": _share(self.figures[2].share),
            "copies_in_at_least": {str(k): self.copies_in(k) for k in range(1, self.seeds + 1)} if self.copies else {},
            "significant": self.significant,
            "false_discovery_rate": FALSE_DISCOVERIES if self.significant is not None else None,
            "threshold": _threshold(self),
            "groups": [
                {
                    **asdict(g),
                    "above": _share(g.above),
                    "copies": _share(g.copies),
                    "templates": _share(g.templates),
                }
                for g in self.groups
            ],
            "discrimination": [d.to_dict() for d in self.discrimination],
            "controls": [{**asdict(c), "words": c.words} for c in self.controls],
            "worst": [f.to_dict() for f in self.worst],
            "not_tested": self.untested,
            "manifest": self.manifest.model_dump(mode="json"),
        }
        return finite(out)


# From a run to a summary --------------------------------------------------------------------------------------------------


def read_summary(folder: str | Path, *, detector: str | None = None, separate: bool = True) -> Summary:
    """The summary of a run folder: its rows, and ``thresholds.json`` and ``controls.json`` where they are.

    Args:
        folder: A run folder.
        detector: Which score; None: the calibrated one, else the first one of the run.
        separate: Whether AUC and TPR are computed, whose intervals take most of the time; readers of single prompts can do without.

    Raises:
        RunError: the folder holds no run, or a file of it is damaged.
        UnknownName: the run has no such score.
    """
    run = Run(folder)
    thresholds = read_part(run.folder / "thresholds.json", parse_thresholds)
    baseline = read_part(run.folder / "controls.json", Baseline.parse)
    name = folder_name(run.folder)
    return summarize(
        _Rows(run), run.manifest, thresholds, baseline, detector=detector, name=name, separate=separate, differing=run.differing()
    )  # fmt: skip


def summarize(
    rows: Iterable[Row],
    manifest: Manifest,
    thresholds: Thresholds | None = None,
    baseline: Baseline | None = None,
    *,
    detector: str | None = None,
    name: str = "run",
    separate: bool = True,
    differing: int = 0,
) -> Summary:
    """Summarize rows.

    Args:
        rows: The samples; iterated twice, so a list or an object that can start over, not a generator.
        manifest: The run's manifest.
        thresholds: Scores of ordinary prompts of the same model and setting.
        baseline: Scores of the text-only baseline.
        detector: Which score; None: the calibrated one, else the first one seen.
        name: What to call the run.
        separate: Whether AUC and TPR are computed.
        differing: Samples that have several rows with a result in the run's files, with other values.

    Raises:
        UsageError: ``rows`` can be iterated only once.
        UnknownName: the rows have no such score.
    """
    if isinstance(rows, Iterator):
        raise UsageError("summarize reads the rows twice: give a list, or a Run through read_summary, not a generator.")
    count = Count(manifest)
    evidence, names = gather(count.each(rows))
    tally = count.tally(differing=differing)
    chosen = detector or (
        thresholds.detector if thresholds and thresholds.detector in names else next(iter(names), None)
    )
    strange = thresholds is not None and thresholds.detector != chosen
    used = None if strange else thresholds
    scored = {} if chosen is None else {(s.prompt_id, s.prompt): s for s in prompt_scores(rows, chosen)}
    seeds = seeds_of(evidence)
    needed = seeds_to_judge(used, manifest, seeds)
    rounding, foreign = rounding_of(manifest, used), other_setting(used, manifest)
    findings, variants = (
        findings_of(part, {k: s for k, s in scored.items() if k in part}, chosen, used, needed, rounding, bool(foreign))
        for part in _asked_and_made(evidence)
    )
    discrimination, missing = discriminations(findings, chosen, baseline) if separate else ([], "")
    gaps = list(
        untested(
            manifest, tally, findings, used, seeds, needed=needed, rounding=rounding, foreign=foreign, variants=variants
        )
    )
    if strange and thresholds is not None:
        gaps.insert(
            0, f"The thresholds belong to {thresholds.detector}, the scores shown to {chosen}; they were not used."
        )
    if missing:
        gaps.append(missing)
    q = [f.q for f in findings if f.q is not None]
    return Summary(
        name=name,
        manifest=manifest,
        tally=tally,
        detector=chosen,
        space=next((s.space for s in scored.values()), None),
        thresholds=used,
        foreign=foreign,
        rounding=rounding,
        seeds=seeds,
        rows=sum(e.ok + e.failed for e in evidence.values()),
        findings=sorted(findings, key=lambda f: f.severity, reverse=True),
        figures=_figures(findings, used, foreign, seeds),
        significant=sum(v <= FALSE_DISCOVERIES for v in q) if used and not foreign else None,
        groups=_groups([*findings, *variants], manifest.doses),
        discrimination=discrimination,
        untested=gaps,
        unseparated=missing,
        controls=baseline.table if baseline else (),
        variants=variants,
    )


_Key: TypeAlias = tuple[str, str]


def _asked_and_made(evidence: Mapping[_Key, Evidence]) -> tuple[dict[_Key, Evidence], dict[_Key, Evidence]]:
    """Prompts that were asked for, and those that controls made from them."""
    made = {key: e for key, e in evidence.items() if e.row.control is not None}
    return {key: e for key, e in evidence.items() if key not in made}, made


class _Rows:
    """The rows of a run, from the start each time."""

    def __init__(self, run: Run):
        self.run = run

    def __iter__(self) -> Iterator[Row]:
        return self.run.rows()


# The first screen ---------------------------------------------------------------------------------------------------------


def _figures(
    findings: Sequence[Finding], thresholds: Thresholds | None, foreign: Sequence[str], seeds: int
) -> tuple[Figure, Figure, Figure]:
    above, copies = _above(findings), _copies(findings)
    both = [f for f in findings if f.above is not None and f.compared]
    joint = (
        Share.of(sum(bool(f.above) and f.copies > 0 for f in both), len(both)) if above and copies and both else None
    )
    copied = sum(f.copies > 0 for f in both)
    return (
        Figure(
            "Above threshold",
            above,
            _above_meaning(thresholds, foreign),
            "" if foreign else _above_detail(findings, thresholds),
        ),
        Figure(
            "Copy found",
            copies,
            _copies_meaning(copies),
            _copies_detail(findings, seeds) if copies else "",
        ),
        Figure(
            "Both",
            joint,
            "The score is above the threshold and a copy was found: two kinds of evidence that do not use each other."
            if joint
            else "Needs a threshold and reference images.",
            f"The score flagged {joint.k:,} of the {prompts(copied)} with a copy." if joint and copied else "",
        ),
    )


def _above(findings: Iterable[Finding]) -> Share | None:
    judged = [f for f in findings if f.above is not None]
    return Share.of(sum(bool(f.above) for f in judged), len(judged)) if judged else None


def _copies(findings: Iterable[Finding]) -> Share | None:
    compared = [f for f in findings if f.compared]
    return Share.of(sum(f.copies > 0 for f in compared), len(compared)) if compared else None


def _templates(findings: Iterable[Finding]) -> Share | None:
    compared = [f for f in findings if f.layouts]
    return Share.of(sum(f.templates > 0 and not f.copies for f in compared), len(compared)) if compared else None


def _above_meaning(thresholds: Thresholds | None, foreign: Sequence[str]) -> str:
    if thresholds is None:
        return "Needs the scores of ordinary prompts of the same model."
    over, rate = f"The score exceeds {thresholds.threshold:.3g}, which ordinary prompts", percent(thresholds.fpr)
    if foreign:
        return f"{over} exceed in at most {rate} of cases under another setting ({_few(foreign)}); how many do here is not known."
    return f"{over} of this model exceed in at most {rate} of cases."


def _few(found: Sequence[str], most: int = 3) -> str:
    """The first of several differences, and how many more there are."""
    more = [f"{len(found) - most} more"] if len(found) > most else []
    return "; ".join([*found[:most], *more])


def _above_detail(findings: Sequence[Finding], thresholds: Thresholds | None) -> str:
    q = [f.q for f in findings if f.q is not None]
    if thresholds is None or not q:
        return ""
    kept = sum(v <= FALSE_DISCOVERIES for v in q)
    return (
        f"Corrected for the number of prompts (Benjamini–Hochberg), {kept:,} can be called with {percent(FALSE_DISCOVERIES)} of the "
        f"calls expected to be false."
    )


def _copies_meaning(copies: Share | None) -> str:
    if copies is None:
        return "Needs generated images, reference images and a calibrated descriptor."
    return (
        "An image generated from the prompt is more similar to a reference image than the descriptor’s threshold, "
        "in at least one seed."
    )


def _copies_detail(findings: Sequence[Finding], seeds: int) -> str:
    templates = _templates(findings)
    beside = ""
    if templates is not None and templates.k:
        beside = f"Most of a reference image, not all of it (a template copy), was found for {prompts(templates.k, 'further prompt')}."
    return " ".join(part for part in (_seeds_detail(findings, seeds), beside) if part)


def _seeds_detail(findings: Sequence[Finding], seeds: int) -> str:
    if seeds < 2:
        return ""
    counts = {k: sum(f.copies >= k for f in findings) for k in sorted({2, seeds})}
    said = [f"{n:,} in {'all' if k == seeds else 'at least'} {k} seeds" for k, n in counts.items()]
    return f"{'; '.join(said).capitalize()}."


def _groups(findings: Sequence[Finding], doses: Mapping[str, int]) -> list[Group]:
    members: dict[str | None, list[Finding]] = {}
    for f in findings:
        members.setdefault(f.group, []).append(f)
    return [] if members.keys() <= {None} else [_group(name, found, doses) for name, found in members.items()]


def _group(name: str | None, members: Sequence[Finding], doses: Mapping[str, int]) -> Group:
    scores = [f.score for f in members if f.score is not None]
    middle = float(np.median(scores)) if scores else None
    dose = None if name is None else doses.get(name)
    return Group(name or NO_GROUP, len(members), middle, _above(members), _copies(members), dose, _templates(members))


# Plain values -------------------------------------------------------------------------------------------------------------


def _share(share: Share | None) -> dict[str, Any] | None:
    return None if share is None else {**asdict(share), "words": share.words}


def _threshold(summary: Summary) -> dict[str, Any] | None:
    if summary.thresholds is None:
        return None
    return {
        **summary.thresholds.model_dump(exclude={"scores"}),
        "ordinary_prompts": len(summary.thresholds.scores),
        "rounding": summary.rounding,
        "differences": summary.foreign,
    }


def finite(value: Any) -> Any:
    """JSON has no infinity: None stands for it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_part(path: Path, read: Callable[[bytes], Any]) -> Any:
    """What a file of the run holds, or None where there is no such file."""
    try:
        return read(read_inside(path.parent, path.name))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as e:
        why = e.strerror if isinstance(e, OSError) else first_error(e) if isinstance(e, ValidationError) else None
        raise RunError(
            f"{path} cannot be read ({why or str(e).splitlines()[0]}); restore it, or delete it to go without."
        ) from e
