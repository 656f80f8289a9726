"""A run folder as an audit leaves it, made of nothing: pictures drawn with pillow, scores drawn from a seeded generator.

Run ``python tests/report/synthetic_run.py FOLDER`` to look at the report of one.
"""

from __future__ import annotations

import io
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mnemoscope import stats
from mnemoscope.records.schema import Manifest, Nearest, Row, Score, Thresholds
from mnemoscope.records.store import Run, Writer, sample_id

DOSES = {"planted ×2": 2, "planted ×4": 4, "planted ×8": 8, "planted ×16": 16}
CHANCE = {
    "planted ×2": 0.15,
    "planted ×4": 0.5,
    "planted ×8": 0.9,
    "planted ×16": 1.0,
    "ordinary": 0.0,
    "template": 0.05,
}
COLORS = ["red", "yellow", "teal", "orange", "navy", "green", "purple", "brown", "pink", "gray"]
SHAPES = ["circle", "cross", "ring", "bar", "star", "house"]
STEPS = 20
SETTING = {"world": 1}


def picture(concept: int, jitter: float = 0.0, rng: np.random.Generator | None = None, side: int = 64) -> Image.Image:
    """A colored shape; ``jitter`` moves, scales and tints it."""
    move = (rng or np.random.default_rng(0)).normal(0, jitter, 5)
    image = Image.new("RGB", (side, side), tuple(int(c) for c in np.clip(245 - 30 * abs(move[2:]), 0, 255)))
    draw = ImageDraw.Draw(image)
    color, shape = COLORS[concept % len(COLORS)], SHAPES[concept // len(COLORS) % len(SHAPES)]
    x, y = side / 2 + 8 * move[0], side / 2 + 8 * move[1]
    r = side * 0.32 * (1 + 0.3 * move[2])
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=color, width=7)
    elif shape == "cross":
        draw.rectangle((x - r, y - r / 4, x + r, y + r / 4), fill=color)
        draw.rectangle((x - r / 4, y - r, x + r / 4, y + r), fill=color)
    elif shape == "bar":
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=color)
    elif shape == "star":
        corners = [
            (a, r if i % 2 == 0 else r * 0.45) for i, a in enumerate(np.linspace(-np.pi / 2, 1.5 * np.pi, 11)[:-1])
        ]
        draw.polygon([(x + s * np.cos(a), y + s * np.sin(a)) for a, s in corners], fill=color)
    else:
        draw.polygon([(x - r, y), (x, y - r), (x + r, y)], fill=color)
        draw.rectangle((x - 0.7 * r, y, x + 0.7 * r, y + r), fill=color)
    return image


def webp(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "WEBP", quality=90)
    return data.getvalue()


def make_run(
    folder: Path,
    *,
    per_group: int = 12,
    seeds: int = 4,
    ordinary: int = 199,
    pictures: bool = True,
    reference: bool = True,
    calibrated: bool = True,
    labels: bool = False,
    failure: bool = True,
    prompts: dict[int, str] | None = None,
    **manifest: object,
) -> Path:
    """Write a run folder; ``prompts`` replaces the text of single prompts, and without ``failure`` every sample has a result."""
    manifest = {"status": "incomplete" if failure else "done"} | manifest
    rng = np.random.default_rng(7)
    run = Run.open(folder, _manifest(per_group * len(CHANCE) * seeds, seeds, manifest))
    rows: list[Row] = []
    with Writer(run) as writer:
        for g, group in enumerate(CHANCE):
            for i in range(per_group):
                concept = (g * per_group + i) * 7 % 60
                text = f"a {COLORS[concept % 10]} {SHAPES[concept // 10]}, drawn as number {g * per_group + i}"
                text = (prompts or {}).get(g * per_group + i, text)
                pull = rng.normal(0, 0.25) + (1.1 + 0.12 * DOSES.get(group, 0) if CHANCE[group] > 0.1 else 0)
                for seed in range(seeds):
                    rows.append(
                        _row(rng, writer, text, f"p{g}-{i}", group, seed, concept, pull, pictures, reference, labels)
                    )
        if failure:
            rows[-1] = Row(**_head(rows[-1]), status="error", error="ModelFault: predicted NaN at step 3")
        rows[5].tokens_dropped = 12
        writer.append(rows)
        for concept in range(60):
            if pictures and reference:
                writer.save(f"reference/{concept:02d}.webp", webp(picture(concept)))
    if calibrated:
        _calibrate(run.folder, rng, ordinary, seeds)
    if labels:
        _controls(run.folder, rows, rng)
    return run.folder


