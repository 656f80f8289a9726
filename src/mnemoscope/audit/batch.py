"""One batch of samples: a trajectory that all detectors watch, rows that come out.

The least work there is: the null prediction of the first step is computed once per seed for a whole audit, steps run only as
far as somebody looks, pictures are decoded only when asked for, and scores leave the device once per batch.
"""

from __future__ import annotations

import copy
import hashlib
import io
import math
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from .. import redaction
from ..detect.base import AnyDetector, Detector, stepwise
from ..errors import ModelFault
from ..models.base import Condition, Target
from ..models.sampling import denoise, null_output
from ..records.schema import Nearest, Row, Score
from ..types import Latents, Step
from .config import AuditConfig
from .prompts import Prompt
from .reconstruct import Reconstructions

__all__ = ["Examiner", "Reference", "Sample", "webp", "webp_uri"]

AUTO_BATCH, AUTO_BATCH_CPU = 64, 16
"""Where ``batch_size: auto`` starts. A CPU gains nothing beyond a few samples."""

TEXT_BATCH = 32
"""Prompts that are encoded together, ahead of their turn."""

LOSSLESS = 128
"""Longest side of pictures that are kept without losses: in small ones artefacts would be as large as details."""

Pictures = Float[Tensor, "batch 3 height width"]


@runtime_checkable
class Reference(Protocol):
    """Pictures a copy could be of. May also have ``image(id) -> [3, height, width]``, to be kept beside the copy, or None."""

    @property
    def name(self) -> str:
        """The descriptor's name."""
        ...

    def nearest(self, images: Pictures) -> Sequence[Any]:
        """For each picture in [0, 1] an object with the fields of :class:`~mnemoscope.records.schema.Nearest`."""
        ...


@dataclass(frozen=True)
class Sample:
    """One prompt with one seed."""

    id: str
    prompt: Prompt
    seed: int


class Examiner:
    """Turns samples into rows.

    Args:
        target: The model.
        detectors: Fresh detectors by the name of their score; they are copied for each batch, never shown a step themselves. Those
            that compare a prompt's pictures are left to :mod:`~mnemoscope.audit.generations`.
        config: Settings of the trajectory.
        upcoming: Prompts in the order in which they will be asked for.
        save: Writes a file of the run and returns its name.
        reference: Where the nearest to each picture is looked up.
    """

    def __init__(
        self,
        target: Target,
        detectors: Mapping[str, AnyDetector],
        config: AuditConfig,
        upcoming: Sequence[str],
        save: Callable[[str, bytes], str],
        reference: Reference | None = None,
    ):
        self.target, self.config = target, config
        self.detectors = stepwise(detectors)
        self.save, self.reference = save, reference
        self.stop = steps_run(config, detectors)
        self._null = target.encode([""]) if needs_null(config, target, detectors) else None
        self._texts = _Texts(target, upcoming)
        self._bank = _Bank(target, config, self._null)
        self._kept_references: dict[str, str | None] = {}
        self._reconstructions = Reconstructions(target, reference)

    def rows(self, batch: Sequence[Sample]) -> list[Row]:
        """One row per sample. A sample whose values are not finite becomes an error row; its neighbors do not suffer."""
        began = time.perf_counter()
        noise, first_null = self._bank.rows(batch)
        before = self.target.forwards
        watching = _Watching(self.detectors)
        for step in self._trajectory(batch, noise, first_null):
            watching.update(step)
        outcomes = watching.outcomes()
        pictures = self.target.decode(step.x_next) if self.config.images and step.x_next is not None else None
        drawn = [True] * len(batch) if pictures is None else pictures.isfinite().flatten(1).all(1).tolist()
        faults = [
            self._fault(sample, outcome, watching.times, shown)
            for sample, outcome, shown in zip(batch, outcomes, drawn, strict=True)
        ]
        nearest = self._nearest(pictures, faults)
        dropped = self._dropped(batch)
        rows = []
        for i, (sample, fault) in enumerate(zip(batch, faults, strict=True)):
            row = _bare(sample) if fault is None else self.failed(sample, ModelFault(fault))
            if fault is None:
                row.scores = watching.scores(outcomes[i], self.target.space)
                row.nearest = nearest[i]
                row.image = None if pictures is None else self._keep(sample.id, pictures[i])
                _say_truncation(row, dropped[row.prompt])
            row.forwards = (self.target.forwards - before) // len(batch)
            row.seconds = round((time.perf_counter() - began) / len(batch), 6)
            rows.append(row)
        return rows

    def failed(self, sample: Sample, error: BaseException) -> Row:
        """The row of a sample that raised."""
        why = redaction.text(f"{type(error).__name__}: {error}")[:2000]
        return _bare(sample).model_copy(update={"status": "error", "error": why})

    def _trajectory(self, batch: Sequence[Sample], noise: Latents, first_null: Latents | None) -> Iterator[Step]:
        cond = self._texts([s.prompt.text for s in batch]) if self.target.has_text else None
        # No check: NaN stays in its own sample and is named after the batch's one transfer.
        run = denoise(
            self.target,
            noise,
            cond,
            self._null,
            steps=self.config.steps,
            guidance=self.config.guidance,
            first_null=first_null,
            check=False,
        )
        for step in run:
            yield step
            if self.stop is not None and step.index + 1 >= self.stop:
                return

    def _fault(self, sample: Sample, outcome: _Outcome, times: Sequence[float], drawn: bool) -> str | None:
        """What is not finite about a sample, in one sentence: the step at fault, whether or not a detector looked at it."""
        broken = [
            name for name, (value, steps) in outcome.values.items() if not all(map(math.isfinite, (value, *steps)))
        ]
        if outcome.sound < len(times):
            what = (
                f"{self.target.name} predicted NaN or infinity at step {outcome.sound} (t = {times[outcome.sound]:g})"
            )
        elif broken:
            what = f"{broken[0]} is not finite, though every prediction is,"
        elif not drawn:
            what = f"the picture is not finite, though all {len(times)} steps are,"
        else:
            return None
        return (
            f"{what} for {sample.prompt.text[:60]!r} with seed {sample.seed}; "
            f"load the model in float32 or bfloat16, or check the checkpoint."
        )

    def _dropped(self, batch: Sequence[Sample]) -> dict[str, int]:
        """Prompt → tokens that the encoder never saw; each prompt is counted once, however many seeds it has."""
        count = self.target.dropped if self.target.has_text else lambda text: 0
        return {text: count(text) for text in {s.prompt.text for s in batch}}

    def _keep(self, name: str, picture: Tensor) -> str:
        return self.save(f"images/{name}.webp", webp(picture))

    def _nearest(self, pictures: Pictures | None, faults: list[str | None]) -> list[Nearest | None]:
        sound = [i for i, fault in enumerate(faults) if fault is None]
        found: list[Nearest | None] = [None] * len(faults)
        if self.reference is None or pictures is None or not sound:
            return found
        for i, match in zip(sound, self.reference.nearest(pictures[sound]), strict=True):
            record = Nearest.model_validate(match, from_attributes=True)
            update: dict[str, Any] = {"reconstruction": self._reconstructions.similarity(pictures[i], record.reference)}
            if not record.file:
                update["file"] = self._reference_file(record.reference)
            if record.template_found and record.layout_reference is not None:
                update["layout_file"] = self._reference_file(record.layout_reference)
            found[i] = record.model_copy(update=update)
        return found

    def _reference_file(self, key: str) -> str | None:
        """A copy of the reference picture in the run folder, where the reference set can show it."""
        if key not in self._kept_references:
            image = getattr(self.reference, "image", None)
            name = f"reference-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
            shown = None if image is None else image(key)
            self._kept_references[key] = None if shown is None else self._keep(name, shown)
        return self._kept_references[key]


