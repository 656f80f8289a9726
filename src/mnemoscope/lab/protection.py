"""Study: what each protection of a fine-tuning is worth, on planted pictures.

The bundled text model is fine-tuned (LoRA) on pictures that it was never shown: some lie in the folder many times, the others once.
Afterwards the captions of the repeated ones are drawn: how many of the drawings are the picture, and how well do they still show what the
caption says? Beside them ordinary captions of the bundled world: does the protection cost them anything? Trainings differ in the
protection and the seed alone.

Wen et al., ICLR 2024 (the filter); Somepalli et al., NeurIPS 2023 (changes of captions).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import stats
from ..demo.world import Row, World
from ..errors import UsageError
from ..models.base import Target
from ..models.load import load
from ..models.sampling import denoise, final
from ..records.store import write_whole
from ..similarity.captions import WorldCaptions
from ..train.config import AUGMENTATIONS, TrainConfig
from .pages import Finding, machine, table

__all__ = ["VARIANTS", "Outcome", "folder_of", "protection"]

REPEATED, COPIES, OTHERS, ORDINARY = 12, 24, 150, 24
"""Pictures that lie in the folder COPIES times, pictures that lie there once, and captions of neither that are drawn too."""

STEPS, BATCH, RANK, RATE = 400, 8, 16, 1e-3
SEEDS, SAMPLER = 4, 50

VARIANTS: dict[str, dict[str, Any]] = {
    "no protection": {},
    **{f"captions: {name}": {"augment": name} for name in AUGMENTATIONS},
    **{f"filter, τ = {tau:g}": {"filter": tau} for tau in (0.5, 1.0, 1.5)},
    "filter, τ(t)": {"filter": "auto"},
    "near-duplicates dropped": {"dedupe": "drop"},
}


@dataclass(frozen=True)
class Outcome:
    """One training, looked at afterwards.

    Attributes:
        copied: Drawings of each repeated picture's caption that are the picture, of :data:`SEEDS`.
        similarity: Of each of those drawings to its picture.
        fidelity: Mean caption score of them.
        ordinary: The same for ordinary captions.
        kept: Share of samples that were in the loss.
        seconds: Of the training; None: it was interrupted.
    """

    copied: list[int]
    similarity: list[float]
    fidelity: float
    ordinary: float
    kept: float
    seconds: float | None


def protection(model: str, work: Path, n: int) -> Finding:
    """Every protection with n training seeds, in one table; finished trainings are not made again."""
    if model != "demo":
        raise UsageError("protections are compared on fine-tunings of the bundled text model; name demo.")
    world, judge = World(), WorldCaptions()
    repeated, others, ordinary = chosen(world)
    data = folder_of(world, repeated, others, work / "protection" / "pictures")
    found: dict[str, list[Outcome]] = {}
    for seed in range(n):  # whole rounds, so that an interrupted study compares all protections
        for name, settings in VARIANTS.items():
            folder = work / "protection" / f"{name.replace(' ', '-')}-{seed}"
            outcome = _outcome(folder, settings, seed, data, world, judge, repeated, ordinary)
            found.setdefault(name, []).append(outcome)
            print(
                f"{name}, seed {seed}: {sum(outcome.copied)} of {SEEDS * REPEATED} copied, fidelity {outcome.fidelity:.3f}",
                flush=True,
            )
    base = _drawn_outcome(load("demo"), world, judge, repeated, ordinary, kept=1.0, seconds=None)
    rows = [_row("not fine-tuned", [base]), *(_row(name, made) for name, made in found.items())]
    text = "\n\n".join([
        f"Measured by `python -m mnemoscope.lab protection demo --pictures {n}` on {machine()}: LoRA of rank {RANK}, {STEPS} steps of "
        f"{BATCH}, {REPEATED} pictures {COPIES} times and {OTHERS} once, {n} training seeds, {SEEDS} drawings of each caption (DDIM "
        f"{SAMPLER}), copies at a similarity of {world.same_picture:.3f}. Intervals (95 %) are over pictures; fidelity is {judge.name}.",
        table(["protection", "drawings that are the repeated picture", "mean similarity", "fidelity, repeated captions",
               "fidelity, ordinary captions", "samples in the loss", "seconds"], rows),
    ])  # fmt: skip
    facts = {name: [asdict(outcome) for outcome in made] for name, made in {**found, "not fine-tuned": [base]}.items()}
    return Finding("protection", "protection.md", text, facts)


def chosen(world: World) -> tuple[list[Row], list[Row], list[Row]]:
    """Pictures to repeat, pictures to show once, and ordinary captions: of different concepts, the same ones each time."""
    held = list({row.concept: row for row in reversed(world.of("heldout"))}.values())
    if len(held) < REPEATED + OTHERS:
        # Both pictures of a concept, if one of each is not enough.
        held += [row for row in world.of("heldout") if row not in held]
    ordinary = world.captions("ordinary")
    return held[:REPEATED], held[REPEATED : REPEATED + OTHERS], ordinary[:: len(ordinary) // ORDINARY][:ORDINARY]


def folder_of(world: World, repeated: Sequence[Row], others: Sequence[Row], folder: Path) -> Path:
    """The training pictures as somebody's folder: copies are files of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row, count in [*((row, COPIES) for row in repeated), *((row, 1) for row in others)]:
        pixels = (255 * world.pictures([row.picture])[0]).round().byte().permute(1, 2, 0).numpy()
        for k in range(count):
            name = f"{row.picture}-{k:02d}.png"
            if not (folder / name).exists():
                Image.fromarray(pixels).save(folder / name)
            lines.append(json.dumps({"file_name": name, "text": row.caption}) + "\n")
    write_whole(folder / "metadata.jsonl", "".join(lines).encode())
    return folder


