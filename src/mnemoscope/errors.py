"""Every error a user can cause.

    MnemoscopeError
    ├── UsageError          the request itself is wrong (an option, a prompt file, a config key)     exit 2
    │   └── UnknownName     a plugin, option or key that does not exist; suggests the nearest one
    ├── CannotAudit         this model, as it was given, cannot be audited in the way asked for      exit 2
    ├── ModelFault          the model was loaded and then misbehaved (NaN, wrong shape)              exit 1
    └── RunError            a run folder is damaged, belongs to other settings, or is in use         exit 2

Every message names the object, the value and the cure, in one sentence a person can act on.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from . import redaction

__all__ = ["CannotAudit", "MnemoscopeError", "ModelFault", "RunError", "UnknownName", "UsageError"]


MOST_NAMES, LONGEST_NAME = 50, 200
"""How many known names a message lists, and how much it shows of one that is unknown."""


class MnemoscopeError(Exception):
    """The root of all errors that mnemoscope raises on purpose; its message holds no secret that it was given to quote."""

    exit_code = 1

    def __init__(self, *message: object):
        super().__init__(*(redaction.text(part) if isinstance(part, str) else part for part in message))


class UsageError(MnemoscopeError):
    """The request is wrong; the message says what to write instead."""

    exit_code = 2


class UnknownName(UsageError, LookupError):
    """A name that does not exist, with the nearest one that does."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known, name = sorted(known), name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        others = f" and {len(known) - MOST_NAMES:,} more" if len(known) > MOST_NAMES else ""
        listing = f" Known: {', '.join(known[:MOST_NAMES])}{others}." if known else ""
        super().__init__(f"no {kind} named {name!r}.{hint}{listing}")
        self.kind, self.name, self.known = kind, name, known


class CannotAudit(MnemoscopeError):
    """The model, as given, cannot be audited in the way asked for."""

    exit_code = 2


class ModelFault(MnemoscopeError):
    """The model misbehaved while it ran, for instance by predicting NaN."""


class RunError(MnemoscopeError):
    """A run folder is damaged, in use, or belongs to other settings."""

    exit_code = 2
