"""What the improved preset of InvMM costs and how steady it is, beside the official one, on the bundled model without text.

    python bench/invmm.py    about an hour on 2 cores; goes on where it was stopped; writes docs/benchmark.md

Pictures of the highest level (memorized), of those between, and held-out ones. F and B are counted, so they are those of any machine.
Spread is the standard deviation over seeds; costs are compared picture by picture. The trained pictures together tell whether the presets
put pictures in the order of their copies.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from common import DOCS, machine, markdown_table, write_block
from mnemoscope.audit.measures import Measured, Picture, measured
from mnemoscope.lab.stored import cases, setting

MODEL = "demo-unconditional"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pictures", type=int, default=2, help="of each kind")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--work", type=Path, default=Path("build/bench-invmm"))
    args = p.parse_args()
    kinds: dict[str, list[Picture]] = {}
    found: dict[tuple[str, str], list[list[Measured]]] = {}
    for name in ("official", "improved"):
        world, _, method = setting(MODEL, name=name)
        every = cases(world, args.work / "pictures", args.pictures, captions=False)
        kinds = {
            "memorized": [c.picture for c in every if c.copies == world.levels[-1]],
            "held out": [c.picture for c in every if not c.copies][: args.pictures],
            "between": [c.picture for c in every if 0 < c.copies < world.levels[-1]],
        }
        copies = {c.picture.file.name: c.copies for c in every}
        for kind, pictures in kinds.items():
            # A seed of its own for each repetition: draws come from a picture's id, and ids from its setting.
            for seed in range(args.seeds if kind == "memorized" else 1):
                out = args.work / f"{name}-{kind}-{seed}"
                found.setdefault((name, kind), []).append(measured(method, repeated(pictures, out, seed), out))
                print(name, kind, seed, [(m.score, m.result["forwards"]) for m in found[name, kind][-1]], flush=True)
    facts: dict[str, Any] = {"machine": machine(), "kinds": {k: len(v) for k, v in kinds.items()}}
    rows, ranks = [], {}
    for name in ("official", "improved"):
        trained = [m for kind in ("memorized", "between") for m in found[name, kind][0]]
        scores = np.array([m.score for m in trained])  # infinite: censored, all last together
        dose = np.log([copies[Path(m.image).name] for m in trained])
        ranks[name] = float(spearmanr(scores, dose).statistic)
        facts[f"rho {name}"] = ranks[name]
    for kind in kinds:
        cost = {n: np.array([[m.result["forwards"] + m.result["backwards"] for m in r] for r in found[n, kind]]).mean(0)
                for n in ("official", "improved")}  # fmt: skip
        share = cost["improved"] / cost["official"]
        scores = {n: np.array([[m.result["nats"] if m.result["passed"] else np.nan for m in r] for r in found[n, kind]])
                  for n in ("official", "improved")}  # fmt: skip
        rows.append([
            kind, *(f"{cost[n].mean():.0f}" for n in cost), f"{share.mean():.0%} ({share.min():.0%} to {share.max():.0%})",
            *(f"{np.isfinite(s).sum()} of {s.size}" for s in scores.values()), *(nats(s) for s in scores.values()),
        ])  # fmt: skip
        facts[kind] = {n: {"cost": cost[n].tolist(), "nats": np.nan_to_num(scores[n], nan=-1).tolist()} for n in cost}
    text = "\n\n".join([
        f"Measured by `python bench/invmm.py` on {machine()}: `{MODEL}`, {args.pictures} pictures of each kind, {args.seeds} seeds of the "
        f"memorized ones.",
        markdown_table(["pictures", "F + B, official", "F + B, improved", "share, picture by picture", "reproduced, official", "improved",
                        "nats, official", "improved"], rows),
        f"Nats are of pictures that were reproduced: mean ± standard deviation over seeds. Spearman's ρ of score and ln(copies) over "
        f"{len(kinds['memorized']) + len(kinds['between'])} trained pictures: official {ranks['official']:.2f}, improved "
        f"{ranks['improved']:.2f}.",
    ])  # fmt: skip
    write_block(DOCS / "benchmark.md", "measured-invmm", text, facts)


def nats(scores: np.ndarray) -> str:
    """Mean of the pictures that were reproduced, and their standard deviation over seeds where there is one."""
    if not np.isfinite(scores).any():
        return "–"
    again = scores[:, np.isfinite(scores).sum(0) > 1]
    spread = f" ± {np.nanmean(np.nanstd(again, axis=0, ddof=1)):.1f}" if again.size else ""
    return f"{np.nanmean(scores):.1f}{spread}"


def repeated(pictures: list[Picture], out: Path, seed: int) -> list[Picture]:
    """The same pictures in files that differ in a comment, so that their ids, and with them all draws, differ."""
    from PIL import Image, PngImagePlugin

    out.mkdir(parents=True, exist_ok=True)
    copies = []
    for picture in pictures:
        file, note = out / picture.file.name, PngImagePlugin.PngInfo()
        note.add_text("seed", str(seed))
        if not file.exists():
            Image.open(picture.file).save(file, pnginfo=note)
        copies.append(Picture(file, picture.caption))
    return copies


if __name__ == "__main__":
    main()
