"""The one reader of ``thresholds.json``: wherever thresholds come from, they are recomputed from their scores, never believed.

It brings scipy, and no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from .. import stats
from ..errors import UnknownName, UsageError
from ..parsing import parse_json
from .schema import FORMAT, Thresholds
from .store import first_error, short

__all__ = ["parse_thresholds", "rounding_under"]

RTOL = 1e-9
"""Relative difference of numbers that are the same but for the order of additions."""


def parse_thresholds(data: bytes | str) -> Thresholds:
    """Read ``thresholds.json``.

    Args:
        data: The file's content.

    Raises:
        ValueError: it is something else, or what it states does not follow from its scores; one line, which names the key.
    """
    content = parse_json(data)
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__}, not an object")
    # First, because a newer file may well have other keys.
    if content.get("format", FORMAT) != FORMAT:
        raise ValueError(f"it has format {short(repr(content['format']))}, not {FORMAT}")
    try:
        record = Thresholds.model_validate(content)
    except ValidationError as e:
        raise ValueError(first_error(e)) from None
    _require_derived(record)
    return record


def rounding_under(setting: Mapping[str, Any]) -> float | None:
    """Relative rounding of scores under a setting; None where its dtype is one we know nothing about."""
    target = setting.get("target")
    dtype = target.get("dtype", "float32") if isinstance(target, Mapping) else "float32"
    try:
        return stats.rounding(str(dtype))
    except UnknownName:
        return None


def _require_derived(record: Thresholds) -> None:
    """Refuse a threshold, an interval or a rounding that its scores, its rate and its setting do not give."""
    n = len(record.scores)
    try:
        derived = stats.threshold_at_fpr(record.scores, record.fpr, confidence=record.confidence)
    except UsageError as e:
        raise ValueError(f"scores: {e}") from None
    if record.threshold != derived.value:
        raise ValueError(
            f"threshold is {record.threshold!r}, and {derived.value!r} follows from its {n} scores at a false-positive rate of "
            f"{record.fpr:g}"
        )
    bounds = (derived.interval.low, derived.interval.high)
    for place, stated, bound in zip(("lower", "upper"), record.interval, bounds, strict=True):
        if not _same(stated, bound):
            derived_bound = repr(bound) if math.isfinite(bound) else "none"
            raise ValueError(
                f"the {place} bound of interval is {stated}, and {derived_bound} follows from its {n} scores"
            )
    if record.rounding is not None and not _same(record.rounding, rounding_under(record.setting) or record.rounding):
        raise ValueError(
            f"rounding is {record.rounding!r}, and {rounding_under(record.setting)!r} follows from the dtype of its setting"
        )


def _same(stated: float | None, derived: float) -> bool:
    if stated is None or not math.isfinite(derived):
        return stated is None and not math.isfinite(derived)
    return math.isclose(stated, derived, rel_tol=RTOL)
