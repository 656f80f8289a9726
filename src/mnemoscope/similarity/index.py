"""A reference set on disk: built from any source of pictures, continued after a kill, added to, asked for the nearest.

    index = ReferenceIndex.build("pictures", "references")
    index.calibrate("other-pictures")            # known not to be in the set
    audit(config, reference=index)

Building is bound by decoding, so a few threads decode ahead (:mod:`.reading`) while this one describes and writes. Memory
holds a batch, what is decoded ahead, and a few bytes per picture; vectors are memory-mapped when they are searched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .. import redaction
from ..bounds import COUNT, RATE, WORKERS, within
from ..errors import ModelFault, RunError, UsageError
from ..records.files import hash_file
from ..records.places import require_utf8
from ..records.store import differences, explained, whole
from ..stats import least_ordinary, threshold_at_fpr
from .base import DEFAULT, Descriptor, Match, Pictures, build, build_from_document, describe, matched, too_long
from .layout import CANDIDATES, Layouts, thumbnail, with_layouts
from .lengths import LONGEST
from .reading import Anything, Entry, Reading, Source, open_source, read
from .search import FLAT, Searcher, build_inverted, has_faiss
from .storage import (
    ROWS,
    VECTORS,
    Calibrated,
    DescriptorRecord,
    IndexFolder,
    IndexManifest,
    IndexRow,
    IndexWriter,
    Ledger,
    built_inverted,
    named_file,
    named_source,
)

__all__ = ["Answer", "Progress", "ReferenceIndex"]

COMMIT_EVERY, COMMIT_ROWS = 2.0, 4096
"""Seconds, and pictures, after which a batch goes to the disk: what a kill can cost."""

SHOWN = 512
"""Longest side of a reference picture that is kept beside a copy."""

PACKAGES = ("mnemoscope", "numpy", "pillow", "torch", "faiss-cpu")


@dataclass(frozen=True)
class Progress:
    """How far a build is.

    Attributes:
        done: Pictures of the source that have a row, with those of earlier sessions.
        asked: Pictures that the source has; None: nobody knows.
        errors: Pictures of this session without a descriptor.
        seconds: Time of this session.
        eta: Seconds that remain, at the speed so far.
        note: What just happened and is worth a line.
        hits: Always 0; audits count copies here.
    """

    done: int
    asked: int | None
    errors: int
    seconds: float
    eta: float | None
    note: str | None = None
    hits: int = 0


@dataclass(frozen=True)
class Answer:
    """What one picture's search gave.

    Attributes:
        id: The picture's.
        matches: The nearest references, most similar first; empty: there is a reason.
        reason: Why the picture was not looked up.
        note: What was converted.
    """

    id: str
    matches: list[Match]
    reason: str | None = None
    note: str | None = None


class ReferenceIndex:
    """An index on disk, for asking. It is what audits call a reference set.

    Args:
        folder: Folder of an index, or the index as it was opened for reading.
        descriptor: What pictures are described with; default: made again from the manifest.
        use_faiss: Whether faiss searches; default: if it is installed. The answers do not differ below 100,000 pictures.

    Raises:
        RunError: there is no index, or it is damaged.
        UsageError: the index was made with another descriptor, or its descriptor cannot be made again.
    """

    def __init__(
        self, folder: str | Path | IndexFolder, descriptor: Descriptor | None = None, *, use_faiss: bool | None = None
    ):
        self.files = folder if isinstance(folder, IndexFolder) else IndexFolder(folder)
        record = self.files.manifest.descriptor
        self.descriptor = _remade(record, self.files.folder) if descriptor is None else descriptor
        _require_same(record, self.descriptor, self.files.folder)
        self._search = Searcher(self.files.vectors, self.files.alive, self.files.usable_inverted(), use_faiss)
        self._numbers: dict[str, int] = {}
        self._layouts = Layouts(self.image)

    def __repr__(self) -> str:
        return f"ReferenceIndex({str(self.files.folder)!r}, {self.name}, {len(self)} pictures)"

    @classmethod
    @within(workers=WORKERS, batch=COUNT)
    def build(
        cls,
        source: Anything,
        folder: str | Path,
        descriptor: Descriptor | str = DEFAULT,
        *,
        options: Mapping[str, Any] | None = None,
        column: str | None = None,
        id_column: str | None = None,
        prefix: str = "",
        dtype: Literal["float16", "float32"] | None = None,
        workers: int | None = None,
        batch: int = 64,
        progress: Callable[[Progress], None] | None = None,
    ) -> ReferenceIndex:
        """Index every picture of a source. The same call continues an interrupted build, and adds what is new.

        A picture is known by its id; files that changed under a known id are counted and named, not indexed again.

        Args:
            source: See :func:`~mnemoscope.similarity.reading.open_source`.
            folder: A new folder, or that of an index with the same descriptor.
            descriptor: A descriptor, or the name of an installed one.
            options: Options of a descriptor that is given by name.
            column: For tables: the column of pictures.
            id_column: For tables: a column of ids.
            prefix: Stands before the ids of this source; a second source of one index needs a prefix of its own.
            dtype: Of the stored vectors; default: float32. float16 takes half of the disk and moves a similarity by about 1e-4.
            workers: Threads that decode; default: one per CPU.
            batch: Pictures that are described together.
            progress: Called after every batch.

        Raises:
            UsageError: the source holds no pictures, or the folder belongs to another descriptor, dtype or source.
            RunError: the folder is in use or damaged, or the disk is full; what was written is kept.
            ModelFault: the descriptor misbehaves.
            KeyboardInterrupt: stopped by the user; its text says how much is saved.
        """
        pictures = open_source(source, column=column, id_column=id_column)
        require_utf8(pictures.describe(), "the source of pictures")
        maker = descriptor if isinstance(descriptor, str) else None
        made = build(descriptor, options) if isinstance(descriptor, str) else descriptor
        record = DescriptorRecord(
            name=made.name, identity=made.identity(), maker=maker, options=redaction.without_secrets(options or {})
        )
        files = _opened(Path(folder), record, made, dtype)
        with IndexWriter(files) as writer:
            session = _Session(files, writer, made, pictures, prefix, batch, progress)
            session.work(workers)
            files = session.close()
        return cls(files, made)

    @property
    def name(self) -> str:
        """The descriptor's name."""
        return self.descriptor.name

    @property
    def threshold(self) -> float | None:
        """Similarity above which the nearest reference is called the origin of a copy; None: not calibrated."""
        return self.files.manifest.threshold

    def __len__(self) -> int:
        return len(self.files)

    @property
    def layout_threshold(self) -> float | None:
        """Layout similarity above which a template copy is called; None: not calibrated."""
        return self.files.manifest.layout_threshold

    def nearest(self, images: Pictures) -> list[Match]:
        """The most similar reference of each picture in [0, 1], and the one whose layout it shares most."""
        found = self._matches(self._described(images), CANDIDATES)
        return with_layouts(found, self._layouts.best(images, found), self.layout_threshold)

    @within(k=COUNT, workers=WORKERS, batch=COUNT)
    def query(self, source: Anything, k: int = 5, *, workers: int | None = None, batch: int = 64) -> Iterator[Answer]:
        """The k nearest references of every picture of a source, in its order."""
        readings = read(open_source(source), self.descriptor.prepare, workers=workers)
        while some := list(islice(readings, batch)):
            vectors, sound = _describe(self.descriptor, some)
            matches = iter(self._matches(vectors[sound], k))
            good = iter(sound.tolist())
            for r in some:
                if r.prepared is None:
                    yield Answer(r.entry.id, [], r.reason, r.note)
                elif next(good):
                    yield Answer(r.entry.id, next(matches), None, r.note)
                else:
                    yield Answer(r.entry.id, [], NOT_FINITE, r.note)

    @within(fmr=RATE)
    def calibrate(self, different: Pictures | Anything, *, fmr: float = 0.01, source: str = "") -> float:
        """Set, store and return the similarity that a different picture's nearest reference exceeds with probability ≤ ``fmr``.

        The whole search is calibrated, not one pair, because a set of thousands finds something similar to anything. Adding
        pictures therefore removes the threshold.

        Args:
            different: Pictures known not to be in the set: a tensor in [0, 1], or a source.
            fmr: Stated false-match rate.
            source: What they are, in words.

        Raises:
            UsageError: they are too few for this rate.
        """
        if isinstance(different, Tensor):
            matches = [m for some in different.split(64) for m in self.nearest(some)]
        else:
            source = source or str(different)[:200]
            matches = list(self._read_and_matched(different))
        found = [m.similarity for m in matches]
        if len(found) < least_ordinary(fmr):
            raise UsageError(
                f"{len(found)} different pictures cannot state a false-match rate of {fmr:g}; give at least {least_ordinary(fmr)}."
            )
        threshold = threshold_at_fpr(found, fmr).value
        layouts = [m.layout for m in matches if m.layout is not None]
        layout = threshold_at_fpr(layouts, fmr).value if len(layouts) == len(found) else None
        facts = Calibrated(fmr=fmr, different=len(found), references=len(self), source=source)
        self.files.update(threshold=threshold, layout_threshold=layout, calibration=facts.model_dump())
        return threshold

    def _read_and_matched(self, source: Anything, batch: int = 64) -> Iterator[Match]:
        """The nearest of every picture of a source that can be described, with layouts."""
        readings = read(open_source(source), lambda picture: (self.descriptor.prepare(picture), thumbnail(picture)))
        while some := list(islice(readings, batch)):
            good = [r for r in some if r.prepared is not None]
            vectors, sound = _describe(self.descriptor, [replace(r, prepared=r.prepared[0]) for r in good])
            if sound.any():
                small = torch.stack([r.prepared[1] for r, finite in zip(good, sound, strict=True) if finite])
                found = self._matches(vectors[sound], CANDIDATES)
                yield from with_layouts(found, self._layouts.best(small, found), None)

    def image(self, reference: str) -> Float[Tensor, "3 height width"] | None:
        """The reference picture of that id in [0, 1], at most 512 px long.

        None: it could not be read, is gone, its file has changed, or this user has not named the place where it is said to be.
        """
        number = self._numbers.get(reference)
        row = self.files.find(reference) if number is None else self.files.row(number)
        if row is None and reference in self.files.contents.skipped:
            return None
        if row is None:
            raise UsageError(f"{self.files.folder} has no picture {reference!r}.")
        picture = self.files.picture(row)
        if picture is None:
            return None
        picture.thumbnail((SHOWN, SHOWN))
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255

    def _described(self, images: Pictures) -> Float[np.ndarray, "batch dim"]:
        return describe(self.descriptor, images).cpu().numpy()

    def _matches(self, vectors: Float[np.ndarray, "batch dim"], k: int) -> list[list[Match]]:
        if not len(self):
            raise UsageError(f"{self.files.folder} holds no picture with a descriptor; build it from pictures first.")
        if not len(vectors):
            return []
        if vectors.shape[1] != self.files.manifest.dim:
            raise RunError(
                f"{self.files.folder} holds vectors of {self.files.manifest.dim} numbers, and {self.name} gives {vectors.shape[1]}; build "
                f"the index anew."
            )
        found = self._search.top(vectors, k)
        return [
            [self._match(s, i) for s, i in zip(similarity, number, strict=True) if i >= 0]
            for similarity, number in zip(found.similarity.tolist(), found.number.tolist(), strict=True)
        ]

    def _match(self, similarity: float, number: int) -> Match:
        name = self.files.row(number).id
        self._numbers[name] = number
        return matched(name, similarity, self.name, self.threshold)


