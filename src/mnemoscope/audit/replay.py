"""Compute samples of a run once more, and compare.

The recorded settings, the same loop, detectors and pictures as an audit: replaying *is* an audit of some samples, into a folder that
is deleted afterwards. The run is only read. Numbers need not come out to the last digit on another machine, in another batch, or
with another version of torch, so each is held against a stated tolerance; a call that rounding may turn over is named *borderline*
and never turned silently.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from .. import stats
from ..bounds import COUNT, DIFFERENCE, SEED, within
from ..errors import UnknownName, UsageError
from ..models.base import Target
from ..plugins import BUNDLED, is_number
from ..records.schema import Manifest, Nearest, Row, Score, Thresholds
from ..records.store import Run, Writer, differences, digest, sample_id, short
from ..similarity.decoding import KEPT, decode
from .batch import LOSSLESS, Reference, Sample
from .config import AuditConfig, PromptSource
from .generations import LEAST, compare_generations
from .prompts import Prompt
from .request import Request, described, machine, versions
from .run import Progress, Session

__all__ = [
    "Change",
    "Evidence",
    "Outcome",
    "Replayed",
    "Sampled",
    "Verdict",
    "choose",
    "config_of",
    "other_reference",
    "recorded_model",
    "replay",
    "require_model",
]

ATOL = 1e-6
"""Absolute difference that is never held against a number: similarities are stored with six digits."""

LOSSY = 2.0
"""Mean difference in gray levels that is never held against pictures that were kept with losses: there a last digit moves single
pixels by many levels."""

Outcome: TypeAlias = Literal["same", "within tolerance", "differs", "failed"]
"""How a number or a sample came out, from good to bad; ``failed``: it could not be computed."""

Call: TypeAlias = Literal["same", "borderline", "flipped"]
"""How a call came out. Borderline: within the tolerance of the threshold, before or now, whichever side it fell on."""


@dataclass(frozen=True)
class Evidence:
    """What a run has recorded, wherever that is: a folder or a packet.

    Attributes:
        name: What to call it.
        manifest: Its manifest.
        rows: Gives its rows, from the start each time.
        thresholds: What it is judged by; None: not calibrated.
        picture: A picture by the name that a row gives it; None: it is not at hand.
    """

    name: str
    manifest: Manifest
    rows: Callable[[], Iterator[Row]]
    thresholds: Thresholds | None = None
    picture: Callable[[str], bytes | None] = lambda name: None


@dataclass(frozen=True)
class Change:
    """One number, before and now.

    Attributes:
        what: What it is of.
        was: As it is recorded.
        now: As it is now.
        difference: Relative for scores, absolute for similarities, in gray levels for pictures.
        outcome: ``same``, ``within tolerance`` or ``differs``.
    """

    what: str
    was: float | None
    now: float | None
    difference: float
    outcome: Outcome


@dataclass(frozen=True)
class Verdict:
    """One call, before and now: a score above the threshold, or a copy found."""

    what: str
    was: bool
    now: bool
    outcome: Call
    value: float
    threshold: float


@dataclass(frozen=True)
class Sampled:
    """One sample, before and now.

    Attributes:
        id: Its id in the run.
        prompt_id: Of its prompt.
        prompt: The prompt.
        seed: The seed.
        outcome: The worst of its changes.
        changes: Its numbers.
        verdicts: Its calls. That of a score is what this seed alone would say; see :attr:`Replayed.prompts`.
        reasons: What differs that is no number, and what was not compared, in sentences.
    """

    id: str
    prompt_id: str
    prompt: str
    seed: int
    outcome: Outcome
    changes: tuple[Change, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def call(self) -> Call | None:
        """The worst of its calls; None: there is none."""
        return max((v.outcome for v in self.verdicts), key=get_args(Call).index, default=None)


@dataclass(frozen=True)
class Replayed:
    """What came out.

    Attributes:
        run: What was replayed.
        rows: The samples.
        prompts: The prompts all of whose seeds were replayed: their mean score against the threshold, by id.
        rtol: Relative tolerance of scores, absolute one of similarities.
        why: Where it comes from, in words.
        levels: Gray levels by which a pixel may differ.
        accepted: Where the model is another than the recorded one, if that was accepted.
        notes: What else a reader must know.
        forwards: Denoiser forwards that it took.
        seconds: Time that it took.
    """

    run: str
    rows: tuple[Sampled, ...]
    prompts: Mapping[str, Verdict]
    rtol: float
    why: str
    levels: float
    accepted: tuple[str, ...]
    notes: tuple[str, ...]
    forwards: int
    seconds: float

    @property
    def borderline(self) -> list[str]:
        """Calls that rounding may turn over, in words."""
        rows = [
            f"sample {r.id} ({v.what})"
            for r in self.rows
            if r.prompt_id not in self.prompts
            for v in r.verdicts
            if v.outcome == "borderline"
        ]
        return rows + [f"prompt {name} ({v.what})" for name, v in self.prompts.items() if v.outcome == "borderline"]

    @property
    def flipped(self) -> int:
        """Calls that came out otherwise, beyond rounding."""
        calls = [v for r in self.rows for v in r.verdicts] + list(self.prompts.values())
        return sum(v.outcome == "flipped" for v in calls)

    @property
    def exit_code(self) -> int:
        """0: all agree; 1: something differs; 3: something could not be computed, so that it cannot be judged."""
        found = Counter(r.outcome for r in self.rows)
        return 1 if found["differs"] or self.flipped else 3 if found["failed"] or not self.rows else 0

    @property
    def headline(self) -> str:
        """The result in one sentence."""
        found, n = Counter(r.outcome for r in self.rows), len(self.rows)
        parts = [f"{found[name]} {name if name != 'same' else 'the same'}" for name in get_args(Outcome) if found[name]]
        calls = [f"{self.flipped} flipped"] * bool(self.flipped)
        calls += [f"{len(self.borderline)} borderline"] * bool(self.borderline)
        said = f"{n} sample{'s' if n != 1 else ''} of {self.run} replayed: {', '.join(parts)}"
        said += f" (tolerance {self.rtol:.2g}); calls: {', '.join(calls) or 'unchanged'}"
        return f"{said}; with another model than the recorded one." if self.accepted else f"{said}."

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        said = {"format": 1, "headline": self.headline, "exit_code": self.exit_code, "borderline": self.borderline}
        rows = [{**asdict(r), "call": r.call} for r in self.rows]
        return {**said, **asdict(self), "rows": rows}


# Which samples ------------------------------------------------------------------------------------------------------------


@within(sample=COUNT, seed=SEED)
def choose(
    evidence: Evidence, names: Collection[str] = (), *, sample: int = 8, seed: int = 0, everything: bool = False
) -> list[Row]:
    """The rows to replay, in the order of the run.

    Args:
        evidence: The run.
        names: Ids of samples, or of prompts: then all of their seeds. Empty: a random draw.
        sample: How many are drawn.
        seed: Of the draw; the same seed draws the same samples of the same run.
        everything: All samples instead of a draw.

    Raises:
        UsageError: no sample or prompt has such an id, or there is none that can be compared.
    """
    sound = {row.id: row.prompt_id for row in evidence.rows() if row.status == "ok"}
    known = sound.keys() | set(sound.values())
    if unknown := [name for name in names if name not in known]:
        failed = any(unknown[0] in (row.id, row.prompt_id) for row in evidence.rows())
        why = "failed in the run, so there is nothing to compare with" if failed else "is no sample and no prompt of it"
        raise UsageError(f"{unknown[0]!r} {why}; take an id from samples.jsonl of {evidence.name}.")
    if not sound:
        raise UsageError(f"{evidence.name} has no sample with a result, so there is nothing to replay.")
    if names:
        wanted = {key for key, prompt in sound.items() if key in names or prompt in names}
    elif everything:
        wanted = set(sound)
    else:
        wanted = set(random.Random(seed).sample(sorted(sound), min(sample, len(sound))))
    chosen = {row.id: row for row in evidence.rows() if row.status == "ok" and row.id in wanted}
    return list(chosen.values())


def config_of(manifest: Manifest, **changes: Any) -> AuditConfig:
    """The recorded settings, as far as a record may choose them, without what concerns a run as a whole.

    A run may come from somebody else, so it chooses among the bundled models and the installed detectors. Another model is left out:
    whoever replays the run names it (:func:`recorded_model` says what the record calls it).

    Args:
        manifest: Of the run.
        **changes: Settings to change; None: as recorded. The precision is the recorded model's unless it is changed.

    Raises:
        UsageError: the record holds settings that this version does not know, or that a record must not choose.
    """
    setting, target = manifest.setting, manifest.setting.get("target", {})
    kept = ("detectors", "seeds", "images")
    record = {name: manifest.config[name] for name in kept if manifest.config.get(name) is not None}
    if (model := manifest.config.get("model")) in tuple(BUNDLED):
        record["model"] = model
    record |= {"model_options": _harmless_options(manifest)}
    record |= {k: setting[k] for k in ("guidance", "steps", "base_seed", "seed_mode") if setting.get(k) is not None}
    record |= {"dtype": target["dtype"]} if isinstance(target, Mapping) and target.get("dtype") else {}
    config = AuditConfig(**(record | {k: v for k, v in changes.items() if v is not None}))
    return config if changes.get("detectors") is not None else config.with_document_detectors("the record of the run")


def recorded_model(manifest: Manifest) -> str:
    """What a record calls its model, with the options that it was opened with, in words: a claim, which nothing is opened by."""
    options = manifest.config.get("model_options")
    listing = ", ".join(f"{k}={v}" for k, v in options.items()) if isinstance(options, Mapping) else ""
    return short(f"{manifest.config.get('model') or 'a model in memory'}{f' with {listing}' if listing else ''}", 200)


def require_model(config: AuditConfig, manifest: Manifest, run: str | Path) -> None:
    """Refuse a configuration of :func:`config_of` that no model was named for.

    Raises:
        UsageError: saying what the record calls its model, and how the reader names one.
    """
    if config.model is None:
        raise UsageError(
            f"{run} says that it was made with {recorded_model(manifest)}. A record does not choose what is opened here: name the model "
            f"yourself with --model, and options that it needs with --model-option."
        )


def _harmless_options(manifest: Manifest) -> dict[str, Any]:
    """Of the options that the recorded model was opened with, those that are neither names of files nor secrets."""
    options = manifest.config.get("model_options")
    options = options if isinstance(options, Mapping) else {}
    kept = {k: options[k] for k in ("guidance", "resolution") if k in options and is_number(options[k])}
    return kept | ({"sampler": options["sampler"]} if options.get("sampler") in ("ddim", "own") else {})


# Replaying ----------------------------------------------------------------------------------------------------------------


@within(rtol=DIFFERENCE)
def replay(
    evidence: Evidence,
    rows: Sequence[Row],
    target: Target,
    config: AuditConfig | None = None,
    *,
    reference: Reference | None = None,
    rtol: float | None = None,
    accept_model: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Replayed:
    """Compute samples once more, and compare them with what is recorded.

    Args:
        evidence: The run.
        rows: Those of its rows that are replayed, from :func:`choose`.
        target: The model.
        config: From :func:`config_of`; default: as recorded.
        reference: What pictures were compared with; without it the nearest reference is not compared.
        rtol: Relative tolerance; default: the rounding of scores in the coarser of the recorded precision and this one
            (:func:`mnemoscope.stats.rounding`).
        accept_model: Go on although the model is another one; the result says so.
        progress: Called after every batch.

    Returns:
        The samples in the order of ``rows``. It takes as many denoiser forwards as an audit of these.

    Raises:
        UsageError: the model, the detectors or the reference set are other ones; the difference is named.
    """
    manifest, began, before = evidence.manifest, time.perf_counter(), target.forwards
    request, ids = _request(evidence, rows, target, config or config_of(manifest), reference)
    accepted = _same_setting(manifest, request, accept_model)
    notes = [*_same_reference(manifest, rows, reference), *_elsewhere(manifest, request)]
    tolerance, why = _tolerance(manifest, evidence.thresholds, target, rtol)
    with TemporaryDirectory() as parent:
        again, pictures = _again(request, Path(parent) / "replay", reference, progress)
        compare = _Comparison(evidence, pictures, tolerance, request.config.images)
        found = tuple(compare.row(row, again.get(ids[row.id]), ids[row.id]) for row in rows)
    return Replayed(
        run=evidence.name,
        rows=found,
        prompts=_prompt_verdicts(evidence, rows, {key: again.get(new) for key, new in ids.items()}, tolerance),
        rtol=tolerance,
        why=why,
        levels=compare.levels,
        accepted=tuple(accepted),
        notes=tuple(notes),
        forwards=target.forwards - before,
        seconds=round(time.perf_counter() - began, 3),
    )


def _request(
    evidence: Evidence, rows: Sequence[Row], target: Target, config: AuditConfig, reference: Reference | None
) -> tuple[Request, dict[str, str]]:
    """The audit of these samples, and the id that each row ought to have, by the one that it has."""
    key = digest(evidence.manifest.setting)
    ids = {row.id: sample_id(row.prompt, row.seed, key) for row in rows}
    texts = {row.prompt: Prompt(row.prompt_id, row.prompt, row.group, row.label) for row in rows}
    # Prompts are identified by their text here; their own ids may be wrong in an edited record.
    items = [Prompt(str(i), text) for i, text in enumerate(texts)]
    source = PromptSource(items=items) if target.has_text else None
    # The samples are those of the rows, so no more seeds are listed here than a comparison of pictures asks for.
    seeds = min(config.seeds, LEAST)
    changes = {"prompts": source, "max_errors": len(rows), "batch_size": _batch(evidence, config), "seeds": seeds}
    config = config.model_copy(update=changes)
    request = Request.of(config, target, reference=reference)
    # Named by what they ought to be called: what a record calls them may lead out of the folder.
    samples = {ids[row.id]: Sample(ids[row.id], texts[row.prompt], row.seed) for row in rows}
    return replace(request, samples=list(samples.values()), share=list(samples.values())), ids


def _batch(evidence: Evidence, config: AuditConfig) -> int | Literal["auto"]:
    """As many at a time as in the run, unless another number is asked for."""
    used = evidence.manifest.machine.get("batch_size")
    return used if config.batch_size == "auto" and isinstance(used, int) and used > 0 else config.batch_size


def _again(
    request: Request, folder: Path, reference: Reference | None, progress: Callable[[Progress], None] | None
) -> tuple[dict[str, Row], Callable[[str], bytes | None]]:
    """Rows by id as they come out now, and their pictures by name."""
    request = replace(request, config=request.config.model_copy(update={"out": str(folder)}))
    run = request.open("audit", "")
    try:
        with Writer(run) as writer:
            Session(request, writer, reference, progress).work()
        compare_generations(run, request.detectors, (s.id for s in request.samples), request.target.device)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; nothing was written") from None
    return {row.id: row for row in Run(folder).rows()}, lambda name: (folder / name).read_bytes()


# What must be the same ----------------------------------------------------------------------------------------------------


def _same_setting(manifest: Manifest, request: Request, accept_model: bool) -> list[str]:
    found = differences(manifest.setting, request.setting)
    model = [d for d in found if d.startswith("target.")]
    if others := [d for d in found if d not in model]:
        raise UsageError(f"the run was made under settings that cannot be made again here ({'; '.join(others[:3])}).")
    # The fingerprint is a hash over all the rest: named alone, it says nothing.
    telling = [d for d in model if not d.startswith("target.fingerprint:")] or model
    if telling and not accept_model:
        more = f"; and {len(telling) - 3} more" if len(telling) > 3 else ""
        raise UsageError(
            f"{request.target.name} is not the model of the run ({'; '.join(telling[:3])}{more}); name that one with --model (the record "
            f"calls it {recorded_model(manifest)}), or pass --accept-model to compare with this one all the same."
        )
    return telling


def _same_reference(manifest: Manifest, rows: Sequence[Row], reference: Reference | None) -> list[str]:
    if all(row.nearest is None for row in rows):
        return []
    if reference is None:
        return ["Nearest references were not compared: name the reference set with --reference."]
    if apart := other_reference(manifest, reference):
        raise UsageError(
            f"the reference set is not the one of the run ({'; '.join(apart[:3])}); name that one, or leave --reference out."
        )
    return []


def other_reference(manifest: Manifest, reference: Reference) -> list[str]:
    """Where a reference set is not the one that the run's pictures were compared with."""
    recorded = manifest.config.get("reference")
    return differences(recorded, described(reference)) if isinstance(recorded, dict) else []


