"""What a kind is, and one try of it: an input, what was done with it, and what was wrong with the answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .children import Child, Outcome, command, fault_of
from .honest import Honest

COLUMNS = ("tracebacks", "hangs", "wrongly accepted", "lost rows")
"""What can be wrong."""


@dataclass
class Try:
    """One input.

    Attributes:
        chance: Its source of chance, which kind and seed fix.
        folder: An empty folder for its files.
        words: How the input differs from an honest one.
        faults: What was wrong, as column and words.
        outcomes: What was run, and how it ended.
        kills: How many processes were killed or sent a signal.
    """

    chance: random.Random
    folder: Path
    words: list[str] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)
    outcomes: list[tuple[str, Outcome]] = field(default_factory=list)
    kills: int = 0

    def say(self, words: str) -> None:
        """Keep how the input differs."""
        self.words.append(words)

    def blame(self, column: str, words: str) -> None:
        """Keep what was wrong."""
        assert column in COLUMNS
        self.faults.append((column, words))

    def run(self, *words: object, codes: Sequence[int] = (0, 1, 2, 3), verdicts: Sequence[int] = ()) -> Outcome:
        """A command's outcome; that it ends as documented is judged here."""
        return self.call(" ".join(map(str, words)), command(*words), codes=codes, verdicts=verdicts)

    def call(
        self,
        name: str,
        work: Callable[[], object],
        *,
        codes: Sequence[int] = (0, 1, 2, 3),
        verdicts: Sequence[int] = (),
    ) -> Outcome:
        """The same of a function."""
        outcome = Child(work, self.folder).wait()
        self.outcomes.append((name, outcome))
        if fault := fault_of(outcome, codes, verdicts):
            self.blame(fault[0], f"{name.split()[0]}: {fault[1]}")
        return outcome


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        name: What is altered.
        inputs: How many there are in a whole run.
        prepare: Makes the originals, before any process is forked for them.
        attempt: Does one try.
        close: Ends what tries of this process have started and left.
    """

    name: str
    inputs: int
    prepare: Callable[[Honest], object]
    attempt: Callable[[Honest, Try], None]
    close: Callable[[], None] = lambda: None
