"""Is a packet whole, and does it follow from its own rows?

Two questions. The sums say whether anything was changed since the digest was noted. Whoever changes a file may change its sum
as well, so everything that follows from the records is made to follow once more: ids from prompts and settings, thresholds from
the scores of ordinary prompts, counts, splits, ROC and their intervals from the rows.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import stats
from ..errors import MnemoscopeError, RunError, UsageError
from ..records.measures import Entry
from ..records.schema import Row
from ..records.store import digest, sample_id, short
from .archive import SUMS, Archive, parse_sums, sha256_of
from .packet import EVIDENCE, FORMAT, PACKET, ROC, SPLITS, Facts, Records, derive, named_by, summary_of, tools

__all__ = ["Verified", "sound_packet", "verify"]

log = logging.getLogger(__name__)

RTOL = 1e-9
"""Relative difference of numbers that are the same but for the order of additions."""

SHOWN = 5
"""How many differences of one file are named."""

ITS_WORD = ("made_with", "run", "parts", "pictures")
"""What of ``packet.json`` does not follow from the records."""

SENTENCES = ("headline", "subline", "access", "not_tested")
"""What another version may word otherwise."""

BOUNDS = ("low", "high", "note", "method")
"""Of an interval: what another version of numpy may draw otherwise."""


@dataclass
class Verified:
    """What was found.

    Attributes:
        path: The packet.
        digest: SHA-256 of its ``SHA256SUMS``; None: it has none.
        faults: What is wrong, in sentences.
        checked: What was compared with what, in sentences.
        notes: What could not be checked, and what a reader must know first.
        status: Of the run; None: not known.
        counts: Samples and prompts, as ``packet.json`` states them.
    """

    path: Path
    digest: str | None = None
    faults: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    status: str | None = None
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Nothing is wrong."""
        return not self.faults

    @property
    def exit_code(self) -> int:
        """0: sound, 1: not."""
        return 0 if self.sound else 1

    @property
    def headline(self) -> str:
        """The result in one sentence."""
        if self.sound:
            return f"{self.path.name} is sound: every file has its sum, and its numbers follow from its rows."
        return f"{self.path.name} is not sound: {len(self.faults)} fault{'s' if len(self.faults) > 1 else ''}."

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        said = {"headline": self.headline, "sound": self.sound, "exit_code": self.exit_code}
        return {**said, **vars(self), "path": str(self.path)}


def verify(path: str | Path, *, expected: str | None = None) -> Verified:
    """Check a packet.

    Args:
        path: The file.
        expected: The digest that was noted when it was made.

    Raises:
        RunError: it is no packet, or cannot be read at all.
    """
    with Archive(path) as archive:
        if SUMS not in archive.names and not any(name in archive.names for name in (*EVIDENCE, PACKET)):
            raise RunError(f"{path} is no packet: it holds no {SUMS}; name a file that `mnemoscope pack RUN` wrote.")
        found = Verified(Path(path))
        check_sums(archive, found, expected)
        for check in (_check_rows, _check_thresholds, _check_measures, _check_derived):
            try:
                check(Records(archive), found)
            except MnemoscopeError as e:
                found.faults.append(str(e))
            except Exception as e:  # the packet was made by somebody else: what it breaks here is its own fault
                log.debug("%s of %s", check.__name__, path, exc_info=e)
                found.faults.append(f"its records cannot be followed ({type(e).__name__}: {short(str(e))})")
        found.faults = list(dict.fromkeys(found.faults))
    return found


# Sums ---------------------------------------------------------------------------------------------------------------------


def check_sums(archive: Archive, found: Verified, expected: str | None = None) -> None:
    """Every file is listed with its SHA-256, and every listed file is there."""
    found.faults += archive.faults
    try:
        listing = archive.read(SUMS)
        sums = parse_sums(listing)
    except RunError as e:
        found.faults.append(str(e))
        return
    found.digest = sha256_of([listing])
    if expected is not None and expected.strip().lower().removeprefix("sha256:") != found.digest:
        found.faults.append(f"its digest is {found.digest}, and {expected} was noted: this is another packet")
    found.faults += [f"{name} is listed and missing" for name in sorted(sums.keys() - archive.names.keys())]
    found.faults += [f"{name} is there and not listed" for name in sorted(archive.names.keys() - sums.keys() - {SUMS})]
    for name in sorted(sums.keys() & archive.names.keys()):
        try:
            if archive.sha256(name) != sums[name]:
                found.faults.append(f"{name} was changed: its SHA-256 is not the one listed")
        except RunError as e:
            found.faults.append(str(e))
    found.checked.append(f"SHA-256 of {len(sums)} files")


# Rows ---------------------------------------------------------------------------------------------------------------------