def _elsewhere(manifest: Manifest, request: Request) -> Iterator[str]:
    """What may explain small differences."""
    own = {**machine(request.target), "batch_size": request.config.batch_size}
    was = {k: manifest.machine.get(k) for k in ("device", "threads", "platform", "batch_size")}
    apart = differences(was, {k: own.get(k) for k in was}) + differences(manifest.versions, versions())
    if apart:
        yield f"Computed elsewhere than the run: {'; '.join(apart)}."


def _tolerance(
    manifest: Manifest, thresholds: Thresholds | None, target: Target, rtol: float | None
) -> tuple[float, str]:
    if rtol is not None:
        return rtol, "as asked for"
    recorded = manifest.target.get("dtype") or manifest.machine.get("dtype")
    names = dict.fromkeys(str(d).removeprefix("torch.") for d in (recorded, target.dtype) if d is not None)
    found = {name: rounding for name in names if (rounding := _rounding(name)) is not None}
    found |= {"the calibration": thresholds.rounding} if thresholds and thresholds.rounding else {}
    widest = max(found, key=lambda name: found[name], default="float32")
    return found.get(widest, stats.rounding("float32")), f"rounding of a score in {widest}"


def _rounding(dtype: str) -> float | None:
    try:
        return stats.rounding(dtype)
    except UnknownName:
        return None


