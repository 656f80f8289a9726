"""Places that a reader names: can what a command needs be there? Asked before anything else is done. No torch.

What is wrong with a place is said in one sentence. That nothing is there yet is left to whoever reads it, and knows what belongs there.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ..errors import UsageError
from .files import spelled

__all__ = [
    "Kind",
    "read_named",
    "require_name",
    "require_place_for_file",
    "require_place_for_folder",
    "require_place_for_lines",
    "require_readable",
    "require_utf8",
    "spelled",
]

Kind: TypeAlias = Literal["file", "folder", "file or folder"]
"""What a place is to be."""

LONGEST_NAME = 255
"""Bytes of a name where the file system does not say."""

MOST_NEW_FOLDERS = 100
"""Folders that are made for one place; each is made by a call within the call for the one below it."""

LONGEST_SHOWN = 80
"""Characters of a path in a sentence."""

_OPEN_ALREADY = re.compile(r"/dev/(stdin|null|fd/\d+)|/proc/(self|\d+)/fd/\d+")
"""Streams that the process was started with, as a shell hands them over (``<(command)``), and the device that holds nothing."""


def require_readable(path: str | Path, kind: Kind = "file or folder") -> None:
    """Refuse a place that cannot be read, or holds something else.

    A pipe or device is no file: opening it would wait, perhaps for ever. Streams that the process was started with are read.

    Args:
        path: The place, from the working directory.
        kind: What is read.

    Raises:
        UsageError: it is nowhere, closed to this user, or of another kind. Not: nothing is there.
    """
    require_name(path, kind)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as e:
        raise UsageError(f"{_shown(path)} cannot be read ({e.strerror or e}); name another {kind}.") from None
    is_folder = stat.S_ISDIR(mode)
    if is_folder and kind == "file":
        raise UsageError(f"{_shown(path)} is a folder; name a file.")
    if not is_folder and kind == "folder":
        raise UsageError(f"{_shown(path)} is no folder; name a folder.")
    if not is_folder and not stat.S_ISREG(mode) and not _OPEN_ALREADY.fullmatch(os.fspath(path)):
        raise UsageError(f"{_shown(path)} is a pipe or a device; name another {kind}.")
    if not _may(path, os.X_OK if is_folder else os.R_OK):
        raise UsageError(f"{_shown(path)} cannot be read ({os.strerror(errno.EACCES)}); name another {kind}.")


def read_named(path: str | Path, limit: int) -> bytes:
    """The bytes of a file that a reader names, or of a stream that the process was started with.

    Raises:
        UsageError: as for :func:`require_readable`.
        OSError: there is none, or it has more bytes than ``limit``; no more than that are read.
    """
    require_readable(path, "file")
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", os.fspath(path))
    return data


def require_place_for_folder(path: str | Path) -> None:
    """Refuse a place where no folder can be, or none that may be written to.

    Raises:
        UsageError: something else is there or above, this user may not write there, or a name is too long.
    """
    require_name(path, "folder")
    _require_folder_to_write(_nearest(Path(path), "folder"), path, "folder")


def require_place_for_file(path: str | Path) -> None:
    """Refuse a place where no file can be put in the place of what is there.

    Raises:
        UsageError: a folder, pipe or device is there, something else than a folder is above, this user may not write there, or a name is
            too long.
    """
    require_name(path, "file")
    # The file is written under a longer name first, see records.store.whole.
    there = _nearest(Path(path), "file", spare=len(f"..{os.getpid()}"))
    if os.path.isdir(path):
        raise UsageError(f"{_shown(path)} is a folder; name a file.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"{_shown(path)} is a pipe or a device; name a file.")
    _require_folder_to_write(there if there != Path(path) else Path(path).parent, path, "file")


def require_place_for_lines(path: str | Path) -> None:
    """Refuse a place where no lines can be appended. Pipes and devices take them.

    Raises:
        UsageError: a folder is there, something else than a folder is above, this user may not write there, or a name is too long.
    """
    require_name(path, "file")
    there = _nearest(Path(path), "file")
    if os.path.isdir(path):
        raise UsageError(f"{_shown(path)} is a folder; name a file.")
    if there != Path(path):
        _require_folder_to_write(there, path, "file")
    elif not _may(path, os.W_OK):
        raise UsageError(f"{_shown(path)} cannot be written ({os.strerror(errno.EACCES)}); name another file.")


def require_name(path: str | Path, kind: Kind = "file or folder") -> None:
    """Refuse what names no place.

    Raises:
        UsageError: it is empty, or has a zero byte.
    """
    text = os.fspath(path)
    if not text:
        raise UsageError(f"an empty name is no place; name a {kind}, or . for the working directory.")
    if "\0" in text:
        raise UsageError(f"{_shown(path)} has a zero byte; name a {kind}.")


def require_utf8(value: Any, what: str) -> None:
    """Refuse text that no record could keep: what comes from the command line is bytes on some systems, and may be no UTF-8.

    Args:
        value: A text, a path, or lists and mappings of them; anything else passes.
        what: How it is called, for the sentence.

    Raises:
        UsageError: naming the text.
    """
    if isinstance(value, Mapping):
        for part in value.values():
            require_utf8(part, what)
    elif isinstance(value, list | tuple):
        for part in value:
            require_utf8(part, what)
    elif isinstance(value, str | Path):
        try:
            os.fspath(value).encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{what} is {_shown(spelled(value))}, whose bytes are no UTF-8, so no record could keep it; rename the file, or write "
                f"the text in UTF-8."
            ) from None


def _nearest(path: Path, kind: Kind, spare: int = 0) -> Path:
    """``path``, or the nearest place above it where something is.

    Args:
        path: Where something is to be written.
        kind: What.
        spare: Bytes that must be left of the longest name.
    """
    missing: list[str] = []
    there = path
    while not _is_there(there, path, kind):
        missing.append(there.name)
        if there == there.parent:  # a working directory that was deleted
            break
        there = there.parent
    if len(missing) > MOST_NEW_FOLDERS:
        raise UsageError(
            f"{_shown(path)} cannot be written ({len(missing):,} folders would have to be made for it, and at most "
            f"{MOST_NEW_FOLDERS} are); choose a shorter path."
        )
    longest = _longest_name(there)
    names = [*missing, path.name] if spare else missing
    if any(len(os.fsencode(name)) + (spare if name == path.name else 0) > longest for name in names):
        raise UsageError(
            f"{_shown(path)} cannot be written (a name in it has more than {longest - spare} bytes); choose a shorter one."
        )
    return there


def _is_there(place: Path, path: Path, kind: Kind) -> bool:
    try:
        os.stat(place)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(place):
            raise UsageError(f"{_shown(place)} is a link to nothing; name another {kind}.") from None
        return False
    except OSError as e:
        raise UsageError(f"{_shown(path)} cannot be written ({e.strerror or e}); name another {kind}.") from None
    return True


def _require_folder_to_write(folder: Path, path: str | Path, kind: Kind) -> None:
    if not os.path.isdir(folder):
        raise UsageError(
            f"{_shown(path)} cannot be written, because {_shown(folder)} is no folder; name another {kind}."
        )
    if not _may(folder, os.W_OK | os.X_OK):
        raise UsageError(
            f"{_shown(path)} cannot be written ({os.strerror(errno.EACCES)}); choose a {kind} you may write to."
        )


def _longest_name(folder: Path) -> int:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # no such question on this system, or no answer
        return LONGEST_NAME


def _may(path: str | Path, how: int) -> bool:
    return os.access(path, how, effective_ids=os.access in os.supports_effective_ids)


def _shown(path: str | Path) -> str:
    """A path as sentences have it: of a long one its end, which tells it from others."""
    text = os.fspath(path)
    return text if len(text) <= LONGEST_SHOWN else f"…{text[-LONGEST_SHOWN + 1 :]}"
