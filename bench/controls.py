"""AUCs of a detector on the bundled world, overall and where wording, captions, letters or families are held fast.

    python bench/controls.py                                   first-step magnitude, a minute; prints the tables
    python bench/controls.py --detectors magnitude density     with pictures: about 20 minutes on 2 cores
    python bench/controls.py --write docs/benchmark.md         replaces the block `measured-controls` of that page

What each row means: docs/controls.md.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path

from common import machine, markdown_table, write_block
from mnemoscope import AuditConfig, World, load, run_audit
from mnemoscope.report.discrimination import Comparison
from mnemoscope.report.summary import read_summary

ASKED = {
    "captions": ("case-fold", "title-case", "swap", "matched"),
    "templates": ("within-family",),
}
TITLES = {
    "captions": "Planted captions against ordinary and held-out ones",
    "templates": "Template families: shown members against those never shown",
}


def audited(target, name: str, prompts: list, args, folder: Path) -> list[Comparison]:
    config = AuditConfig(
        model="demo",
        prompts=prompts,
        controls=list(ASKED[name]),
        detectors=args.detectors,
        images="density" in args.detectors,
        seeds=args.seeds,
        batch_size=64,
        out=str(folder / name),
    )
    return list(read_summary(run_audit(config, target=target).folder).controls)


def rows(found: list[Comparison]) -> list[list[str]]:
    return [
        [c.name, c.words, str(c.positives), str(c.negatives), "not measured" if c.auc is None else str(c.auc), c.note]
        for c in found
    ]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--detectors", nargs="+", default=["magnitude"])
    p.add_argument("--seeds", type=int, default=4)
    p.add_argument("--levels", type=int, nargs="+", default=[24, 48])
    p.add_argument("--folder", type=Path, help="keep the runs here, and continue them")
    p.add_argument("--write", type=Path)
    args = p.parse_args()
    target, facts, text = load("demo"), {"machine": machine(), "seeds": args.seeds, "levels": args.levels}, []
    with tempfile.TemporaryDirectory() as scratch:
        for name, prompts in World().controls(args.levels).items():
            found = audited(target, name, prompts, args, args.folder or Path(scratch))
            facts[name] = [asdict(c) for c in found]
            columns = ["score", "memorized prompts", "n", "compared with", "AUC [95 %]", "note"]
            text.append(f"{TITLES[name]}:\n\n{markdown_table(columns, rows(found))}")
    made = (
        f"`python bench/controls.py --detectors {' '.join(args.detectors)}` on {machine()}: {args.seeds} seeds; memorized are "
        f"pictures with {' or '.join(map(str, args.levels))} copies in every epoch."
    )
    page = "\n\n".join([made, *text])
    print(page)
    if args.write:
        write_block(args.write, "measured-controls", page, facts)


if __name__ == "__main__":
    main()