NOT_FINITE = "not described: the descriptor gives NaN or infinity"


def _describe(
    descriptor: Descriptor, readings: list[Reading]
) -> tuple[Float[np.ndarray, "prepared dim"], np.ndarray[Any, np.dtype[np.bool_]]]:
    """Vectors of the readings that were prepared, and which of them are finite."""
    prepared = [r.prepared for r in readings if r.prepared is not None]
    if not prepared:
        return np.empty((0, 1), np.float32), np.empty(0, bool)
    with torch.inference_mode():
        vectors = _by_shape(descriptor, prepared)
    finite = np.isfinite(vectors).all(1)
    if (np.linalg.norm(vectors[finite], axis=1) > LONGEST).any():
        raise too_long(descriptor)
    return vectors, finite


def _by_shape(descriptor: Descriptor, prepared: list[Tensor]) -> Float[np.ndarray, "n dim"]:
    """Vectors of prepared pictures: those of one shape together, because a descriptor may keep proportions."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for i, picture in enumerate(prepared):
        shapes.setdefault(tuple(picture.shape), []).append(i)
    parts = [descriptor(torch.stack([prepared[i] for i in some])).float().cpu().numpy() for some in shapes.values()]
    for part, some in zip(parts, shapes.values(), strict=True):
        if part.ndim != 2 or len(part) != len(some):
            raise ModelFault(f"{descriptor.name} gives shape {part.shape} for {len(some)} pictures.")
    order = np.argsort([i for some in shapes.values() for i in some])
    return np.concatenate(parts)[order]


class _Session:
    """One build: what is new of one source, described and appended."""

    def __init__(
        self,
        files: IndexFolder,
        writer: IndexWriter,
        descriptor: Descriptor,
        source: Source,
        prefix: str,
        batch: int,
        progress: Callable[[Progress], None] | None,
    ):
        self.files, self.writer, self.descriptor, self.source = files, writer, descriptor, source
        self.prefix, self.batch, self.progress = prefix, batch, progress
        self.number = _register(files, source, prefix)
        self.single = files.manifest.sources[self.number]["kind"] == "files"
        self.asked = source.count() if progress is not None else None
        self.began = self._committed = time.perf_counter()
        self.known = self.fresh_done = self.errors = 0
        self.appended = self.described = 0
        self.changed: list[str] = []
        self.repeated: list[str] = []
        self._committing, self._told = False, -1
        self._rows: list[IndexRow] = []
        self._vectors: list[Float[np.ndarray, "n dim"]] = []

    def work(self, workers: int | None) -> None:
        """Everything that is new, until the source ends."""
        readings = read(self.source, self.descriptor.prepare, workers=workers, fresh=self.fresh)
        try:
            while some := list(islice(readings, self.batch)):
                self.take(some)
                if time.perf_counter() - self._committed >= COMMIT_EVERY or len(self._rows) >= COMMIT_ROWS:
                    self.commit()
                self.tell()
        except KeyboardInterrupt:
            if not self._committing:  # half of a commit is cut off by the next session; a second one would follow it
                self.commit()
            raise KeyboardInterrupt(
                f"stopped; {self.known + self.appended} pictures are indexed; the same command continues"
            ) from None
        self.commit()
        self.tell()

    def fresh(self, entries: list[Entry]) -> list[Entry]:
        """Those that have no row yet, or had a reason that may no longer hold."""
        return [entry for entry in entries if self._is_fresh(self.prefix + entry.id, entry.size)]

    def _is_fresh(self, name: str, size: int | None) -> bool:
        found = self.writer.known.get(name)
        if found is None or (found[1] == Ledger.SKIPPED and None not in (size, found[0]) and size != found[0]):
            self.writer.known[name] = size, Ledger.MET
            return True
        self.known += 1
        if found[1] == Ledger.MET:
            self.repeated.append(name)
        elif None not in (size, found[0]) and size != found[0]:
            self.changed.append(name)
        return False

    def take(self, readings: list[Reading]) -> None:
        """Describe some readings, and keep their rows until they are committed."""
        vectors, finite = _describe(self.descriptor, readings)
        good = iter(finite.tolist())
        for r in readings:
            reason = r.reason if r.prepared is None else None if next(good) else NOT_FINITE
            name = self.prefix + r.entry.id
            self.fresh_done += 1
            self.errors += reason is not None
            if reason is None or r.sha256 is not None or self.writer.unread.get(name) != _plain(reason):
                self._rows.append(self._row(name, r, reason))
        self._vectors.append(vectors[finite])

    def _row(self, name: str, r: Reading, reason: str | None) -> IndexRow:
        number = None
        if reason is None:
            number = self.writer.vectors + self.described
            self.described += 1
        return IndexRow(
            id=name,
            status="ok" if reason is None else "error",
            vector=number,
            source=self.number,
            at=r.entry.at,
            sha256=r.sha256,
            size=r.size,
            width=r.width,
            height=r.height,
            note=r.note,
            error=None if reason is None else _plain(reason),
            mark=named_file(r.entry.at or r.entry.id, r.sha256) if self.single and r.sha256 is not None else None,
        )

    def commit(self) -> None:
        """Everything so far goes to the disk, or nothing of it."""
        self._committed = time.perf_counter()
        if not self._rows:
            return
        self._committing = True
        vectors = [v for v in self._vectors if len(v)]
        dim = self.files.manifest.dim or (vectors[0].shape[1] if vectors else None)
        if self.files.manifest.status != "building" or self.files.manifest.dim != dim or not self.appended:
            self.files.update(status="building", dim=dim, ended=None, hashes={}, sources=self.files.manifest.sources)
        if any(v.shape[1] != dim for v in vectors):
            raise ModelFault(f"{self.descriptor.name} gives vectors of different lengths.")
        self.writer.append(self._rows, np.concatenate(vectors) if vectors else np.empty((0, dim or 1), np.float32))
        self.appended += len(self._rows)
        self._rows, self._vectors, self.described = [], [], 0
        self._committing = False

    def tell(self) -> None:
        """Tell the caller how far it is."""
        spent, done = time.perf_counter() - self.began, self.known + self.fresh_done
        if self.progress is None or done == self._told:
            return
        self._told = done
        left = None if self.asked is None else max(self.asked - done, 0)
        eta = None if left is None or not self.fresh_done else spent / self.fresh_done * left
        self.progress(Progress(done, self.asked, self.errors, spent, eta))

    def close(self) -> IndexFolder:
        """Count, hash and, for a large set, build the inverted file; nothing, if nothing came and the index was done.

        Returns:
            The index, opened anew.
        """
        files = IndexFolder(self.files.folder)
        large = has_faiss() and len(files.vectors) >= FLAT
        rebuilt = large and files.usable_inverted() is None
        if not self.appended and files.manifest.status == "done" and files.manifest.is_complete and not rebuilt:
            return files
        grown = len(files) != files.manifest.pictures
        changes: dict[str, Any] = {"notes": self._notes(grown)}
        if grown:
            changes |= {"threshold": None, "layout_threshold": None, "calibration": None}
        if large:
            changes["search"] = _inverted(files)
        names = [name for name in (ROWS, VECTORS) if (files.folder / name).is_file()]
        files.update(
            status="done",
            pictures=len(files),
            rows=files.contents.rows,
            vectors=len(files.vectors),
            skipped=files.skipped(),
            hashes={name: hash_file(files.folder / name) for name in names},
            versions=_versions(),
            ended=_now(),
            **changes,
        )
        return files

    def _notes(self, grown: bool) -> list[str]:
        notes = []
        if self.writer.lost:
            notes.append(
                f"{self.writer.lost:,} rows of the last build were gone; pictures of this source that lacked one were described again. If "
                f"the index has other sources, build from each of them again."
            )
        if self.changed:
            notes.append(
                f"{len(self.changed)} files changed since they were indexed and were not indexed again (first: {self.changed[0]}); "
                f"build the index anew to have them."
            )
        if self.repeated:
            notes.append(
                f"{len(self.repeated)} pictures have the id of an earlier one and were left out (first: {self.repeated[0]})."
            )
        if grown and self.files.manifest.threshold is not None:
            notes.append("pictures were added, so the threshold no longer holds; calibrate again.")
        return notes


def _plain(text: str) -> str:
    """A reason as UTF-8 can hold it: file names in it may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _opened(
    folder: Path, record: DescriptorRecord, descriptor: Descriptor, dtype: Literal["float16", "float32"] | None
) -> IndexFolder:
    """The index to write to: the one that is there, if it was made in the same way, or a new one."""
    if not IndexFolder.exists(folder):
        manifest = IndexManifest(descriptor=record, dtype=dtype or "float32", versions=_versions(), started=_now())
        return IndexFolder.create(folder, manifest)
    files = IndexFolder(folder)
    _require_same(files.manifest.descriptor, descriptor, folder)
    if dtype not in (None, files.manifest.dtype):
        raise UsageError(
            f"{folder} stores {files.manifest.dtype}, not {dtype}; use a new folder, or leave the dtype out."
        )
    return files


