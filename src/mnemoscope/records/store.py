"""The run folder: append, resume, merge, export.

    runs/v2/
      run.json         the manifest; replaced atomically
      samples.jsonl    one line per sample, appended batch by batch (shard 3 of several: samples-3.jsonl)
      images/<id>.webp

The JSON lines are the truth. A process may be killed at any instant: what is lost is the batch that was running. A last line
that does not parse or has no line break is a torn write: it is no result, and the next writer cuts it off.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from ..errors import RunError
from ..parsing import LONGEST_LINE, ParseError, lines_of, parse_json
from .documents import read_json
from .files import files_below, folder_name, open_inside, read_inside
from .ids import digest, sample_id
from .schema import FORMAT, Manifest, Row
from .tally import Count, Tally, rounding_of, same_values

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "OutFolder",
    "Run",
    "Tally",
    "Writer",
    "differences",
    "digest",
    "free_folder",
    "known_differences",
    "locked",
    "row_files",
    "sample_id",
    "write_whole",
]


def row_files(folder: Path) -> list[Path]:
    """The files of a run folder that hold rows: ``samples.jsonl``, then shards in the order of their numbers."""
    numbered = ((ROWS.fullmatch(p.name), p) for p in folder.iterdir())
    return [p for _, p in sorted((int(m[1] or -1), p) for m, p in numbered if m)]


def differences(stored: Any, asked: Any, path: str = "") -> list[str]:
    """Where two plain values differ, as ``key: was 7.5, now 3``, nested keys joined by dots."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        keys = sorted(stored.keys() | asked.keys())
        return [d for k in keys for d in differences(stored.get(k), asked.get(k), f"{path}.{k}" if path else k)]
    # Through JSON, so that a tuple equals the list it becomes on disk.
    was, now = (json.dumps(v, sort_keys=True, default=str) for v in (stored, asked))
    return [] if was == now else [f"{path}: was {short(was)}, now {short(now)}"]


def known_differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """The same, of what both sides say: a value that either lacks is not held against it."""
    both = [k for k, value in asked.items() if value is not None and stored.get(k) is not None]
    return differences({k: stored[k] for k in both}, {k: asked[k] for k in both})


def free_folder(folder: str | Path) -> Path:
    """``folder`` if nothing is there yet, else the first of ``folder-2``, ``folder-3``, …: where a fresh start may write."""
    folder, n = Path(folder), 1
    free = folder
    while os.path.lexists(free):
        n += 1
        free = folder.with_name(f"{folder.name}-{n}")
    return free


ROWS = re.compile(r"samples(?:-(\d+))?\.jsonl")
"""Names of the files that hold rows."""

TOGETHER = 1024
"""Rows that are copied in one write."""

JUDGED_BY = ("thresholds*.json", "controls.json")
"""Files of a run that its rows are judged by."""

MEASURES = "measures"
"""Folder inside a run folder: pictures that were measured with its model, see :mod:`.measures`."""


