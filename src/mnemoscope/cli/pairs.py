"""``name=value`` options: what a command hands on to whoever knows the names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import UsageError


def read_pairs(option: str, pairs: Iterable[str] | None, example: str) -> dict[str, Any]:
    """Values as YAML reads them, so that 3 is a number and true is a switch; what is no YAML stays text.

    Raises:
        UsageError: a pair without ``=``.
    """
    import yaml

    found = {}
    for pair in pairs or ():
        name, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"{option} {pair!r} has no value; write name=value, for instance {example}.")
        try:
            found[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            found[name] = text
    return found


def model_options(pairs: list[str] | None) -> dict[str, Any]:
    """``name=value`` pairs for the loader."""
    found = read_pairs("--model-option", pairs, "revision=main")
    for name in found.keys() & {"dtype", "device"}:
        raise UsageError(f"--model-option {name}: write --{name} {found[name]}.")
    return found
