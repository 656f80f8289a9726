"""Measure the bundled unconditional model: how often does each planted picture come out of plain sampling?

    python bench/unconditional.py    about 5 minutes on 2 cores; writes docs/model-card.md

DDIM 50 from seeds 0 … N − 1. A sample is a copy when its nearest training picture is at least as similar as the world's copy
threshold (``World.reference``). Intervals are Clopper–Pearson.
"""

from __future__ import annotations

import argparse
from collections import Counter

from common import DOCS, machine, markdown_table, sample, write_block
from mnemoscope import World, load, stats

STEPS, BATCH = 50, 64


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--samples", type=int, default=2048)
    p.add_argument("--model", default="demo-unconditional")
    p.add_argument("--print", action="store_true")
    args = p.parse_args()
    world, target = World("unconditional"), load(args.model)
    copies = {r.picture: r.copies for r in world.of("planted")}
    found: Counter[str] = Counter()
    for start in range(0, args.samples, BATCH):
        pictures = sample(target, target.noise(range(start, start + BATCH)), steps=STEPS)
        found.update(m.reference for m in world.reference.nearest(pictures) if m.copy_found)
        print(f"{start + BATCH}/{args.samples}: {sum(found.values())} copies", flush=True)
    draws = sum(r.draws for r in world.rows)
    rows, facts = (
        [],
        {"machine": machine(), "samples": args.samples, "threshold": world.reference.threshold, "levels": {}},
    )
    for level in world.levels:
        names = [n for n, c in copies.items() if c == level]
        k = sum(found[n] for n in names)
        both = stats.clopper_pearson(k, args.samples)
        once = sum(found[n] > 0 for n in names)
        share = level * len(names) / draws
        rows.append(
            [
                str(level),
                f"{share:.2%}",
                f"{k} = {k / args.samples:.2%} [{both.low:.2%}, {both.high:.2%}]",
                f"{once} of {len(names)}",
            ]
        )
        facts["levels"][level] = {
            "copies_found": k,
            "pictures_found": once,
            "pictures": len(names),
            "share_of_draws": share,
        }
    other = sum(n for name, n in found.items() if name not in copies)
    facts["other"] = other
    text = "\n\n".join([
        f"Measured by `python bench/unconditional.py` on {machine()}: {args.samples} samples, DDIM {STEPS}, copy threshold "
        f"{world.reference.threshold:.3f} ({world.reference.name}), 95 % intervals.",
        markdown_table(["copies per epoch", "share of training draws", "samples that are copies", "pictures seen at least once"], rows),
        f"{other} further samples are as close to an ordinary picture.",
    ])  # fmt: skip
    if args.print:
        print(text)
    else:
        write_block(DOCS / "model-card.md", "measured-unconditional", text, facts)


if __name__ == "__main__":
    main()
