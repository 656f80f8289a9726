"""Is a packet whole, and does it follow from its own rows?

Two questions. The sums say whether anything was changed since the digest was noted. Whoever changes a file may change its sum
as well, so everything that follows from the records is made to follow once more: ids from prompts and settings, scores from their steps,
thresholds from the scores of ordinary prompts, counts, splits, ROC and their intervals from the rows, the reports from all of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MnemoscopeError, RunError, UsageError
from ..parsing import ParseError, parse_json, through_json
from ..records.store import short
from .archive import SUMS, Archive, parse_sums, sha256_of
from .claims import check_names, check_parts, check_pictures, facts_of
from .comparison import bounds_apart, find_differences, is_worded, same_page, sentences_apart
from .consistency import check_measures, check_rows, check_setting, check_thresholds
from .origin import tools
from .packet import (
    EVIDENCE,
    FORMAT,
    PACKET,
    READ_ME,
    README,
    ROC,
    SPLITS,
    Facts,
    Records,
    derive,
    render_reports,
    summary_of,
)
from .summary import Summary
from .verified import Verified

__all__ = ["Verified", "sound_packet", "verify"]

log = logging.getLogger(__name__)

Check = Callable[[Records, Verified], None]

OF_RECORDS: tuple[Check, ...] = (check_names, check_setting, check_rows, check_thresholds, check_measures)
"""Checks that whoever uses the records of a packet relies on."""

TAKEN = (
    "scores, similarities and pictures with the model and the reference pictures (`mnemoscope replay` does that)",
    "labels, groups and families of prompts, and versions, machines and dates, which stand as whoever made the packet states them",
)
"""What no packet can be compared with by itself."""


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
        result = Verified(Path(path))
        check_sums(archive, result, expected)
        _run_checks(archive, (*OF_RECORDS, _check_statement), result)
        result.unchecked += TAKEN
        return result


def sound_packet(path: Path) -> None:
    """Refuse a packet whose sums do not hold, or whose records contradict each other.

    Raises:
        UsageError: they do.
    """
    with Archive(path) as archive:
        result = Verified(path)
        check_sums(archive, result)
        _run_checks(archive, OF_RECORDS, result)
    if result.faults:
        raise UsageError(f"{path} is not sound ({result.faults[0]}); see `mnemoscope verify {path}`.")


def _run_checks(archive: Archive, checks: tuple[Check, ...], result: Verified) -> None:
    for check in checks:
        try:
            check(Records(archive), result)
        except MnemoscopeError as e:
            result.faults.append(str(e))
        except Exception as e:  # the packet was made by somebody else: what it breaks here is its own fault
            log.debug("%s of %s", check.__name__, archive.path, exc_info=e)
            result.faults.append(f"its records cannot be followed ({type(e).__name__}: {short(str(e))})")
    result.faults = list(dict.fromkeys(result.faults))


# Sums ---------------------------------------------------------------------------------------------------------------------


def check_sums(archive: Archive, result: Verified, expected: str | None = None) -> None:
    """Every file is listed with its SHA-256, and every listed file is there."""
    result.faults += archive.faults
    try:
        listing = archive.read(SUMS)
        sums = parse_sums(listing)
    except RunError as e:
        result.faults.append(str(e))
        return
    result.digest = sha256_of([listing])
    if expected is not None and expected.strip().lower().removeprefix("sha256:") != result.digest:
        result.faults.append(f"its digest is {result.digest}, and {expected} was noted: this is another packet")
    result.faults += [f"{name} is listed and missing" for name in sorted(sums.keys() - archive.names.keys())]
    result.faults += [f"{name} is there and not listed" for name in sorted(archive.names.keys() - sums.keys() - {SUMS})]
    for name in sorted(sums.keys() & archive.names.keys()):
        try:
            if archive.sha256(name) != sums[name]:
                result.faults.append(f"{name} was changed: its SHA-256 is not the one listed")
        except RunError as e:
            result.faults.append(str(e))
    result.checked.append(f"SHA-256 of {len(sums)} files, and that the archive holds nothing else")


# What follows -------------------------------------------------------------------------------------------------------------


def _check_statement(records: Records, result: Verified) -> None:
    """Let everything follow from the records once more, and compare."""
    stored = {name: _document(records.archive, name) for name in (PACKET, SPLITS, ROC)}
    statement = stored[PACKET]
    if statement.get("format") != FORMAT:
        raise RunError(
            f"{PACKET} has format {statement.get('format')!r}, and this version reads {FORMAT}; update mnemoscope."
        )
    facts = facts_of(statement)
    own = facts.made_with == tools()
    if not own:
        result.notes.append(
            f"the packet names other versions ({_versions(facts.made_with)}) than this one ({_versions(tools())}): bounds of intervals "
            f"were compared with a tolerance, and of sentences the numbers"
        )
    for check in (check_parts, check_pictures):
        check(records, facts, result)
    summary = summary_of(records, facts.run)
    derived = {name: through_json(value) for name, value in derive(records, summary, facts).items()}
    result.counts, result.status = derived[PACKET]["counts"], derived[PACKET]["status"]
    if result.status != "done":
        result.notes.append(f"the run is {result.status}, so what it has found is not all there was to find")
    result.faults += summary.tally.faults
    for name, value in derived.items():
        result.faults += find_differences(name, stored[name], value, _everything if own else _unworded)
    if not own:
        _compare_with_tolerance(stored, derived, facts, result)
    result.faults += [f"{ROC}: {fault}" for fault in _bent(derived[ROC])]
    result.checked.append(f"{PACKET}, {SPLITS} and {ROC} ({len(derived[ROC]['scores'])} curves) follow from the rows")
    if records.baseline is not None:
        result.unchecked.append(
            "controls.json: scores and clusters of the wording alone, which `mnemoscope audit` computes"
        )
    _check_pages(records, summary, own, result)


def _everything(place: tuple[str | int, ...]) -> bool:
    return True


def _unworded(place: tuple[str | int, ...]) -> bool:
    return not is_worded(place)


def _compare_with_tolerance(
    stored: Mapping[str, Any], derived: Mapping[str, Any], facts: Facts, result: Verified
) -> None:
    """What another version may draw or word otherwise."""
    apart = [fault for name in (PACKET, ROC) for fault in bounds_apart(name, stored[name], derived[name])]
    # Another release may draw intervals in another way: then only it can say what follows.
    (result.faults if facts.made_with.get("mnemoscope") == tools()["mnemoscope"] else result.doubts).extend(apart)
    result.faults += find_differences(
        ROC, {"missing": sorted(stored[ROC]["missing"])}, {"missing": sorted(derived[ROC]["missing"])}
    )
    for name in (PACKET, ROC):
        same, number = sentences_apart(stored[name], derived[name])
        if number is not None:
            result.doubts.append(
                f"the sentences of {name} and those that follow from the rows differ in a number ({number}), and it names another "
                f"version, whose sentences are not known here"
            )
        elif not same:
            result.unchecked.append(
                f"{name}: the words of its sentences, which name the same numbers as those that follow"
            )


def _document(archive: Archive, name: str) -> dict[str, Any]:
    try:
        content = parse_json(archive.read(name))
    except ParseError as e:
        raise RunError(f"{name} is damaged ({e}); get the packet again from whoever made it.") from e
    if not isinstance(content, dict):
        raise RunError(
            f"{name} holds {type(content).__name__}, not an object; get the packet again from whoever made it."
        )
    return content


def _versions(tools_used: Mapping[str, Any]) -> str:
    return short(", ".join(f"{name} {tools_used[name]}" for name in sorted(tools_used)), 120)


def _bent(roc: Mapping[str, Any]) -> list[str]:
    """Curves whose area or height is not the AUC or TPR that is stated beside them. (That of the wording alone is not in the rows.)"""
    faults = []
    for score in roc["scores"]:
        if score["roc"] is None:
            continue
        fpr, tpr = np.asarray(score["roc"]["fpr"]), np.asarray(score["roc"]["tpr"])
        area = float(((fpr[1:] - fpr[:-1]) * (tpr[1:] + tpr[:-1]) / 2).sum())
        height = float(tpr[fpr < score["fpr"]][-1])
        for what, stated, is_now in (("AUC", score["auc"], area), ("TPR", score["tpr"], height)):
            if abs(stated["value"] - is_now) > 1e-9:
                faults.append(
                    f"the {what} of {score['score']} is stated as {stated['value']:g}, and its curve gives {is_now:g}"
                )
    return faults


# Pages --------------------------------------------------------------------------------------------------------------------


def _check_pages(records: Records, summary: Summary, own: bool, result: Verified) -> None:
    """Make the reports once more, and compare them; so the text on how to check by hand.

    Reports are made of files, in a folder that is deleted afterwards, so nothing is written of records that only look like some.
    """
    if not _is_folder_name(summary.name):
        result.faults.append(f"{PACKET}: run is {short(summary.name)!r}, and no folder is called that")
        return
    if result.faults:
        result.unchecked.append("reports: they are made once more only of records that nothing is wrong with")
        return
    pages = {README: READ_ME.encode(), **render_reports(records.archive, summary)}
    same = []
    for name, page in pages.items():
        if same_page(records.archive.read(name), page):
            same.append(name)
        elif own:
            result.faults.append(f"{name} is not what follows from the records")
        else:
            result.unmade.append(name)
            result.unchecked.append(f"{name}: other versions made it, and this one makes another of the same records")
    if same:
        result.checked.append(f"{', '.join(same)}: made once more of the records, and equal")


def _is_folder_name(name: str) -> bool:
    """Whether a folder can be called that, so that nothing is written elsewhere."""
    return (
        name not in ("", ".", "..")
        and not any(sign in name for sign in "/\\\0")
        and len(name.encode(errors="replace")) <= 255
    )