# Comparing ----------------------------------------------------------------------------------------------------------------


class _Comparison:
    """Rows before and now.

    Args:
        evidence: Before.
        now: The pictures as they are now.
        rtol: Tolerance.
        images: Whether pictures were made.
    """

    def __init__(
        self,
        evidence: Evidence,
        now: Callable[[str], bytes | None],
        rtol: float,
        images: bool,
    ):
        self.evidence, self.now, self.rtol, self.images = evidence, now, rtol, images
        self.levels = float(max(1, math.ceil(255 * rtol)))

    def row(self, was: Row, now: Row | None, ought: str) -> Sampled:
        """One sample; ``ought`` is the id that its prompt and seed give."""
        found = Sampled(was.id, was.prompt_id, was.prompt, was.seed, "failed")
        if now is None or now.status == "error":
            why = now.error if now is not None and now.error else "it was not reached"
            return replace(found, reasons=(why,))
        changes, unsaid = [*self._scores(was, now)], [*self._unsaid(was, now)]
        changes += self._nearest(was.nearest, now.nearest)
        changes += self._picture(was.image, now.image)
        wrong = [] if was.id == ought else [f"its id is not the one that its prompt, seed and setting give ({ought})"]
        if was.tokens_dropped != now.tokens_dropped:
            wrong.append(f"{was.tokens_dropped} tokens were dropped, now {now.tokens_dropped}")
        wrong += [
            f"{name} was compared in {was.scores[name].space} space, now in {score.space}"
            for name, score in now.scores.items()
            if name in was.scores and was.scores[name].space != score.space
        ]
        outcomes: list[Outcome] = [c.outcome for c in changes] + (["differs"] if wrong else [])
        return replace(
            found,
            outcome=max(outcomes, key=get_args(Outcome).index, default="failed"),
            changes=tuple(changes),
            verdicts=tuple(self._verdicts(was, now)),
            reasons=(*wrong, *unsaid) if outcomes else (*unsaid, "nothing could be compared"),
        )

    def _scores(self, was: Row, now: Row) -> Iterator[Change]:
        for name, score in was.scores.items():
            if (again := self._comparable(score, now.scores.get(name))) is None:
                continue
            yield self._change(name, score.value, again.value)
            if len(score.per_step) != len(again.per_step):
                yield Change(f"{name}, number of steps", len(score.per_step), len(again.per_step), math.inf, "differs")
            elif score.per_step:
                steps = [
                    self._change(f"{name}, step {i}", a, b)
                    for i, (a, b) in enumerate(zip(score.per_step, again.per_step, strict=True))
                ]
                yield max(steps, key=lambda c: (get_args(Outcome).index(c.outcome), c.difference))

    def _comparable(self, was: Score, now: Score | None) -> Score | None:
        """Scores of generations compare all seeds of a prompt, and can only be made again where all are."""
        return now if now is not None and was.generations == now.generations else None

    def _unsaid(self, was: Row, now: Row) -> Iterator[str]:
        for name, score in was.scores.items():
            if self._comparable(score, now.scores.get(name)) is None:
                yield f"{name} was not computed again: it compares all seeds of the prompt (name its id to replay them all)"
        if was.image is not None and self.images and self.evidence.picture(was.image) is None:
            yield "the recorded picture is not at hand"

    def _change(self, what: str, was: float, now: float) -> Change:
        gap, size = abs(was - now), max(abs(was), abs(now))
        outcome: Outcome = "same" if gap == 0 else "within tolerance" if gap <= self.rtol * size + ATOL else "differs"
        return Change(what, was, now, gap / size if gap else 0.0, outcome)

    def _nearest(self, was: Nearest | None, now: Nearest | None) -> Iterator[Change]:
        if was is None or now is None:
            return
        told = f"{was.descriptor} similarity" if was.descriptor == now.descriptor else "similarity, descriptor"
        pairs = [
            (told, was.similarity, now.similarity, was.reference, now.reference),
            ("similarity after the autoencoder", was.reconstruction, now.reconstruction, was.reference, now.reference),
            ("layout similarity", was.layout, now.layout, was.layout_reference, now.layout_reference),
        ]
        for what, before, after, one, other in pairs:
            if before is None or after is None:
                continue
            gap = abs(before - after)
            # Another reference that is as near is no other result.
            agrees = gap <= self.rtol + ATOL and was.descriptor == now.descriptor
            outcome: Outcome = "differs" if not agrees else "same" if gap == 0 and one == other else "within tolerance"
            found = "" if one == other else f", {one} then and {other} now"
            yield Change(f"{what}{found}", before, after, gap, outcome)

    def _picture(self, was: str | None, now: str | None) -> Iterator[Change]:
        before = None if was is None else self.evidence.picture(was)
        after = None if now is None else self.now(now)
        if before is None or after is None:
            return
        read = [decode(data, KEPT) for data in (before, after)]
        one, other = (r.picture for r in read)
        if one is None or other is None:
            reason = next(r.reason for r in read if r.picture is None)
            yield Change(f"picture, unreadable ({reason})", None, None, math.inf, "differs")
            return
        if one.size != other.size:
            yield Change("picture, size", None, None, math.inf, "differs")
            return
        apart = np.abs(np.asarray(one, dtype=np.int16) - np.asarray(other, dtype=np.int16))
        lossless = max(one.size) <= LOSSLESS
        what, gap, limit = (
            ("picture, largest difference of a pixel", float(apart.max()), self.levels)
            if lossless
            else ("picture, mean difference of pixels", float(apart.mean()), max(LOSSY, self.levels))
        )
        outcome: Outcome = "same" if not apart.any() else "within tolerance" if gap <= limit else "differs"
        yield Change(what, None, None, gap, outcome)

    def _verdicts(self, was: Row, now: Row) -> Iterator[Verdict]:
        line = self.evidence.thresholds
        if line is not None and line.detector in was.scores and line.detector in now.scores:
            before, after = was.scores[line.detector].value, now.scores[line.detector].value
            yield _verdict(line.detector, before, after, line.threshold, self.rtol)
        if was.nearest is not None and now.nearest is not None:
            yield from self._copies(was.nearest, now.nearest)

    def _copies(self, was: Nearest, now: Nearest) -> Iterator[Verdict]:
        limit = was.threshold
        if limit is None or was.copy_found is None or now.copy_found is None:
            return
        near = self._close(limit, was.similarity, now.similarity)
        yield Verdict(
            "copy found",
            was.copy_found,
            now.copy_found,
            _call(was.copy_found == now.copy_found, near),
            now.similarity,
            limit,
        )
        limit = was.layout_threshold
        found = was.template_found, now.template_found
        if limit is None or None in found or was.layout is None or now.layout is None:
            return
        # A copy is no template copy, whatever its layout: what is borderline for the one is for the other, and a clear copy is clear.
        near = near or (not was.copy_found and self._close(limit, was.layout, now.layout))
        yield Verdict(
            "template copy found", bool(found[0]), bool(found[1]), _call(found[0] == found[1], near), now.layout, limit
        )

    def _close(self, limit: float, *similarities: float) -> bool:
        return any(abs(similarity - limit) <= self.rtol + ATOL for similarity in similarities)


