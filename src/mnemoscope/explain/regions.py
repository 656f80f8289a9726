"""Where in the picture a prompt pulls: maps in latent pixels.

    score        Δs = Σ_channels (ε(x_t, e_p) − ε(x_t, e_∅))², the squared magnitude pixel by pixel (the "score difference" of
                 Kim & Lee, ICML 2026, up to the constant 1/σ²; in velocity space, of u)
    curvature    Δh = Σ_channels diag(−∇² log p(x_t | prompt)) − diag(−∇² log p(x_t)), by Hutchinson's estimate of a diagonal
                 with K Rademacher probes (same source); positive where the prompt leaves less freedom
    attention    cross-attention to the end token ("bright ending", Chen et al., ICLR 2025)

The score and its map share one sum: Σ_pixels Δs = ‖Δ‖², so the map says where the magnitude comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from ..bounds import COUNT, GUIDANCE, SEED, STEPS, seed_numbers, within
from ..errors import CannotAudit, ModelFault, UnknownName, UsageError
from ..models.base import AttendsToEnd, Condition, Target, mix, noise_from_seeds
from ..models.sampling import denoise
from ..types import Latents, Step, precise

KINDS = ("curvature", "score", "attention")
DEFAULT = "curvature"
"""What finds the parts of templates that every picture repeats; docs/explanations.md has the measurement."""
PROBES = 4
PROBE_BASE = 0x9E3779B9
"""Base of the probes' seeds, so that they have nothing to do with the starting noise of the same seed."""

Maps = Float[Tensor, "batch height width"]


def score_difference(cond: Latents, uncond: Latents) -> Maps:
    """Δs = Σ_channels (ε(x_t, e_p) − ε(x_t, e_∅))²; its sum over pixels is the squared magnitude."""
    return (precise(cond) - precise(uncond)).square().sum(1)


def jacobian_diagonal(
    target: Target, x: Latents, t: Tensor, cond: Condition, probes: Float[Tensor, "probe batch channel height width"]
) -> Latents:
    """Hutchinson's estimate of diag(∂ prediction/∂x): mean over probes of v ⊙ Jᵀv. Costs batch·(F + K·B)."""
    leaf = precise(x).detach().clone().requires_grad_()
    with torch.enable_grad():
        out = target.predict(leaf, t, cond)
        total = torch.zeros_like(leaf)
        for k, v in enumerate(probes):
            (pulled,) = torch.autograd.grad(out, leaf, v.to(out), retain_graph=k + 1 < len(probes))
            total += v.to(out) * pulled
    return total.detach() / len(probes)


def curvature_difference(
    target: Target, x: Latents, t: Tensor, cond: Condition, null: Condition, probes: Tensor
) -> Maps:
    """Δh of each latent pixel, with the same probes for both predictions. Costs 2·batch·(F + K·B).

    ∇ log p = −ε/σ, so diag(−∇² log p) = diag(∂ε/∂x)/σ; with x = α x₀ + σ ε and α + σ = 1, ε = x + α u.
    """
    alpha, sigma = target.alpha_sigma(t)
    both = [jacobian_diagonal(target, x, t, c, probes) for c in (cond, null.expand(len(x)))]
    gain = 1 / sigma if target.space == "eps" else alpha / sigma
    return ((both[0] - both[1]) * gain.to(x.device)).sum(1)


@dataclass(frozen=True, eq=False)
class Regions:
    """Maps of one prompt, one per seed, and the pictures they belong to.

    Attributes:
        prompt: The prompt.
        kind: ``score``, ``curvature`` or ``attention``.
        maps: ``[seed, height, width]`` in latent pixels (of attention, in the pixels of its layers), on the CPU.
        images: ``[seed, 3, rows, columns]`` in [0, 1], on the CPU.
        seeds: The seeds.
        at: Indices of the sampler's steps that were averaged.
        forwards: Denoiser forwards of one latent (F), the trajectory included.
        backwards: Backward passes to the latents (B).
    """

    prompt: str
    kind: str
    maps: Float[Tensor, "seed height width"]
    images: Float[Tensor, "seed 3 rows columns"]
    seeds: tuple[int, ...]
    at: tuple[int, ...]
    forwards: int
    backwards: int

    def upsampled(self) -> Float[Tensor, "seed rows columns"]:
        """The maps at the size of the pictures, bilinear."""
        return upsampled(self.maps, self.images.shape[2:])

    def __repr__(self) -> str:
        return f"Regions({self.prompt[:40]!r}: {self.kind}, {len(self.seeds)} seeds, steps {list(self.at)})"

    def _repr_html_(self) -> str:
        from .overlay import overlay

        return overlay(self).html()


