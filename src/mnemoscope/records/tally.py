"""How far a run is and whether its rows are its own: counted from the rows, whatever status the manifest states.

Rows and manifest may come from a stranger. What contradicts itself or the manifest is said, and such a run is never complete.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..errors import UnknownName
from .ids import digest, sample_id
from .schema import Manifest, Row

__all__ = ["Count", "Tally", "calls_follow", "rounding_of", "same_values"]

ROUNDED = 1e-6
"""Similarities are stored with six digits, and called before they were rounded."""


@dataclass(frozen=True)
class Tally:
    """How far a run is, counted from its rows.

    Attributes:
        asked: Samples that it is meant to have: as many as the manifest states, or more where its rows show that these are too few.
        ok: Samples with a result.
        failed: Samples that failed.
        notes: What that leaves open, in sentences.
        unscored: Samples with a result that lack one of the run's scores: those that compare a prompt's pictures come last.
        faults: Where rows and manifest contradict each other or themselves, in sentences without capital and period.
        stated: The status that the manifest states.
    """

    asked: int
    ok: int
    failed: int
    notes: list[str]
    unscored: int = 0
    faults: tuple[str, ...] = ()
    stated: str = "running"

    @property
    def complete(self) -> bool:
        """Whether every sample has a result, with every score, and nothing contradicts itself."""
        return self.ok >= self.asked and not self.unscored and not self.faults

    @property
    def status(self) -> str:
        """The status as far as it can be believed: a run is done only if its rows are complete."""
        return "incomplete" if self.stated == "done" and not self.complete else self.stated

    @property
    def words(self) -> str:
        """``20 of 24 samples are there``."""
        return f"{self.ok + self.failed:,} of {self.asked:,} samples are there"


class Count:
    """Counts the rows of a run, one at a time.

    Args:
        manifest: The run's manifest.
    """

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self._setting = digest(manifest.setting)
        self._detectors = manifest.setting.get("detectors", {}).keys()
        self._seeds: int | None = manifest.config.get("seeds")
        self._threshold: float | None = (manifest.config.get("reference") or {}).get("threshold")
        self._ids: set[str] = set()
        self._prompts: set[str] = set()
        self._truncated: set[str] = set()
        self._faults: Counter[str] = Counter()
        self.rows = self.ok = self.failed = self.unscored = 0

    def each(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows, counted as they pass."""
        for row in rows:
            self.take(row)
            yield row

    def take(self, row: Row) -> None:
        """Count one row. A row of no sample of this run is no result of it."""
        self.rows += 1
        stranger = self._stranger(row)
        if stranger:
            self._faults[stranger] += 1
            return
        self._ids.add(row.id)
        self._faults.update(self._contradictions(row))
        self._prompts.add(row.prompt)
        if row.tokens_dropped:
            self._truncated.add(row.prompt)
        if row.status == "ok":
            self.ok += 1
            self.unscored += not self._detectors <= row.scores.keys()
        else:
            self.failed += 1

    def tally(self, *, differing: int = 0) -> Tally:
        """What was counted.

        Args:
            differing: Samples that stand in the files more than once, with other values.
        """
        asked = self.manifest.asked
        faults = [f"{n:,} of {self.rows:,} {rows}" for rows, n in self._faults.items()]
        if differing:
            several = "1 sample has" if differing == 1 else f"{differing:,} samples have"
            faults.append(f"{several} several rows with a result, and their values differ; the first counts")
        faults += self._wrongly_asked()
        # Where the manifest asks for less than its own prompts and seeds come to, what it lacks is missing all the same.
        asked = max(asked, len(self._prompts) * (self._seeds or 1), self.ok + self.failed)
        return Tally(
            asked, self.ok, self.failed, self._notes(asked), self.unscored, tuple(faults), self.manifest.status
        )

    def _stranger(self, row: Row) -> str:
        """Why a row is of no sample of this run; empty: it is."""
        if row.id in self._ids:
            return "rows are of samples that stand there before"
        # A manifest without a setting, as no audit writes it, says nothing about ids.
        if self.manifest.setting and sample_id(row.prompt, row.seed, self._setting) != row.id:
            return "rows have an id that is not what their prompt, seed and setting make"
        if self._seeds is not None and row.seed >= self._seeds:
            return f"rows have a seed that was not asked for (seeds are 0 to {self._seeds - 1})"
        return ""

    def _contradictions(self, row: Row) -> Iterator[str]:
        if row.status == "error" and (row.scores or row.nearest is not None):
            yield "rows failed, and have a result all the same"
        if not calls_follow(row):
            yield "rows call a copy, or none, against their own similarity and threshold"
        stated = self._threshold
        if row.nearest is not None and stated is not None and not _near(row.nearest.threshold, stated):
            yield f"rows are judged by another threshold of copies than the run's ({stated:g})"

    def _wrongly_asked(self) -> Iterator[str]:
        """Where the number of samples that the manifest states is not what its prompts and seeds come to."""
        asked, seeds, prompts = self.manifest.asked, self._seeds, len(self._prompts)
        if seeds is None:
            if self.ok + self.failed > asked:
                yield f"{self.ok + self.failed:,} samples are there, and run.json states {asked:,}"
            return
        if asked % seeds:
            yield f"run.json states {asked:,} samples, which is no multiple of its {seeds:,} seeds"
        if prompts * seeds > asked:
            yield f"run.json states {asked:,} samples, and {prompts:,} prompts with {seeds:,} seeds each are {prompts * seeds:,}"
        listed = (self.manifest.config.get("prompts") or {}).get("items")
        # Controls make further prompts of these, one each at most; repeated prompts are left out.
        if listed is not None and asked > (
            most := listed * seeds * (1 + len(self.manifest.config.get("controls") or ()))
        ):
            yield f"run.json states {asked:,} samples, and {listed:,} prompts with {seeds:,} seeds each are at most {most:,}"

    def _notes(self, asked: int) -> list[str]:
        notes = []
        if self._truncated:
            notes.append(f"{len(self._truncated)} of {len(self._prompts)} prompts were truncated by the text encoder")
        if self.failed:
            notes.append(f"{self.failed} of {asked} samples failed; the same command tries them again")
        if (missing := asked - self.ok - self.failed) > 0:
            notes.append(f"{missing} of {asked} samples have not been run yet; the same command continues")
        if self.unscored:
            notes.append(
                f"{self.unscored} of {asked} samples lack a score that compares a prompt's pictures; the same command computes it once "
                f"all of them are there"
            )
        return notes


