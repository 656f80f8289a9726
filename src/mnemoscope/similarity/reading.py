"""Pictures out of a folder, an archive or a table, one at a time: memory does not grow with the set.

A source lists its entries in an order that does not change (:class:`Source`); :func:`read` decodes and prepares them a few
threads ahead of whoever looks at them. A picture that cannot be had is an answer with a reason, never an exception:
millions of files hold every fault there is.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, TypeAlias, runtime_checkable

from PIL import Image

from ..bounds import WORKERS, within
from ..errors import MnemoscopeError, UnknownName, UsageError
from ..records.documents import read_json
from ..records.files import file_inside, leads_out, open_inside, open_regular
from .decoding import ENDINGS, MAX_BYTES, decode

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "Anything",
    "Entry",
    "Reading",
    "Source",
    "Unreadable",
    "open_source",
    "picture_of",
    "read",
    "reopened",
    "table_values",
]

CHUNK = 16
"""Pictures that one thread decodes at a stretch: enough to make handing them over cheap."""

Anything: TypeAlias = Any
"""What :func:`open_source` takes: a path, a list of paths, a ``datasets`` data set, or a source."""


class Unreadable(Exception):
    """The bytes of an entry cannot be had; the text says why, as a kind and what exactly."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture of a source, not yet read.

    Attributes:
        id: Its name in the set; the same whenever the same source is listed.
        read: Its bytes. Called in another thread; may raise anything.
        size: Their number, where that is known without reading them.
        at: Where it is in the source, if that is not its id.
        note: What a reader of its row should know.
    """

    id: str
    read: Callable[[], bytes]
    size: int | None = None
    at: str | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """One picture, read and prepared, or the reason why not.

    Attributes:
        entry: What was to be read.
        sha256: Of the file's bytes; None: they could not be had, which another time may differ.
        size: Number of bytes.
        width: In pixels, upright.
        height: In pixels, upright.
        prepared: What ``prepare`` made of the picture.
        reason: Why there is none.
        note: What was converted.
    """

    entry: Entry
    sha256: str | None = None
    size: int | None = None
    width: int | None = None
    height: int | None = None
    prepared: Any = None
    reason: str | None = None
    note: str | None = None


@runtime_checkable
class Source(Protocol):
    """Where pictures come from."""

    def describe(self) -> dict[str, Any]:
        """What it is, as plain values: two sources with equal descriptions list equal ids."""
        ...

    def opened(self) -> AbstractContextManager[Iterator[Entry]]:
        """Its entries in their order. They can be read as long as the context is open."""
        ...

    def count(self) -> int | None:
        """How many entries there are; None: nobody knows before the end."""
        ...

    def fetch(self, at: str) -> bytes:
        """The bytes of one entry; raises what reading it raises."""
        ...


def open_source(what: Anything, *, column: str | None = None, id_column: str | None = None) -> Source:
    """The source that something is.

    Args:
        what: A folder of pictures (searched recursively), of tar archives, of Parquet files, or one that ``datasets`` saved; a
            ``.zip``, ``.tar`` (also compressed) or ``.parquet`` file; a single picture; a list of paths of pictures; a
            ``datasets`` data set; or a source, which is returned.
        column: The column of a table that holds the pictures; default: the only one that can.
        id_column: A column with a different id for each picture; default: file and row number.

    Raises:
        UsageError: there is nothing, or it holds no pictures.
        UnknownName: the table has no such column.
    """
    if isinstance(what, (str, Path)):
        return _of_path(Path(what), column, id_column)
    if hasattr(what, "with_format") and hasattr(what, "features"):
        return _Dataset(what, column, id_column)
    if isinstance(what, Source):
        return what
    if isinstance(what, Iterable):
        if paths := [Path(path) for path in what]:
            return _Files(paths)
        raise UsageError("the list of pictures is empty; name at least one.")
    raise UsageError(
        f"{type(what).__name__} is no source of pictures; give a folder, an archive, a Parquet file or a list of paths."
    )


def reopened(record: dict[str, Any]) -> Source | None:
    """The source that described itself so; None: it is gone, or was an object in memory."""
    if record["kind"] == "files":
        return _Files([])
    try:
        source = open_source(record["path"], column=record.get("column"), id_column=record.get("id_column"))
    except UsageError:
        return None
    return source if source.describe()["kind"] == record["kind"] else None


def _of_path(path: Path, column: str | None, id_column: str | None) -> Source:
    if os.path.isdir(path):
        return _of_folder(path, column, id_column)
    if not os.path.exists(path):
        raise UsageError(f"{path} does not exist; give a folder, an archive or a Parquet file of pictures.")
    if path.suffix.lower() == ".zip":
        return _Zip(path)
    if _is_tar(path):
        return _Tars([path], path)
    if path.suffix.lower() == ".parquet":
        return _Parquet([path], path, column, id_column)
    if path.suffix.lower() in ENDINGS:
        return _Files([path])
    raise UsageError(
        f"{path} is neither a folder nor a .zip, .tar or .parquet file nor a picture; give one of these, or a list of paths."
    )


def _of_folder(folder: Path, column: str | None, id_column: str | None) -> Source:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _Arrow(folder, column, id_column)
    # Pictures win: a folder of pictures often has a Parquet file of captions beside them.
    if next(_walk(folder), None) is not None:
        return _Folder(folder)
    files = sorted(p for p in folder.rglob("*") if not p.is_dir())
    if tars := [p for p in files if _is_tar(p)]:
        return _Tars(tars, folder)
    if tables := [p for p in files if p.suffix.lower() == ".parquet"]:
        return _Parquet(tables, folder, column, id_column)
    raise UsageError(
        f"{folder} holds no pictures: no file ends like one ({', '.join(sorted(ENDINGS)[:4])}, …), and there is no tar archive or "
        f"Parquet file."
    )


def _is_tar(path: Path) -> bool:
    return path.name.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"))


# Decoding ahead -----------------------------------------------------------------------------------------------------------


@within(workers=WORKERS)
def read(
    source: Source,
    prepare: Callable[[Image.Image], Any],
    *,
    workers: int | None = None,
    fresh: Callable[[list[Entry]], list[Entry]] = list,
) -> Iterator[Reading]:
    """Every picture of a source, prepared, in the source's order.

    Args:
        source: Where they come from.
        prepare: Makes of an RGB picture what is handed on; a :class:`~mnemoscope.errors.MnemoscopeError` of it is a reason.
        workers: Threads (Pillow decodes outside Python's lock); default: one per CPU, at most 16.
        fresh: Chooses from some entries those to read, before their bytes are touched.

    Yields:
        Readings. At most ``CHUNK * (workers + 2)`` of them are in memory.
    """
    workers = workers or min(16, _cpus())
    with source.opened() as entries:
        pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        waiting: deque[Future[list[Reading]]] = deque()
        try:
            while chunk := list(islice(entries, CHUNK)):
                if chosen := fresh(chunk):
                    waiting.append(pool.submit(_readings, chosen, prepare))
                if len(waiting) > workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _readings(entries: Sequence[Entry], prepare: Callable[[Image.Image], Any]) -> list[Reading]:
    return [_reading(entry, prepare) for entry in entries]


def _reading(entry: Entry, prepare: Callable[[Image.Image], Any]) -> Reading:
    try:
        data = entry.read()
    except Unreadable as e:
        return Reading(entry, reason=str(e), note=entry.note)
    except Exception as e:  # a disk, a network, an archive: whatever they raise, the next picture may be well
        return Reading(entry, reason=f"unreadable: {type(e).__name__}: {e}"[:240], note=entry.note)
    sha256, size = hashlib.sha256(data).hexdigest(), len(data)
    decoded = decode(data)
    note = "; ".join(n for n in (entry.note, decoded.note) if n) or None
    if decoded.picture is None:
        return Reading(entry, sha256, size, reason=decoded.reason, note=note)
    width, height = decoded.picture.size
    try:
        prepared = prepare(decoded.picture)
    except MnemoscopeError as e:
        return Reading(entry, sha256, size, width, height, reason=f"not described: {e}", note=note)
    return Reading(entry, sha256, size, width, height, prepared, note=note)


# Files --------------------------------------------------------------------------------------------------------------------


class _Folder:
    """All pictures below a folder; the id is the path inside it, with slashes on every system."""

    def __init__(self, folder: Path):
        self.folder = folder

    def describe(self) -> dict[str, Any]:
        return {"kind": "folder", "path": str(self.folder.resolve())}

    def opened(self) -> AbstractContextManager[Iterator[Entry]]:
        return nullcontext(_walk(self.folder))

    def count(self) -> int:
        return sum(1 for _ in _walk(self.folder))

    def fetch(self, at: str) -> bytes:
        return _file_below(self.folder, at)


class _Files:
    """Pictures named one by one; the id is the path as it was given."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths

    def describe(self) -> dict[str, Any]:
        return {"kind": "files"}

    def opened(self) -> AbstractContextManager[Iterator[Entry]]:
        return nullcontext(self._entry(path) for path in self.paths)

    @staticmethod
    def _entry(path: Path) -> Entry:
        return _on_disk(str(path), path.as_posix(), lambda: _file(path))

    def count(self) -> int:
        return len(self.paths)

    def fetch(self, at: str) -> bytes:
        return _file(Path(at))


def _walk(folder: Path, inside: str = "") -> Iterator[Entry]:
    """Entries of a folder, sorted within each level. Links to files are followed as long as they stay inside, those to folders are not."""
    try:
        with os.scandir(folder / inside) as found:
            items = sorted(found, key=lambda item: item.name)
    except OSError as e:
        yield _lost(inside or ".", f"unreadable: {e.strerror or e}")
        return
    for item in items:
        if item.name.startswith("."):
            continue
        name = f"{inside}{item.name}"
        if item.is_dir(follow_symlinks=False):
            yield from _walk(folder, f"{name}/")
        elif item.is_symlink() and os.path.isdir(item.path):  # not item.is_dir(), which raises for a link to itself
            yield _lost(name, "link: to a folder, not followed")
        elif os.path.splitext(item.name)[1].lower() in ENDINGS:
            # Only a link can lead out; asking that of every file would take longer than opening it.
            linked = item.is_symlink()
            yield _on_disk(item.path, name, partial(_file_below, folder, name) if linked else partial(_file, item.path))


def _on_disk(path: str, name: str, read: Callable[[], bytes]) -> Entry:
    try:
        size = os.stat(path).st_size
    except OSError:
        size = None
    note = "a symbolic link" if os.path.islink(path) else None
    return Entry(_valid(name), read, size, note=note)


def _file(path: str | Path) -> bytes:
    """The bytes of a file that the reader named, or that lies in a folder he named."""
    try:
        file = open_regular(path)
    except OSError as e:
        if os.path.exists(path) and not os.path.isfile(path):
            raise Unreadable("unreadable: not a file") from None
        kind = "link: to nothing" if os.path.islink(path) else "unreadable"
        raise Unreadable(f"{kind}: {e.strerror or e}") from None
    with file:
        return _bounded(os.fstat(file.fileno()).st_size, file.read)


def _file_below(folder: Path, name: str) -> bytes:
    """The bytes of a file whose name, or the links that it goes through, somebody else chose."""
    path = folder / name
    if reason := _led_out(folder, path):
        raise Unreadable(reason)
    return _file(path)


LED_OUT = "link: leads out of the folder, not followed"


def _led_out(where: Path, path: Path) -> str | None:
    """The reason not to open a file that was found below a folder; None: there is none. What the reader himself names may be a link."""
    return LED_OUT if path != where and leads_out(where, path) else None


def _opened(where: Path, path: Path) -> BinaryIO:
    """A file of a source: the one that the reader named (``where``), or one that was found below the folder that he named."""
    return open_regular(path) if path == where else open_inside(where, path.relative_to(where).as_posix())


def _why(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _bounded(size: int, get: Callable[[], bytes]) -> bytes:
    if size > MAX_BYTES:
        raise Unreadable(f"too large: {size:,} bytes; the limit is {MAX_BYTES:,}")
    return get()


def _lost(name: str, reason: str) -> Entry:
    """Something that should be there and is not: it becomes a row, so that it is not lost silently."""

    def fail() -> bytes:
        raise Unreadable(reason)

    return Entry(_valid(name), fail)


def _valid(name: str) -> str:
    """A name as UTF-8 can hold it: a file system's may be any bytes."""
    return name.encode("utf-8", "backslashreplace").decode()


# Archives -----------------------------------------------------------------------------------------------------------------


class _Zip:
    """Pictures of a zip archive, sorted by their names in it, which are the ids."""

    def __init__(self, path: Path):
        self.path = path
        with self._archive():
            pass

    @contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        with ExitStack() as held:
            try:
                archive = held.enter_context(zipfile.ZipFile(held.enter_context(open_regular(self.path))))
            except (OSError, zipfile.BadZipFile) as e:
                raise UsageError(f"{self.path} cannot be read as a zip archive ({e}); check the file.") from e
            yield archive

    def describe(self) -> dict[str, Any]:
        return {"kind": "zip", "path": str(self.path.resolve())}

    @contextmanager
    def opened(self) -> Iterator[Iterator[Entry]]:
        with self._archive() as archive:
            yield (self._entry(archive, info) for info in self._pictures(archive))

    def count(self) -> int:
        with self._archive() as archive:
            return len(self._pictures(archive))

    def fetch(self, at: str) -> bytes:
        with self._archive() as archive:
            info = archive.getinfo(at)
            return self._entry(archive, info).read()

    def _pictures(self, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
        return sorted((i for i in archive.infolist() if _is_picture(i.filename)), key=lambda info: info.filename)

    def _entry(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Entry:
        # The stated size is also where zipfile stops, so that a bomb cannot say less than it is.
        return Entry(info.filename, lambda: _bounded(info.file_size, lambda: archive.read(info)), info.file_size)


class _Tars:
    """Pictures of tar archives, in the order in which they are stored; of several archives, ids begin with the archive's name."""

    def __init__(self, paths: Sequence[Path], where: Path):
        self.paths, self.where = paths, where

    def describe(self) -> dict[str, Any]:
        return {"kind": "tar", "path": str(self.where.resolve())}

    def opened(self) -> AbstractContextManager[Iterator[Entry]]:
        return nullcontext(self._entries())

    def count(self) -> int | None:
        if any(path.suffix.lower() != ".tar" for path in self.paths):
            return None  # counting would decompress everything
        return sum(1 for path in self.paths for _ in self._members(path, read=False))

    def fetch(self, at: str) -> bytes:
        # Through one archive from its beginning: tar has no index.
        for path in self.paths:
            prefix = self._prefix(path)
            if at.startswith(prefix):
                for entry in self._members(path, read=True, only=at):
                    return entry.read()
        raise Unreadable(f"gone: {at} is no longer in the archive")

    def _entries(self) -> Iterator[Entry]:
        for path in self.paths:
            yield from self._members(path, read=True)

    def _prefix(self, path: Path) -> str:
        return "" if path == self.where else f"{path.relative_to(self.where).as_posix()}/"

    def _members(self, path: Path, *, read: bool, only: str | None = None) -> Iterator[Entry]:
        prefix = self._prefix(path)
        try:
            # The archive is read once, from front to back, so the bytes of a member are taken as it passes by.
            with _opened(self.where, path) as file, tarfile.open(fileobj=file, mode="r|*" if read else "r:") as archive:
                for member in archive:
                    archive.members = []  # type: ignore[attr-defined]  # it would keep every header it has seen
                    name = prefix + member.name
                    if _is_picture(member.name) and not member.isdir() and only in (None, name):
                        yield self._entry(archive, member, name) if read else Entry(name, bytes)
        except (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError) as e:
            why = f"archive: {path.name} is damaged ({_why(e)}); what follows is missing"
            yield _lost(f"{prefix or path.name}!", _led_out(self.where, path) or why)

    def _entry(self, archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> Entry:
        if not member.isreg():
            return _lost(name, "link: inside an archive, not followed")
        if member.size > MAX_BYTES:
            return _lost(name, f"too large: {member.size:,} bytes; the limit is {MAX_BYTES:,}")
        stream = archive.extractfile(member)
        data = b"" if stream is None else stream.read()
        if len(data) < member.size:
            raise tarfile.ReadError("unexpected end of data")
        return Entry(_valid(name), lambda: data, member.size)


def _is_picture(name: str) -> bool:
    """Whether an archive's member is taken for a picture; what macOS hides in archives is not."""
    parts = name.split("/")
    hidden = any(part.startswith(".") and part not in (".", "..") for part in parts) or "__MACOSX" in parts
    return not hidden and os.path.splitext(name)[1].lower() in ENDINGS


# Tables -------------------------------------------------------------------------------------------------------------------

READING = (OSError, ValueError, KeyError, NotImplementedError, TypeError, OverflowError)
"""What pyarrow raises, itself or from Python, where a table or a value in it cannot be had."""

ROWS = 16
"""Rows of a table that are in memory at a time."""


class _Table(ABC):
    """Rows with a column of pictures: their bytes, or ``{bytes, path}`` as ``datasets`` writes them.

    The id is ``file#row``, or what the id column says.
    """

    kind = "table"

    def __init__(self, column: str | None, id_column: str | None):
        schema = self.schema()
        self.column, self.id_column = _picture_column(schema, column, self.label()), id_column
        if id_column is not None and id_column not in schema.names:
            raise UnknownName(f"column in {self.label()}", id_column, schema.names)

    @abstractmethod
    def label(self) -> str:
        """What it is called in sentences, and known by."""

    @abstractmethod
    def schema(self) -> pyarrow.Schema:
        """Of its first file."""

    @abstractmethod
    def files(self) -> list[str]:
        """Names of its files."""

    @abstractmethod
    def blocks(self, file: str, columns: list[str]) -> Iterator[pyarrow.RecordBatch]:
        """The rows of one file, at most ROWS at a time."""

    @abstractmethod
    def count(self) -> int | None:
        """Rows of all files."""

    def cell(self, file: str, row: int) -> Any:
        """The picture cell of one row."""
        for block in self.blocks(file, [self.column]):
            if row < len(block):
                return block.column(0)[row].as_py()
            row -= len(block)
        raise Unreadable(f"gone: {file} no longer has that row")

    def base(self, file: str) -> Path | None:
        """The folder that paths in cells start from and stay in; None: paths are not followed."""
        return None

    def led_out(self, file: str) -> str | None:
        """The reason not to open a file, where it is a link that leads out of the table's folder."""
        return None

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "path": self.label(), "column": self.column, "id_column": self.id_column}

    def opened(self) -> AbstractContextManager[Iterator[Entry]]:
        met: set[str] = set()
        return nullcontext(entry for file in self.files() for entry in self._entries(file, met))

    def fetch(self, at: str) -> bytes:
        file, _, row = at.rpartition("#")
        return _bytes_of(self.cell(file, int(row)), self.base(file))

    def values(self, column: str) -> Iterator[tuple[str, Any]]:
        """Id and value of another column of every row.

        Raises:
            UsageError: the column, or that of ids, cannot be read.
        """
        met: set[str] = set()
        for file in self.files():
            try:
                for _, name, _, value in self._rows_of(file, column, met):
                    yield name, value
            except READING as e:
                raise UsageError(
                    f"column {column!r} of {file or self.label()} cannot be read ({_why(e)[:160]}); write it again, or name another."
                ) from e

    def _rows_of(self, file: str, column: str, met: set[str]) -> Iterator[tuple[str, str, str | None, Any]]:
        """Where each row is, its id, what a reader of it should know, and its value in a column.

        A row whose id is missing, or stands above already, is known by file and row number: two pictures of one name would be one.
        """
        columns, row = list(dict.fromkeys([column, *([self.id_column] if self.id_column else [])])), 0
        for block in self.blocks(file, columns):
            ids = block.column(self.id_column).to_pylist() if self.id_column else [None] * len(block)
            for value, given in zip(block.column(column).to_pylist(), ids, strict=True):
                at = f"{file}#{row}"
                name, note = (at, None) if self.id_column is None else _named(given, at, met)
                yield at, name, note, value
                row += 1

    def _entries(self, file: str, met: set[str]) -> Iterator[Entry]:
        row, base = 0, self.base(file)
        try:
            for at, name, note, cell in self._rows_of(file, self.column, met):
                yield _cell_entry(cell, name, at, base, note)
                row += 1
        except READING as e:
            why = f"{type(e).__name__}: {_why(e)}"[:160]
            damage = f"table: {file or self.label()} is damaged ({why}); what follows is missing"
            yield _lost(f"{file}#{row}!", self.led_out(file) or damage)


def table_values(source: Source, names: Sequence[str]) -> Iterator[tuple[str, Any]] | None:
    """Id and value, for every row of a table, of the first of these columns that there is; None: the source is no table.

    Raises:
        UnknownName: the table has none of these columns.
    """
    if not isinstance(source, _Table):
        return None
    there = source.schema().names
    column = next((name for name in names if name in there), None)
    if column is None:
        raise UnknownName(f"column in {source.label()}", names[0], there)
    return source.values(column)


def _picture_column(schema: pyarrow.Schema, column: str | None, label: str) -> str:
    fitting = [field.name for field in schema if _holds_pictures(field.type)]
    if column is None:
        if len(fitting) != 1:
            what = f"several columns of bytes ({', '.join(fitting)})" if fitting else "no column of pictures"
            raise UsageError(f"{label} has {what}; name the one that holds pictures (column).")
        return fitting[0]
    if column not in schema.names:
        raise UnknownName(f"column in {label}", column, schema.names)
    if column not in fitting:
        raise UsageError(
            f"column {column!r} of {label} holds {schema.field(column).type}; pictures are bytes, or bytes with a path."
        )
    return column


def _holds_pictures(kind: Any) -> bool:
    import pyarrow.types as kinds

    if kinds.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return kinds.is_binary(kind) or kinds.is_large_binary(kind)


def _named(given: Any, at: str, met: set[str]) -> tuple[str, str | None]:
    """The id of a row, or its place where it has none of its own; and a word about that."""
    if given is None or given != given or given == "":
        return at, "without an id"
    name = _valid(str(int(given)) if isinstance(given, float) and given.is_integer() else str(given))
    if name in met:
        return at, f"its id {name!r} stands above already"
    met.add(name)
    return name, None


def _cell_entry(cell: Any, name: str, at: str, base: Path | None, note: str | None = None) -> Entry:
    return Entry(name, lambda: _bytes_of(cell, base), at=None if at == name else at, note=note)


def _bytes_of(cell: Any, base: Path | None) -> bytes:
    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if data is not None:
        return _bounded(len(data), lambda: bytes(data))
    if not path:
        raise Unreadable("empty: the cell holds nothing")
    if base is None:
        raise Unreadable(f"elsewhere: the table holds only a path ({path})")
    if leads_out(base, base / path):  # a table from elsewhere must not choose which files are opened
        raise Unreadable(f"elsewhere: the table names a file outside its folder ({path})")
    return _file(base / path)


class _Parquet(_Table):
    """One Parquet file, or all below a folder."""

    kind = "parquet"

    def __init__(self, paths: Sequence[Path], where: Path, column: str | None, id_column: str | None):
        self.where = where
        self.paths = {p.name if p == where else p.relative_to(where).as_posix(): p for p in paths}
        super().__init__(column, id_column)

    def label(self) -> str:
        return str(self.where.resolve())

    def schema(self) -> pyarrow.Schema:
        import pyarrow.parquet as pq

        path = self._first()
        try:
            with _opened(self.where, path) as file:
                return pq.read_schema(file)
        except READING as e:
            raise UsageError(f"{path} cannot be read as Parquet ({_why(e)}); check the file.") from e

    def _first(self) -> Path:
        """The first file that may be opened; the others become rows with a reason."""
        paths = list(self.paths.values())
        return next((path for path in paths if path.is_file() and not _led_out(self.where, path)), paths[0])

    def files(self) -> list[str]:
        return list(self.paths)

    def base(self, file: str) -> Path:
        return self.paths[file].parent

    def led_out(self, file: str) -> str | None:
        return _led_out(self.where, self.paths[file])

    def count(self) -> int | None:
        try:
            return sum(self._rows(path) for path in self.paths.values())
        except READING:
            return None

    def _rows(self, path: Path) -> int:
        import pyarrow.parquet as pq

        with _opened(self.where, path) as file:
            return int(pq.read_metadata(file).num_rows)

    def blocks(self, file: str, columns: list[str]) -> Iterator[pyarrow.RecordBatch]:
        import pyarrow.parquet as pq

        # Without pre-buffering, pages are read as they are needed instead of a whole row group at once.
        with (
            _opened(self.where, self.paths[file]) as opened,
            pq.ParquetFile(opened, pre_buffer=False, buffer_size=1 << 20) as table,
        ):
            yield from table.iter_batches(ROWS, columns=columns)

    def cell(self, file: str, row: int) -> Any:
        import pyarrow.parquet as pq

        with _opened(self.where, self.paths[file]) as opened, pq.ParquetFile(opened) as table:
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if row < rows:
                    return table.read_row_group(group, [self.column]).column(0)[row].as_py()
                row -= rows
        raise Unreadable(f"gone: {file} no longer has that row")


class _Arrow(_Table):
    """A folder that ``datasets`` saved, read without it: Arrow streams, and JSON files that list them."""

    kind = "datasets folder"

    def __init__(self, folder: Path, column: str | None, id_column: str | None):
        self.folder = folder
        self.paths = dict(_saved_files(folder))
        if not self.paths:
            raise UsageError(f"{folder} is a data set without files; save it again.")
        super().__init__(column, id_column)

    def label(self) -> str:
        return str(self.folder.resolve())

    def schema(self) -> pyarrow.Schema:
        path = next(iter(self.paths.values()))
        try:
            with _stream(path) as blocks:
                return blocks.schema
        except READING as e:
            raise UsageError(f"{path} cannot be read as an Arrow stream ({e}); save the data set again.") from e

    def files(self) -> list[str]:
        return list(self.paths)

    def base(self, file: str) -> Path:
        return self.folder

    def count(self) -> int | None:
        try:
            return sum(len(block) for file in self.files() for block in self.blocks(file, [self.column]))
        except READING:
            return None

    def blocks(self, file: str, columns: list[str]) -> Iterator[pyarrow.RecordBatch]:
        with _stream(self.paths[file]) as blocks:
            for block in blocks:
                for start in range(0, len(block), ROWS):
                    yield block.select(columns).slice(start, ROWS)


def _saved_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of each file of a saved data set, or of all its splits."""
    try:
        splits = [""]
        if (folder / "dataset_dict.json").is_file():
            listed = read_json(folder / "dataset_dict.json", folder)["splits"]
            splits = [f"{name}/" for name in listed]
        names: set[str] = set()
        for split in splits:
            for file in read_json(folder / f"{split}state.json", folder)["_data_files"]:
                name = split + file["filename"]
                if name in names:
                    raise ValueError(f"{name!r:.200} is listed twice")
                names.add(name)
                yield name, file_inside(folder, name)
    except OSError as e:
        raise _no_list(folder, f"{e.filename}: {e.strerror}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise _no_list(folder, str(e)) from e


def _no_list(folder: Path, why: str) -> UsageError:
    return UsageError(f"{folder} does not list the files of a data set that lie in it ({why}); save it again.")


@contextmanager
def _stream(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as blocks:
        yield blocks


class _Dataset(_Table):
    """An open ``datasets`` data set, asked for Arrow tables so that it does not decode."""

    kind = "datasets"

    def __init__(self, data: Any, column: str | None, id_column: str | None):
        self.data = data.with_format("arrow")
        super().__init__(column, id_column)

    def label(self) -> str:
        return f"data set {getattr(self.data, '_fingerprint', None) or '(a stream)'}"

    def schema(self) -> pyarrow.Schema:
        return self.data.features.arrow_schema

    def files(self) -> list[str]:
        return [""]

    def count(self) -> int | None:
        return len(self.data) if hasattr(self.data, "__len__") else None

    def base(self, file: str) -> Path:
        return Path(os.sep)  # whoever opened the data set trusts the paths in it

    def blocks(self, file: str, columns: list[str]) -> Iterator[pyarrow.RecordBatch]:
        for table in self.data.select_columns(columns).iter(ROWS):
            yield from table.to_batches()

    def cell(self, file: str, row: int) -> Any:
        if not hasattr(self.data, "__getitem__"):
            return super().cell(file, row)
        return self.data[row].column(self.column)[0].as_py()


def picture_of(source: Source, at: str, sha256: str) -> Image.Image | None:
    """One picture of a source again; None where it is gone, or is not what it was."""
    try:
        data = source.fetch(at)
    except Exception:  # as in reading: whatever is wrong with it
        return None
    return decode(data).picture if hashlib.sha256(data).hexdigest() == sha256 else None
