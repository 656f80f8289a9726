"""What tells that a file is another one than before, or was written to, without reading it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

__all__ = ["Stamp", "stamp"]


class Stamp(NamedTuple):
    """What the system says of a file. Times are in nanoseconds.

    Attributes:
        inode: Its number on its disk.
        size: In bytes.
        written: When it was written to last.
        changed: When anything about it changed last, such as who may read it.
        mode: Its kind, and who may do what.
    """

    inode: int
    size: int
    written: int
    changed: int
    mode: int

    @classmethod
    def of(cls, facts: os.stat_result) -> Stamp:
        """From what the system says."""
        return cls(facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_mode)

    @property
    def regular(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.mode)


def stamp(path: str | Path) -> Stamp | None:
    """The stamp of a file, links followed; None: there is none, or one may not know."""
    try:
        return Stamp.of(os.stat(path))
    except OSError:
        return None
