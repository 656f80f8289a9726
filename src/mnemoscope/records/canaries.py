"""What planted pictures told during a training: one reading per look, plain data, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, ValidationError, model_validator

from ..errors import UsageError
from ..parsing import json_lines
from .files import open_regular
from .schema import FORMAT, Finite, Record, Whole
from .store import first_error, write_whole

__all__ = ["Canary", "LevelReading", "Planted", "Reading", "read_history", "write_history"]


class Canary(Record):
    """A picture that was planted in a training set."""

    row: Whole
    """Its number in the set before anything was repeated."""
    copies: Whole
    """How often it is in the training list; 0: kept out, to compare with."""


class Planted(Record):
    """``canaries.json``: which pictures of a training set are canaries."""

    format: int = FORMAT
    rows: Annotated[Whole, Field(ge=1)]
    """How many pictures the set has before anything is repeated."""
    seed: int
    canaries: list[Canary] = Field(min_length=1)


class LevelReading(Record):
    """The canaries of one number of copies, at one look."""

    model_config = ConfigDict(allow_inf_nan=False)

    copies: Whole
    n: Annotated[Whole, Field(ge=1)]
    """How many canaries."""
    magnitude: Annotated[Finite, Field(ge=0)]
    """Mean over canaries and seeds of ‖ε(x_T, caption) − ε(x_T, ∅)‖₂ at the first step."""
    copied: Whole | None = None
    """Canaries of which a copy came out in at least one of the generations; None: none were made. Canaries are the independent
    cases of an interval, generations are not."""
    screen: Finite | None = None
    """Mean of whatever else was asked of each canary; None: nothing was."""

    @model_validator(mode="after")
    def _of_so_many(self) -> LevelReading:
        if self.copied is not None and self.copied > self.n:
            raise ValueError(f"copied is {self.copied}, and there are {self.n} canaries")
        return self


class Reading(Record):
    """One look at all canaries."""

    step: Whole
    generations: Whole
    """Per canary."""
    levels: list[LevelReading] = Field(min_length=1)
    """Fewest copies first."""

    @model_validator(mode="after")
    def _fewest_first(self) -> Reading:
        copies = [level.copies for level in self.levels]
        if copies != sorted(set(copies)):
            raise ValueError(f"copies of its levels are {copies}, and must rise")
        return self

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
        raise UsageError(f"{path} holds no readings of canaries ({first_error(e)}); take an earlier one.") from None
    except ValueError as e:
        raise UsageError(f"{path} holds no readings of canaries ({e}); take an earlier one.") from None
