"""``regions.json`` of a run: where its worst prompts pull their pictures. Derived, and may be deleted; no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..records.documents import read_json
from ..records.store import write_whole

__all__ = ["NAME", "read_regions", "write_regions"]

NAME = "regions.json"


def write_regions(run: Path, kept: Mapping[str, Mapping[str, str]]) -> Path:
    """From prompts to ``file`` (inside the run folder) and ``alt`` (the map in words)."""
    return write_whole(run / NAME, (json.dumps(kept, ensure_ascii=False, indent=1) + "\n").encode())


def read_regions(run: Path) -> dict[str, tuple[str, str]]:
    """From prompts to file and words; empty where there are none, or where the file is damaged."""
    try:
        stored = read_json(run / NAME, run)
        return {str(prompt): (str(entry["file"]), str(entry["alt"])) for prompt, entry in stored.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
