"""What came of all tries: a row for each kind, and every fault once with the input that shows it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .tries import COLUMNS, Kind

BEGIN, END = "<!-- fuzz -->", "<!-- /fuzz -->"

SHOWN = 400
"""Characters of a fault."""


def show(
    results: Sequence[dict[str, Any]], chosen: Sequence[Kind], planned: int, seed: int, seconds: float
) -> dict[str, Any]:
    """Print the table and the faults, and give both as a document."""
    rows = [_row(kind.name, [r for r in results if r["kind"] == kind.name]) for kind in chosen]
    total = {name: sum(row[name] for row in rows) for name in ("inputs", "kills", *COLUMNS)}
    document: dict[str, Any] = {
        "seed": seed, "minutes": round(seconds / 60, 1), "planned": planned, "complete": len(results) == planned,
        "clean": not any(total[name] for name in COLUMNS), "rows": rows, "total": {"kind": "all", **total}, "faults": _faults(results),
    }  # fmt: skip
    print(_table(document))
    for fault in document["faults"]:
        print(f"\n{fault['column']} × {fault['times']}: {fault['kind']}: {fault['words'][:SHOWN]}")
        print(f"    --kind '{fault['kind']}' --only {fault['number']}: {fault['input'][:SHOWN]}")
    if not document["complete"]:
        print(f"\nThere was time for {len(results)} of {planned} inputs.")
    return document


def markdown(document: dict[str, Any]) -> str:
    """The table as it stands in the docs, with the command that makes it."""
    total = document["total"]
    counted = f"{total['inputs']:,} inputs and {total['kills']:,} kills and signals in {document['minutes']:g} minutes"
    about = f"`make fuzz SEED={document['seed']}`: {counted}."
    return f"{about}\n\n{_table(document)}\n"


def put_in(text: str, file: Path) -> None:
    """Write a text into a file: between its marks, where it is a page that has them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    page = file.read_text(encoding="utf-8") if file.exists() else ""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    file.write_text(f"{before}{begin}\n{text}{end}{after}" if end else text, encoding="utf-8")


def _row(name: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    columns = Counter(column for r in results for column in {column for column, _ in r["faults"]})
    return {
        "kind": name, "inputs": len(results), "kills": sum(r["kills"] for r in results), **{c: columns[c] for c in COLUMNS},
        "seconds": round(sum(r["seconds"] for r in results), 1),
    }  # fmt: skip


def _table(document: dict[str, Any]) -> str:
    names = ("inputs", "kills", *COLUMNS)
    lines = [f"| kind | {' | '.join(names)} |", f"|---|{'--:|' * len(names)}"]
    for row in [*document["rows"], document["total"]]:
        lines.append(f"| {row['kind']} | {' | '.join(f'{row[name]:,}' for name in names)} |")
    return "\n".join(lines)


def _faults(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Faults that differ in more than numbers and names, the most frequent first, each with its shortest input."""
    groups: dict[tuple[str, str, str], list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for r in results:
        for column, words in r["faults"]:
            groups[r["kind"], column, re.sub(r"\d+|'[^']*'|\"[^\"]*\"", "…", words)].append((words, r))
    found = []
    for (kind, column, _), cases in groups.items():
        words, least = min(cases, key=lambda case: len("; ".join(case[1]["words"])))
        numbers = sorted(r["number"] for _, r in cases)
        found.append(
            {
                "kind": kind,
                "column": column,
                "times": len(cases),
                "words": words,
                "number": least["number"],
                "input": "; ".join(least["words"]),
                "numbers": numbers[:20],
            }
        )
    return sorted(found, key=lambda fault: (-fault["times"], fault["kind"]))
