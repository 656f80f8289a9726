"""What came out of checking a packet: faults, what was compared with what, and what was not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Verified"]


@dataclass
class Verified:
    """What was found.

    Attributes:
        path: The packet.
        digest: SHA-256 of its ``SHA256SUMS``; None: it has none.
        faults: What is wrong, in sentences.
        doubts: Why it cannot be judged whether something is wrong, in sentences.
        checked: What was compared with what, in sentences.
        unchecked: What was not compared, and why, in sentences.
        unmade: Files that were not compared, because other versions made them.
        notes: What a reader must know first.
        status: Of the run; None: not known.
        counts: Samples and prompts, counted from the rows.
    """

    path: Path
    digest: str | None = None
    faults: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    unmade: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    status: str | None = None
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Nothing is wrong, and nothing had to be left open that a packet of this version would have told."""
        return not self.faults and not self.doubts

    @property
    def exit_code(self) -> int:
        """0: sound, 1: not, 3: it cannot be judged."""
        return 1 if self.faults else 3 if self.doubts else 0

    @property
    def headline(self) -> str:
        """The result in one sentence."""
        name = self.path.name
        if self.faults:
            return f"{name} is not sound: {len(self.faults)} fault{'s' if len(self.faults) > 1 else ''}."
        if self.doubts:
            return f"{name} cannot be judged, which is no pass: {self.doubts[0]}."
        but = f" Not compared: {', '.join(self.unmade)}." if self.unmade else ""
        return f"{name} is sound: every file has its sum, and its numbers follow from its rows.{but}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        summary = {"headline": self.headline, "sound": self.sound, "exit_code": self.exit_code}
        return {**summary, **vars(self), "path": str(self.path)}
