"""Putting what a study found into its page: a measured block, a plot and the numbers themselves."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..records.store import write_whole

__all__ = ["Finding", "alone", "machine", "replace_block", "table", "write"]


@dataclass(frozen=True)
class Finding:
    """What a study found.

    Attributes:
        name: Of the block, the numbers and the plot.
        page: File name of its page, which holds ``<!-- name -->`` and ``<!-- /name -->``.
        text: Markdown of the block.
        facts: The numbers, plain values.
        plot: An SVG drawing that stands alone; empty: none.
    """

    name: str
    page: str
    text: str
    facts: dict[str, Any] = field(default_factory=dict)
    plot: str = ""


def machine() -> str:
    """The machine a figure was measured on, in words."""
    gpu = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads ({platform.machine()})"
    )
    return f"{gpu}, torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def replace_block(page: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->``.

    Raises:
        UsageError: the page, or its block, is missing.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, _, rest = (page.read_text(encoding="utf-8") if page.exists() else "").partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise UsageError(f"{page} has no block {begin} … {end}; write one where the figures are to stand.")
    write_whole(page, f"{head}{begin}\n{text.strip()}\n{end}{tail}".encode())


def write(folder: Path, finding: Finding) -> None:
    """Replace the study's block of its page; its numbers and plot go beside the page.

    Raises:
        UsageError: the page, or its block, is missing.
    """
    body = finding.text.strip()
    if finding.plot:
        body += f"\n\n![{finding.name.replace('-', ' ')}]({finding.name}.svg)"
    replace_block(folder / finding.page, finding.name, body)
    if finding.plot:
        write_whole(folder / f"{finding.name}.svg", finding.plot.encode())
    write_whole(folder / f"{finding.name}.json", (json.dumps(finding.facts, indent=1) + "\n").encode())


STYLE = (
    "<style>text{font:13px sans-serif;fill:#555}line{stroke:#0072b2}.axis,.grid{stroke:#bbb}circle{fill:#0072b2;fill-opacity:.65}"
    "circle.censored{fill:none;stroke:#d55e00;stroke-width:1.5}polyline{fill:none;stroke:#0072b2;stroke-width:2}"
    + "".join(
        f"text.c{k},circle.c{k}{{fill:{color}}}polyline.c{k}{{stroke:{color}}}circle.open.c{k}{{fill:none;stroke:{color}}}"
        for k, color in enumerate(("#d55e00", "#e69f00", "#009e73", "#56b4e9", "#0072b2", "#777"))
    )
    + "</style>"
)


def alone(drawing: str, style: str = STYLE) -> str:
    """A drawing as a file of its own, with its style inside."""
    start = drawing.index(">") + 1
    return drawing[:start] + style + drawing[start:] + "\n"
