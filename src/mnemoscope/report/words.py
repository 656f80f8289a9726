"""Small words that figures and sentences share."""

from __future__ import annotations

import re
from typing import TypeAlias

Number: TypeAlias = float | int
"""A number as callers have it."""

NO_GROUP = "(no group)"
"""What prompts without a group are called together."""

# Characters that XML 1.0 cannot carry at all, and lone surrogates, which UTF-8 cannot.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

# Characters that make a text read in another order than it is written: evidence must not do that silently.
_REORDERING = re.compile("[\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """``text`` as it can stand in XML, HTML and UTF-8, with its hidden characters made visible.

    NUL becomes ␀ and the right-to-left override ⟨U+202E⟩; text of right-to-left scripts stays as it is.
    """
    text = _UNPRINTABLE.sub(lambda m: chr(0x2400 + ord(m[0])) if ord(m[0]) < 0x20 else "\ufffd", text)
    return _REORDERING.sub(lambda m: f"⟨U+{ord(m[0]):04X}⟩", text)


def percent(value: Number) -> str:
    """A share as a percentage with as many digits as it deserves: 0.5 %, 3 %, 57 %."""
    share = 100 * value
    if share and abs(share) < 0.1:
        return f"{share:.1g} %"
    return f"{share:.1f} %" if abs(share) < 10 and round(share, 1) != round(share) else f"{share:.0f} %"


def prompts(n: int, noun: str = "prompt") -> str:
    """``1 prompt``, ``1,200 prompts``."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def verb(n: int, one: str, many: str) -> str:
    """The verb that goes with n subjects."""
    return one if n == 1 else many


def expected(count: Number) -> str:
    """How many prompts chance alone puts above a threshold: ``fewer than 1``, ``about 12``."""
    return "fewer than 1" if count < 0.95 else f"about {count:.0f}"


def reference(name: str) -> str:
    """A reference's id as it is spoken of: numbers get a ``#``."""
    return f"#{name}" if name.isdigit() else name
