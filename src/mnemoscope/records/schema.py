"""What a run leaves on disk: one manifest, one row per prompt and seed, one thresholds file.

Everything here is plain data (pydantic models); no torch. Unknown keys are errors, so that a typo in a hand-edited file is
seen. ``format`` changes only when old readers would misread a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from .. import redaction

FORMAT = 1

Words = Annotated[str, AfterValidator(redaction.text)]
"""A text without secrets."""

Plain = Annotated[dict[str, Any], AfterValidator(redaction.cleaned)]
"""Plain values without secrets."""


Whole = Annotated[int, Field(strict=True, ge=0, le=2**63 - 1)]
"""A count, or a seed: a whole number of 0 or more, never a text or a truth value that stands for one."""

Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""A number that is one: no text, no truth value, no NaN, no infinity."""

Share = Annotated[Finite, Field(ge=0, le=1)]
"""A part of a whole."""

Rate = Annotated[Finite, Field(gt=0, lt=1)]
"""A share that is neither nothing nor all."""

Truth = Annotated[bool, Field(strict=True)]
"""True or false, never a text or a number that stands for it."""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _known(values: Mapping[str, Any], kinds: Mapping[str, type], where: str, *, null: bool = True) -> None:
    """Refuse a value of another kind than the readers of these plain values rely on; one that is missing is not there.

    ``null``: null stands for one that is missing.
    """
    for key, kind in kinds.items():
        if key in values and not (isinstance(value := values[key], kind) or (null and value is None)):
            raise ValueError(f"{where}.{key} is {_short(value)}, and must be {_KINDS[kind]}")


_KINDS: dict[type, str] = {dict: "a mapping", list: "a list"}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


PROVENANCE = frozenset({"name", "source", "revision", "files"})
"""Keys of a model's identity that say where it came from; two copies of one model differ in nothing else."""


class Record(BaseModel):
    """Base of everything stored: strict about keys, so that nothing is silently lost."""

    model_config = ConfigDict(extra="forbid")


class Nearest(Record):
    """The reference picture nearest to a generated one."""

    # JSON has no NaN: a value that is not finite must become an error row before it gets here.
    model_config = ConfigDict(allow_inf_nan=False, from_attributes=True)

    reference: str
    """Id of the reference picture."""
    similarity: Finite
    """Similarity under ``descriptor``; its scale belongs to the descriptor."""
    descriptor: str
    threshold: Finite | None = None
    """Similarity above which the descriptor's null distribution calls two pictures copies; None: not calibrated."""
    copy_found: Truth | None = None
    """similarity > threshold, as for scores: the threshold itself is not above. None: not calibrated."""
    file: str | None = None
    """The reference picture inside the run folder, if it was kept."""
    reconstruction: Finite | None = None
    """Similarity to the reference as the model's autoencoder reconstructs it; None: it has none, or the picture cannot be shown."""
    layout: Finite | None = None
    """Layout similarity: share of a near reference's blocks with content that stand in the picture at the same place."""
    layout_reference: str | None = None
    """Id of the reference whose layout is shared most; it need not be ``reference``."""
    layout_threshold: Finite | None = None
    """Layout similarity above which a template copy is called; None: not calibrated."""
    template_found: Truth | None = None
    """layout > layout_threshold while the whole picture is no copy. None: not calibrated."""
    layout_file: str | None = None
    """The picture of ``layout_reference`` inside the run folder, for a template copy."""


class Score(Record):
    """One detector's answer for one prompt and seed."""

    model_config = ConfigDict(allow_inf_nan=False)

    value: Finite
    """Mean over the detector's step window."""
    space: str
    """Space of the predictions that were compared; scores never cross spaces."""
    per_step: list[Finite] = Field(default_factory=list)
    """The value at each step that was run, index 0 first; every window is a slice of it."""
    generations: Whole | None = None
    """How many generations of the prompt were compared with each other; None: this one was scored by itself."""


class Row(Record):
    """One sample: a prompt with one seed. Appended to ``samples.jsonl`` the moment it is known."""

    id: str
    """Hash of prompt, seed and every setting that matters; independent of order, batch size and machine."""
    prompt_id: str
    """The prompt's id in its source, or a hash of the prompt."""
    prompt: str
    seed: Whole
    status: Literal["ok", "error"]
    group: str | None = None
    """Label from the prompt source, if it has one (for instance ``planted`` or ``ordinary``)."""
    label: Truth | None = None
    """Known ground truth: the prompt is known to be memorized; None: unknown."""
    family: str | None = None
    """Family from the prompt source, if it has one: prompts of one picture, brand or layout."""
    control: str | None = None
    """The control that this prompt was made for from another one (``case-fold``, ``swap``, …); None: it was asked for."""
    origin: str | None = None
    """For a control: the id of the prompt that it was made from."""
    scores: dict[str, Score] = Field(default_factory=dict)
    forwards: Whole = 0
    """Denoiser forwards spent on this row (its share of what the batch shares)."""
    tokens_dropped: Whole = 0
    """Tokens beyond the encoder's limit, which the model never saw."""
    image: str | None = None
    nearest: Nearest | None = None
    seconds: Annotated[Finite, Field(ge=0)] | None = None
    error: str | None = None
    """For status ``error``: type and message."""
    note: str | None = None
    """Anything a reader of the row must know (for instance that the prompt was truncated)."""


