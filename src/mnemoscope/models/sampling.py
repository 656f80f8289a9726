"""The one denoising loop."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import CannotAudit, ModelFault
from ..types import Latents, Step
from .base import Condition, Target


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
    guidance: float | None = None,
    first_null: Latents | None = None,
    check: bool | None = None,
) -> Iterator[Step]:
    """Sample with classifier-free guidance and show every step.

    Args:
        target: The model.
        noise: Unit-variance starting noise, ``[batch, channel, height, width]``.
        cond: One encoded prompt per sample; None for a model without text.
        null: The encoded empty prompt, one row (expanded here). Without it no second prediction is made.
        steps: Length of the sampler's schedule.
        guidance: ε̂ = ε_∅ + g·(ε_c − ε_∅); default is the target's own.
        first_null: Raw null predictions at the first step, one per sample, from :func:`null_output`; saves batch forwards.
        check: Stop with :class:`ModelFault` at the first prediction that is not finite. This costs a device sync per step,
            so by default it is on for CPU models only; detectors name the step of a NaN after their single sync anyway.

    Yields:
        :class:`Step` for each index, in order; the caller stops when it has seen enough. Step k costs 2·batch forwards with
        a null condition (batch at the first step when ``first_null`` is given), batch without. Work for a step is done only
        when it is asked for, and ``x_next`` costs no forward.

    Raises:
        CannotAudit: guidance is 1 or less while a null prediction was asked for, or the batch sizes disagree.
    """
    g = target.guidance if guidance is None else guidance
    check = target.device.type == "cpu" if check is None else check
    n = len(noise)
    if cond is not None and len(cond) != n:
        raise CannotAudit(f"{len(cond)} prompts for {n} noises: give one encoded prompt per noise (Condition.expand).")
    if null is not None and g <= 1:
        raise CannotAudit(f"Guidance is off ({g:g}), so there is nothing to compare; set guidance above 1, for instance 7.5.")
    plan = target.schedule(steps)
    x = plan.start(noise)
    pair = None if null is None or cond is None else Condition.cat([null.expand(n), cond])
    for i, t in enumerate(plan.timesteps):
        # Gradients are closed before the yield, so that the caller keeps its own grad mode.
        with torch.no_grad():
            seen = plan.scale(x, t)
            if pair is None:
                out_c, out_u, guided = (o := target.output(seen, t, cond)), None, o
            else:
                if i == 0 and first_null is not None:
                    out_u, out_c = first_null, target.output(seen, t, cond)
                else:
                    out_u, out_c = target.output(torch.cat([seen, seen]), t, pair).chunk(2)
                guided = out_u + g * (out_c - out_u)
            c = target.to_space(out_c, x, t)
            u = None if out_u is None else target.to_space(out_u, x, t)
            if check and not bool(torch.isfinite(guided).all()):
                bad = (~torch.isfinite(guided).flatten(1).all(1)).nonzero().flatten().tolist()
                raise ModelFault(
                    f"{target.name} predicted NaN or infinity at step {i} (t = {float(t):g}) for sample {bad[0]} of the batch; "
                    f"load it in float32 or bfloat16, or check the checkpoint."
                )
            x_next = plan.step(guided, t, x)
        yield Step(i, float(t), x, c, u, x_next, target.space)
        x = x_next