class Run:
    """A run folder, for reading. To write, take a :class:`Writer`.

    Args:
        folder: A folder that holds ``run.json``.

    Raises:
        RunError: there is no run, or it cannot be read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = self._read_manifest()

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.manifest.status}, {self.manifest.asked} samples asked)"

    @classmethod
    def exists(cls, folder: str | Path) -> bool:
        """Whether a folder holds a run; False also for one that may not be looked into."""
        return os.path.isfile(Path(folder) / "run.json")

    @classmethod
    def open(cls, folder: str | Path, manifest: Manifest) -> Run:
        """The run in ``folder``; a new one with this manifest where there is none. Safe for several processes at once.

        Raises:
            RunError: the folder holds something else, or cannot be written.
        """
        folder = Path(folder)
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock-manifest", wait=30.0):
            if not cls.exists(folder):
                with explained(folder):
                    strangers = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
                if strangers:
                    raise RunError(f"{folder} holds {strangers[0]!r} and no run; choose a new folder for the run.")
                with explained(folder):
                    _replace(folder / "run.json", _pretty(manifest))
        return cls(folder)

    # The manifest ---------------------------------------------------------------------------------------------------------

    def update(self, **changes: Any) -> Manifest:
        """Change fields of the manifest on disk: read, change and replace it under a lock, so that shards may all do it.

        ``forwards`` is a count to add, since every process knows only its own share; everything else is set.
        """
        with locked(self.folder / ".lock-manifest", wait=30.0), explained(self.folder):
            stored = self._read_manifest()
            changes["forwards"] = stored.forwards + changes.get("forwards", 0)
            self.manifest = Manifest.model_validate(stored.model_dump() | changes)
            _replace(self.folder / "run.json", _pretty(self.manifest))
        return self.manifest

    def _read_manifest(self) -> Manifest:
        missing = f"{self.folder} holds no run (no run.json); give the folder that an audit wrote."
        path, cure = self.folder / "run.json", "start over in a new folder"
        return read_document(path, Manifest, FORMAT, missing, "not a manifest", cure, folder=self.folder)

    # The rows -------------------------------------------------------------------------------------------------------------

    def files(self) -> list[Path]:
        """The files that hold rows, see :func:`row_files`."""
        return row_files(self.folder)

    def outcomes(self) -> dict[str, str]:
        """Status (``ok`` or ``error``) of every sample that has a row; ``ok`` wins over failed attempts."""
        found: dict[str, str] = {}
        for line in self._lines():
            if found.get(line.head["id"]) != "ok":
                found[line.head["id"]] = line.head["status"]
        return found

    def finished(self) -> set[str]:
        """Ids of the samples that are known. Failed ones are not: repeating the command tries them again."""
        return {key for key, status in self.outcomes().items() if status == "ok"}

    def rows(self) -> Iterator[Row]:
        """Every sample once, in the order of the files, one row in memory at a time.

        Of several rows with one id, the first that is ok counts, or the last failure where none is.

        Raises:
            RunError: a line that is not the last of its file is damaged; the message names file and line.
        """
        return map(_row, self._winners())

    def lines(self) -> Iterator[bytes]:
        """The same, as they stand in the files."""
        return (line.raw for line in self._winners())

    def tally(self) -> Tally:
        """Count the rows: how many are asked for, there, failed, truncated; and what contradicts itself."""
        count = Count(self.manifest)
        for row in self.rows():
            count.take(row)
        return count.tally(differing=self.differing())

    def differing(self) -> int:
        """How many samples have several rows with a result, of which a later one has other values than the first, rounding aside."""
        results = Counter(line.head["id"] for line in self._lines() if line.head["status"] == "ok")
        repeated = {key for key, n in results.items() if n > 1}
        if not repeated:
            return 0
        first: dict[str, Row] = {}
        apart: set[str] = set()
        rtol = rounding_of(self.manifest)
        for line in self._lines():
            if line.head["id"] in repeated and line.head["status"] == "ok":
                row = _row(line)
                if not same_values(first.setdefault(row.id, row), row, rtol):
                    apart.add(row.id)
        return len(apart)

    def amend(self, facts: Mapping[str, Mapping[str, Any]]) -> int:
        """Bring what rows say about their prompts up to date. Scores that are there stay: a sample's id does not depend on these.

        Args:
            facts: Fields of :class:`~mnemoscope.records.schema.Row` by sample id, as plain values such as ``{"label": True}``; of
                ``scores``, those that are to be added or replaced.

        Returns:
            How many lines changed. A file in which none does is left alone, and may be in use meanwhile.

        Raises:
            RunError: another process is writing a file that would change.
        """

        def outdated(line: _Line) -> bool:
            wanted = facts.get(line.head["id"], {})
            new = _amended(line.head, wanted)
            return any(new[k] != line.head.get(k, {} if k == "scores" else None) for k in wanted)

        changed = 0
        for path in self.files():
            if not any(map(outdated, sound_lines(path))):
                continue
            with _sole_writer(path, wait=5.0), explained(self.folder), whole(path) as half, open(half, "wb") as out:
                for line in sound_lines(path):
                    raw = line.raw
                    if outdated(line):
                        raw = _encoded(_row(line, _amended(line.head, facts[line.head["id"]])))
                        changed += 1
                    out.write(raw)
                out.flush()
                os.fsync(out.fileno())
        return changed

    def _lines(self) -> Iterator[_Line]:
        for path in self.files():
            yield from sound_lines(path)

    def _winners(self) -> Iterator[_Line]:
        # Two passes over the files: memory holds an id and a number per sample, never a second row.
        best: dict[str, tuple[bool, int]] = {}
        for i, line in enumerate(self._lines()):
            ok, _ = best.get(line.head["id"], (False, i))
            if not ok:
                best[line.head["id"]] = (line.head["status"] == "ok", i)
        for i, line in enumerate(self._lines()):
            if best.get(line.head["id"], (False, -1))[1] == i:
                yield line

    # Several folders ------------------------------------------------------------------------------------------------------

    @classmethod
    def merge(cls, folder: str | Path, runs: Sequence[Run], *, images: bool = True) -> Run:
        """One run from several folders with the same settings, such as shards that were made on several machines.

        Args:
            folder: A new folder.
            runs: The runs; where two hold the same sample, the first that is ok counts.
            images: Whether their pictures are copied too, and those that were measured with one of them.

        Returns:
            The new run. It keeps the files that all parts are judged by, and what is left open is counted anew. Where several parts have
            measured pictures, these are left where they are, and a note says so.

        Raises:
            RunError: the runs have different settings or thresholds (named), or the folder is not new.
        """
        if not runs:
            raise RunError("there is no run to merge; name at least one run folder.")
        first = runs[0].manifest
        for other in runs[1:]:
            if found := differences(first.setting, other.manifest.setting):
                raise RunError(
                    f"{runs[0].folder} and {other.folder} were made under different settings ({found[0]}); merge runs of one setting."
                )
        if cls.exists(folder):
            raise RunError(f"{folder} already holds a run; merge into a new folder.")
        judged_by = _common_files(runs)
        merged = cls.open(folder, _merged(runs))
        for name, content in judged_by.items():
            write_whole(merged.folder / name, content)
        for i, run in enumerate(runs):
            with Writer(merged, i) as out:
                winners = run._winners()
                while lines := list(islice(winners, TOGETHER)):
                    out.append_lines(b"".join(line.raw for line in lines))
            if images:
                _copy(run.folder, "images", merged.folder)
        tally, notes = merged.tally(), list(merged.manifest.notes)
        measured = [run.folder / MEASURES for run in runs if (run.folder / MEASURES / "measure.json").is_file()]
        if images and len(measured) == 1:
            _copy(measured[0].parent, MEASURES, merged.folder)
        elif len(measured) > 1:
            where = ", ".join(folder_name(folder.parent) for folder in measured)
            notes.append(f"Several parts have measured pictures ({where}); they were left where they are.")
        merged.update(status="done" if tally.complete else "incomplete", notes=[*notes, *tally.notes])
        return merged

    # Exports --------------------------------------------------------------------------------------------------------------

    def to_table(self) -> pyarrow.Table:
        """All rows as an Arrow table (``.to_pandas()`` gives a data frame); a score is a column named after its detector."""
        import pyarrow as pa

        schema = self._schema(lists=True)
        return pa.Table.from_batches(self._record_batches(schema), schema)

    def to_parquet(self, path: str | Path) -> Path:
        """Write all rows to a Parquet file, a bounded number of rows in memory at a time."""
        import pyarrow.parquet as pq

        schema = self._schema(lists=True)
        with explained(Path(path).parent), whole(Path(path)) as half, pq.ParquetWriter(half, schema) as out:
            for batch in self._record_batches(schema):
                out.write_batch(batch)
        return Path(path)

    def to_csv(self, path: str | Path) -> Path:
        """Write all rows to a CSV file (UTF-8). Per-step values are lists and have no place in CSV: see :meth:`to_parquet`."""
        from pyarrow import csv

        schema = self._schema(lists=False)
        with explained(Path(path).parent), whole(Path(path)) as half, csv.CSVWriter(half, schema) as out:
            for batch in self._record_batches(schema):
                out.write_batch(batch)
        return Path(path)

    def _schema(self, *, lists: bool) -> pyarrow.Schema:
        import pyarrow as pa

        detectors = sorted({name for line in self._lines() for name in line.head.get("scores", {})})
        score = [(name, pa.float64()) for name in detectors] + [(f"{name}.space", pa.string()) for name in detectors]
        steps = [(f"{name}.per_step", pa.list_(pa.float64())) for name in detectors] if lists else []
        return pa.schema(
            [(k, pa.string()) for k in ("id", "prompt_id", "prompt")]
            + [("seed", pa.int64()), ("status", pa.string()), ("group", pa.string()), ("label", pa.bool_())]
            + [*score, *steps]
            + [
                ("nearest.reference", pa.string()),
                ("nearest.similarity", pa.float64()),
                ("nearest.descriptor", pa.string()),
            ]
            + [("nearest.threshold", pa.float64()), ("nearest.copy_found", pa.bool_()), ("image", pa.string())]
            + [("forwards", pa.int64()), ("tokens_dropped", pa.int64()), ("seconds", pa.float64())]
            + [("error", pa.string()), ("note", pa.string())]
        )

    def _record_batches(self, schema: pyarrow.Schema, size: int = 1024) -> Iterator[pyarrow.RecordBatch]:
        import pyarrow as pa

        flat: list[dict[str, Any]] = []
        for row in self.rows():
            flat.append(_flat(row))
            if len(flat) == size:
                yield pa.RecordBatch.from_pylist(flat, schema)
                flat = []
        if flat:
            yield pa.RecordBatch.from_pylist(flat, schema)


class Writer:
    """Appends to one file of a run; a context manager that holds the file's lock.

    The lock belongs to the operating system: it ends with the process, however the process ends, so nobody ever has to
    delete a stale one.

    Args:
        run: The run.
        shard: Number of the shard to write; None: the whole run (``samples.jsonl``).

    Raises:
        RunError: another process is writing this file, the disk is full, or somebody deleted the file; what was written before stays
            readable.
    """

    def __init__(self, run: Run, shard: int | None = None):
        self.run = run
        self.path = run.folder / ("samples.jsonl" if shard is None else f"samples-{shard}.jsonl")

    def __enter__(self) -> Writer:
        with ExitStack() as held:
            held.enter_context(_sole_writer(self.path, wait=0.0))
            with explained(self.run.folder):
                self.path.touch()
                self._end = max((line.end for line in sound_lines(self.path)), default=0)
                self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
                held.callback(os.close, self._file)
                os.ftruncate(self._file, self._end)  # a torn line of the process before us
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def append(self, rows: Sequence[Row]) -> None:
        """Append rows, in one write, and wait until the disk has them."""
        self.append_lines(b"".join(map(_encoded, rows)))

    def append_lines(self, data: bytes) -> None:
        """Append whole lines as they are."""
        require_file(self._file, self.path)
        with explained(self.run.folder):
            try:
                write_all(self._file, data)
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, self._end)  # half a batch is no batch
                raise
        self._end += len(data)

    def save(self, name: str, data: bytes) -> str:
        """Write a file of the run (such as ``images/<id>.webp``) at once or not at all; returns its name."""
        require_file(self._file, self.path)
        write_whole(self.run.folder / name, data)
        return name


# Lines --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Line:
    path: Path
    number: int
    raw: bytes
    head: dict[str, Any]
    end: int  # offset of the first byte after the line


def sound_lines(path: Path) -> Iterator[_Line]:
    """The lines of a file. Damage is forgiven where nothing follows it, because that is what a kill leaves behind."""
    damage: RunError | None = None
    end = 0
    with _opened(path) as file:
        for number, raw in enumerate(lines_of(file), 1):
            if damage is not None:
                raise damage
            if len(raw) > LONGEST_LINE:
                raise _damaged(path, number, f"it has more than {LONGEST_LINE:,} bytes")
            end += len(raw)
            try:
                head = parse_json(raw)
                sound = raw.endswith(b"\n") and isinstance(head["id"], str) and head["status"] in ("ok", "error")
                why = "it is no sample"
            except (ParseError, TypeError, KeyError) as e:
                sound, why = False, str(e) if isinstance(e, ParseError) else "it is no sample"
            if sound:
                yield _Line(path, number, raw, head, end)
            else:
                damage = _damaged(path, number, why)


def _opened(path: Path) -> BinaryIO:
    """A file of a run or an index, for reading."""
    try:
        return open_inside(path.parent, path.name)
    except OSError as e:
        raise RunError(f"{path} cannot be read ({e.strerror or e}); restore it, or start over in a new folder.") from e


def _encoded(row: Row) -> bytes:
    return (row.model_dump_json(exclude_none=True) + "\n").encode()


def _amended(head: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """A row with other facts, as plain values; an attempt that failed has no scores."""
    scores = facts.get("scores", {}) if head["status"] == "ok" else {}
    return {**head, **facts, "scores": {**head.get("scores", {}), **scores}}


def _row(line: _Line, content: Mapping[str, Any] | None = None) -> Row:
    """The row of a line, or what it becomes with other content."""
    try:
        return Row.model_validate(line.head if content is None else content)
    except ValidationError as e:
        raise _damaged(line.path, line.number, first_error(e)) from e


def _damaged(path: Path, number: int, why: str) -> RunError:
    return RunError(
        f"line {number} of {path} is damaged ({why}); delete that line and repeat the command: only its sample is computed again."
    )


def _flat(row: Row) -> dict[str, Any]:
    flat = row.model_dump(exclude={"scores", "nearest"})
    for name, score in row.scores.items():
        flat |= {name: score.value, f"{name}.space": score.space, f"{name}.per_step": score.per_step}
    if row.nearest is not None:
        flat |= {f"nearest.{k}": v for k, v in row.nearest.model_dump().items()}
    return flat


# Parts of a merged run ----------------------------------------------------------------------------------------------------


def _merged(runs: Sequence[Run]) -> Manifest:
    """The manifest of several parts, before their rows are counted."""
    parts = [run.manifest for run in runs]
    # What the rows of one part left open, those of another may have filled.
    counted = {note for run in runs for note in run.tally().notes}
    ended = [p.ended for p in parts if p.ended]
    return parts[0].model_copy(
        update={
            "status": "running",
            "started": min(p.started for p in parts),
            "ended": max(ended) if len(ended) == len(parts) else None,
            "asked": max(p.asked for p in parts),
            "forwards": sum(p.forwards for p in parts),
            "notes": list(dict.fromkeys(n for p in parts for n in p.notes if n not in counted)),
            "accepted": list(dict.fromkeys(a for p in parts for a in p.accepted)),
            "doses": {group: n for p in reversed(parts) for group, n in p.doses.items()},
        }
    )


def _common_files(runs: Sequence[Run]) -> dict[str, bytes]:
    """The files that parts are judged by. Thresholds must be everybody's; the baseline may be missing where a part is not done."""
    names = sorted({p.name for run in runs for pattern in JUDGED_BY for p in run.folder.glob(pattern)})
    found: dict[str, bytes] = {}
    for name in names:
        contents = {run.folder: _content(run.folder / name) for run in runs}
        held = {folder: content for folder, content in contents.items() if content is not None}
        (one, first), *others = held.items()
        lacking = [folder for folder in contents if folder not in held]
        if lacking and name != "controls.json":
            raise RunError(
                f"{one} is judged by {name} and {lacking[0]} has none; merge runs of one calibration: repeat the command of "
                f"{lacking[0]} with it."
            )
        for other, content in others:
            if difference := _difference(first, content):
                raise RunError(
                    f"{one} and {other} hold different {name} ({difference}); merge runs that are judged by the same."
                )
        found[name] = first
    return found


