"""A packet: one archive with all that an audit's numbers rest on, for somebody who was not there.

    run.json          the manifest as the run left it          packet.json   the same in one place: access, what was not tested,
    samples.jsonl     every row, each sample once                            seeds, versions, counts, thresholds, parts
    thresholds.json   scores of ordinary prompts, if any       splits.json   the frozen prompts with group, label and cluster
    controls.json     the text-only baseline, if any           roc.json      ROC arrays, AUC and TPR with intervals
    images/…          the pictures that rows name              report.html   for people; README.txt says how to check by hand
    measures/…        results of pictures that were measured with the run, noises found included, if there are any

What stands on the left is evidence, copied byte for byte; what stands on the right follows from it (:func:`derive`), and
:mod:`.verify` lets it follow once more. Sums of all files are in ``SHA256SUMS``. There is no date in it and no pickle: packing the
same run twice gives the same bytes.
"""

from __future__ import annotations

import filecmp
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ..errors import RunError, UsageError
from ..parsing import ParseError, parse_json
from ..records.files import file_inside, folder_name
from ..records.measures import NAME, Entry, Measures, Request, kept_files, measured_with
from ..records.schema import FORMAT as MEASURES_FORMAT
from ..records.schema import Manifest, Nearest, Row, Thresholds
from ..records.store import JUDGED_BY, MEASURES, ROWS, Run, explained, first_error, whole
from ..records.thresholds import parse_thresholds
from ..similarity.decoding import KEPT, decode
from .archive import (
    SUMS,
    Archive,
    add,
    pieces_of,
    plain,
    same_name,
    sha256_file,
    sha256_of,
    write_sums,
)
from .audited import joined
from .discrimination import Baseline
from .html import SHOWN, write_report
from .measured_page import write_report as write_measured_report
from .origin import tools
from .parts import holds_rows_of
from .summary import Summary, finite, summarize

__all__ = [
    "FORMAT",
    "Facts",
    "Packed",
    "Records",
    "derive",
    "encoded",
    "inside",
    "is_noise",
    "named_by",
    "pack",
    "render_reports",
    "summary_of",
]

FORMAT = 1

PACKET, SPLITS, ROC, REPORT, README = "packet.json", "splits.json", "roc.json", "report.html", "README.txt"

EVIDENCE = ("run.json", "samples.jsonl")
"""What no packet can be without."""

READ_ME = """This archive is a packet of mnemoscope: the evidence of one audit of an image model for memorized training pictures.

packet.json     what was audited, with which access, command, settings, seeds and versions; what was not tested; what was found
run.json        the record that the audit itself kept, model and file hashes included
samples.jsonl   every sample: prompt, seed, scores, nearest reference picture
splits.json     the prompts with their groups, known labels and near-duplicate clusters
roc.json        ROC arrays, and AUC and TPR with their intervals
thresholds.json scores of ordinary prompts, from which the threshold follows (if the audit was calibrated)
controls.json   what the wording of the prompts alone can tell (if labels were known)
report.html     the same for people; open it in any browser
images/         pictures that rows name (if they were packed)
measures/       how strongly pictures are stored, with the noise that was found for each, and a report (if any were measured)
SHA256SUMS      SHA-256 of every other file

To check it without mnemoscope, unpack it into an empty folder, and there:

    sha256sum -c SHA256SUMS     every line must end in OK, and there must be no further file
    sha256sum SHA256SUMS        must give the digest that was noted when the packet was made

With mnemoscope: `mnemoscope verify PACKET` lets all numbers follow from the rows once more,
`mnemoscope replay PACKET` computes samples again where the model is at hand.

A score is evidence, not a verdict. The sums show that nothing was changed since the digest was noted; they do not show who made
the packet, or that the audit was an honest one.
"""


# Reading ------------------------------------------------------------------------------------------------------------------

_Record = TypeVar("_Record", bound=BaseModel)


