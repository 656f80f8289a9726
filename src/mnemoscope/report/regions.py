"""``regions.json`` of a run: where its worst prompts pull their pictures. Derived, and may be deleted; no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from ..errors import RunError
from ..records.documents import read_json
from ..records.store import first_error, write_whole

__all__ = ["NAME", "read_regions", "write_regions"]

NAME = "regions.json"


def write_regions(run: Path, kept: Mapping[str, Mapping[str, str]]) -> Path:
    """From prompts to ``file`` (inside the run folder) and ``alt`` (the map in words)."""
    return write_whole(run / NAME, (json.dumps(kept, ensure_ascii=False, indent=1) + "\n").encode())


def read_regions(run: Path) -> dict[str, tuple[str, str]]:
    """From prompts to file and words; empty where there are none.

    Raises:
        RunError: the file is damaged; the message names the key.
    """
    path = run / NAME
    try:
        stored = TypeAdapter(dict[str, _Map]).validate_python(read_json(path, run))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else first_error(e) if isinstance(e, ValidationError) else str(e)
        raise RunError(f"{path} cannot be read ({why or e}); delete it: `mnemoscope regions` makes it again.") from None
    return {prompt: (entry.file, entry.alt) for prompt, entry in stored.items()}


class _Map(BaseModel):
    """The map of one prompt; later versions may write more."""

    file: str = Field(max_length=1000)
    alt: str = Field(max_length=10_000)
