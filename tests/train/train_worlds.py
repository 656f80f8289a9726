"""Pictures and readings that the tests of training share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

NUMBER = 24
SIDE = 16


def picture(seed: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "losses.jsonl").read_text().splitlines()]
