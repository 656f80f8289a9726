"""What only a packet itself says: the folders that it was made of, its pictures, and which files it holds."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from ..errors import RunError
from ..records.measures import DRAWS, NAME, draw_file, target_file
from ..records.store import MEASURES, short
from ..similarity.decoding import KEPT, decode
from .archive import SUMS, Archive, plain
from .packet import PACKET, README, REPORT, ROC, SPLITS, Facts, Records, is_noise, named_by
from .parts import holds_rows_of
from .verified import Verified

__all__ = ["check_names", "check_parts", "check_pictures", "facts_of"]

STATED = {"run": str, "parts": list, "pictures": dict, "made_with": dict}
"""What of ``packet.json`` does not follow from the records."""

RECORDS = ("run.json", "samples.jsonl")
DERIVED = (PACKET, SPLITS, ROC, REPORT, README)


def facts_of(statement: Mapping[str, Any]) -> Facts:
    """What only ``packet.json`` says.

    Raises:
        RunError: it says something else.
    """
    if wrong := [name for name, kind in STATED.items() if not isinstance(statement.get(name), kind)]:
        raise RunError(f"{PACKET} has no {wrong[0]} that can be read; get the packet again from whoever made it.")
    return Facts(**{name: statement[name] for name in STATED})


# Files --------------------------------------------------------------------------------------------------------------------


def check_names(records: Records, result: Verified) -> None:
    """A packet holds what it must, and nothing that is no part of a packet."""
    names = records.archive.names.keys()
    needed = [*RECORDS, *DERIVED] + ([] if records.measures is None else [f"{MEASURES}/{REPORT}"])
    result.faults += [f"it holds no {name}" for name in needed if name not in names]
    known = {
        SUMS,
        "controls.json",
        *RECORDS,
        *DERIVED,
        *records.judged_by,
        *_beside(named_by(records)),
        *_measured(records),
    }
    result.faults += [f"{name} is no part of a packet" for name in sorted(names - known)]


def _beside(pictures: list[str]) -> Iterator[str]:
    """Pictures lie in a folder: next to the records are only these themselves."""
    return (name for name in pictures if "/" in name)


def _measured(records: Records) -> Iterator[str]:
    measures = records.measures
    if measures is None:
        return
    yield from (f"{MEASURES}/{name}" for name in (NAME, REPORT))
    if isinstance(measures.request.levels, str):
        yield f"{MEASURES}/{measures.request.levels}"
    yield from measured_pictures(records)
    for entry in measures.entries:
        yield f"{MEASURES}/pictures/{entry.id}.json"


def measured_pictures(records: Records) -> Iterator[str]:
    """Names that the pictures and the noises of measured pictures may have."""
    for entry in () if records.measures is None else records.measures.entries:
        files = [
            target_file(entry.id),
            f"pictures/{entry.id}.safetensors",
            *(draw_file(entry.id, k) for k in range(DRAWS)),
        ]
        yield from (f"{MEASURES}/{name}" for name in files)


# Parts --------------------------------------------------------------------------------------------------------------------


def check_parts(records: Records, facts: Facts, result: Verified) -> None:
    """The folders that were packed are those of the records: their sums, and what they say of themselves."""
    parts = facts.parts
    if not parts or not all(isinstance(part, dict) and isinstance(part.get("files"), dict) for part in parts):
        result.faults.append(f"{PACKET}: parts names no folder with its files")
        return
    result.faults += _name_faults(facts)
    result.faults += _sum_faults(records.archive, parts)
    result.faults += _statement_faults(records, parts)
    if holds_rows_of(records.archive, parts):
        result.checked.append(f"{PACKET}: sums of the {_folders(parts)} that were packed fit the files of the packet")
    elif any(part.get("rows_are_whole") for part in parts):
        result.faults.append(f"{PACKET}: parts states sums of files of rows, and samples.jsonl holds other rows")
    else:
        result.unchecked.append(
            f"{PACKET}: whether samples.jsonl holds the rows of the {_folders(parts)} that were packed: lines of these were left out"
        )


def _folders(parts: list[dict[str, Any]]) -> str:
    return "folder" if len(parts) == 1 else f"{len(parts)} folders"


def _name_faults(facts: Facts) -> Iterator[str]:
    first = facts.parts[0].get("folder")
    name = first if len(facts.parts) == 1 else f"{first} and {len(facts.parts) - 1} more"
    if facts.run != name:
        yield f"{PACKET}: run is {short(facts.run)!r}, and its parts are called {short(str(name))!r}"


def _sum_faults(archive: Archive, parts: list[dict[str, Any]]) -> Iterator[str]:
    """Files that were copied from a folder and have another sum there, or are missing here."""
    copied = {name for name in archive.names if re.fullmatch(r"(thresholds.*|controls)\.json", name)}
    named = {
        name
        for part in parts
        for name in part["files"]
        if re.fullmatch(r"(thresholds.*|controls)\.json", name) and plain(name)
    }
    if len(parts) == 1:
        copied.add("run.json")
    for name in sorted(copied):
        if archive.sha256(name) not in [part["files"].get(name) for part in parts]:
            yield f"{PACKET}: parts states another sum of {name} than it has"
    for name in sorted(named - archive.names.keys()):
        yield f"{PACKET}: parts names {name}, and the packet does not hold it"


def _statement_faults(records: Records, parts: list[dict[str, Any]]) -> Iterator[str]:
    """What parts say of themselves against the manifest; that of several folders has the first one's command and machine."""
    manifest = records.manifest.model_dump(mode="json")
    keys = ["command", "versions", "git", "machine"]
    if len(parts) == 1:
        keys += ["status", "started", "ended", "accepted", "notes"]
    for key in keys:
        if key in parts[0] and parts[0][key] != manifest[key]:
            yield f"{PACKET}: parts.0.{key} is another than in run.json"


