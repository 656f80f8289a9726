"""What "a copy" means for a descriptor where nothing else is known: null distributions on the bundled world.

Pairs of different pictures of the bundled world (never-shown against shown ones) fix, for each descriptor, the similarity that a
stated share of such pairs exceeds. They are small clean pictures: on other pictures the same similarity means something else, and
:meth:`~mnemoscope.similarity.index.ReferenceIndex.calibrate` on pictures of one's own is the better threshold. Measured by
``bench/descriptors.py``. No torch.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from ..records.documents import read_json

__all__ = ["FILE", "FMR", "in_words", "null_of"]

FILE = Path(__file__).parent / "assets" / "nulls.json"
FMR = (1e-2, 1e-3, 1e-4)
"""Stated false-match rates of a pair."""


@cache
def _nulls() -> dict[str, dict[str, Any]]:
    return read_json(FILE)


def null_of(name: str) -> dict[str, Any] | None:
    """The null distribution of a descriptor by its stored name; None: it was not measured.

    Its ``thresholds`` are similarities by the share of different pairs that exceed them (``"0.001"``); ``search threshold`` is the one
    that the nearest of ``search of`` pictures exceeds in 5 % of searches.
    """
    return _nulls().get(name)


def in_words(kind: str, fmr: float = 1e-3) -> str:
    """The thresholds of all measured descriptors of a kind: ``0.83 (pixels-16)``, or ``not measured``."""
    found = {name: n["thresholds"][f"{fmr:g}"] for name, n in _nulls().items() if name.split("-")[0] == kind}
    return ", ".join(f"{value:.2f} ({name})" for name, value in found.items()) or "not measured"
