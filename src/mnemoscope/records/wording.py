"""What can be told from the letters of a prompt alone. Both who stores such a score and who reads it compute it here."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["capitals_and_digits"]


def capitals_and_digits(prompts: Iterable[str]) -> list[float]:
    """The share of each prompt's characters that are capitals or digits; 0 for an empty prompt."""
    return [sum(c.isupper() or c.isdigit() for c in p) / max(len(p), 1) for p in prompts]
