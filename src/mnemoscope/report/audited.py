"""A run, or the shards of one, as a gate sees it: prompt by prompt, found, not found, or not known."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import UnknownName, UsageError
from ..plugins import installed
from ..records.files import folder_name
from ..records.store import Run, differences
from .findings import Finding
from .summary import Summary, read_summary

__all__ = ["Audited", "Case", "read_audited"]

Clusters = Callable[[Sequence[str]], Sequence[int]]
"""From prompts to the number of each one's near-duplicate cluster."""


@dataclass(frozen=True)
class Case:
    """One prompt that was audited.

    Attributes:
        id: Its id.
        prompt: Its text.
        seeds: Seeds with a result.
        found: By what was looked for (``copies``, ``detect.NAME``): True; False; None, where the run does not say for certain.
        words: The same in words.
        cluster: Prompts of one number are near-duplicates, and no independent evidence.
        picture: File of the worst picture, if one was kept.
    """

    id: str
    prompt: str
    seeds: int
    found: Mapping[str, bool | None]
    words: Mapping[str, str] = field(default_factory=dict)
    cluster: int = 0
    picture: str | None = None


@dataclass(frozen=True)
class Audited:
    """One audit.

    Attributes:
        name: What to call it.
        status: As far as its rows bear it out.
        asked: Samples that were asked for.
        done: Samples with a result.
        cases: Its prompts.
        detector: Name of the calibrated score, or of the first one; None: nothing was scored.
        uncalibrated: Why its threshold is none, in words; None: it is calibrated.
        gaps: By what was looked for: why it may not be known, in words.
        conditions: By what was looked for: what must be equal before two audits can be compared.
        faults: Where its rows and its manifest contradict each other or themselves, in words.
    """

    name: str
    status: str
    asked: int
    done: int
    cases: tuple[Case, ...]
    detector: str | None = None
    uncalibrated: str | None = None
    gaps: Mapping[str, str] = field(default_factory=dict)
    conditions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    faults: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Every sample that was asked for has a result: the manifest says so, and the rows are there and the run's own."""
        return self.status == "done" and self.done >= self.asked > 0 and not self.faults

    @property
    def seeds(self) -> int:
        """Seeds that every prompt has at least."""
        return min((case.seeds for case in self.cases), default=0)

    @property
    def clean(self) -> Audited:
        """The same audit, had nothing been found."""
        return replace(self, cases=tuple(replace(c, found=dict.fromkeys(c.found, False)) for c in self.cases))


def read_audited(folders: Sequence[Path], detectors: Collection[str] = (), clusters: Clusters | None = None) -> Audited:
    """Read a run, or the shards of one, by the numbers of its report.

    Args:
        folders: A run folder, or the folders of one audit's shards.
        detectors: Scores that are asked about, besides the run's first. One that is installed and not in the run leaves everything unknown.
        clusters: Finds near-duplicates; None: each prompt stands alone.

    Raises:
        RunError: a folder holds no run or is damaged.
        UsageError: the folders are not of one audit, or of a calibration.
        UnknownName: the run has no score of that name, and no such detector is installed.
    """
    with joined(folders) as folder:
        base = read_summary(folder, separate=False)
        names = dict.fromkeys([*detectors, *([base.detector] if base.detector else [])])
        scored = {name: base if name == base.detector else _scored(folder, name) for name in names}
    found = [f for f in base.findings if f.seeds or f.failed]
    by_key = {name: {_key(f): f for f in s.findings} for name, s in scored.items() if s is not None}
    family = clusters([f.prompt for f in found]) if clusters and found else range(len(found))
    return Audited(
        name=" + ".join(folder_name(f) for f in folders),
        status=base.status,
        asked=base.tally.asked,
        done=base.tally.ok,
        faults=base.tally.faults,
        cases=tuple(
            _case(f, {name: by_key.get(name, {}).get(_key(f)) for name in scored}, int(cluster), folders)
            for f, cluster in zip(found, family, strict=True)
        ),
        detector=base.detector,
        uncalibrated=_uncalibrated(base),
        gaps={"copies": _copy_gap(found)} | {f"detect.{name}": _score_gap(name, s) for name, s in scored.items()},
        conditions={"copies": _conditions(base, {"reference": base.manifest.config.get("reference")})}
        | {f"detect.{name}": _conditions(base, _method(base, name, s)) for name, s in scored.items()},
    )


