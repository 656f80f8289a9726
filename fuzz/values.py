"""Values on the command line: every option of the commands, with what nobody should give."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from .changes import LONG, NUMBERS, TEXTS
from .children import Child, command, fault_of
from .honest import Honest
from .tries import Kind, Try

Words = tuple[object, ...]
COMMANDS: dict[tuple[str, ...], Callable[[Honest], Words]] = {
    ("audit",): lambda h: (h.model, "--prompts", h.prompts, "--seeds", 1, "--steps", 2, "--dry-run"),
    ("calibrate",): lambda h: (h.model, "--prompts", h.prompts, "--seeds", 1, "--steps", 2, "--out", "out"),
    ("check",): lambda h: (h.model, "a red apple", "--seeds", 1, "--steps", 2),
    ("report",): lambda h: (h.run, "--out", "out"),
    ("ls",): lambda h: ("detectors",),
    ("duplicates",): lambda h: (h.index, "--out", "out"),
    ("gate",): lambda h: (h.run, "--policy", h.policy, "--out", "out"),
    ("index", "build"): lambda h: (h.pictures, "--out", "out"),
    ("index", "query"): lambda h: (h.index, h.pictures / "p1.png"),
    ("index", "info"): lambda h: (h.index,),
    ("measure",): lambda h: (h.model, h.pictures / "p1.png", "--only", "denoising-loss", "--out", "out"),
    ("pack",): lambda h: (h.run, "--out", "out"),
    ("verify",): lambda h: (h.packet,),
    ("replay",): lambda h: (h.run, "--sample", 1),
    ("train",): lambda h: (h.model, h.pictures, "--lora", 2, "--steps", 1, "--dry-run"),
    ("serve",): lambda h: (h.model, "--port", 0),
    ("view",): lambda h: (h.run, "--port", 0),
}  # fmt: skip
SERVERS = ("serve", "view")
NO_NUMBERS = ("nan", "NaN", "inf", "-inf", "1e999")
PLACES = (
    "", ".", "..", "x" * 300, "a/" * 2000, "pipe", "loop", "nothing/x", "file/x", "folder", "file", "broken", "full", "\udcff",
    "näme\u202e", "-", "--", "a\nb", "sparse", " ", "~", "file\udcff", "$HOME", "*", "folder/", "pipe/x",
)  # fmt: skip
OTHERS = tuple(text for text in TEXTS if "\0" not in text and not text.startswith(("/", "..")) and len(text) < LONG)


@cache
def _options(words: tuple[str, ...]) -> list[Any]:
    """Options of a command that take a value, and its arguments."""
    from mnemoscope.cli import main as cli

    found: Any = cli.app
    for word in words:
        found = found.commands[word]
    return [p for p in found.params if not getattr(p, "is_flag", False) and p.name != "help"]


def _is_number(option: Any) -> bool:
    """Whether an option is one: in the words of one version of typer, or of another."""
    described = getattr(option, "type_descriptor", None) or getattr(option, "type", None)
    return bool(re.search(r"\b(int|float|integer)\b", str(described).lower()))


def _prepare(honest: Honest) -> None:
    _ = honest.packet, honest.policy, honest.model, honest.index


def _furnish(folder: Path) -> None:
    """Places that paths may name. Outputs are written as whoever runs this, so that all of them lie inside."""
    (folder / "file").write_text("x\n")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    for name, to in (("loop", "loop"), ("broken", "nowhere/at/all"), ("full", "/dev/full")):
        (folder / name).symlink_to(to)
    with (folder / "sparse").open("wb") as file:
        file.truncate(6 << 30)


def try_values(honest: Honest, t: Try) -> None:
    """A command with one or two odd values."""
    name = t.chance.choice(sorted(COMMANDS))
    _furnish(t.folder)
    words = list(COMMANDS[name](honest))
    nonsense = False
    for option in t.chance.sample(_options(name), min(len(_options(name)), t.chance.choice((1, 1, 1, 2)))):
        value = t.chance.choice(t.chance.choice((NUMBERS, NO_NUMBERS, PLACES, PLACES, OTHERS)))
        nonsense = nonsense or (_is_number(option) and value in NO_NUMBERS)
        if not option.opts[0].startswith("-"):
            words[: 1 if words else 0] = [value]
        else:
            words = [*_without(words, option.opts), option.opts[0], value]
    t.say(" ".join([*name, *(ascii(str(word))[:80] for word in words)]))
    if name[0] in SERVERS:
        _serve(t, [*name, *words])
        return
    outcome = t.run(*name, *words, verdicts=(1, 3))
    if outcome.code == 0 and nonsense:
        t.blame("wrongly accepted", f"{' '.join(name)}: a number that is none")


def _without(words: list[object], names: list[str]) -> Iterator[object]:
    """The same words without an option that will be given again."""
    skip = False
    for word in words:
        if skip or word in names:
            skip = not skip
            continue
        yield word


def _serve(t: Try, words: list[object]) -> None:
    """A server ends by itself, or is ended by Ctrl-C with exit code 0."""
    child = Child(command(*words), t.folder)
    if not child.ended_within(t.chance.uniform(1.0, 3.0)):
        child.send(signal.SIGINT)
        t.kills += 1
    outcome = child.wait()
    t.outcomes.append((" ".join(map(str, words)), outcome))
    if fault := fault_of(outcome, (0, 2, 130)):
        t.blame(fault[0], f"{words[0]}: {fault[1]}")


KINDS = (Kind("command line values", 700, _prepare, try_values),)
