"""Picture files: found, captioned, and opened at the size a model works at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import UsageError
from ..models.base import Target
from ..parsing import ParseError, json_lines
from ..records.files import leads_out, open_regular, read_regular
from ..similarity.decoding import COLLECTED, decode

__all__ = ["Picture", "opened", "picture_bytes", "picture_lines", "pictures_in", "size_of"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class Picture:
    """A picture file, and the caption under which it is measured: empty for the empty prompt, None where a prompt is to be learned, or the
    model takes no text."""

    file: Path
    caption: str | None = None


def pictures_in(names: Sequence[Path], captions: Path | None = None) -> list[Picture]:
    """Picture files, and all those of folders, in order; with captions from a JSONL file of ``image`` and ``caption``.

    Raises:
        UsageError: with the file and what to do.
    """
    files: list[Path] = []
    for name in names:
        if os.path.isdir(name):
            below = sorted(p for p in name.rglob("*") if p.suffix.lower() in SUFFIXES)
            if (link := next((p for p in below if p.is_symlink() and leads_out(name, p)), None)) is not None:
                raise UsageError(
                    f"{link} is a link that leads out of {name}, and is not followed; take it out, or name the picture itself."
                )
            files += below
        elif os.path.isfile(name):
            files.append(name)
        else:
            raise UsageError(f"{name} does not exist; name picture files or folders of them.")
    if not files:
        raise UsageError(
            f"there is no picture in {', '.join(map(str, names))}; known are {', '.join(sorted(SUFFIXES))}."
        )
    if captions is None:
        return [Picture(f) for f in files]
    told = _captions(captions)
    missing = [f.name for f in files if f.name not in told]
    if missing:
        raise UsageError(
            f'{captions} has no caption for {missing[0]}; write {{"image": "{missing[0]}", "caption": "…"}}.'
        )
    return [Picture(f, told[f.name]) for f in files]


def _captions(file: Path) -> dict[str, str]:
    return {Path(row["image"]).name: row["caption"] for row in picture_lines(file)}


def picture_lines(file: Path, more: str = "") -> list[dict[str, Any]]:
    """The lines of a JSONL file that names pictures and their captions, with whatever else they hold.

    Args:
        file: UTF-8, a line for each picture.
        more: What else a line may hold, as an example shows it.

    Raises:
        UsageError: with line and cure.
    """
    try:
        with open_regular(file) as opened_file:
            lines = list(json_lines(opened_file))
    except OSError as e:
        raise UsageError(f"{file} cannot be read ({e.strerror or e}); give a JSONL file in UTF-8.") from None
    except ParseError as e:
        raise UsageError(f'{file}, {e}; write {{"image": "a.png", "caption": "…"{more}}}.') from None
    pictures = []
    for number, row in lines:
        try:
            pictures.append({**row, "image": _text(row["image"]), "caption": _text(row["caption"])})
        except (KeyError, TypeError):
            raise UsageError(f'{file}, line {number}: write {{"image": "a.png", "caption": "…"{more}}}.') from None
    return pictures


def _text(value: Any) -> str:
    """A text, or a number as one; null, NaN and the like are none, and would be captions that nobody wrote."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value != value:
        raise TypeError("no text")
    return str(value)


def size_of(target: Target) -> tuple[int, int]:
    """Height and width of the pictures that a target makes."""
    _, height, width = target.latent_shape
    factor = getattr(target, "factor", 1)
    return height * factor, width * factor


def picture_bytes(file: Path) -> bytes:
    """What a picture file holds.

    Raises:
        UsageError: it cannot be read, or is no regular file.
    """
    try:
        return read_regular(file, COLLECTED.bytes)
    except OSError as e:
        raise UsageError(f"{file} cannot be read ({e.strerror or e}); take it out.") from None


def opened(files: Sequence[Path], size: tuple[int, int]) -> Float[Tensor, "batch 3 height width"]:
    """Pictures in [0, 1]: upright, RGB, the middle of them at that (height, width), as trainers cut them.

    Raises:
        UsageError: one cannot be read; the message says which and why.
    """
    height, width = size
    shown = []
    for file in files:
        found = decode(picture_bytes(file))
        if found.picture is None:
            raise UsageError(f"{file} is no picture that can be used ({found.reason}); take it out or convert it.")
        cut = ImageOps.fit(found.picture, (width, height), Image.Resampling.LANCZOS)
        shown.append(torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 255)
    return torch.stack(shown) if shown else torch.empty(0, 3, height, width)