class Records:
    """The records of one run inside an archive. Iterating gives its rows, from the start each time.

    Raises:
        RunError: (on reading a part) it is missing or damaged; the message names it.
    """

    def __init__(self, archive: Archive):
        self.archive = archive

    def __iter__(self) -> Iterator[Row]:
        for number, line in enumerate(self.archive.lines("samples.jsonl"), 1):
            yield self._parsed(Row, line, f"line {number} of samples.jsonl")

    @cached_property
    def manifest(self) -> Manifest:
        """``run.json``."""
        return self._parsed(Manifest, self.archive.read("run.json"), "run.json")

    @property
    def judged_by(self) -> list[str]:
        """Files of thresholds, that of the report first."""
        named = [n for n in self.archive.names if n.startswith("thresholds") and n.endswith(".json") and "/" not in n]
        return sorted(named, key=lambda n: (n != "thresholds.json", n))

    def thresholds(self, name: str = "thresholds.json") -> Thresholds | None:
        """Scores of ordinary prompts; None: the run was not calibrated."""
        if name not in self.archive.names:
            return None
        try:
            return parse_thresholds(self.archive.read(name))
        except ValueError as e:
            raise RunError(f"{name}: {e}; restore it before anything else.") from e

    @cached_property
    def baseline(self) -> Baseline | None:
        """``controls.json``; None: there is none."""
        if "controls.json" not in self.archive.names:
            return None
        try:
            return Baseline.parse(self.archive.read("controls.json"))
        except ValueError as e:
            raise RunError(f"controls.json is damaged ({e}); get the packet again from whoever made it.") from e

    @cached_property
    def measures(self) -> Measures | None:
        """Pictures that were measured with the run; None: none were."""
        name = f"{MEASURES}/{NAME}"
        if name not in self.archive.names:
            return None
        results = [n for n in self.archive.names if n.startswith(f"{MEASURES}/pictures/") and n.endswith(".json")]
        request = self._parsed(Request, self.archive.read(name), name)
        if request.format > MEASURES_FORMAT:
            raise RunError(
                f"{name} has format {request.format}, and this version reads {MEASURES_FORMAT}; update mnemoscope."
            )
        if isinstance(request.levels, str) and f"{MEASURES}/{request.levels}" not in self.archive.names:
            raise RunError(
                f"{name} names scores of known dose that are not in the packet; get it again from whoever made it."
            )
        entries = []
        for n in sorted(results):
            entries.append(entry := self._parsed(Entry, self.archive.read(n), n))
            if n != f"{MEASURES}/pictures/{entry.id}.json":
                raise RunError(
                    f"{n} holds the result of another picture ({entry.id}); get the packet again from whoever made it."
                )
        return Measures.of(Path(MEASURES), request, entries)

    def picture(self, name: str) -> bytes | None:
        """A picture that rows name; None: it was not packed, or is larger than any that a run keeps."""
        entry = self.archive.names.get(name)
        return self.archive.read(name) if entry is not None and entry.file_size <= KEPT.bytes else None

    def _parsed(self, kind: type[_Record], data: bytes, name: str) -> _Record:
        try:
            return kind.model_validate(parse_json(data))
        except ParseError as e:
            raise RunError(f"{name} is damaged ({e}); restore it before anything else.") from e
        except ValidationError as e:
            raise RunError(f"{name} is damaged ({first_error(e)}); restore it before anything else.") from e


# What follows from the records --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What a packet says that does not follow from the records.

    Attributes:
        run: What to call the run.
        parts: The folders that were packed: status, command, versions, sums of their files, and whether all lines of these were packed.
        pictures: Which pictures are in the packet, their sums and the sums of those that were left out.
        made_with: Versions of what computed the numbers.
    """

    run: str
    parts: list[dict[str, Any]]
    pictures: dict[str, Any]
    made_with: dict[str, str]


@dataclass(frozen=True)
class Packed:
    """A packet that was written.

    Attributes:
        path: The file.
        digest: SHA-256 of its ``SHA256SUMS``: what to write down, sign, or have timestamped.
        size: Of the file, in bytes.
        files: How many files are in it.
        status: Of the run, as far as its rows bear it out.
        counts: Samples asked, ok, failed, missing; prompts; pictures.
        notes: What a reader must know first.
    """

    path: Path
    digest: str
    size: int
    files: int
    status: str
    counts: dict[str, int]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "path": str(self.path)}


def summary_of(records: Records, name: str, detector: str | None = None) -> Summary:
    """The report's numbers, of the records alone; errors as :func:`~mnemoscope.report.summary.summarize`."""
    return summarize(records, records.manifest, records.thresholds(), records.baseline, detector=detector, name=name)


