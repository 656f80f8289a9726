"""What docs/lora.md promises: a LoRA on twenty pictures, and how many of them it gives back, with and without it.

    python bench/lora.py    a few minutes on 2 cores; goes on where it was stopped; writes docs/lora.md

Runs the page's own Python block and commands, in order, in a folder of its own.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from common import DOCS, machine, markdown_table, write_block
from mnemoscope import Run
from mnemoscope.report.summary import read_summary

PAGE = DOCS / "lora.md"
AUDITS = {"the base model with the LoRA": "runs/lora-audit", "the base model alone": "runs/base-audit"}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=Path, default=Path("build/lora"))
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    text = PAGE.read_text(encoding="utf-8")
    if not (args.work / "pictures" / "metadata.jsonl").exists():
        (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        subprocess.run([sys.executable, "-c", block], cwd=args.work, check=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    commands = re.findall(r"^    (mnemoscope .*)$", text, re.MULTILINE)
    for command in commands:
        print(command, flush=True)
        subprocess.run(command, shell=True, cwd=args.work, check=True, env=os.environ | {"PATH": path})
    rows, facts = [], {}
    for who, folder in AUDITS.items():
        summary = read_summary(args.work / folder)
        assert summary.copies is not None  # both audits have a reference
        nearest = [row.nearest.similarity for row in Run(args.work / folder).rows() if row.nearest]
        middle = sorted(nearest)[len(nearest) // 2]
        rows.append([who, summary.copies.words, str(summary.copies_in(3)), f"{middle:.2f}, {max(nearest):.2f}"])
        facts[who] = {
            "prompts": summary.copies.n, "copied": summary.copies.k, "in 3 of 4": summary.copies_in(3), "similarity": nearest,
        }  # fmt: skip
    table = markdown_table(
        [
            "drawn by",
            "captions with a copy found",
            "in at least 3 of 4 seeds",
            "similarity to the nearest: median, most",
        ],
        rows,
    )
    told = f"Measured by `python bench/lora.py` (the commands of this page) on {machine()}: 20 captions, 4 seeds, one training."
    write_block(PAGE, "measured-lora", f"{told}\n\n{table}", facts)


if __name__ == "__main__":
    main()
