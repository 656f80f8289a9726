"""Scores of ordinary prompts → a threshold at a stated false-positive rate, and a p-value for every further score.

A detector's score means nothing across models, precisions, resolutions, guidance scales, samplers, options of the
detector, step windows, numbers of seeds or shared noises, so a calibration carries the setting it was made under and
refuses to be used under another. The arithmetic is in :mod:`mnemoscope.stats`; the file, ``thresholds.json``, is
:class:`mnemoscope.records.schema.Thresholds`, readable without torch.

The p-value is conformal, p = (1 + #{ordinary ≥ score}) / (1 + N), after Vovk, Gammerman & Shafer 2005. It presumes that
the ordinary prompts are of the kind that is audited; about prompts of another kind it says nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from numpy import ndarray

from .. import redaction, stats
from ..errors import UsageError
from ..models.identity import PROVENANCE, plain
from ..parsing import LONGEST_LINE, lines_of, parse_json
from ..records.documents import LARGEST
from ..records.files import open_regular, read_inside, read_regular
from ..records.schema import Thresholds
from ..records.store import differences, write_whole
from ..records.thresholds import parse_thresholds, rounding_under
from .base import AnyDetector
from .magnitude import Magnitude

__all__ = ["PROVENANCE", "Calibration", "Logged", "method_of", "read_log", "setting_of"]


def method_of(detector: AnyDetector) -> dict[str, Any]:
    """What makes one detector's scores differ from another's: its name, its class, and the plain values it was built from, but secrets.

    Args:
        detector: Fresh: its public attributes are its options, and what it will remember is private or not there yet.
    """
    kinds = (bool, int, float, str, tuple, list)
    options = {k: v for k, v in vars(detector).items() if not k.startswith("_") and isinstance(v, kinds)}
    return {"name": detector.name, "class": type(detector).__qualname__, "options": redaction.cleaned(plain(options))}


def setting_of(
    identity: Mapping[str, Any],
    *,
    guidance: float,
    steps: int,
    window: tuple[int, int],
    seeds: int | Sequence[int],
    seed_mode: str,
    base_seed: int = 0,
    method: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything a score depends on, as plain values.

    Args:
        identity: ``Target.identity()``: weights, adapters, scheduler config, dtype, resolution.
        guidance: Guidance scale of the trajectory. The first step does not depend on it, later ones do.
        steps: Length of the sampler's schedule.
        window: Half-open window of steps that the score averages over.
        seeds: Number n of seeds that a prompt's score averages over, the first n of their bank; or the seeds themselves.
        seed_mode: How starting noises are given to prompts (one shared bank, or each prompt its own).
        base_seed: Which bank.
        method: The detector, from :func:`method_of`; its window stands for itself. None: the magnitude.
    """
    method = method_of(Magnitude()) if method is None else method
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    return {
        "target": {k: v for k, v in identity.items() if k not in PROVENANCE},
        "guidance": guidance,
        "steps": steps,
        "window": list(window),
        "seeds": len(chosen) if chosen == list(range(len(chosen))) else chosen,
        "seed_mode": seed_mode,
        # The noises of a shared bank move the scores of all prompts together: ordinary and audited prompts are exchangeable
        # given one bank, and not across two. Prompts with noises of their own are exchangeable whatever the base.
        "base_seed": base_seed if seed_mode == "shared" else None,
        "method": {**method, "options": {k: v for k, v in method["options"].items() if k != "window"}},
    }


