"""Marks that say: this user wrote this, on this machine. No torch.

What a folder says about itself proves nothing: whoever sent it may have written it. A few facts decide which other files are
opened, or what is handed to a library that trusts its input. Such facts carry a mark, which nobody can make who lacks the user's key.
The key is a file of random bytes in the user's own state folder. Where it cannot be kept there, marks hold until the process ends.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .files import open_regular

__all__ = ["has_mark", "mark_of", "state_folder"]

SIZE = 32
"""Bytes of a key."""


def mark_of(kind: str, facts: Mapping[str, Any]) -> str:
    """The mark of some facts: 64 hexadecimal digits, always the same for this user on this machine.

    Args:
        kind: What the facts are, so that a mark of one kind is none of another.
        facts: Plain values; what they hold under ``mark`` does not count.
    """
    content = json.dumps([kind, {k: v for k, v in facts.items() if k != "mark"}], sort_keys=True)
    return hmac.new(_key(), content.encode(), hashlib.sha256).hexdigest()


def has_mark(kind: str, facts: Mapping[str, Any]) -> bool:
    """Whether these facts carry, under ``mark``, the one that :func:`mark_of` gives them."""
    mark = facts.get("mark")
    return isinstance(mark, str) and mark.isascii() and hmac.compare_digest(mark, mark_of(kind, facts))


@lru_cache(maxsize=1)
def _key() -> bytes:
    """The user's key, made when it is first needed."""
    try:
        return _stored_key(state_folder() / "key")
    except (OSError, RuntimeError, Timeout):  # RuntimeError: the user has no home
        return secrets.token_bytes(SIZE)


def state_folder() -> Path:
    """The user's state folder for mnemoscope; the XDG rules say that a relative path in the variable does not count.

    Raises:
        RuntimeError: the user has no home.
    """
    named = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".local" / "state") / "mnemoscope"


def _stored_key(path: Path) -> bytes:
    """Raises OSError where the key can be neither read nor made, or is not the user's alone."""
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(path.with_name(".lock"), timeout=5):
            if not path.exists():  # another process may have been first
                _make_key(path)
    with open_regular(path) as file:
        facts, key = os.fstat(file.fileno()), file.read(SIZE)
    if len(key) != SIZE:
        raise OSError(f"{path} holds no key")
    if hasattr(os, "getuid") and (facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o077):
        raise OSError(f"{path} can be read or written by others")
    return key


def _make_key(path: Path) -> None:
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        file = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        with os.fdopen(file, "wb") as out:
            out.write(secrets.token_bytes(SIZE))
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)
