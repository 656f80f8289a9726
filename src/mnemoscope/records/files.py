"""Opening files that a document or a folder of somebody else names. No torch.

A folder that was received is data. What it names must lie inside of it, and must be a regular file: opening a pipe would wait for
ever, and reading a device has effects. Everything that refuses does so with an :class:`OSError`, whose ``strerror`` is a reason in words.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

__all__ = ["file_inside", "leads_out", "open_regular", "read_inside", "read_regular"]

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


def leads_out(folder: str | Path, path: str | Path) -> bool:
    """Whether a path, once its links are followed, lies outside of a folder."""
    return not Path(path).resolve().is_relative_to(Path(folder).resolve())


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


def read_inside(folder: str | Path, name: str, limit: int | None = None) -> bytes:
    """The bytes of the file that a document in ``folder`` names.

    Raises:
        OSError: as for :func:`file_inside` and :func:`read_regular`.
    """
    return read_regular(file_inside(folder, name), limit)
