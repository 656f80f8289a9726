"""Do region maps find what a template repeats? Ground truth: where all pictures of a composed family are alike.

    python bench/regions.py      about 10 minutes on 2 cores; writes docs/explanations.md

For each caption of the composed template families, the detail's slot is free and everything else is fixed. A generated picture
counts where it reproduces its family: its fixed part differs from the training pictures by less than --limit (root mean square over
pixels and channels; 1 is the whole range). Maps are upsampled to the picture. IoU takes its threshold from the other half of the
families (the one that maximizes their mean IoU, after each map is divided by its own mean); AUPRC needs none. Beside them a
mask of all ones, whose AUPRC is the share of fixed pixels. Intervals: percentile bootstrap over families, 2000 resamples.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import average_precision_score

from common import DOCS, machine, markdown_table, write_block
from mnemoscope import World, load
from mnemoscope.demo.world import Row
from mnemoscope.explain.regions import Regions, regions

SEEDS, STEPS = 2, 50
VARIANTS = {
    "Δs, last step": ("score", {}),
    "Δs, mean of all steps": ("score", {"at": range(STEPS)}),
    "Δs, mean of the last 10": ("score", {"at": range(STEPS - 10, STEPS)}),
    "Δh, K = 1": ("curvature", {"probes": 1}),
    "Δh, K = 16": ("curvature", {"probes": 16}),
    "end-token attention": ("attention", {}),
}
ONES = "all ones"


@dataclass
class Case:
    """One generated picture that reproduces its family, with its maps divided by their means."""

    family: str
    shown: bool
    truth: np.ndarray
    maps: dict[str, np.ndarray]


def composed(world: World) -> list[Row]:
    return [r for r in world.of("template") if r.id.startswith("card-")]


def reproduces(found: Regions, row: Row, world: World, truth: torch.Tensor, limit: float) -> torch.Tensor:
    """Which seeds repeat the family's fixed part."""
    picture = world.pictures([row.picture])[0]
    return (found.images - picture)[:, :, truth].square().mean((1, 2)).sqrt() < limit


def cases(target, world: World, limit: float, members: int) -> tuple[list[Case], int]:
    """For some members of each family, the never shown one among them."""
    out, drawn = [], 0
    by_family: dict[str, list[Row]] = {}
    for row in composed(world):
        by_family.setdefault(row.family, []).append(row)
    for family, rows in by_family.items():
        truth = world.fixed_part(family)
        for row in [*rows[: members - 1], rows[-1]]:
            found = {
                n: regions(target, row.caption, k, seeds=SEEDS, steps=STEPS, **o) for n, (k, o) in VARIANTS.items()
            }
            good = reproduces(found[next(iter(VARIANTS))], row, world, truth, limit)
            drawn += SEEDS
            for j in good.nonzero()[:, 0].tolist():
                maps = {n: scaled(f.upsampled()[j]) for n, f in found.items()}
                maps[ONES] = np.ones(truth.shape)
                out.append(Case(family, row.copies > 0, truth.numpy(), maps))
        print(f"{family}: {len(out)} pictures so far", flush=True)
    return out, drawn


def scaled(one: torch.Tensor) -> np.ndarray:
    values = one.clamp(min=0).double().numpy()
    return values / max(values.mean(), 1e-12)


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())


def best_threshold(found: list[Case], name: str) -> float:
    grid = np.quantile(np.concatenate([c.maps[name].ravel() for c in found]), np.linspace(0, 0.99, 60))
    return float(max(grid, key=lambda t: np.mean([iou(c.maps[name] >= t, c.truth) for c in found])))


def measure(found: list[Case], name: str) -> list[tuple[str, float, float]]:
    """(family, IoU, AUPRC) of each picture; the threshold comes from the other half of the families."""
    families = sorted({c.family for c in found})
    halves = [set(families[::2]), set(families[1::2])]
    out = []
    for mine, other in (halves, halves[::-1]):
        threshold = best_threshold([c for c in found if c.family in other], name)
        for c in (c for c in found if c.family in mine):
            ap = average_precision_score(c.truth.ravel(), c.maps[name].ravel())
            out.append((c.family, iou(c.maps[name] >= threshold, c.truth), float(ap)))
    return out


def interval(rows: list[tuple[str, float]]) -> tuple[float, float, float]:
    """Mean over pictures; families are resampled."""
    groups: dict[str, list[float]] = {}
    for family, value in rows:
        groups.setdefault(family, []).append(value)
    parts = list(groups.values())
    drawn = np.random.default_rng(0).integers(len(parts), size=(2000, len(parts)))
    means = [np.mean([v for i in draw for v in parts[i]]) for draw in drawn]
    return float(np.mean([v for p in parts for v in p])), *map(float, np.quantile(means, [0.025, 0.975]))


def told(rows: list[tuple[str, float]]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*interval(rows))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo")
    p.add_argument("--limit", type=float, default=0.15)
    p.add_argument("--members", type=int, default=4, help="captions of each family, the never shown one among them")
    p.add_argument("--print", action="store_true", help="print instead of writing the page")
    args = p.parse_args()
    world, target = World(), load(args.model)
    found, drawn = cases(target, world, args.limit, args.members)
    rows, facts = [], {"machine": machine(), "pictures": len(found), "drawn": drawn, "limit": args.limit}
    hidden = [c for c in found if not c.shown]
    for name in [*VARIANTS, ONES]:
        every = measure(found, name)
        unseen = measure(hidden, name) if len({c.family for c in hidden}) >= 4 else []
        cells = [told([(f, v[i]) for f, *v in every]) for i in (0, 1)]
        more = told([(f, ap) for f, _, ap in unseen]) if unseen else "too few"
        rows.append([name, *cells, more])
        facts[name] = {"iou": interval([(f, i) for f, i, _ in every]), "auprc": interval([(f, a) for f, _, a in every])}
        facts[name] |= {"auprc, never shown": interval([(f, a) for f, _, a in unseen]) if unseen else None}
    text = "\n\n".join([
        f"Measured by `python bench/regions.py` on {machine()}: {drawn} pictures (DDIM {STEPS}, {SEEDS} seeds) of captions of the composed "
        f"template families, of which {len(found)} repeat their family's fixed part (root mean square difference below {args.limit:g}); "
        f"{len(hidden)} of these belong to members that were never shown. 95 % intervals over families.",
        markdown_table(["map", "IoU, threshold from other families", "AUPRC", "AUPRC, members never shown"], rows),
    ])  # fmt: skip
    if args.print:
        print(text)
    else:
        write_block(DOCS / "explanations.md", "measured-regions", text, facts)


if __name__ == "__main__":
    main()
