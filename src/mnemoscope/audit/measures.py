"""Measuring many pictures: one file for each finished picture, so that an interrupted run goes on with the missing ones."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_tensors

from ..errors import UsageError
from ..measure.invmm import InvMM, Stored
from ..models.base import Target
from ..records.store import digest, write_whole
from .pictures import opened

__all__ = ["Measured", "Picture", "measured", "picture_lines", "pictures_in", "size_of"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class Picture:
    """A picture file, and the caption under which it is measured; None: the empty prompt, or a model without text."""

    file: Path
    caption: str | None = None


@dataclass(frozen=True)
class Measured:
    """What is kept of one picture: the result, without its noise, which stands in a file beside it."""

    id: str
    image: str
    caption: str | None
    result: dict[str, Any]

    @property
    def score(self) -> float:
        """Nats per dimension; infinity where the picture was not reproduced."""
        return math.inf if self.result["score"] is None else float(self.result["score"])


def pictures_in(names: Sequence[Path], captions: Path | None = None) -> list[Picture]:
    """Picture files, and all those of folders, in order; with captions from a JSONL file of ``image`` and ``caption``.

    Raises:
        UsageError: with the file and what to do.
    """
    files: list[Path] = []
    for name in names:
        if name.is_dir():
            files += sorted(p for p in name.rglob("*") if p.suffix.lower() in SUFFIXES)
        elif name.is_file():
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
        lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{file} cannot be read ({e}); give a JSONL file in UTF-8.") from None
    found = []
    for k, text in enumerate(lines, 1):
        try:
            row = json.loads(text)
            found.append({**row, "image": str(row["image"]), "caption": str(row["caption"])})
        except (ValueError, KeyError, TypeError):
            raise UsageError(f'{file}, line {k}: write {{"image": "a.png", "caption": "…"{more}}}.') from None
    return found


def size_of(target: Target) -> tuple[int, int]:
    """Height and width of the pictures that a target makes."""
    _, height, width = target.latent_shape
    factor = getattr(target, "factor", 1)
    return height * factor, width * factor


def measured(
    method: InvMM, pictures: Sequence[Picture], out: str | Path, *, batch_size: int = 8,
    progress: Callable[[int, int, Measured], object] | None = None,
) -> list[Measured]:  # fmt: skip
    """Measure what has not been measured yet, in the order given; results of all.

    Args:
        method: Model, descriptor and preset.
        pictures: What to measure.
        out: Folder; ``pictures/<id>.json`` and the noise found as ``<id>.safetensors``. Ids come from content and settings, so that
            another setting never overwrites.
        batch_size: Pictures at a time; what is not finished when a batch is interrupted is begun anew.
        progress: Told of each picture that is done.
    """
    folder = Path(out) / "pictures"
    setting = {
        "target": method.target.identity(), "preset": asdict(method.preset), "descriptor": method.descriptor.identity(),
        "beta": method.beta,
    }  # fmt: skip
    write_whole(Path(out) / "measure.json", (json.dumps(setting, indent=1, default=str) + "\n").encode())
    ids = [digest([hashlib.sha256(p.file.read_bytes()).hexdigest(), p.caption, setting]) for p in pictures]
    missing = [i for i in range(len(pictures)) if not (folder / f"{ids[i]}.json").exists()]
    done = len(pictures) - len(missing)
    for start in range(0, len(missing), batch_size):
        rows = missing[start : start + batch_size]
        some = [pictures[i] for i in rows]
        images = opened([p.file for p in some], size_of(method.target))
        captions = [p.caption or "" for p in some] if method.target.has_text else None
        # Draws come from the content, so that a picture's result does not depend on its place.
        found = method(images, prompts=captions, keys=[int(ids[i][:12], 16) for i in rows])
        for i, result in zip(rows, found, strict=True):
            kept = _keep(folder, ids[i], pictures[i], result)
            done += 1
            if progress is not None:
                progress(done, len(pictures), kept)
    return list(_read(folder, ids))


def _keep(folder: Path, name: str, picture: Picture, result: Stored) -> Measured:
    facts = {k: v for k, v in vars(result).items() if k not in ("mu", "s", "rate")}
    facts |= {"score": _finite(result.score), "nats": _finite(result.nats)}
    facts["rate"] = None if result.rate is None else [result.rate.value, result.rate.low, result.rate.high]
    kept = Measured(name, str(picture.file), picture.caption, json.loads(json.dumps(facts)))
    noise = {"mu": result.mu.float().cpu().contiguous(), "s": result.s.float().cpu().contiguous()}
    write_whole(folder / f"{name}.safetensors", save_tensors(noise))
    write_whole(folder / f"{name}.json", (json.dumps(asdict(kept), ensure_ascii=False) + "\n").encode())
    return kept


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _read(folder: Path, ids: Sequence[str]) -> Iterator[Measured]:
    for name in ids:
        yield Measured(**json.loads((folder / f"{name}.json").read_bytes()))
