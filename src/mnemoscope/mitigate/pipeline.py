"""A prepared generation in a user's own diffusers pipeline: what goes in as arguments, and what has to be steered while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..detect.magnitude import magnitude
from ..errors import CannotAudit
from ..models.attention import scaled_attention
from ..models.base import ATTENTION, Target
from ..models.sampling import GuidanceRule
from ..models.steer import Call, Order, steer
from ..types import Latents, PerSample
from .attention import change_of
from .base import Generation

__all__ = ["GuidanceDriver", "Guided", "prepared"]


class Guided:
    """A guidance scale of one's own, constant or by a rule, in a pipeline that goes on using its scale g; one for each generation.

    With ε_c′ = ε_∅ + (g′/g)·(ε_c − ε_∅) in place of ε_c, the pipeline arrives at ε_∅ + g′·(ε_c − ε_∅) by itself.
    """

    def __init__(self, target: Target, rule: GuidanceRule | float):
        self.target, self.rule = target, rule
        self._sizes: list[PerSample] = []

    def __call__(
        self, x: Latents, t: Tensor, time: float, scale: float, uncond: Latents, cond: Latents
    ) -> Latents:  # fmt: skip
        """The prediction to put in place of ``cond``.

        Args:
            x: What the denoiser was shown.
            t: The model's time, where the pipeline has it.
            time: The same as a number, for a rule.
            scale: The pipeline's g.
            uncond: Raw null predictions.
            cond: Raw predictions with the prompt.
        """
        if isinstance(self.rule, int | float):
            return uncond + self.rule / scale * (cond - uncond)
        self._sizes.append(magnitude(self.target.to_space(cond, x, t), self.target.to_space(uncond, x, t)))
        share = self.rule(time, torch.stack(self._sizes, dim=1), scale) / scale
        return uncond + share.to(cond.dtype)[:, None, None, None] * (cond - uncond)


class GuidanceDriver:
    """A rule for the guidance scale as a :class:`~mnemoscope.models.steer.Driver`, around the pipeline's own scale g."""

    def __init__(self, target: Target, rule: GuidanceRule, scale: float):
        self.target, self.rule, self.scale = target, rule, scale
        self.begin(None)

    def begin(self, order: Order | None) -> None:
        """Another generation: nothing has been seen of it."""
        self.guided = Guided(self.target, self.rule)
        self.times: list[float] = []

    def tokens(self, call: Call) -> Tensor | None:
        """Embeddings stay as they are."""
        return None

    def outputs(self, call: Call, uncond: Latents, cond: Latents) -> Latents:
        """The prediction whose guided mixture at the pipeline's scale is the one that the rule wants."""
        if call.index == 0:
            self.times = call.times.tolist()  # all of them at once: reading a time may wait for the device
        return self.guided(call.x, call.t, float(self.times[call.index]), self.scale, uncond, cond)


@contextmanager
def prepared(pipe: Any, target: Target, generation: Generation) -> Iterator[dict[str, Any]]:
    """Arguments for the pipeline, and inside the block whatever cannot be said by arguments.

        g = PromptOptimization().prepare(target, Generation.of(target, ["three white dots"], [0]))
        with prepared(pipe, target, g) as arguments:
            images = pipe(**arguments).images

    Args:
        pipe: A diffusers text-to-image pipeline that takes ``prompt_embeds`` and ``latents``.
        target: The target made from it (``load(pipe)``).
        generation: What a mitigation made.

    Yields:
        ``prompt_embeds``, ``negative_prompt_embeds``, ``latents``, ``num_inference_steps`` and ``guidance_scale``; add what else the
        pipeline takes.

    Raises:
        CannotAudit: the generation holds something that neither arguments nor hooks can say.
    """
    g = generation
    if other := g.cond.extra.keys() - {ATTENTION}:
        raise CannotAudit(
            f"this generation also hands {', '.join(sorted(other))} to the denoiser, which a pipeline's arguments cannot say; sample it "
            f"with mnemoscope's own loop (mitigate.base.sample)."
        )
    scale = float(g.guidance) if isinstance(g.guidance, int | float) else target.guidance
    rule = None if g.guidance is None or isinstance(g.guidance, int | float) else g.guidance
    arguments = {
        "prompt_embeds": g.cond.tokens,
        "negative_prompt_embeds": g.null.tokens.expand(len(g), -1, -1),
        "latents": g.noise.to(target.device, target.dtype),
        "num_inference_steps": g.steps,
        "guidance_scale": scale,
    }
    with ExitStack() as stack:
        if rule is not None:
            scale = getattr(rule, "scale", None) or scale
            arguments["guidance_scale"] = scale
            stack.enter_context(steer(pipe, GuidanceDriver(target, rule, scale)))
        if ATTENTION in g.cond.extra:
            change = torch.cat([change_of(g.null).expand(len(g), -1, -1, -1), change_of(g.cond)])
            stack.enter_context(scaled_attention(pipe.unet, change))
        yield arguments
