"""The page of a folder of measured pictures, and the same numbers as Markdown and JSON: as self-contained as an audit's report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..errors import UsageError
from ..records.files import folder_name
from ..records.measures import NAME, Measures
from ..records.store import write_whole
from . import measured, plots
from .archive import sha256_file
from .html import environment, flat, git_words, shared_environment

__all__ = ["write_json", "write_markdown", "write_report"]

Folder = str | Path
SHOWN = 24
"""How many pictures are shown with what they lead to; all of them stand in the table."""
ROWS = 2000
"""How many rows the table has."""


def write_report(
    folder: Folder, out: Folder | None = None, *, levels: Folder | None = None, blur: bool = True, shown: int = SHOWN
) -> Path:
    """Write ``report.html`` of a folder of measured pictures.

    Args:
        folder: What ``mnemoscope measure`` wrote.
        out: The file; default ``report.html`` in the folder.
        levels: Scores of pictures of known dose (see :meth:`~mnemoscope.records.measures.Measures.levels`).
        blur: Blur pictures that were reproduced until they are pointed at, focused or clicked.
        shown: How many pictures are shown with what they lead to.

    Raises:
        RunError: the folder holds no measured pictures or is damaged, or the file cannot be written.
        UsageError: ``shown`` is negative.
    """
    if shown < 0:
        raise UsageError(f"shown = {shown}: give the number of pictures to show, 0 for none.")
    facts = _facts(folder, levels)
    found: Measures = facts["measures"]
    figure = measured.strip(found, facts["levels"]) if facts["levels"].scores and found.entries else None
    page = shared_environment().get_template("measured.html.jinja")
    made = page.render(
        **facts,
        cards=measured.cards(found, shown),
        strip=figure,
        blur=blur,
        plot_css=Markup(plots.CSS),
        words=measured,
        most=ROWS,
    )
    return _write(folder, out, "html", made)


def write_markdown(folder: Folder, out: Folder | None = None, *, levels: Folder | None = None) -> Path:
    """The numbers without pictures, as ``report.md``; arguments and errors as :func:`write_report`."""
    page = environment(escape=False).get_template("measured.md.jinja")
    return _write(folder, out, "md", page.render(**_facts(folder, levels), words=measured))


def write_json(folder: Folder, out: Folder | None = None, *, levels: Folder | None = None) -> Path:
    """The numbers as ``report.json``; arguments and errors as :func:`write_report`."""
    facts = _facts(folder, levels)
    content = measured.plain(facts["measures"]) | {"levels": facts["levels"].scores, "untested": facts["untested"]}
    return _write(folder, out, "json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _write(folder: Folder, out: Folder | None, extension: str, page: str) -> Path:
    path = Path(folder) / f"report.{extension}" if out is None else Path(out)
    return write_whole(path, page.encode("utf-8", errors="replace"))


def _facts(folder: Folder, levels: Folder | None) -> dict[str, Any]:
    """What all forms of the report say."""
    found = Measures.read(folder)
    known, request = found.levels(levels), found.request
    return {
        "measures": found,
        "request": request,
        "name": folder_name(folder),
        "headline": measured.headline(found),
        "levels": known,
        "untested": measured.untested(found, known),
        "companions": measured.companion_names(found.entries),
        "forwards": sum(e.numbers.forwards for e in found.entries),
        "backwards": sum(e.numbers.backwards for e in found.entries),
        "model": flat(request.target),
        "preset": flat(request.preset),
        "descriptor": flat(request.descriptor),
        "machine": flat(request.machine),
        "git": git_words(request.git),
        "sha256": sha256_file(Path(folder) / NAME),
    }