def _content(path: Path) -> bytes | None:
    try:
        return read_inside(path.parent, path.name)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise RunError(f"{path} cannot be read ({e.strerror or e}); restore it, or take it out.") from e


def _copy(folder: Path, name: str, into: Path) -> None:
    """Copy a folder of one run into another, if there is one."""
    try:
        files = list(files_below(folder, name))
    except OSError as e:
        raise RunError(f"{e.filename} in {folder} cannot be copied ({e.strerror or e}); take it out.") from e
    with explained(into):
        for relative, file in files:
            (into / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, into / relative)


def _difference(one: bytes, other: bytes) -> str:
    """The first difference of two JSON files, in words; empty: none but in their layout."""
    try:
        return next(iter(differences(parse_json(one), parse_json(other))), "")
    except ParseError:
        return "" if one == other else "one of them does not parse"


# Bytes --------------------------------------------------------------------------------------------------------------------


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn what the disk says into a sentence."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"the disk that holds {folder} is full; everything written so far is kept: free some space, and the same command continues."
            ) from e
        raise RunError(f"{folder} cannot be written ({e.strerror or e}); choose a folder you may write to.") from e


@contextmanager
def locked(path: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock file. The lock belongs to the operating system: it ends with the process, however the process ends.

    Args:
        path: The file; its folder is there.
        wait: Seconds to wait for another process; below 0: until it ends.

    Raises:
        RunError: another process holds the lock, or the file cannot be made.
    """
    lock = FileLock(path, timeout=wait)
    with explained(path.parent):
        try:
            lock.acquire()
        except Timeout:
            raise in_use(path.parent) from None
    try:
        yield
    finally:
        lock.release()


def in_use(folder: Path) -> RunError:
    return RunError(f"{folder} is being written by another process; wait for it to end, or choose another folder.")


def _sole_writer(path: Path, wait: float) -> AbstractContextManager[None]:
    """Hold the lock of a file of rows; whoever does is the only one to write it."""
    return locked(path.parent / f".lock-{path.stem}", wait)


class OutFolder:
    """A folder that a command writes results to, made where there is none, to notice that somebody deletes it meanwhile.

    Args:
        folder: Its path.

    Raises:
        RunError: it cannot be made.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._facts = os.stat(self.folder)

    def require(self, *names: str) -> None:
        """Refuse to go on where the folder, or a file in it, is no longer there: results would be written that belong to nothing.

        Raises:
            RunError: it was deleted, or replaced by another.
        """
        try:
            same = os.path.samestat(self._facts, os.stat(self.folder))
        except OSError:
            same = False
        if not same or not all(os.path.lexists(self.folder / name) for name in names):
            raise deleted(self.folder)


def require_file(file: int, path: Path) -> None:
    """Refuse to go on where a file that is open for writing is no longer at its path.

    Raises:
        RunError: it was deleted, or replaced by another: what is written to it would be lost.
    """
    try:
        same = os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        same = False
    if not same:
        raise deleted(path.parent)


def deleted(folder: Path) -> RunError:
    return RunError(
        f"{folder} was deleted or emptied while this command wrote to it, and what was saved there is gone; repeat the command."
    )


@contextmanager
def whole(path: Path) -> Iterator[str]:
    """A path to write to; it becomes ``path`` only when all is written."""
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield str(half)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def write_whole(path: str | Path, data: bytes) -> Path:
    """Write a file at once or not at all: whoever reads it sees the old one or the new one, never half.

    Raises:
        RunError: it cannot be written.
    """
    path = Path(path)
    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data)
    return path


