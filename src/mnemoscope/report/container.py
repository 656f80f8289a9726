"""A zip archive byte by byte: it holds its files and nothing else, and says the same of each file in both places that describe it.

A zip archive describes every file twice, in front of its bytes and in a list at its end, and programs differ in which of the two they
believe. Bytes that neither describes are seen by nobody who unpacks it. So a packet has no such bytes, and no two descriptions.
"""

from __future__ import annotations

import os
import stat
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

__all__ = ["Ending", "find_faults", "read_ending"]

END = struct.Struct("<4s4H2LH")
END_64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR_64 = struct.Struct("<4sLQL")
HEADER = struct.Struct("<4s5H3L2H")
"""The end of the list of files, the same for large archives with the record that leads to it, and what stands before a file's bytes."""

LONGEST_COMMENT = (1 << 16) - 1
ELSEWHERE = 0xFFFFFFFF
"""A size that stands in an extra field, because it takes more than four bytes."""

ENCRYPTED = 0x1 | 0x40 | 0x2000
DESCRIBED_AFTER = 0x8
UTF_8 = 0x800
"""Flags of a file: it is encrypted, its sizes stand behind it, its name is UTF-8."""

LARGE, SECOND_NAME = 0x0001, 0x7075
"""Extra fields: sizes of more than four bytes, and another name."""


@dataclass(frozen=True)
class Ending:
    """Where the list of files stands.

    Attributes:
        start: Offset of the list, as the archive says it.
        size: Bytes that it has.
        end: Offset of what comes after it.
        fault: What is wrong with the end of the archive, in words; None: nothing.
    """

    start: int
    size: int
    end: int
    fault: str | None


