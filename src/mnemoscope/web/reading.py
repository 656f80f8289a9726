"""Runs as the pages need them: found below one folder, read once, and from then on only what was appended.

Nothing here writes. Of every row memory keeps what lists show and sort by, and where its line begins; pictures, per-step
values and errors stay on the disk until somebody opens the sample.

Many visitors ask at once, and a disk may be slow: no lock is held while a file is read. Of one run only one thread reads at a time, and the
others are shown what was known before; where nothing was, they wait for that thread, and nobody who asks for another run waits with them.
"""

from __future__ import annotations

import math
import os
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pydantic import ValidationError

from ..errors import MnemoscopeError, RunError, UnknownName, UsageError
from ..parsing import ParseError, parse_json
from ..records.files import open_inside
from ..records.schema import Manifest, Nearest, Row, Score, Thresholds
from ..records.store import Run, digest
from ..records.thresholds import parse_thresholds
from ..report.once import Once
from ..report.summary import Finding, Summary, read_part, summarize

__all__ = ["Entry", "Library", "Line", "Snapshot"]

DEPTH = 4
"""How many folders below the first one runs are looked for."""

KEPT = 6
"""How many runs stay in memory; the one that was not looked at for longest goes."""

REST = 5.0
"""A growing run is summarized again when this many times the last effort has passed: reading never starves the audit."""


@dataclass(frozen=True)
class Entry:
    """One run in the list of runs.

    Attributes:
        name: Its folder, relative to the one that is viewed, with forward slashes.
        manifest: What it says about itself; None: it cannot be read.
        rows: Lines written so far; failed attempts count.
        error: Why it cannot be read, in a sentence.
    """

    name: str
    manifest: Manifest | None
    rows: int
    error: str = ""

    @property
    def status(self) -> str:
        """Of the manifest; that of a run with fewer lines than samples is never done."""
        stated = "" if self.manifest is None else self.manifest.status
        return "incomplete" if stated == "done" and self.manifest and self.rows < self.manifest.asked else stated


@dataclass(frozen=True, slots=True)
class Line:
    """What a list shows of one prompt over all its seeds, or (``seed`` is a number) of one sample.

    Attributes:
        id: The sample that opens: the one nearest to a reference picture.
        order: When its newest row came, counted in rows.
    """

    id: str
    prompt_id: str
    prompt: str
    group: str | None
    seed: int | None
    seeds: int
    failed: int
    score: float | None
    above: bool | None
    borderline: bool
    copies: int
    compared: int
    similarity: float | None
    reference: str | None
    order: int


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One run at one moment.

    Attributes:
        version: Differs when anything on the disk does.
        summary: The numbers of the report, without its tables on known labels, which take long to compute.
        damaged: Lines that could not be read, in sentences.
        prompts: A line per prompt, worst first.
        samples: A line per sample, in the order of the files.
        findings: What is known about each prompt, by id and text.
        seeds: Samples of each prompt as (seed, id), by id and text.
    """

    name: str
    folder: Path
    version: str
    summary: Summary
    damaged: tuple[str, ...]
    prompts: list[Line]
    samples: list[Line]
    findings: dict[tuple[str, str], Finding]
    seeds: dict[tuple[str, str], list[tuple[int, str]]]

    @property
    def manifest(self) -> Manifest:
        """The run's manifest."""
        return self.summary.manifest


