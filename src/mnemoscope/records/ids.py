"""Content-addressed ids: the same on every machine, in every order, for every batch size."""

from __future__ import annotations

import hashlib
import json
from typing import Any

__all__ = ["digest", "sample_id"]


def digest(value: Any) -> str:
    """Twenty hexadecimal digits that stand for a plain value: SHA-256 of its canonical JSON."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]


def sample_id(prompt: str, seed: int, setting: dict[str, Any] | str) -> str:
    """The content-addressed id of one sample.

    Args:
        prompt: The prompt's text.
        seed: The seed's number within the run, from 0.
        setting: Everything else the scores depend on, as plain values; or its :func:`digest`, which is what a loop over many
            samples should hand in.

    Returns:
        Twenty hexadecimal digits, the same on every machine, in every order, for every batch size.
    """
    return digest([prompt, seed, setting if isinstance(setting, str) else digest(setting)])
