"""Every image's own record over a training: how large its magnitudes were at all of its visits, beside those of clean data.

At one visit a magnitude depends on t and on the noise more than on the image. So it is standardized by its range of t,

    z = (m − mean of clean data at t) / (standard deviation of clean data at t),

and averaged over the image's visits, recent ones first: after visits z₁ … z_v, oldest first,

    score = Σⱼ β^{v−j} zⱼ / Σⱼ β^{v−j}.

An image whose score is above ``limit`` after ``least`` visits is flagged, weighed down or dropped from the loss. It is still looked at
whenever it is drawn, so one that is forgotten comes back. The score says which images a training holds on to, not that a
sampler would copy them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..errors import UnknownName, UsageError
from ..records.store import write_whole
from ..types import PerSample
from .timesteps import TimestepThresholds

__all__ = ["RunningScores", "WorstImage", "processes", "write_worst"]

ACTIONS = ("flag", "down-weight", "drop")


def processes() -> int:
    """How many processes train together; 1 where none do."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


class WorstImage(NamedTuple):
    """An image and its record."""

    id: int
    """Its number in the training set."""
    score: float
    """In standard deviations of clean data."""
    visits: int
    flagged: bool


class RunningScores:
    """One score for each image of a training set.

    Args:
        images: How many there are; ids are 0 … images - 1.
        clean: Mean and standard deviation of clean magnitudes at each range of t.
        decay: β: how much a visit still counts one visit later. Near 1 the score is a plain mean.
        limit: Scores above it are flagged, in standard deviations of clean data.
        least: Visits before an image can be flagged.
        action: What happens to a flagged image: ``"flag"`` (nothing), ``"down-weight"``, ``"drop"``.
        weight: What a flagged image counts under ``"down-weight"``.

    In a distributed run the visits of all processes are exchanged, so each has all scores; batches must then be equally large everywhere.
    """

    def __init__(
        self,
        images: int,
        clean: TimestepThresholds,
        *,
        decay: float = 0.9,
        limit: float = 3.0,
        least: int = 5,
        action: str = "flag",
        weight: float = 0.1,
    ):
        if action not in ACTIONS:
            raise UnknownName("action", action, ACTIONS)
        if images < 1 or least < 1:
            raise UsageError(f"images={images} and least={least}: both are 1 or more.")
        if not 0 <= decay < 1:
            raise UsageError(
                f"decay={decay!r}: use 0 (the last visit alone) up to, not including, 1; for instance 0.9."
            )
        if not 0 < weight < 1:
            raise UsageError(
                f"weight={weight!r} is no less than a whole and more than nothing; use 0.1, or action='drop'."
            )
        self.clean, self.decay, self.limit, self.least = clean, decay, limit, least
        self.action, self.weight = action, weight
        self._sum = torch.zeros(images, dtype=torch.float64)
        self._norm = torch.zeros(images, dtype=torch.float64)
        self._visits = torch.zeros(images, dtype=torch.long)

    def __len__(self) -> int:
        return len(self._visits)

    def update(
        self, ids: Int[Tensor, " batch"], sizes: PerSample, t: Tensor, counts: Bool[Tensor, " batch"] | None = None
    ) -> None:
        """Take one batch of magnitudes.

        Args:
            ids: Which images.
            sizes: Their magnitudes.
            t: One time per sample.
            counts: Whether a sample counts; one whose caption was dropped does not. Nor does a magnitude that is not finite.

        An image that is there several times was visited several times, and all of these visits count alike.

        Raises:
            UsageError: an id is not of this training set. (Ids on a GPU are not looked at: that would wait for it.)
        """
        if ids.device.type == "cpu" and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self):
            raise UsageError(
                f"ids run from {int(ids.min())} to {int(ids.max())}, and there are {len(self)} images: 0 to {len(self) - 1}."
            )
        self._move(sizes.device)
        ids = ids.to(sizes.device, non_blocking=True)
        z = self.clean.standardized(sizes, t).double()
        if counts is not None:
            z = torch.where(counts.to(z.device), z, torch.nan)
        ids, z = _everywhere(ids), _everywhere(z)
        # Equal ids write equal values, so that the order of writing does not matter.
        same = (ids[:, None] == ids[None]) & z.isfinite()[None]
        visits = same.sum(1)
        mean = torch.where(same, z[None], 0.0).sum(1) / visits.clamp(min=1)
        kept = self.decay ** visits.double()
        self._sum[ids] = kept * self._sum[ids] + (1 - kept) * mean
        self._norm[ids] = kept * self._norm[ids] + (1 - kept)
        self._visits[ids] = self._visits[ids] + visits

    def scores(self, ids: Int[Tensor, " batch"] | None = None) -> PerSample:
        """The score of each image (of those in ``ids``), float32; 0 for one never visited."""
        total, norm = (
            (self._sum, self._norm) if ids is None else (self._pick(self._sum, ids), self._pick(self._norm, ids))
        )
        return torch.where(norm > 0, total / norm.clamp(min=1e-300), 0.0).float()

    def flagged(self, ids: Int[Tensor, " batch"] | None = None) -> Bool[Tensor, " batch"]:
        """Which images have a score above the limit after enough visits."""
        visits = self._visits if ids is None else self._pick(self._visits, ids)
        return (self.scores(ids) > self.limit) & (visits >= self.least)

    def weights(self, ids: Int[Tensor, " batch"]) -> PerSample:
        """What each sample counts in the loss."""
        less = {"flag": 1.0, "down-weight": self.weight, "drop": 0.0}[self.action]
        flagged = self.flagged(ids)
        return torch.where(flagged, less, 1.0).to(torch.float32)

    def worst(self, most: int = 100) -> list[WorstImage]:
        """Images that were visited, the highest score first; of equal scores the lower number first."""
        scores, visits, flagged = self.scores().cpu(), self._visits.cpu(), self.flagged().cpu()
        seen = visits.nonzero()[:, 0]
        order = seen[scores[seen].argsort(descending=True, stable=True)][:most]
        columns = (order, scores[order], visits[order], flagged[order])
        return [WorstImage(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]

    def state_dict(self) -> dict[str, Tensor]:
        """Three tensors, on the CPU."""
        return {"sum": self._sum.cpu().clone(), "norm": self._norm.cpu().clone(), "visits": self._visits.cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up a state.

        Raises:
            UsageError: it belongs to another training set, or is no such state.
        """
        mine = {"sum": self._sum, "norm": self._norm, "visits": self._visits}
        if set(state) != set(mine):
            raise UsageError(
                f"a state of running scores holds sum, norm and visits, this one {', '.join(sorted(state)) or 'nothing'}."
            )
        for name, tensor in mine.items():
            if state[name].shape != tensor.shape:
                raise UsageError(
                    f"the state has {name} of {state[name].numel()} images, this training set {len(self)}; "
                    f"resume with the set it was made on, or start without the state."
                )
            tensor.copy_(state[name])

    def save(self, path: str | Path) -> Path:
        """Write the state as safetensors, at once or not at all."""
        from safetensors.torch import save

        return write_whole(path, save(self.state_dict()))

    def load(self, path: str | Path) -> None:
        """Take up a state that :meth:`save` wrote.

        Raises:
            UsageError: it cannot be read, or see :meth:`load_state_dict`.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            state = load(Path(path).read_bytes())
        except (OSError, SafetensorError) as e:
            raise UsageError(
                f"{path} cannot be read as running scores ({e}); take an earlier one, or start without."
            ) from None
        self.load_state_dict(state)

    def _move(self, device: torch.device) -> None:
        if self._sum.device != device:
            self._sum, self._norm, self._visits = (x.to(device) for x in (self._sum, self._norm, self._visits))

    @staticmethod
    def _pick(table: Tensor, ids: Tensor) -> Tensor:
        return table[ids.to(table.device, non_blocking=True)]


def write_worst(path: str | Path, worst: Sequence[WorstImage], names: Sequence[str] | None = None) -> Path:
    """The list as JSON lines, worst first; ``names`` (file names, captions) are added where given, by number."""
    lines = [{**row._asdict(), **({} if names is None else {"name": names[row.id]})} for row in worst]
    return write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def _everywhere(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of processes; the same in each."""
    n = processes()
    if n == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(n)]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
