"""``mnemoscope duplicates``: near-duplicates of a training set, joined with an audit of a model trained on it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..bounds import AMOUNT, SIMILARITY
from ..errors import UsageError
from . import places, screen
from .index import (
    AsJson,
    Column,
    DescriptorName,
    DescriptorOption,
    IdColumn,
    Workers,
    _option,
    build_index,
    quiet_pillow,
)
from .pairs import number_option

if TYPE_CHECKING:
    from ..records.schema import Thresholds
    from ..records.store import Run
    from ..similarity.duplicates import Clusters, Exposure, Share
    from ..similarity.storage import IndexFolder


def duplicates(
    images: Annotated[
        Path,
        typer.Argument(
            help="Folder, archive or Parquet of pictures, or the folder of an index.", parser=places.file_or_folder
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for clusters, contact sheets and, of pictures, the index.", parser=places.written_folder
        ),
    ] = Path("runs/duplicates"),
    threshold: Annotated[
        float | None,
        number_option(
            SIMILARITY, "Similarity above which two pictures are near-duplicates; default: the descriptor's."
        ),
    ] = None,
    run: Annotated[
        Path | None,
        _option("Run folder of an audit of the set's captions: join it with the clusters.", parser=places.folder),
    ] = None,
    captions: Annotated[
        Path | None,
        _option(
            "JSONL or CSV with file_name (or id) and text (or caption); default: prompt ids of the run are picture ids.",
            parser=places.file,
        ),
    ] = None,
    sheets: Annotated[int, number_option(AMOUNT, "Clusters with a contact sheet.")] = 12,
    descriptor: DescriptorName = None,
    descriptor_option: DescriptorOption = None,
    column: Column = None,
    id_column: IdColumn = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Find clusters of near-duplicates in a training set, and show what a model made of them.

    Example: mnemoscope duplicates pictures --run runs/mine
    """
    screen.say_loading(f"Looking for near-duplicates in {images} …")
    from ..similarity.storage import IndexFolder

    given = IndexFolder.exists(images)
    audited = (
        None if run is None else _audited(run, captions)
    )  # what is wrong with them is said before the long comparison
    with screen.stoppable(), quiet_pillow():
        if given:
            index = IndexFolder(images)
            for caution in index.cautions():
                screen.say(caution)
        else:
            more: dict[str, Any] = {"column": column, "id_column": id_column, "workers": workers}
            index = build_index(images, out / "index", descriptor, descriptor_option, **more).files
        _report(index, _threshold(index, threshold), out, sheets, audited, as_json=as_json)


def _report(
    index: IndexFolder,
    threshold: float,
    out: Path,
    sheets: int,
    audited: Audited | None,
    *,
    as_json: bool,
) -> None:
    from ..records.store import OutFolder
    from ..similarity.duplicates import find_clusters, write_clusters
    from ..similarity.index import Progress

    began, standing = time.perf_counter(), OutFolder(out)

    def moved(done: int, asked: int) -> Progress:
        standing.require()
        spent = time.perf_counter() - began
        return Progress(done, asked, 0, spent, spent / max(done, 1) * (asked - done))

    with screen.progress("comparing") as show:
        clusters = find_clusters(index, threshold, progress=lambda done, asked: show(moved(done, asked)))
    worst = write_clusters(index, clusters, out, sheets=sheets)
    exposure = None if audited is None else _joined(index, clusters, audited)
    figure = None if exposure is None else _figure(exposure, out)
    if as_json:
        document: dict[str, Any] = {"descriptor": index.manifest.descriptor.name, **clusters.summary(), "worst": worst}
        if exposure is not None:
            document["by_cluster_size"] = _plain(exposure)
        screen.show_json(document)
        return
    _show_clusters(index, clusters, worst)
    if exposure is not None:
        _show_exposure(exposure)
    screen.show()
    screen.show(f"Clusters: {out / 'clusters.jsonl'}" + (f"   Figure: {figure}" if figure else ""))


def _threshold(index: IndexFolder, asked: float | None) -> float:
    if asked is not None:
        return asked
    record = index.manifest.descriptor
    own = None
    if record.maker is not None:
        from ..similarity.base import build_from_document

        own = getattr(build_from_document(record.maker, record.options), "near_duplicate", None)
    if own is None:
        raise UsageError(f"{record.name} states no similarity of near-duplicates; give one with --threshold.")
    return own