def _replace(path: Path, data: bytes) -> None:
    with whole(path) as half:
        file = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            write_all(file, data)
            os.fsync(file)
        finally:
            os.close(file)


def write_all(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def _pretty(manifest: Manifest) -> bytes:
    return (manifest.model_dump_json(indent=2) + "\n").encode()


_Document = TypeVar("_Document", bound=BaseModel)


def read_document(
    path: Path, kind: type[_Document], newest: int, missing: str, wrong: str, cure: str, *, folder: Path | None = None
) -> _Document:
    """A JSON document that says how a folder is to be read.

    Args:
        path: The file.
        kind: What it holds.
        newest: The latest ``format`` that this version reads.
        missing: The sentence where there is no such file.
        wrong: What to call a file that holds something else.
        cure: What to do, besides restoring it.
        folder: What it must lie in, links followed; None: whoever runs this named the file, and it may be any.

    Raises:
        RunError: it is missing, leads out of the folder, cannot be read, is of a later format, or holds something else.
    """
    try:
        content = read_json(path, folder)
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(missing) from None
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else None
        raise RunError(f"{path} cannot be read ({why or e}); restore it, or {cure}.") from e
    if isinstance(content, dict) and isinstance(content.get("format"), int) and content["format"] > newest:
        raise RunError(
            f"{path} has format {content['format']}, and this version reads up to {newest}; update mnemoscope."
        )
    try:
        return kind.model_validate(content)
    except ValidationError as e:
        raise RunError(f"{path} is {wrong} ({first_error(e)}); restore it, or {cure}.") from e


def first_error(error: ValidationError) -> str:
    """The first thing that is wrong with a document, in words."""
    found = error.errors(include_url=False)[0]
    says = found["msg"].removeprefix("Value error, ")
    if not found["loc"] and found["type"] == "value_error":  # our own sentence, which names the key itself
        return says
    return f"{'.'.join(map(str, found['loc'])) or 'content'}: {says}"


def short(text: str, limit: int = 60) -> str:
    """The text, cut with an ellipsis where it is longer."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
