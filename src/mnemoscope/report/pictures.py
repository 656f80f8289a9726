"""Pictures for the page: small WebP copies as data URIs, and a reason where there is none."""

from __future__ import annotations

import base64
import io
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..records.files import file_inside, leads_out, read_regular
from ..records.schema import Nearest
from ..similarity.decoding import COLLECTED, KEPT, Limits, decode
from .findings import Shot
from .once import Once

SIDE = 256
"""Longest side of a thumbnail, in pixels: twice what the page shows, for dense screens."""

EXTENSIONS = ("", ".webp", ".png", ".jpg", ".jpeg")

REMEMBERED = 1 << 25
"""Characters of thumbnails that stay in memory; those that nobody asked for longest go first."""

DECODERS = threading.BoundedSemaphore(4)
"""Pictures that are decoded at a time, so that many visitors take no more memory than four. Their files are read before and are of
bounded size, so nobody waits here for a disk, or without end."""


@dataclass(frozen=True)
class Picture:
    """A thumbnail, or why there is none."""

    uri: str | None
    why: str = ""

    @property
    def size(self) -> int:
        """Characters that it takes."""
        return len(self.uri or "") + len(self.why)


class _Stamp(NamedTuple):
    """A thumbnail of a file as the file is now."""

    path: str
    inode: int
    size: int
    changed: int
    side: int
    limits: Limits


class Thumbnails:
    """Thumbnails of files, each made once as long as its file stays as it is. Safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[_Stamp, Picture] = OrderedDict()
        self._size = 0
        self._once: Once[Picture] = Once()

    def of(self, path: Path, side: int, limits: Limits) -> Picture:
        """A file as a WebP data URI.

        Args:
            path: The file.
            side: The most pixels of the longest side; a smaller picture is not enlarged.
            limits: What is taken for a picture.

        Returns:
            The picture, transparency on white, metadata left behind; or the reason why there is none. Nothing is raised.
        """
        try:
            facts = path.stat()
            stamp = _Stamp(str(path), facts.st_ino, facts.st_size, facts.st_mtime_ns, side, limits)
            return self._known(stamp) or self._once.do(stamp, lambda: self._make(stamp, path))
        except (OSError, ValueError) as e:
            return _unopened(e)

    def _known(self, stamp: _Stamp) -> Picture | None:
        with self._lock:
            if stamp in self._kept:
                self._kept.move_to_end(stamp)
            return self._kept.get(stamp)

    def _make(self, stamp: _Stamp, path: Path) -> Picture:
        if known := self._known(stamp):  # another thread ended between our look and our turn
            return known
        picture = _small(read_regular(path, stamp.limits.bytes), stamp.side, stamp.limits)
        with self._lock:
            self._kept[stamp] = picture
            self._size += picture.size
            while self._size > REMEMBERED:
                _, oldest = self._kept.popitem(last=False)
                self._size -= oldest.size
        return picture


@dataclass(frozen=True)
class Pictures:
    """Finds the pictures of one run.

    Args:
        run: The run folder; pictures named in its rows are looked for inside it and nowhere else.
        references: Where reference pictures are, if the run did not keep them: a folder whose file names (with or without
            extension) are the reference ids, or a mapping from ids to files.
        thumbnails: Where thumbnails are kept.
    """

    run: Path
    references: Path | Mapping[str, Path] | None = None
    thumbnails: Thumbnails = field(default_factory=Thumbnails)

    def generated(self, shot: Shot, side: int = SIDE) -> Picture:
        """The picture of a sample."""
        if shot.image is None:
            return Picture(None, "image not kept")
        return self.kept(shot.image, side)

    def kept(self, name: str, side: int = 2 * SIDE) -> Picture:
        """A picture that the run folder holds beside its rows."""
        return self._inside(self.run, name, side, "the run folder", KEPT)

    def reference(self, nearest: Nearest, side: int = SIDE) -> Picture:
        """The reference picture of a match."""
        if nearest.file is not None:
            return self.kept(nearest.file, side)
        if self.references is None:
            return Picture(None, "reference image not kept")
        if isinstance(self.references, Path):
            name = _with_extension(self.references, nearest.reference)
            return self._inside(self.references, name, side, "the reference folder", COLLECTED)
        path = self.references.get(nearest.reference)
        return self.thumbnails.of(path, side, COLLECTED) if path else Picture(None, "reference image not given")

    def _inside(self, folder: Path, name: str, side: int, where: str, limits: Limits) -> Picture:
        """A picture below ``folder``; a name that leads out of it comes from a damaged or hostile row and is not followed."""
        try:
            if leads_out(folder, folder / name):
                return Picture(None, f"image lies outside {where}")
            return self.thumbnails.of(file_inside(folder, name), side, limits)
        except (OSError, ValueError, RuntimeError) as e:
            return _unopened(e)


def _with_extension(folder: Path, name: str) -> str:
    """The name of a file of the folder: the one given, or that with an extension."""
    for extension in EXTENSIONS:
        try:
            file_inside(folder, name + extension)
        except OSError:
            continue
        return name + extension
    return name


def _unopened(error: Exception) -> Picture:
    """The reason where a file could not be opened."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return Picture(None, "image missing")
    if not isinstance(error, OSError):  # a zero byte in the name; a link that leads to itself
        return Picture(None, "image has an impossible name")
    return Picture(None, f"image unreadable: {error.strerror or error}")


def _small(data: bytes, side: int, limits: Limits) -> Picture:
    """The thumbnail of a file's bytes."""
    try:
        with DECODERS:
            read = decode(data, limits, side=side)
            return _webp(read.picture, side) if read.picture else Picture(None, f"image unreadable: {read.reason}")
    except Exception as e:  # whatever the picture is, the page that it stands on is shown
        return Picture(None, f"image unreadable: {type(e).__name__}")


def _webp(image: Image.Image, side: int) -> Picture:
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    clean = Image.new("RGB", image.size)
    clean.paste(image)  # pixels only: no EXIF, no color profile
    data = io.BytesIO()
    clean.save(data, "WEBP", quality=82, method=4)
    return Picture("data:image/webp;base64," + base64.b64encode(data.getvalue()).decode())