# Pictures -----------------------------------------------------------------------------------------------------------------


def check_pictures(records: Records, facts: Facts, result: Verified) -> None:
    """Every picture that rows name is accounted for, is that of its row, has the stated sum, and is a picture."""
    archive, stated = records.archive, facts.pictures
    named = [*named_by(records), *measured_pictures(records)]
    there = [name for name in dict.fromkeys(named) if name in archive.names and "/" in name]
    result.faults += _account_faults(records, stated, there)
    result.faults += _row_faults(records, {*there})
    result.faults += _decoding_faults(archive, there)
    if isinstance(sums := stated.get("sha256"), dict):
        result.faults += _picture_sum_faults(archive, sums, there)
        result.checked.append(
            f"{len(there)} pictures: they are those of their rows, can be decoded, and have the sums of {PACKET}"
        )
    else:
        result.checked.append(f"{len(there)} pictures: they bear the names of their rows, and can be decoded")
        if there:
            result.unchecked.append(
                f"pictures: {PACKET} states no sums of them, as those of earlier versions; only {SUMS} says which they are"
            )
    result.notes += _absent_notes(stated)


def _listed(stated: Mapping[str, Any], kind: str) -> list[str]:
    names = stated.get(kind)
    return [name for name in names if isinstance(name, str)] if isinstance(names, (dict, list)) else []


def _account_faults(records: Records, stated: Mapping[str, Any], there: list[str]) -> Iterator[str]:
    rows, absent = named_by(records), [name for kind in ("left_out", "missing") for name in _listed(stated, kind)]
    known = {*there, *absent}
    if lacking := [name for name in rows if name not in known]:
        yield f"{len(lacking)} pictures that rows name are neither there nor accounted for ({short(lacking[0])})"
    if both := sorted({*there} & {*absent}):
        yield f"{PACKET}: {len(both)} pictures are called left out or missing, and are there ({short(both[0])})"
    if strange := sorted({*absent} - {*rows, *measured_pictures(records)}):
        yield f"{PACKET}: {len(strange)} pictures are called left out or missing that no row names ({short(strange[0])})"
    if stated.get("packed") != len(there):
        yield f"{PACKET}: pictures.packed is {short(repr(stated.get('packed')))}, and {len(there)} follows"


def _row_faults(records: Records, there: set[str]) -> Iterator[str]:
    """Pictures that are there under the name of another row, or of another reference."""
    foreign: list[str] = []
    files: dict[str, str] = {}
    drawn: set[str | None] = set()
    for row in records:
        drawn.add(row.image)
        if row.image in there and PurePosixPath(row.image).stem != row.id:
            foreign.append(row.image)
        near = row.nearest
        pairs = () if near is None else ((near.reference, near.file), (near.layout_reference, near.layout_file))
        for reference, file in pairs:
            if reference is None or file not in there:
                continue
            if files.setdefault(reference, file) != file or not _bears_name(file, reference):
                foreign.append(file)
    foreign += sorted(file for file in files.values() if file in drawn)
    if foreign:
        yield f"samples.jsonl: {len(foreign)} times a row names the picture of another row or reference ({short(foreign[0])})"


def _bears_name(file: str, reference: str) -> bool:
    """Whether a reference picture that the audit itself named is that of the reference."""
    digits = re.fullmatch(r"reference-([0-9a-f]{16})", PurePosixPath(file).stem)
    return digits is None or digits[1] == hashlib.sha256(reference.encode()).hexdigest()[:16]


def _picture_sum_faults(archive: Archive, sums: Mapping[str, Any], there: list[str]) -> Iterator[str]:
    if apart := sorted(sums.keys() ^ {*there}):
        yield f"{PACKET}: pictures.sha256 does not list the pictures that are there ({short(apart[0])})"
    if other := [name for name in there if name in sums and archive.sha256(name) != sums[name]]:
        yield f"{len(other)} pictures are others than {PACKET} states by their sums ({short(other[0])})"


def _decoding_faults(archive: Archive, there: list[str]) -> Iterator[str]:
    different = {archive.sha256(name): name for name in there if not is_noise(name)}
    for name in different.values():
        reason = decode(archive.read(name), KEPT).reason
        if reason is not None:
            yield f"{name} is no picture that can be shown ({reason})"


def _absent_notes(stated: Mapping[str, Any]) -> Iterator[str]:
    unreadable = _listed(stated, "unreadable")
    left_out = [name for name in _listed(stated, "left_out") if name not in unreadable]
    for names, why in (
        (left_out, "were left out, with their sums"),
        (_listed(stated, "missing"), "were missing when the packet was made"),
        (unreadable, "could not be decoded when the packet was made, and were left out"),
    ):
        if names:
            yield f"{len(names)} pictures {why} ({short(names[0])})"