def _outcome(
    folder: Path, settings: Mapping[str, Any], seed: int, data: Path, world: World, judge: WorldCaptions,
    repeated: Sequence[Row], ordinary: Sequence[Row],
) -> Outcome:  # fmt: skip
    file = folder / "outcome.json"
    if file.exists():
        return Outcome(**json.loads(file.read_bytes()))
    config = TrainConfig(
        model="demo", data=str(data), out=str(folder), steps=STEPS, batch_size=BATCH, lora=RANK, lr=RATE, caption_dropout=0.1,
        seed=seed, **settings,
    )  # fmt: skip
    from ..train.run import fine_tune  # needs an extra that the other studies do not

    whole = not (folder / "train.json").exists()
    began = time.perf_counter()
    trained = fine_tune(config)
    seconds = time.perf_counter() - began if whole else None
    target = load("demo", lora=trained.result)
    outcome = _drawn_outcome(target, world, judge, repeated, ordinary, kept=trained.kept, seconds=seconds)
    write_whole(file, (json.dumps(asdict(outcome)) + "\n").encode())
    return outcome


def _drawn_outcome(
    target: Target, world: World, judge: WorldCaptions, repeated: Sequence[Row], ordinary: Sequence[Row], *, kept: float,
    seconds: float | None,
) -> Outcome:  # fmt: skip
    """Draw all captions and look at the drawings."""
    own = world.reference.descriptor(world.pictures([row.picture for row in repeated]))
    captions = [row.caption for row in repeated]
    drawings = _drawings(target, captions)
    similar = (world.reference.descriptor(drawings) * own.repeat_interleave(SEEDS, 0)).sum(1).view(len(captions), SEEDS)
    others = [row.caption for row in ordinary]
    return Outcome(
        copied=(similar >= world.same_picture).sum(1).tolist(),
        similarity=similar.flatten().tolist(),
        fidelity=float(judge(drawings, [c for c in captions for _ in range(SEEDS)]).mean()),
        ordinary=float(judge(_drawings(target, others), [c for c in others for _ in range(SEEDS)]).mean()),
        kept=kept,
        seconds=seconds,
    )


def _drawings(target: Target, captions: Sequence[str]) -> Tensor:
    """:data:`SEEDS` pictures of each caption, from the same noises for all."""
    null, made = target.encode([""]), []
    for start in range(0, len(captions), 8):
        some = captions[start : start + 8]
        cond = target.encode([caption for caption in some for _ in range(SEEDS)])
        noise = target.noise(list(range(SEEDS)) * len(some))
        made.append(target.decode(final(denoise(target, noise, cond, null, steps=SAMPLER))))
    return torch.cat(made)


def _row(name: str, made: Sequence[Outcome]) -> list[str]:
    """Means over training seeds; the interval is over pictures, whose drawings belong together."""
    copied = np.array([outcome.copied for outcome in made]) / SEEDS
    pictures = np.tile(np.arange(copied.shape[1]), len(copied))
    rate = stats.clustered(lambda values: float(np.mean(values)), copied.flatten(), pictures, share=True)
    of = {key: float(np.mean([getattr(outcome, key) for outcome in made])) for key in ("fidelity", "ordinary", "kept")}
    seconds = [outcome.seconds for outcome in made if outcome.seconds]
    return [
        name, f"{rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}]", f"{np.mean([outcome.similarity for outcome in made]):.2f}",
        f"{of['fidelity']:.3f}", f"{of['ordinary']:.3f}", f"{of['kept']:.0%}", f"{np.mean(seconds):.0f}" if seconds else "–",
    ]  # fmt: skip