def derive(records: Records, summary: Summary, facts: Facts) -> dict[str, dict[str, Any]]:
    """The files that follow from the records, by name, as plain values.

    Raises:
        RunError: a record is damaged.
    """
    splits, counts = _splits(records)
    return {
        PACKET: finite(_statement(summary, counts, facts, records.measures)),
        SPLITS: splits,
        ROC: finite(_roc(records, summary)),
    }


def encoded(value: Mapping[str, Any]) -> bytes:
    """A file of the packet from its plain values."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _statement(summary: Summary, counts: dict[str, Any], facts: Facts, measures: Measures | None) -> dict[str, Any]:
    run, said = summary.manifest, summary.to_dict()
    seen, asked = counts.pop("seeds"), summary.tally.asked
    return {
        "format": FORMAT,
        **({} if measures is None else {"measured": _measured(measures)}),
        "made_with": facts.made_with,
        "run": facts.run,
        "kind": run.kind,
        "status": summary.status,
        "counts": {**counts, "asked": asked, "missing": max(asked - counts["ok"] - counts["failed"], 0)},
        **({"contradictions": list(summary.tally.faults)} if summary.tally.faults else {}),
        "found": {k: said[k] for k in ("detector", "above_threshold", "copy_found", "both", "significant")},
        "headline": said["headline"],
        "subline": said["subline"],
        "access": _access(summary),
        "not_tested": said["not_tested"],
        "command": run.command,
        "model": run.model,
        "target": run.target,
        "setting": run.setting,
        "config": run.config,
        "seeds": {
            "per_prompt": run.config.get("seeds"),
            "base_seed": run.setting.get("base_seed"),
            "seed_mode": run.setting.get("seed_mode"),
            "seen": seen,
        },
        "versions": run.versions,
        "git": run.git,
        "machine": run.machine,
        "started": run.started,
        "ended": run.ended,
        "accepted": run.accepted,
        "threshold": said["threshold"],
        "reference": run.config.get("reference"),
        "pictures": facts.pictures,
        "parts": facts.parts,
    }


def _measured(measures: Measures) -> dict[str, Any]:
    """What became of the measured pictures, the most strongly stored first."""
    counts = {status: measures.count(status) for status in ("reproduced", "censored", "screened out")}
    return {
        **measures.request.setting(),
        **counts,
        "waiting": measures.waiting,
        "scores": {e.id: e.numbers.score for e in measures.entries},
    }


def _access(summary: Summary) -> list[str]:
    """What the auditor had: the model's inside, and pictures to compare with."""
    scores = ", ".join(summary.manifest.setting.get("detectors", {})) or summary.detector or "no detector"
    hashed = "weights" in summary.manifest.target or "parameters" in summary.manifest.target
    model = (
        f"Model: its weights were loaded, and its predictions were read inside the sampler ({scores}). "
        f"{'Hashes of the weights are under target.' if hashed else 'The run recorded no hash of the weights.'}"
    )
    if all(f.best is None for f in summary.findings):
        return [model, "Training pictures: none were at hand, or none were compared with."]
    reference = summary.manifest.config.get("reference")
    size = reference.get("pictures") if isinstance(reference, dict) else None
    many = f"{size:,} reference pictures" if isinstance(size, int) else "reference pictures"
    return [model, f"Pictures: generated ones were compared with {many}; that the model was shown these is not tested."]