class Library:
    """All runs at or below a folder. Safe for several threads.

    Args:
        folder: A run folder, or a folder that holds runs at any of :data:`DEPTH` levels; links out of it are not followed.

    Raises:
        UsageError: there is no such folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not os.path.isdir(self.folder):
            raise UsageError(
                f"there is no folder {self.folder}; give one that holds runs, or make a first run: mnemoscope demo"
            )
        self._lock = threading.Lock()
        self._found: dict[str, Path] = {}
        self._readers: OrderedDict[str, _Reader] = OrderedDict()
        self._counts: dict[Path, _Count] = {}

    def entries(self) -> list[Entry]:
        """Every run, the one that started last first, broken ones at the end."""
        found = self._find()
        # Two threads may do this at once: what one forgets of the other's counts is only counted again.
        self._counts = counts = {path: self._counts.get(path) or _Count() for path in found.values()}
        entries = [_entry(name, path, counts[path]) for name, path in found.items()]
        return sorted(entries, key=lambda e: e.manifest.started if e.manifest else "", reverse=True)

    def names(self) -> list[str]:
        """Names of the runs, the broken ones too, without reading any."""
        return list(self._find())

    def run(self, name: str) -> Snapshot:
        """A run as it is now (a large one that grows: as it was a moment ago).

        Raises:
            UnknownName: no run has that name.
            RunError: it cannot be read.
        """
        return self._reader(name).snapshot()

    def sample(self, name: str, id: str) -> Row:
        """One whole row, read from the disk.

        Raises:
            UnknownName: there is no such run, or no such sample in it.
            RunError: the file changed under our hands.
        """
        return self._reader(name).row(id)

    def _reader(self, name: str) -> _Reader:
        # A name from outside is looked up among the folders that were found; no path is ever made of it.
        found = self._found if name in self._found else self._find()
        if name not in found:
            raise UnknownName("run", name, found)
        with self._lock:
            reader = self._readers.pop(name, None) or _Reader(name, found[name])
            self._readers[name] = reader  # the last one looked at
            while len(self._readers) > KEPT:
                self._readers.popitem(last=False)
        return reader

    def _find(self) -> dict[str, Path]:
        # A run that is viewed by itself is called by its folder's name.
        root = self.folder.resolve()
        base = root.parent if Run.exists(root) else root
        self._found = {name: path for path in _runs(root, DEPTH) if (name := _name(path.relative_to(base)))}
        return self._found


def _runs(folder: Path, depth: int) -> Iterator[Path]:
    """Run folders at or below ``folder``; what lies inside a run is its own."""
    if Run.exists(folder):
        yield folder
    elif depth:
        try:
            inside = sorted(e.path for e in os.scandir(folder) if e.is_dir(follow_symlinks=False))
        except OSError:  # not ours to read
            return
        for path in inside:
            if not os.path.basename(path).startswith("."):
                yield from _runs(Path(path), depth - 1)


def _name(path: Path) -> str:
    """The path as an address can carry it; empty for a name that is no text at all."""
    try:
        return path.as_posix().encode().decode()
    except UnicodeEncodeError:
        return ""


def _entry(name: str, folder: Path, count: _Count) -> Entry:
    try:
        run = Run(folder)
        return Entry(name, run.manifest, count.now(run.files()))
    except MnemoscopeError as e:
        return Entry(name, None, 0, str(e))
    except OSError as e:
        return Entry(name, None, 0, f"{folder} cannot be read ({e.strerror or e}).")


# Files that grow ----------------------------------------------------------------------------------------------------------


class _Stamp(NamedTuple):
    """What tells that a file is another one, or was written to."""

    inode: int
    size: int
    changed: int

    @classmethod
    def of(cls, facts: os.stat_result) -> _Stamp:
        """From what the system says of a file."""
        return cls(facts.st_ino, facts.st_size, facts.st_mtime_ns)


def _stamp(path: Path) -> _Stamp | None:
    try:
        return _Stamp.of(path.stat())
    except OSError:
        return None


def _opened(path: Path) -> BinaryIO:
    """A file of rows, for reading.

    Raises:
        RunError: it is gone, leads out of its folder, or is no regular file.
    """
    try:
        return open_inside(path.parent, path.name)
    except OSError as e:
        raise RunError(f"{path} cannot be read ({e.strerror or e}).") from e


class _Replaced(Exception):
    """A file is not the one that was read before."""


class _Tail:
    """What was appended to a file of rows since it was last asked.

    A last line without an end, or one that does not parse with nothing after it, is still being written or was torn by a kill:
    it is left for the next time. One that others follow is damaged.

    One thread may use it at a time. Between two rows it can be left and asked anew later: it continues after the last row that it gave.
    """

    def __init__(self, path: Path):
        self.path = path
        self.damaged: list[str] = []
        self._stamp: _Stamp | None = None
        self._end = 0
        self._number = 0
        self._last = b""

    def new(self) -> Iterator[tuple[Row, int, int]]:
        """Rows with offset and length of their lines.

        Raises:
            _Replaced: what was read before is no longer there.
            RunError: the file cannot be read.
        """
        if _stamp(self.path) == self._stamp:
            return
        try:
            with _opened(self.path) as file:
                stamp = _Stamp.of(os.fstat(file.fileno()))
                self._check(file, stamp)
                yield from self._read(file)
        except OSError as e:
            raise RunError(f"{self.path} cannot be read ({e.strerror or e}).") from e
        self._stamp = stamp

    def _check(self, file: BinaryIO, stamp: _Stamp) -> None:
        before = self._stamp
        if stamp.size < self._end or (before and (stamp.inode != before.inode or stamp.size == before.size)):
            raise _Replaced
        file.seek(self._end - len(self._last))
        if file.read(len(self._last)) != self._last:
            raise _Replaced

    def _read(self, file: BinaryIO) -> Iterator[tuple[Row, int, int]]:
        """Rows from where ``file`` stands, which is the end of the last one."""
        start, number = self._end, self._number
        waiting: list[str] = []
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            number += 1
            try:
                row = Row.model_validate(parse_json(raw))
            except (ParseError, ValidationError):
                waiting.append(f"Line {number} of {self.path} is damaged and left out here.")
            else:
                self.damaged += waiting
                waiting = []
                self._end, self._number, self._last = start + len(raw), number, raw
                yield row, start, len(raw)
            start += len(raw)


class _Count:
    """How many lines the files of a run have, without reading any twice. Threads that count at once do the work twice, and both right."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[_Stamp, int]] = {}

    def now(self, files: Iterable[Path]) -> int:
        """Counted up to this moment."""
        return sum(map(self._lines, files))

    def _lines(self, path: Path) -> int:
        now, (before, lines) = _stamp(path), self._seen.get(path, (None, 0))
        if now is None or now == before:
            return lines
        grown = before is not None and now.inode == before.inode and now.size > before.size
        with _opened(path) as file:
            lines, size = (lines, before.size) if grown and before else (0, 0)
            file.seek(size)
            while piece := file.read(1 << 20):
                lines += piece.count(b"\n")
                size += len(piece)
        self._seen[path] = (_Stamp(now.inode, size, now.changed), lines)
        return lines