def _call(agree: bool, near: bool) -> Call:
    return "borderline" if near else "same" if agree else "flipped"


def _verdict(what: str, was: float, now: float, line: float, rtol: float) -> Verdict:
    before, after = was > line, now > line
    near = any(stats.borderline(value, line, rtol) for value in (was, now))
    return Verdict(what, before, after, _call(before == after, near), now, line)


def _prompt_verdicts(
    evidence: Evidence, rows: Iterable[Row], again: Mapping[str, Row | None], rtol: float
) -> dict[str, Verdict]:
    """Calls of prompts, which are those of a report: only where all seeds with a result were replayed."""
    line = evidence.thresholds
    if line is None:
        return {}
    values: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        now = again.get(row.id)
        if now is not None and line.detector in row.scores and line.detector in now.scores:
            pair = row.scores[line.detector].value, now.scores[line.detector].value
            values.setdefault(row.prompt_id, []).append(pair)
    there = Counter(row.prompt_id for row in evidence.rows() if row.status == "ok" and row.prompt_id in values)
    asked = evidence.manifest.config.get("seeds") if evidence.manifest.accepted else line.setting.get("seeds")
    judged = {p: v for p, v in values.items() if len(v) == there[p] == (asked if isinstance(asked, int) else len(v))}
    return {
        p: _verdict(line.detector, _mean(a for a, _ in v), _mean(b for _, b in v), line.threshold, rtol)
        for p, v in judged.items()
    }


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
