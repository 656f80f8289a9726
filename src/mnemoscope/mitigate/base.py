"""Mitigation: what a method that prepares a generation promises, and finding one by name.

A method is shown everything a generation starts from and hands back the same with something exchanged: other embeddings, another
starting noise, a rule for the guidance scale, factors for the attention. It changes nothing else, neither model nor sampler, so
every method is sampled by the one denoising loop, and every method can be gated, compared and combined.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .. import plugins
from ..detect.magnitude import magnitude
from ..errors import CannotAudit, UsageError
from ..models.base import Condition, Target, mix
from ..models.sampling import GuidanceRule, denoise, null_output
from ..types import Latents, PerSample, Step

__all__ = ["CHANGES", "Generation", "Mitigation", "build", "describe", "first_sizes", "generator", "require", "sample"]

CHANGES = {
    "prompt": "the prompt's words",
    "embedding": "the prompt's embedding",
    "noise": "the starting noise",
    "guidance": "the guidance scale, step by step",
    "attention": "attention to the prompt",
}
"""What a method may change, in a user's words."""


@dataclass(frozen=True)
class Generation:
    """Everything a batch of generations starts from.

    Attributes:
        noise: Unit-variance starting noise, ``[batch, channel, height, width]``.
        cond: One encoded prompt per sample.
        null: The encoded empty prompt, one row.
        prompts: The prompts as text, one per sample; None where only embeddings are known.
        keys: One number per sample, from which whatever else is random is drawn: the same key, the same draws, whatever the
            batch. Default: 0, 1, ….
        steps: Length of the sampler's schedule.
        guidance: A scale, or a rule that gives one per sample at each step; None: the target's own.
        first_null: Raw null predictions at the first step, one per sample, where they are known.
        first_cond: Raw predictions with the prompt at the first step, where a method has made them already.
        forwards: Denoiser forwards of one latent (F) that preparing cost.
        backwards: Backward passes through one latent (B) that preparing cost.
    """

    noise: Latents
    cond: Condition
    null: Condition
    prompts: tuple[str, ...] | None = None
    keys: tuple[int, ...] = ()
    steps: int = 50
    guidance: float | GuidanceRule | None = None
    first_null: Tensor | None = None
    first_cond: Tensor | None = None
    forwards: int = 0
    backwards: int = 0

    def __post_init__(self) -> None:
        n = len(self.noise)
        if not self.keys:
            object.__setattr__(self, "keys", tuple(range(n)))
        for what, rows in (("encoded prompts", self.cond), ("prompts", self.prompts), ("keys", self.keys)):
            if rows is not None and len(rows) != n:
                raise UsageError(f"{len(rows)} {what} for {n} noises: give one per noise.")
        if len(self.null) != 1:
            raise UsageError(f"the null condition has {len(self.null)} rows: give encode(['']), one row for all.")

    @classmethod
    def of(
        cls, target: Target, prompts: Sequence[str], seeds: Sequence[int], *, base: int = 0, **options: Any
    ) -> Generation:
        """One sample for each prompt and its seed; ``seeds`` are as many as ``prompts``.

        Keys come from seed and prompt, so that two seeds of one prompt, and two prompts of one seed, draw apart.
        """
        if len(seeds) != len(prompts):
            raise UsageError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one per prompt.")
        different = list(dict.fromkeys(prompts))
        place = torch.tensor([different.index(p) for p in prompts])
        return cls(
            target.noise(seeds, base), target.encode(different).select(place), target.encode([""]), tuple(prompts),
            tuple(key_of(p, s, base) for p, s in zip(prompts, seeds, strict=True)), **options,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.noise)

    def select(self, index: Tensor) -> Generation:
        """Rows ``index`` of it, in that order. What preparing cost stays with the whole."""
        rows = index.tolist()

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[index.to(x.device)]

        return replace(
            self,
            noise=self.noise[index.to(self.noise.device)],
            cond=self.cond.select(index),
            prompts=None if self.prompts is None else tuple(self.prompts[i] for i in rows),
            keys=tuple(self.keys[i] for i in rows),
            first_null=pick(self.first_null),
            first_cond=pick(self.first_cond),
            forwards=0,
            backwards=0,
        )

    def spend(self, forwards: int, backwards: int = 0, **changes: Any) -> Generation:
        """The same with ``changes``, and so much more spent on preparing it."""
        return replace(self, **changes, forwards=self.forwards + forwards, backwards=self.backwards + backwards)

    def with_tokens(self, tokens: Tensor, *, forwards: int = 0, backwards: int = 0) -> Generation:
        """Other embeddings; predictions made with the old ones are forgotten."""
        cond = replace(self.cond, tokens=tokens.to(self.cond.tokens.dtype))
        return self.spend(forwards, backwards, cond=cond, first_cond=None)

    def with_noise(self, noise: Tensor, *, forwards: int = 0, backwards: int = 0) -> Generation:
        """Another starting noise; predictions on the old one are forgotten."""
        return self.spend(forwards, backwards, noise=noise, first_null=None, first_cond=None)