@dataclass(frozen=True)
class Calibration:
    """A threshold for one detector on one model under one setting.

    Attributes:
        record: What is stored.
        name: What messages call it: the file's name, once it has one.

    >>> calibration = Calibration.fit(range(99), {"target": "a model"}, detector="magnitude", fpr=0.05)
    >>> calibration.threshold, calibration.above(94.5), calibration.p_value(94.5)
    (94.0, True, 0.05)
    """

    record: Thresholds
    name: str = "this calibration"

    @classmethod
    def fit(
        cls,
        scores: stats.Numbers,
        setting: Mapping[str, Any],
        *,
        detector: str,
        fpr: float = 0.01,
        confidence: float = 0.95,
        source: str = "",
    ) -> Calibration:
        """Calibrate on ordinary prompts.

        Args:
            scores: One score per ordinary prompt, averaged over seeds and window; finite, in the detector's unit.
            setting: What they depend on, from :func:`setting_of`.
            detector: Name of the detector.
            fpr: Stated false-positive rate. It takes at least 1/fpr − 1 prompts, and several times that to know
                the rate well.
            confidence: Of the threshold's interval.
            source: Where the prompts come from, in words.

        Raises:
            UsageError: too few scores for the rate, a score that is not finite, or no setting.
        """
        if not setting:
            raise UsageError("a calibration needs its setting: give what the scores depend on, from setting_of.")
        found = stats.threshold_at_fpr(scores, fpr, confidence=confidence)
        ordered = sorted(float(s) for s in scores)
        if not (math.isfinite(ordered[0]) and math.isfinite(ordered[-1])):
            raise UsageError("an ordinary score is infinite; leave failed samples out before calibrating.")
        return cls(
            Thresholds(
                detector=detector,
                setting=dict(setting),
                scores=ordered,
                fpr=fpr,
                threshold=found.value,
                interval=(_bounded(found.interval.low), _bounded(found.interval.high)),
                confidence=confidence,
                source=source,
                rounding=rounding_under(setting),
            )
        )

    @classmethod
    def of_traffic(
        cls,
        scores: stats.Numbers,
        setting: Mapping[str, Any],
        *,
        detector: str,
        budget: float = 0.01,
        confidence: float = 0.95,
        trim: float = 0.0,
        source: str = "",
    ) -> Calibration:
        """Calibrate on a host's own traffic, of which nobody knows what is memorized.

        A further generation of the same traffic is above the threshold with probability at most ``budget``, whatever it is. Memorized
        prompts among the scores, which are high ones, only raise the threshold: fewer ordinary prompts are stopped than the budget
        allows, and more memorized ones pass.

        Args:
            scores: One score per generation or prompt.
            setting: As for :meth:`fit`.
            detector: As for :meth:`fit`.
            budget: Share of the traffic above the threshold, at most.
            confidence: As for :meth:`fit`.
            trim: Share of the highest scores to leave out first, if so many are held to be memorized. The threshold is lower then, and
                the budget holds for the rest of the traffic only, if that is what was left out.
            source: Where the traffic comes from, in words; that it is unlabelled is added.

        Raises:
            UsageError: as for :meth:`fit`, or no share.
        """
        if not 0 <= trim < 0.5:
            raise UsageError(f"trim={trim:g} is a share of the traffic: use 0 (nothing) to less than 0.5.")
        kept = sorted(float(s) for s in scores)
        kept = kept[: len(kept) - int(trim * len(kept))]
        words = "unlabelled traffic: the rate is a budget of alarms on all of it, memorized prompts included"
        words += (
            f"; the {len(scores) - len(kept)} highest of {len(scores)} scores were left out ({100 * trim:g} %)"
            if trim
            else ""
        )
        return cls.fit(
            kept, setting, detector=detector, fpr=budget, confidence=confidence, source=f"{source}; {words}" if source else words
        )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read ``thresholds.json``.

        Args:
            path: The file, or the run folder that holds it.

        Raises:
            UsageError: there is none, it is damaged, or its threshold does not follow from its scores.
        """
        path = Path(path)
        folder = path if os.path.isdir(path) else None
        if folder is not None:
            path = folder / "thresholds.json"
            if not os.path.isfile(path):
                raise UsageError(f"{folder} holds no thresholds.json; write one with `mnemoscope calibrate`.")
        try:
            data = read_regular(path, LARGEST) if folder is None else read_inside(folder, path.name, LARGEST)
            record = parse_thresholds(data)
        except OSError as e:
            raise UsageError(
                f"{path} cannot be read ({e.strerror or e}); write one with `mnemoscope calibrate`."
            ) from None
        except ValueError as e:
            raise UsageError(f"{path} is no calibration ({e}); recalibrate.") from None
        return cls(record, path.name)

    def save(self, path: str | Path) -> Path:
        """Write ``thresholds.json``, at once or not at all."""
        return write_whole(path, (self.record.model_dump_json(indent=2) + "\n").encode())

    @property
    def threshold(self) -> float:
        """A score strictly greater is above threshold."""
        return self.record.threshold

    @property
    def realized(self) -> stats.Interval:
        """What the false-positive rate really is, given that many ordinary prompts (:func:`stats.realized_fpr`)."""
        return stats.realized_fpr(len(self.record.scores), self.record.fpr, self.record.confidence)

    def above(self, score: float) -> bool:
        """Whether score > threshold, which is the same as p ≤ the stated rate."""
        return self.p_value(score) <= self.record.fpr

    def p_value(self, score: float) -> float:
        """(1 + #{ordinary ≥ score}) / (1 + N)."""
        return float(self.p_values([score])[0])

    def p_values(self, scores: stats.Numbers) -> Float[ndarray, " score"]:
        """:meth:`p_value` of many scores, as :func:`stats.benjamini_hochberg` wants them for a whole audit."""
        return stats.conformal_p(scores, self.record.scores)

    def borderline(self, score: float, rtol: float | None = None) -> bool:
        """Whether a score is within rounding of the threshold, so that :meth:`above` may differ on another machine.

        Args:
            score: A prompt's score.
            rtol: Relative rounding; default is what is stored, :func:`stats.rounding` of the dtype the model ran in.
        """
        rtol = self.record.rounding if rtol is None else rtol
        return stats.borderline(
            score, self.threshold, stats.rounding(_dtype(self.record.setting)) if rtol is None else rtol
        )

    def check(self, setting: Mapping[str, Any], *, detector: str | None = None, accept: bool = False) -> list[str]:
        """Refuse to be used under another setting.

        Args:
            setting: What the scores to be judged depend on, from :func:`setting_of`.
            detector: Whose scores they are; None: the calibrated one's.
            accept: Use the threshold nevertheless; write the differences that are returned where readers see them.

        Returns:
            The differences: none, or with ``accept`` those that were accepted.

        Raises:
            UsageError: there are differences; the message names each of them.
        """
        was = {"detector": self.record.detector, **self.record.setting}
        now = {"detector": detector or self.record.detector, **setting}
        found = differences(was, now)
        if found and not accept:
            raise UsageError(
                f"{self.name} was made under another setting ({'; '.join(found)}); "
                "recalibrate with `mnemoscope calibrate`, or pass --accept-threshold to use it all the same."
            )
        return found


@dataclass(frozen=True)
class Logged:
    """What a guard's log says.

    Attributes:
        scores: Of every generated row that has one, alarms included.
        times: The first steps' times of the model that occur.
        names: The guards that wrote it.
    """

    scores: list[float]
    times: set[float]
    names: set[str]


def read_log(path: str | Path) -> Logged:
    """Read the JSON lines of :func:`mnemoscope.guard`. A last line that was cut off is no result.

    Raises:
        UsageError: it cannot be read, or a line is not a guard's.
    """
    path = Path(path)
    scores, times, names = [], set(), set()
    for number, line in _log_lines(path):
        try:
            row = parse_json(line)
            # A line that takes back what a decision said stands beside the decision.
            if row["score"] is not None and not row.get("amended"):
                scores.append(_finite(row["score"]))
                times.add(_finite(row["t"]))
                names.add(_name(row["name"]))
        except (ValueError, KeyError, TypeError):
            start = line[:60].decode("utf-8", errors="replace")
            raise UsageError(f"{path}, line {number} is not a guard's: {start!r}; leave it out.") from None
    return Logged(scores, times, names)


def _log_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are finished, with their numbers; one is in memory at a time, and no more of it than a line of a guard can have."""
    try:
        with open_regular(path) as file:
            for number, line in enumerate(lines_of(file), 1):
                if len(line) > LONGEST_LINE:
                    raise UsageError(f"{path}, line {number} has more than {LONGEST_LINE:,} bytes; leave it out.")
                if line.endswith(b"\n"):
                    yield number, line
    except OSError as e:
        raise UsageError(
            f"{path} cannot be read ({e.strerror or e}); give the log that a guard wrote (guard(…, log=…))."
        ) from None


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no name")
    return value


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("no finite number")
    return float(value)


def _dtype(setting: Mapping[str, Any]) -> str:
    target = setting.get("target")
    return str(target.get("dtype", "float32")) if isinstance(target, Mapping) else "float32"


def _bounded(bound: float) -> float | None:
    return bound if math.isfinite(bound) else None
