"""Which runs there are below one folder. Looking again costs a stamp for each: a manifest is read when its stamp is another one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..errors import MnemoscopeError
from ..records.store import Run, short
from .stamps import Stamp, stamp

__all__ = ["Entry", "Place", "Places", "find", "read_entry"]

DEPTH = 4
"""How many folders below the first one runs are looked for."""

MOST_NAMES = 100_000
"""Names of files and folders that are looked at in search of runs: a whole disk is none of our business."""

LONGEST = 200
"""Characters of a model's name, or of any other fact, in the list of runs."""

LONGEST_SENTENCE = 1000
"""Characters of the sentence that says why a run cannot be read."""


@dataclass(frozen=True)
class Entry:
    """One run in the list of runs.

    Attributes:
        name: Its folder, relative to the one that is viewed, with forward slashes.
        folder: The same as a path.
        kind: As its manifest says, like everything that follows; empty: it cannot be read.
        stated: ``running``, ``done``, ``incomplete`` or ``interrupted``.
        asked: Samples that it is meant to have.
        model: What it was made with.
        started: When, as ISO 8601 writes it.
        rows: Lines written so far; failed attempts count. None: not counted yet.
        error: Why it cannot be read, in a sentence.
    """

    name: str
    folder: Path
    kind: str = ""
    stated: str = ""
    asked: int = 0
    model: str = ""
    started: str = ""
    rows: int | None = None
    error: str = ""

    @property
    def status(self) -> str:
        """The stated one, but that no run is done with fewer lines than samples."""
        lacks = self.rows is not None and self.rows < self.asked
        return "incomplete" if self.stated == "done" and lacks else self.stated


@dataclass(frozen=True)
class Place:
    """Where a run lies, and the stamp of its manifest."""

    folder: Path
    stamp: Stamp


@dataclass(frozen=True)
class Places:
    """Where all runs lie.

    Attributes:
        by_name: Those that an address can name.
        nameless: Names of folders that are no text, as well as they can be written.
        complete: Whether everything was looked at, rather than the first :data:`MOST_NAMES` names.
    """

    by_name: Mapping[str, Place]
    nameless: Sequence[str] = ()
    complete: bool = True


def find(folder: Path) -> Places:
    """The runs at or below a folder; where there is too much to look at, those that lie high.

    Names that begin with a dot and links to folders are passed over, and what lies inside a run is its own.
    """
    root = str(folder.resolve())
    if (place := _place(root)) is not None:  # a run that is viewed by itself is called by its folder's name
        return _places([(os.path.basename(root), place)], complete=True)
    runs: list[tuple[str, Place]] = []
    level, budget = [""], MOST_NAMES
    for _ in range(DEPTH):
        below: list[str] = []
        for parent in level:
            if budget > 0:
                names, count = _folders(root, parent, budget)
                budget -= count
                below += names
        level = []
        for name in below:
            if (place := _place(f"{root}/{name}")) is None:
                level.append(name)
            else:
                runs.append((name, place))
    return _places(runs, complete=budget > 0)


def _place(folder: str) -> Place | None:
    """Where a run lies; None: there is none in the folder."""
    now = stamp(f"{folder}/run.json")
    return None if now is None or not now.regular else Place(Path(folder), now)


def _folders(root: str, parent: str, budget: int) -> tuple[list[str], int]:
    """Folders in a folder, named from the root, and how many names were looked at. None of a folder that is not ours to read."""
    try:
        with os.scandir(f"{root}/{parent}") as inside:
            looks = list(islice(inside, budget))
        names = [one.name for one in looks if not one.name.startswith(".") and one.is_dir(follow_symlinks=False)]
    except OSError:
        return [], 0
    return [f"{parent}/{name}" if parent else name for name in names], len(looks)


def _places(runs: Sequence[tuple[str, Place]], *, complete: bool) -> Places:
    by_name = {name: place for name, place in sorted(runs, key=lambda run: run[0]) if _is_text(name)}
    nameless = [os.fsencode(name).decode(errors="replace") for name, _ in runs if not _is_text(name)]
    return Places(by_name, sorted(nameless), complete)


def _is_text(name: str) -> bool:
    """Whether an address can carry the name."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return bool(name)


def read_entry(name: str, folder: Path) -> Entry:
    """A run as its manifest describes it, rows not counted; or why there is none."""
    try:
        manifest = Run(folder).manifest
    except MnemoscopeError as e:
        return Entry(name, folder, error=short(str(e), LONGEST_SENTENCE))
    model = manifest.target.get("name") or manifest.config.get("model")
    return Entry(
        name, folder, manifest.kind, manifest.status, manifest.asked,
        model=short(model, LONGEST) if isinstance(model, str) else "",
        started=short(manifest.started, LONGEST),
    )  # fmt: skip
