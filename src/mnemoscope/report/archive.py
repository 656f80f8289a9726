"""A zip archive as evidence: the same contents give the same bytes, every file has its sum, and nothing in it is trusted.

``SHA256SUMS`` holds one line for each other file, as ``sha256sum`` writes them; its own SHA-256 is the digest of the whole. What is
read was made by somebody else: names that lead out of a folder, names that come twice, and archives that unpack to far more
than they are, are never unpacked.
"""

from __future__ import annotations

import hashlib
import re
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..errors import RunError
from ..records.files import open_inside, open_regular
from .container import find_faults, read_ending

__all__ = [
    "SUMS",
    "Archive",
    "add",
    "parse_sums",
    "pieces_of",
    "plain",
    "same_name",
    "sha256_file",
    "sha256_of",
    "write_sums",
]

SUMS = "SHA256SUMS"
"""The file that lists all others; the SHA-256 of this one is the digest of the archive."""

EPOCH = (1980, 1, 1, 0, 0, 0)
"""The date of every file, the first that zip has: when an archive was made must not change its bytes."""

PIECE = 1 << 20
"""Bytes that are in memory at once."""

MB = 1 << 20

SAMPLES = "samples.jsonl"
"""The file that others grow with."""

LARGEST = {SAMPLES: 8192 * MB, "run.json": 16 * MB, "README.txt": MB}
GROWING = {
    SUMS: 16 * MB,
    "packet.json": 16 * MB,
    "splits.json": 16 * MB,
    "roc.json": 16 * MB,
    "controls.json": 16 * MB,
    "report.html": 64 * MB,
}
LARGEST_OF_KIND = {".json": 16 * MB, ".jsonl": 16 * MB, ".html": 64 * MB, ".safetensors": 256 * MB}
LARGEST_PICTURE = 64 * MB
"""The most bytes of a file: by its name; by its name, and as many more as the rows have; by its ending; of all others."""

LARGEST_LISTING = 128 * MB
"""The most bytes of an archive's list of files."""

ALWAYS, RATIO = 1 << 30, 100
"""An archive may unpack to 1 GiB, and to more where that is not more than so many times its own size."""

ALWAYS_OF_ONE = 16 * MB
"""The same for a single file of it."""

LONGEST = 1 << 24
"""The most bytes of one line."""

COMPRESSED = (".webp", ".png", ".jpg", ".jpeg")
"""Endings of files that compression makes no smaller."""

UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    RuntimeError,
    NotImplementedError,
)
"""What :mod:`zipfile` raises at archives that are damaged, encrypted, or made to harm."""


DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|clock\$|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE)
"""Names that are devices on Windows, whatever follows their first dot."""


def plain(name: str) -> bool:
    """Whether a name is a relative path that means the same on every system and stays inside its folder."""
    forbidden = re.search(r'[\\:*?"<>|]', name) or not name.isprintable() or len(name.encode(errors="replace")) > 255
    return not forbidden and all(_plain_part(part) for part in name.split("/"))


def _plain_part(part: str) -> bool:
    # Windows leaves out dots and spaces at the end of a name.
    return part != "" and part == part.rstrip(". ") and part.strip(" ") != "" and not DEVICES.fullmatch(part)


def same_name(name: str) -> str:
    """What two names share that are one file on some systems: those that differ in case, or in how an accent is written."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def pieces_of(path: Path) -> Iterator[bytes]:
    """What a file of a folder holds, in pieces; raises RunError where it cannot be read, or is a link that leads out of the folder."""
    try:
        with open_inside(path.parent, path.name) as file:
            while piece := file.read(PIECE):
                yield piece
    except OSError as e:
        raise RunError(f"{path} cannot be read ({e.strerror or e}); restore it, or ask for the right to.") from e


def sha256_of(data: Iterable[bytes]) -> str:
    """SHA-256 of the pieces together, in hexadecimal digits."""
    found = hashlib.sha256()
    for piece in data:
        found.update(piece)
    return found.hexdigest()


def sha256_file(path: Path) -> str:
    """Of a file on disk as it is now, read in pieces."""
    return sha256_of(pieces_of(path))


# Writing ------------------------------------------------------------------------------------------------------------------


def add(archive: zipfile.ZipFile, name: str, data: Iterable[bytes], *, size: int = 0) -> None:
    """Add a file.

    Args:
        archive: Open for writing.
        name: Its path, see :func:`plain`.
        data: Its contents, in pieces.
        size: About how many bytes that will be; matters beyond 2 GB.
    """
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.create_system, entry.external_attr = 3, 0o644 << 16  # the same on every system
    entry.compress_type = zipfile.ZIP_STORED if name.endswith(COMPRESSED) else zipfile.ZIP_DEFLATED
    with archive.open(entry, "w", force_zip64=size > 1 << 30) as out:
        for piece in data:
            out.write(piece)


def write_sums(sums: Mapping[str, str]) -> bytes:
    """``SHA256SUMS``, from SHA-256 by name."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()


