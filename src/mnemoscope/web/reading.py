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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from ..errors import MnemoscopeError, RunError, UnknownName, UsageError
from ..parsing import ParseError, lines_of, parse_json
from ..records.files import open_inside
from ..records.schema import Manifest, Nearest, Row, Score, Thresholds
from ..records.store import Run, digest, row_files
from ..records.thresholds import parse_thresholds
from ..report.once import Once
from ..report.summary import Finding, Summary, read_part, summarize
from .runs import Entry, Place, Places, find, read_entry
from .stamps import Stamp, stamp

__all__ = ["Library", "Line", "Runs", "Snapshot"]

LONGEST_ID = 1000
"""Characters of a sample's id; ours have twenty, and one that no address can hold is no id."""

MOST_DAMAGED = 100
"""How many damaged lines of a file are named; of more, only the number is known."""

KEPT = 6
"""How many runs stay in memory; the one that was not looked at for longest goes."""

REST = 5.0
"""A growing run is summarized again, and runs are looked for again, when this many times the last effort has passed: reading never
starves the audit."""

NO_TEXT = "The name of this folder is no text, so no address leads to it; rename it."

LONGEST_REST = 1.0
"""Seconds after which runs are looked for again in any case: a page that asks every few seconds sees each change."""


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
        damaged: Lines that could not be read, in sentences: the first ones of each file.
        losses: How many lines could not be read.
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
    losses: int
    prompts: list[Line]
    samples: list[Line]
    findings: dict[tuple[str, str], Finding]
    seeds: dict[tuple[str, str], list[tuple[int, str]]]

    @property
    def manifest(self) -> Manifest:
        """The run's manifest."""
        return self.summary.manifest


@dataclass(frozen=True)
class Runs:
    """All runs at one moment.

    Attributes:
        entries: The one that started last first, those that cannot be read at the end; rows are not counted.
        complete: Whether every folder was looked into.
    """

    entries: Sequence[Entry]
    complete: bool


class _Memory:
    """What is remembered of a run: its entry, as long as its manifest has one stamp, and how far its rows are counted."""

    def __init__(self, name: str, place: Place, count: _Count):
        self.stamp, self.count = place.stamp, count
        self.entry = read_entry(name, place.folder)


