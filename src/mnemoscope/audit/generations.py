"""The last step of an audit: scores that compare the pictures of one prompt, once all of its seeds are there.

Seeds of a prompt may be made in different batches, sessions, shards and machines, so these scores are never computed on the way:
they come from the pictures that the run has kept (lossless up to 128 px; beyond, WebP of quality 90, whose artifacts are then
part of ordinary and audited scores alike), and rows that are there are amended. Stopped at any instant, the same command ends with
the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..detect.base import AnyDetector, PictureDetector, comparing
from ..errors import ModelFault, RunError
from ..records.files import read_inside
from ..records.schema import Row, Score
from ..records.store import Run
from ..similarity.decoding import KEPT, decode

__all__ = ["LEAST", "compare_generations"]

LEAST = 2
"""Generations without which there is nothing to compare."""


def compare_generations(
    run: Run, detectors: Mapping[str, AnyDetector], asked: Iterable[str], device: torch.device
) -> int:
    """Add the scores of detectors that compare pictures; the others are left alone.

    Nothing is done before every sample has a row. A prompt some of whose seeds failed is scored on the others, which its rows
    say (``generations``), and again when these are there.

    Args:
        run: The run; nobody may be writing its rows.
        detectors: Detectors by the name of their score.
        asked: Ids of all samples of the run, other shards' included.
        device: Where pictures are compared.

    Returns:
        How many rows changed.

    Raises:
        RunError: a picture is missing or damaged, or a file of rows is in use.
        ModelFault: a detector gives NaN or infinity.
        UsageError: the pictures are too small for a detector.
    """
    compare = comparing(detectors)
    if not compare or not run.outcomes().keys() >= set(asked):
        return 0
    facts: dict[str, dict[str, Any]] = {}
    for prompt, members in _by_prompt(run.rows()).items():
        todo = {name: d for name, d in compare.items() if any(m.compared.get(name) != len(members) for m in members)}
        if len(members) < LEAST or not todo:
            continue
        shown = [_picture(run, m.image) for m in members]
        if len({picture.shape for picture in shown}) > 1:
            raise RunError(f"the pictures of {prompt[:60]!r} in {run.folder} are of several sizes; restore them.")
        pictures = torch.stack(shown).to(device)
        for name, detector in todo.items():
            scores = _scores(name, detector, pictures, prompt)
            for member, score in zip(members, scores, strict=True):
                facts.setdefault(member.id, {"scores": {}})["scores"][name] = score
    return run.amend(facts)


@dataclass(frozen=True)
class _Generation:
    seed: int
    id: str
    image: str | None
    compared: dict[str, int | None]


def _by_prompt(rows: Iterable[Row]) -> dict[str, list[_Generation]]:
    """The generations of each prompt, in the order of seeds."""
    found: dict[str, list[_Generation]] = {}
    for row in rows:
        members = found.setdefault(row.prompt, [])
        if row.status == "ok":
            compared = {name: score.generations for name, score in row.scores.items()}
            members.append(_Generation(row.seed, row.id, row.image, compared))
    return {prompt: sorted(members, key=lambda m: m.seed) for prompt, members in found.items()}


def _scores(
    name: str, detector: PictureDetector, pictures: Float[Tensor, "n 3 height width"], prompt: str
) -> list[dict[str, Any]]:
    """One score per picture, as plain values."""
    values = detector.score(pictures)
    if not bool(values.isfinite().all()):
        raise ModelFault(
            f"{name} is not finite for {prompt[:60]!r}, though its pictures are; report it to the detector's author."
        )
    made = (Score(value=v, space=str(detector.space), generations=len(pictures)) for v in values.tolist())
    return [score.model_dump(exclude_none=True) for score in made]


def _picture(run: Run, image: str | None) -> Float[Tensor, "3 height width"]:
    """A picture that the run has kept, in [0, 1]."""
    path = run.folder / str(image)
    try:
        found = decode(read_inside(run.folder, str(image), KEPT.bytes), KEPT)
    except OSError as e:
        raise RunError(
            f"{path} is needed to compare generations and cannot be read ({e.strerror or e}); restore it."
        ) from None
    if found.picture is None:
        raise RunError(f"{path} is needed to compare generations and is no picture ({found.reason}); restore it.")
    return torch.from_numpy(np.array(found.picture)).permute(2, 0, 1).float() / 255
