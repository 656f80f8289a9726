"""Study: what each protection of a fine-tuning is worth, on planted pictures.

The bundled text model is fine-tuned, the whole UNet, on pictures of its own world: some lie in the folder many times, most of them once.
Afterwards the captions of the repeated ones are drawn: how many of the drawings are the picture, or copies of it, and how well do they
still show what the caption says? Beside them ordinary captions that lie in no folder: does the protection cost them anything? Trainings
differ in the protection and the seed alone. Two questions, by the pictures that are repeated:

* ``protection``: ordinary pictures, which the model was shown as often as any other. Does the protection keep them from being stored?
* ``forgetting``: planted pictures, which the model has stored. Does it forget them while it goes on being shown them?

A filter leaves samples out, and a training that sees less copies less. So a training without protection that is shorter stands beside it:
a protection is worth what it keeps of fidelity beyond it.

Wen et al., ICLR 2024 (the filter); Somepalli et al., NeurIPS 2023 (changes of captions).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
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
from ..records.documents import read_json
from ..records.store import digest, write_whole
from ..report import svg
from ..similarity.captions import WorldCaptions
from ..train.config import AUGMENTATIONS, TrainConfig
from .pages import Finding, alone, machine, table

__all__ = ["VARIANTS", "Outcome", "drawings", "folder_of", "forgetting", "protection"]

REPEATED, COPIES, OTHERS, ORDINARY, CLEAN = 12, 24, 720, 24, 40
"""Pictures that lie in the folder COPIES times, pictures that lie there once, captions of neither that are drawn too, and further pictures
that τ(t) is fitted on."""

UNPROTECTED = "no protection"
"""What the others are compared with."""

STEPS, BATCH, RATE = 500, 8, 1e-4
SEEDS, SAMPLER = 4, 25

VARIANTS: dict[str, dict[str, Any]] = {
    UNPROTECTED: {},
    "no protection, a quarter of the steps": {"steps": STEPS // 4},
    **{
        f"filter, τ(t) from {drop:.0%} of clean samples on": {"filter": "auto", "filter_drop": drop}
        for drop in (0.05, 0.25)
    },
    **{f"filter, τ = {tau:g}": {"filter": tau} for tau in (1.0, 2.0, 3.0)},
    "near-duplicates dropped": {"dedupe": "drop"},
    **{f"captions: {name}": {"augment": name} for name in AUGMENTATIONS},
}


STORED_COPIES = 24
"""Copies per epoch of the planted pictures that are to be forgotten: nearly every drawing of their captions is the picture."""

LESS = (
    UNPROTECTED,
    *(name for name, settings in VARIANTS.items() if settings.get("filter") == "auto"),
    "filter, τ = 2",
    "near-duplicates dropped",
)
"""Protections that may make a model forget; the others leave repeated pictures in every step."""


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
    return _compared("protection", model, work, n, VARIANTS)


def forgetting(model: str, work: Path, n: int) -> Finding:
    """The same for pictures that are stored already."""
    return _compared("forgetting", model, work, n, {name: VARIANTS[name] for name in LESS})


def _compared(study: str, model: str, work: Path, n: int, variants: Mapping[str, dict[str, Any]]) -> Finding:
    if model != "demo":
        raise UsageError("protections are compared on fine-tunings of the bundled text model; name demo.")
    world, judge = World(), WorldCaptions()
    repeated, others, ordinary, clean = chosen(world)
    if study == "forgetting":
        repeated = world.of("planted", copies=STORED_COPIES)[:REPEATED]
    data = folder_of(
        world, [*((row, COPIES) for row in repeated), *((row, 1) for row in others)], work / study / "pictures"
    )
    known = folder_of(world, [(row, 1) for row in clean], work / study / "clean")
    found: dict[str, list[Outcome]] = {}
    for seed in range(n):  # whole rounds, so that an interrupted study compares all protections
        for name, settings in variants.items():
            folder = work / study / f"{name.replace(' ', '-')}-{seed}"
            own = settings | ({"clean": str(known)} if settings.get("filter") == "auto" else {})
            outcome = _outcome(folder, own, seed, data, world, judge, repeated, ordinary)
            found.setdefault(name, []).append(outcome)
            print(
                f"{name}, seed {seed}: {sum(outcome.copied)} of {SEEDS * REPEATED} are the picture, fidelity {outcome.fidelity:.3f}",
                flush=True,
            )
    base = _drawn_outcome(load("demo"), world, judge, repeated, ordinary, kept=1.0, seconds=None)
    found = {"not fine-tuned": [base], **found}
    rates = {name: _rate(made, world.same_picture) for name, made in found.items()}
    copies = {name: _rate(made, world.reference.threshold) for name, made in found.items()}
    rows = [[str(k), *_row(name, found, rates, copies)] for k, name in enumerate(found)]
    text = "\n\n".join([
        f"Measured by `python -m mnemoscope.lab {study} demo --pictures {n}` on {machine()}: the whole UNet, {STEPS} steps of "
        f"{BATCH}, {REPEATED} pictures {COPIES} times and {OTHERS} once, {n} training seeds, {SEEDS} drawings of each caption (DDIM "
        f"{SAMPLER}). The picture: a similarity of {world.same_picture:.3f}; a copy of it: of {world.reference.threshold:.3f}. Intervals "
        f"(95 %) are over pictures; fidelity is {judge.name}; in brackets what was lost of it beside no protection.",
        table(["", "protection", "drawings that are the repeated picture", "copies of it", "copies, of no protection's", "mean similarity",
               "fidelity, repeated captions", "fidelity, ordinary captions", "samples in the loss", "processor seconds"], rows),
    ])  # fmt: skip
    facts = {name: [asdict(outcome) for outcome in made] for name, made in found.items()}
    return Finding(study, "protection.md", text, facts, _drawn(found, copies))


def chosen(world: World) -> tuple[list[Row], list[Row], list[Row], list[Row]]:
    """Pictures to repeat, to show once, to draw captions of only, and to fit τ(t) on: of different concepts, the same ones each time."""
    rows = list({row.concept: row for row in reversed(world.captions("ordinary"))}.values())
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    drawn = (rows[k] for k in order)
    repeated, others, ordinary, clean = (list(islice(drawn, n)) for n in (REPEATED, OTHERS, ORDINARY, CLEAN))
    return repeated, others, ordinary, clean


def folder_of(world: World, rows: Sequence[tuple[Row, int]], folder: Path) -> Path:
    """Pictures as somebody's folder, each as often as it says: copies are files of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row, count in rows:
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
    config = TrainConfig(
        model="demo", data=str(data), out=str(folder), batch_size=BATCH, lr=RATE, caption_dropout=0.1, seed=seed,
        **{"steps": STEPS, **settings},
    )  # fmt: skip
    lists = [[row.id for row in some] for some in (repeated, ordinary)]
    file = folder / f"outcome-{digest([config.model_dump(mode='json'), COPIES, OTHERS, SEEDS, SAMPLER, lists])}.json"
    if file.exists():
        return Outcome(**read_json(file))
    from ..train.run import fine_tune  # needs an extra that the other studies do not

    whole = not (folder / "train.json").exists()
    began = time.process_time()
    trained = fine_tune(config)
    seconds = time.process_time() - began if whole else None
    target = load(str(trained.result))
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
    made = drawings(target, captions, seeds=SEEDS, steps=SAMPLER)
    similar = (world.reference.descriptor(made) * own.repeat_interleave(SEEDS, 0)).sum(1).view(len(captions), SEEDS)
    others = [row.caption for row in ordinary]
    unseen = drawings(target, others, seeds=SEEDS, steps=SAMPLER)
    return Outcome(
        copied=(similar >= world.same_picture).sum(1).tolist(),
        similarity=similar.flatten().tolist(),
        fidelity=float(judge(made, [c for c in captions for _ in range(SEEDS)]).mean()),
        ordinary=float(judge(unseen, [c for c in others for _ in range(SEEDS)]).mean()),
        kept=kept,
        seconds=seconds,
    )


