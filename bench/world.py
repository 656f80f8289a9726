"""Measure the bundled text-to-image model: does it copy what was planted, and does the magnitude see it?

    python bench/world.py            about 15 minutes on 2 cores; continues where it was stopped; writes docs/model-card.md

DDIM 50, 4 seeds, the guidance scale that the card recommends. Intervals: Clopper–Pearson for shares, bootstrap over pictures and
families for AUC.
A caption counts as reproduced if in at least 3 of 4 seeds the nearest of all training pictures is its own picture, more similar
than 99 % of pairs of different pictures are. It counts as copied if that similarity is also above the one that the nearest of all
training pictures to a *different* picture exceeds in 5 % of searches, which is what audits call a copy: among two thousand
pictures something is always rather similar.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from common import DOCS, generated, machine, markdown_table, null_copies, write_block
from mnemoscope import AuditConfig, Run, World, load, run_audit, stats
from mnemoscope.cli.screen import progress
from mnemoscope.demo.run import group_name
from mnemoscope.records.table import PromptScore, prompt_scores

SEEDS, STEPS = 4, 50
ORDINARY_IN_FULL = 200
WINDOWS = {"first step, n = 1": ((0, 1), 1), "first step, n = 4": ((0, 1), 4), "first 10 steps, n = 4": ((0, 10), 4),
           "last 10 steps, n = 4": ((40, 50), 4), "all 50 steps, n = 4": ((0, 50), 4)}  # fmt: skip


def item(row, group=None):
    return {"prompt": row.caption, "id": row.id, "group": group or group_name(row)}


def run_all(folder: Path, model: str, batch_size: int) -> tuple[Run, Run]:
    """Whole trajectories with pictures for every group, and the first step for all ordinary captions."""
    world, target = World(), load(model)
    ordinary = world.captions("ordinary")
    full = [item(r) for r in world.of("planted", "recaptioned", "template")] + [
        item(r) for r in world.captions("heldout")
    ]
    full += [item(r) for r in ordinary[:: max(1, len(ordinary) // ORDINARY_IN_FULL)][:ORDINARY_IN_FULL]]
    common = {"model": model, "seeds": SEEDS, "steps": STEPS, "guidance": target.guidance, "batch_size": batch_size}
    whole = {"name": "magnitude", "steps": STEPS}
    with progress("whole trajectories") as p:
        # Without a reference set: pictures are looked up afterwards, so that another descriptor costs no new sampling.
        config = AuditConfig(**common, prompts=full, detectors=[whole], images=True, out=str(folder / "full"))
        a = run_audit(config, target=target, progress=p)
    with progress("first step, ordinary captions") as p:
        config = AuditConfig(**common, prompts=[item(r) for r in ordinary], out=str(folder / "first"))
        b = run_audit(config, target=target, progress=p)
    return a, b


def share(k: int, n: int) -> str:
    both = stats.clopper_pearson(k, n)
    return f"{k}/{n} = {k / n:.0%} [{both.low:.0%}, {both.high:.0%}]"


def pair_limit(world: World) -> float:
    """Similarity that 99 % of pairs of different pictures stay below: never-shown pictures against all training pictures."""
    names = dict.fromkeys(r.picture for r in world.of("heldout", "twin"))
    return float(np.quantile(world.reference.similarities(world.pictures(names)).numpy(), 0.99))


def copied(rows, limit: float) -> dict[str, dict[str, int]]:
    """Per prompt id: seeds whose nearest picture is the prompt's own / is any picture, above threshold."""
    own = {r.id: r.picture for r in World().rows}
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        here = found.setdefault(row.prompt_id, {"near": 0, "own": 0, "any": 0, "concept": 0})
        here["near"] += row.nearest.similarity > limit and row.nearest.reference == own[row.prompt_id]
        here["any"] += bool(row.nearest.copy_found)
        here["own"] += bool(row.nearest.copy_found) and row.nearest.reference == own[row.prompt_id]
        here["concept"] += row.nearest.reference.split("-")[0] == own[row.prompt_id].split("-")[0]
    return found


def clusters(prompts: list[PromptScore]) -> list[str]:
    """What is not independent: captions of one picture, members of one family."""
    cluster = {r.id: r.family or r.picture for r in World().rows}
    return [cluster[p.prompt_id] for p in prompts]


