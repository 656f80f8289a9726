"""The folder of an index: what it holds, appending to it, and repairing what a kill left behind. No torch.

    references/
      manifest.json    descriptor, sources, counts, hashes, threshold; replaced atomically
      rows.jsonl       one line per picture that was looked at, in order; those without a descriptor say why
      vectors.bin      descriptors, one after the other, little-endian float16 or float32
      vectors.faiss    derived: the inverted file of a large set; can be deleted

The JSON lines are the truth: a vector without a row is no result, and the next writer cuts it off. Vectors are therefore
written, and on the disk, before their rows.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Bool, Float
from PIL import Image
from pydantic import ConfigDict, Field

from ..errors import RunError
from ..records.schema import Record
from ..records.store import explained, in_use, read_document, sound_lines, write_all, write_whole
from .reading import Source, picture_of, reopened

__all__ = [
    "Calibrated",
    "DescriptorRecord",
    "IndexFolder",
    "IndexManifest",
    "IndexRow",
    "IndexWriter",
    "Ledger",
]

FORMAT = 1
MANIFEST, ROWS, VECTORS, INVERTED = "manifest.json", "rows.jsonl", "vectors.bin", "vectors.faiss"


class DescriptorRecord(Record):
    """What made the vectors."""

    name: str
    identity: dict[str, Any]
    """Hash of the weights and preprocessing: an index answers only the descriptor that has the same."""
    maker: str | None = None
    """Name under which it is installed, and its options: how to make it again. None: it was handed in."""
    options: dict[str, Any] = Field(default_factory=dict)


class Calibrated(Record):
    """Where a threshold comes from."""

    model_config = ConfigDict(allow_inf_nan=False)

    fmr: float
    """Stated false-match rate: a different picture's nearest reference is above the threshold with at most this probability."""
    different: int
    """Pictures known not to be in the set that were looked up."""
    references: int
    """Pictures that were in the set: in a larger one, something similar is found more often."""
    source: str = ""


class IndexManifest(Record):
    """``manifest.json``."""

    model_config = ConfigDict(allow_inf_nan=False)

    format: int = FORMAT
    kind: Literal["index"] = "index"
    status: Literal["building", "done"] = "building"
    descriptor: DescriptorRecord
    dtype: Literal["float16", "float32"] = "float32"
    dim: int | None = None
    """Length of a vector; None: there is none yet."""
    sources: list[dict[str, Any]] = Field(default_factory=list)
    """What rows' ``source`` counts."""
    pictures: int = 0
    """Pictures with a vector, when the last build ended; as all counts here."""
    skipped: dict[str, int] = Field(default_factory=dict)
    """Pictures without one, by the kind of reason."""
    notes: list[str] = Field(default_factory=list)
    """What a reader must know about the last build."""
    hashes: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of the other files, when the last build ended."""
    threshold: float | None = None
    layout_threshold: float | None = None
    """Similarity above which the nearest reference is called the origin of a copy; None: not calibrated."""
    calibration: Calibrated | None = None
    search: dict[str, Any] | None = None
    """Parameters and measured recall of the inverted file; None: there is none, search is exact."""
    versions: dict[str, str] = Field(default_factory=dict)
    started: str = ""
    ended: str | None = None


class IndexRow(Record):
    """One picture of the set."""

    id: str
    status: Literal["ok", "error"]
    vector: int | None = None
    """Which vector is its descriptor; None: it has none."""
    source: int = 0
    at: str | None = None
    """Where it is in its source, if that is not its id."""
    sha256: str | None = None
    """Of the file's bytes; None: they could not be read, and the next build tries again."""
    size: int | None = None
    width: int | None = None
    height: int | None = None
    note: str | None = None
    error: str | None = None
    """Why there is no vector: a kind and, after a colon, what exactly."""


class Ledger:
    """Which pictures are known already: 17 bytes of memory for each, whatever its name.

    An id is known by 64 bits of its hash: among a million pictures, two collide with a probability of 3 in 100 million.
    """

    SKIPPED, DESCRIBED, MET = range(3)
    """States: it has a row without a vector; with one; it was met in this session."""

    MERGE = 65_536

    def __init__(self) -> None:
        self._keys, self._sizes = np.empty(0, np.uint64), np.empty(0, np.int64)
        self._states = np.empty(0, np.int8)
        self._recent: dict[int, tuple[int, int]] = {}

    def __setitem__(self, name: str, fact: tuple[int | None, int]) -> None:
        """Enter an id with the size of its file (None: not known) and its state, in place of what was entered before."""
        size, state = fact
        self._recent[self._key(name)] = (-1 if size is None else size, state)
        if len(self._recent) >= self.MERGE:
            self._merge()

    def get(self, name: str) -> tuple[int | None, int] | None:
        """Size and state of an id, or None."""
        key = self._key(name)
        found = self._recent.get(key)
        if found is None:
            i = int(np.searchsorted(self._keys, np.uint64(key)))
            if i == len(self._keys) or int(self._keys[i]) != key:
                return None
            found = int(self._sizes[i]), int(self._states[i])
        return (None if found[0] < 0 else found[0]), found[1]

    @staticmethod
    def _key(name: str) -> int:
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")

    def _merge(self) -> None:
        n = len(self._recent)
        sizes = np.fromiter((size for size, _ in self._recent.values()), np.int64, n)
        states = np.fromiter((state for _, state in self._recent.values()), np.int8, n)
        # Recent entries go first, because np.unique keeps the first of equal keys.
        keys = np.concatenate([np.fromiter(self._recent, np.uint64, n), self._keys])
        self._keys, first = np.unique(keys, return_index=True)
        self._sizes = np.concatenate([sizes, self._sizes])[first]
        self._states = np.concatenate([states, self._states])[first]
        self._recent = {}


