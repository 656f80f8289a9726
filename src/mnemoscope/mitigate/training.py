"""Less memorization from the training loop itself: Wen et al., ICLR 2024, *Detecting, Explaining, and Mitigating Memorization in
Diffusion Models*, the mitigation while training.

A training step draws a time t and a noise for each sample, and predicts at x_t with the sample's caption. One more prediction, with
the empty prompt and without a gradient, gives the sample's magnitude

    m = ‖ε_θ(x_t, e_p) − ε_θ(x_t, e_∅)‖₂,    and the sample is kept iff m < τ.

The decision is made afresh at each visit, with the weights of that moment. It costs one more forward per sample (+1 F on about 3 F).

    loss = Σᵢ wᵢ ℓᵢ / max(K, 1),    w = 1 for a kept sample and 0 for another, K = how many are kept

Where this differs from the official code: the batch is weighed by a mask and never indexed, so that shapes stay as they are
(``torch.compile``, CUDA graphs) and a process that keeps nothing runs the same collectives as the others, with loss 0 and gradients 0;
K counts over all processes, so that a batch split over two is the same batch; the empty prompt is encoded once, by whoever
calls; and a model that predicts v is compared in ε. ``over="batch"`` divides by the batch size instead of K: a sample
then counts as much in a batch of which half is dropped as in any other.

One τ for all t drops clean samples where m is large for everything: see :class:`~mnemoscope.mitigate.timesteps.TimestepThresholds`.
What is known about an image from all of its visits: see :class:`~mnemoscope.mitigate.visits.RunningScores`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..detect.magnitude import magnitude
from ..errors import UnknownName, UsageError
from ..models.base import Condition, Target
from ..types import Latents, PerSample, Space, precise
from .timesteps import TimestepThresholds
from .visits import RunningScores, processes

__all__ = ["Below", "Filtered", "MemorizationFilter", "Rule", "per_sample"]

Output: TypeAlias = Callable[[Any, Any, Any], Any]
"""The denoiser's raw answer to (x_t, t, condition)."""

Convert: TypeAlias = Callable[[Any, Any, Any], Any]
"""(raw output, x_t, t) → the prediction in the space that magnitudes are compared in."""

OVER = ("kept", "batch")


@runtime_checkable
class Rule(Protocol):
    """Which samples are kept."""

    def keeps(self, sizes: PerSample, t: Tensor) -> Bool[Tensor, " batch"]:
        """Whether a sample of this magnitude at this time is kept. Stays on the device of ``sizes``."""
        ...


@dataclass(frozen=True)
class Below:
    """m < τ, the same τ at all times: the published rule, whose README runs it at τ = 2 on Stable Diffusion 1.4."""

    threshold: float

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise UsageError(
                f"threshold={self.threshold!r} keeps nothing: a magnitude is 0 or more; use 2.0, for instance."
            )

    def keeps(self, sizes: PerSample, t: Tensor) -> Bool[Tensor, " batch"]:
        """See :class:`Rule`."""
        return sizes < self.threshold


def per_sample(prediction: Latents, target: Latents) -> PerSample:
    """Mean squared error of each sample, in float32 or better."""
    return (precise(prediction) - precise(target)).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Filtered:
    """What the filter says about one batch. All of it is on the device.

    Attributes:
        weights: 1 for a kept sample, 0 for a dropped one, something between where :class:`RunningScores` weighs down.
        sizes: m of each sample, in the filter's space; exactly 0 where the caption is the empty prompt.
        kept: How many samples have a weight above 0, over all processes. 0-dim.
        total: What a weighted sum of this process's losses is divided by. 0-dim.
    """

    weights: PerSample
    sizes: PerSample
    kept: Float[Tensor, ""]
    total: Float[Tensor, ""]

    def mean(self, losses: Float[Tensor, "batch ..."]) -> Float[Tensor, ""]:
        """The batch's loss from losses per sample, or per element; connected to the graph even where nothing is kept.

        A loss that is not finite stays so even in a dropped sample: a model that has diverged must not look calm.
        """
        each = precise(losses).flatten(1).mean(1) if losses.ndim > 1 else precise(losses)
        return (self.weights * each).sum() / self.total


