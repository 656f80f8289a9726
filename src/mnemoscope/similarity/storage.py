"""The folder of an index: what it holds, appending to it, and repairing what a kill left behind. No torch.

    references/
      manifest.json    descriptor, sources, counts, hashes, threshold; replaced atomically
      rows.jsonl       one line per picture that was looked at, in order; those without a descriptor say why
      vectors.bin      descriptors, one after the other, little-endian float16 or float32
      vectors.faiss    derived: the inverted file of a large set; can be deleted

The JSON lines are the truth: a vector without a row is no result, and the next writer cuts it off. Vectors are therefore
written, and on the disk, before their rows.

A build that ends writes counts and hashes into the manifest. From then on, what the other files hold is compared with it before
anything is answered: a row that is gone would hide a copy, and nobody would know. While an index is being built, rows are ahead of it.

An index may come from somebody else, and says where its pictures are. Only places that this user has named are opened, and only an
inverted file that this user has built is loaded: sources, single files and ``search`` carry a mark (:mod:`~mnemoscope.records.marks`).
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from pydantic import ConfigDict, Field, ValidationError, field_validator

from ..errors import RunError, UnknownName, UsageError
from ..parsing import ParseError, parse_json, through_json
from ..records.files import file_inside, hash_file, open_inside
from ..records.marks import has_mark, mark_of
from ..records.once import compute_once
from ..records.places import require_utf8
from ..records.schema import Record
from ..records.store import (
    deleted,
    explained,
    first_error,
    locked,
    read_document,
    require_file,
    short,
    sound_lines,
    write_all,
    write_whole,
)
from . import search
from .lengths import Lengths, examine
from .reading import Anything, Source, open_source, picture_of, reopened

__all__ = [
    "Calibrated",
    "DescriptorRecord",
    "IndexFolder",
    "IndexManifest",
    "IndexRow",
    "IndexWriter",
    "Ledger",
    "built_inverted",
    "named_file",
    "named_source",
]

FORMAT = 1
MANIFEST, ROWS, VECTORS, INVERTED = "manifest.json", "rows.jsonl", "vectors.bin", "vectors.faiss"

SOURCE, FILE = "source", "file"
"""Kinds of facts that carry a mark, besides :data:`INVERTED`."""

TRIED = 16
"""Pictures that are looked for in a place that is said to hold those of an index."""

REOPENED = 3
"""Times that an index is looked at again because another process has written it meanwhile."""

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Similarity = Annotated[float, Field(ge=-1.01, le=1.01)]
"""Earlier versions did not round similarities down to 1."""

RESTORE = "restore it, or build the index anew in another folder"
"""What to do where a file of an index is not what it was."""

SOURCE_KEYS = {"kind", "path", "column", "id_column", "prefix", "mark"}
"""What a manifest says of a source."""


class DescriptorRecord(Record):
    """What made the vectors."""

    name: str
    identity: dict[str, Any]
    """Hash of the weights and preprocessing: an index answers only the descriptor that has the same."""
    maker: str | None = None
    """Name under which it is installed, and its options but secret ones: how to make it again. None: it was handed in."""
    options: dict[str, Any] = Field(default_factory=dict)


class Calibrated(Record):
    """Where a threshold comes from."""

    model_config = ConfigDict(allow_inf_nan=False)

    fmr: float = Field(gt=0, lt=1)
    """Stated false-match rate: a different picture's nearest reference is above the threshold with at most this probability."""
    different: int = Field(ge=0)
    """Pictures known not to be in the set that were looked up."""
    references: int = Field(ge=0)
    """Pictures that were in the set: in a larger one, something similar is found more often."""
    source: str = ""