def steps_run(config: AuditConfig, detectors: Mapping[str, AnyDetector]) -> int | None:
    """How many steps of a trajectory are run; None: all of them, because a picture is wanted."""
    return None if config.images else max(d.steps_needed for d in detectors.values())


def needs_null(config: AuditConfig, target: Target, detectors: Mapping[str, AnyDetector]) -> bool:
    """Whether a prediction without the prompt is made: for a detector that compares, or to guide more than one step."""
    if any("uncond" in d.needs for d in detectors.values()):
        return target.has_text
    guidance = target.guidance if config.guidance is None else config.guidance
    return target.has_text and guidance > 1 and steps_run(config, detectors) != 1


def batch_size(config: AuditConfig, target: Target) -> int:
    """Samples per batch at the start; it halves when memory runs out."""
    if config.batch_size != "auto":
        return config.batch_size
    return AUTO_BATCH_CPU if target.device.type == "cpu" else AUTO_BATCH


class _Texts:
    """Encoded prompts: in batches, each prompt once, never more than a batch ahead in memory."""

    def __init__(self, target: Target, upcoming: Sequence[str]):
        self.target = target
        self._order = list(dict.fromkeys(upcoming))
        self._place = {text: i for i, text in enumerate(self._order)}
        self._rows: dict[str, Condition] = {}

    def __call__(self, texts: Sequence[str]) -> Condition:
        wanted = list(dict.fromkeys(texts))
        missing = [t for t in wanted if t not in self._rows]
        if missing:
            kept = {t: self._rows[t] for t in wanted if t in self._rows}
            self._rows = kept | self._encode(missing)
        return Condition.cat([self._rows[t] for t in texts])

    def _encode(self, missing: list[str]) -> dict[str, Condition]:
        start = self._place.get(missing[0], 0)
        block = list(dict.fromkeys([*missing, *self._order[start : start + TEXT_BATCH]]))
        try:
            encoded = self.target.encode(block)
        except Exception:
            # One prompt that cannot be encoded must not fail those whose turn has not come.
            block, encoded = missing, self.target.encode(missing)
        return dict(zip(block, encoded.split(), strict=True))


