"""One protocol for all mitigations: the same prompts, seeds and starting noises, with and without.

Published figures of mitigations cannot be put on one axis: each paper has its own prompts, descriptor, reference and fidelity
score. Here every method at every strength samples the same cases, and each picture is compared with the one that the same noise gives
without it. Where a gate decides by the score of the first step, a picture below the threshold *is* the unmitigated one, so that
gated figures need no further sampling.

A cell (one method at one strength) is written as a whole when it is finished; the same call continues with the missing ones.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..bounds import COUNT, SEEDS, STEPS, within
from ..detect.magnitude import Magnitude
from ..errors import RunError
from ..mitigate.base import Generation, Mitigation, build, sample
from ..models.base import Target
from ..records.documents import read_json
from ..records.store import OutFolder, write_whole
from ..records.trials import NONE, Case, Cell, parse_sizes
from ..similarity.base import Pictures
from ..similarity.captions import CaptionScore
from ..similarity.reference import ReferenceSet
from .memory import peak_memory

__all__ = ["Protocol", "frechet"]


GATES = (1, 5)
"""Over how many leading steps a gate may average; a hit beyond the first step costs the steps that are thrown away."""


FORMAT = 1
"""Of cells: those of another format are computed anew."""


class Protocol:
    """What all methods have in common.

    Args:
        target: The model.
        cases: What is sampled.
        ordinary: Prompts of ordinary kind, none of them a case: their first-step scores give the gate's threshold.
        reference: What pictures are compared with; calibrated.
        captions: Image–text score.
        real: Pictures that ordinary generations should look like, for the Fréchet distance; its groups are ``plain``.
        plain: Groups of cases that have no repeated picture.
        folder: Where cells are kept.
        seeds: Generations of each case.
        steps: Length of the sampler's schedule.
        batch_size: Samples at a time.
    """

    @within(seeds=SEEDS, steps=STEPS, batch_size=COUNT)
    def __init__(
        self, target: Target, cases: Sequence[Case], ordinary: Sequence[str], reference: ReferenceSet, captions: CaptionScore, *,
        folder: str | Path, real: Pictures | None = None, plain: Sequence[str] = ("ordinary", "heldout"), seeds: int = 4,
        steps: int = 50, batch_size: int = 32,
    ):  # fmt: skip
        self.target, self.cases, self.ordinary = target, list(cases), list(ordinary)
        self.reference, self.captions, self.real, self.plain = reference, captions, real, tuple(plain)
        self.folder, self.seeds, self.steps, self.batch_size = Path(folder), seeds, steps, batch_size
        self.setting = {
            "format": FORMAT,
            "target": target.identity(), "cases": [asdict(c) for c in self.cases], "ordinary": self.ordinary,
            "reference": reference.name, "threshold": reference.threshold, "layouts": reference.layout_threshold,
            "captions": captions.name, "seeds": seeds, "steps": steps, "guidance": target.guidance,
        }  # fmt: skip

    @cached_property
    def _standing(self) -> OutFolder:
        return OutFolder(self.folder)

    @property
    def samples(self) -> list[tuple[Case, int]]:
        """Case and seed of every sample, in the order of all lists."""
        return [(case, seed) for case in self.cases for seed in range(self.seeds)]

    def without(self, progress: Callable[[int], object] | None = None) -> Cell:
        """The cases as they come out without any method."""
        return self._cell(NONE, {}, None, progress)

    def cell(
        self, method: str, options: Mapping[str, Any] | None = None, progress: Callable[[int], object] | None = None
    ) -> Cell:
        """One method on all cases.

        Args:
            method: Name of an installed mitigation.
            options: Of it.
            progress: Told how many samples are done.

        Raises:
            CannotAudit: the method asks for something that this model does not have.
        """
        made = build(method, options)
        value = getattr(made, made.strength, None)
        return self._cell(method, dict(options or {}), None if value is None else float(value), progress, made)

    @cached_property
    def ordinary_sizes(self) -> dict[str, list[float]]:
        """Magnitudes of ordinary prompts, one for each prompt and seed, over each gate's steps. Kept in the folder."""
        file = self._file("ordinary", {"gates": GATES})
        if not file.exists():
            found = []
            for part in _parts([(p, s) for p in self.ordinary for s in range(self.seeds)], self.batch_size):
                self._standing.require()
                g = Generation.of(self.target, [p for p, _ in part], [s for _, s in part], steps=self.steps)
                found.append(_watched(self.target, g, max(GATES))[0])
            write_whole(file, json.dumps(_windows(torch.cat(found))).encode())
        return _stored(
            file, lambda content: parse_sizes(content, {str(k) for k in GATES}, len(self.ordinary) * self.seeds)
        )

    @cached_property
    def plain_pictures(self) -> Float[Tensor, "sample 3 height width"]:
        """What the noises give without any method, in [0, 1]."""
        self.without()
        stored = load_tensors(self._file(NONE, {}).with_suffix(".safetensors").read_bytes())
        return stored["pictures"].float() / 255

    def pictures(self, cell: Cell) -> Float[Tensor, "sample 3 height width"]:
        """The cell's own pictures, in [0, 1]."""
        file = self._file(cell.method, cell.options).with_suffix(".safetensors")
        if not file.exists():
            raise RunError(f"{file} is missing; delete its .json as well and run the same command again.")
        return load_tensors(file.read_bytes())["pictures"].float() / 255

    def _file(self, method: str, options: Mapping[str, Any]) -> Path:
        key = hashlib.sha256(json.dumps([self.setting, method, options], sort_keys=True, default=str).encode())
        return self.folder / "cells" / f"{method}-{key.hexdigest()[:16]}.json"

    def _cell(
        self, method: str, options: dict[str, Any], strength: float | None, progress: Callable[[int], object] | None,
        made: Mitigation | None = None,
    ) -> Cell:  # fmt: skip
        file = self._file(method, options)
        if file.exists() and file.with_suffix(".safetensors").exists():
            return _stored(file, lambda content: Cell.parse(content, len(self.samples)))
        shown, sizes, seconds = [], [], 0.0
        before, backwards = self.target.forwards, 0
        with peak_memory(self.target.device) as peak:
            for part in _parts(self.samples, self.batch_size):
                self._standing.require()
                began = time.perf_counter()
                g = Generation.of(self.target, [c.prompt for c, _ in part], [s for _, s in part], steps=self.steps)
                if made is not None:
                    g = made.prepare(self.target, g)
                    backwards += g.backwards
                size, picture = _watched(self.target, g)
                shown.append(self.target.decode(picture))
                sizes.append(size)
                seconds += time.perf_counter() - began
                if progress is not None:
                    progress(sum(map(len, shown)))
        self._standing.require()
        n, pictures = len(self.samples), torch.cat(shown)
        forwards = (self.target.forwards - before) / n
        seen = _windows(torch.cat(sizes)) if made is None else self.without().sizes
        cell = Cell(
            method, options, strength, **self._judged(pictures, made is None), sizes=seen, seconds=seconds / n,
            forwards=forwards, backwards=backwards / n, peak=peak.megabytes,
        )  # fmt: skip
        stored = {"pictures": (pictures * 255).round().byte().contiguous()}
        write_whole(file.with_suffix(".safetensors"), save_tensors(stored))
        write_whole(file, json.dumps(asdict(cell)).encode())
        return cell

    def _judged(self, pictures: Pictures, unmitigated: bool) -> dict[str, Any]:
        """What all pictures of a cell are compared with."""
        prompts = [case.prompt for case, _ in self.samples]
        places = torch.arange(len(pictures)).split(256)
        matches = [m for i in places for m in self.reference.nearest(pictures[i])]
        fidelity = torch.cat([self.captions(pictures[i], [prompts[k] for k in i]) for i in places])
        describe = self.reference.descriptor
        vectors = torch.cat([describe(pictures[i]) for i in places])
        plain = vectors if unmitigated else torch.cat([describe(self.plain_pictures[i]) for i in places])
        ordinary = torch.tensor([case.group in self.plain for case, _ in self.samples])
        return {
            "similarity": [m.similarity for m in matches],
            "copied": [bool(m.copy_found) for m in matches],
            "template": [bool(m.template_found) for m in matches],
            "fidelity": [round(v, 5) for v in fidelity.tolist()],
            "change": [round(v, 5) for v in (1 - (vectors * plain).sum(1)).clamp(min=0).tolist()],
            "frechet": None if self.real is None else frechet(pictures[ordinary], self.real, self._features),
        }

    def _features(self, pictures: Pictures) -> Float[Tensor, "batch dim"]:
        """What the Fréchet distance is taken in: the image tower of the caption score if it has one, else the descriptor."""
        tower = getattr(self.captions, "pictures", None)
        return self.reference.descriptor(pictures) if tower is None else tower(pictures)


