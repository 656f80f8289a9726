"""Pictures for the page: small WebP copies as data URIs, and a reason where there is none."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from ..records.schema import Nearest
from .findings import Shot

SIDE = 256
"""Longest side of a thumbnail, in pixels: twice what the page shows, for dense screens."""

EXTENSIONS = ("", ".webp", ".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Picture:
    """A thumbnail, or why there is none."""

    uri: str | None
    why: str = ""


@dataclass(frozen=True)
class Pictures:
    """Finds the pictures of one run.

    Args:
        run: The run folder; pictures named in its rows are looked for inside it and nowhere else.
        references: Where reference pictures are, if the run did not keep them: a folder whose file names (with or without
            extension) are the reference ids, or a mapping from ids to files.
    """

    run: Path
    references: Path | Mapping[str, Path] | None = None

    def generated(self, shot: Shot, side: int = SIDE) -> Picture:
        """The picture of a sample."""
        if shot.image is None:
            return Picture(None, "image not kept")
        return _inside(self.run, shot.image, side, "the run folder")

    def kept(self, name: str, side: int = 2 * SIDE) -> Picture:
        """A picture that the run folder holds beside its rows."""
        return _inside(self.run, name, side, "the run folder")

    def reference(self, nearest: Nearest, side: int = SIDE) -> Picture:
        """The reference picture of a match."""
        if nearest.file is not None:
            return _inside(self.run, nearest.file, side, "the run folder")
        if self.references is None:
            return Picture(None, "reference image not kept")
        if isinstance(self.references, Path):
            found = next(
                (n for e in EXTENSIONS if (self.references / (n := nearest.reference + e)).is_file()), nearest.reference
            )
            return _inside(self.references, found, side, "the reference folder")
        path = self.references.get(nearest.reference)
        return thumbnail(path, side) if path else Picture(None, "reference image not given")


def _inside(folder: Path, name: str, side: int, where: str) -> Picture:
    """A picture below ``folder``; a name that leads out of it comes from a damaged or hostile row and is not followed."""
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            return Picture(None, f"image lies outside {where}")
    except (OSError, ValueError):  # a name no file can have, for instance one with NUL
        return Picture(None, "image has an impossible name")
    return thumbnail(path, side)


def thumbnail(path: Path, side: int = SIDE) -> Picture:
    """A file as a WebP data URI of at most ``side`` pixels; never enlarged, transparency on white, metadata left behind."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.draft("RGB", (side, side))
                return Picture(_webp(_flat(ImageOps.exif_transpose(image)), side))
    except FileNotFoundError:
        return Picture(None, "image missing")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return Picture(None, "image unreadable")


def _flat(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA", "P"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _webp(image: Image.Image, side: int) -> str:
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    clean = Image.new("RGB", image.size)
    clean.paste(image)  # pixels only: no EXIF, no color profile
    data = io.BytesIO()
    clean.save(data, "WEBP", quality=82, method=4)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
