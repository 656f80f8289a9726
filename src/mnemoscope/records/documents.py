"""Documents on disk, and the files that they name: a configuration, a policy, a list of pictures.

Such a document may come from somebody else, and what it makes a command read ends in results that are handed back. So it names files of
its own folder, or visible ones below the working directory; for any other file, the reader names it himself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..parsing import parse_json
from .files import leads_out, read_inside, read_regular

__all__ = ["LARGEST", "read_json", "require_reachable"]

LARGEST = 64 << 20
"""Bytes of the largest document that is read whole."""


def read_json(path: str | Path, folder: str | Path | None = None, limit: int = LARGEST) -> Any:
    """The plain value of a JSON document.

    Args:
        path: The file.
        folder: What it must lie in, links followed; None: whoever runs this named the file, and it may be any.
        limit: Bytes that it may have.

    Raises:
        OSError: there is none, it may not be read, it leads out of the folder, or it is too large or no regular file.
        ParseError: it is no JSON; see :mod:`mnemoscope.parsing`.
    """
    if folder is None:
        return parse_json(read_regular(path, limit))
    return parse_json(read_inside(folder, Path(path).relative_to(folder).as_posix(), limit))


def require_reachable(document: str | Path, what: str, name: str | Path, cure: str) -> None:
    """Refuse a file or folder that a document must not choose. It need not exist.

    Args:
        document: The document's own path.
        what: What the document calls it, for the sentence.
        name: Its path: absolute, or from the working directory.
        cure: What the reader does if he wants that file.

    Raises:
        UsageError: it lies neither in the document's folder nor, without a name that begins with a dot, below the working directory; or it
            is neither a file nor a folder, such as a pipe, for which a command would wait.
    """
    path = Path(name).expanduser()
    try:
        beside = not leads_out(Path(document).parent, path)
        below = not leads_out(Path.cwd(), path)
    except (OSError, ValueError, RuntimeError):  # a zero byte; a link that leads to itself
        beside = below = False
    if beside or (below and not _is_hidden(path.resolve().relative_to(Path.cwd().resolve()))):
        if os.path.lexists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise UsageError(
                f"{document} names {str(name)[:200]!r} as {what}, which is neither a file nor a folder; {cure}."
            )
        return
    raise UsageError(f"{document} names {str(name)[:200]!r} as {what}, which lies outside of its folder; {cure}.")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
