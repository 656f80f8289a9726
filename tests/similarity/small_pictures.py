"""Small pictures for tests of reading, indexing and clustering: smooth, all different, and every kind of bad file."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def smooth(seed: int, side: int = 32) -> Image.Image:
    """A picture unlike those of other seeds."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def fill(folder: Path, n: int, first: int = 0) -> Path:
    """``n`` pictures, every third in a folder of its own level."""
    for i in range(first, first + n):
        path = folder / (f"deep/{i % 2}/{i:03}.png" if i % 3 == 0 else f"{i:03}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(smooth(i)))
    return folder


def png(width: int, height: int, bits: int = 8, rows: bytes = b"") -> bytes:
    """A PNG in RGB from its raw rows. It may say that it is larger than they are: a decompression bomb without the bomb."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
