"""Optimize the prompt's embedding: Wen et al., ICLR 2024, *Detecting, Explaining, and Mitigating Memorization in Diffusion Models*.

At the first step, on the starting noise x_T that will be used, minimize over the embedding

    L(e) = ‖ε_θ(x_T, e) − ε_θ(x_T, e_∅)‖₂,    from e = e_p,    until L ≤ target

by AdamW, then sample from e as usual. A prompt that is below the target already stays as it is.

Where the official code differs from the definition, this follows the definition and ``official`` follows the code: there the n
images of a prompt share one embedding, L is the norm over all of them together (so that its target of 3 with four images is 1.5
per image), and weight decay moves the start token, whose gradient is set to 0. Here each image has an embedding of its own and
the start token stays. In both, arithmetic is float32, and the null prediction is made once, without gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..bounds import COUNT, POSITIVE, within
from ..detect.magnitude import gradient, per_dimension
from ..models.base import Target
from ..models.sampling import null_output
from ..types import Latents, PerSample, precise
from .base import Generation

LEARNING_RATE, UPDATES = 0.05, 10
"""Of the official script."""


class PromptOptimization:
    """Walk down the magnitude at the first step.

    Args:
        target: Where to stop, for each image, at the scale of a 4×64×64 latent (:func:`~mnemoscope.detect.magnitude.per_dimension`), in
            the model's space. None: all updates.
        updates: At most that many.
        lr: AdamW's learning rate.
        official: One embedding for all images of a prompt and the norm over all of them, as in the official code. ``target`` is then
            what its authors give: a joint norm at the model's own scale.

    k updates cost k·n(F + B) for n images: the last forward is the first sampling step's own, and so is the null prediction.
    """

    name = "prompt"
    changes = frozenset({"embedding"})
    needs = frozenset({"grad"})
    costs = f"up to {UPDATES} (F + B) per sample"
    strength, strengths = "target", (2.5, 2.0, 1.5, 1.0, 0.5)

    @within(target=POSITIVE, updates=COUNT, lr=POSITIVE)
    def __init__(
        self,
        target: float | None = 1.5,
        *,
        updates: int = UPDATES,
        lr: float = LEARNING_RATE,
        official: bool = False,
    ):
        self.target, self.updates, self.lr, self.official = target, updates, lr, official

    def prepare(self, target: Target, generation: Generation) -> Generation:
        """The same generation with optimized embeddings, and both predictions of its first step."""
        g = generation
        plan = target.schedule(g.steps)
        t, before = plan.timesteps[0], target.forwards
        with torch.no_grad():
            x = plan.scale(plan.start(g.noise), t)
            null = null_output(target, g.noise, g.null, steps=g.steps) if g.first_null is None else g.first_null
            uncond = target.to_space(null, x, t)
        tokens, output, backwards = self._walk(target, x, t, g, uncond)
        out = g.with_tokens(tokens, forwards=target.forwards - before, backwards=backwards)
        return replace(out, first_null=null, first_cond=output)

    def _walk(
        self, target: Target, x: Latents, t: Tensor, g: Generation, uncond: Latents
    ) -> tuple[Tensor, Latents, int]:
        """Optimized embeddings, what they predict at the first step, and how many backwards that took."""
        shared = self._shared(g).to(x.device)
        members = [(shared == i).nonzero()[:, 0] for i in range(int(shared.max()) + 1)]
        tokens, fixed = precise(g.cond.tokens).clone(), _start_tokens(target)
        # One leaf for each embedding: AdamW passes over leaves without a gradient, moments and weight decay included.
        leaves = [tokens[rows[0]].clone()[0 if self.official else fixed :] for rows in members]
        optimizer = torch.optim.AdamW(leaves, lr=self.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
        output, backwards, active = torch.empty_like(x, dtype=target.dtype), 0, list(range(len(members)))

        for update in range(self.updates + 1):
            rows = torch.cat([members[i] for i in active])
            belongs = torch.repeat_interleave(torch.tensor([len(members[i]) for i in active]))
            cond = replace(g.cond.select(rows), tokens=tokens[rows])
            if update == self.updates:
                with torch.no_grad():
                    output[rows] = target.output(x[rows], t, cond)
                break
            over = partial(self._reached, belongs=belongs, shape=target.latent_shape)

            def all_over(size: PerSample, over: Callable[[PerSample], Tensor] = over) -> bool:
                return bool(over(size).all())

            size, slope, output[rows] = gradient(target, x[rows], t, cond, uncond[rows], enough=all_over)
            done = over(size).tolist()
            if all(done):
                break
            backwards += len(rows)
            # ∂‖(L_1 … L_n)‖/∂e = Σ (L_j / ‖L‖)·∂L_j/∂e, and with one image for each embedding the slope itself.
            together = joint(size, belongs)[belongs].clamp(min=torch.finfo(size.dtype).tiny)
            pulled = slope.new_zeros(len(active), *slope.shape[1:]).index_add(
                0, belongs.to(x.device), (size / together)[:, None, None] * slope
            )
            pulled[:, :fixed] = 0
            for i, pull, stay in zip(active, pulled, done, strict=True):
                leaves[i].grad = None if stay else pull[-len(leaves[i]) :]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            active = [i for i, stay in zip(active, done, strict=True) if not stay]
            for i in active:
                tokens[members[i], -len(leaves[i]) :] = leaves[i]
        return tokens, output, backwards

    def _shared(self, g: Generation) -> Int[Tensor, " batch"]:
        """Which samples share an embedding, counted from 0."""
        if not self.official:
            return torch.arange(len(g))
        texts = g.prompts or [row.cpu().numpy().tobytes() for row in g.cond.tokens.float()]
        order = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        return torch.tensor([order[text] for text in texts])

    def _reached(self, size: PerSample, *, belongs: Tensor, shape: tuple[int, ...]) -> Bool[Tensor, " embedding"]:
        """Which embeddings need no further update."""
        found = joint(size, belongs)
        if self.target is None:
            return torch.zeros_like(found, dtype=torch.bool)
        return (found if self.official else per_dimension(found, shape)) <= self.target


def joint(size: PerSample, belongs: Int[Tensor, " batch"]) -> Float[Tensor, " embedding"]:
    """√Σ L_j² over the samples that share an embedding (``belongs`` counts them from 0, on the CPU); with one sample each, L."""
    return size.new_zeros(int(belongs[-1]) + 1).index_add(0, belongs.to(size.device), size.square()).sqrt()


def _start_tokens(target: Target) -> int:
    """How many positions every prompt begins with alike."""
    pieces = target.pieces("")
    return 1 if pieces and pieces[0].kind == "start" else 0