def drawings(target: Target, captions: Sequence[str], *, seeds: int, steps: int) -> Tensor:
    """Pictures of each caption, one for each seed; from the same noises for all."""
    null, made = target.encode([""]), []
    for start in range(0, len(captions), 8):
        some = captions[start : start + 8]
        cond = target.encode([caption for caption in some for _ in range(seeds)])
        noise = target.noise(list(range(seeds)) * len(some))
        made.append(target.decode(final(denoise(target, noise, cond, null, steps=steps))))
    return torch.cat(made)


def _rate(made: Sequence[Outcome], least: float | None) -> stats.Interval:
    """Drawings at least so similar, over training seeds; the interval is over pictures, whose drawings belong together."""
    assert least is not None  # the bundled reference set is calibrated
    alike = np.array([outcome.similarity for outcome in made]) >= least
    pictures = np.tile(np.repeat(np.arange(alike.shape[1] // SEEDS), SEEDS), len(alike))
    return stats.clustered(lambda values: float(np.mean(values)), alike.astype(float).flatten(), pictures, share=True)


def _mean(made: Sequence[Outcome], what: str) -> float:
    return float(np.mean([getattr(outcome, what) for outcome in made]))


def _row(
    name: str, found: Mapping[str, Sequence[Outcome]], rates: Mapping[str, stats.Interval], copies: Mapping[str, stats.Interval]
) -> list[str]:  # fmt: skip
    made, without, unprotected = found[name], found[UNPROTECTED], copies[UNPROTECTED].value
    fidelities = []
    for what in ("fidelity", "ordinary"):
        before, now = _mean(without, what), _mean(made, what)
        fidelities.append(
            f"{now:.3f}" + ("" if made is without or not before else f" ({(before - now) / before:+.0%})")
        )
    seconds = [outcome.seconds for outcome in made if outcome.seconds]
    return [
        name, *(f"{r.value:.0%} [{r.low:.0%}, {r.high:.0%}]" for r in (rates[name], copies[name])),
        f"{copies[name].value / unprotected:.0%}" if unprotected else "–",
        f"{_mean(made, 'similarity'):.2f}", *fidelities, f"{_mean(made, 'kept'):.0%}", f"{np.mean(seconds):.0f}" if seconds else "–",
    ]  # fmt: skip


def _drawn(found: Mapping[str, Sequence[Outcome]], copies: Mapping[str, stats.Interval]) -> str:
    """Copies against both fidelities: the further down and to the right, the better. Numbers are those of the table."""
    y = svg.fit([rate.high for rate in copies.values()], 300, 30, log=False, zero=True)
    marks = []
    for left, what, axis in (
        (70, "fidelity", "fidelity, repeated captions"),
        (420, "ordinary", "fidelity, ordinary captions"),
    ):
        x = svg.fit([_mean(made, what) for made in found.values()], left, left + 280, log=False)
        marks += [
            svg.x_axis(x, 300, axis),
            svg.y_axis(y, left, "drawings that are copies" if left == 70 else "", as_percent=True),
        ]
        for k, (name, made) in enumerate(found.items()):
            at, rate = x(_mean(made, what)), copies[name]
            marks.append(svg.line(at, y(rate.low), at, y(rate.high), "line"))
            marks.append(svg.tag("circle", svg.tag("title", name), cx=at, cy=y(rate.value), r=4))
            marks.append(svg.text(at + 6, y(rate.value) - 5, str(k)))
    return alone(str(svg.drawing(720, 350, "Copies against fidelity", "A point for each protection, twice.", *marks)))
