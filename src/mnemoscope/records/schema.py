"""What a run leaves on disk: one manifest, one row per prompt and seed, one thresholds file.

Everything here is plain data (pydantic models); no torch. Unknown keys are errors, so that a typo in a hand-edited file is
seen. ``format`` changes only when old readers would misread a file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from .. import redaction

FORMAT = 1

Words = Annotated[str, AfterValidator(redaction.text)]
"""A text without secrets."""

Plain = Annotated[dict[str, Any], AfterValidator(redaction.cleaned)]
"""Plain values without secrets."""


class Record(BaseModel):
    """Base of everything stored: strict about keys, so that nothing is silently lost."""

    model_config = ConfigDict(extra="forbid")


class Nearest(Record):
    """The reference picture nearest to a generated one."""

    # JSON has no NaN: a value that is not finite must become an error row before it gets here.
    model_config = ConfigDict(allow_inf_nan=False, from_attributes=True)

    reference: str
    """Id of the reference picture."""
    similarity: float
    """Similarity under ``descriptor``; its scale belongs to the descriptor."""
    descriptor: str
    threshold: float | None = None
    """Similarity above which the descriptor's null distribution calls two pictures copies; None: not calibrated."""
    copy_found: bool | None = None
    """similarity > threshold, as for scores: the threshold itself is not above. None: not calibrated."""
    file: str | None = None
    """The reference picture inside the run folder, if it was kept."""
    reconstruction: float | None = None
    """Similarity to the reference as the model's autoencoder reconstructs it; None: it has none, or the picture cannot be shown."""
    layout: float | None = None
    """Layout similarity: share of a near reference's blocks with content that stand in the picture at the same place."""
    layout_reference: str | None = None
    """Id of the reference whose layout is shared most; it need not be ``reference``."""
    layout_threshold: float | None = None
    """Layout similarity above which a template copy is called; None: not calibrated."""
    template_found: bool | None = None
    """layout > layout_threshold while the whole picture is no copy. None: not calibrated."""
    layout_file: str | None = None
    """The picture of ``layout_reference`` inside the run folder, for a template copy."""


class Score(Record):
    """One detector's answer for one prompt and seed."""

    model_config = ConfigDict(allow_inf_nan=False)

    value: float
    """Mean over the detector's step window."""
    space: str
    """Space of the predictions that were compared; scores never cross spaces."""
    per_step: list[float] = Field(default_factory=list)
    """The value at each step that was run, index 0 first; every window is a slice of it."""
    generations: int | None = None
    """How many generations of the prompt were compared with each other; None: this one was scored by itself."""


class Row(Record):
    """One sample: a prompt with one seed. Appended to ``samples.jsonl`` the moment it is known."""

    id: str
    """Hash of prompt, seed and every setting that matters; independent of order, batch size and machine."""
    prompt_id: str
    """The prompt's id in its source, or a hash of the prompt."""
    prompt: str
    seed: int
    status: Literal["ok", "error"]
    group: str | None = None
    """Label from the prompt source, if it has one (for instance ``planted`` or ``ordinary``)."""
    label: bool | None = None
    """Known ground truth: the prompt is known to be memorized; None: unknown."""
    family: str | None = None
    """Family from the prompt source, if it has one: prompts of one picture, brand or layout."""
    control: str | None = None
    """The control that this prompt was made for from another one (``case-fold``, ``swap``, …); None: it was asked for."""
    origin: str | None = None
    """For a control: the id of the prompt that it was made from."""
    scores: dict[str, Score] = Field(default_factory=dict)
    forwards: int = 0
    """Denoiser forwards spent on this row (its share of what the batch shares)."""
    tokens_dropped: int = 0
    """Tokens beyond the encoder's limit, which the model never saw."""
    image: str | None = None
    nearest: Nearest | None = None
    seconds: float | None = None
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
    asked: int = 0
    """Rows the run is meant to have."""
    forwards: int = 0
    """Denoiser forwards in all, shared work included."""
    notes: list[Words] = Field(default_factory=list)
    """What was not tested, and why."""
    accepted: list[str] = Field(default_factory=list)
    """Where the threshold's setting differs from this run's, if it was accepted nevertheless."""
    doses: dict[str, int] = Field(default_factory=dict)
    """How often a picture of each group was in training, where that is known (the bundled world)."""

    @property
    def model(self) -> str:
        """What to call the model in sentences."""
        return str(self.target.get("name") or self.config.get("model") or "the model")


class Thresholds(Record):
    """``thresholds.json``: scores of ordinary prompts of one model under one setting, and what follows from them."""

    model_config = ConfigDict(allow_inf_nan=False)

    format: int = FORMAT
    detector: str
    setting: dict[str, Any]
    """Everything the scores depend on: target identity, dtype, resolution, guidance, scheduler, steps, method, window, n
    seeds, bank of noises."""
    scores: list[float]
    """Sorted scores of the ordinary prompts, one per prompt (mean over n seeds and the window)."""
    fpr: float
    """The stated false-positive rate of ``threshold``."""
    threshold: float
    """A prompt is above threshold iff its score is strictly greater."""
    interval: tuple[float | None, float | None]
    """Interval of the threshold itself (order statistics), at ``confidence``; None: too few scores for that bound."""
    confidence: float = 0.95
    source: str = ""
    """Where the ordinary prompts come from, in words."""
    rounding: float | None = None
    """Relative rounding of a score under the dtype it was computed in: a score this near the threshold is borderline.
    None: not known."""