# One run ------------------------------------------------------------------------------------------------------------------


class _Names:
    """Strings that repeat, as numbers; −1 is none."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}
        self._names: list[str] = []

    def number(self, name: str | None) -> int:
        if name is None:
            return -1
        if name not in self._number:
            self._number[name] = len(self._names)
            self._names.append(name)
        return self._number[name]

    def __getitem__(self, number: int) -> str | None:
        return None if number < 0 else self._names[number]


class _Columns:
    """The samples of a run, a column per fact that lists need.

    Of several rows with one id, the first that is ok counts, or the last failure where none is: as in
    :meth:`~mnemoscope.records.store.Run.rows`, but in the order in which they were read.
    """

    def __init__(self) -> None:
        self.at: dict[str, int] = {}
        self.prompts: list[tuple[str, str, str | None, str | None]] = []
        self._prompt_number: dict[tuple[str, str], int] = {}
        self.prompt = array("q")
        self.seed: list[int] = []
        self.ok = bytearray()
        self.image = bytearray()
        self.dropped: list[int] = []
        self.scores: dict[str, array[float]] = {}
        self.space: dict[str, str] = {}
        self._names = _Names()
        self.reference = array("q")
        self.descriptor = array("q")
        self.similarity = array("d")
        self.threshold = array("d")
        self.copy = array("b")
        self.repeated = False
        self.file = array("q")
        self.start = array("q")
        self.length = array("q")

    def __len__(self) -> int:
        return len(self.seed)

    def take(self, row: Row, file: int, start: int, length: int) -> None:
        """Add a row, or let it replace a failed attempt."""
        i = self.at.setdefault(row.id, len(self))
        if i == len(self):
            self._extend()
        elif self.ok[i]:
            self.repeated |= row.status == "ok"
            return
        near = row.nearest
        self.prompt[i] = self._prompt(row)
        self.seed[i], self.ok[i], self.image[i] = row.seed, row.status == "ok", row.image is not None
        self.dropped[i] = row.tokens_dropped
        self.reference[i] = self._names.number(near.reference if near else None)
        self.descriptor[i] = self._names.number(near.descriptor if near else None)
        self.similarity[i] = near.similarity if near else math.nan
        self.threshold[i] = math.nan if near is None or near.threshold is None else near.threshold
        self.copy[i] = -1 if near is None or near.copy_found is None else near.copy_found
        self.file[i], self.start[i], self.length[i] = file, start, length
        for name, score in row.scores.items():
            if name not in self.scores:
                self.scores[name] = array("d", [math.nan]) * len(self)
                self.space[name] = score.space
            self.scores[name][i] = score.value

    def _extend(self) -> None:
        for column in (self.prompt, self.file, self.start, self.length, self.seed, self.dropped):
            column.append(0)
        for flag in (self.ok, self.image):
            flag.append(0)
        for number in (self.reference, self.descriptor, self.copy):
            number.append(-1)
        for value in (self.similarity, self.threshold, *self.scores.values()):
            value.append(math.nan)

    def _prompt(self, row: Row) -> int:
        key = (row.prompt_id, row.prompt)
        if key not in self._prompt_number:
            self._prompt_number[key] = len(self.prompts)
            self.prompts.append((*key, row.group, row.control))
        return self._prompt_number[key]

    def __iter__(self) -> Iterator[Row]:
        """Rows with what a summary reads of them: no per-step values, no labels, no files."""
        for i, id in enumerate(self.at):
            prompt_id, prompt, group, control = self.prompts[self.prompt[i]]
            scores = {
                name: Score.model_construct(value=values[i], space=self.space[name], per_step=[])
                for name, values in self.scores.items()
                if not math.isnan(values[i])
            }
            yield Row.model_construct(
                id=id,
                prompt_id=prompt_id,
                prompt=prompt,
                seed=self.seed[i],
                status="ok" if self.ok[i] else "error",
                group=group,
                control=control,
                label=None,
                scores=scores,
                tokens_dropped=self.dropped[i],
                image=id if self.image[i] else None,
                nearest=self._nearest(i),
            )

    def _nearest(self, i: int) -> Nearest | None:
        reference, descriptor = self._names[self.reference[i]], self._names[self.descriptor[i]]
        if reference is None or descriptor is None:
            return None
        found = None if self.copy[i] < 0 else bool(self.copy[i])
        return Nearest.model_construct(
            reference=reference,
            descriptor=descriptor,
            similarity=self.similarity[i],
            threshold=None if math.isnan(self.threshold[i]) else self.threshold[i],
            copy_found=found,
        )

    def line(self, i: int, id: str, detector: str | None) -> Line:
        """One sample."""
        prompt_id, prompt, group, _ = self.prompts[self.prompt[i]]
        near, ok, values = self._nearest(i), bool(self.ok[i]), self.scores.get(detector or "")
        return Line(
            id=id,
            prompt_id=prompt_id,
            prompt=prompt,
            group=group,
            seed=self.seed[i],
            seeds=int(ok),
            failed=int(not ok),
            score=None if values is None or math.isnan(values[i]) else values[i],
            above=None,  # a threshold is about the mean over all seeds
            borderline=False,
            copies=int(self.copy[i] > 0),
            compared=int(self.copy[i] >= 0),
            similarity=near.similarity if near else None,
            reference=near.reference if near else None,
            order=i,
        )


class _Rows:
    """All rows of a run that were read so far."""

    def __init__(self) -> None:
        self.columns = _Columns()
        self.tails: list[_Tail] = []


class _Reader:
    """One run, kept up to date. Safe for several threads: one reads at a time, and the lock is held only between two lines."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self._once: Once[Snapshot] = Once()
        self._lock = threading.Lock()
        self._rows = _Rows()
        self._latest: Snapshot | None = None
        self._due = 0.0

    def snapshot(self) -> Snapshot:
        """The run as it is, or as it was a moment ago."""
        latest = self._latest
        if latest is not None and self._once.runs(self.name):
            return latest
        return self._once.do(self.name, self._now)

    def _now(self) -> Snapshot:
        """The run as it is, unless that was looked at too recently; one thread at a time."""
        run = Run(self.folder)
        version = self._version(run)
        latest = self._latest
        if latest is not None and (latest.version == version or time.monotonic() < self._due):
            return latest
        began = time.monotonic()
        thresholds = read_part(self.folder / "thresholds.json", parse_thresholds)
        rows = self._read(run)
        made = self._make(run, version, rows, thresholds)
        with self._lock:
            self._rows, self._latest = rows, made
        now = time.monotonic()
        self._due = now + REST * (now - began)
        return made

    def row(self, id: str) -> Row:
        """One whole row from the disk, of a sample that the latest snapshot has."""
        place = self._place(id)
        if place is None:
            self.snapshot()
            place = self._place(id)
        if place is None:
            raise UnknownName(f"sample in {self.name}", id, ())
        path, start, length = place
        try:
            with _opened(path) as file:
                file.seek(start)
                row = Row.model_validate(parse_json(file.read(length)))
        except (OSError, ParseError, ValidationError) as e:
            raise _changed(path) from e
        if row.id != id:
            raise _changed(path)
        return row

    def _place(self, id: str) -> tuple[Path, int, int] | None:
        """File, offset and length of a row; None: the latest snapshot does not have it."""
        with self._lock:
            columns, known = self._rows.columns, 0 if self._latest is None else len(self._latest.samples)
            i = columns.at.get(id, known)
            if i >= known:
                return None
            return self._rows.tails[columns.file[i]].path, columns.start[i], columns.length[i]

    def _version(self, run: Run) -> str:
        files = [self.folder / "run.json", self.folder / "thresholds.json", *run.files()]
        return digest([[p.name, _stamp(p)] for p in files])

    def _read(self, run: Run) -> _Rows:
        """All rows: those that are known, with what was appended; or all anew where a file was replaced."""
        try:
            return self._append(self._rows, run)
        except _Replaced:
            return self._append(_Rows(), run)

    def _append(self, rows: _Rows, run: Run) -> _Rows:
        files = run.files()
        if not {t.path for t in rows.tails} <= set(files):
            raise _Replaced
        rows.tails += [_Tail(p) for p in files if p not in {t.path for t in rows.tails}]
        for number, tail in enumerate(rows.tails):
            for row, start, length in tail.new():
                with self._lock:  # another thread may be looking up where a row lies
                    rows.columns.take(row, number, start, length)
        return rows

    def _make(self, run: Run, version: str, rows: _Rows, thresholds: Thresholds | None) -> Snapshot:
        columns = rows.columns
        ids = list(columns.at)
        differing = run.differing() if columns.repeated else 0
        summary = summarize(columns, run.manifest, thresholds, name=self.folder.name, differing=differing)
        findings = {(f.prompt_id, f.prompt): f for f in (*summary.findings, *summary.variants)}
        members: dict[tuple[str, str], list[int]] = {}
        for i, number in enumerate(columns.prompt):
            members.setdefault(columns.prompts[number][:2], []).append(i)
        return Snapshot(
            name=self.name,
            folder=self.folder,
            version=version,
            summary=summary,
            damaged=tuple(sentence for tail in rows.tails for sentence in tail.damaged),
            prompts=[_prompt_line(f, columns, ids, members[key]) for key, f in findings.items()],
            samples=[columns.line(i, id, summary.detector) for i, id in enumerate(ids)],
            findings=findings,
            seeds={key: sorted((columns.seed[i], ids[i]) for i in rows) for key, rows in members.items()},
        )


def _changed(path: Path) -> RunError:
    return RunError(f"{path} changed while it was read; open the page again.")


def _prompt_line(finding: Finding, columns: _Columns, ids: list[str], members: list[int]) -> Line:
    """One prompt over all its seeds; the sample that opens is the one its pictures would be shown from."""
    first = finding.shots[0].seed if finding.shots else None
    opens = next((i for i in members if columns.seed[i] == first and columns.ok[i]), members[0])
    best = finding.best
    return Line(
        id=ids[opens],
        prompt_id=finding.prompt_id,
        prompt=finding.prompt,
        group=finding.group,
        seed=None,
        seeds=finding.seeds,
        failed=finding.failed,
        score=finding.score,
        above=finding.above,
        borderline=finding.borderline,
        copies=finding.copies,
        compared=finding.compared,
        similarity=best.similarity if best else None,
        reference=best.reference if best else None,
        order=members[-1],
    )