class Library:
    """All runs at or below a folder. Safe for several threads.

    Args:
        folder: A run folder, or a folder that holds runs at any of :data:`~mnemoscope.web.runs.DEPTH` levels; links out of it are not
            followed.

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
        self._finding: Once[Places] = Once()
        self._places: Places | None = None
        self._due = 0.0
        self._listing: Once[Runs] = Once()
        self._runs: Runs | None = None
        self._memory: dict[str, _Memory] = {}
        self._counting: Once[Entry] = Once()
        self._readers: OrderedDict[str, _Reader] = OrderedDict()

    def runs(self) -> Runs:
        """Every run as it is, or, while another thread looks for them, as they were a moment ago."""
        latest = self._runs
        if latest is not None and self._listing.runs(""):
            return latest
        return self._listing.do("", self._list)

    def count_rows(self, entries: Iterable[Entry]) -> list[Entry]:
        """The same runs with the rows that each has now. Costs a look into the folder of each, so ask for those that are shown."""
        return [self._counting.do(entry.name, partial(self._count_rows, entry)) for entry in entries]

    def names(self) -> list[str]:
        """Names of the runs, the broken ones too, without reading any."""
        return list(self._find().by_name)

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

    def _list(self) -> Runs:
        places = self._find()
        self._memory = {name: self._remember(name, place) for name, place in places.by_name.items()}
        entries = [memory.entry for memory in self._memory.values()]
        entries += [Entry(name, self.folder, error=NO_TEXT) for name in places.nameless]
        self._runs = Runs(sorted(entries, key=lambda e: e.started, reverse=True), places.complete)
        return self._runs

    def _remember(self, name: str, place: Place) -> _Memory:
        before = self._memory.get(name)
        if before is not None and before.stamp == place.stamp:
            return before
        return _Memory(name, place, _Count() if before is None else before.count)

    def _count_rows(self, entry: Entry) -> Entry:
        memory = self._memory.get(entry.name)
        if entry.error or memory is None:
            return entry
        try:
            return replace(entry, rows=memory.count.now(row_files(entry.folder)))
        except MnemoscopeError as e:
            return replace(entry, error=str(e))
        except OSError as e:
            return replace(entry, error=f"{entry.folder} cannot be read ({e.strerror or e}).")

    def _reader(self, name: str) -> _Reader:
        # A name from outside is looked up among the folders that were found; no path is ever made of it.
        places = self._places
        if places is None or name not in places.by_name:
            places = self._find()
        if name not in places.by_name:
            raise UnknownName("run", name, places.by_name)
        with self._lock:
            reader = self._readers.pop(name, None) or _Reader(name, places.by_name[name].folder)
            self._readers[name] = reader  # the last one looked at
            while len(self._readers) > KEPT:
                self._readers.popitem(last=False)
        return reader

    def _find(self) -> Places:
        latest = self._places
        if latest is not None and (self._finding.runs("") or time.monotonic() < self._due):
            return latest
        return self._finding.do("", self._look)

    def _look(self) -> Places:
        began = time.monotonic()
        self._places = places = find(self.folder)
        now = time.monotonic()
        self._due = now + min(LONGEST_REST, REST * (now - began))
        return places


# Files that grow ----------------------------------------------------------------------------------------------------------


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
        self.losses = 0
        self._stamp: Stamp | None = None
        self._end = 0
        self._number = 0
        self._last = b""

    def new(self) -> Iterator[tuple[Row, int, int]]:
        """Rows with offset and length of their lines.

        Raises:
            _Replaced: what was read before is no longer there.
            RunError: the file cannot be read.
        """
        if stamp(self.path) == self._stamp:
            return
        try:
            with _opened(self.path) as file:
                now = Stamp.of(os.fstat(file.fileno()))
                self._check(file, now)
                yield from self._read(file)
        except OSError as e:
            raise RunError(f"{self.path} cannot be read ({e.strerror or e}).") from e
        self._stamp = now

    def _check(self, file: BinaryIO, now: Stamp) -> None:
        before = self._stamp
        if now.size < self._end or (before and (now.inode != before.inode or now.size == before.size)):
            raise _Replaced
        file.seek(self._end - len(self._last))
        if file.read(len(self._last)) != self._last:
            raise _Replaced

    def _read(self, file: BinaryIO) -> Iterator[tuple[Row, int, int]]:
        """Rows from where ``file`` stands, which is the end of the last one."""
        damaged = b""
        for raw in lines_of(file):
            if not raw.endswith(b"\n"):
                return
            if damaged:
                self._pass(damaged)
                self._lose()
            row, damaged = _row(raw), b""
            if row is None:
                damaged = raw
                continue
            start = self._end
            self._pass(raw)
            yield row, start, len(raw)

    def _pass(self, raw: bytes) -> None:
        """Go on behind a line."""
        self._end += len(raw)
        self._number += 1
        self._last = raw

    def _lose(self) -> None:
        """The line before the place that was reached is damaged, and stays so."""
        self.losses += 1
        if self.losses <= MOST_DAMAGED:
            self.damaged.append(f"Line {self._number} of {self.path} is damaged and left out here.")


def _row(raw: bytes) -> Row | None:
    """The row of a line; None: it is none."""
    try:
        row = Row.model_validate(parse_json(raw))
    except (ParseError, ValidationError):
        return None
    return row if len(row.id) <= LONGEST_ID else None


class _Count:
    """How many lines the files of a run have, without reading any twice. Threads that count at once do the work twice, and both right."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[Stamp, int]] = {}

    def now(self, files: Iterable[Path]) -> int:
        """Counted up to this moment."""
        return sum(map(self._lines, files))

    def _lines(self, path: Path) -> int:
        now, (before, lines) = stamp(path), self._seen.get(path, (None, 0))
        if now is None or now == before:
            return lines
        grown = before is not None and now.inode == before.inode and now.size > before.size
        with _opened(path) as file:
            lines, size = (lines, before.size) if grown and before else (0, 0)
            file.seek(size)
            while piece := file.read(1 << 20):
                lines += piece.count(b"\n")
                size += len(piece)
        self._seen[path] = (now._replace(size=size), lines)
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
        version = self._version()  # before anything is read: what changes meanwhile is read the next time
        latest = self._latest
        if latest is not None and (latest.version == version or time.monotonic() < self._due):
            return latest
        began = time.monotonic()
        run = Run(self.folder)
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

    def _version(self) -> str:
        try:
            files = [self.folder / "run.json", self.folder / "thresholds.json", *row_files(self.folder)]
        except OSError as e:
            raise RunError(f"{self.folder} cannot be read ({e.strerror or e}).") from e
        return digest([[p.name, stamp(p)] for p in files])

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
            losses=sum(tail.losses for tail in rows.tails),
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