@runtime_checkable
class Mitigation(Protocol):
    """Prepares generations so that they copy less.

    Attributes:
        name: The method's name.
        changes: What it exchanges, keys of :data:`CHANGES`. Tells whether a running pipeline can still be given it.
        needs: ``{"grad"}`` (gradients through the denoiser), ``{"prompts"}`` (the prompts as text), ``{"attention"}`` (a denoiser
            whose attention can be reached); may be empty.
        costs: What it costs on top of sampling, in words.
        strength: Name of the option that says how strongly it acts.
        strengths: At least five values of it, weakest first, over which trade-offs are drawn.
    """

    name: str
    changes: frozenset[str]
    needs: frozenset[str]
    costs: str
    strength: str

    @property
    def strengths(self) -> Sequence[Any]:
        """Read only, so that a tuple of numbers will do."""
        ...

    def prepare(self, target: Target, generation: Generation) -> Generation:
        """The generation with what the method exchanges; the argument itself stays as it is.

        Each sample is prepared on its own: what it gets depends on its own noise, prompt and key, never on the rest of the batch
        (beyond float rounding).
        """
        ...


def build(name: str, options: Mapping[str, Any] | None = None) -> Mitigation:
    """A mitigation from plain values: :func:`mnemoscope.plugins.build`."""
    return plugins.build("mitigation", name, options)


def describe(entry: EntryPoint) -> tuple[str, str]:
    """What a mitigation changes, and what it costs, in words; one that cannot be imported is described as such."""
    try:
        make = entry.load()
    except Exception as e:
        return f"cannot be loaded ({type(e).__name__}: {e})", "unknown"
    return ", ".join(CHANGES.get(c, c) for c in sorted(make.changes)), make.costs


def sample(target: Target, generation: Generation, *, check: bool | None = None) -> Iterator[Step]:
    """Run a generation with :func:`~mnemoscope.models.sampling.denoise`; predictions known already cost nothing again."""
    g = generation
    return denoise(
        target, g.noise, g.cond, g.null, steps=g.steps, guidance=g.guidance, first_null=g.first_null, first_cond=g.first_cond,
        check=check,
    )  # fmt: skip


def first_sizes(target: Target, generation: Generation) -> tuple[PerSample, Generation]:
    """The magnitude of each sample at the first step, and the generation with both predictions kept for sampling.

    Costs batch forwards, twice that where the null prediction is not known; all of it is saved again when sampling.
    """
    g = generation
    plan = target.schedule(g.steps)
    t = plan.timesteps[0]
    with torch.no_grad():
        x = plan.scale(plan.start(g.noise), t)
        null = null_output(target, g.noise, g.null, steps=g.steps) if g.first_null is None else g.first_null
        cond = target.output(x, t, g.cond) if g.first_cond is None else g.first_cond
        size = magnitude(target.to_space(cond, x, t), target.to_space(null, x, t))
    return size, replace(g, first_null=null, first_cond=cond)


def key_of(prompt: str, seed: int, base: int = 0) -> int:
    """A sample's key from its prompt and seed, stable across machines and versions."""
    digest = hashlib.sha256(f"{base}/{seed}/{prompt}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(key: int, purpose: str) -> torch.Generator:
    """The random source of one sample for one purpose, on the CPU."""
    return torch.Generator("cpu").manual_seed(mix(key_of(purpose, 0), key))


def require(mitigation: Mitigation, generation: Generation) -> None:
    """Refuse what a method cannot do with this generation.

    Raises:
        CannotAudit: it has to see the text, and only embeddings are known.
    """
    if "prompts" in mitigation.needs and generation.prompts is None:
        raise CannotAudit(
            f"{mitigation.name} has to see the prompt's words, and only its embedding is known here; give the prompt as text, or "
            f"use a mitigation that needs none (`mnemoscope ls mitigations`)."
        )
