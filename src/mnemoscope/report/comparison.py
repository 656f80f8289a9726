"""A stored document or page held against the one that follows from the rows.

What this very code computed must come out equal. Other versions may draw the bounds of intervals a little differently and word sentences
otherwise, so of theirs the bounds are compared with a tolerance and of sentences the numbers. Where these do not agree either, nobody
can say here whether the version or a forger made the difference.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

import numpy as np

from ..records.store import short
from ..similarity.decoding import KEPT, decode

__all__ = ["RTOL", "SHOWN", "bounds_apart", "find_differences", "is_worded", "same_page", "sentences_apart"]

Place: TypeAlias = tuple[str | int, ...]
"""The way to a value inside of a document."""

RTOL = 1e-9
"""Relative difference of numbers that are the same but for the order of additions."""

SHOWN = 5
"""How many differences of one file are named."""

SENTENCES = ("headline", "subline", "access", "not_tested", "missing")
"""What another version may word otherwise, by the first key."""

BOUNDS, WORDS = ("low", "high"), ("note", "method")
"""Of an interval: what another version may draw otherwise, and how it words that."""

DRAWN_RTOL, DRAWN_ATOL = 0.25, 0.02
"""How far the bounds of two draws of one interval may lie apart: as a share of its width, and besides. Of a thousand resamples a bound
moves by about 3 % of the width."""

EXACT_ATOL = 1e-6
"""The same of bounds that are computed and not drawn."""


# Documents ----------------------------------------------------------------------------------------------------------------


def find_differences(
    name: str, stored: Any, derived: Any, compared: Callable[[Place], bool] = lambda place: True
) -> Iterator[str]:
    """Where a file says something else than follows from the rows, in sentences.

    Args:
        name: The file.
        stored: What it holds, as plain values.
        derived: What follows.
        compared: Which places must agree.
    """
    was, now = dict(_leaves(stored)), dict(_leaves(derived))
    apart = [p for p in {**was, **now} if p and compared(p) and not _equal(was.get(p, _Nothing), now.get(p, _Nothing))]
    for path in apart[:SHOWN]:
        says, gives = (_words(values.get(path, _Nothing)) for values in (was, now))
        yield f"{name}: {'.'.join(map(str, path))} is {says}, and {gives} follows"
    if len(apart) > SHOWN:
        yield f"{name}: {len(apart) - SHOWN} more differences of this kind"


def is_worded(place: Place) -> bool:
    """Whether another version may draw or word what stands at a place otherwise."""
    return place[0] in SENTENCES or place[-1] in BOUNDS + WORDS


def bounds_apart(name: str, stored: Any, derived: Any) -> Iterator[str]:
    """Bounds of intervals that lie farther from those that follow than another version can draw them, in sentences.

    Args:
        name: The file.
        stored: What it holds, as plain values.
        derived: What follows.
    """
    was, now = dict(_leaves(stored)), dict(_leaves(derived))
    for place in [p for p in {**was, **now} if p and p[-1] in BOUNDS]:
        one, other, close = was.get(place), now.get(place), _tolerance(now, place)
        if not _is_close(one, other, close):
            yield f"{name}: {'.'.join(map(str, place))} is {_words(one)}, and {_words(other)} follows, up to {close:.2g}"


def _is_close(one: Any, other: Any, tolerance: float) -> bool:
    """Whether two bounds are numbers that differ by no more than that, or neither is a number."""
    if _is_number(one) and _is_number(other):
        return abs(one - other) <= tolerance
    return type(one) is type(other)


def _tolerance(values: Mapping[Place, Any], place: Place) -> float:
    """How far a bound may lie from the one that follows: only those of resamples are drawn at random."""
    low, high, method = (values.get((*place[:-1], key)) for key in (*BOUNDS, "method"))
    if "resamples" not in str(method) or not (_is_number(low) and _is_number(high)):
        return EXACT_ATOL
    return DRAWN_ATOL + DRAWN_RTOL * float(high - low)


def sentences_apart(stored: Mapping[str, Any], derived: Mapping[str, Any]) -> tuple[bool, str | None]:
    """Whether sentences are the same, and where they are not, the first number that only one side names; None: they name the same."""
    one, other = (
        [value for place, value in _leaves(document) if place and place[0] in SENTENCES]
        for document in (stored, derived)
    )
    if one == other:
        return True, None
    return False, _number_apart(*(sorted(_numbers(" ".join(map(str, sentences)))) for sentences in (one, other)))


def _numbers(text: str) -> Iterator[float]:
    for digits in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?", text):
        yield float(digits.replace(",", ""))


def _number_apart(one: Sequence[float], other: Sequence[float]) -> str | None:
    for a, b in zip(one, other, strict=False):
        if not math.isclose(a, b, rel_tol=1e-6):
            return f"{min(a, b):g}"
    longer = max(one, other, key=len)
    return f"{longer[min(len(one), len(other))]:g}" if len(one) != len(other) else None


class _Nothing:
    """Stands for a value that one side lacks."""


def _leaves(value: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every plain value inside, with the way to it; empty containers count as values."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inside or not value:
        yield path, value
        return
    for key, item in inside:
        yield from _leaves(item, (*path, key))


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _equal(one: Any, other: Any) -> bool:
    if _is_number(one) and _is_number(other):
        return math.isclose(one, other, rel_tol=RTOL, abs_tol=RTOL)
    return type(one) is type(other) and bool(one == other)


def _words(value: Any) -> str:
    return "nothing" if value is _Nothing else short(json.dumps(value, ensure_ascii=False))


# Pages --------------------------------------------------------------------------------------------------------------------

PICTURE = re.compile(rb"data:image/webp;base64,([A-Za-z0-9+/=]+)")

LEVELS = 2.0
"""Mean difference in gray levels of two codings of one picture: another version of the codec gives other bytes."""


def same_page(stored: bytes, rendered: bytes) -> bool:
    """Whether two pages say and show the same: equal text, and pictures that differ by no more than their coding."""
    if stored == rendered:
        return True
    shown, expected = PICTURE.findall(stored), PICTURE.findall(rendered)
    if len(shown) != len(expected) or PICTURE.sub(b"", stored) != PICTURE.sub(b"", rendered):
        return False
    return all(one == other or _same_picture(one, other) for one, other in zip(shown, expected, strict=True))


def _same_picture(one: bytes, other: bytes) -> bool:
    try:
        shown = [decode(base64.b64decode(data, validate=True), KEPT).picture for data in (one, other)]
    except ValueError:
        return False
    first, second = shown
    if first is None or second is None or first.size != second.size:
        return False
    apart = np.abs(np.asarray(first, dtype=np.int16) - np.asarray(second, dtype=np.int16))
    return float(apart.mean()) <= LEVELS
