"""Study: what the magnitude is worth when the repeated pictures are most of the training data.

    python -m mnemoscope.demo.build world
    python bench/planted_share.py world      about an hour on 2 cores; continues where it was stopped;
                                             writes docs/studies/planted-share.md

The autoencoder is the bundled text-to-image model's.

Models of one size, trained for the same number of steps on epochs of about the same length. In three of them K pictures stand
48 times in an epoch, so every repeated picture is shown equally often; K grows from 24 to 216, so their share of
all draws grows with it. In a fourth, 24 pictures have the share of the 216, so each is shown nine times as often: fine-tuning on
few pictures. The 24 captions that all models have in common are then told from ordinary captions by the magnitude, step by step.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from common import DOCS, machine, markdown_table, null_copies, write_block
from mnemoscope import AuditConfig, World, load, run_audit, stats
from mnemoscope.cli.screen import progress
from mnemoscope.demo.train import train_text_to_image
from mnemoscope.demo.world import ASSETS
from mnemoscope.lab.pages import alone
from mnemoscope.records.table import prompt_scores
from mnemoscope.report.plots import Bundle, steps
from mnemoscope.similarity.reference import ReferenceSet

COMMON = 24
SHARES = ((24, 48, 8), (120, 48, 5), (216, 48, 2), (24, 432, 2))
"""Repeated pictures, copies of each in an epoch, and draws of each ordinary picture (each draw a fresh view)."""
TRAINING, DRAWN, CHANNELS = 1600, 48, (64, 96)
SEEDS, STEPS, ORDINARY = 4, 50, 96
COLORS = "#0072b2", "#e69f00", "#d55e00", "#009e73"
WINDOWS = {"first step": (0, 1), "first 10 steps": (0, 10), "last 10 steps": (40, 50), "all 50 steps": (0, 50)}


def variant(world: Path, folder: Path, repeated: int, copies: int, views: int) -> float:
    """A world folder that differs from ``world`` in its training list alone; returns the share of repeated draws."""
    rows = [json.loads(line) for line in (world / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    once = [r for r in rows if r["group"] in ("planted", "heldout")]
    once = sorted(
        once, key=lambda r: -r["copies"]
    )  # the most copied level of the bundled world is common to all variants
    again = [r | {"group": "planted", "copies": copies, "draws": copies} for r in once[:repeated]]
    ordinary = [r | {"draws": views} for r in rows if r["group"] == "ordinary"]
    other = [r | {"copies": 0, "draws": 0, "group": "heldout"} for r in once[repeated:]]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(r) for r in again + ordinary + other]
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sources = {name: world / name for name in ("pictures.zip", "cutouts.npz")} | {
        "autoencoder": ASSETS / "text-to-image" / "vae"
    }
    for name, source in sources.items():
        if not (folder / name).exists():
            os.symlink(source.resolve(), folder / name)
    return sum(r["draws"] for r in again) / sum(r["draws"] for r in again + ordinary)


def measure(folder: Path) -> dict:
    """AUC per window and per step of the common captions against ordinary ones, copies, and what the null branch yields."""
    world, target = World(folder=folder), load(str(folder / "text-to-image" / "pipeline"))
    repeated = world.of("planted")
    common, ordinary = repeated[:COMMON], world.captions("ordinary")
    ordinary = ordinary[:: len(ordinary) // ORDINARY][:ORDINARY]
    names = [r.picture for r in repeated]
    reference = ReferenceSet.of(names, world.pictures(names))
    reference.threshold = World().reference.threshold  # what counts as a copy is the bundled world's
    config = AuditConfig(
        model=str(folder / "text-to-image" / "pipeline"), prompts=[{"prompt": r.caption, "id": r.id, "group": g} for g, rows in
                                    (("repeated", common), ("ordinary", ordinary)) for r in rows],
        detectors=[{"name": "magnitude", "steps": STEPS}], seeds=SEEDS, steps=STEPS, guidance=target.guidance, images=True,
        batch_size=32, out=str(folder / "audit"),
    )  # fmt: skip
    with progress(folder.name) as p:
        rows = list(run_audit(config, target=target, reference=reference, progress=p).rows())
    own = {r.id: r.picture for r in common}
    hits = [
        r.prompt_id
        for r in rows
        if r.group == "repeated" and r.nearest.copy_found and r.nearest.reference == own[r.prompt_id]
    ]
    copied = sum(hits.count(i) >= SEEDS - 1 for i in own)

    def scored(window: tuple[int, int]) -> tuple[list[float], list[bool], list[str]]:
        found = [(s, g == "repeated") for g in ("repeated", "ordinary")
                 for s in prompt_scores([r for r in rows if r.group == g], "magnitude", window, SEEDS)]  # fmt: skip
        return [s.score for s, _ in found], [label for _, label in found], [s.prompt_id for s, _ in found]

    planted, _, n = null_copies(target, reference, set(names))
    return {
        "copied": copied, "captions": len(own), "null": [planted, n],
        "windows": {name: [round(v, 4) for v in (a.value, a.low, a.high)] for name, w in WINDOWS.items()
                    for a in [stats.cluster_bootstrap(stats.auc, *scored(w))]},
        "per_step": [round(stats.auc(*scored((k, k + 1))[:2]), 4) for k in range(STEPS)],
    }  # fmt: skip


def picture(results: dict[str, dict], file: Path) -> None:
    """AUC at each step, a line per share, as a figure that stands alone."""
    style = (
        "<style>text{font:13px sans-serif;fill:#555}.axis,.grid{stroke:#bbb}polyline{fill:none;stroke-width:2.2}"
        + "".join(f"polyline.c{i}{{stroke:{c}}}text.c{i}{{fill:{c}}}" for i, c in enumerate(COLORS))
        + "polygon,.band{fill:none;stroke:none}</style>"
    )
    drawn = steps([Bundle(share, [r["per_step"]]) for share, r in results.items()], axis="AUC")
    drawn = str(drawn).replace("Score at each denoising step", "AUC of the magnitude at each denoising step", 1)
    file.write_text(alone(drawn, style), encoding="utf-8")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("world", type=Path, help="folder of mnemoscope.demo.build")
    p.add_argument("--folder", type=Path, default=Path("build/planted-share"))
    p.add_argument("--compile", action="store_true", help="train a fifth faster; needs a C++ compiler")
    args = p.parse_args()
    results = {}
    for repeated, copies, views in SHARES:
        folder = args.folder / f"{repeated}-{copies}"
        share = variant(args.world, folder, repeated, copies, views)
        label, known = f"{share:.0%}, {repeated} pictures", folder / "result.json"
        if not (folder / "text-to-image" / "pipeline" / "mnemoscope.json").exists():
            train_text_to_image(folder, TRAINING, DRAWN, channels=CHANNELS, compiled=args.compile)
        if not known.exists():
            found = measure(folder) | {"repeated": repeated, "copies": copies, "share": round(share, 4)}
            known.write_text(json.dumps(found), encoding="utf-8")
        results[label] = json.loads(known.read_text(encoding="utf-8"))
        print(label, results[label], flush=True)
    table = [
        [share, f"{DRAWN * TRAINING * r['share'] / r['repeated']:.0f}",
         *(f"{v:.3f} [{low:.3f}, {high:.3f}]" for v, low, high in r["windows"].values()),
         f"{r['copied']} of {r['captions']}", f"{r['null'][0]} of {r['null'][1]}"]
        for share, r in results.items()
    ]  # fmt: skip
    text = "\n\n".join([
        f"Measured by `python bench/planted_share.py` on {machine()}: {TRAINING} training steps, UNet channels {CHANNELS}, DDIM {STEPS}, "
        f"{SEEDS} seeds, {COMMON} repeated against {ORDINARY} ordinary captions, 95 % bootstrap intervals.",
        markdown_table(["share of training draws", "times each was shown",
                        *(f"AUC, {w}" for w in WINDOWS), "repeated captions copied in ≥ 3 of 4 seeds",
                        "samples without a prompt that are copies"], table),
    ])  # fmt: skip
    picture(results, DOCS / "studies" / "planted-share.svg")
    write_block(DOCS / "studies" / "planted-share.md", "measured-planted-share", text, results)


if __name__ == "__main__":
    main()
