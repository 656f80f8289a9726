"""Verbatim and template copies on the bundled world, and the null distributions by which they are called.

    python bench/copies.py       two minutes on 2 cores once bench/world.py has drawn its pictures; writes docs/descriptors.md and
                                 copies.json and reference.safetensors beside the bundled model

Two nulls: similarities of *different real* pictures (held-out ones, and the planted concepts' other pictures) to the nearest picture
that the model was shown; and layout similarities of *generated* pictures of captions whose picture was never shown unchanged
(held-out and ordinary ones).
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from common import DOCS, generated, machine, markdown_table, write_block
from mnemoscope import Run, World, stats
from mnemoscope.demo.world import COPIES, COPY_FMR, LAYOUT_FMR, VECTORS, WorldReference
from mnemoscope.similarity.fingerprint import Fingerprint

NULL = ("heldout", "ordinary")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, default=Path("build/bench-world"))
    p.add_argument("--print", action="store_true")
    args = p.parse_args()
    run, world = Run(args.folder / "full"), World()
    reference = WorldReference(world, world.shown, Fingerprint())
    different = sorted(m.similarity for m in reference.nearest(world.pictures(world.different)))
    reference.threshold = stats.threshold_at_fpr(different, COPY_FMR).value
    found = defaultdict(list)
    for rows, pictures in generated(run):
        for row, match in zip(rows, reference.nearest(pictures), strict=True):
            found[row.group].append(match)
    null = sorted(m.layout for g in NULL for m in found[g])
    threshold = stats.threshold_at_fpr(null, LAYOUT_FMR).value
    whole = sorted(m.similarity for g in NULL for m in found[g])
    negative = len(null)
    table, facts = (
        [],
        {"machine": machine(), "threshold": reference.threshold, "layout_threshold": threshold, "groups": {}},
    )
    for group, matches in found.items():
        verbatim = np.array([bool(m.copy_found) for m in matches])
        template = np.array([m.layout > threshold for m in matches]) & ~verbatim
        cells = []
        if group not in NULL:
            labels = [True] * len(matches) + [False] * negative
            cells = [
                stats.auc([*(getattr(m, k) for m in matches), *v], labels)
                for k, v in (("similarity", whole), ("layout", null))
            ]
        shares = [stats.clopper_pearson(int(v.sum()), len(v)) for v in (verbatim, template)]
        table.append([group, str(len(matches)), *(f"{s.value:.0%} [{s.low:.0%}, {s.high:.0%}]" for s in shares),
                      *(f"{c:.3f}" for c in cells or ()), *([""] * (2 - len(cells)))])  # fmt: skip
        facts["groups"][group] = {
            "samples": len(matches),
            "verbatim": int(verbatim.sum()),
            "template": int(template.sum()),
            "auc": cells,
        }
    text = "\n\n".join([
        f"Measured by `python bench/copies.py` on {machine()}, on the pictures of `bench/world.py`. Verbatim: whole picture above "
        f"{reference.threshold:.3f} ({reference.name}). Template: not verbatim, and layout similarity above {threshold:.3f}, which 1 % of "
        f"the {negative} generated pictures of held-out and ordinary captions exceed. Shares of samples with 95 % intervals; AUC against "
        "those generated pictures.",
        markdown_table(["group", "samples", "verbatim", "template", "AUC, whole picture", "AUC, layout"], table),
    ])  # fmt: skip
    if args.print:
        print(text)
        return
    write_block(DOCS / "descriptors.md", "measured-layouts", text, facts)
    record = {
        "descriptor": reference.name,
        "source": f"nearest of {len(reference)} shown pictures to {len(different)} others; layouts of {negative} generated pictures",
        "different": [round(v, 6) for v in different],
        "layouts": [round(v, 6) for v in null],
    }
    COPIES.write_text(json.dumps(record) + "\n", encoding="utf-8")
    save_file({"vectors": reference.vectors.half().contiguous()}, VECTORS)
    print(COPIES, reference.threshold, threshold)


if __name__ == "__main__":
    main()
