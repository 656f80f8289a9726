"""From the bytes of a file to an RGB picture, or to the reason why there is none. Whatever a file holds, nothing is raised.

All pictures of files are decoded here and nowhere else, because a decoder that may take any format starts programs for some of them
(PostScript), and because a small file can hold a picture that fills the memory. A caller says with :class:`Limits` what it needs.

Conversions are noted, because a descriptor sees what this module made of the file: the first frame of an animation,
transparency on white, 16 bits read as 8.
"""

from __future__ import annotations

import functools
import io
import re
from dataclasses import dataclass

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["COLLECTED", "ENDINGS", "KEPT", "MAX_BYTES", "MAX_PIXELS", "Decoded", "Limits", "decode"]

MAX_PIXELS = 89_478_485
"""Pictures with more pixels than this (Pillow's own limit: a quarter of a gibibyte of RGB) are not decoded."""

MAX_BYTES = 1 << 30
"""Files larger than this are not read."""

ENDINGS = frozenset({
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx",
    ".jxl", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
})  # fmt: skip
"""Files that are taken for pictures, whether or not this Pillow can read them."""

MAX_SCANS = 100
"""A JPEG with more scans is not decoded: each costs time for the whole picture, and may have only 33 bytes. Encoders write about ten."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a caller takes for a picture.

    Attributes:
        formats: Formats that are tried, by Pillow's names.
        pixels: The most pixels, width times height.
        bytes: The most bytes of its file.
    """

    formats: tuple[str, ...]
    pixels: int
    bytes: int


# No EPS, PDF, WMF or video stubs: those start other programs or only look like pictures.
_FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JXL", "JPEG2000", "PPM", "TGA", "ICO", "QOI", "MPO",
)  # fmt: skip

COLLECTED = Limits(_FORMATS, MAX_PIXELS, MAX_BYTES)
"""Pictures that somebody collected: training pictures, references, pictures to be measured."""

KEPT = Limits(("WEBP", "PNG", "JPEG"), 4096 * 4096, 1 << 26)
"""Pictures that a run, a packet or a folder of measured pictures keeps: small enough for many at a time, as large as models draw."""

_MODES = {"L": "grayscale", "1": "black and white", "P": "palette", "CMYK": "CMYK, converted without its color profile"}


@dataclass(frozen=True, slots=True)
class Decoded:
    """A picture, or why there is none.

    Attributes:
        picture: RGB, upright.
        reason: Why there is none: a kind, and after a colon what exactly.
        note: What was converted.
    """

    picture: Image.Image | None
    reason: str | None = None
    note: str | None = None


def decode(data: bytes, limits: Limits = COLLECTED, *, side: int | None = None) -> Decoded:
    """The picture in the bytes of a file.

    Args:
        data: The bytes.
        limits: What is taken for a picture.
        side: Pixels of the longest side, where a smaller copy will do: JPEG is then read at the smallest scale that has as many, which
            is faster. Other formats are read whole.
    """
    if not data:
        return Decoded(None, "empty: the file has no bytes")
    if len(data) > limits.bytes:
        return Decoded(None, f"too large: {len(data):,} bytes; the limit is {limits.bytes:,}")
    try:
        with Image.open(io.BytesIO(data), formats=_known(limits.formats)) as image:
            if (pixels := image.width * image.height) > limits.pixels:
                return _too_large(pixels, limits)
            if image.format in ("JPEG", "MPO") and (scans := _scans(data)) > MAX_SCANS:
                return Decoded(None, f"too slow: {scans:,} scans or more; the limit is {MAX_SCANS}")
            if side is not None:
                image.draft("RGB", (side, side))
            notes = [*_frames(image), *_depth(image)]
            image.load()
            picture = _rgb(_upright(image, notes), notes)
    except UnidentifiedImageError:
        return Decoded(None, f"unknown: {_no_format(limits.formats)}")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        found = re.search(r"\((\d+) pixels\)", str(e))
        return _too_large(int(found[1]) if found else None, limits)
    except Exception as e:  # decoders of damaged files raise whatever they stumble over
        return Decoded(None, f"damaged: {_words(e)}")
    return Decoded(picture, note="; ".join(notes) or None)


@functools.cache
def _known(formats: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the formats that this Pillow knows; it does not forgive the names of others."""
    Image.init()
    return tuple(name for name in formats if name in Image.OPEN)


def _no_format(formats: tuple[str, ...]) -> str:
    if formats == _FORMATS:
        return f"in no format that Pillow {PIL.__version__} reads"
    return f"in none of the formats {', '.join(formats)}"


def _too_large(pixels: int | None, limits: Limits) -> Decoded:
    size = "" if pixels is None else f"{pixels:,} pixels; "
    return Decoded(None, f"too large: {size}the limit is {limits.pixels:,}")


_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
"""A marker of JPEG that a length follows, or the end: 255 within coded data, and markers that stand alone, are none of these."""

_SCAN, _END = 0xDA, 0xD9


def _scans(data: bytes) -> int:
    """How many scans a JPEG has; counting ends above the limit."""
    scans, at = 0, 2
    while scans <= MAX_SCANS and (marker := _MARKER.search(data, at)) is not None:
        kind = data[marker.end() - 1]
        if kind == _END:
            break
        scans += kind == _SCAN
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")  # the length counts itself
    return scans


def _words(error: Exception) -> str:
    """What an exception says, without the address of the object it speaks of, which differs from run to run."""
    text = re.sub(r"<[^>]* object at 0x[0-9a-f]+>", "the file", str(error)).strip()
    return f"{type(error).__name__}{': ' if text else ''}{text[:200]}"


def _frames(image: Image.Image) -> list[str]:
    try:
        frames = getattr(image, "n_frames", 1)
    except Exception:  # the first frame may be sound where a later one is not
        return ["the first of several frames"]
    return [f"the first of {frames} frames"] if frames > 1 else []


def _depth(image: Image.Image) -> list[str]:
    """Colors of 16 bits lose half of them while they are read; only the raw mode, known until then, says so."""
    deep = any(";16" in str(tile) for tile in getattr(image, "tile", ())) and not image.mode.startswith("I")
    return ["16 bits per channel read as 8"] if deep else []


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    try:
        if image.getexif().get(0x0112, 1) in range(2, 9):
            turned = ImageOps.exif_transpose(image)
            notes.append("turned as its EXIF says")
            return turned
    except Exception:
        notes.append("EXIF unreadable, not turned")
    return image


def _rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _eight_bits(image, notes).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if np.asarray(rgba.getchannel("A")).min() < 255:
            notes.append("transparency on white")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return rgba.convert("RGB")
    if image.mode != "RGB":
        notes.append(_MODES.get(image.mode, f"{image.mode} converted to RGB"))
    return image.convert("RGB")


def _eight_bits(image: Image.Image, notes: list[str]) -> Image.Image:
    """A gray picture of 16 or 32 bits, or of real numbers. Its range is taken from the mode, or where that says nothing from its values."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and 255 < high <= 65535):
        low, high = 0.0, 65535.0
    elif low >= 0 and high <= (1 if image.mode == "F" else 255):
        low, high = 0.0, 1.0 if image.mode == "F" else 255.0
    notes.append(f"gray values from {low:g} to {high:g} read as 8 bits")
    scaled = (values - low) * (255 / ((high - low) or 1))
    return Image.fromarray(np.rint(scaled).clip(0, 255).astype(np.uint8))