def _show_clusters(index: IndexFolder, clusters: Clusters, worst: list[dict[str, Any]]) -> None:
    from ..report.words import prompts as counted

    facts = clusters.summary()
    screen.show(
        f"{facts['in_clusters']:,} of {counted(facts['pictures'], 'picture')} with a near-duplicate "
        f"({index.manifest.descriptor.name} above {clusters.threshold:g}), in {counted(facts['clusters'], 'cluster')}; "
        f"{counted(facts['redundant'], 'picture')} could go, {facts['identical_files']:,} of them the same file as another"
    )
    if skipped := index.skipped():
        screen.say("Not looked at: " + ", ".join(f"{n:,} {why}" for why, n in skipped.items()))
    if worst:
        screen.show()
        rows = [[str(w["size"]), f"{w['least_similarity']:.3f}", w["first"], w["sheet"]] for w in worst]
        screen.table(["pictures", "least similarity", "first", "contact sheet"], rows, right=(0, 1))


# With an audit ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Audited:
    """An audit to be joined: its run, its threshold if it has one, and which pictures each caption has (None: ids are the same)."""

    run: Run
    judged: Thresholds | None
    pictures: dict[str, list[str]] | None


def _audited(folder: Path, captions: Path | None) -> Audited:
    from ..records.store import Run
    from ..records.thresholds import parse_thresholds
    from ..report.summary import read_part

    run, judged = Run(folder), read_part(folder / "thresholds.json", parse_thresholds)
    if judged is None:
        screen.say(f"Not tested: {folder} has no thresholds.json, so no caption is above a threshold.")
    return Audited(run, judged, None if captions is None else _pictures_of(captions))


def _joined(index: IndexFolder, clusters: Clusters, audited: Audited) -> Exposure:
    from ..similarity.duplicates import by_cluster_size, memberships

    return by_cluster_size(
        audited.run.rows(),
        memberships(index, clusters),
        audited.pictures,
        detector=audited.judged.detector if audited.judged else "magnitude",
        threshold=audited.judged.threshold if audited.judged else None,
    )


def _pictures_of(path: Path) -> dict[str, list[str]]:
    """Caption → ids of its pictures, from the metadata file that a folder of pictures has for ``datasets``."""
    from ..audit.prompts import read_rows  # brings no torch

    if not os.path.isfile(path):
        raise UsageError(f"{path} does not exist; name a JSONL or CSV file of captions.")
    found: dict[str, list[str]] = {}
    for number, row in enumerate(read_rows(path), 1):
        name = next((row[k] for k in ("file_name", "id") if row.get(k) is not None), None)
        text = next((row[k] for k in ("text", "caption", "prompt") if row.get(k) is not None), None)
        if name is None or text is None:
            raise UsageError(f"row {number} of {path} lacks file_name or text; name the picture and its caption.")
        found.setdefault(str(text), []).append(str(name))
    return found


def _show_exposure(exposure: Exposure) -> None:
    screen.show()
    rows = [
        [
            level.size,
            str(level.clusters),
            str(level.captions),
            _share(level.above),
            _share(level.copies),
            "not tested" if level.own is None else str(level.own),
        ]
        for level in exposure.levels
    ]
    columns = ["cluster size", "clusters", "captions", "above threshold", "copy found", "of its own cluster"]
    screen.table(columns, rows, right=(0, 1, 2))
    if exposure.unmatched or exposure.untested:
        screen.say(
            f"Not in the table: {exposure.unmatched} captions of no picture in the set, {exposure.untested} without a result."
        )


def _share(share: Share | None) -> str:
    return "not tested" if share is None else f"{share.k}/{share.n}  {share.interval}"


def _plain(exposure: Exposure) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(exposure)


def _figure(exposure: Exposure, out: Path) -> Path | None:
    """Copies found against cluster size, where copies were looked for."""
    from ..records.store import write_whole
    from ..report.plots import CSS, Dose, dose_response

    doses = [
        Dose(level.low, level.copies.k, level.copies.n, level.copies.interval.low, level.copies.interval.high)
        for level in exposure.levels
        if level.copies is not None
    ]
    if not doses:
        return None
    head, _, rest = str(dose_response(doses)).partition(">")
    return write_whole(out / "copies.svg", f"{head}><style>{CSS}</style>{rest}".encode())