def auc_cell(positive: list[PromptScore], negative: list[PromptScore]) -> dict:
    scores = [p.score for p in positive + negative]
    labels = [True] * len(positive) + [False] * len(negative)
    both = stats.cluster_bootstrap(stats.auc, scores, labels, clusters(positive + negative))
    return {
        "auc": round(both.value, 4),
        "low": round(both.low, 4),
        "high": round(both.high, 4),
        "n": [len(positive), len(negative)],
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo")
    p.add_argument("--folder", type=Path, default=Path("build/bench-world"))
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--print", action="store_true", help="print instead of writing the model card")
    args = p.parse_args()
    full, first = run_all(args.folder, args.model, args.batch_size)
    matches = {}
    for some, pictures in generated(full):
        matches |= {row.id: match for row, match in zip(some, World().reference.nearest(pictures), strict=True)}
    rows = [row.model_copy(update={"nearest": matches[row.id]}) for row in full.rows()]
    first_rows = list(first.rows())
    limit = pair_limit(World())
    copies = copied(rows, limit)
    groups: dict[str, list[str]] = {}
    for r in rows:
        if r.prompt_id not in groups.setdefault(r.group, []):
            groups[r.group].append(r.prompt_id)

    ordinary = {
        name: prompt_scores(
            first_rows if window == (0, 1) else [r for r in rows if r.group == "ordinary"], "magnitude", window, n
        )
        for name, (window, n) in WINDOWS.items()
    }
    facts: dict = {
        "pair_limit": limit,
        "machine": machine(),
        "guidance": full.manifest.config["guidance"],
        "groups": {},
    }
    table, aucs = [], []
    for group, ids in groups.items():
        near = sum(copies[i]["near"] >= 3 for i in ids)
        three = sum(copies[i]["own"] >= 3 for i in ids)
        one = sum(copies[i]["own"] >= 1 for i in ids)
        anything = sum(copies[i]["any"] >= 1 for i in ids)
        concept = sum(copies[i]["concept"] for i in ids)
        table.append(
            [
                group,
                share(near, len(ids)),
                share(three, len(ids)),
                share(one, len(ids)),
                share(anything, len(ids)),
                f"{concept / len(ids) / SEEDS:.0%}",
            ]
        )
        facts["groups"][group] = {
            "prompts": len(ids),
            "near_in_3_of_4": near,
            "own_in_3_of_4": three,
            "own_in_1_of_4": one,
            "any_in_1_of_4": anything,
        }
        if group == "ordinary":
            continue
        cells = {}
        for name, (window, n) in WINDOWS.items():
            positive = prompt_scores([r for r in rows if r.group == group], "magnitude", window, n)
            cells[name] = auc_cell(positive, ordinary[name])
        facts["groups"][group]["auc"] = cells
        aucs.append([group, *(f"{c['auc']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in cells.values())])
    world = World()
    planted, anything, n = null_copies(load(args.model), world.reference, {r.picture for r in world.of("planted")})
    facts["null"] = {"planted": planted, "any": anything, "samples": n}
    text = "\n\n".join([
        f"Measured by `python bench/world.py` on {machine()}; guidance {facts['guidance']:g}, DDIM {STEPS}, {SEEDS} seeds, "
        f"similarities by {World().reference.name}. Reproduced: the nearest training picture is the caption's own, above "
        f"{limit:.3f}, which 99 % of pairs of different pictures stay below. Copied: above {World().reference.threshold:.3f}, "
        "which the *nearest* training picture of different pictures stays below in 95 % of searches. Shares of captions with "
        "95 % intervals.",
        markdown_table(["group", "reproduced in ≥ 3 of 4 seeds", "copied in ≥ 3 of 4", "copied in ≥ 1 of 4",
                        "any training picture copied in ≥ 1 of 4", "nearest is the own concept (share of samples)"], table),
        f"The unconditional branch alone: {share(planted, n)} samples are copies of a planted picture, {share(anything, n)} of any.",
        f"AUC of the magnitude against ordinary captions ({len(ordinary['first step, n = 1'])} for the first step, "
        f"{len(ordinary['all 50 steps, n = 4'])} for longer windows), 95 % bootstrap intervals:",
        markdown_table(["group", *WINDOWS], aucs),
    ])  # fmt: skip
    if args.print:
        print(text)
    else:
        write_block(DOCS / "model-card.md", "measured-text-to-image", text, facts)


if __name__ == "__main__":
    main()