def _splits(records: Records) -> tuple[dict[str, Any], dict[str, Any]]:
    """The frozen prompts in the order of the rows, and counts on the way."""
    baseline = records.baseline
    cluster = dict(zip(baseline.prompts, baseline.clusters, strict=True)) if baseline else {}
    prompts: dict[tuple[str, str], dict[str, Any]] = {}
    counts: dict[str, Any] = {"ok": 0, "failed": 0}
    seeds: set[int] = set()
    for row in records:
        counts["ok" if row.status == "ok" else "failed"] += 1
        seeds.add(row.seed)
        fresh: dict[str, Any] = {
            "id": row.prompt_id,
            "prompt": row.prompt,
            "group": row.group,
            "label": row.label,
            "family": row.family,
            "control": row.control,
            "origin": row.origin,
            "cluster": cluster.get(row.prompt),
            "samples": [],
        }
        prompts.setdefault((row.prompt_id, row.prompt), fresh)["samples"].append(row.id)
    counts |= {"prompts": len(prompts), "seeds": sorted(seeds)}
    return {"format": FORMAT, "prompts": list(prompts.values())}, counts


def _roc(records: Records, summary: Summary) -> dict[str, Any]:
    """Curves of all detectors, the report's first, then of the wording alone; and why one is missing."""
    names = dict.fromkeys([summary.detector] if summary.detector else [])
    for row in records:
        names |= dict.fromkeys(row.scores)
    own, name_of = summary.detector, summary.name
    views = {name: summary if name == own else summary_of(records, name_of, name) for name in names}
    found = [d for view in views.values() for d in view.discrimination[:1]] + summary.discrimination[1:]
    why = {name: view.unseparated for name, view in views.items() if view.unseparated}
    why |= {name: NO_LABELS for name, view in views.items() if not view.discrimination and name not in why}
    if not summary.discrimination[1:]:
        why.setdefault("text only", "No text-only baseline of these prompts is stored, or none could be computed.")
    return {"format": FORMAT, "scores": [d.to_dict() for d in found], "missing": why}


NO_LABELS = "No scored prompt has a known label, so there is nothing to separate."


# Packing ------------------------------------------------------------------------------------------------------------------


def pack(folders: Sequence[str | Path], out: str | Path | None = None, *, images: bool = True) -> Packed:
    """Write a packet.

    Args:
        folders: A run folder, or the folders of one audit's shards (in any order). The run need not be done; the packet says so.
        out: The file; default ``<run folder>.packet.zip`` beside the (first) folder.
        images: Whether the pictures that rows name are packed. They may be other people's; without them their sums are kept, so
            that a picture that is shown later can be recognized.

    Raises:
        RunError: a folder holds no run or is damaged, or the packet cannot be written.
        UsageError: the folders are not of one audit, or another packet is there already.
    """
    given = _in_order([Path(f) for f in folders])
    path = Path(out) if out is not None else given[0].with_name(f"{given[0].resolve().name}.packet.zip")
    with joined(given, calibrations=True) as folder, explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as half:
            packed = _write(Path(half), path, folder, given, images)
            if path.exists() and not filecmp.cmp(half, path, shallow=False):
                raise UsageError(
                    f"{path} is there and holds something else, and its digest may have been noted; name another file with --out, "
                    f"or delete it."
                )
    return packed


def _in_order(folders: list[Path]) -> list[Path]:
    """Shards in the order of their numbers, however they were named."""
    if len(folders) < 2:
        return folders

    def place(folder: Path) -> tuple[int, str]:
        shard = str(Run(folder).manifest.config.get("shard") or "").partition("/")[0]
        return int(shard) if shard.isdecimal() else -1, folder_name(folder)

    return sorted(folders, key=place)


