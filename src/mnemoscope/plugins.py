"""Plugins by name: ours and others' come in through the same entry points. Nothing is imported before it is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import UnknownName, UsageError

__all__ = ["BUNDLED", "build", "find", "installed", "options_of"]

BUNDLED = {"demo": "text-to-image", "demo-unconditional": "unconditional"}
"""Models that come with mnemoscope, and what the world that trained them is called, which is their folder under ``demo/assets``."""


def installed(kind: str) -> dict[str, EntryPoint]:
    """What is installed of a kind (detector, descriptor, target), by name; nothing is imported."""
    return {entry.name: entry for entry in entry_points(group=f"mnemoscope.{kind}s")}


def find(kind: str, name: str) -> Callable[..., Any]:
    """The class or function behind a name, imported.

    Raises:
        UnknownName: nothing of this kind has this name; the nearest one is suggested.
    """
    known = installed(kind)
    if name not in known:
        raise UnknownName(kind, name, known)
    return known[name].load()


def options_of(kind: str, name: str) -> list[str]:
    """Names of the options that it takes.

    Raises:
        UnknownName: as for :func:`find`.
    """
    return list(inspect.signature(find(kind, name)).parameters)


def build(kind: str, name: str, options: Mapping[str, Any] | None = None) -> Any:
    """One object from plain values, as a config or a manifest holds them.

    Raises:
        UnknownName: nothing of this kind, or no option of it, has this name; the nearest one is suggested.
        UsageError: a value that it refuses.
    """
    make, given = find(kind, name), dict(options or {})
    accepted = list(inspect.signature(make).parameters)
    for option in given:
        if option not in accepted:
            raise UnknownName(f"option of {kind} {name}", option, accepted)
    try:
        return make(**given)
    except (TypeError, ValueError) as e:
        raise UsageError(f"{kind} {name} does not take {given} ({e}); see `mnemoscope ls {kind}s`.") from e
