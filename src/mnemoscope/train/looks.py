"""Looks at a model while it is trained: its pictures of validation prompts, and its canaries. Nothing global is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..audit.batch import webp
from ..audit.check import check
from ..measure.base import build as build_measure
from ..measure.base import screen_of
from ..mitigate.canaries import CanaryPlan, CanaryWatch, near
from ..models.base import Target
from ..records.canaries import read_history, write_history
from ..records.store import write_whole
from ..similarity.base import build
from .cache import LatentCache
from .checkpoint import StepLog

__all__ = ["Canaries", "validate"]

VALIDATION = "validation.jsonl"
STEPS = 25
"""Of the sampler."""


def validate(target: Target, prompts: Sequence[str], step: int, folder: Path) -> list[dict[str, Any]]:
    """Draw each prompt once, always from the same noise, and score it (Wen et al., ICLR 2024): files and numbers."""
    found = []
    for number, prompt in enumerate(prompts):
        result = check(target, prompt, seeds=1, steps=STEPS, images=True)
        assert result.images is not None
        file = write_whole(folder / f"step-{step:07d}-{number}.webp", webp(result.images[0]))
        found.append({"step": step, "prompt": prompt, "magnitude": result.score, "picture": file.name})
    StepLog(folder / VALIDATION).append(found)
    return found


class Canaries:
    """The canaries of one training, and what was found at each look.

    Args:
        plan: What is planted.
        captions: Of each canary, in the plan's order.
        target: The model, whose autoencoder says how a canary looks when it is copied as well as it can be.
        latents: Of the training set.
        descriptor: What says how similar two pictures are.
        threshold: Similarity above which a generation is a copy; None: nothing is generated.
        screen: Name of a measure of how strongly each canary is stored; None: none.
        history: File of the readings.
    """

    def __init__(
        self,
        plan: CanaryPlan,
        captions: Sequence[str],
        target: Target,
        latents: LatentCache,
        *,
        descriptor: str,
        threshold: float | None,
        screen: str | None,
        history: Path,
    ):
        rows = [c.row for c in plan.canaries]
        pictures = {}
        if threshold is not None or screen is not None:
            means = torch.from_numpy(latents.moments[rows, 0, 0])
            pictures = dict(zip(rows, target.decode(means), strict=True))
        copied = None if threshold is None else near(build(descriptor), pictures, threshold)
        stored = None
        if screen is not None:
            stored = screen_of(build_measure(screen), pictures, dict(zip(rows, captions, strict=True)))
        self.watch = CanaryWatch(plan, captions, copied=copied, screen=stored, steps=STEPS)
        self.history = history

    def go_on_from(self, step: int) -> None:
        """Take up the readings up to a step."""
        if self.history.is_file():
            self.watch.history = [r for r in read_history(self.history) if r.step <= step]

    def look(self, target: Target, step: int, *, write: bool) -> bool:
        """Take a reading; says whether copies have set in."""
        stop = self.watch.look(target, step)
        if write:
            write_history(self.history, self.watch.history)
        return stop

    def words(self) -> str:
        """The last reading, level by level."""
        return ", ".join(
            f"{level.copies} copies magnitude {level.magnitude:.3f}"
            + ("" if level.copied is None else f", {level.copied}/{level.n} copied")
            + ("" if level.screen is None else f", stored {level.screen:.4g}")
            for level in self.watch.history[-1].levels
        )
