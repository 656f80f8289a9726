"""Files and folders on the command line: parsers that refuse a place before the command begins, for ``parser=`` of an option."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import typer

from ..records import places
from ..records.places import spelled

__all__ = [
    "appended_file",
    "file",
    "file_or_folder",
    "folder",
    "later_folder",
    "spelled",
    "written_file",
    "written_folder",
]


def file(value: str | Path) -> Path:
    """A file that is read."""
    return _judged(value, lambda path: places.require_readable(path, "file"))


def folder(value: str | Path) -> Path:
    """A folder that is read."""
    return _judged(value, lambda path: places.require_readable(path, "folder"))


def file_or_folder(value: str | Path) -> Path:
    """What is read, and may be either."""
    return _judged(value, places.require_readable)


def written_file(value: str | Path) -> Path:
    """A file that is written."""
    return _judged(value, places.require_place_for_file)


def appended_file(value: str | Path) -> Path:
    """A file that lines are added to."""
    return _judged(value, places.require_place_for_lines)


def written_folder(value: str | Path) -> Path:
    """A folder that is written to, also where it is the default."""
    return _judged(value, places.require_place_for_folder)


def later_folder(value: str | Path) -> Path:
    """A folder that some uses of the command write to: the default, which nobody named, is judged when they do."""
    return value if isinstance(value, Path) else written_folder(value)


def _judged(value: str | Path, judge: Callable[[Path], None]) -> Path:
    # Before it is a path: Path("") is the working directory.
    if not os.fspath(value):
        raise typer.BadParameter("it is empty; name a place, or . for the working directory.")
    path = Path(value)
    judge(path)
    return path
