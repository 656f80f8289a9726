"""Picture files at the size a model works at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import UsageError
from ..similarity.decoding import decode

__all__ = ["opened"]


def opened(files: Sequence[Path], size: tuple[int, int]) -> Float[Tensor, "batch 3 height width"]:
    """Pictures in [0, 1]: upright, RGB, the middle of them at that (height, width), as trainers cut them.

    Raises:
        UsageError: one cannot be read; the message says which and why.
    """
    height, width = size
    shown = []
    for file in files:
        try:
            found = decode(file.read_bytes())
        except OSError as e:
            raise UsageError(f"{file} cannot be read ({e.strerror or e}).") from None
        if found.picture is None:
            raise UsageError(f"{file} is no picture that can be used ({found.reason}); take it out or convert it.")
        cut = ImageOps.fit(found.picture, (width, height), Image.Resampling.LANCZOS)
        shown.append(torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 255)
    return torch.stack(shown) if shown else torch.empty(0, 3, height, width)
