"""What planted pictures told during a training: one reading per look, plain data, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ConfigDict, Field, ValidationError

from ..errors import UsageError
from ..parsing import json_lines
from .files import open_regular
from .schema import FORMAT, Record
from .store import write_whole

__all__ = ["Canary", "LevelReading", "Planted", "Reading", "read_history", "write_history"]


class Canary(Record):
    """A picture that was planted in a training set."""

    row: int = Field(ge=0)
    """Its number in the set before anything was repeated."""
    copies: int = Field(ge=0)
    """How often it is in the training list; 0: kept out, to compare with."""


class Planted(Record):
    """``canaries.json``: which pictures of a training set are canaries."""

    format: int = FORMAT
    rows: int = Field(ge=1)
    """How many pictures the set has before anything is repeated."""
    seed: int
    canaries: list[Canary] = Field(min_length=1)


class LevelReading(Record):
    """The canaries of one number of copies, at one look."""

    model_config = ConfigDict(allow_inf_nan=False)

    copies: int
    n: int
    """How many canaries."""
    magnitude: float
    """Mean over canaries and seeds of ‖ε(x_T, caption) − ε(x_T, ∅)‖₂ at the first step."""
    copied: int | None = None
    """Canaries of which a copy came out in at least one of the generations; None: none were made. Canaries are the independent
    cases of an interval, generations are not."""
    screen: float | None = None
    """Mean of whatever else was asked of each canary; None: nothing was."""


class Reading(Record):
    """One look at all canaries."""

    step: int
    generations: int
    """Per canary."""
    levels: list[LevelReading] = Field(min_length=1)
    """Fewest copies first."""

    @property
    def highest(self) -> LevelReading:
        """The level with most copies."""
        return self.levels[-1]


def write_history(path: str | Path, history: Sequence[Reading]) -> Path:
    """One JSON line per reading."""
    return write_whole(path, "".join(reading.model_dump_json() + "\n" for reading in history).encode())


def read_history(path: str | Path) -> list[Reading]:
    """Readings that :func:`write_history` wrote.

    Raises:
        UsageError: the file cannot be read, or holds something else.
    """
    try:
        with open_regular(path) as file:
            return [Reading.model_validate(reading) for _, reading in json_lines(file)]
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror or e}); write a history with write_history.") from None
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        raise UsageError(
            f"{path} holds no readings of canaries ({'.'.join(map(str, first['loc']))}: {first['msg']}); take an earlier one."
        ) from None
    except ValueError as e:
        raise UsageError(f"{path} holds no readings of canaries ({e}); take an earlier one.") from None