def _require_same(record: DescriptorRecord, descriptor: Descriptor, folder: Path) -> None:
    was = {"name": record.name, "identity": record.identity}
    if found := differences(was, {"name": descriptor.name, "identity": descriptor.identity()}):
        raise UsageError(
            f"{folder} was made with another descriptor ({found[0]}); use {record.name} as it was then, or build another index."
        )


def _remade(record: DescriptorRecord, folder: Path) -> Descriptor:
    if record.maker is None:
        raise UsageError(
            f"{folder} was made with a descriptor that was handed in ({record.name}); hand in the same one to ask it."
        )
    try:
        return build_from_document(record.maker, record.options)
    except UsageError as e:
        raise UsageError(f"{folder}: {e}") from None


def _register(files: IndexFolder, source: Source, prefix: str) -> int:
    """The source's number in this index."""
    record, known = named_source(source, prefix), files.manifest.sources
    number = next((i for i, other in enumerate(known) if _unmarked(other) == _unmarked(record)), None)
    if number is not None:
        if known[number] != record:  # the user names what somebody else named before
            files.update(sources=[*known[:number], record, *known[number + 1 :]])
        return number
    other = next((s for s in known if s.get("prefix", "") == prefix), None)
    if other is not None:
        raise UsageError(
            f"{files.folder} was built from {other.get('path', 'a list of files')}, and {record.get('path', 'a list of files')} is another "
            f"source: give its pictures a prefix of their own, so that ids stay apart, or use a new folder."
        )
    # On the disk with the first rows that speak of it.
    files.manifest = files.manifest.model_copy(update={"sources": [*known, record]})
    return len(known)


def _unmarked(record: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k != "mark"}


def _inverted(files: IndexFolder) -> dict[str, Any]:
    """Build or extend the inverted file; what it is, for the manifest."""
    try:
        with explained(files.folder), whole(files.inverted) as half:
            facts = build_inverted(files.vectors, Path(half), files.usable_inverted())
            return built_inverted(Path(half), facts)
    except RuntimeError as e:  # faiss' word for a disk that is full
        raise RunError(f"{files.inverted} cannot be written ({str(e)[:160]}); the rest of the index is sound.") from e


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
