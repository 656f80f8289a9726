"""Every mitigation at every strength on the bundled world, and under attack: docs/mitigations.md.

    python bench/mitigations.py      about two hours on 2 cores; with --seeds 2 --steps 25 half an hour. Continues where it was stopped

The same as `mnemoscope bench mitigations`, with the results written into the document.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from common import DOCS, machine, markdown_table, write_block
from mnemoscope import load
from mnemoscope.demo.mitigations import LEVELS, compare
from mnemoscope.lab.pages import alone
from mnemoscope.records.trials import NONE, Cell, Trial
from mnemoscope.report.mitigations import (
    Gate,
    Rows,
    attacks_table,
    groups_of,
    numbers,
    ordinary_table,
    tradeoff,
    worst_table,
)
from mnemoscope.report.words import percent

WORST = f"planted × {LEVELS[0]}"
STYLE = (
    "<style>text{font:13px sans-serif;fill:#555}.strong{font-weight:600}.axis,.grid{stroke:#bbb}.grid{stroke:#e4e7ea}"
    "polyline{fill:none;stroke-width:2}polyline.c0{stroke:#0072b2}circle.c0{fill:#0072b2}.chance{stroke:#bbb;stroke-width:1}"
    "circle.ring{fill:none;stroke:#d55e00;stroke-width:2}</style>"
)


def figure(trial: Trial, gate: Gate | None, file: Path) -> None:
    """The trade-off as a picture that stands alone."""
    file.write_text(alone(str(tradeoff(trial, WORST, gate)), STYLE), encoding="utf-8")


def best(trial: Trial, method: str) -> Cell:
    """The method's strength with the fewest copies on the most repeated pictures; of equals, the one that keeps most fidelity."""
    rows = Rows.of(trial, WORST)
    found = [(numbers(trial, c, rows), c) for c in trial.cells if c.method == method]
    return min(found, key=lambda pair: (pair[0].copies.value, pair[0].loss.value))[1]


def when(trial: Trial, gate: Gate) -> tuple[list[str], list[list[str]]]:
    """One row per method: what it reaches at its best strength, and what that costs."""
    columns = ["method", f"copies of {WORST}", "fidelity lost there", "ordinary pictures changed by", "copies of templates",
               "extra F", "B", "attacked pictures that come back"]  # fmt: skip
    nothing, made = trial.cells[0], []
    for method in dict.fromkeys(c.method for c in trial.cells if c.method != NONE):
        cell = best(trial, method)
        worst, plain, same = (
            numbers(trial, cell, Rows.of(trial, *groups)) for groups in ((WORST,), tuple(trial.plain), ("template",))
        )
        attack = next((a for a in trial.attacks if a.method == method), None)
        back = (
            "not attacked"
            if attack is None
            else f"{sum(attack.after)}/{len(attack.after)} at strength {attack.strength:g}"
        )
        made.append([cell.label, percent(worst.copies.value), f"{100 * worst.loss.value:+.1f} %", f"{plain.change.value:.3f}",
                     percent(same.copies.value + same.templates.value), f"{cell.forwards - nothing.forwards:+.1f}",
                     f"{cell.backwards:.1f}", back])  # fmt: skip
    return columns, made


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, default=Path("build/bench-mitigations"))
    p.add_argument("--seeds", type=int, default=4)
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--per-group", type=int, default=24)
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--method", action="append")
    p.add_argument("--print", action="store_true")
    args = p.parse_args()
    told = {"what": ""}

    def progress(what: str, done: int, asked: int) -> None:
        if what != told["what"]:
            told["what"] = what
            print(what, flush=True)

    trial = compare(
        load("demo"), args.folder, args.method, seeds=args.seeds, steps=args.steps, per_group=args.per_group,
        batch_size=args.batch_size, progress=progress,
        skip=print,
    )  # fmt: skip
    command = f"python bench/mitigations.py --seeds {args.seeds} --steps {args.steps} --per-group {args.per_group}"
    trial = replace(trial, machine=machine(), command=command)
    trial.save(args.folder / "trial.json")
    gates = {k: Gate.of(trial, int(k)) for k in trial.ordinary}
    gate = gates["1"]
    about = (
        f"`{command}` on {trial.machine}: DDIM {trial.steps}, guidance {trial.guidance:g}, {trial.seeds} seeds; copies by "
        f"{trial.reference}; fidelity by {trial.captions}; intervals: paired bootstrap over pictures and families, 95 %."
    )
    blocks = {
        "which": markdown_table(*when(trial, gate)),
        "gated": "\n\n".join(
            f"Gate: magnitude over the first {'step' if k == '1' else k + ' steps'} above {g.above:.3f} (1 % of ordinary samples).\n\n"
            + markdown_table(*worst_table(trial, WORST, g))
            for k, g in gates.items()
        ),
        "repeated": "\n\n".join(
            f"**{group}**\n\n" + markdown_table(*worst_table(trial, group))
            for group in groups_of(trial)
            if group not in trial.plain
        ),
        "ordinary": markdown_table(*ordinary_table(trial, gate)),
        "attacks": markdown_table(*attacks_table(trial, gate)),
    }
    if args.print:
        print("\n\n".join(blocks.values()))
        return
    facts = {"machine": trial.machine, "command": command, "gates": {k: g.above for k, g in gates.items()},
             "rows": {name: text.splitlines() for name, text in blocks.items()}}  # fmt: skip
    for name, text in blocks.items():
        write_block(DOCS / "mitigations.md", f"measured-mitigations-{name}", text, facts if name == "which" else None)
    write_block(DOCS / "mitigations.md", "measured-mitigations", about)
    for gated, name in ((None, "mitigations.svg"), (gate, "mitigations-gated.svg")):
        figure(trial, gated, DOCS / "images" / name)


if __name__ == "__main__":
    main()