class MemorizationFilter:
    """Weights of the samples of a training step, from the prediction that the step makes anyway and one without the caption.

    Args:
        output: The denoiser, called as ``output(x, t, null)`` under ``no_grad``.
        null: The encoded empty prompt, one row: a :class:`Condition`, or the embedding ``[1, token, dim]`` alone.
        threshold: τ, or a rule: :class:`~mnemoscope.mitigate.timesteps.TimestepThresholds` has a τ for each range of t.
        over: ``"kept"``: the mean over the kept samples of all processes. ``"batch"``: the sum over the kept samples, by the batch size.
        to_space: Turns raw outputs into the space that magnitudes are compared in; default: they are in it.
        space: Which space that is. Thresholds and scores of another one are refused.
        scores: Remembers each image over all of its visits, and may weigh it down.

    Layers that draw at random or keep statistics (dropout, batch norm) see the second pass too; the usual denoisers have none.
    """

    def __init__(
        self,
        output: Output,
        null: Condition | Tensor,
        threshold: float | int | Rule,
        *,
        over: str = "kept",
        to_space: Convert | None = None,
        space: Space = "eps",
        scores: RunningScores | None = None,
    ):
        if over not in OVER:
            raise UnknownName("denominator", over, OVER)
        self.null = null if isinstance(null, Condition) else Condition(null.detach())
        if len(self.null) != 1:
            raise UsageError(
                f"the null condition has {len(self.null)} rows: give the encoded empty prompt, one row for all."
            )
        self.rule: Rule = Below(float(threshold)) if isinstance(threshold, int | float) else threshold
        for fitted in (self.rule, None if scores is None else scores.clean):
            if isinstance(fitted, TimestepThresholds) and fitted.record.space != space:
                raise UsageError(
                    f"these thresholds were fitted in {fitted.record.space} space, and this filter compares in {space}: "
                    f"fit them with this filter's magnitudes, and say space={space!r}."
                )
        self.output, self.over, self.scores = output, over, scores
        self.to_space: Convert = to_space or (lambda output, x, t: precise(output))

    @classmethod
    def on(cls, target: Target, threshold: float | int | Rule, **options: Any) -> MemorizationFilter:
        """For a :class:`~mnemoscope.models.base.Target`, in the target's space."""
        return cls(
            target.output, target.encode([""]), threshold, to_space=target.to_space, space=target.space, **options
        )

    @classmethod
    def of_unet(
        cls, unet: nn.Module, scheduler: Any, null: Condition | Tensor, threshold: float | int | Rule, **options: Any
    ) -> MemorizationFilter:
        """For a diffusers UNet and the scheduler it is trained with, in ε-space whatever it predicts.

        Args:
            unet: As the loop calls it: plain, compiled, with LoRA, or wrapped in DistributedDataParallel.
            scheduler: Has ``alphas_cumprod`` and ``config["prediction_type"]``.
            null: The encoded empty prompt; a :class:`Condition` with ``extra`` where the UNet has added conditions (SDXL).
            threshold: See the class.
            **options: See the class.
        """
        # Here, because diffusers takes seconds to load, and a loop without it needs none.
        from ..models.host import Diffusion

        if isinstance(unet, nn.parallel.DistributedDataParallel):
            unet = unet.module  # a pass without a gradient has nothing to synchronize

        def output(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            added = {"added_cond_kwargs": cond.extra} if cond.extra else {}
            return unet(x, t, encoder_hidden_states=cond.tokens, return_dict=False, **added)[0]

        return cls(output, null, threshold, to_space=Diffusion(scheduler, type(unet).__name__).to_eps, **options)

    def __call__(
        self,
        x: Latents,
        t: Tensor,
        output: Tensor,
        *,
        cond: Condition | Tensor | None = None,
        ids: Int[Tensor, " batch"] | None = None,
    ) -> Filtered:
        """Weigh one batch. Nothing is waited for: all answers stay on the device.

        Args:
            x: x_t, what the denoiser was shown.
            t: One time per sample, or one for all.
            output: The denoiser's raw prediction with the captions, as the step made it.
            cond: The encoded captions. With them, samples whose caption was dropped (the empty prompt) are known: their magnitude is 0,
                and says nothing about the image. Added conditions of the null pass are theirs, except those that ``null`` has.
            ids: Each sample's number in the training set, for ``scores``.

        Costs batch F. In a distributed run every process must call it at every step, as it does ``backward``.
        """
        if not output.shape == x.shape:
            raise UsageError(
                f"the prediction is {tuple(output.shape)} and x_t {tuple(x.shape)}: give the raw output for x_t."
            )
        t = t.expand(len(x))
        captions = Condition(cond.detach()) if isinstance(cond, Tensor) else cond
        with torch.no_grad():
            null = self._null_for(x, captions)
            without = self.output(x, t, null)
            sizes = magnitude(self.to_space(output.detach(), x, t), self.to_space(without, x, t))
            told = torch.ones_like(sizes, dtype=torch.bool) if captions is None else ~self._blank(captions)
            sizes = torch.where(told, sizes, torch.zeros_like(sizes))
            weights = self.rule.keeps(sizes, t).to(sizes.dtype)
            if self.scores is not None:
                weights = weights * self._remembered(self.scores, ids, sizes, t, told)
            return self._filtered(weights, sizes)

    def loss(
        self,
        noise_pred: Latents,
        target: Latents,
        noisy_latents: Latents,
        timesteps: Tensor,
        encoder_hidden_states: Condition | Tensor | None = None,
        ids: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, ""]:
        """The filtered mean squared error, for loops laid out as diffusers' text-to-image example.

        It stands where ``F.mse_loss(noise_pred.float(), target.float())`` stood; arguments have the example's names.
        """
        found = self(noisy_latents, timesteps, noise_pred, cond=encoder_hidden_states, ids=ids)
        return found.mean(per_sample(noise_pred, target))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs: the running scores. ``accelerator.register_for_checkpointing(filter)`` calls it."""
        return {} if self.scores is None else {"scores": self.scores.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state.

        Raises:
            UsageError: it is the state of another filter.
        """
        if set(state) != set(self.state_dict()):
            raise UsageError(
                f"a filter {'without' if self.scores is None else 'with'} running scores was given a state "
                f"{'with' if 'scores' in state else 'without'} them; build it as it was, or start without the state."
            )
        if self.scores is not None:
            self.scores.load_state_dict(state["scores"])

    def _null_for(self, x: Latents, captions: Condition | None) -> Condition:
        """The null condition for a batch, where and as precise as it is; kept on the device."""
        if self.null.tokens.device != x.device:
            extra = {k: v.to(x.device) for k, v in self.null.extra.items()}
            self.null = replace(self.null, tokens=self.null.tokens.to(x.device), extra=extra)
        # Views: Condition.expand would build an index on the CPU, and a GPU would be waited for at every step.
        own = {k: v.expand(len(x), *v.shape[1:]) for k, v in self.null.extra.items()}
        tokens = self.null.tokens.expand(len(x), -1, -1)
        if captions is None:
            return replace(self.null, tokens=tokens, extra=own)
        return replace(self.null, tokens=tokens.to(captions.tokens.dtype), extra={**captions.extra, **own})

    def _blank(self, captions: Condition) -> Bool[Tensor, " batch"]:
        """Rows that are the empty prompt."""
        if captions.tokens.shape[1:] != self.null.tokens.shape[1:]:
            return torch.zeros(len(captions), dtype=torch.bool, device=captions.tokens.device)
        return (captions.tokens == self.null.tokens.to(captions.tokens.dtype)).flatten(1).all(1)

    def _remembered(
        self,
        scores: RunningScores,
        ids: Int[Tensor, " batch"] | None,
        sizes: PerSample,
        t: Tensor,
        told: Bool[Tensor, " batch"],
    ) -> PerSample:
        if ids is None:
            raise UsageError("running scores are kept per image: give ids=, each sample's number in the training set.")
        scores.update(ids, sizes, t, told)
        return scores.weights(ids).to(sizes.device)

    def _filtered(self, weights: PerSample, sizes: PerSample) -> Filtered:
        kept = (weights > 0).sum().to(weights.dtype)
        n = processes()
        if n > 1:
            torch.distributed.all_reduce(kept)  # by every process at every step, whatever it keeps
        # Gradients are averaged over processes: Σ over all of wℓ/(K/n), averaged, is the mean over the K.
        total = torch.full_like(kept, float(len(weights))) if self.over == "batch" else kept.clamp(min=1) / n
        return Filtered(weights, sizes, kept, total)