def _check_rows(records: Records, found: Verified) -> None:
    """Each sample once, under the id that its prompt, seed and setting have; a copy where the similarity says so."""
    key, seen, rows = digest(records.manifest.setting), set(), 0
    twice, foreign, called = [], [], []
    for row in records:
        rows += 1
        if row.id in seen:
            twice.append(row.id)
        seen.add(row.id)
        if sample_id(row.prompt, row.seed, key) != row.id:
            foreign.append(row.id)
        if not _rightly_called(row):
            called.append(row.id)
    for ids, sentence in (
        (twice, "there twice"),
        (foreign, "not what their prompts, seeds and setting make of them"),
        (called, "called a copy, or none, against their own similarity and threshold"),
    ):
        if ids:
            found.faults.append(f"samples.jsonl: {len(ids)} of {rows} rows are {sentence} ({short(', '.join(ids))})")
    found.checked.append(f"{rows} rows: ids follow from prompts, seeds and setting")


def _rightly_called(row: Row) -> bool:
    near = row.nearest
    if near is None:
        return True
    # A whole copy is no template copy, whatever its layout.
    template = (
        not near.template_found if near.copy_found else _call(near.layout, near.layout_threshold, near.template_found)
    )
    return template and _call(near.similarity, near.threshold, near.copy_found)


def _call(similarity: float | None, threshold: float | None, found: bool | None) -> bool:
    """Whether a call follows from its similarity. These are stored with six digits, and called before they were rounded."""
    if similarity is None or threshold is None or found is None:
        return found is None
    return abs(similarity - threshold) <= 1e-6 or found is (similarity > threshold)


def _check_thresholds(records: Records, found: Verified) -> None:
    for name in records.judged_by:
        stored = records.thresholds(name)
        if stored is None:
            continue
        follows = stats.threshold_at_fpr(stored.scores, stored.fpr, confidence=stored.confidence)
        low, high = (b if math.isfinite(b) else None for b in (follows.interval.low, follows.interval.high))
        stated = {"threshold": stored.threshold, "interval": list(stored.interval)}
        found.faults += _differences(
            name, stated, {"threshold": follows.value, "interval": [low, high]}, lambda p: True
        )
        found.checked.append(f"{name}: the threshold follows from {len(stored.scores)} scores of ordinary prompts")


def _check_measures(records: Records, found: Verified) -> None:
    """A picture counts as reproduced where it has a score; rates, intervals and the bound follow from draws and nats."""
    if records.measures is None:
        return
    entries = records.measures.entries
    if wrong := [e.id for e in entries if not _follows(e)]:
        found.faults.append(
            f"measures: {len(wrong)} of {len(entries)} pictures have a score or a rate that does not follow from their own draws "
            f"({short(', '.join(wrong))})"
        )
    found.checked.append(f"{len(entries)} measured pictures: rates and bounds follow from their draws")


def _follows(entry: Entry) -> bool:
    """Whether a picture's numbers fit each other."""
    r = entry.numbers
    if (entry.status == "reproduced") is not (r.score is not None and r.nats is not None):
        return False
    if r.succeeded is None or r.rate is None:
        return r.succeeded is None and r.rate is None and r.at_least is None
    if not 0 <= r.succeeded[0] <= r.succeeded[1] > 0:
        return False
    rate = stats.clopper_pearson(*r.succeeded)
    follows = (rate.value, rate.low, rate.high)
    if not all(math.isclose(a, b, abs_tol=RTOL) for a, b in zip(r.rate, follows, strict=True)):
        return False
    if r.nats is None or r.at_least is None:
        return r.nats is None and r.at_least is None
    return math.isclose(stats.replication_bound(r.nats, r.rate[1]), r.at_least, rel_tol=1e-6, abs_tol=1e-300)


# What follows -------------------------------------------------------------------------------------------------------------


def _check_derived(records: Records, found: Verified) -> None:
    """Let everything follow from the records once more, and compare."""
    stored = {name: _document(records.archive, name) for name in (PACKET, SPLITS, ROC)}
    said = stored[PACKET]
    if said.get("format") != FORMAT:
        raise RunError(
            f"{PACKET} has format {said.get('format')!r}, and this version reads {FORMAT}; update mnemoscope."
        )
    facts = _facts(said)
    found.status = records.manifest.status
    if found.status != "done":
        found.notes.append(f"the run is {found.status}, so what it has found is not all there was to find")
    _check_pictures(records, facts, found)
    made = derive(records, summary_of(records, facts.run), facts)
    found.counts = made[PACKET]["counts"]
    own = facts.made_with == tools()
    if not own:
        found.notes.append(
            f"the packet was made with other versions ({_versions(facts.made_with)}) than this one ({_versions(tools())}): bounds of "
            f"intervals and wordings were not compared"
        )
    for name, value in made.items():
        found.faults += _differences(
            name, stored[name], json.loads(json.dumps(value)), (lambda p: True) if own else _kept
        )
    found.faults += [f"{ROC}: {fault}" for fault in _bent(made[ROC])]
    found.checked.append(f"{PACKET}, {SPLITS} and {ROC} ({len(made[ROC]['scores'])} curves) follow from the rows")


