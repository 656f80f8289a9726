"""Whether a packet's files are those of the folders that it was made of, by the sums that it states of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..records.store import ROWS
from .archive import Archive

__all__ = ["holds_rows_of", "row_sums"]


def row_sums(part: Mapping[str, Any]) -> Iterator[str]:
    """SHA-256 of the files of rows of one folder, in the order in which they are read."""
    numbers = {name: match for name in part["files"] if (match := ROWS.fullmatch(name))}
    for name in sorted(numbers, key=lambda n: int(numbers[n][1] or -1)):
        yield part["files"][name]


def holds_rows_of(archive: Archive, parts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether ``samples.jsonl`` is nothing but the files of rows of these folders, one after another.

    It is not where lines of them were not packed: torn ones, and attempts at a sample that was done again.
    """
    sums = [sum for part in parts for sum in row_sums(part)]
    empty = hashlib.sha256().hexdigest()
    waiting = [sum for sum in sums if sum != empty]
    piece, complete = hashlib.sha256(), True
    for line in archive.lines("samples.jsonl"):
        if not waiting:
            return False
        piece.update(line)
        complete = piece.hexdigest() == waiting[0]
        if complete:
            del waiting[0]
            piece = hashlib.sha256()
    return complete and not waiting
