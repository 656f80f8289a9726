"""Options that several commands have, and ``name=value`` ones: what a command hands on to whoever knows the names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from .. import redaction
from ..bounds import Bound, shown
from ..errors import UsageError
from ..parsing import ParseError, parse_yaml
from ..records.places import require_readable, require_utf8


def option(text: str, *names: str, parser: Callable[[str], Any] | None = None) -> Any:
    """An option whose default is the configuration's, not the command line's; ``parser`` is of :mod:`.places`."""
    return typer.Option(*names, help=text, show_default=False, parser=parser)


def number_option(bound: Bound, text: str, *names: str) -> Any:
    """An option that takes a number within a bound; whatever else is given is refused before the command begins."""

    def read(given: Any) -> Any:
        value = _number(given, bound)
        if not bound.admits(value):
            raise typer.BadParameter(f"it is {shown(given)}, and must be {bound.words}.")
        return value

    read.bound = bound  # type: ignore[attr-defined]
    return typer.Option(*names, help=text, parser=read, metavar="<int>" if bound.whole else "<float>")


def _number(given: Any, bound: Bound) -> Any:
    """The number that a text is; whatever else is given, as it is."""
    if not isinstance(given, str):
        return given
    try:
        return int(given) if bound.whole else float(given)
    except ValueError:
        return given


LoRA = Annotated[
    list[str] | None,
    option("LoRA file or hub id to put on the model; repeatable, and file=0.8 scales it.", "--lora"),
]


def read_pairs(option: str, pairs: Iterable[str] | None, example: str) -> dict[str, Any]:
    """Values as YAML reads them, so that 3 is a number and true is a switch; what is no YAML stays text.

    Raises:
        UsageError: a pair without ``=``, or with what a record has in the place of a secret.
    """
    found = {}
    for pair in pairs or ():
        name, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"{option} needs a name and a value; write name=value, for instance {example}.")
        try:
            found[name] = parse_yaml(text)
        except ParseError:
            found[name] = text
        if not redaction.is_complete(found[name]):
            raise UsageError(
                f"{option} {name} comes from a record, which keeps no secret; give the value, or leave it out."
            )
    redaction.remember(found)
    return found


def model_options(pairs: list[str] | None, lora: list[str] | None = None) -> dict[str, Any]:
    """``name=value`` pairs for the loader, and the LoRA files with their scales."""
    require_utf8(pairs, "--model-option")
    found = read_pairs("--model-option", pairs, "revision=main")
    for name in found.keys() & {"dtype", "device"}:
        raise UsageError(f"--model-option {name}: write --{name} {found[name]}.")
    if lora:
        if "lora" in found:
            raise UsageError("--lora and --model-option lora=… both name a LoRA; repeat --lora for several.")
        found["lora"] = dict(map(_scaled, lora))
        for file in found["lora"]:
            require_utf8(file, "--lora")
            require_readable(file)  # a hub id is nothing here, and passes
    return found


def _scaled(text: str) -> tuple[str, float]:
    """``file`` or ``file=scale``."""
    file, equals, scale = text.rpartition("=")
    try:
        return (file, float(scale)) if equals else (text, 1.0)
    except ValueError:
        return text, 1.0  # a name with an equals sign
