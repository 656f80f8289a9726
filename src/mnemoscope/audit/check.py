"""One prompt, looked at closely, without a run folder: what a person types and a notebook shows."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..bounds import GUIDANCE, STEPS, seed_numbers, within
from ..detect.calibrate import Calibration, setting_of
from ..detect.magnitude import Magnitude
from ..errors import CannotAudit, ModelFault, UsageError
from ..models.base import Target
from ..models.sampling import denoise
from .batch import Reference


@dataclass(frozen=True, eq=False)
class Check:
    """Scores of one prompt, and its pictures if they were asked for. Shows itself in a notebook.

    Attributes:
        prompt: The prompt.
        score: Mean over seeds and the step window.
        scores: One per seed.
        window: Half-open step window.
        space: Space of the predictions that were compared.
        per_step: The magnitude at each step that was run, ``[seed][step]``.
        p: Conformal p-value against ordinary prompts; None: not calibrated.
        threshold: Score at the calibration's false-positive rate; None: not calibrated.
        tokens: The prompt as the encoder sees it.
        dropped: Tokens beyond the encoder's limit, which the model never saw.
        images: ``[seed, 3, height, width]`` in [0, 1], on the CPU; None: not asked for.
        nearest: The nearest reference of each picture; empty: not tested.
        forwards: Denoiser forwards spent (F).
        accepted: In what the calibration's setting differs from this one, where that was accepted.
        borderline: The score is within rounding of the threshold: another machine may call it differently.
    """

    prompt: str
    score: float
    scores: tuple[float, ...]
    window: tuple[int, int]
    space: str
    per_step: tuple[tuple[float, ...], ...]
    p: float | None
    threshold: float | None
    fpr: float | None
    tokens: tuple[str, ...]
    dropped: int
    images: Float[Tensor, "seed 3 height width"] | None
    nearest: tuple[Any, ...]
    forwards: int
    accepted: tuple[str, ...] = ()
    borderline: bool = False

    @property
    def above(self) -> bool | None:
        """Whether the score is above the threshold; None: not calibrated."""
        return None if self.threshold is None else self.score > self.threshold

    @property
    def words(self) -> str:
        """The result in one sentence; never a verdict."""
        n = len(self.scores)
        what = f"score {self.score:.3f} over {n} seed{'s' if n > 1 else ''}"
        if self.p is None or self.fpr is None:
            what += ", not calibrated: only a ranking means something (mnemoscope calibrate)"
        else:
            what += (
                f", {'above' if self.above else 'not above'} threshold at {100 * self.fpr:g} % FPR (p = {self.p:.3g})"
            )
        if self.borderline:
            what += ", borderline: within rounding of it"
        if self.accepted:
            what += f", of a calibration made under another setting ({'; '.join(self.accepted)})"
        if self.nearest:
            k = sum(bool(m.copy_found) for m in self.nearest)
            best = max(self.nearest, key=lambda m: m.similarity)
            found = f"copy found in {k} of {n} seeds" if k else f"no copy found in {n} seeds"
            what += f"; {found} (nearest {best.reference}, {best.descriptor} {best.similarity:.2f})"
        else:
            what += "; copies: not tested"
        return what + (f"; {self.dropped} tokens at the end were cut off" if self.dropped else "")

    def __repr__(self) -> str:
        return f"Check({self.prompt[:60]!r}: {self.words})"

    def _repr_html_(self) -> str:
        """A fragment for notebooks: the sentence and the pictures."""
        from .batch import webp_uri

        pictures = [] if self.images is None else [webp_uri(i) for i in self.images]
        shown = "".join(
            f'<img src="{uri}" alt="generated with seed {j}" height="128"> ' for j, uri in enumerate(pictures)
        )
        return f"<p><b>{html.escape(self.prompt)}</b><br>{html.escape(self.words)}</p><p>{shown}</p>"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the pictures."""
        named = ("reference", "similarity", "descriptor", "threshold", "copy_found")
        return {
            "prompt": self.prompt, "score": self.score, "scores": list(self.scores), "window": list(self.window),
            "space": self.space, "per_step": [list(v) for v in self.per_step], "p": self.p, "threshold": self.threshold,
            "fpr": self.fpr, "above": self.above, "borderline": self.borderline,
            "tokens": list(self.tokens), "tokens_dropped": self.dropped,
            "nearest": [{k: getattr(m, k) for k in named} for m in self.nearest], "forwards": self.forwards,
            "accepted": list(self.accepted), "words": self.words,
        }  # fmt: skip


