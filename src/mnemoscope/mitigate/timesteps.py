"""A threshold for each range of timesteps, from data known to be clean.

The magnitude of an ordinary training sample depends on t, so that one τ for all t (Wen et al., ICLR 2024) drops clean samples at some
times and duplicated ones at none of others. Here the times are cut into ranges, and in each

    τ(t) = the value that a further clean sample exceeds with probability ≤ ``drop``

(:func:`mnemoscope.stats.threshold_at_fpr` on the magnitudes of that range). Mean and standard deviation of the same magnitudes
make magnitudes at different times comparable. All of it belongs to one model at one moment of its training, and to one space.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from .. import stats
from ..errors import UsageError
from ..records.documents import read_json
from ..records.schema import FORMAT, Finite, Rate, Record, Whole
from ..records.store import first_error, write_whole
from ..types import PerSample

__all__ = ["TimestepThresholds"]


class Ranges(Record):
    """The file: plain JSON, one number for each range of times in every list."""

    model_config = ConfigDict(allow_inf_nan=False)

    format: int = FORMAT
    horizon: Annotated[Finite, Field(gt=0)]
    """Times run from 0 to it: the number of training timesteps, or 1 for a flow."""
    drop: Rate
    """The share of clean samples that τ(t) drops, at most."""
    thresholds: list[Annotated[Finite, Field(ge=0)]] = Field(min_length=1, max_length=10_000)
    means: list[Annotated[Finite, Field(ge=0)]]
    spreads: list[Annotated[Finite, Field(gt=0)]]
    """Standard deviations."""
    counts: list[Whole]
    """How many clean magnitudes there were."""
    space: str = "eps"
    source: str = ""
    """Where the clean data comes from, and which model saw it, in words."""

    @model_validator(mode="after")
    def _as_many(self) -> Ranges:
        if len({len(x) for x in (self.thresholds, self.means, self.spreads, self.counts)}) != 1:
            raise ValueError("its lists are not equally long")
        if min(self.counts) < (least := stats.least_ordinary(self.drop)):
            raise ValueError(
                f"counts holds {min(self.counts)}, and dropping at most {100 * self.drop:g} % takes {least}"
            )
        return self


class TimestepThresholds:
    """τ(t), constant within each of equally wide ranges of t; a rule of :class:`~mnemoscope.mitigate.training.MemorizationFilter`.

    Args:
        record: What :meth:`fit` found, or :meth:`load` read.
    """

    def __init__(self, record: Ranges):
        self.record = record
        columns = [record.thresholds, record.means, record.spreads]
        self._table = torch.tensor(columns, dtype=torch.float64)

    @classmethod
    def fit(
        cls,
        sizes: Float[Tensor, " n"],
        t: Tensor,
        *,
        drop: float = 0.05,
        ranges: int = 10,
        horizon: float | int = 1000,
        space: str = "eps",
        source: str = "",
    ) -> TimestepThresholds:
        """From magnitudes of clean samples, at times as training draws them.

        Args:
            sizes: Magnitudes; :class:`~mnemoscope.mitigate.training.Filtered` has them.
            t: Their times.
            drop: The share of clean samples that may be dropped.
            ranges: How many ranges of t.
            horizon: Times run from 0 up to it: the number of training timesteps, or 1 for a flow.
            space: The space of the magnitudes.
            source: Which data and model, in words.

        Raises:
            UsageError: a range has too few magnitudes for the rate, or all of them are alike.
        """
        if ranges < 1:
            raise UsageError(f"ranges={ranges}: at least one range of t; 10, for instance.")
        if len(t) != len(sizes):
            raise UsageError(f"{len(sizes)} magnitudes and {len(t)} times: give one time for each.")
        values = sizes.detach().double().cpu().numpy()
        place = _range_of(t.cpu(), ranges, float(horizon)).numpy()
        needed = max(stats.least_ordinary(drop), 2)
        found = []
        for i in range(ranges):
            here = values[place == i]
            where = f"t from {i * horizon / ranges:g} to {(i + 1) * horizon / ranges:g}"
            if len(here) < needed:
                raise UsageError(
                    f"{where} has {len(here)} clean magnitudes, and dropping at most {100 * drop:g} % needs {needed}: give more "
                    f"clean samples, fewer ranges, or a larger drop."
                )
            spread = float(np.std(here, ddof=1))
            if not spread > 0:
                raise UsageError(
                    f"{where} has {len(here)} magnitudes that are all alike: are the captions of the clean data empty?"
                )
            found.append((stats.threshold_at_fpr(here, drop).value, float(here.mean()), spread, len(here)))
        thresholds, means, spreads, counts = (list(column) for column in zip(*found, strict=True))
        return cls(
            Ranges(
                horizon=float(horizon), drop=drop, thresholds=thresholds, means=means, spreads=spreads, counts=counts,
                space=space, source=source,
            )
        )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> TimestepThresholds:
        """Read what :meth:`save` wrote.

        Raises:
            UsageError: there is none, or it is damaged or of another format.
        """
        try:
            content = read_json(path)
            if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
                raise UsageError(
                    f"{path} has format {content['format']!r}, not {FORMAT}; fit it again with this version."
                )
            return cls(Ranges.model_validate(content))
        except OSError as e:
            raise UsageError(
                f"{path} cannot be read ({e.strerror or e}); fit thresholds and save them there."
            ) from None
        except ValidationError as e:
            raise UsageError(f"{path} holds no thresholds for timesteps ({first_error(e)}); fit them again.") from None
        except ValueError as e:
            raise UsageError(f"{path} holds no thresholds for timesteps ({e}); fit them again.") from None

    def save(self, path: str | Path) -> Path:
        """Write plain JSON, at once or not at all."""
        return write_whole(path, (self.record.model_dump_json(indent=2) + "\n").encode())

    def at(self, t: Tensor) -> Float[Tensor, " batch"]:
        """τ at each time, float64."""
        return self._row(0, t)

    def keeps(self, sizes: PerSample, t: Tensor) -> Bool[Tensor, " batch"]:
        """m ≤ τ(t): a threshold at a stated rate is one of the clean magnitudes, and not above itself."""
        return sizes.double() <= self.at(t.to(sizes.device))

    def standardized(self, sizes: PerSample, t: Tensor) -> PerSample:
        """(m − mean)/(standard deviation) of clean data at each time, in the dtype of ``sizes``."""
        t = t.to(sizes.device)
        return ((sizes.double() - self._row(1, t)) / self._row(2, t)).to(sizes.dtype)

    def _row(self, row: int, t: Tensor) -> Tensor:
        if self._table.device != t.device:
            self._table = self._table.to(t.device)
        return self._table[row][_range_of(t, self._table.shape[1], self.record.horizon)]


def _range_of(t: Tensor, ranges: int, horizon: float) -> Tensor:
    """Which range each time falls in; a flow's t = horizon is in the last."""
    return (t.double() * ranges / horizon).long().clamp(0, ranges - 1)