def _case(f: Finding, scored: Mapping[str, Finding | None], cluster: int, folders: Sequence[Path]) -> Case:
    found = {"copies": _copied(f)} | {f"detect.{name}": _above(s) for name, s in scored.items()}
    words = {"copies": f.copy_words} | {f"detect.{name}": s.score_words for name, s in scored.items() if s is not None}
    image = f.shots[0].image if f.shots else None
    kept = next((str(d / image) for d in folders if image and (d / image).is_file()), None)
    return Case(f.prompt_id, f.prompt, f.seeds, found, words, cluster, kept)


def _copied(f: Finding) -> bool | None:
    """One copy is a find, whatever else is missing; none is known of a prompt only when all its pictures were compared."""
    return True if f.copies else False if f.seeds and f.compared == f.seeds else None


def _above(f: Finding | None) -> bool | None:
    """A score within rounding of the threshold may fall on either side, so it is not known."""
    return None if f is None or f.foreign or f.borderline else f.above


def _key(f: Finding) -> tuple[str, str]:
    return f.prompt_id, f.prompt


# What is not known, and why -----------------------------------------------------------------------------------------------


def _scored(folder: Path, detector: str) -> Summary | None:
    """The summary under one score; None where the run lacks it although it could have had it."""
    try:
        return read_summary(folder, detector=detector, separate=False)
    except UnknownName as e:
        detectors = installed("detector")
        if detector in detectors:
            return None
        raise UnknownName(e.kind, detector, {*e.known, *detectors}) from None


def _uncalibrated(summary: Summary) -> str | None:
    if summary.thresholds is None:
        return "the run has no threshold (`mnemoscope calibrate` makes one)"
    return f"the threshold was made under another setting ({summary.foreign[0]})" if summary.foreign else None


def _copy_gap(findings: Sequence[Finding]) -> str:
    if not any(f.best for f in findings):
        return "no picture was compared with reference pictures"
    return "not all pictures were compared with reference pictures under a calibrated descriptor"


def _score_gap(name: str, summary: Summary | None) -> str:
    if summary is None:
        return f"the run has no {name} score"
    return _uncalibrated(summary) or "scores are borderline, or seeds are missing"


def _conditions(summary: Summary, own: Mapping[str, Any]) -> dict[str, Any]:
    """What a find depends on besides the model. The model is what two audits are compared for."""
    manifest = summary.manifest
    shared = {k: manifest.setting.get(k) for k in ("guidance", "steps", "base_seed", "seed_mode")}
    return shared | {"seeds": manifest.config.get("seeds")} | dict(own)


def _method(base: Summary, name: str, summary: Summary | None) -> dict[str, Any]:
    thresholds = None if summary is None else summary.thresholds
    return {
        "detector": base.manifest.setting.get("detectors", {}).get(name),
        "false-positive rate": thresholds.fpr if thresholds else None,
    }


# Several folders ----------------------------------------------------------------------------------------------------------


@contextmanager
def joined(folders: Sequence[Path], *, calibrations: bool = False) -> Iterator[Path]:
    """One run folder; the shards of an audit are merged, without pictures, into one that is deleted afterwards.

    Raises:
        RunError: a folder holds no run or is damaged.
        UsageError: the folders are not of one audit, or of a calibration where ``calibrations`` are not wanted.
    """
    runs = [Run(folder) for folder in folders]
    if not runs:
        raise UsageError("there is no run to read; name a run folder.")
    for run in runs:
        if run.manifest.kind == "calibrate" and not calibrations:
            raise UsageError(
                f"{run.folder} is a calibration: prompts chosen to be ordinary prove nothing; name an audit."
            )
        if apart := differences(_asked(runs[0]), _asked(run)):
            raise UsageError(
                f"{runs[0].folder} and {run.folder} are no shards of one audit ({apart[0]}); take one audit at a time."
            )
    if len(runs) == 1:
        yield runs[0].folder
        return
    with TemporaryDirectory() as folder:
        yield Run.merge(Path(folder) / "merged", runs, images=False).folder


def _asked(run: Run) -> dict[str, Any]:
    keys = ("prompts", "seeds", "limit", "images", "reference")
    return {"kind": run.manifest.kind, "samples": run.manifest.asked} | {k: run.manifest.config.get(k) for k in keys}