def _write(half: Path, path: Path, folder: Path, given: Sequence[Path], images: bool) -> Packed:
    run = Run(folder)
    if differing := run.differing():
        raise RunError(
            f"{' and '.join(map(str, given))}: several rows with a result are there for {differing:,} of the samples, and their values "
            f"differ. A packet has one row for each sample; take out those that do not belong to the run."
        )
    with zipfile.ZipFile(half, "w") as archive:
        add(archive, "run.json", pieces_of(folder / "run.json"))
        add(archive, "samples.jsonl", run.lines(), size=sum(f.stat().st_size for f in run.files()))
        for file in sorted(f for pattern in JUDGED_BY for f in folder.glob(pattern) if plain(f.name)):
            add(archive, file.name, pieces_of(file))
        measured, of_them = _kept_measures(given)
        for name, file in measured.items():
            add(archive, name, pieces_of(file), size=file.stat().st_size)
    with Archive(half) as archive:
        records = Records(archive)
        for name in records.judged_by:
            records.thresholds(name)  # refused now, not by whoever gets the packet
        pictures = _pictures(named_by(records), given) | of_them
    unreadable = _unreadable(pictures)
    packed = {n: file for n, file in pictures.items() if images and file is not None and n not in unreadable}
    with zipfile.ZipFile(half, "a") as archive:
        for name, file in packed.items():
            add(archive, name, pieces_of(file), size=file.stat().st_size)
    with Archive(half) as archive:
        facts = Facts(
            _name(given), _parts(given, archive), _described(pictures, list(packed), unreadable, archive), tools()
        )
        summary = summary_of(Records(archive), facts.run)
        derived = derive(Records(archive), summary, facts)
        reports = render_reports(archive, summary)
    with zipfile.ZipFile(half, "a") as archive:
        for name, value in derived.items():
            add(archive, name, [encoded(value)])
        add(archive, README, [READ_ME.encode()])
        for name, page in reports.items():
            add(archive, name, [page])
    with Archive(half) as archive:
        sums = write_sums({name: archive.sha256(name) for name in archive.names})
    with zipfile.ZipFile(half, "a") as archive:
        add(archive, SUMS, [sums])
    with half.open("rb+") as content:
        os.fsync(content.fileno())
    said = derived[PACKET]
    files, size = sums.count(b"\n") + 1, half.stat().st_size
    return Packed(path, sha256_of([sums]), size, files, said["status"], said["counts"], said["not_tested"])


def _name(given: Sequence[Path]) -> str:
    first = folder_name(given[0])
    return first if len(given) == 1 else f"{first} and {len(given) - 1} more"


def _parts(given: Sequence[Path], archive: Archive) -> list[dict[str, Any]]:
    """The folders that were packed, and whether the packet holds all lines of their rows, one file after another."""
    parts = [_part(folder) for folder in given]
    if len(parts) == 1:  # a run that goes on may have changed since it was copied
        parts[0] |= Records(archive).manifest.model_dump(mode="json", include=KEPT_OF_PART)
        copied = [name for name in parts[0]["files"] if name in archive.names and not ROWS.fullmatch(name)]
        parts[0]["files"] |= {name: archive.sha256(name) for name in copied}
    return [part | {"rows_are_whole": holds_rows_of(archive, parts)} for part in parts]


KEPT_OF_PART = {"status", "command", "started", "ended", "versions", "git", "machine", "accepted", "notes"}
"""What a part keeps of its manifest."""


def _part(folder: Path) -> dict[str, Any]:
    """One folder that was packed, and the sums of its files as they stand there."""
    run = Run(folder)
    judged_by = [f for pattern in JUDGED_BY for f in folder.glob(pattern)]
    files = [folder / "run.json", *run.files(), *judged_by]
    return {
        "folder": folder_name(folder),
        "shard": run.manifest.config.get("shard"),
        **run.manifest.model_dump(mode="json", include=KEPT_OF_PART),
        "files": {f.name: sha256_file(f) for f in sorted(files)},
    }


# Pictures


def named_by(rows: Iterable[Row]) -> list[str]:
    """Names of the pictures that rows speak of, generated and reference ones."""
    found: dict[str, None] = {}
    for row in rows:
        found |= dict.fromkeys(_files(row.image, row.nearest))
    return sorted(found)


