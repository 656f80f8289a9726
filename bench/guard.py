"""Overhead of a guard on generations that pass, in the bundled pipeline.

    python bench/guard.py       a few minutes; writes docs/performance.md

The same generations are made without and with the guard in turn, 50 steps, latents only (a decoder would hide the overhead); the
ratio is of medians. The guard does all that it does in production: it judges against a calibration, counts, watches for drift and
writes its log.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch

from common import DOCS, machine, markdown_table, write_block
from mnemoscope import World, guard
from mnemoscope.models.load import open_pipeline


def seconds(pipe: Any, prompts: list[str], seed: int, steps: int) -> float:
    """Of one generation, through the pipeline or through its guard."""
    generators = [torch.Generator().manual_seed(seed + j) for j in range(len(prompts))]
    began = time.perf_counter()
    pipe(prompt=prompts, generator=generators, guidance_scale=3.0, num_inference_steps=steps, output_type="latent")
    return time.perf_counter() - began


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    p.add_argument("--pairs", type=int, default=60)
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--dry-run", action="store_true", help="print, write nothing")
    args = p.parse_args()
    pipe = open_pipeline("demo")[0]
    pipe.set_progress_bar_config(disable=True)
    world = World()
    captions = [r.caption for r in world.captions("ordinary")]
    rows, facts = [], {"machine": machine(), "pairs": args.pairs, "steps": args.steps}
    for batch in args.batch_sizes:
        with tempfile.TemporaryFile("w") as log:
            # The bundled thresholds are of four seeds; what is measured is the time, not the decision.
            guarded = guard(pipe, world.thresholds, log=log, accept=True)
            seconds(pipe, captions[:batch], 0, args.steps)
            seconds(guarded, captions[:batch], 0, args.steps)
            pairs = []
            for k in range(args.pairs):
                prompts = [captions[(k * batch + j) % len(captions)] for j in range(batch)]
                # Each goes first in every other pair.
                order = (pipe, guarded) if k % 2 else (guarded, pipe)
                took = {id(one): seconds(one, prompts, k, args.steps) for one in order}
                pairs.append((took[id(pipe)], took[id(guarded)]))
            decided = [d.seconds for d in guarded.last[:1]]
        plain, with_guard = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = sorted(b / a for a, b in pairs)
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        rows.append(
            [str(batch), f"{plain:.4f} s", f"{with_guard:.4f} s", f"{with_guard / plain:.3f} ({low:.3f} to {high:.3f})"]
        )
        facts[f"batch {batch}"] = {
            "plain": plain, "guarded": with_guard, "ratio": with_guard / plain, "quartiles of pairs": [low, high],
            "last decision": decided,
        }  # fmt: skip
        print(rows[-1], flush=True)
    columns = ["batch", "pipeline", "guarded pipeline", "ratio of medians (quartiles of the pairs' ratios)"]
    text = (
        f"`python bench/guard.py --pairs {args.pairs}` on {machine()}: {args.steps} steps of the bundled model, latents only, "
        f"pairs in turn.\n\n"
        f"{markdown_table(columns, rows)}"
    )
    if args.dry_run:
        print(text)
    else:
        write_block(DOCS / "performance.md", "measured-guard", text, facts)


if __name__ == "__main__":
    main()
