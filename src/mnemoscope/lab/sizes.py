"""Study: the same pictures, in trainings on more and more others.

The models differ in their training set alone: nested sets of pictures, each picture shown equally often, always the same pixels, for
the same number of steps. What is measured are pictures of the smallest set, which all models were shown, and pictures that none was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, LDMPipeline
from torch import Tensor

from ..demo.train import SCHEDULE, SEED, Trainer, places, unconditional_unet, velocity_loss
from ..demo.world import Row, World
from ..errors import UsageError
from ..measure.invmm import InvMM
from ..models.load import load, open_pipeline
from ..similarity.reference import ReferenceSet
from .pages import Finding, table
from .stored import BATCH, as_files, cell, courses, finite, measured_by, method_on, plain_drawings, results

__all__ = ["SIZES", "STEPS", "rows_of", "sizes", "train"]

SIZES = (48, 384, 1600)
"""Pictures in the training sets."""

STEPS = 1000
"""Training steps of each model."""

DRAWN = 64
"""Pictures in a step."""

NATURAL = 512
"""Samples of plain noise from each model."""


def sizes(model: str, work: Path, n: int) -> Finding:
    """Score against training-set size; trains the models first, where that has not been done."""
    if model != "demo-unconditional":
        raise UsageError("sizes are those of training sets of models like demo-unconditional; name that one.")
    if n > SIZES[0]:
        raise UsageError(f"{n} pictures that all models were shown: the smallest set holds {SIZES[0]}; ask for fewer.")
    world = World("unconditional")
    shown, held = rows_of(world)
    some = as_files(world, shown[:n] + held[:n], work / "pictures")
    rows, facts = [], {}
    lines: dict[str, list[tuple[int, Sequence[float]]]] = {}
    for size in SIZES:
        folder = train(world, shown[:size], work / f"sizes-{size}")
        method = method_on(world, load(str(folder), dtype="float32"))
        found = results(method, some, work / f"sizes-{size}" / "measured")
        members, others = [m.score for m in found[:n]], [m.score for m in found[n:]]
        copies = _copies(world, method, shown[:size])
        lines.setdefault("shown", []).append((size, members))
        lines.setdefault("held out", []).append((size, others))
        rows.append([
            f"{size}", f"{STEPS * DRAWN / size:.0f}", *(cell(scores) for scores in (members, others)), f"{copies} of {NATURAL}",
        ])  # fmt: skip
        facts[size] = {"shown": [*map(finite, members)], "held out": [*map(finite, others)], "copies": copies}
    text = "\n\n".join([
        measured_by("sizes", model, method, some, n) + f" {STEPS} training steps of {DRAWN}.",
        table(["training pictures", "times each was shown", "reproduced and median score, shown to all models",
               "the same, held out", "samples that are a training picture"], rows),
    ])  # fmt: skip
    return Finding(
        "training-set-size",
        "stored.md",
        text,
        {str(k): v for k, v in facts.items()},
        courses(lines, "pictures in training"),
    )


def rows_of(world: World) -> tuple[list[Row], list[Row]]:
    """Pictures in the order in which sets take them, and held-out ones of concepts that the smallest set lacks."""
    shown = _order(world)
    return shown, [row for row in world.of("heldout") if row.concept not in {r.concept for r in shown[: SIZES[0]]}]


def _order(world: World) -> list[Row]:
    """One picture of each concept first, so that the small sets hold no two of a kind; the same order each time."""
    rows = {row.picture: row for row in world.of("ordinary", "planted")}.values()
    first = {row.concept: row for row in rows}
    order = [*first.values(), *(row for row in rows if first[row.concept] is not row)]
    chance = torch.randperm(len(first), generator=torch.Generator().manual_seed(SEED)).tolist()
    return [order[i] for i in chance] + order[len(first) :]


def train(world: World, rows: list[Row], folder: Path, steps: int = STEPS) -> Path:
    """A model of the bundled one's size on these pictures; goes on where it was stopped. Returns its pipeline's folder."""
    done = folder / "pipeline"
    if (done / "model_index.json").exists():
        return done
    torch.manual_seed(SEED)  # initial weights only
    vae = open_pipeline("demo-unconditional", dtype="float32", device="cpu")[0].vqvae.requires_grad_(False)
    unet, scheduler = unconditional_unet(), DDIMScheduler(**SCHEDULE)
    pictures = world.pictures([row.picture for row in rows]) * 2 - 1
    with torch.no_grad():
        parts = [vae.encode(part).latent_dist.mean for part in pictures.split(BATCH)]
    latents = torch.cat(parts) * vae.config.scaling_factor
    trainer = Trainer({"unet": unet}, folder, steps=steps, lr=8e-4, fall=lambda share: min(1, 2 * (1 - share)))

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        return velocity_loss(unet, scheduler, latents[places(len(latents), step, DRAWN)], generator)

    started = time.time()
    trainer.run(loss, lambda step: None)
    print(f"{len(rows)} pictures: trained in {(time.time() - started) / 60:.1f} min", flush=True)
    with trainer.averaged():
        LDMPipeline(vae, unet, scheduler).save_pretrained(done)
    return done


def _copies(world: World, method: InvMM, rows: list[Row]) -> int:
    """Samples of plain noise that are one of the model's own training pictures."""
    names = [row.picture for row in rows]
    reference = ReferenceSet.of(names, world.pictures(names), method.descriptor)
    reference.threshold = world.reference.threshold
    return sum(bool(m.copy_found) for some in plain_drawings(method, NATURAL) for m in reference.nearest(some))
