"""Which code computes and words the numbers of a packet: versions alone do not say, where code changes between releases."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

__all__ = ["code", "tools"]

PACKAGE = Path(__file__).parent.parent
SOURCES = ("report/**/*.py", "report/**/*.jinja", "records/*.py", "stats.py", "redaction.py")


@cache
def code() -> str:
    """Sixteen digits that stand for the modules and templates that a packet's numbers, sentences and reports come from."""
    sources = sorted(file for pattern in SOURCES for file in PACKAGE.glob(pattern))
    lines = [
        f"{file.relative_to(PACKAGE).as_posix()} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in sources
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def tools() -> dict[str, str]:
    """Versions of what computes the numbers of a packet."""
    return {package: version(package) for package in ("mnemoscope", "numpy", "scipy", "scikit-learn")} | {
        "code": code()
    }