class Manifest(Record):
    """``run.json``: what was asked, resolved, and how it went."""

    format: int = FORMAT
    kind: Literal["audit", "check", "demo", "calibrate"] = "audit"
    status: Literal["running", "done", "incomplete", "interrupted"] = "running"
    command: Words = ""
    """The command that repeats this run."""
    config: Plain = Field(default_factory=dict)
    """The resolved configuration."""
    setting: dict[str, Any] = Field(default_factory=dict)
    """The part of it that every score depends on; sample ids are hashes of it, the prompt and the seed."""
    target: Plain = Field(default_factory=dict)
    """Identity of the model: weight hashes, adapters, scheduler, dtype, resolution."""
    versions: dict[str, str] = Field(default_factory=dict)
    git: dict[str, Any] | None = None
    """``commit`` of the git checkout that the command ran in, and whether tracked files differed from it (``dirty``; null: not
    known, as git itself is not run). None: it ran in no checkout."""
    machine: dict[str, Any] = Field(default_factory=dict)
    """Device, dtype and why, threads, batch size that was used."""
    started: str = ""
    ended: str | None = None
    asked: Whole = 0
    """Rows the run is meant to have."""
    forwards: Whole = 0
    """Denoiser forwards in all, shared work included."""
    notes: list[Words] = Field(default_factory=list)
    """What was not tested, and why."""
    accepted: list[str] = Field(default_factory=list)
    """Where the threshold's setting differs from this run's, if it was accepted nevertheless."""
    doses: dict[str, Whole] = Field(default_factory=dict)
    """How often a picture of each group was in training, where that is known (the bundled world)."""

    @model_validator(mode="after")
    def _plain_values_of_known_kinds(self) -> Manifest:
        _known(self.config, {"prompts": dict, "reference": dict, "controls": list}, "config")
        _known(self.setting, {"target": dict, "detectors": dict}, "setting", null=False)
        for name, method in self.setting.get("detectors", {}).items():
            if not isinstance(method, dict):
                raise ValueError(f"setting.detectors.{_short(name)} is {_short(method)}, and must be a mapping")
            _known(method, {"options": dict}, f"setting.detectors.{_short(name)}", null=False)
        if (seeds := self.config.get("seeds")) is not None and not (_is_whole(seeds) and seeds > 0):
            raise ValueError(f"config.seeds is {_short(seeds)}, and must be a whole number of 1 or more")
        listed = (self.config.get("prompts") or {}).get("items")
        if listed is not None and not (_is_whole(listed) and listed >= 0):
            raise ValueError(f"config.prompts.items is {_short(listed)}, and must be a whole number of 0 or more")
        threshold = (self.config.get("reference") or {}).get("threshold")
        if threshold is not None and not _is_finite(threshold):
            raise ValueError(f"config.reference.threshold is {_short(threshold)}, and must be a finite number")
        return self

    @property
    def model(self) -> str:
        """What to call the model in sentences."""
        return str(self.target.get("name") or self.config.get("model") or "the model")


class Thresholds(Record):
    """``thresholds.json``: scores of ordinary prompts of one model under one setting, and what follows from them."""

    model_config = ConfigDict(allow_inf_nan=False)

    format: int = FORMAT
    detector: str = Field(min_length=1, max_length=200)
    setting: dict[str, Any]
    """Everything the scores depend on: target identity, dtype, resolution, guidance, scheduler, steps, method, window, n
    seeds, bank of noises."""
    scores: list[Finite] = Field(min_length=1)
    """Sorted scores of the ordinary prompts, one per prompt (mean over n seeds and the window)."""
    fpr: Rate
    """The stated false-positive rate of ``threshold``."""
    threshold: Finite
    """A prompt is above threshold iff its score is strictly greater."""
    interval: tuple[Finite | None, Finite | None]
    """Interval of the threshold itself (order statistics), at ``confidence``; None: too few scores for that bound."""
    confidence: Rate = 0.95
    source: str = ""
    """Where the ordinary prompts come from, in words."""
    rounding: Annotated[Share, Field(lt=1)] | None = None
    """Relative rounding of a score under the dtype it was computed in: a score this near the threshold is borderline.
    None: not known."""

    @model_validator(mode="after")
    def _plain(self) -> Thresholds:
        if not self.detector.isprintable():
            raise ValueError(f"detector is {_short(self.detector)}, and a name has no control characters")
        _known(self.setting, {"method": dict}, "setting")
        target = self.setting.get("target")
        size = target.get("resolution") if isinstance(target, dict) else None
        sides: Any = [size] if _is_whole(size) else size
        if size is not None and not (_are_wholes(sides) and all(0 < side <= SIDE for side in sides)):
            raise ValueError(f"setting.target.resolution is {_short(size)}, and must be pixels from 1 to {SIDE:,}")
        seeds = self.setting.get("seeds")
        if seeds is not None and not (_is_whole(seeds) and seeds > 0) and not _are_wholes(seeds):
            raise ValueError(
                f"setting.seeds is {_short(seeds)}, and must be a whole number of 1 or more, or a list of seeds"
            )
        steps = self.setting.get("steps")
        if steps is not None and not (_is_whole(steps) and 0 < steps <= STEPS):
            raise ValueError(f"setting.steps is {_short(steps)}, and must be a whole number from 1 to {STEPS:,}")
        guidance = self.setting.get("guidance")
        if guidance is not None and not _is_finite(guidance):
            raise ValueError(f"setting.guidance is {_short(guidance)}, and must be a finite number")
        return self


STEPS = 100_000
"""More steps than any schedule has."""

SIDE = 100_000
"""More pixels than any generated picture has along a side."""


def _are_wholes(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(_is_whole(v) and v >= 0 for v in value)
