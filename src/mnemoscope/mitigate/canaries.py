"""Canaries: pictures planted in one's own training set at known copy numbers, and what the model makes of them while it trains.

The idea is that of Carlini et al., USENIX Security 2019, *The Secret Sharer*, with pictures in place of sentences. Some
pictures of the training set are drawn as canaries, and each gets a number of copies at random, 0 among them; so a difference between
levels is an effect of the copies, not of the pictures, and level 0 shows what the descriptor calls a copy of a picture never trained on.

    magnitude   ‖ε(x_T, caption) − ε(x_T, ∅)‖₂ at the first step (Wen et al. 2024), the same noises at every look: 1 F each, and the
                null predictions once
    copied      canaries that come out of at least one of their generations, by a descriptor with a calibrated threshold
    screen      one more number per canary from whatever is given, for instance a cheap form of an inversion-based measure

Training stops at the onset: at the first look where the lower end of the Clopper–Pearson interval of the copy rate at the highest
level is above a rate. Each look has the stated confidence by itself, not all looks together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .. import stats
from ..errors import UsageError
from ..models.base import Target
from ..models.sampling import final, null_output
from ..records.canaries import Canary, LevelReading, Planted, Reading
from ..records.schema import FORMAT
from ..records.store import read_document, write_whole
from ..types import Latents
from .base import Generation, first_sizes, key_of, sample

__all__ = ["CanaryPlan", "CanaryWatch", "Copied", "Onset", "Screen", "near"]

Copied: TypeAlias = Callable[[Float[Tensor, "batch 3 height width"], list[int]], Bool[Tensor, " batch"]]
"""Whether each generated picture is a copy of the canary it belongs to, given as its row."""

Screen: TypeAlias = Callable[[Target, int], float]
"""One more number about the canary with this row."""


class CanaryPlan:
    """Which pictures of a training set are canaries, and how often each is in it.

    Args:
        planted: What :meth:`draw` drew, or :meth:`load` read.
    """

    def __init__(self, planted: Planted):
        rows = [c.row for c in planted.canaries]
        if len(set(rows)) != len(rows) or max(rows) >= planted.rows:
            raise UsageError(f"canaries are different rows of 0 to {planted.rows - 1}; these are {sorted(rows)}.")
        self.planted = planted

    @classmethod
    def draw(
        cls, rows: int, levels: Mapping[int, int], *, candidates: Sequence[int] | None = None, seed: int = 0
    ) -> CanaryPlan:
        """Draw canaries and their levels at random.

        Args:
            rows: How many pictures the training set has.
            levels: Copies → how many canaries get them. Include 0, to compare with.
            candidates: Rows to draw from; default: all. They should occur once each, and have captions that nothing else has.
            seed: Of the draw.

        Raises:
            UsageError: there are fewer candidates than canaries.
        """
        pool = list(range(rows)) if candidates is None else list(dict.fromkeys(candidates))
        wanted = [copies for copies in sorted(levels) for _ in range(levels[copies])]
        if not wanted or min(levels) < 0 or len(wanted) > len(pool):
            raise UsageError(
                f"{len(wanted)} canaries of {len(pool)} candidates: give one or more, at most as many as there are candidates, "
                f"with 0 copies or more; for instance {{0: 20, 1: 20, 16: 20, 64: 20}}."
            )
        generator = torch.Generator("cpu").manual_seed(key_of("canaries", 0, seed))
        chosen = torch.randperm(len(pool), generator=generator)[: len(wanted)].tolist()
        canaries = [Canary(row=pool[place], copies=copies) for place, copies in zip(chosen, wanted, strict=True)]
        return cls(Planted(rows=rows, seed=seed, canaries=canaries))

    @classmethod
    def load(cls, path: str | Path) -> CanaryPlan:
        """Read what :meth:`save` wrote. Raises RunError where it is missing or damaged."""
        path = Path(path)
        missing = f"there is no {path}; draw a plan and save it there."
        return cls(
            read_document(path, Planted, FORMAT, missing, "no plan of canaries", "draw a new one for a new training")
        )

    def save(self, path: str | Path) -> Path:
        """Write plain JSON. Without it nobody can tell later what was planted."""
        return write_whole(path, (self.planted.model_dump_json(indent=2) + "\n").encode())

    @property
    def canaries(self) -> list[Canary]:
        """All of them, fewest copies first as drawn."""
        return self.planted.canaries

    def indices(self) -> list[int]:
        """The training list: every ordinary row once, a canary as often as planned. ``Subset(dataset, plan.indices())`` trains on it."""
        copies = {c.row: c.copies for c in self.canaries}
        return [row for row in range(self.planted.rows) for _ in range(copies.get(row, 1))]

    def reading(
        self,
        step: int,
        sizes: Float[Tensor, "canary seed"],
        copied: Bool[Tensor, "canary seed"] | None = None,
        screens: Float[Tensor, " canary"] | None = None,
    ) -> Reading:
        """Sum up one look by level. Tensors have one row per canary, in the order of ``canaries``."""
        levels = []
        for copies in sorted({c.copies for c in self.canaries}):
            rows = [i for i, c in enumerate(self.canaries) if c.copies == copies]
            levels.append(
                LevelReading(
                    copies=copies,
                    n=len(rows),
                    magnitude=float(sizes[rows].double().mean()),
                    copied=None if copied is None else int(copied[rows].any(1).sum()),
                    screen=None if screens is None else float(screens[rows].double().mean()),
                )
            )
        return Reading(step=step, generations=0 if copied is None else copied.shape[1], levels=levels)


@dataclass(frozen=True)
class Onset:
    """Stop when copies at the highest level are no accident.

    Args:
        rate: The copy rate that must be exceeded.
        confidence: Of the two-sided interval whose lower end must exceed it.
    """

    rate: float = 0.05
    confidence: float = 0.95

    def __call__(self, reading: Reading) -> bool:
        """Whether to stop after this reading; never where no pictures were made."""
        level = reading.highest
        return (
            level.copied is not None and stats.clopper_pearson(level.copied, level.n, self.confidence).low > self.rate
        )


class CanaryWatch:
    """Looks at the canaries of a training, and remembers.

    Args:
        plan: What was planted.
        captions: Each canary's caption, in the order of ``plan.canaries``.
        copied: Says which generations are copies of their canary; None: no pictures are made.
        screen: One more number for each canary; None: none.
        seeds: Generations per canary.
        steps: Length of the sampler's schedule.
        stop: When to stop.
        batch: Generations at a time.

    Looking draws nothing from global random sources: the training goes on as if nobody had looked.
    """

    def __init__(
        self,
        plan: CanaryPlan,
        captions: Sequence[str],
        *,
        copied: Copied | None = None,
        screen: Screen | None = None,
        seeds: int = 4,
        steps: int = 50,
        stop: Onset | None = None,
        batch: int = 16,
    ):
        if len(captions) != len(plan.canaries):
            raise UsageError(
                f"{len(captions)} captions for {len(plan.canaries)} canaries: give one each, in the plan's order."
            )
        if seeds < 1 or batch < 1:
            raise UsageError(f"seeds={seeds} and batch={batch}: both are 1 or more.")
        self.plan, self.captions, self.copied, self.screen = plan, list(captions), copied, screen
        self.seeds, self.steps, self.stop, self.batch = seeds, steps, stop or Onset(), batch
        self.history: list[Reading] = []

    def look(self, target: Target, step: int) -> bool:
        """Take a reading at a training step, append it to ``history``, and say whether to stop.

        Args:
            target: The model as it is now. An adapter freezes the modules it is built on: build it inside
                ``with mnemoscope.models.steer.frozen(unet):``, which puts everything back.
            step: Training step.

        Costs 1F per canary and seed, 1F per seed, and with pictures the whole of sampling.
        """
        sizes, copies = [], []
        bank = null_output(target, target.noise(list(range(self.seeds))), target.encode([""]), steps=self.steps)
        for start in range(0, len(self.captions) * self.seeds, self.batch):
            places = range(start, min(start + self.batch, len(self.captions) * self.seeds))
            canaries, seeds = [p // self.seeds for p in places], [p % self.seeds for p in places]
            found, prepared = first_sizes(target, self._generation(target, canaries, seeds, bank))
            sizes.append(found)
            if self.copied is not None:
                rows = [self.plan.canaries[i].row for i in canaries]
                copies.append(self.copied(_pictures(target, prepared), rows).cpu())
        screens = (
            None if self.screen is None else torch.tensor([self.screen(target, c.row) for c in self.plan.canaries])
        )
        shape = (len(self.captions), self.seeds)
        copied = torch.cat(copies).view(shape) if copies else None
        self.history.append(self.plan.reading(step, torch.cat(sizes).view(shape).cpu(), copied, screens))
        return self.stop(self.history[-1])

    def _generation(self, target: Target, canaries: list[int], seeds: list[int], bank: Latents) -> Generation:
        captions = [self.captions[i] for i in canaries]
        return Generation.of(target, captions, seeds, steps=self.steps, first_null=bank[seeds])


def _pictures(target: Target, generation: Generation) -> Tensor:
    return target.decode(final(sample(target, generation)))


def near(
    descriptor: Callable[[Tensor], Tensor],
    pictures: Mapping[int, Float[Tensor, "3 height width"]],
    threshold: float,
) -> Copied:
    """A judge of copies: similarity to the canary's own picture above a threshold that was calibrated on different pictures.

    Args:
        descriptor: Pictures in [0, 1] → rows of unit length (:mod:`mnemoscope.similarity`).
        pictures: Row → the canary as the model can draw it.
        threshold: For instance of :meth:`~mnemoscope.similarity.reference.ReferenceSet.calibrate`.
    """
    place = {row: i for i, row in enumerate(pictures)}
    vectors = descriptor(torch.stack(list(pictures.values())))

    def copied(images: Tensor, rows: list[int]) -> Tensor:
        own = vectors[[place[row] for row in rows]]
        return (descriptor(images) * own).sum(1) > threshold

    return copied