def calls_follow(row: Row) -> bool:
    """Whether a row calls a copy, and a template copy, just where its own similarities are above their thresholds."""
    near = row.nearest
    if near is None:
        return True
    if not _call_follows(near.similarity, near.threshold, near.copy_found):
        return False
    # A whole copy is no template copy, whatever its layout; and where no copy is called, no template copy is.
    if near.copy_found is not False:
        return not near.template_found
    return _call_follows(near.layout, near.layout_threshold, near.template_found)


def _call_follows(similarity: float | None, threshold: float | None, call: bool | None) -> bool:
    if similarity is None or threshold is None:
        return call is None
    return call is not None and (_near(similarity, threshold) or call is (similarity > threshold))


def _near(one: float | None, other: float) -> bool:
    return one is not None and abs(one - other) <= ROUNDED


def same_values(one: Row, other: Row, rtol: float) -> bool:
    """Whether two results of one sample agree: the same prompt, seed and calls, and scores within relative rounding ``rtol``."""
    calls = [(r.prompt, r.seed, n and n.copy_found, n and n.template_found) for r in (one, other) for n in (r.nearest,)]
    return calls[0] == calls[1] and one.scores.keys() == other.scores.keys() and all(
        math.isclose(score.value, other.scores[name].value, rel_tol=rtol, abs_tol=ROUNDED) for name, score in one.scores.items()
    )  # fmt: skip


def rounding_of(manifest: Manifest) -> float:
    """Relative rounding of a run's scores; that of float32 where its dtype is not known."""
    from .. import stats  # here, because it brings scipy, which readers of rows do not need

    dtype = str(manifest.target.get("dtype") or manifest.machine.get("dtype") or "float32")
    try:
        return stats.rounding(dtype)
    except UnknownName:
        return stats.rounding("float32")