def _document(archive: Archive, name: str) -> dict[str, Any]:
    try:
        content = json.loads(archive.read(name))
    except (ValueError, RecursionError) as e:
        raise RunError(f"{name} is damaged ({e}); get the packet again from whoever made it.") from e
    if not isinstance(content, dict):
        raise RunError(
            f"{name} holds {type(content).__name__}, not an object; get the packet again from whoever made it."
        )
    return content


def _facts(said: Mapping[str, Any]) -> Facts:
    """What only ``packet.json`` says."""
    kinds: dict[str, type] = {"run": str, "parts": list, "pictures": dict, "made_with": dict}
    if wrong := [name for name, kind in kinds.items() if not isinstance(said.get(name), kind)]:
        raise RunError(f"{PACKET} has no {wrong[0]} that can be read; get the packet again from whoever made it.")
    return Facts(**{name: said[name] for name in kinds})


def _check_pictures(records: Records, facts: Facts, found: Verified) -> None:
    """Every picture that rows name is there, was left out with its sum, or was missing when the packet was made."""
    known = {*records.archive.names}
    for kind in ("left_out", "missing"):
        listed = facts.pictures.get(kind)
        known |= {name for name in listed if isinstance(name, str)} if isinstance(listed, (dict, list)) else set()
    if lacking := [name for name in named_by(records) if name not in known]:
        found.faults.append(
            f"{len(lacking)} pictures that rows name are neither there nor accounted for ({lacking[0]})"
        )


def _versions(tools_used: Mapping[str, Any]) -> str:
    return short(", ".join(f"{name} {tools_used[name]}" for name in sorted(tools_used)), 120)


def _kept(path: tuple[str | int, ...]) -> bool:
    """Whether other versions give the same here."""
    return path[0] not in SENTENCES and path[-1] not in BOUNDS and path[0] != "missing"


def _differences(
    name: str, stored: Any, follows: Any, compared: Callable[[tuple[str | int, ...]], bool]
) -> Iterator[str]:
    """Where a file says something else than follows from the rows, in sentences."""
    was, now = dict(_leaves(stored)), dict(_leaves(follows))
    apart = [p for p in {**was, **now} if p and compared(p) and not _equal(was.get(p, _Nothing), now.get(p, _Nothing))]
    for path in apart[:SHOWN]:
        says, gives = (_words(values.get(path, _Nothing)) for values in (was, now))
        yield f"{name}: {'.'.join(map(str, path))} is {says}, and {gives} follows"
    if len(apart) > SHOWN:
        yield f"{name}: {len(apart) - SHOWN} more differences of this kind"


class _Nothing:
    """Stands for a value that one side lacks."""


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every plain value inside, with the way to it; empty containers count as values."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inside or not value:
        yield path, value
        return
    for key, item in inside:
        yield from _leaves(item, (*path, key))


def _equal(one: Any, other: Any) -> bool:
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (one, other))
    return (
        math.isclose(one, other, rel_tol=RTOL, abs_tol=RTOL) if numbers else type(one) is type(other) and one == other
    )


def _words(value: Any) -> str:
    return "nothing" if value is _Nothing else short(json.dumps(value, ensure_ascii=False))


def _bent(roc: Mapping[str, Any]) -> Iterator[str]:
    """Curves whose area or height is not the AUC or TPR that is stated beside them. (That of the wording alone is not in the rows.)"""
    for score in roc["scores"]:
        if score["roc"] is None:
            continue
        fpr, tpr = np.asarray(score["roc"]["fpr"]), np.asarray(score["roc"]["tpr"])
        area = float(((fpr[1:] - fpr[:-1]) * (tpr[1:] + tpr[:-1]) / 2).sum())
        height = float(tpr[fpr < score["fpr"]][-1])
        for what, stated, is_now in (("AUC", score["auc"], area), ("TPR", score["tpr"], height)):
            if not math.isclose(stated["value"], is_now, abs_tol=1e-9):
                yield f"the {what} of {score['score']} is stated as {stated['value']:g}, and its curve gives {is_now:g}"


def sound_packet(path: Path) -> None:
    """Refuse a packet whose sums do not hold.

    Raises:
        UsageError: they do not.
    """
    with Archive(path) as archive:
        found = Verified(path)
        check_sums(archive, found)
    if not found.sound:
        raise UsageError(f"{path} is not sound ({found.faults[0]}); see `mnemoscope verify {path}`.")