class _Bank:
    """Starting noises, and the null prediction of the first step where all prompts share them."""

    def __init__(self, target: Target, config: AuditConfig, null: Condition | None):
        self.target, self.config, self.null = target, config, null
        self._noise: dict[int, Tensor] = {}
        self._first: dict[int, Tensor] = {}

    def rows(self, batch: Sequence[Sample]) -> tuple[Latents, Latents | None]:
        """Noise of each sample, and its null prediction (None: nobody needs one, or each prompt has its own noise)."""
        if self.config.seed_mode == "per-prompt":
            own = [self.target.noise([s.seed], own_base(self.config.base_seed, s.prompt.text)) for s in batch]
            return torch.cat(own), None
        seeds = [s.seed for s in batch]
        if missing := [s for s in dict.fromkeys(seeds) if s not in self._noise]:
            noise = self.target.noise(missing, self.config.base_seed)
            if self.null is not None:
                first = null_output(self.target, noise, self.null, steps=self.config.steps)
                self._first |= dict(zip(missing, first, strict=True))
            self._noise |= dict(zip(missing, noise, strict=True))
        first_null = torch.stack([self._first[s] for s in seeds]) if self.null is not None else None
        return torch.stack([self._noise[s] for s in seeds]), first_null


def own_base(base: int, prompt: str) -> int:
    """The base seed of one prompt in per-prompt mode, 63 bits; never 0, which would mean plain seeds."""
    return int.from_bytes(hashlib.sha256(f"{base}/{prompt}".encode()).digest()[:8], "big") >> 1 | 1


_Value: TypeAlias = tuple[float, list[float]]
"""Score and per-step values of one sample."""


@dataclass(frozen=True)
class _Outcome:
    """What one sample came to: its value for each detector, and how many leading steps held nothing but numbers."""

    values: dict[str, _Value]
    sound: int


class _Watching:
    """What looks at one batch's trajectory: fresh detectors, and whether every number of every step is finite."""

    def __init__(self, detectors: Mapping[str, Detector]):
        self.detectors = {name: copy.deepcopy(d) for name, d in detectors.items()}
        self.times: list[float] = []
        self._finite: list[Tensor] = []

    def update(self, step: Step) -> None:
        """Take one step; nothing leaves the device."""
        self.times.append(step.t)
        self._finite.append(_finite(step))
        for detector in self.detectors.values():
            detector.update(step)

    def outcomes(self) -> list[_Outcome]:
        """One for each sample: the batch's one transfer."""
        sound = torch.stack(self._finite, dim=1).float().cumprod(dim=1).sum(dim=1)
        parts = [torch.cat([d.compute()[:, None], d.per_step()], dim=1) for d in self.detectors.values()]
        widths = [part.shape[1] for part in parts]
        outcomes = []
        for first, *line in torch.cat([sound[:, None], *parts], dim=1).tolist():
            values, start = {}, 0
            for name, width in zip(self.detectors, widths, strict=True):
                values[name] = (line[start], line[start + 1 : start + width])
                start += width
            outcomes.append(_Outcome(values, int(first)))
        return outcomes

    def scores(self, outcome: _Outcome, space: str) -> dict[str, Score]:
        """A sample's scores as its row keeps them; ``space`` is that of detectors that do not say."""
        return {
            name: Score(value=value, space=self.detectors[name].space or space, per_step=steps)
            for name, (value, steps) in outcome.values.items()
        }


def _finite(step: Step) -> Bool[Tensor, " batch"]:
    """Which samples of a step hold nothing but numbers. No device sync."""
    parts = [part for part in (step.cond, step.uncond, step.x_next) if part is not None]
    return torch.stack([part.isfinite().flatten(1).all(1) for part in parts]).all(0)


def _say_truncation(row: Row, dropped: int) -> None:
    row.tokens_dropped = dropped
    if dropped:
        row.note = f"prompt truncated: the model never saw its last {dropped} tokens"


def _bare(sample: Sample) -> Row:
    p = sample.prompt
    return Row(id=sample.id, prompt=p.text, seed=sample.seed, status="ok", **p.facts)


def webp(picture: Float[Tensor, "3 height width"]) -> bytes:
    """A picture in [0, 1] as WebP, lossless up to :data:`LOSSLESS` pixels."""
    pixels = (picture.permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "WEBP", lossless=max(pixels.shape) <= LOSSLESS, quality=90, method=4)
    return out.getvalue()


def webp_uri(picture: Float[Tensor, "3 height width"]) -> str:
    """The same, to be put into a page."""
    return f"data:image/webp;base64,{b64encode(webp(picture)).decode()}"
