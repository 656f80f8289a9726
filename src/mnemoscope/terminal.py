"""What may reach a terminal. No torch.

Prompts, names, reasons and notes come from strangers. Among their characters may be some that drive a terminal (they move the cursor,
rename the window, fill the clipboard), that show words in another order than they stand, or that nobody sees. :func:`visible` writes
them out, and :func:`guard` has standard output and standard error do so with everything that is written, by whomever.
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Guarded", "guard", "guarded", "json_safe", "one_line", "unguarded", "visible"]

# Control characters but for newline and tab, separators of lines, marks of direction, characters without width, interlinear marks,
# tags, and halves of surrogate pairs, which no encoding has. Joiners are judged by what stands before them.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff0-\ufffb"
    "\u034f\u115f\u1160\u17b4\u17b5\u3164\ufe00-\ufe0d\uffa0"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff\ud800-\udfff]"
)
_JOINERS = "\u200c\u200d"
_JOINED = ("L", "M", "So", "Sk")
"""Categories of characters that scripts and emoji join to the next one."""

_UP = "\x1b[A"
"""How a progress bar moves the cursor to the line above."""


def visible(text: str) -> str:
    """``text`` with its hidden characters written out: the escape character as ␛, the right-to-left override as ⟨U+202E⟩.

    Newlines, tabs and the ordinary text of all scripts stay as they are, combining marks and spaces of any width among it. So do
    joiners behind a letter, a mark or a symbol: Persian and Hindi are written with them, and emoji are made of several. Flags of
    regions, which are spelled in invisible tags, come apart. Applied twice it changes nothing more.
    """
    return _HIDDEN.sub(_written_out, text)


def one_line(text: str) -> str:
    """As :func:`visible`, with spaces in place of line breaks and tabs: a stranger's value cannot begin a line of ours."""
    return visible(" ".join(text.splitlines()).replace("\t", " "))


def json_safe(document: str) -> str:
    r"""A JSON document with its hidden characters as ``\uXXXX``, which is the same document."""
    return _HIDDEN.sub(_escaped, document)


def _written_out(match: re.Match[str]) -> str:
    if _joins(match):
        return match[0]
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def _escaped(match: re.Match[str]) -> str:
    if _joins(match):
        return match[0]
    units = match[0].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def _joins(match: re.Match[str]) -> bool:
    """Whether a hidden character is a joiner where one is written."""
    start = match.start()
    if match[0] not in _JOINERS or start == 0:
        return False
    return unicodedata.category(match.string[start - 1]).startswith(_JOINED)


# Streams ------------------------------------------------------------------------------------------------------------------


class Guarded:
    """A text stream on which hidden characters are shown in place of obeyed, and characters that it cannot encode are replaced.

    It has no ``buffer``: bytes would pass by. On a terminal one thing is let through: the moves of a progress bar (tqdm's), as long
    as nothing is overwritten but lines that hold a progress bar or nothing.

    Args:
        under: The stream of text that is written to.
    """

    def __init__(self, under: Any):
        self.under = under
        self._bars = under.isatty()
        self._free = True  # whether the cursor's line holds nothing but a progress bar
        self._above = 0  # lines directly above it of which the same is true

    def write(self, text: str) -> int:
        """Write it with hidden characters written out; the number of characters that were given."""
        self.under.write(self._encodable(self._moves(text) if self._bars else visible(text)))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write one after the other."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        if name in ("buffer", "under"):  # the second is asked for when a copy is made, before there is one
            raise AttributeError(f"a {type(self).__name__} stream has no {name}")
        return getattr(self.under, name)

    def _encodable(self, text: str) -> str:
        encoding = getattr(self.under, "encoding", None) or "utf-8"
        try:
            text.encode(encoding, getattr(self.under, "errors", None) or "strict")
        except UnicodeEncodeError:
            return text.encode(encoding, "replace").decode(encoding)
        return text

    def _moves(self, text: str) -> str:
        """``text`` written out, but for moves onto lines that may be overwritten."""
        if text and not text.strip("\n"):
            self._above = self._above + len(text) if self._free else 0
            self._free = True
            return text
        climbed = len(text) // len(_UP)
        if text and text == _UP * climbed and climbed <= self._above:
            self._above -= climbed
            self._free = True
            return text
        start = "\r" if self._free and text.startswith("\r") else ""
        shown = start + visible(text.removeprefix(start))
        if "\n" in shown:
            self._above, self._free = 0, shown.endswith("\n")
        elif shown and not start:
            self._free = False
        return shown


def guard() -> None:
    """Guard standard output and standard error until the process ends, tracebacks included. Called twice it changes nothing more."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Guarded):
            setattr(sys, name, Guarded(stream))
    # From Python 3.13 on, tracebacks are colored by escape sequences, which would be written out as well.
    os.environ.setdefault("PYTHON_COLORS", "0")


@contextmanager
def guarded() -> Iterator[None]:
    """As :func:`guard`, for the streams that stand there now, and only inside the ``with``."""
    before = sys.stdout, sys.stderr
    guard()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def unguarded(stream: Any) -> Any:
    """The stream under the guard, for a writer that cleans its texts itself and draws with escape sequences of its own."""
    return stream.under if isinstance(stream, Guarded) else stream
