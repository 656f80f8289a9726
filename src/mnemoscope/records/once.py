"""What was computed from a large file, kept between processes as long as the file stands still. No torch.

The values lie in the user's own state folder and carry his mark, so that whoever sends a file cannot send its values as well. Where
they cannot be kept, they are computed each time.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..parsing import parse_json
from .files import read_regular, stamp_of
from .marks import has_mark, mark_of, state_folder
from .store import whole

__all__ = ["compute_once"]

KEPT = 512
"""Values that are kept; of more, the oldest go."""

LARGE = 1 << 20
"""Bytes of a file from which on its values are kept: a smaller one is read as fast as what is kept of it."""

SETTLED = 2.0
"""Seconds that a file must have stood still: clocks of file systems are coarse, and a change within one tick leaves the stamp as it is."""

KIND = "computed"
"""Kind of the marks, and name of the folder."""

LONGEST = 1 << 16
"""Bytes of a kept value."""


def compute_once(path: Path, what: str, compute: Callable[[Path], Any]) -> Any:
    """``compute(path)``, or what it gave when the file was last looked at, if the file is large and stands as it stood then.

    Args:
        path: A regular file. Its stamp is :func:`~mnemoscope.records.files.stamp_of`.
        what: Which value of the file it is.
        compute: Gives a plain value.

    Raises:
        OSError: there is no such file; and what ``compute`` raises.
    """
    path = path.resolve()
    if path.stat().st_size < LARGE:
        return compute(path)
    stamp = stamp_of(path)
    facts = {"path": str(path), "what": what, "stamp": list(stamp)}
    place = _place(path, what)
    if (kept := _read(place, facts)) is not None:
        return kept["value"]
    value = compute(path)
    if stamp == stamp_of(path) and _is_settled(path):
        _keep(place, facts | {"value": value})
    return value


def _is_settled(path: Path) -> bool:
    facts = path.stat()
    return time.time() - max(facts.st_mtime, facts.st_ctime) > SETTLED


def _place(path: Path, what: str) -> Path | None:
    """Where a value is kept; None: the user has no state folder."""
    name = hashlib.sha256(json.dumps([str(path), what]).encode()).hexdigest()[:32]
    try:
        return state_folder() / KIND / f"{name}.json"
    except RuntimeError:
        return None


def _read(place: Path | None, facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What this user kept of a file with these facts."""
    if place is None:
        return None
    try:
        kept = parse_json(read_regular(place, LONGEST))
    except (OSError, ValueError):
        return None
    same = isinstance(kept, dict) and all(kept.get(k) == v for k, v in facts.items())
    return kept if same and has_mark(KIND, kept) else None


def _keep(place: Path | None, facts: Mapping[str, Any]) -> None:
    if place is None:
        return
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with whole(place) as half:
            Path(half).write_text(json.dumps({**facts, "mark": mark_of(KIND, facts)}), "utf-8")
        for old in sorted(place.parent.glob("*.json"), key=_age, reverse=True)[KEPT:]:
            old.unlink(missing_ok=True)
    except OSError:
        return


def _age(path: Path) -> float:
    return path.stat().st_mtime