@dataclass
class _Contents:
    """One pass over the rows.

    Attributes:
        offsets: Where the row of each vector begins; −1: no row has it.
        skipped: Pictures without a vector, and why.
        described: Pictures with one.
    """

    offsets: array[int] = field(default_factory=lambda: array("q"))
    skipped: dict[str, str] = field(default_factory=dict)
    described: int = 0

    def note(self, head: dict[str, Any], offset: int) -> None:
        if head["status"] == "ok":
            gap = head["vector"] + 1 - len(self.offsets)
            self.offsets.extend([-1] * gap)
            self.described += self.offsets[head["vector"]] < 0
            self.offsets[head["vector"]] = offset
            self.skipped.pop(head["id"], None)
        else:
            self.skipped[head["id"]] = head["error"]


class IndexFolder:
    """An index on disk, for reading.

    Args:
        folder: Where ``manifest.json`` is.

    Raises:
        RunError: there is no index, or it cannot be read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = self._read_manifest()
        self._sources: dict[int, Source | None] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r}, {self.manifest.descriptor.name}, {len(self)} pictures)"

    @classmethod
    def exists(cls, folder: str | Path) -> bool:
        """Whether a folder holds an index."""
        return (Path(folder) / MANIFEST).is_file() and (Path(folder) / ROWS).is_file()

    @classmethod
    def create(cls, folder: str | Path, manifest: IndexManifest) -> IndexFolder:
        """A new, empty index.

        Raises:
            RunError: the folder holds something else, or cannot be written.
        """
        folder = Path(folder)
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            strangers = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".") and p.name != MANIFEST)
        if strangers:
            raise RunError(f"{folder} holds {strangers[0]!r} and no index; choose a new folder for the index.")
        _save(folder, manifest)
        with explained(folder):
            (folder / ROWS).touch()
        return cls(folder)

    def _read_manifest(self) -> IndexManifest:
        missing = f"{self.folder} holds no index (no {MANIFEST}); make one with `mnemoscope index build`."
        return read_document(self.folder / MANIFEST, IndexManifest, FORMAT, missing, "no index", "build the index anew")

    def update(self, **changes: Any) -> None:
        """Change fields of the manifest on disk."""
        self.manifest = self._read_manifest()
        self.manifest = IndexManifest.model_validate(self.manifest.model_dump() | changes)
        _save(self.folder, self.manifest)

    # What is in it --------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Pictures with a vector."""
        return self.contents.described

    @cached_property
    def contents(self) -> _Contents:
        """One pass over the rows, when first asked for: eight bytes of memory per picture."""
        found = _Contents()
        for head, offset, _ in _heads(self.folder / ROWS):
            found.note(head, offset)
        return found

    def skipped(self) -> dict[str, int]:
        """Pictures that have no vector, by the kind of reason."""
        found = Counter(reason.partition(":")[0] for reason in self.contents.skipped.values())
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    @cached_property
    def vectors(self) -> Float[np.ndarray, "n dim"]:
        """All vectors, memory-mapped.

        Raises:
            RunError: fewer are there than rows speak of.
        """
        n, dim = len(self.contents.offsets), self.manifest.dim
        if not n or dim is None:
            return np.empty((0, dim or 1), self.dtype)
        path = self.folder / VECTORS
        there = path.stat().st_size // (dim * self.dtype.itemsize) if path.is_file() else 0
        if there < n:
            raise RunError(f"{path} holds {there} of {n} descriptors; restore the file, or build the index anew.")
        return np.memmap(path, self.dtype, "r", shape=(n, dim))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored vectors."""
        return np.dtype(self.manifest.dtype).newbyteorder("<")

    @cached_property
    def alive(self) -> Bool[np.ndarray, " n"]:
        """Which vectors belong to a picture. All of them, unless somebody deleted rows."""
        return np.array(self.contents.offsets, np.int64) >= 0

    def row(self, number: int) -> IndexRow:
        """The row of a vector."""
        with (self.folder / ROWS).open("rb") as file:
            file.seek(self.contents.offsets[number])
            return IndexRow.model_validate_json(file.readline())

    def rows(self) -> Iterator[IndexRow]:
        """Every row, one in memory at a time. A picture that could not be read may have several; the last one counts."""
        for _, _, raw in _heads(self.folder / ROWS):
            yield IndexRow.model_validate_json(raw)

    def find(self, name: str) -> IndexRow | None:
        """The row of a picture with a vector, looked for from the beginning."""
        for head, _, raw in _heads(self.folder / ROWS):
            if head["id"] == name and head["status"] == "ok":
                return IndexRow.model_validate_json(raw)
        return None

    def picture(self, row: IndexRow) -> Image.Image | None:
        """The picture of a row, from where it was indexed; None: it is gone, or its file is no longer the same."""
        source = self._source(row.source)
        if source is None or row.sha256 is None:
            return None
        prefix = self.manifest.sources[row.source].get("prefix", "")
        return picture_of(source, row.at or row.id.removeprefix(prefix), row.sha256)

    def _source(self, number: int) -> Source | None:
        if number not in self._sources:
            self._sources[number] = reopened(self.manifest.sources[number])
        return self._sources[number]

    @property
    def inverted(self) -> Path:
        """Where the inverted file is, if there is one."""
        return self.folder / INVERTED


def _heads(path: Path) -> Iterator[tuple[dict[str, Any], int, bytes]]:
    """Each sound row as plain values, where it begins, and its bytes."""
    for line in sound_lines(path):
        yield line.head, line.end - len(line.raw), line.raw


def _save(folder: Path, manifest: IndexManifest) -> None:
    write_whole(folder / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())


class IndexWriter:
    """Appends to an index; a context manager that holds its lock, which ends with the process however that ends.

    Attributes:
        known: The pictures that rows speak of.
        unread: Those whose bytes could not be had, with the reason.
        vectors: How many vectors there are.

    Raises:
        RunError: another process writes this index, the disk is full, or a file is damaged.
    """

    def __init__(self, index: IndexFolder):
        self.index, self.known = index, Ledger()
        self.unread: dict[str, str] = {}
        self._lock = FileLock(index.folder / ".lock", timeout=0)

    def __enter__(self) -> IndexWriter:
        try:
            self._lock.acquire()
        except Timeout:
            raise in_use(self.index.folder) from None
        try:
            self._take_stock()
            with explained(self.index.folder):
                self._rows = _Appended(self.index.folder / ROWS, self._end)
                self._vectors = _Appended(self.index.folder / VECTORS, self.vectors * self._stride)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.close()
        self._vectors.close()
        self._lock.release()

    def _take_stock(self) -> None:
        self._end = self.vectors = 0
        for head, offset, raw in _heads(self.index.folder / ROWS):
            self._end = offset + len(raw)
            if head["status"] == "ok":
                self.vectors = max(self.vectors, head["vector"] + 1)
            if "sha256" in head:
                state = Ledger.DESCRIBED if head["status"] == "ok" else Ledger.SKIPPED
                self.known[head["id"]] = head.get("size"), state
                self.unread.pop(head["id"], None)
            else:
                self.unread[head["id"]] = head["error"]
        path = self.index.folder / VECTORS
        size = path.stat().st_size if path.is_file() else 0
        if size < self.vectors * self._stride:
            raise RunError(
                f"{path} holds {size // self._stride} of {self.vectors} descriptors; restore the file, or build the index anew."
            )

    @property
    def _stride(self) -> int:
        return (self.index.manifest.dim or 0) * self.index.dtype.itemsize

    def append(self, rows: Sequence[IndexRow], vectors: Float[np.ndarray, "n dim"]) -> None:
        """Append rows and the vectors of those that are ok, in their order, and wait until the disk has them."""
        with explained(self.index.folder):
            self._vectors.append(vectors.astype(self.index.dtype).tobytes())
            try:
                self._rows.append("".join(row.model_dump_json(exclude_none=True) + "\n" for row in rows).encode())
            except OSError:
                self._vectors.cut(self.vectors * self._stride)
                raise
        self.vectors += len(vectors)


class _Appended:
    """A file that is only ever appended to; half of an append is none."""

    def __init__(self, path: Path, end: int):
        self._file, self._end = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666), end
        os.ftruncate(self._file, end)  # what the process before us tore

    def append(self, data: bytes) -> None:
        try:
            write_all(self._file, data)
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(data)

    def cut(self, end: int) -> None:
        os.ftruncate(self._file, end)
        self._end = end

    def close(self) -> None:
        os.close(self._file)
