"""Opening files that a document or a folder of somebody else names. No torch.

A folder that was received is data. What it names must lie inside of it, and must be a regular file: opening a pipe would wait for
ever, and reading a device has effects. Everything that refuses does so with an :class:`OSError`, whose ``strerror`` is a reason in words.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, TextIO

__all__ = [
    "file_inside",
    "files_below",
    "folder_name",
    "hash_file",
    "is_file_inside",
    "kept_name",
    "leads_out",
    "open_inside",
    "open_regular",
    "open_to_append",
    "read_inside",
    "read_regular",
    "spelled",
]

_NOT_KEPT = re.compile(r"[\\\ud800-\udfff]")

_WITHOUT_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; links are followed. Nothing else is ever waited for.

    Raises:
        OSError: there is none, it may not be read, or it is a folder, a pipe, a socket or a device.
    """
    number = os.open(path, os.O_RDONLY | _WITHOUT_WAITING)
    try:
        kind = os.fstat(number).st_mode
        if not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "it is a folder" if stat.S_ISDIR(kind) else "it is no regular file", str(path))
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def read_regular(path: str | Path, limit: int | None = None) -> bytes:
    """The bytes of a regular file.

    Args:
        path: Its path; links are followed.
        limit: Bytes that it may have; None: as many as it has.

    Raises:
        OSError: as for :func:`open_regular`, or it is larger than ``limit``; nothing of it has been read then.
    """
    with open_regular(path) as file:
        if limit is None:
            return file.read()
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, and the limit is {limit:,}", str(path))
        return file.read(limit)


def open_to_append(path: str | Path) -> TextIO:
    """Open a file for lines of UTF-8 that are added to it; it is made where it is not there. A device or a pipe takes them too.

    Raises:
        OSError: it cannot be written, or it is a pipe that nobody reads: opening it would wait for a reader.
    """
    number = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _WITHOUT_WAITING, 0o666)
    if hasattr(os, "O_NONBLOCK"):
        os.set_blocking(number, True)
    return os.fdopen(number, "a", encoding="utf-8")


def spelled(path: str | Path) -> str:
    r"""A path as a record keeps it: bytes that are no UTF-8 become ``\xNN``."""
    return _bytes(os.fspath(path)).decode("utf-8", "backslashreplace")


def folder_name(folder: str | Path) -> str:
    """The name of a folder, whatever path leads there, as :func:`kept_name` has it."""
    return kept_name(Path(folder).resolve().name)


def kept_name(name: str) -> str:
    r"""The name of a file or folder as records and reports keep it: every system can have one that is called so.

    Bytes that are no UTF-8, and backslashes, which separate folders on Windows, become ``_``.
    """
    return _NOT_KEPT.sub("_", name)


def _bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a character that stands for no byte
        return text.encode("utf-8", "backslashreplace")


def leads_out(folder: str | Path, path: str | Path) -> bool:
    """Whether a path, once its links are followed, lies outside of a folder. A link that leads to itself lies nowhere."""
    try:
        return not Path(path).resolve().is_relative_to(Path(folder).resolve())
    except (OSError, RuntimeError):  # before Python 3.13, links that lead in circles are a RuntimeError
        return True


def file_inside(folder: str | Path, name: str) -> Path:
    """The regular file that a document in ``folder`` names; links are followed as long as they stay inside.

    Raises:
        OSError: the name is no path of a file inside the folder.
    """
    try:
        path = (Path(folder) / name).resolve()
        if leads_out(folder, path):
            raise OSError(errno.EPERM, "it leads out of its folder", name)
        kind = path.stat().st_mode
    except (ValueError, RuntimeError) as e:  # a zero byte; a link that leads to itself, before Python 3.13
        raise OSError(errno.EINVAL, str(e), name) from None
    if not stat.S_ISREG(kind):
        raise OSError(errno.EINVAL, "it is no regular file", name)
    return path


def is_file_inside(folder: str | Path, name: str) -> bool:
    """Whether there is a regular file of that name in a folder, which no link leads out of."""
    try:
        file_inside(folder, name)
    except OSError:
        return False
    return True


def open_inside(folder: str | Path, name: str) -> BinaryIO:
    """Open for reading the file that a document in ``folder`` names.

    Raises:
        OSError: as for :func:`file_inside` and :func:`open_regular`.
    """
    return open_regular(file_inside(folder, name))


def read_inside(folder: str | Path, name: str, limit: int | None = None) -> bytes:
    """The bytes of the file that a document in ``folder`` names.

    Raises:
        OSError: as for :func:`file_inside` and :func:`read_regular`.
    """
    return read_regular(file_inside(folder, name), limit)


def files_below(folder: str | Path, name: str) -> Iterator[tuple[str, Path]]:
    """Every file below a folder that lies in ``folder``: its path relative to ``folder``, and the file itself, for copying.

    Args:
        folder: What nothing may lead out of.
        name: A folder in it. Links to folders are not followed.

    Raises:
        OSError: something below it leads out, is a link to a folder, or is no regular file; ``filename`` is its relative path.
    """
    for place, folders, names in os.walk(Path(folder) / name):
        links = [one for one in folders if (Path(place) / one).is_symlink()]
        for one in sorted([*names, *links]):
            relative = (Path(place) / one).relative_to(folder).as_posix()
            yield relative, file_inside(folder, relative)


def hash_file(path: Path) -> str:
    """SHA-256 of a regular file, in hexadecimal digits. Read once per process as long as the file stands still.

    Raises:
        OSError: as for :func:`open_regular`.
    """
    return _hash_file(path.resolve(), stamp_of(path))


def stamp_of(path: Path) -> tuple[int, ...]:
    """Device, inode, size, and the times of the last change of content and of status: another one means another file or content.

    Raises:
        OSError: there is no such file.
    """
    facts = path.stat()
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


@lru_cache(maxsize=1024)
def _hash_file(path: Path, stamp: tuple[int, ...]) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