def _files(image: str | None, nearest: Nearest | None) -> list[str]:
    """The picture of one sample, and those of the references beside it."""
    beside = [nearest.file, nearest.layout_file] if nearest is not None else []
    return [name for name in (image, *beside) if name is not None]


def _pictures(names: Iterable[str], folders: Sequence[Path]) -> dict[str, Path | None]:
    """Where each picture is; None: nowhere, or not inside a run folder."""
    found: dict[str, Path | None] = {}
    folded: set[str] = set()
    for name in names:
        file = next((f for d in folders if (f := inside(d, name)) is not None), None)
        found[name] = None if same_name(name) in folded else file
        folded.add(same_name(name))
    return found


def inside(folder: Path, name: str) -> Path | None:
    """The file of that name in a folder of the run folder; None: there is none, or its name leads out."""
    if not plain(name) or "/" not in name:  # next to the records only these themselves
        return None
    try:
        return file_inside(folder, name)
    except OSError:
        return None


def is_noise(name: str) -> bool:
    """Whether a file beside the rows is the noise that was found for a measured picture, and no picture."""
    return name.startswith(f"{MEASURES}/") and name.endswith(".safetensors")


def _unreadable(pictures: Mapping[str, Path | None]) -> dict[str, str]:
    """Why files that should be pictures are none, by their names."""
    reasons = {
        name: decode(b"".join(pieces_of(file)), KEPT).reason if file.stat().st_size <= KEPT.bytes else "too large"
        for name, file in pictures.items()
        if file is not None and not is_noise(name)
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _described(
    pictures: Mapping[str, Path | None], packed: Sequence[str], unreadable: Mapping[str, str], archive: Archive
) -> dict[str, Any]:
    left_out = {name: file for name, file in pictures.items() if file is not None and name not in archive.names}
    return {
        "packed": len(packed),
        "sha256": {name: archive.sha256(name) for name in packed},
        "left_out": {name: sha256_file(file) for name, file in left_out.items()},
        "unreadable": dict(unreadable),
        "missing": [name for name, file in pictures.items() if file is None],
    }


def _kept_measures(given: Sequence[Path]) -> tuple[dict[str, Path], dict[str, Path | None]]:
    """Records of the measured pictures of a run, and pictures with the noises that lead to them, by their names in the packet.

    Raises:
        UsageError: several of the folders hold measured pictures.
    """
    found = [measured for folder in given if (measured := measured_with(folder)) is not None]
    if len(found) > 1:
        raise UsageError(
            f"{found[0]} and {found[1]} both hold measured pictures, and a packet has one such folder; measure all of them with --out "
            f"{found[0]}, and put the other away."
        )
    if not found:
        return {}, {}
    records, pictures = kept_files(found[0])
    return (
        {f"{MEASURES}/{name}": found[0] / name for name in records},
        {f"{MEASURES}/{name}": found[0] / name for name in pictures},
    )


# The report


def render_reports(archive: Archive, summary: Summary) -> dict[str, bytes]:
    """``report.html``, and that of measured pictures, of exactly the records in the archive, with the pictures that are there.

    Raises:
        RunError: a record is damaged.
    """
    shots = [shot for finding in summary.findings[:SHOWN] for shot in finding.shots]
    named = [name for shot in shots for name in _files(shot.image, shot.nearest)]
    with TemporaryDirectory() as parent:
        folder = Path(parent) / summary.name
        measured = [name for name in archive.names if name.startswith(f"{MEASURES}/") and not name.endswith(REPORT)]
        for name in dict.fromkeys([*EVIDENCE, *Records(archive).judged_by, "controls.json", *named, *measured]):
            if name in archive.names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with (folder / name).open("wb") as out:
                    out.writelines(archive.pieces(name))
        made = {REPORT: write_report(folder).read_bytes()}
        if measured:
            made[f"{MEASURES}/{REPORT}"] = write_measured_report(folder / MEASURES).read_bytes()
        return made
