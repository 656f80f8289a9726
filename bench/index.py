"""Building a reference index against a bare loop that decodes and describes.

    python bench/index.py       about 3 minutes; writes docs/performance.md

The bare loop opens one file after the other, decodes it, describes batches of 64 and forgets them; the build also lists the
folder, hashes files, and writes and syncs rows and vectors. Both run in turn on the same files, several times; ratios are of
medians. With one decoding thread they do the same work on the same cores but for the overlap; by default there is a thread
per core.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import DOCS, machine, markdown_table, write_block
from mnemoscope.similarity.base import Descriptor
from mnemoscope.similarity.index import ReferenceIndex
from mnemoscope.similarity.pixels import Pixels

KINDS = {"JPEG, 512 px": ("JPEG", 512, 1000), "JPEG, 1500 px": ("JPEG", 1500, 150), "PNG, 64 px": ("PNG", 64, 5000)}


def make(folder: Path, kind: str, side: int, n: int) -> list[Path]:
    """Soft pictures with some grain, as photographs have it: neither trivial nor impossible to compress."""
    rng, files = np.random.default_rng(0), []
    for i in range(n):
        soft = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(
            (side, side * 3 // 4), Image.Resampling.BICUBIC
        )
        grain = rng.normal(0, 6, (side * 3 // 4, side, 3))
        image = Image.fromarray((np.asarray(soft) + grain).clip(0, 255).astype(np.uint8))
        files.append(folder / f"{i:05}.{kind.lower()}")
        image.save(files[-1], kind)
    return files


def bare(files: list[Path], descriptor: Descriptor) -> float:
    """Seconds to decode and describe, and nothing else."""
    began, left = time.perf_counter(), iter(files)
    with torch.inference_mode():
        while some := list(islice(left, 64)):
            descriptor(torch.stack([descriptor.prepare(Image.open(file).convert("RGB")) for file in some]))
    return time.perf_counter() - began


def built(folder: Path, descriptor: Descriptor, workers: int | None) -> float:
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        ReferenceIndex.build(folder, f"{out}/index", descriptor, workers=workers)
        return time.perf_counter() - began


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--share", type=float, default=1.0, help="Of the pictures; below 1 nothing is written to the docs.")
    args = p.parse_args()
    rows, facts = [], {"machine": machine(), "descriptor": Pixels().name}
    for name, (kind, side, count) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            n = max(1, round(count * args.share))
            files = make(Path(folder), kind, side, n)
            bare(files[: n // 10 + 1], Pixels())  # warm files and code
            trials = [
                (bare(files, Pixels()), built(Path(folder), Pixels(), 1), built(Path(folder), Pixels(), None))
                for _ in range(args.repeats)
            ]
        alone, one, many = (statistics.median(column) for column in zip(*trials, strict=True))
        rows.append(
            [name, str(n), *(f"{n / t:.0f}" for t in (alone, one, many)), f"{one / alone:.2f}", f"{many / alone:.2f}"]
        )
        facts[name] = {"pictures": n, "bare": alone, "one thread": one, "a thread per core": many, "trials": trials}
        print(rows[-1], flush=True)
    columns = [
        "pictures",
        "n",
        "bare, per s",
        "build, 1 thread, per s",
        "build, per s",
        "time ratio, 1 thread",
        "time ratio",
    ]
    text = (
        f"`python bench/index.py` on {machine()}: descriptor {Pixels().name}, medians of {args.repeats} trials.\n\n"
        f"{markdown_table(columns, rows)}"
    )
    if args.share < 1:
        print(text)
    else:
        write_block(DOCS / "performance.md", "measured-index", text, facts)


if __name__ == "__main__":
    main()
