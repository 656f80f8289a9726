"""Do region maps find what a template repeats? Ground truth: where all pictures of a composed family are alike.

    python bench/regions.py      about 10 minutes on 2 cores; writes docs/explanations.md

For each caption of the composed template families, the detail's slot is free and everything else is fixed. A generated picture counts
where it repeats its family's layout: over the fixed part it is closer (root mean square) to its own family than to any other. Maps are
upsampled to the picture. IoU takes its threshold from the other half of the families (the one that maximizes their mean IoU, after each map
is divided by its own mean); AUPRC and AUROC need none. Beside them a mask of all ones, whose AUPRC is the share of fixed pixels. Intervals:
percentile bootstrap over families, 2000 resamples.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from common import DOCS, machine, markdown_table, write_block
from mnemoscope import World, denoise, load
from mnemoscope.demo.world import Row
from mnemoscope.explain.regions import curvature_difference, end_attention, probes_of, score_difference, upsampled

SEEDS, STEPS, PROBES = 2, 50, 16
VARIANTS = (
    "Δs, last step",
    "Δs, mean of the last 10",
    "Δs, mean of all steps",
    "Δh, K = 1",
    f"Δh, K = {PROBES}",
    "end-token attention",
)
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


def look(target, caption: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Pictures, and every map of them at their size, along one trajectory."""
    cond, null, plan = target.encode([caption]).expand(SEEDS), target.encode([""]), target.schedule(STEPS)
    differences = []
    for step in denoise(target, target.noise(range(SEEDS)), cond, null, steps=STEPS):
        differences.append(score_difference(step.cond, step.uncond))
    t, seen = plan.timesteps[-1], torch.stack(differences)
    curved = {
        f"Δh, K = {k}": curvature_difference(target, step.x, t, cond, null, probes_of(target, range(SEEDS), k))
        for k in (1, PROBES)
    }
    maps = dict(zip(VARIANTS, (seen[-1], seen[-10:].mean(0), seen.mean(0)), strict=False)) | curved
    maps["end-token attention"] = end_attention(target, step.x, t, cond, caption)
    pictures = target.decode(step.x_next)
    return pictures, {name: upsampled(one, pictures.shape[2:]) for name, one in maps.items()}


def cases(target, world: World, members: int) -> tuple[list[Case], int]:
    """For some members of each family, the never shown one among them."""
    out, drawn = [], 0
    by_family: dict[str, list[Row]] = {}
    for row in composed(world):
        by_family.setdefault(row.family, []).append(row)
    layouts = {family: Layout.of(world, family) for family in by_family}
    for family, rows in by_family.items():
        truth = layouts[family].fixed
        for row in [*rows[: members - 1], rows[-1]]:
            pictures, found = look(target, row.caption)
            off = {f: layout.distance(pictures) for f, layout in layouts.items()}
            nearest = torch.stack(list(off.values())).argmin(0)
            drawn += SEEDS
            for j in (nearest == list(off).index(family)).nonzero()[:, 0].tolist():
                maps = {name: scaled(one[j]) for name, one in found.items()} | {ONES: np.ones(truth.shape)}
                out.append(Case(family, row.copies > 0, truth.numpy(), maps))
        print(f"{family}: {len(out)} of {drawn} pictures so far", flush=True)
    return out, drawn


@dataclass
class Layout:
    """A family's fixed part and what it shows there."""

    fixed: torch.Tensor
    mean: torch.Tensor

    @classmethod
    def of(cls, world: World, family: str) -> Layout:
        names = [r.picture for r in composed(world) if r.family == family]
        return cls(world.fixed_part(family), world.pictures(names).mean(0))

    def distance(self, pictures: torch.Tensor) -> torch.Tensor:
        """Root mean square over the fixed part, of each picture."""
        return (pictures - self.mean)[:, :, self.fixed].square().mean((1, 2)).sqrt()


def scaled(one: torch.Tensor) -> np.ndarray:
    values = one.clamp(min=0).double().numpy()
    return values / max(values.mean(), 1e-12)


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())


def best_threshold(found: list[Case], name: str) -> float:
    grid = np.quantile(np.concatenate([c.maps[name].ravel() for c in found]), np.linspace(0, 0.99, 60))
    return float(max(grid, key=lambda t: np.mean([iou(c.maps[name] >= t, c.truth) for c in found])))


def measure(found: list[Case], name: str) -> list[tuple[str, float, float, float]]:
    """(family, IoU, AUPRC, AUROC) of each picture; the threshold comes from the other half of the families."""
    families = sorted({c.family for c in found})
    halves = [set(families[::2]), set(families[1::2])]
    out = []
    for mine, other in (halves, halves[::-1]):
        threshold = best_threshold([c for c in found if c.family in other], name)
        for c in (c for c in found if c.family in mine):
            flat = c.truth.ravel(), c.maps[name].ravel()
            whole = float(average_precision_score(*flat)), float(roc_auc_score(*flat))
            out.append((c.family, iou(c.maps[name] >= threshold, c.truth), *whole))
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
    p.add_argument("--members", type=int, default=4, help="captions of each family, the never shown one among them")
    p.add_argument("--print", action="store_true", help="print instead of writing the page")
    args = p.parse_args()
    world, target = World(), load(args.model)
    found, drawn = cases(target, world, args.members)
    rows, facts = [], {"machine": machine(), "pictures": len(found), "drawn": drawn}
    hidden = [c for c in found if not c.shown]
    for name in [*VARIANTS, ONES]:
        every = measure(found, name)
        unseen = measure(hidden, name) if len({c.family for c in hidden}) >= 4 else []
        columns = {key: [(f, v[i]) for f, *v in every] for i, key in enumerate(("iou", "auprc", "auroc"))}
        columns["auprc, never shown"] = [(f, ap) for f, _, ap, _ in unseen]
        rows.append([name, *(told(c) if c else "too few" for c in columns.values())])
        facts[name] = {key: interval(c) if c else None for key, c in columns.items()}
    text = "\n\n".join([
        f"Measured by `python bench/regions.py` on {machine()}: {drawn} pictures (DDIM {STEPS}, {SEEDS} seeds) of captions of the composed "
        f"template families, of which {len(found)} repeat their family's layout (closer to it than to any other family's); {len(hidden)} "
        f"of these belong to members that were never shown. 95 % intervals over families.",
        markdown_table(["map", "IoU, threshold from other families", "AUPRC", "AUROC", "AUPRC, members never shown"], rows),
    ])  # fmt: skip
    if args.print:
        print(text)
    else:
        write_block(DOCS / "explanations.md", "measured-regions", text, facts)


if __name__ == "__main__":
    main()
