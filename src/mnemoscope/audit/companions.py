"""Cheap measures of many pictures, beside InvMM or before it: kept as they come, so that an interrupted run goes on.

companions/<id>.json    one value: of this picture and caption, under this model, by this measure with these options
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import BaseModel

from ..bounds import AMOUNT, COUNT, PART, within
from ..errors import CannotAudit, RunError
from ..measure.base import Measure, spec_of
from ..models.base import Target
from ..parsing import through_json
from ..records.places import spelled
from ..records.schema import FORMAT, Finite
from ..records.store import OutFolder, digest, read_document, write_whole
from .pictures import Picture, opened, picture_bytes, size_of

__all__ = ["Screen", "Values", "compared", "require_no_captions"]

Values: TypeAlias = dict[str, float | None]
"""A value for each measure by name; None: it was not finite."""


@dataclass(frozen=True)
class Screen:
    """Which pictures are worth the price of InvMM: the share that a cheap measure finds most suspicious among those given.

    Attributes:
        measure: What ranks them.
        share: How many of them, above 0 and at most 1; rounded up.
        check: How many of those left out are measured all the same, drawn by chance, to see what the screen misses.
    """

    measure: Measure
    share: float = 0.3
    check: int = 0

    def __post_init__(self) -> None:
        AMOUNT.judge("the number of pictures to check a screen with", self.check)
        PART.judge("the share that a screen keeps", self.share)

    def key(self, values: Mapping[str, float | None]) -> float:
        """Sorts the most suspicious first. What has no value comes before all: nothing speaks for leaving it out."""
        value = values.get(self.measure.name)
        return -math.inf if value is None else value if self.measure.low_is_stored else -value

    def kept(self, values: Sequence[Mapping[str, float | None]]) -> set[int]:
        """Places of the pictures that are let through; ties go by place."""
        return set(sorted(range(len(values)), key=lambda i: self.key(values[i]))[: self.keeps(len(values))])

    def keeps(self, n: int) -> int:
        """How many of n pictures are let through."""
        return math.ceil(self.share * n - 1e-9)

    def drawn(self, out: Mapping[int, str]) -> set[int]:
        """Places of those left out that check the screen: by chance, the same ones each time.

        Args:
            out: Id of each picture that is left out, by its place. Ids are digests, so their order is as good as a draw.
        """
        return set(sorted(out, key=lambda i: out[i])[: self.check])


@within(batch_size=COUNT)
def compared(
    measures: Sequence[Measure], target: Target, pictures: Sequence[Picture], out: str | Path, *, batch_size: int = 8,
    progress: Callable[[str, int, int], object] | None = None,
) -> list[Values]:  # fmt: skip
    """What each measure says of each picture, computed where it is not known yet.

    Args:
        measures: With names of their own.
        target: The model.
        pictures: In order.
        out: Folder; ``companions/<id>.json``. Ids come from content and settings, not from InvMM's preset.
        batch_size: Pictures at a time.
        progress: Told of each batch: which measure, how many pictures are done, of how many.

    Raises:
        CannotAudit: a measure needs what the target lacks, or captions are given to a model without text.
        RunError: the folder cannot be written, or somebody deletes it meanwhile.
    """
    require_no_captions(target, pictures)
    standing = OutFolder(out)
    found: list[Values] = [{} for _ in pictures]
    content = [hashlib.sha256(picture_bytes(p.file)).hexdigest() for p in pictures] if measures else []
    model = target.identity() if measures else {}
    for measure in measures:
        setting = {"target": model, "measure": spec_of(measure)}
        ids = [digest([c, p.caption, setting]) for c, p in zip(content, pictures, strict=True)]
        files = [Path(out) / "companions" / f"{name}.json" for name in ids]
        missing = [i for i, file in enumerate(files) if not os.path.exists(file)]
        for start in range(0, len(missing), batch_size):
            rows = missing[start : start + batch_size]
            images = opened([pictures[i].file for i in rows], size_of(target))
            captions = [pictures[i].caption or "" for i in rows] if target.has_text else None
            keys = [int(ids[i][:12], 16) for i in rows]
            values = measure(target, images, prompts=captions, keys=keys).tolist()
            standing.require()
            for i, value in zip(rows, values, strict=True):
                _keep(files[i], measure, pictures[i], value)
            if progress is not None:
                progress(measure.name, len(pictures) - len(missing) + start + len(rows), len(pictures))
        for values_of, file in zip(found, files, strict=True):
            values_of[measure.name] = _kept_value(file, measure)
    return found


def require_no_captions(target: Target, pictures: Sequence[Picture]) -> None:
    """Refuse captions for a model without text, which would leave them unread.

    Raises:
        CannotAudit: naming the first picture that has one.
    """
    told = [p for p in pictures if p.caption is not None]
    if told and not target.has_text:
        raise CannotAudit(f"{target.name} takes no text, and {told[0].file.name} has a caption; leave captions out.")


class _Kept(BaseModel):
    """What a file of ``companions/`` says, as far as it is read."""

    name: str
    options: dict[str, Any]
    value: Finite | None


def _kept_value(file: Path, measure: Measure) -> float | None:
    """The value in a file.

    Raises:
        RunError: it is damaged, or of another measure.
    """
    cure = "remove it, and its value is measured again"
    kept = read_document(
        file, _Kept, FORMAT, f"{file} is gone; start again.", "no value of a measure", cure, folder=file.parent
    )
    if through_json(spec_of(measure)) != {"name": kept.name, "options": kept.options}:
        raise RunError(f"{file} is of another measure than {measure.name}; {cure}.")
    return kept.value


def _keep(file: Path, measure: Measure, picture: Picture, value: float) -> None:
    facts = {
        **spec_of(measure), "image": spelled(picture.file), "caption": picture.caption,
        "value": value if math.isfinite(value) else None, "forwards": measure.forwards, "backwards": measure.backwards,
    }  # fmt: skip
    write_whole(file, (json.dumps(facts, ensure_ascii=False) + "\n").encode())
