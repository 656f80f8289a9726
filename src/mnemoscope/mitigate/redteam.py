"""Does the mitigation hold? Embeddings found by an attack (Hintersdorf et al. 2025, *Finding Dori: Memorization in Text-to-Image Models
Is Less Local Than Assumed*).

A mitigation that blocks a prompt need not block the memory: with the weights in hand, one can look for another embedding that leads
to the same picture. The attack minimizes the denoising loss of the training image x₀,

    E_{t, ε} ‖ε_θ(α_t x₀ + σ_t ε, e) − ε‖²,

over the embedding e by Adam (50 steps at learning rate 0.1, a fresh timestep and a fresh noise at each step), starting from the
prompt's own. Then it samples from e as anybody would, mitigation included. Pictures that were never trained on are attacked alike: what
comes back of *them* was put in by the attack, and shows how far its embeddings can be trusted.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import CannotAudit, UsageError
from ..models.base import Condition, Target, Trained
from ..models.noising import denoising_loss
from ..types import Latents, precise
from .base import generator

STEPS, LEARNING_RATE = 50, 0.1
"""Of the paper's attack."""


def attack(
    target: Target,
    x0: Latents,
    start: Condition,
    keys: tuple[int, ...],
    *,
    steps: int = STEPS,
    lr: float = LEARNING_RATE,
) -> tuple[Condition, Float[Tensor, "step batch"]]:
    """An embedding for each picture that makes the model draw it, if any near ``start`` does.

    Args:
        target: The model; its weights take no part.
        x0: Clean latents of the pictures (``target.encode_images``), ``[batch, channel, height, width]``.
        start: One encoded prompt for each picture: where the attack starts.
        keys: One number for each picture, from which its timesteps and noises are drawn, whatever the batch.
        steps: Updates.
        lr: Adam's learning rate.

    Returns:
        The embeddings found, and the loss at each step. Costs steps·batch·(F + B). The start token is attacked along.
    """
    if not len(x0) == len(start) == len(keys):
        raise UsageError(
            f"{len(x0)} pictures, {len(start)} prompts and {len(keys)} keys: give one of each per picture."
        )
    if not isinstance(target, Trained):
        raise CannotAudit(f"{target.name} does not say at which times it was trained; give its adapter training_times.")
    x0 = precise(x0).to(target.device)
    draws = [generator(key, "embedding attack") for key in keys]
    leaf = precise(start.tokens).detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=lr)
    losses = []
    for _ in range(steps):
        u = torch.stack([torch.rand((), generator=g) for g in draws])
        eps = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in draws]).to(x0)
        t = target.training_times(u)
        with torch.enable_grad():
            loss = denoising_loss(target, x0, t.to(x0.device), eps, replace(start, tokens=leaf))
            (leaf.grad,) = torch.autograd.grad(loss.sum(), leaf)
        optimizer.step()
        losses.append(loss.detach())
    return replace(start, tokens=leaf.detach().to(start.tokens.dtype)), torch.stack(losses)