@within(steps=STEPS, guidance=GUIDANCE, probes=COUNT, base_seed=SEED)
def regions(
    target: Target,
    prompt: str,
    kind: str = DEFAULT,
    *,
    seeds: int | Sequence[int] = 1,
    at: int | Sequence[int] | None = None,
    steps: int = 50,
    guidance: float | None = None,
    probes: int = PROBES,
    base_seed: int = 0,
) -> Regions:
    """Where the prompt pulls, on the ordinary guided trajectory.

    Args:
        target: The model.
        prompt: The prompt.
        kind: ``curvature`` needs gradients; ``score`` nothing but the trajectory; ``attention`` cross-attention to text.
        seeds: Number of generations (seeds 0 … n − 1), or the seeds themselves.
        at: Index of the sampler's step, or several to average over; None: the last one.
        steps: Length of the sampler's schedule.
        guidance: Guidance scale; default is the target's own.
        probes: K of the curvature.
        base_seed: Another base gives other noises and probes.

    Returns:
        :class:`Regions`. Costs 2·n·steps F, and for each step that is averaged 2·n·(F + K·B) for curvature, n F for attention.

    Raises:
        CannotAudit: the model takes no text, or its attention cannot be watched.
        UsageError: no seed, or a step that the schedule does not have.
        ModelFault: the model predicted NaN.
    """
    chosen = seed_numbers(seeds)
    looked = (steps - 1,) if at is None else (at,) if isinstance(at, int) else tuple(sorted(set(at)))
    _refuse(target, kind, chosen, looked, steps, probes)
    before = target.forwards
    noise = target.noise(chosen, base_seed)
    cond, null = target.encode([prompt]).expand(len(chosen)), target.encode([""])
    plan = target.schedule(steps)
    signs = probes_of(target, chosen, probes, base_seed)

    def look(step: Step) -> Maps:
        if kind == "score":
            assert step.uncond is not None
            return score_difference(step.cond, step.uncond)
        t = plan.timesteps[step.index]
        if kind == "curvature":
            return curvature_difference(target, step.x, t, cond, null, signs)
        return end_attention(target, step.x, t, cond, prompt)

    seen, last = [], None
    for step in denoise(target, noise, cond, null, steps=steps, guidance=guidance, check=True):
        if step.index in looked:
            seen.append(look(step))
        last = step.x_next
    assert last is not None
    maps = torch.stack(seen).mean(0).float().cpu()
    if not bool(torch.isfinite(maps).all()):
        raise ModelFault(f"the {kind} of {target.name} came out as NaN or infinity; load the model in float32.")
    backwards = 2 * len(chosen) * probes * len(looked) if kind == "curvature" else 0
    spent = target.forwards - before
    return Regions(prompt, kind, maps, target.decode(last), chosen, looked, spent, backwards)


def probes_of(
    target: Target, seeds: Sequence[int], k: int, base_seed: int = 0
) -> Float[Tensor, "probe seed channel height width"]:
    """K Rademacher probes for each seed, which depend on (base seed, seed) alone; the first of many is the same as one."""
    rows = noise_from_seeds(seeds, mix(PROBE_BASE, base_seed), (k, *target.latent_shape))
    return rows.sign().transpose(0, 1).to(target.device)


def end_attention(target: Target, x: Latents, t: Tensor, cond: Condition, prompt: str) -> Maps:
    """Cross-attention to the prompt's end token, in the resolution of the finest layers of the down path. Costs batch F.

    Raises:
        CannotAudit: the target's attention cannot be watched.
    """
    if not isinstance(target, AttendsToEnd):
        raise CannotAudit(f"{target.name} has no cross-attention to the end of a prompt; use kind='score'.")
    kinds = [p.kind for p in target.pieces(prompt)]
    # A prompt that fills the whole window is cut in the middle, and its end stands last all the same.
    end = kinds.index("end") if "end" in kinds else len(kinds) - 1
    with torch.no_grad(), target.end_token_attention([end] * len(x)) as watched:
        target.output(x, t, cond)
    return watched.maps()


def upsampled(maps: Maps, size: Sequence[int]) -> Float[Tensor, "batch rows columns"]:
    """Maps at the size of their pictures (height, width), bilinear, float32 on the CPU."""
    large = interpolate(maps.float()[:, None], size=tuple(size), mode="bilinear", align_corners=False)
    return large[:, 0].cpu()


def _refuse(target: Target, kind: str, seeds: Sequence[int], at: Sequence[int], steps: int, probes: int) -> None:
    """What can be known before any work is done."""
    if kind not in KINDS:
        raise UnknownName("kind of region map", kind, KINDS)
    if not target.has_text:
        raise CannotAudit(f"{target.name} takes no text, so no prompt pulls at its pictures.")
    if kind == "attention" and not isinstance(target, AttendsToEnd):
        raise CannotAudit(f"{target.name} has no cross-attention to the end of a prompt; use kind='score'.")
    if not seeds or probes < 1:
        raise UsageError("a map needs at least one seed, and a curvature one probe; give seeds=1, probes=4.")
    if not at or at[0] < 0 or at[-1] >= steps:
        raise UsageError(f"at={list(at)}: the sampler's steps are 0 to {steps - 1}; the last is {steps - 1}.")