def read_ending(file: BinaryIO) -> Ending | None:
    """The end of an archive; None: there is none, so the file is no whole archive."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - END.size - LONGEST_COMMENT))
    tail = file.read(END.size + LONGEST_COMMENT)
    place = tail.rfind(b"PK\x05\x06")
    if tail[-END.size :].startswith(b"PK\x05\x06"):
        place = len(tail) - END.size
    if place < 0 or place + END.size > len(tail):
        return None
    _, *disks, _, _, length, start, comment = END.unpack_from(tail, place)
    at = size - len(tail) + place
    fault = None
    if place + END.size != len(tail):
        fault = "it has a comment" if comment == len(tail) - place - END.size else "there are bytes after its end"
    elif comment or any(disks):
        fault = "its end is none that a packet has"
    return _large_ending(file, at, fault) or Ending(start, length, at, fault)


def _large_ending(file: BinaryIO, at: int, fault: str | None) -> Ending | None:
    """The end of an archive with more files or bytes than fit in the ordinary end, which follows it; None: it has no such end."""
    before = at - LOCATOR_64.size - END_64.size
    if before < 0:
        return None
    file.seek(before)
    signature, *_, size, start = END_64.unpack(file.read(END_64.size))
    mark, _, place, _ = LOCATOR_64.unpack(file.read(LOCATOR_64.size))
    if mark != b"PK\x06\x07":
        return None
    if signature != b"PK\x06\x06" or place != before:
        fault = fault or "its end is none that a packet has"
    return Ending(start, size, before, fault)


def find_faults(file: BinaryIO, entries: Sequence[zipfile.ZipInfo], ending: Ending) -> Iterator[tuple[str, str | None]]:
    """What is wrong with an archive beside the names and the contents of its files.

    Args:
        file: The archive, open for reading.
        entries: Its files, as its list describes them.
        ending: Its end.

    Yields:
        A sentence, and the name of the file that it is about; None: the archive as a whole.
    """
    if ending.fault is not None:
        yield f"{ending.fault}, which nobody sees who unpacks it", None
    for entry in entries:
        if fault := _described_fault(entry):
            yield f"{entry.filename} {fault}", entry.filename
    if ending.start + ending.size != ending.end:
        yield (
            "there are bytes before its first file or beside its list of files, which nobody sees who unpacks it",
            None,
        )
        return
    place = 0
    for entry in sorted(entries, key=lambda e: e.header_offset):
        if entry.header_offset < place:
            yield f"{entry.filename} lies over another file", entry.filename
            return
        if entry.header_offset > place:
            yield f"there are bytes before {entry.filename} that belong to no file", None
        end, fault = _read_header(file, entry)
        if fault is not None:
            yield f"{entry.filename} is described in two ways ({fault})", entry.filename
        place = end
    if place != ending.start:
        yield "there are bytes before its list of files that belong to no file, or files lie over it", None


def _described_fault(entry: zipfile.ZipInfo) -> str | None:
    """What a packet has no file like, by the list of files alone."""
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind == stat.S_IFLNK:
        return "is a link"
    if kind not in (0, stat.S_IFDIR if entry.is_dir() else stat.S_IFREG):
        return "is no regular file"
    if entry.flag_bits & ENCRYPTED:
        return "is encrypted"
    if entry.comment:
        return "has a comment, which nobody sees who unpacks it"
    if SECOND_NAME in dict(_extra_fields(entry.extra)):
        return "has a second name"
    return None


def _read_header(file: BinaryIO, entry: zipfile.ZipInfo) -> tuple[int, str | None]:
    """Where a file ends by what stands before its bytes, and how that differs from the list of files; None: it does not."""
    file.seek(entry.header_offset)
    raw = file.read(HEADER.size)
    if len(raw) < HEADER.size:
        return entry.header_offset, "it lies beyond the end"
    signature, _, flags, method, _, _, crc, packed, size, name_length, extra_length = HEADER.unpack(raw)
    name, extra = file.read(name_length), file.read(extra_length)
    bytes_start = entry.header_offset + HEADER.size + name_length + extra_length
    if signature != b"PK\x03\x04":
        return bytes_start, "no file begins there"
    if name != entry.orig_filename.encode("utf-8" if entry.flag_bits & UTF_8 else "cp437", errors="replace"):
        return bytes_start, "another name"
    checked = ENCRYPTED | DESCRIBED_AFTER | UTF_8
    if (
        method != entry.compress_type
        or (flags ^ entry.flag_bits) & checked
        or SECOND_NAME in dict(_extra_fields(extra))
    ):
        return bytes_start, "another kind"
    end = bytes_start + entry.compress_size
    if flags & DESCRIBED_AFTER:
        length = _descriptor_length(file, entry, end)
        return end + length, None if length else "other sizes"
    described = (crc, *_real_sizes(extra, size, packed))
    return end, None if described == (entry.CRC, entry.file_size, entry.compress_size) else "other sizes"


def _real_sizes(extra: bytes, size: int, packed: int) -> tuple[int, int]:
    """Sizes of a file, unpacked and packed; those of large files stand in an extra field."""
    field = dict(_extra_fields(extra)).get(LARGE, b"")
    large = list(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
    if size == ELSEWHERE and large:
        size = large.pop(0)
    if packed == ELSEWHERE and large:
        packed = large.pop(0)
    return size, packed


def _extra_fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    while len(extra) >= 4:
        kind, length = struct.unpack("<2H", extra[:4])
        yield kind, extra[4 : 4 + length]
        extra = extra[4 + length :]


def _descriptor_length(file: BinaryIO, entry: zipfile.ZipInfo, place: int) -> int:
    """Bytes behind a file that repeat its sizes, with or without a mark before them; 0: they say something else."""
    file.seek(place)
    after = file.read(24)
    for sizes in ("2L", "2Q"):
        described = (
            struct.pack(f"<L{sizes}", entry.CRC, entry.compress_size, entry.file_size) if _fits(entry, sizes) else None
        )
        for mark in (b"PK\x07\x08", b""):
            if described is not None and after.startswith(mark + described):
                return len(mark + described)
    return 0


def _fits(entry: zipfile.ZipInfo, sizes: str) -> bool:
    return sizes == "2Q" or max(entry.compress_size, entry.file_size) <= ELSEWHERE
