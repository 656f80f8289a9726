"""The one denoising loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import CannotAudit, ModelFault
from ..types import Latents, PerSample, Step
from .base import Condition, Schedule, Target


@runtime_checkable
class GuidanceRule(Protocol):
    """Chooses the guidance scale of each sample at each step, from what has been seen so far. Keeps no state."""

    def __call__(self, t: float, sizes: Float[Tensor, "batch step"], scale: float) -> PerSample:
        """The scale g of ε̂ = ε_∅ + g·(ε_c − ε_∅) for each sample; 0 is the prediction without the prompt.

        Args:
            t: The model's time at this step.
            sizes: ‖ε_c − ε_∅‖₂ at every step so far, this one last. Never off the device.
            scale: The scale the generation would have without the rule.
        """
        ...


def null_output(target: Target, noise: Latents, null: Condition, *, steps: int = 50) -> Latents:
    """The raw null prediction at the first step on a bank of starting noises, ``[n, channel, height, width]``.

    All prompts share the bank, so this costs n forwards for a whole audit (design: least work). Hand its rows to
    :func:`denoise` as ``first_null``.
    """
    plan = target.schedule(steps)
    t = plan.timesteps[0]
    with torch.no_grad():
        return target.output(plan.scale(plan.start(noise), t), t, null.expand(len(noise)))


def denoise(
    target: Target,
    noise: Latents,
    cond: Condition | None,
    null: Condition | None = None,
    *,
    steps: int = 50,
    plan: Schedule | None = None,
    guidance: float | GuidanceRule | None = None,
    first_null: Float[Tensor, "rows channel height width"] | None = None,
    first_cond: Float[Tensor, "rows channel height width"] | None = None,
    check: bool | None = None,
) -> Iterator[Step]:
    """Sample with classifier-free guidance and show every step.

    Args:
        target: The model.
        noise: Unit-variance starting noise, ``[batch, channel, height, width]``.
        cond: One encoded prompt per sample; None for a model without text.
        null: The encoded empty prompt, one row (expanded here). Without it no second prediction is made and ``cond`` alone
            drives.
        steps: Length of the sampler's schedule.
        plan: A sampler run to use instead of ``target.schedule(steps)``; it must be fresh.
        guidance: ε̂ = ε_∅ + g·(ε_c − ε_∅); default is the target's own. A :class:`GuidanceRule` chooses g at each step, around the
            target's own scale.
        first_null: Raw null predictions at the first step, one per sample, from :func:`null_output`; saves batch forwards.
        first_cond: Raw predictions with the prompt at the first step, one per sample; saves batch forwards.
        check: Stop with :class:`ModelFault` at the first prediction that is not finite. This costs a device sync per step,
            so by default it is on for CPU models only; elsewhere NaN travels into the scores, whose columns name the step.

    Yields:
        :class:`Step` for each index, in order; the caller stops when it has seen enough. Step k costs 2·batch forwards with
        a null condition (batch at the first step when ``first_null`` is given), batch without. Work for a step is done only
        when it is asked for, and ``x_next`` costs no forward.

    Raises:
        CannotAudit: guidance is 1 or less while a null prediction was asked for, or the batch sizes disagree. Raised at the
            call, before any step is asked for.
    """
    rule = None if guidance is None or isinstance(guidance, int | float) else guidance
    g = float(guidance) if isinstance(guidance, int | float) else target.guidance
    check = target.device.type == "cpu" if check is None else check
    n = len(noise)
    for what, rows in (("prompts", cond), ("null predictions", first_null), ("predictions", first_cond)):
        if rows is not None and len(rows) != n:
            raise CannotAudit(
                f"{len(rows)} {what} for {n} noises: give one per noise (Condition.expand, or index the bank)."
            )
    if null is not None and not g > 1:
        raise CannotAudit(
            f"Guidance is off ({g:g}), so there is nothing to compare; set guidance above 1, for instance 7.5."
        )
    if rule is not None and (cond is None or null is None):
        raise CannotAudit(
            "A rule for the guidance scale needs a prompt and the null condition: there is nothing to guide."
        )
    plan = target.schedule(steps) if plan is None else plan
    return _steps(target, noise, cond, None if cond is None else null, plan, g, rule, first_null, first_cond, check)


def _steps(
    target: Target,
    noise: Latents,
    cond: Condition | None,
    null: Condition | None,
    plan: Schedule,
    g: float,
    rule: GuidanceRule | None,
    first_null: Latents | None,
    first_cond: Latents | None,
    check: bool,
) -> Iterator[Step]:
    pair = None  # made when a step needs it: detection at the first step may not
    empty = None if cond is None or null is None else cond.same_as(null)
    sizes: list[PerSample] = []
    with torch.no_grad():
        x = plan.start(noise)
        seen = plan.scale(x, plan.timesteps[0])
    for i, t in enumerate(plan.timesteps):
        # Gradients are closed before the yield, so that the caller keeps its own grad mode.
        with torch.no_grad():
            known_u, known_c = (first_null, first_cond) if i == 0 else (None, None)
            out_u: Tensor | None
            if cond is None or null is None or empty is None:
                out_u, out_c = None, target.output(seen, t, cond) if known_c is None else known_c
            elif known_u is None and known_c is None:
                pair = Condition.cat([null.expand(len(noise)), cond]) if pair is None else pair
                out_u, out_c = target.output(torch.cat([seen, seen]), t, pair).chunk(2)
            else:
                out_u = target.output(seen, t, null.expand(len(noise))) if known_u is None else known_u
                out_c = target.output(seen, t, cond) if known_c is None else known_c
            if out_u is not None and empty is not None:
                out_c = same_where(empty, out_u, out_c)
            c = target.to_space(out_c, seen, t)
            u = None if out_u is None else target.to_space(out_u, seen, t)
            if out_u is None or u is None:
                guided = out_c
            elif rule is None:
                guided = out_u + g * (out_c - out_u)
            else:
                sizes.append((c - u).flatten(1).norm(dim=1))
                scales = rule(float(t), torch.stack(sizes, dim=1), g).to(out_c.dtype)
                guided = out_u + scales[:, None, None, None] * (out_c - out_u)
            if check:
                # All three: what a schedule makes of a finite output need not be finite.
                for prediction in (guided, c, u):
                    _require_finite(prediction, target.name, i, t)
            x = plan.step(guided, t, x)
            x_next = plan.scale(x, plan.timesteps[i + 1]) if i + 1 < len(plan.timesteps) else x
        yield Step(i, float(t), seen, c, u, x_next, target.space)
        seen = x_next


def final(run: Iterable[Step]) -> Latents:
    """The sample x₀ at the end of a run of :func:`denoise`; no step before it is kept."""
    for step in run:
        last = step.x_next
    assert last is not None  # only a watched pipeline does not know it yet
    return last


def same_where(empty: Bool[Tensor, " batch"], uncond: Latents, cond: Latents) -> Latents:
    """``cond``, with the null prediction itself in the rows whose prompt *is* the null prompt.

    Both are the same function of the same input, yet rows of one batch are not computed bit for bit alike; an empty prompt
    must score exactly 0. No device sync.
    """
    return torch.where(empty[:, None, None, None], uncond, cond)


def _require_finite(prediction: Tensor | None, name: str, index: int, t: Tensor) -> None:
    if prediction is None:
        return
    bad = ~torch.isfinite(prediction).flatten(1).all(1)
    if bool(bad.any()):
        raise ModelFault(
            f"{name} predicted NaN or infinity at step {index} (t = {float(t):g}) for sample {int(bad.nonzero()[0])} of the batch; "
            f"load it in float32 or bfloat16, or check the checkpoint."
        )