def frechet(
    a: Pictures, b: Float[Tensor, "other 3 rows columns"], features: Callable[[Pictures], Float[Tensor, "n dim"]]
) -> float | None:
    """Fréchet distance between two sets of pictures in a feature space of one's own (Heusel et al., NeurIPS 2017, with other features).

    Not comparable with an FID, whose features are Inception's, nor between sets of different sizes: few pictures bias it upwards.
    torchmetrics does the arithmetic; None where it is not installed.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError:
        return None

    class Features(torch.nn.Module):
        num_features = int(features(a[:1]).shape[1])

        def forward(self, x: Tensor) -> Tensor:
            return features(x)

    metric = FrechetInceptionDistance(Features(), normalize=True)
    metric.update(a, real=False)
    metric.update(b, real=True)
    return float(metric.compute())


_Value = TypeVar("_Value")


def _stored(file: Path, parse: Callable[[Any], _Value]) -> _Value:
    """What an earlier call left in the folder.

    Raises:
        RunError: it is damaged; the message names the key.
    """
    try:
        return parse(read_json(file))
    except (OSError, ValueError) as e:
        raise RunError(f"{file} is damaged ({e}); delete it, and the same command makes it again.") from None


def _watched(target: Target, g: Generation, steps: int | None = None) -> tuple[Float[Tensor, "sample step"], Tensor]:
    """Magnitudes at the gates' steps, and the state after ``steps`` steps or the last one."""
    seen = Magnitude()
    for step in sample(target, g):
        if step.index < max(GATES):
            seen.update(step)
        if step.index + 1 == steps:
            break
    assert step.x_next is not None
    return seen.per_step(), step.x_next


def _windows(sizes: Float[Tensor, "sample step"]) -> dict[str, list[float]]:
    return {str(k): [round(v, 5) for v in sizes[:, :k].mean(1).tolist()] for k in GATES}


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