def _head(row: Row) -> dict:
    return row.model_dump(include={"id", "prompt_id", "prompt", "seed", "group", "label"})


def _row(rng, writer, text, prompt_id, group, seed, concept, pull, pictures, reference, labels) -> Row:
    copied = rng.random() < CHANCE[group]
    level = 1.6 * np.exp(pull + rng.normal(0, 0.08))
    steps = level * np.exp(-np.linspace(0, 1.6 if pull < 0.8 else 0.9, STEPS)) * np.exp(rng.normal(0, 0.04, STEPS))
    id = sample_id(text, seed, SETTING)
    image = writer.save(f"images/{id}.webp", webp(picture(concept, 0.06 if copied else 0.9, rng))) if pictures else None
    similarity = float(
        np.clip(rng.normal(0.965 if copied else 0.55, 0.012 if copied else 0.1), 0, 0.87 if not copied else 1)
    )
    nearest = Nearest(
        reference=str(concept),
        similarity=similarity,
        descriptor="pixels",
        threshold=0.9,
        copy_found=similarity > 0.9,
        file=f"reference/{concept:02d}.webp" if pictures else None,
    )
    return Row(
        id=id,
        prompt_id=prompt_id,
        prompt=text,
        seed=seed,
        status="ok",
        group=group,
        label={"ordinary": False, "template": None}.get(group, True) if labels else None,
        scores={"magnitude": Score(value=float(steps[0]), space="eps", per_step=[float(v) for v in steps])},
        forwards=2 * STEPS,
        image=image,
        nearest=nearest if reference else None,
        seconds=0.21,
    )


def _manifest(asked: int, seeds: int, changes: dict) -> Manifest:
    facts = {
        "setting": SETTING,
        "command": "mnemoscope audit demo --prompts prompts.jsonl --seeds 4 --images --out runs/demo-1",
        "config": {
            "model": "demo",
            "seeds": seeds,
            "steps": STEPS,
            "guidance": 3.0,
            "prompts": {"path": "prompts.jsonl"},
        },
        "target": {
            "name": "demo",
            "kind": "stable-diffusion",
            "weights": {"unet": "sha256:" + "3f" * 32, "vae": "sha256:" + "a9" * 32},
            "scheduler": {"class": "DDIMScheduler", "prediction_type": "epsilon"},
            "dtype": "float32",
        },
        "versions": {"mnemoscope": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1"},
        "machine": {"device": "cpu", "dtype": "float32: no GPU found", "threads": 2, "batch_size": 16},
        "started": "2026-10-02T09:14:05+00:00",
        "ended": "2026-10-02T09:15:41+00:00",
        "asked": asked,
        "forwards": asked * 2 * STEPS,
        "notes": ["2 repeated prompts left out", "Adversarial prompts: only natural captions were tried."],
        "doses": DOSES,
    }
    return Manifest(**(facts | changes))


def _calibrate(folder: Path, rng: np.random.Generator, n: int, seeds: int) -> None:
    scores = sorted(float(s) for s in 1.6 * np.exp(rng.normal(0, 0.25, n)))
    found = stats.threshold_at_fpr(scores, 0.01)
    finite = [bound if np.isfinite(bound) else None for bound in (found.interval.low, found.interval.high)]
    record = Thresholds(
        detector="magnitude",
        setting={"target": {"name": "demo"}, "seeds": seeds},
        scores=scores,
        fpr=0.01,
        threshold=found.value,
        interval=(finite[0], finite[1]),
        source=f"{n} prompts from ordinary.jsonl",
    )
    (folder / "thresholds.json").write_text(record.model_dump_json())


def _controls(folder: Path, rows: list[Row], rng: np.random.Generator) -> None:
    """The shape of the stored text-only baseline, with scores that know nothing."""
    label = {r.prompt: r.label for r in rows if r.label is not None}
    scores = rng.normal(0, 1, len(label)).tolist()
    separation = asdict(stats.separation(scores, list(label.values()), resamples=50))
    stored = {
        "prompts": list(label),
        "scores": scores,
        "clusters": list(range(len(label))),
        "ngrams": separation,
        "capitals": None,
        "reason": "",
    }
    (folder / "controls.json").write_text(json.dumps(stored))


if __name__ == "__main__":
    from mnemoscope.report.html import write_json, write_markdown, write_report

    made = make_run(Path(sys.argv[1]), labels=True)
    print(write_report(made), write_markdown(made), write_json(made))
