"""Less attention to what calls a picture up.

**Attenuation.** Zhao et al., ICML 2026, *GUARD* (arXiv 2603.00133), the attenuation part of it. M_i is the mean attention probability
of token i at the first step, over places, heads and the layers down to the middle of the network; with μ and σ of M over the tokens
but the start, which soaks up whatever is left,

    Z_i = (M_i - μ)/σ > τ    marks a token that draws attention as no other does.

In the down path and the middle, such a token is attenuated by α < 1 at every step. The paper multiplies its logit by α; yet a logit may
be negative, and then α raises what it should lower. ``form="odds"``, default here, adds log α to the logit instead: the odds of paying
the token any attention are multiplied by α, whatever the sign. ``form="logit"`` is the paper's.

**Masking.** Ren et al., ECCV 2024, *Unveiling and Mitigating Memorization in Text-to-Image Diffusion Models through Cross Attention*:
memorized prompts lock attention on the "summary" tokens, the end and the padding, into which the text encoder writes the whole prompt.
They are masked everywhere (a logit of -∞), and the start token's logit is multiplied by C ≥ 1. It is the same change of logits,
factor·logit + bias, with other tokens and other numbers.

Both need a denoiser whose attention can be reached (:class:`~mnemoscope.models.base.ScalesAttention`). An empty prompt keeps its
attention, and so does the prediction without the prompt.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .. import bounds
from ..bounds import FINITE, PART, SHARE, within
from ..errors import CannotAudit, UnknownName
from ..models.base import ATTENTION, Condition, ScalesAttention, Target
from .base import Generation, require
from .padding import chosen

FORMS = ("odds", "logit")
DOWN, MID, UP = 0, 1, 2
FACTOR, BIAS = 0, 1


def spikes(mass: Float[Tensor, "batch token"], threshold: float) -> Bool[Tensor, "batch token"]:
    """Z_i = (M_i - μ)/σ > τ, with μ and σ over all tokens but the first; the first is never one."""
    others = mass[:, 1:]
    z = (others - others.mean(1, keepdim=True)) / others.std(1, keepdim=True).clamp(
        min=1e-6
    )  # alike: rounding is no spike
    return torch.cat([torch.zeros_like(mass[:, :1], dtype=torch.bool), z > threshold], dim=1)


def change_of(cond: Condition) -> Float[Tensor, "batch block two token"]:
    """The change of attention that a condition carries; factor 1 and bias 0 if none."""
    if ATTENTION in cond.extra:
        return cond.extra[ATTENTION].clone()
    change = torch.zeros(len(cond), 3, 2, cond.tokens.shape[1], device=cond.tokens.device)
    change[:, :, FACTOR] = 1
    return change


def attenuated(
    change: Float[Tensor, "batch block two token"], where: Bool[Tensor, "batch token"], alpha: float, form: str
) -> Float[Tensor, "batch block two token"]:
    """Tokens attenuated by α in the down path and the middle, on top of a change that is there."""
    change = change.clone()
    for block in (DOWN, MID):
        if form == "logit":
            change[:, block] *= torch.where(where, alpha, 1.0)[:, None]
        else:
            change[:, block, BIAS] += torch.where(where, math.log(alpha), 0.0)
    return change


def masked(
    change: Float[Tensor, "batch block two token"],
    where: Bool[Tensor, "batch token"],
    start: Bool[Tensor, "batch token"],
    c: float,
) -> Float[Tensor, "batch block two token"]:
    """Tokens masked in all blocks, the start token's logit multiplied by C, on top of a change that is there."""
    change = change * torch.where(start, c, 1.0)[:, None, None]
    change[:, :, BIAS] = change[:, :, BIAS].masked_fill(where[:, None], -torch.inf)
    return change


def carried(g: Generation, change: Float[Tensor, "batch block two token"], forwards: int = 0) -> Generation:
    """The generation whose prompts carry a change of attention, and whose null prompt carries a neutral one."""
    cond, null = (
        replace(one, extra={**one.extra, ATTENTION: value})
        for one, value in ((g.cond, change), (g.null, change_of(g.null)))
    )
    return g.spend(forwards, cond=cond, null=null, first_cond=None)


def _require_attention(name: str, target: Target) -> ScalesAttention:
    if not isinstance(target, ScalesAttention):
        raise CannotAudit(
            f"{name} changes attention to the prompt, and {target.name} has none that can be reached; use a mitigation of the "
            f"embedding, the noise or the guidance (`mnemoscope ls mitigations`)."
        )
    return target


class Attenuation:
    """Attenuate the tokens that draw most attention.

    Args:
        alpha: α, what is left of such a token: of its odds, or of its logit. Above 0, at most 1.
        threshold: τ, how many standard deviations above the mean its attention is.
        form: ``"odds"``, or ``"logit"`` as in the paper.

    Costs one forward per sample, in which attention is measured. Its prediction is the first step's own where no prompt of the batch
    has such a token, and is kept then.
    """

    name = "attention"
    changes = frozenset({"attention"})
    needs = frozenset({"attention"})
    costs = "1 F per sample"
    strength, strengths = "alpha", (0.9, 0.5, 0.1, 0.01, 0.001)

    @within(alpha=PART, threshold=FINITE)
    def __init__(self, alpha: float = 0.1, threshold: float = 1.0, form: str = "odds"):
        if form not in FORMS:
            raise UnknownName("form of attenuation", form, FORMS)
        self.alpha, self.threshold, self.form = float(alpha), float(threshold), form

    def prepare(self, target: Target, generation: Generation) -> Generation:
        """The same generation with less attention to some tokens."""
        attending = _require_attention(self.name, target)
        g = generation
        before = target.forwards
        plan = target.schedule(g.steps)
        t = plan.timesteps[0]
        with torch.no_grad(), attending.token_attention() as seen:
            output = target.output(plan.scale(plan.start(g.noise), t), t, g.cond)
        where = spikes(seen.mass(), self.threshold) & ~g.cond.same_as(g.null)[:, None]
        where = where.to(g.cond.tokens.device)
        out = carried(g, attenuated(change_of(g.cond), where, self.alpha, self.form), target.forwards - before)
        return out if bool(where.any()) else replace(out, first_cond=output)


class Masking:
    """Mask the end and the padding, and pay more attention to the start.

    Args:
        share: Share of the padding that is masked, 0 to 1, and the end with it; see :class:`~mnemoscope.mitigate.padding.Padding`.
        c: C, the factor of the start token's logit; the paper's are 1.1 to 1.25.
    """

    name = "attention-mask"
    changes = frozenset({"attention"})
    needs = frozenset({"attention", "prompts"})
    costs = "nothing"
    strength, strengths = "share", (0.2, 0.4, 0.6, 0.8, 1.0)

    @within(share=SHARE, c=bounds.FACTOR)
    def __init__(self, share: float = 1.0, c: float = 1.25):
        self.share, self.c = float(share), float(c)

    def prepare(self, target: Target, generation: Generation) -> Generation:
        """The same generation with masked tokens."""
        require(self, generation)
        _require_attention(self.name, target)
        g = generation
        kinds = [[piece.kind for piece in target.pieces(prompt)] for prompt in g.prompts or ()]
        text = ~g.cond.same_as(g.null).cpu()[:, None]
        start, end, padding = (
            torch.tensor([[k == kind for k in row] for row in kinds]) & text for kind in ("start", "end", "padding")
        )
        where = chosen(padding, self.share, g.keys, self.name) | (end & (self.share > 0))
        device = g.cond.tokens.device
        return carried(g, masked(change_of(g.cond), where.to(device), start.to(device), self.c))
