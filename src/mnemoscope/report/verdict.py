"""How a policy's rules ended. Sentence, exit code and every file come from one :class:`Verdict`, so that none can disagree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from enum import IntEnum
from typing import Any

from .policy import Policy, Waiver
from .words import prompts

__all__ = ["Call", "Check", "Status", "Verdict"]


class Status(IntEnum):
    """How a check ended. The larger is the worse, and the worst of all checks is the verdict's."""

    SKIPPED = 0
    """It would pass, and that says nothing: see the requirement that is not met."""
    PASS = 1
    WARN = 2
    ERROR = 3
    """It cannot be judged."""
    FAIL = 4
    """Certain, however much else is not known."""

    @property
    def word(self) -> str:
        """``pass``."""
        return self.name.lower()


EXIT_CODES = {Status.PASS: 0, Status.WARN: 0, Status.FAIL: 1, Status.ERROR: 3, Status.SKIPPED: 3}
"""2, a wrong command or policy, never gets as far as a verdict."""


@dataclass(frozen=True)
class Call:
    """What one rule says about one prompt.

    Attributes:
        id: The prompt's id; None: it was not audited.
        prompt: Its text.
        cluster: See :class:`~mnemoscope.report.audited.Case`.
        found: True, False, or None: not known.
        words: The evidence, or why it is not known.
        picture: File of its worst picture.
        waived: The waiver that answers for it.
    """

    id: str | None
    prompt: str
    cluster: int
    found: bool | None
    words: str = ""
    picture: str | None = None
    waived: Waiver | None = None


@dataclass(frozen=True)
class Check:
    """One line of a verdict.

    Attributes:
        name: The rule's name, or what is required.
        kind: ``requirement``, ``rule`` or ``waiver``.
        status: How it ended.
        holds: Whether what it asks for is so; None: not known.
        sentence: Why, with the numbers.
        numbers: The same numbers for machines; empty where there are none.
        finds: Prompts that count against a rule, waived ones included.
        leaks: Every prompt of a rule's list of known leaks.
    """

    name: str
    kind: str
    status: Status
    holds: bool | None
    sentence: str
    numbers: Mapping[str, float | int | None] = field(default_factory=dict)
    finds: tuple[Call, ...] = ()
    leaks: tuple[Call, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "status": self.status.word,
            "holds": self.holds,
            "sentence": self.sentence,
            "numbers": dict(self.numbers),
        }
        return plain | {key: [_plain(call) for call in getattr(self, key)] for key in ("finds", "leaks")}


@dataclass(frozen=True)
class Verdict:
    """A policy held against a run. ``str(verdict)`` is its sentence.

    Attributes:
        run: Name of the run.
        today: The day that waivers were held against.
        checks: Requirements, rules, expired waivers.
        policy: The policy.
        remarks: What the policy's author should know.
    """

    run: str
    today: date
    checks: tuple[Check, ...]
    policy: Policy
    remarks: tuple[str, ...] = ()

    @property
    def status(self) -> Status:
        """The worst of all checks: never a mean."""
        return max((check.status for check in self.checks), default=Status.SKIPPED)

    @property
    def exit_code(self) -> int:
        """0: every rule of level fail holds; 1: at least one does not; 3: cannot be judged."""
        return EXIT_CODES[self.status]

    @property
    def headline(self) -> str:
        """One sentence, by the same status as the exit code."""
        worst, n = [c for c in self.checks if c.status is self.status], len(self.checks)
        names = ", ".join(c.name for c in worst[:3]) + (f", and {len(worst) - 3} more" if len(worst) > 3 else "")
        if self.status is Status.FAIL:
            return f"{self.run} fails {len(worst)} of {n} checks: {names}."
        if self.status is Status.WARN:
            return f"{self.run} passes with {prompts(len(worst), 'warning')} in {n} checks: {names}."
        if self.status is Status.PASS:
            return f"{self.run} passes all {n} checks." if n > 1 else f"{self.run} passes the one check there is."
        return f"{self.run} cannot be judged, which is no pass: {names or 'there is no check'}."

    def __str__(self) -> str:
        return self.headline

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: ``gate.json``."""
        return {
            "format": 1,
            "run": self.run,
            "status": self.status.word,
            "exit_code": self.exit_code,
            "headline": self.headline,
            "today": str(self.today),
            "checks": [check.to_dict() for check in self.checks],
            "remarks": list(self.remarks),
            "policy": self.policy.model_dump(mode="json", by_alias=True, exclude_none=True),
        }


def _plain(call: Call) -> dict[str, Any]:
    plain = {k: v for k, v in asdict(call).items() if k not in ("waived", "cluster") and v not in (None, "")}
    return plain | {"found": call.found} | ({"waived": call.waived.model_dump(mode="json")} if call.waived else {})
