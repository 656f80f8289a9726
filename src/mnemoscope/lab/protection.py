"""Study: what each protection of a fine-tuning is worth, on planted pictures.

The bundled text model is fine-tuned (LoRA) on ordinary pictures of its own world, which it was shown once in an epoch and draws without
copying: some lie in the folder many times, the others once. Afterwards the captions of the repeated ones are drawn: how many of the
drawings are the picture, and how well do they still show what the caption says, as the model could before? Beside them ordinary captions
that lie in no folder: does the protection cost them anything? Trainings differ in the protection and the seed alone.

A filter leaves samples out, and a training that sees less copies less. So trainings without protection that are shorter stand beside it:
a protection is worth what it keeps of fidelity beyond them.

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
from ..report import svg
from ..similarity.captions import WorldCaptions
from ..train.config import AUGMENTATIONS, TrainConfig
from .pages import Finding, alone, machine, table

__all__ = ["VARIANTS", "Outcome", "folder_of", "protection"]

REPEATED, COPIES, OTHERS, ORDINARY = 12, 24, 150, 24
"""Pictures that lie in the folder COPIES times, pictures that lie there once, and captions of neither that are drawn too."""

UNPROTECTED = "no protection"
"""What the others are compared with."""

STEPS, BATCH, RANK, RATE = 400, 8, 16, 1e-3
SEEDS, SAMPLER = 4, 50

VARIANTS: dict[str, dict[str, Any]] = {
    UNPROTECTED: {},
    "no protection, a quarter of the steps": {"steps": STEPS // 4},
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
        seconds: Processor time of the training, of all threads, whatever else the machine does; None: it was interrupted.
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
    found = {"not fine-tuned": [base], **found}
    rates = {name: _copied(made) for name, made in found.items()}
    rows = [[str(k), *_row(name, found, rates)] for k, name in enumerate(found)]
    text = "\n\n".join([
        f"Measured by `python -m mnemoscope.lab protection demo --pictures {n}` on {machine()}: LoRA of rank {RANK}, {STEPS} steps of "
        f"{BATCH}, {REPEATED} pictures {COPIES} times and {OTHERS} once, {n} training seeds, {SEEDS} drawings of each caption (DDIM "
        f"{SAMPLER}), copies at a similarity of {world.same_picture:.3f}. Intervals (95 %) are over pictures; fidelity is {judge.name}; in "
        "brackets what was lost of it beside no protection.",
        table(["", "protection", "drawings that are the repeated picture", "of no protection's", "mean similarity",
               "fidelity, repeated captions", "fidelity, ordinary captions", "samples in the loss", "processor seconds"], rows),
    ])  # fmt: skip
    facts = {name: [asdict(outcome) for outcome in made] for name, made in found.items()}
    return Finding("protection", "protection.md", text, facts, _drawn(found, rates))


def chosen(world: World) -> tuple[list[Row], list[Row], list[Row]]:
    """Pictures to repeat, pictures to show once, and captions of neither: of different concepts, the same ones each time."""
    rows = list({row.concept: row for row in reversed(world.captions("ordinary"))}.values())
    some = rows[:: len(rows) // (REPEATED + OTHERS + ORDINARY)]
    return some[:REPEATED], some[REPEATED:][:OTHERS], some[REPEATED + OTHERS :][:ORDINARY]


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
        model="demo", data=str(data), out=str(folder), batch_size=BATCH, lora=RANK, lr=RATE, caption_dropout=0.1, seed=seed,
        **{"steps": STEPS, **settings},
    )  # fmt: skip
    from ..train.run import fine_tune  # needs an extra that the other studies do not

    whole = not (folder / "train.json").exists()
    began = time.process_time()
    trained = fine_tune(config)
    seconds = time.process_time() - began if whole else None
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


def _copied(made: Sequence[Outcome]) -> stats.Interval:
    """Over training seeds and drawings; the interval is over pictures, whose drawings belong together."""
    copied = np.array([outcome.copied for outcome in made]) / SEEDS
    pictures = np.tile(np.arange(copied.shape[1]), len(copied))
    return stats.clustered(lambda values: float(np.mean(values)), copied.flatten(), pictures, share=True)


def _mean(made: Sequence[Outcome], what: str) -> float:
    return float(np.mean([getattr(outcome, what) for outcome in made]))


def _row(name: str, found: Mapping[str, Sequence[Outcome]], rates: Mapping[str, stats.Interval]) -> list[str]:
    made, without, rate, unprotected = found[name], found[UNPROTECTED], rates[name], rates[UNPROTECTED].value
    fidelities = []
    for what in ("fidelity", "ordinary"):
        before, now = _mean(without, what), _mean(made, what)
        fidelities.append(
            f"{now:.3f}" + ("" if made is without or not before else f" ({(before - now) / before:+.0%})")
        )
    seconds = [outcome.seconds for outcome in made if outcome.seconds]
    return [
        name, f"{rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}]", f"{rate.value / unprotected:.0%}" if unprotected else "–",
        f"{_mean(made, 'similarity'):.2f}", *fidelities, f"{_mean(made, 'kept'):.0%}", f"{np.mean(seconds):.0f}" if seconds else "–",
    ]  # fmt: skip


def _drawn(found: Mapping[str, Sequence[Outcome]], rates: Mapping[str, stats.Interval]) -> str:
    """Copies against both fidelities: the further down and to the right, the better. Numbers are those of the table."""
    y = svg.fit([rate.high for rate in rates.values()], 300, 30, log=False, zero=True)
    marks = []
    for left, what, axis in (
        (70, "fidelity", "fidelity, repeated captions"),
        (420, "ordinary", "fidelity, ordinary captions"),
    ):
        x = svg.fit([_mean(made, what) for made in found.values()], left, left + 280, log=False)
        marks += [
            svg.x_axis(x, 300, axis),
            svg.y_axis(y, left, "drawings that are the picture" if left == 70 else "", as_percent=True),
        ]
        for k, (name, made) in enumerate(found.items()):
            at, rate = x(_mean(made, what)), rates[name]
            marks.append(svg.line(at, y(rate.low), at, y(rate.high), "line"))
            marks.append(svg.tag("circle", svg.tag("title", name), cx=at, cy=y(rate.value), r=4))
            marks.append(svg.text(at + 6, y(rate.value) - 5, str(k)))
    return alone(str(svg.drawing(720, 350, "Copies against fidelity", "A point for each protection, twice.", *marks)))
