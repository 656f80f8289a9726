"""What the benchmark scripts share: the machine in words, and measured blocks inside documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mnemoscope import Run, Target, denoise
from mnemoscope.errors import UsageError
from mnemoscope.lab.pages import machine, replace_block, table
from mnemoscope.models.sampling import final
from mnemoscope.records.schema import Row
from mnemoscope.similarity.reference import ReferenceSet

__all__ = ["DOCS", "NULL_SAMPLES", "generated", "machine", "markdown_table", "null_copies", "sample", "write_block"]

markdown_table = table
DOCS = Path(__file__).parent.parent / "docs"


def sample(target: Target, noise: Tensor, prompts: list[str] | None = None, steps: int = 50) -> Tensor:
    """Pictures in [0, 1] after whole trajectories; without prompts, of a model without text."""
    cond, null = (None, None) if prompts is None else (target.encode(prompts), target.encode([""]))
    return target.decode(final(denoise(target, noise, cond, null, steps=steps)))


def generated(run: Run, batch: int = 256) -> Iterator[tuple[list[Row], Tensor]]:
    """The rows of a run that have a picture, and their pictures in [0, 1], some at a time."""
    rows = iter([row for row in run.rows() if row.image])
    while some := list(islice(rows, batch)):
        files = [run.folder / str(row.image) for row in some]
        pixels = np.stack([np.asarray(Image.open(f).convert("RGB"), np.float32) for f in files])
        yield some, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


NULL_SAMPLES = 512


def null_copies(target: Target, reference: ReferenceSet, repeated: set[str], steps: int = 50) -> tuple[int, int, int]:
    """Samples of the branch without a prompt: copies of ``repeated`` pictures, copies of any reference, samples."""
    null, known, anything = target.encode([""]), 0, 0
    for start in range(0, NULL_SAMPLES, 64):
        noise = target.noise(range(start, start + 64), base=1)
        for match in reference.nearest(target.decode(final(denoise(target, noise, null.expand(64), steps=steps)))):
            anything += bool(match.copy_found)
            known += bool(match.copy_found) and match.reference in repeated
    return known, anything, NULL_SAMPLES


def write_block(document: Path, name: str, text: str, facts: Any = None) -> None:
    """Replace the block between ``<!-- name -->`` and ``<!-- /name -->``; facts go beside the document as JSON."""
    try:
        replace_block(document, name, text)
    except UsageError as e:
        raise SystemExit(str(e)) from None
    if facts is not None:
        (DOCS / "measured").mkdir(exist_ok=True)
        (DOCS / "measured" / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"{document}: {name} updated")