@within(steps=STEPS, guidance=GUIDANCE)
def check(
    target: Target,
    prompt: str,
    *,
    seeds: int | Sequence[int] = 4,
    window: int | tuple[int, int] = 1,
    steps: int = 50,
    guidance: float | None = None,
    images: bool = False,
    calibration: Calibration | None = None,
    accept_threshold: bool = False,
    reference: Reference | None = None,
) -> Check:
    """Score one prompt with the magnitude (Wen et al. 2024), and look at its pictures if asked.

    Args:
        target: The model.
        prompt: The prompt; the empty prompt scores exactly 0.
        seeds: Number of generations (seeds 0 … n − 1), or the seeds themselves.
        window: Leading steps to average over, or a half-open window.
        steps: Length of the sampler's schedule.
        guidance: Guidance scale; default is the target's own.
        images: Finish the trajectory and decode; implied by ``reference``.
        calibration: Scores of ordinary prompts of this model, for a p-value.
        accept_threshold: Use the calibration although it was made under another setting; the result says so.
        reference: Pictures in which copies are looked for.

    Returns:
        A :class:`Check`. Costs n·2K forwards for K steps.

    Raises:
        CannotAudit: the model takes no text.
        ModelFault: a prediction or a score is not finite.
        UsageError: a calibration made under another setting (the difference is named), or no seed.
    """
    chosen = list(seed_numbers(seeds))
    if not chosen:
        raise UsageError("check needs at least one seed; give seeds=4, for instance.")
    if not target.has_text:
        raise CannotAudit(f"{target.name} takes no text, so there is no prompt to check; measure its images instead.")
    g = target.guidance if guidance is None else guidance
    detector = Magnitude(steps=window)
    accepted: list[str] = []
    if calibration is not None:
        setting = setting_of(
            target.identity(), guidance=g, steps=steps, window=detector.window, seeds=chosen, seed_mode="shared"
        )
        accepted = calibration.check(setting, accept=accept_threshold)
    before = target.forwards
    images = images or reference is not None
    x = None
    cond, null = target.encode([prompt]).expand(len(chosen)), target.encode([""])
    # One prompt can afford a sync per step, and is told the step at fault.
    for step in denoise(target, target.noise(chosen), cond, null, steps=steps, guidance=g, check=True):
        detector.update(step)
        x = step.x_next
        if not images and step.index + 1 >= detector.steps_needed:
            break
    pictures = target.decode(x) if images and x is not None else None
    scores = detector.compute().tolist()
    if not all(map(math.isfinite, scores)):
        raise ModelFault(
            f"the score of {prompt[:60]!r} is not finite, though every prediction is: {target.name} predicts numbers too large to be "
            f"compared; check the checkpoint."
        )
    score = sum(scores) / len(scores)
    return Check(
        prompt=prompt,
        score=score,
        scores=tuple(scores),
        window=detector.window,
        space=str(detector.space),
        per_step=tuple(tuple(v) for v in detector.per_step().tolist()),
        p=None if calibration is None else calibration.p_value(score),
        threshold=None if calibration is None else calibration.threshold,
        fpr=None if calibration is None else calibration.record.fpr,
        tokens=tuple(target.tokens(prompt)),
        dropped=target.dropped(prompt),
        images=pictures,
        nearest=() if reference is None or pictures is None else tuple(reference.nearest(pictures)),
        forwards=target.forwards - before,
        accepted=tuple(accepted),
        borderline=calibration is not None and calibration.borderline(score),
    )
