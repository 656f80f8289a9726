"""Whether the records of a packet agree with each other: model and settings, rows, thresholds, measured pictures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import redaction, stats
from ..records.measures import Entry, Measures
from ..records.schema import PROVENANCE, Manifest, Nearest, Row, Score, Thresholds
from ..records.store import differences, digest, sample_id, short
from ..records.table import prompt_scores
from ..records.tally import calls_follow
from .comparison import RTOL, SHOWN
from .findings import other_setting
from .packet import Records
from .verified import Verified

__all__ = ["check_measures", "check_rows", "check_setting", "check_thresholds"]

MEAN_RTOL = 1e-5
"""Relative difference of a mean that was taken in float32."""

SIX_DIGITS = 1e-6
"""Similarities and their thresholds are stored with six digits."""


# Settings -----------------------------------------------------------------------------------------------------------------


def check_setting(records: Records, result: Verified) -> None:
    """The model, the settings that scores depend on, and the configuration say the same."""
    run = records.manifest
    result.faults += _setting_faults(run)
    if isinstance(run.setting.get("target"), Mapping):
        result.checked.append("run.json: model, setting and configuration agree")
    else:
        result.unchecked.append("run.json: its setting names no model, so ids of samples do not depend on one")


def _setting_faults(run: Manifest) -> Iterator[str]:
    model = run.setting.get("target")
    if isinstance(model, Mapping):
        stated = {key: value for key, value in run.target.items() if key not in PROVENANCE}
        for apart in differences(redaction.cleaned(stated), redaction.cleaned(dict(model)))[:SHOWN]:
            yield f"run.json: target and setting name different models ({apart.replace(': was ', ': ').replace(', now ', ' and ')})"
    for key in ("steps", "base_seed", "seed_mode", "guidance"):
        one, other = run.config.get(key), run.setting.get(key)
        if one is not None and other is not None and one != other:
            yield f"run.json: {key} is {short(repr(one))} in config, and {short(repr(other))} in setting"


# Rows ---------------------------------------------------------------------------------------------------------------------


def check_rows(records: Records, result: Verified) -> None:
    """Each sample once, under the id that its prompt, seed and setting have; numbers that agree; as many rows as were asked for."""
    ruler, counts = _Ruler.of(records.manifest), _Counts()
    wrong: dict[str, list[str]] = {}
    for row in records:
        for sentence in ruler.faults(row):
            wrong.setdefault(sentence, []).append(row.id)
        if row.id in counts.ids:
            wrong.setdefault("there twice", []).append(row.id)
        counts.take(row)
    for sentence, ids in wrong.items():
        result.faults.append(
            f"samples.jsonl: {len(ids)} of {counts.rows} rows are {sentence} ({short(', '.join(ids))})"
        )
    result.faults += counts.faults(records.manifest)
    result.checked.append(
        f"{counts.rows} rows: ids follow from prompts, seeds and setting; as many are there as were asked for; calls follow from "
        f"similarities, and scores from their steps"
    )
    result.unchecked += ruler.unknown(counts.scores)


WRONG_ID = "not what their prompts, seeds and setting make of them"
WRONG_CALL = "called a copy, or none, against their own similarity and threshold"
WRONG_MEAN = "scored otherwise than as the mean of their own steps"
WRONG_SIMILARITY = "as similar as no two pictures are, below -1 or above 1"
WRONG_REFERENCE = "compared by another descriptor or threshold than run.json names"
WRONG_SEED = "of seeds that run.json does not ask for"
WRONG_SCORE = "scored by a detector that the setting does not name"
UNSCORED = "without a score that the setting names, and the run is called done"
NOT_FAILED = "called failed, and hold a score or a picture all the same"


@dataclass(frozen=True)
class _Ruler:
    """What a manifest says that every row must agree with.

    Attributes:
        done: Whether the run is called done.
        key: Digest of the setting.
        detectors: The detectors of the setting by the names of their scores; None: it names none.
        seeds: Seeds per prompt; None: not known.
        descriptor: Name and threshold of what pictures were compared by; None: the manifest does not say.
        has_reference: Whether pictures were compared; None: the manifest does not say.
    """

    done: bool
    key: str
    detectors: Mapping[str, Any] | None
    seeds: int | None
    descriptor: Mapping[str, Any] | None
    has_reference: bool | None

    @classmethod
    def of(cls, run: Manifest) -> _Ruler:
        """From a manifest."""
        detectors, seeds = run.setting.get("detectors"), run.config.get("seeds")
        reference = run.config.get("reference")
        return cls(
            run.status == "done",
            digest(run.setting),
            detectors if isinstance(detectors, Mapping) else None,
            seeds if isinstance(seeds, int) else None,
            reference if isinstance(reference, Mapping) else None,
            reference is not None if "reference" in run.config else None,
        )

    def faults(self, row: Row) -> Iterator[str]:
        """What is wrong with a row, to be said of several."""
        if sample_id(row.prompt, row.seed, self.key) != row.id:
            yield WRONG_ID
        if self.seeds is not None and not 0 <= row.seed < self.seeds:
            yield WRONG_SEED
        if row.status == "error" and (row.scores or row.image is not None or row.nearest is not None):
            yield NOT_FAILED
        if self.detectors is not None:
            if not row.scores.keys() <= self.detectors.keys():
                yield WRONG_SCORE
            if self.done and row.status == "ok" and not row.scores.keys() >= self.detectors.keys():
                yield UNSCORED
        if not all(self._follows(name, score) for name, score in row.scores.items()):
            yield WRONG_MEAN
        if not calls_follow(row):
            yield WRONG_CALL
        if row.nearest is not None:
            yield from self._nearest_faults(row.nearest)

    def unknown(self, scores: Iterable[str]) -> Iterator[str]:
        """What of the rows could not be compared, in sentences."""
        for name in scores:
            window = self._window(name)
            if window is None:
                yield f"samples.jsonl: {name} scores are not followed from their steps, because only its detector knows how"
            elif not window:
                yield f"samples.jsonl: the setting names no window of {name}, so its scores only had to lie among their steps"
        if self.has_reference is None:
            yield "samples.jsonl: run.json names no reference set, so thresholds of similarities stand as the rows say them"

    def _nearest_faults(self, near: Nearest) -> Iterator[str]:
        values = (near.similarity, near.reconstruction, near.threshold, near.layout, near.layout_threshold)
        if any(value is not None and abs(value) > 1 + SIX_DIGITS for value in values):
            yield WRONG_SIMILARITY
        if self.has_reference is False or (self.descriptor is not None and not self._is_named(near)):
            yield WRONG_REFERENCE

    def _is_named(self, near: Nearest) -> bool:
        """Whether the manifest names the descriptor and the threshold that a picture was judged by."""
        assert self.descriptor is not None
        name, threshold = self.descriptor.get("name"), self.descriptor.get("threshold")
        if name is not None and name != near.descriptor:
            return False
        if threshold is None or near.threshold is None:
            return threshold is near.threshold
        return abs(threshold - near.threshold) <= SIX_DIGITS

    def _window(self, name: str) -> tuple[int, int] | tuple[()] | None:
        """Steps that a score is the mean of; (): not stated; None: it need not be the mean of any."""
        if self.detectors is None:
            return () if name == MAGNITUDE else None
        method = self.detectors.get(name)
        method = method if isinstance(method, Mapping) else {}
        if method.get("name") != MAGNITUDE or method.get("class", "Magnitude") != "Magnitude":
            return None
        options = method.get("options")
        window = options.get("window") if isinstance(options, Mapping) else None
        if isinstance(window, list) and len(window) == 2 and all(isinstance(n, int) for n in window):
            return window[0], window[1]
        return ()

    def _follows(self, name: str, score: Score) -> bool:
        """Whether a score follows from its steps, as far as the setting says how."""
        window = self._window(name)
        if window is None:
            return True
        steps = score.per_step[slice(*window)] if window else score.per_step
        if not steps:
            return False
        close = MEAN_RTOL * max(map(abs, steps))
        if window:
            return abs(score.value - sum(steps) / len(steps)) <= close
        return min(steps) - close <= score.value <= max(steps) + close


MAGNITUDE = "magnitude"
"""The bundled detector whose score is the mean of its steps."""


class _Counts:
    """What is counted of the rows of a packet."""

    def __init__(self) -> None:
        self.rows = 0
        self.ids: set[str] = set()
        self.complete: Counter[str] = Counter()
        self.prompts: dict[str, None] = {}
        self.scores: dict[str, None] = {}
        self.generations: dict[str, set[int]] = {}
        self.descriptors: set[tuple[str, float | None]] = set()
        self.layouts: set[float | None] = set()

    def take(self, row: Row) -> None:
        """Count one row."""
        self.rows += 1
        self.ids.add(row.id)
        self.prompts[row.prompt] = None
        self.scores |= dict.fromkeys(row.scores)
        if row.status == "ok":
            self.complete[row.prompt] += 1
        for score in row.scores.values():
            if score.generations is not None:
                self.generations.setdefault(row.prompt, set()).add(score.generations)
        if row.nearest is not None:
            self.descriptors.add((row.nearest.descriptor, row.nearest.threshold))
            if row.nearest.layout is not None:
                self.layouts.add(row.nearest.layout_threshold)

    def faults(self, run: Manifest) -> Iterator[str]:
        """What the counts contradict."""
        there = f"{len(self.ids)} of {run.asked} samples are there"
        if len(self.ids) > run.asked:
            yield f"samples.jsonl: {there}, more than were asked for"
        elif run.status == "done" and len(self.ids) < run.asked:
            yield f"samples.jsonl: the run is called done, and {there}"
        seeds = run.config.get("seeds")
        if isinstance(seeds, int):
            product = len(self.prompts) * seeds
            if product > run.asked or (run.status == "done" and product < run.asked):
                yield (
                    f"run.json: {run.asked} samples were asked for, and {len(self.prompts)} prompts with {seeds} seeds make {product}"
                )
        if len(self.descriptors) > 1 or len(self.layouts) > 1:
            yield "samples.jsonl: rows of one run were judged by different descriptors or thresholds"
        if run.status == "done":
            apart = [p for p, compared in self.generations.items() if compared != {self.complete[p]}]
            if apart:
                yield (
                    f"samples.jsonl: {len(apart)} prompts are scored by comparing another number of generations than are there "
                    f"({short(apart[0])})"
                )


# Thresholds ---------------------------------------------------------------------------------------------------------------


def check_thresholds(records: Records, result: Verified) -> None:
    """Each threshold follows from its scores, which reading it asks for, and was made under the setting that it is used under."""
    for name in records.judged_by:
        stored = records.thresholds(name)
        if stored is None:
            continue
        result.faults += _foreign_faults(name, stored, records.manifest)
        result.checked.append(f"{name}: the threshold follows from {len(stored.scores)} scores of ordinary prompts")
        if records.manifest.kind == "calibrate":
            result.faults += _calibration_faults(name, stored, records)
            result.checked.append(f"{name}: the scores of ordinary prompts are those of the rows")
        else:
            result.unchecked.append(f"{name}: the scores of ordinary prompts are in no row of this packet")


def _foreign_faults(name: str, stored: Thresholds, run: Manifest) -> Iterator[str]:
    """Where a threshold was made under another setting, and nobody accepted that."""
    accepted = {difference.partition(":")[0] for difference in run.accepted}
    foreign = other_setting(stored, run.model_copy(update={"accepted": []}))
    apart = [difference for difference in foreign if difference.partition(":")[0] not in accepted]
    if apart:
        yield f"{name}: it was made under another setting than the run, and that was not accepted ({'; '.join(apart[:SHOWN])})"


def _calibration_faults(name: str, stored: Thresholds, records: Records) -> Iterator[str]:
    """Where the scores that a calibration rests on are not those of its own rows."""
    scores = sorted(p.score for p in prompt_scores(records, stored.detector))
    if len(scores) != len(stored.scores):
        yield f"{name}: it has {len(stored.scores)} scores of ordinary prompts, and the rows give {len(scores)}"
    elif not all(math.isclose(a, b, rel_tol=RTOL) for a, b in zip(scores, sorted(stored.scores), strict=True)):
        yield f"{name}: its scores of ordinary prompts are not those of the rows"


# Measured pictures --------------------------------------------------------------------------------------------------------


def check_measures(records: Records, result: Verified) -> None:
    """A picture counts as reproduced where it has a score; rates, intervals and the bound follow from draws and nats."""
    measures = records.measures
    if measures is None:
        return
    entries = measures.entries
    if wrong := [e.id for e in entries if not _follows(e)]:
        result.faults.append(
            f"measures: {len(wrong)} of {len(entries)} pictures have a score or a rate that does not follow from their own draws "
            f"({short(', '.join(wrong))})"
        )
    result.faults += _measure_faults(measures)
    result.checked.append(f"{len(entries)} measured pictures: rates and bounds follow from their draws")
    result.unchecked.append("measures: that the nats are those of the noise, and that the noise leads to the picture")


def _measure_faults(measures: Measures) -> Iterator[str]:
    entries = measures.entries
    if wrong := [e.id for e in entries if any(abs(value) > 1 + SIX_DIGITS for value in _similarities(e))]:
        yield f"measures: {len(wrong)} of {len(entries)} pictures are {WRONG_SIMILARITY} ({short(', '.join(wrong))})"
    sizes = [e.numbers.nats / e.numbers.score for e in entries if e.numbers.nats and e.numbers.score]
    if sizes and max(sizes) - min(sizes) > 1e-6 * max(map(abs, sizes)):
        yield "measures: scores are nats for each dimension, and these pictures have different numbers of dimensions"


def _similarities(entry: Entry) -> Sequence[float]:
    numbers = entry.numbers
    return [point[4] for point in numbers.curve] + ([] if numbers.similarity is None else [numbers.similarity])


def _follows(entry: Entry) -> bool:
    """Whether a picture's numbers fit each other."""
    r = entry.numbers
    if (entry.status == "reproduced") is not (r.score is not None and r.nats is not None):
        return False
    if r.succeeded is None or r.rate is None:
        return r.succeeded is None and r.rate is None and r.at_least is None
    if not 0 <= r.succeeded[0] <= r.succeeded[1] > 0:
        return False
    rate = stats.clopper_pearson(*r.succeeded)
    follows = (rate.value, rate.low, rate.high)
    if not all(math.isclose(a, b, abs_tol=RTOL) for a, b in zip(r.rate, follows, strict=True)):
        return False
    if r.nats is None or r.at_least is None:
        return r.nats is None and r.at_least is None
    return math.isclose(stats.replication_bound(r.nats, r.rate[1]), r.at_least, rel_tol=1e-6, abs_tol=1e-300)
