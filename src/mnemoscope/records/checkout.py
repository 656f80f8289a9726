"""Which commit of a git repository a command runs in, read from the repository's files. No torch.

git is not asked: it runs what a repository's own configuration names (filters, monitors, hooks), and the working directory may be
somebody else's folder. So it is not known whether files differ from the commit, which git finds out through filters.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from .files import read_inside, read_regular

__all__ = ["checkout"]

SHORT, PACKED = 4096, 1 << 26
"""Bytes that ``HEAD`` and single references may have, and the list of packed ones."""

LONGEST_CHAIN = 5
"""References that may name each other before one of them names a commit, as in git."""

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def checkout() -> dict[str, Any] | None:
    """Commit of the git checkout that the working directory lies in.

    Returns:
        ``{"commit": …, "dirty": None}``; None: no checkout, no commit yet, or a repository that keeps its references in another
        way than files (reftable).
    """
    try:
        folder = _repository(Path.cwd())
        commit = None if folder is None else _commit(folder)
    except (OSError, ValueError):  # files that are damaged or cannot be read; names that are none
        return None
    return None if commit is None else {"commit": commit, "dirty": None}


def _repository(here: Path) -> Path | None:
    """The folder of the repository that a folder lies in, up to the ceilings that git has as well."""
    ceilings = {Path(p) for p in os.environ.get("GIT_CEILING_DIRECTORIES", "").split(os.pathsep) if p}
    for folder in (here, *here.parents):
        if folder in ceilings and folder != here:
            return None
        git = folder / ".git"
        if git.is_file():  # of a linked worktree or a submodule
            text = _text(read_regular(git, SHORT))
            return folder / text.removeprefix("gitdir: ") if text.startswith("gitdir: ") else None
        if (git / "HEAD").is_file():
            return git
    return None


def _commit(folder: Path) -> str | None:
    """The commit that ``HEAD`` stands for; None: there is none yet.

    Raises:
        OSError: a file that must be there cannot be read.
    """
    common = folder
    if (folder / "commondir").is_file():  # a linked worktree has only a HEAD of its own
        common = folder / _text(read_regular(folder / "commondir", SHORT))
    text = _text(read_regular(folder / "HEAD", SHORT))
    for _ in range(LONGEST_CHAIN):
        if _COMMIT.fullmatch(text):
            return text
        name = text.removeprefix("ref: ")
        if name == text or not name.startswith("refs/"):
            return None
        try:
            text = _text(read_inside(common, name, SHORT))
        except OSError:
            return _packed(common, name)
    return None


def _packed(common: Path, name: str) -> str | None:
    """The commit of a reference in the list of packed ones."""
    packed = read_regular(common / "packed-refs", PACKED)
    line = re.search(rb"^(\S+) " + re.escape(os.fsencode(name)) + rb"\r?$", packed, re.MULTILINE)
    commit = "" if line is None else _text(line[1])
    return commit if _COMMIT.fullmatch(commit) else None


def _text(raw: bytes) -> str:
    """As a path or a name."""
    return os.fsdecode(raw).strip()