class IndexManifest(Record):
    """``manifest.json``."""

    model_config = ConfigDict(allow_inf_nan=False)

    format: int = Field(default=FORMAT, ge=1, le=FORMAT)
    kind: Literal["index"] = "index"
    status: Literal["building", "done"] = "building"
    descriptor: DescriptorRecord
    dtype: Literal["float16", "float32"] = "float32"
    dim: int | None = Field(default=None, ge=1, le=1 << 24)
    """Numbers in a vector; None: there is none yet."""
    sources: list[dict[str, Any]] = Field(default_factory=list)
    """What rows' ``source`` counts. ``mark``: of the user who named it."""

    @field_validator("sources")
    @classmethod
    def _plain_sources(cls, value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for source in value:
            if not {"kind"} <= source.keys() <= SOURCE_KEYS:
                raise ValueError(f"a source has {', '.join(sorted(SOURCE_KEYS))}, and a kind at least")
            if not all(isinstance(v, str) or (v is None and k.endswith("column")) for k, v in source.items()):
                raise ValueError("what a source is, and where, must be texts")
        return value

    pictures: int = Field(default=0, ge=0)
    """Pictures with a vector, when the last build ended; as all counts here."""
    rows: int | None = Field(default=None, ge=0)
    """Lines of ``rows.jsonl``; None: an earlier version ended the last build, or none has ended."""
    vectors: int | None = Field(default=None, ge=0)
    """Vectors in ``vectors.bin``, with those whose row is gone; None: as for ``rows``."""
    skipped: dict[str, int] = Field(default_factory=dict)
    """Pictures without one, by the kind of reason."""
    notes: list[str] = Field(default_factory=list)
    """What a reader must know about the last build."""
    hashes: dict[str, Digest] = Field(default_factory=dict)
    """SHA-256 of the other files, when the last build ended; empty while the next one runs."""
    threshold: Similarity | None = None
    layout_threshold: Similarity | None = None
    """Similarity above which the nearest reference is called the origin of a copy; None: not calibrated."""
    calibration: Calibrated | None = None
    search: dict[str, Any] | None = None
    """Parameters, size, hash and measured recall of the inverted file, with the mark of the user who built it; None: there is none."""
    versions: dict[str, str] = Field(default_factory=dict)
    started: str = ""
    ended: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all counts and hashes are there."""
        return self.has_hashes and None not in (self.rows, self.vectors)

    @property
    def has_hashes(self) -> bool:
        """Whether rows and vectors can be compared with those that the last build left."""
        return {ROWS, VECTORS} <= self.hashes.keys()


class IndexRow(Record):
    """One picture of the set."""

    id: str
    status: Literal["ok", "error"]
    vector: int | None = Field(default=None, ge=0)
    """Which vector is its descriptor; None: it has none."""
    source: int = 0
    at: str | None = None
    """Where it is in its source, if that is not its id."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Of the file's bytes; None: they could not be read, and the next build tries again."""
    size: int | None = None
    width: int | None = None
    height: int | None = None
    note: str | None = None
    error: str | None = None
    """Why there is no vector: a kind and, after a colon, what exactly."""
    mark: str | None = None
    """Of the user who named this file; None: its source is more than single files, and has a mark of its own."""


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
        rows: Lines.
        repeated: The first picture whose vector an earlier row names too.
    """

    offsets: array[int] = field(default_factory=lambda: array("q"))
    skipped: dict[str, str] = field(default_factory=dict)
    described: int = 0
    rows: int = 0
    repeated: str | None = None

    def note(self, head: dict[str, Any], offset: int) -> None:
        if head["status"] == "ok":
            gap = head["vector"] + 1 - len(self.offsets)
            self.offsets.extend([-1] * gap)
            if self.offsets[head["vector"]] >= 0 and self.repeated is None:
                self.repeated = head["id"]
            self.described += 1
            self.offsets[head["vector"]] = offset
            self.skipped.pop(head["id"], None)
        else:
            self.skipped[head["id"]] = head["error"]

    @property
    def counts(self) -> Counts:
        return Counts(self.rows, self.described, len(self.offsets))


@dataclass(frozen=True)
class Counts:
    """What the rows of an index add up to.

    Attributes:
        rows: Lines.
        pictures: Pictures with a vector.
        vectors: Vectors, up to the last one that a row names.
    """

    rows: int
    pictures: int
    vectors: int

    def lost(self, manifest: IndexManifest) -> int:
        """Rows that are gone since the last build ended."""
        return manifest.pictures - self.pictures if manifest.rows is None else manifest.rows - self.rows


Value = TypeVar("Value")


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
        self._lengths: Lengths | None = None

    def __repr__(self) -> str:
        facts = self.manifest
        return f"{type(self).__name__}({str(self.folder)!r}, {facts.descriptor.name}, {facts.status}, {facts.pictures} pictures)"

    @classmethod
    def exists(cls, folder: str | Path) -> bool:
        """Whether a folder holds an index."""
        return os.path.isfile(Path(folder) / MANIFEST) and os.path.isfile(Path(folder) / ROWS)

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
        path, cure = self.folder / MANIFEST, "build the index anew in another folder"
        return read_document(path, IndexManifest, FORMAT, missing, "no index", cure, folder=self.folder)

    def require_there(self) -> None:
        """Refuse to write where the manifest that was opened is no longer there.

        Raises:
            RunError: somebody deleted it, and what was written with it.
        """
        if not os.path.lexists(self.folder / MANIFEST):
            raise deleted(self.folder)

    def update(self, **changes: Any) -> None:
        """Change fields of the manifest on disk.

        Raises:
            RunError: the manifest was deleted, or is damaged, since this object was made.
        """
        self.require_there()
        self.manifest = self._read_manifest()
        self.manifest = IndexManifest.model_validate(self.manifest.model_dump() | changes)
        _save(self.folder, self.manifest)

    # What is in it --------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Pictures with a vector."""
        return self.contents.described

    @cached_property
    def contents(self) -> _Contents:
        """One pass over the rows, when first asked for: eight bytes of memory per picture.

        Raises:
            RunError: they are damaged, or not those that the manifest speaks of.
        """
        return self._settled(self._read_contents)

    def _settled(self, read: Callable[[], Value]) -> Value:
        """What ``read`` gives; where it refuses, once more if another process has written the index meanwhile."""
        for _ in range(REOPENED):
            try:
                return read()
            except RunError:
                before = self.manifest
                self.refresh()
                if self.manifest == before:
                    raise
        return read()

    def refresh(self) -> None:
        """Read the manifest again, and the rows when they are next asked for."""
        self.manifest = self._read_manifest()
        for name in ("contents", "alive"):
            self.__dict__.pop(name, None)

    def _read_contents(self) -> _Contents:
        found, stored, spoken_of = _Contents(), self.stored(), 0
        for head, offset, _ in _heads(self.folder / ROWS):
            found.rows += 1
            if head["status"] == "ok":
                spoken_of = max(spoken_of, head["vector"] + 1)
                if spoken_of > stored:
                    stored = self.stored()  # another process may have added to it
            if spoken_of <= stored:  # memory is taken only for vectors that are there
                found.note(head, offset)
        self.require(stored, spoken_of)
        if found.repeated is not None:
            raise RunError(
                f"{self.folder / ROWS} has two rows for one vector, the second for {short(found.repeated)!r}; {RESTORE}."
            )
        if self.manifest.status == "done":
            self.require_rows(found.counts)
        return found

    def require_rows(self, counts: Counts) -> None:
        """Raises RunError where the rows are not those that the last build left."""
        path, manifest = self.folder / ROWS, self.manifest
        if (lost := counts.lost(manifest)) > 0:
            raise RunError(
                f"{path} holds {counts.rows:,} of {counts.rows + lost:,} rows, and copies of the missing pictures would not be found; "
                f"restore it, or repeat the command that builds the index: it describes them again."
            )
        stated = Counts(
            counts.rows if manifest.rows is None else manifest.rows,
            manifest.pictures,
            counts.vectors if manifest.vectors is None else manifest.vectors,
        )
        if counts != stated:
            raise RunError(f"{path} has {_in_words(counts)}, and {MANIFEST} speaks of {_in_words(stated)}; {RESTORE}.")
        self.require_hash(ROWS)

    def require_hash(self, name: str) -> None:
        """Raises RunError where a file is not the one that the last build left. A large one is read once as long as it stands still."""
        stated = self.manifest.hashes.get(name)
        if stated is None:
            return
        try:
            same = compute_once(file_inside(self.folder, name), "sha256", hash_file) == stated
        except OSError as e:
            raise _unusable(self.folder / name, e) from None
        if not same:
            raise RunError(
                f"{self.folder / name} is not the file that {MANIFEST} speaks of (its SHA-256 differs); {RESTORE}."
            )

    def stored(self) -> int:
        """How many vectors the file holds.

        Raises:
            RunError: it is no file of this folder.
        """
        size, dim = self._size(VECTORS), self.manifest.dim
        return 0 if dim is None else size // (dim * self.dtype.itemsize)

    def require(self, stored: int, spoken_of: int) -> None:
        """Raises RunError where the file holds fewer vectors than rows speak of."""
        if stored < spoken_of:
            path = self.folder / VECTORS
            raise RunError(f"{path} holds {stored} of {spoken_of} descriptors; {RESTORE}.")

    def _size(self, name: str) -> int:
        """Bytes of a file of the index; 0 where there is none."""
        try:
            return file_inside(self.folder, name).stat().st_size
        except FileNotFoundError:
            return 0
        except OSError as e:
            raise _unusable(self.folder / name, e) from None

    def skipped(self) -> dict[str, int]:
        """Pictures that have no vector, by the kind of reason."""
        found = Counter(reason.partition(":")[0] for reason in self.contents.skipped.values())
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    @cached_property
    def vectors(self) -> Float[np.ndarray, "n dim"]:
        """All vectors, memory-mapped: finite, and no longer than 1.

        Raises:
            RunError: the file does not hold what rows and manifest speak of.
        """
        return self._settled(self._read_vectors)

    def _read_vectors(self) -> Float[np.ndarray, "n dim"]:
        n, dim, done = len(self.contents.offsets), self.manifest.dim, self.manifest.status == "done"
        self.require(self.stored(), n)
        asked, size = n * (dim or 0) * self.dtype.itemsize, self._size(VECTORS)
        if size != asked and done:  # while it is being built, vectors come before their rows
            raise RunError(
                f"{self.folder / VECTORS} has {size:,} bytes, and the {n:,} descriptors of length {dim or 0} that rows speak of have "
                f"{asked:,} in {self.manifest.dtype}; {RESTORE}."
            )
        if done:
            self.require_hash(VECTORS)
        if not asked or dim is None:
            return np.empty((0, dim or 1), self.dtype)
        path = file_inside(self.folder, VECTORS)
        vectors = np.memmap(path, self.dtype, "r", shape=(n, dim))
        what = f"lengths of {n} vectors of {dim} {self.manifest.dtype}"
        self._lengths = Lengths(**compute_once(path, what, lambda _: asdict(examine(vectors))))
        if self._lengths.faulty is not None:
            raise RunError(
                f"{self.folder / VECTORS} is damaged (vector {self._lengths.faulty} has the length {self._lengths.length}, and a "
                f"descriptor has 1); {RESTORE}."
            )
        return vectors

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored vectors."""
        return np.dtype(self.manifest.dtype).newbyteorder("<")

    @cached_property
    def alive(self) -> Bool[np.ndarray, " n"]:
        """Which vectors belong to a picture. All of them, unless damaged rows were deleted and their pictures described again."""
        return np.array(self.contents.offsets, np.int64) >= 0

    def row(self, number: int) -> IndexRow:
        """The row of a vector."""
        try:
            with open_inside(self.folder, ROWS) as file:
                file.seek(self.contents.offsets[number])
                row = self._parsed(file.readline())
        except OSError as e:
            raise _unusable(self.folder / ROWS, e) from None
        if row.vector != number:
            raise RunError(f"{self.folder / ROWS} has changed since it was opened; open the index again.")
        return row

    def rows(self) -> Iterator[IndexRow]:
        """Every row, one in memory at a time. A picture that could not be read may have several; the last one counts."""
        for _, _, raw in _heads(self.folder / ROWS):
            yield self._parsed(raw)

    def find(self, name: str) -> IndexRow | None:
        """The row of a picture with a vector, looked for from the beginning."""
        for head, _, raw in _heads(self.folder / ROWS):
            if head["id"] == name and head["status"] == "ok":
                return self._parsed(raw)
        return None

    def _parsed(self, raw: bytes) -> IndexRow:
        try:
            return IndexRow.model_validate(parse_json(raw))
        except (ParseError, ValidationError) as e:
            why = first_error(e) if isinstance(e, ValidationError) else e
            raise RunError(f"{self.folder / ROWS} holds a damaged row ({why}); {RESTORE}.") from None

    # Its pictures -----------------------------------------------------------------------------------------------------------

    def picture(self, row: IndexRow) -> Image.Image | None:
        """The picture of a row, from where it was indexed.

        None: it is gone, its file is no longer the same, or this user has not named the place where it is said to be.
        """
        if row.sha256 is None or not 0 <= row.source < len(self.manifest.sources) or not self._is_confirmed(row):
            return None
        source = self._source(row.source)
        return None if source is None else picture_of(source, self._place(row), row.sha256)

    def locate(self, pictures: Anything, prefix: str = "") -> None:
        """Say where the pictures of a source are now: of an index that somebody else built, or whose pictures were moved.

        Args:
            pictures: A folder, an archive or a table; see :func:`~mnemoscope.similarity.reading.open_source`.
            prefix: What stands before the ids of these pictures, if the index has several sources.

        Raises:
            UsageError: the index has no such source, or its first pictures are not there.
        """
        known = [record.get("prefix", "") for record in self.manifest.sources]
        if prefix not in known:
            raise UnknownName(f"prefix in {self.folder}", prefix, known)
        number = known.index(prefix)
        record = self.manifest.sources[number]
        source = open_source(pictures, column=record.get("column"), id_column=record.get("id_column"))
        require_utf8(source.describe(), "the place of pictures")
        rows = (row for row in self.rows() if row.source == number and row.sha256 is not None)
        some = list(islice(rows, TRIED))
        if not any(picture_of(source, self._place(row), row.sha256 or "") for row in some):
            raise UsageError(
                f"{pictures} holds none of the first {len(some)} pictures of {self.folder}; name the place that it was built from."
            )
        sources = list(self.manifest.sources)
        sources[number] = named_source(source, prefix)
        self.update(sources=sources)
        self._sources = {}

    def _place(self, row: IndexRow) -> str:
        """Where a row's picture is in its source."""
        return row.at or row.id.removeprefix(self.manifest.sources[row.source].get("prefix", ""))

    def _is_confirmed(self, row: IndexRow) -> bool:
        """Whether this user named the place where a row's picture is said to be. What lies below a folder is confirmed with it."""
        record = self.manifest.sources[row.source]
        if record.get("kind") == "files":
            return has_mark(FILE, {"at": self._place(row), "sha256": row.sha256, "mark": row.mark})
        return has_mark(SOURCE, record)

    def _source(self, number: int) -> Source | None:
        if number not in self._sources:
            self._sources[number] = reopened(self.manifest.sources[number])
        return self._sources[number]

    # What is not used of it ---------------------------------------------------------------------------------------------------

    @property
    def inverted(self) -> Path:
        """Where the inverted file is, if there is one."""
        return self.folder / INVERTED

    def usable_inverted(self) -> Path | None:
        """The inverted file, where it pays and this user built it. Faiss trusts what it loads, so nothing else is handed to it."""
        return None if len(self.vectors) < search.FLAT or self._unfit() is not None else self.inverted

    def _unfit(self) -> str | None:
        """Why the inverted file is not the one that this user built; None: it is."""
        facts = self.manifest.search
        if facts is None or not has_mark(INVERTED, facts):
            return "it was not built by you on this machine"
        try:
            path = file_inside(self.folder, INVERTED)
            same = path.stat().st_size == facts["size"] and hash_file(path) == facts["sha256"]
        except OSError as e:
            return e.strerror or str(e)
        return None if same and facts["dim"] == self.manifest.dim else "it is not the one that its manifest speaks of"

    def cautions(self) -> list[str]:
        """What of the index is not used or not certain, because it may be somebody else's: sentences, each with its cure."""
        found = []
        if any(not self._is_confirmed(row) for row in self._first_rows()):
            found.append(
                f"No picture of {self.folder} is shown, and layouts are not compared: the index was not built by you on this machine. If "
                f"you have its pictures, name the place: mnemoscope index locate {self.folder} PICTURES"
            )
        if len(self.vectors) >= search.FLAT and self.inverted.exists() and (why := self._unfit()) is not None:
            found.append(
                f"{self.inverted} is not used ({why}), so every picture is compared; the next `mnemoscope index build` makes it again."
            )
        if self.manifest.status == "building":
            found.append(
                f"{self.folder} is not finished: it answers from {len(self):,} pictures; the command that builds it continues."
            )
        elif not self.manifest.has_hashes:
            few = self._lengths.short if self._lengths is not None else 0
            found.append(
                f"{self.folder} records no hash of its rows and vectors, so changes of them may stay unseen"
                + (f" ({few:,} vectors are shorter than 1, as those of plain pictures are)" if few else "")
                + "; the next `mnemoscope index build` records them."
            )
        return found

    @property
    def checks(self) -> str:
        """What of rows and vectors was compared with the manifest, in words."""
        if self.manifest.status == "building":
            return "sizes and lengths of vectors; counts and hashes are recorded when the build ends"
        if not self.manifest.has_hashes:
            return "sizes, counts and lengths of vectors; no hash is recorded"
        return "sizes, counts, hashes and lengths of vectors"

    def _first_rows(self) -> Iterator[IndexRow]:
        """One row of each source."""
        waiting = set(range(len(self.manifest.sources)))
        for row in self.rows() if waiting else ():
            if row.sha256 is not None and row.source in waiting:
                waiting.remove(row.source)
                yield row
            if not waiting:
                return


def named_source(source: Source, prefix: str = "") -> dict[str, Any]:
    """What a manifest says of a source that this user named."""
    record = source.describe() | ({"prefix": prefix} if prefix else {})
    return record | {"mark": mark_of(SOURCE, record)}


def named_file(at: str, sha256: str) -> str:
    """The mark of a single file that this user named."""
    return mark_of(FILE, {"at": at, "sha256": sha256})


def built_inverted(path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of an inverted file that was just built.

    Args:
        path: The file.
        facts: What :func:`~mnemoscope.similarity.search.build_inverted` says of it.
    """
    record = through_json(dict(facts) | {"size": path.stat().st_size, "sha256": hash_file(path)})
    return record | {"mark": mark_of(INVERTED, record)}


def _unusable(path: Path, error: OSError) -> RunError:
    return RunError(f"{path} cannot be used ({error.strerror or error}); {RESTORE}.")


ROW_KEYS = frozenset(IndexRow.model_fields)


def _heads(path: Path) -> Iterator[tuple[dict[str, Any], int, bytes]]:
    """Each sound row as plain values, where it begins, and its bytes."""
    for line in sound_lines(path):
        if (why := _damage(line.head)) is not None:
            raise RunError(
                f"line {line.number} of {path} is damaged ({why}); delete that line and repeat the command that builds the index."
            )
        yield line.head, line.end - len(line.raw), line.raw


def _damage(head: Mapping[str, Any]) -> str | None:
    """Why plain values are no row; None: they may be one."""
    if not head.keys() <= ROW_KEYS:
        return f"it has an unknown key {short(min(head.keys() - ROW_KEYS))!r}"
    vector, error = head.get("vector"), head.get("error")
    if vector is not None and error is not None:
        return "it names both a vector and an error"
    is_number = isinstance(vector, int) and not isinstance(vector, bool) and vector >= 0
    sound = is_number if head["status"] == "ok" else isinstance(error, str)
    return None if sound else "it names neither a vector nor an error"


def _in_words(counts: Counts) -> str:
    return f"{counts.rows:,} rows, {counts.pictures:,} of them with a descriptor, and {counts.vectors:,} vectors"


def _save(folder: Path, manifest: IndexManifest) -> None:
    write_whole(folder / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())


class IndexWriter:
    """Appends to an index; a context manager that holds its lock, which ends with the process however that ends.

    Attributes:
        known: The pictures that rows speak of.
        unread: Those whose bytes could not be had, with the reason.
        vectors: How many vectors there are.
        lost: Rows that were gone when it was opened, of an index that was done.

    Raises:
        RunError: another process writes this index, the disk is full, a file is damaged or not the one that the last build left, or
            somebody deleted it meanwhile.
    """

    def __init__(self, index: IndexFolder):
        self.index, self.known = index, Ledger()
        self.unread: dict[str, str] = {}
        self.lost = 0

    def __enter__(self) -> IndexWriter:
        with ExitStack() as held:
            self.index.require_there()  # a lock would make its folder anew
            held.enter_context(locked(self.index.folder / ".lock"))
            self.index.refresh()  # another process may have written it before we had the lock
            self._take_stock()
            with explained(self.index.folder):
                self._rows = _Appended(self.index.folder / ROWS, self._end)
                held.callback(self._rows.close)
                self._vectors = _Appended(self.index.folder / VECTORS, self.vectors * self._stride)
                held.callback(self._vectors.close)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _take_stock(self) -> None:
        self._end = self.vectors = rows = pictures = 0
        for head, offset, raw in _heads(self.index.folder / ROWS):
            self._end = offset + len(raw)
            rows += 1
            if head["status"] == "ok":
                pictures += 1
                self.vectors = max(self.vectors, head["vector"] + 1)
            if "sha256" in head:
                state = Ledger.DESCRIBED if head["status"] == "ok" else Ledger.SKIPPED
                self.known[head["id"]] = head.get("size"), state
                self.unread.pop(head["id"], None)
            else:
                self.unread[head["id"]] = head["error"]
        self.index.require(self.index.stored(), self.vectors)
        if self.index.manifest.status == "done":
            self._require_last(Counts(rows, pictures, self.vectors))

    def _require_last(self, counts: Counts) -> None:
        """Hold an index that was done against its manifest, before it is added to: what does not fit would pass for sound afterwards.

        Rows that are gone are no reason to refuse, because their pictures are described again.
        """
        self.index.require_hash(VECTORS)
        self.lost = max(counts.lost(self.index.manifest), 0)
        if self.lost:
            self.index.update(status="building", ended=None, hashes={})
        else:
            self.index.require_rows(counts)

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
        self._path = path
        self._file, self._end = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666), end
        os.ftruncate(self._file, end)  # what the process before us tore

    def append(self, data: bytes) -> None:
        require_file(self._file, self._path)
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
