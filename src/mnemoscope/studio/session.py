"""One visitor's way through prompts: every look with the edit that led to it, the way back, a link to it, and a file to go on from.

Nothing in here knows a model or a web server.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

from pydantic import ValidationError

from ..errors import UsageError
from ..parsing import json_lines
from ..records.schema import Row

__all__ = ["LARGEST", "LONGEST", "TYPED", "Link", "Session", "State", "read_session"]

LONGEST = 2000
"""Characters of a prompt; text encoders see about 77 tokens."""

MOST_STATES, MOST_DRAWN = 24, 6
"""Looks that a session remembers, and those of them whose pictures it keeps: a visitor takes no more memory, however long they stay."""

LARGEST = 8 << 20
"""Bytes of a file that a session is read from, and of its rows once unpacked."""

TYPED = "as typed"
"""The edit of a prompt that somebody typed."""


@dataclass(frozen=True, eq=False)
class State:
    """One look at one prompt.

    Attributes:
        number: Counts the looks of a session from 1; never given twice.
        look: The score and the words (:class:`~mnemoscope.explain.tokens.Explanation`).
        edit: What led to it, in words.
        origin: Number of the state that was edited; None: somebody typed it.
        drawn: Its pictures (:class:`~mnemoscope.studio.drawing.Drawn`); None: not drawn yet.
    """

    number: int
    look: Any
    edit: str = TYPED
    origin: int | None = None
    drawn: Any = None

    @property
    def prompt(self) -> str:
        """The prompt."""
        return self.look.prompt

    @property
    def group(self) -> str:
        """What an exported run calls it; :func:`read_session` reads it."""
        return f"{self.number}. {self.edit}"


@dataclass(eq=False)
class Session:
    """The looks of one visitor, oldest first.

    Attributes:
        states: The looks.
        at: Number of the one that is shown; 0: none.
        found: Edits that are offered for it (:class:`~mnemoscope.explain.edits.Edit`).
        busy: Something long is going on.
        stopped: The visitor wants it to end.
    """

    states: list[State] = field(default_factory=list)
    at: int = 0
    found: list[Any] = field(default_factory=list)
    busy: bool = False
    stopped: bool = False
    _given: int = 0

    @property
    def current(self) -> State | None:
        """What is shown."""
        return self._find(self.at)

    @property
    def first(self) -> State | None:
        """The prompt, as it was typed, that the current one was edited from; None where the current one was typed itself."""
        state = now = self.current
        while state is not None and state.origin is not None and (before := self._find(state.origin)) is not None:
            state = before
        return None if state is now else state

    def add(self, look: Any, edit: str = TYPED, origin: int | None = None) -> State:
        """Remember a look and show it; the oldest is forgotten when there are too many. A look at the prompt shown is no new one."""
        now = self.current
        if now is not None and now.prompt == look.prompt:
            return now
        self.found = []
        self._given += 1
        state = State(self._given, look, edit, origin)
        self.states = [*self.states, state][-MOST_STATES:]
        self.at = state.number
        return state

    def draw(self, number: int, drawn: Any) -> None:
        """Keep the pictures of a state; those drawn longest ago are forgotten."""
        self.states = [replace(s, drawn=drawn) if s.number == number else s for s in self.states]
        shown = {s.number for s in (self.current, self.first) if s is not None}
        old = [s.number for s in self.states if s.drawn is not None and s.number not in shown]
        spare = len([s for s in self.states if s.drawn is not None]) - MOST_DRAWN
        self.states = [replace(s, drawn=None) if s.number in old[: max(0, spare)] else s for s in self.states]

    def show(self, number: int) -> None:
        """Go to a state; a number that is not remembered changes nothing."""
        if self._find(number) is not None:
            self.at, self.found = number, []

    def undo(self) -> None:
        """Forget the state that is shown, and show the one that it was edited from, or else the one before it."""
        now = self.current
        if now is None or len(self.states) < 2:
            return
        place = self.states.index(now)
        before = self._find(now.origin or 0) or self.states[max(0, place - 1) if place else 1]
        self.states = [s for s in self.states if s is not now]
        self.at, self.found = before.number, []

    def _find(self, number: int) -> State | None:
        return next((s for s in self.states if s.number == number), None)


@dataclass(frozen=True)
class Link:
    """What an address says: a prompt as it was typed, what it was edited to, and the settings that its score depends on.

    Attributes:
        prompt: As typed; None: the address says nothing.
        edited: After all edits; None: not edited.
        settings: Name → value of settings, as the address writes them.
    """

    prompt: str | None = None
    edited: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, session: Session, settings: Mapping[str, Any]) -> Link:
        """To what a session shows."""
        now, first = session.current, session.first
        if now is None:
            return cls()
        plain = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in settings.items()}
        return cls((first or now).prompt, now.prompt if first else None, plain)

    @classmethod
    def parse(cls, query: Mapping[str, str], settings: Mapping[str, Any]) -> Link:
        """From the query of an address; only settings that are known are read, and prompts that are too long are not."""
        prompt, edited = (query.get(name) for name in ("prompt", "edited"))
        if prompt is None or len(prompt) > LONGEST or len(edited or "") > LONGEST:
            return cls()
        return cls(prompt, edited, {name: query[name][:20] for name in settings if name in query})

    @property
    def query(self) -> str:
        """The query of an address; empty: there is nothing to link to."""
        if self.prompt is None:
            return ""
        edited = {} if self.edited is None else {"edited": self.edited}
        return "?" + urlencode({"prompt": self.prompt, **edited, **self.settings})

    def differs(self, settings: Mapping[str, Any]) -> list[str]:
        """Settings that the link was made with and this studio has otherwise, in words."""
        here = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in settings.items()}
        return [
            f"{name} {value}, here {here[name]}" for name, value in self.settings.items() if here.get(name) != value
        ]


def read_session(name: str, data: bytes) -> list[tuple[str, str]]:
    """Prompts of an exported session with the edits that led to them, in order: from its ``samples.jsonl`` or its packet (``.zip``).

    Raises:
        UsageError: another kind of file, too large a file, or one that holds no session.
    """
    if len(data) > LARGEST:
        raise UsageError(f"{name} has more than {LARGEST >> 20} MB; give the samples.jsonl of the run instead.")
    if name.lower().endswith(".zip"):
        data = _rows_of(name, data)
    elif not name.lower().endswith(".jsonl"):
        raise UsageError(
            f"{name} is neither a samples.jsonl nor a packet (.zip); give one of these files of an exported session."
        )
    found: dict[str, str] = {}
    try:
        for _, content in json_lines(io.BytesIO(data)):
            row = Row.model_validate(content)
            found.setdefault(row.prompt, (row.group or TYPED).partition(". ")[2] or TYPED)
    except (ValidationError, ValueError):
        raise UsageError(
            f"{name} holds a line that is no sample; give the samples.jsonl of an exported session."
        ) from None
    if not found or any(len(prompt) > LONGEST for prompt in found):
        raise UsageError(
            f"{name} holds no prompt that can be shown here; give the samples.jsonl of an exported session."
        )
    return list(found.items())[-MOST_STATES:]


def _rows_of(name: str, data: bytes) -> bytes:
    """``samples.jsonl`` of a packet, never more of it than is allowed."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive, archive.open("samples.jsonl") as file:
            rows = file.read(LARGEST + 1)
    except (zipfile.BadZipFile, KeyError, OSError, EOFError, ValueError, RuntimeError, NotImplementedError) as e:
        raise UsageError(f"{name} is no packet of a session ({e}); give what the studio's download gave.") from None
    if len(rows) > LARGEST:
        raise UsageError(f"{name} unpacks to more than {LARGEST >> 20} MB; give the samples.jsonl of a smaller run.")
    return rows


def edited_from(prompts: Sequence[tuple[str, str]]) -> list[int | None]:
    """For each prompt of a session that is read back, the place of the one that it was edited from: the one before it."""
    return [None if edit == TYPED or i == 0 else i - 1 for i, (_, edit) in enumerate(prompts)]