def parse_sums(data: bytes) -> dict[str, str]:
    """SHA-256 by name.

    Raises:
        RunError: a line is something else.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(data.decode(errors="replace").removesuffix("\n").split("\n"), 1):
        parts = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if parts is None or parts[2] in found:
            raise RunError(f"line {number} of {SUMS} is damaged; get the packet again from whoever made it.")
        found[parts[2]] = parts[1]
    return found


# Reading ------------------------------------------------------------------------------------------------------------------


class Archive:
    """An archive, opened for reading; a context manager.

    Args:
        path: The file.

    Attributes:
        faults: What is wrong with it and its list of files, in sentences; such files are left out of ``names``.
        names: Its files, by name.

    Raises:
        RunError: it is no zip archive, cannot be read, or unpacks to far more than it is.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.faults: list[str] = []
        self.names: dict[str, zipfile.ZipInfo] = {}
        self._sums: dict[str, str] = {}
        try:
            self._bytes = open_regular(self.path)
        except FileNotFoundError:
            raise RunError(f"{self.path} does not exist; name a packet that `mnemoscope pack RUN` wrote.") from None
        except OSError as e:
            raise self._no_archive(e.strerror or str(e)) from e
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._bytes.close()

    def _open(self) -> None:
        """Read the list of files, and judge it."""
        try:
            ending = read_ending(self._bytes)
            if ending is None:
                raise zipfile.BadZipFile("it has no list of files")
            if ending.size > LARGEST_LISTING:
                raise RunError(f"{self.path} has a list of files of {ending.size:,} bytes; it is not read.")
            self._file = zipfile.ZipFile(self._bytes)
            self._refuse_bombs()
            structure = list(find_faults(self._bytes, self._file.infolist(), ending))
        except UNREADABLE as e:
            raise self._no_archive(str(e)) from e
        self.faults += [fault for fault, _ in structure]
        self._take_names({name for _, name in structure if name is not None})

    def _no_archive(self, why: str) -> RunError:
        return RunError(f"{self.path} is no whole zip archive ({why}); get the packet again.")

    def _take_names(self, spoilt: set[str]) -> None:
        """Keep the files that can be read safely under a name of their own; the faults say which cannot."""
        taken: dict[str, str] = {}
        for entry in self._file.infolist():
            # Other programs list folders too.
            folder = entry.is_dir() and not entry.file_size and plain(entry.filename[:-1])
            fault = None if folder else self._fault(entry, taken)
            if fault is not None:
                self.faults.append(fault)
            elif not folder and entry.filename not in spoilt:
                self.names[entry.filename] = entry
        folders = {same_name(parent) for entry in self._file.infolist() for parent in _parents(entry.filename)}
        for key in sorted(folders & taken.keys()):
            self.faults.append(f"{taken[key]} is there as a file and as a folder")
            self.names.pop(taken[key], None)

    def pieces(self, name: str) -> Iterator[bytes]:
        """A file's contents; never more bytes than the archive says it has.

        Raises:
            RunError: there is no such file, or it is damaged.
        """
        if name not in self.names:
            raise RunError(f"{self.path} holds no {name}; get the packet again from whoever made it.")
        if (size := self.names[name].file_size) > (limit := self._limit(name)):
            raise RunError(f"{name} has {size:,} bytes, and the limit is {limit:,}; it is not read.")
        try:
            with self._file.open(self.names[name]) as file:
                while piece := file.read(PIECE):
                    yield piece
        except UNREADABLE as e:
            raise RunError(f"{name} cannot be read ({e}); get the packet again from whoever made it.") from e

    def lines(self, name: str) -> Iterator[bytes]:
        """A file's lines with their breaks; errors as :meth:`pieces`, and for one longer than any of ours."""
        rest = b""
        for piece in self.pieces(name):
            *lines, rest = (rest + piece).split(b"\n")
            yield from (line + b"\n" for line in lines)
            if len(rest) > LONGEST:
                raise RunError(f"{name} has a line of more than {LONGEST} bytes; it is not read.")
        if rest:
            yield rest

    def read(self, name: str) -> bytes:
        """All of a file; errors as :meth:`pieces`."""
        return b"".join(self.pieces(name))

    def sha256(self, name: str) -> str:
        """SHA-256 of a file, computed once; errors as :meth:`pieces`."""
        if name not in self._sums:
            self._sums[name] = sha256_of(self.pieces(name))
        return self._sums[name]

    def _limit(self, name: str) -> int:
        """The most bytes that a file of this name may have."""
        if name in GROWING:
            rows = self.names.get(SAMPLES)
            return GROWING[name] + (0 if rows is None else rows.file_size)
        return LARGEST.get(name) or LARGEST_OF_KIND.get(Path(name).suffix, LARGEST_PICTURE)

    def _refuse_bombs(self) -> None:
        entries, size = self._file.infolist(), self.path.stat().st_size
        unpacked, packed = sum(e.file_size for e in entries), sum(e.compress_size for e in entries)
        if unpacked > max(ALWAYS, RATIO * size) or packed > size:
            raise RunError(f"{self.path} has {size} bytes and claims to hold {unpacked}; it is not unpacked.")
        for entry in entries:
            if entry.file_size > max(ALWAYS_OF_ONE, RATIO * entry.compress_size):
                raise RunError(
                    f"{self.path} holds {entry.compress_size} bytes that claim to be {entry.file_size} ({entry.filename!a}); "
                    f"it is not unpacked."
                )

    def _fault(self, entry: zipfile.ZipInfo, taken: dict[str, str]) -> str | None:
        name, key = entry.filename, same_name(entry.filename)
        if not plain(name) or name != entry.orig_filename:
            return f"the name {name!a} leads out of a folder, or is none that every system allows"
        if key in taken:
            return f"{name} is there twice"
        taken[key] = name
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            return f"{name} is compressed in another way than packets are"
        return None


def _parents(name: str) -> list[str]:
    """The folders that a file or a folder lies in; of ``a/b/c`` they are ``a/b`` and ``a``."""
    parts = name.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]
