"""Overhead of a first-step audit over the bare denoiser at the same batch size.

    python bench/first_step.py       about 2 minutes; writes docs/performance.md

Both do the same P·n + n forwards of the bundled model, in turn, several times; the ratio is of medians. The audit reads
prompts, encodes them, draws noises, scores, and writes and syncs its run folder; the bare loop calls the denoiser on ready
tensors and nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch

from common import DOCS, machine, markdown_table, write_block
from mnemoscope import AuditConfig, World, load, run_audit

PROMPTS, SEEDS = 400, 4


def bare(target, batches: int, batch: int) -> float:
    """Seconds of that many denoiser calls on ready tensors."""
    plan = target.schedule(50)
    t = plan.timesteps[0]
    x = plan.scale(plan.start(target.noise(range(batch))), t)
    cond = target.encode(["a red apple"]).expand(batch)
    began = time.perf_counter()
    with torch.no_grad():
        for _ in range(batches):
            out = target.output(x, t, cond)
        out.sum().item()
    return time.perf_counter() - began


def audited(target, captions: list[str], batch: int) -> tuple[float, int]:
    """Seconds and forwards of the audit."""
    with tempfile.TemporaryDirectory() as folder:
        config = AuditConfig(model="demo", prompts=captions, seeds=SEEDS, batch_size=batch, out=f"{folder}/run")
        before, began = target.forwards, time.perf_counter()
        run_audit(config, target=target)
        return time.perf_counter() - began, target.forwards - before


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64])
    p.add_argument("--repeats", type=int, default=5)
    args = p.parse_args()
    target, captions = load("demo"), [r.caption for r in World().captions("ordinary")][:PROMPTS]
    target.identity()  # hashing the weights belongs to loading
    rows, facts = [], {"machine": machine(), "prompts": PROMPTS, "seeds": SEEDS}
    for batch in args.batch_sizes:
        batches = (PROMPTS * SEEDS + SEEDS) // batch
        bare(target, 3, batch)
        pairs = [(bare(target, batches, batch), audited(target, captions, batch)) for _ in range(args.repeats)]
        alone = statistics.median(a for a, _ in pairs)
        full = statistics.median(b for _, (b, _) in pairs)
        (forwards,) = {f for _, (_, f) in pairs}
        assert forwards == PROMPTS * SEEDS + SEEDS
        ratios = [b / a for a, (b, _) in pairs]
        spread = f"{full / alone:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append([str(batch), str(forwards), f"{alone:.2f} s", f"{full:.2f} s", spread])
        facts[f"batch {batch}"] = {"bare": alone, "audit": full, "ratios": ratios, "forwards": forwards}
        print(rows[-1], flush=True)
    columns = ["batch", "forwards", "bare denoiser calls", "audit, run folder included", "ratio (range of pairs)"]
    text = (
        f"`python bench/first_step.py` on {machine()}: {PROMPTS} prompts × {SEEDS} seeds of the bundled model, medians of "
        f"{args.repeats} pairs.\n\n{markdown_table(columns, rows)}"
    )
    write_block(DOCS / "performance.md", "measured-first-step", text, facts)


if __name__ == "__main__":
    main()
