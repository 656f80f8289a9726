"""Plugins by name: ours and others' come in through the same entry points. Nothing is imported before it is asked for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .bounds import bounds_of
from .errors import UnknownName, UsageError

__all__ = ["BUNDLED", "build", "document_options", "find", "installed", "options_of"]

BUNDLED = {"demo": "text-to-image", "demo-unconditional": "unconditional"}
"""Models that come with mnemoscope, and what the world that trained them is called, which is their folder under ``demo/assets``."""

SHORT = 16
"""Numbers that a list in a document's options may have."""


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
    _require_known(kind, name, make, given)
    for option, bound in bounds_of(make).items():
        if given.get(option) is not None:
            given[option] = bound.judge(f"{option} of the {kind} {name}", given[option])
    try:
        return make(**given)
    except (TypeError, ValueError) as e:
        raise UsageError(f"{kind} {name} does not take {given} ({e}); see `mnemoscope ls {kind}s`.") from e


def _require_known(kind: str, name: str, make: Callable[..., Any], options: Mapping[str, Any]) -> None:
    accepted = list(inspect.signature(make).parameters)
    for option in options:
        if option not in accepted:
            raise UnknownName(f"option of {kind} {name}", option, accepted)


def document_options(kind: str, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a plugin that a document names (an index, a run, a packet, a configuration file), once they are known to be harmless.

    Whoever wrote the document may be a stranger, so it chooses among what is installed here, and its values are numbers and switches. A
    text may be the path of a file or of a program; only the class itself can tell. A class that has texts to choose from has a class
    method ``document_options``, which takes the options and returns those to build it with, or raises UsageError.

    Raises:
        UnknownName: nothing of this kind, or no option of it, has this name.
        UsageError: a value that a document must not choose.
    """
    make = find(kind, name)
    _require_known(kind, name, make, options)
    judge = getattr(make, "document_options", None)
    if judge is not None:
        return dict(judge(options))
    for option, value in options.items():
        if not is_number(value):
            raise UsageError(
                f"the document chooses {option} of the {kind} {name}, and is trusted with numbers and switches only; if you want that "
                f"{option}, give it yourself, on the command line or in Python."
            )
    return dict(options)


def is_number(value: Any) -> bool:
    """Whether a plain value is a finite number, a switch, nothing, or a short list of these."""
    if isinstance(value, (list, tuple)):
        return len(value) <= SHORT and all(is_number(item) and not isinstance(item, (list, tuple)) for item in value)
    return value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))
