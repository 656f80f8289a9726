"""What a model under audit promises: Target, Condition, Schedule."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..types import Latents, Space


@dataclass(frozen=True)
class Condition:
    """Encoded prompts. Methods touch ``tokens`` only; ``extra`` is whatever else a family needs.

    Attributes:
        tokens: Text embeddings at the encoder's output, ``[batch, token, dim]``.
        extra: Further per-sample tensors (pooled text, size ids), first axis = batch.
    """

    tokens: Float[Tensor, "batch token dim"]
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def select(self, index: Tensor) -> Condition:
        """Rows ``index`` (a 1-d integer tensor), in that order; rows may repeat."""
        index = index.to(self.tokens.device)
        return replace(self, tokens=self.tokens[index], extra={k: v[index] for k, v in self.extra.items()})

    def split(self) -> list[Condition]:
        """Its rows one by one, without a copy."""
        return [
            replace(self, tokens=self.tokens[i : i + 1], extra={k: v[i : i + 1] for k, v in self.extra.items()})
            for i in range(len(self))
        ]

    def expand(self, n: int) -> Condition:
        """One encoded prompt as a batch of ``n``."""
        return self.select(torch.zeros(n, dtype=torch.long))

    def same_as(self, one: Condition) -> Bool[Tensor, " batch"]:
        """Which rows equal the single row ``one`` bit for bit. Stays on the device."""
        same = (self.tokens == one.tokens).flatten(1).all(1)
        for key, value in self.extra.items():
            same = same & (value == one.extra[key]).flatten(1).all(1)
        return same

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Batches one after the other; at least one."""
        first = parts[0]
        extra = {k: torch.cat([p.extra[k] for p in parts]) for k in first.extra}
        return replace(first, tokens=torch.cat([p.tokens for p in parts]), extra=extra)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one position of an encoded prompt stands for.

    Attributes:
        text: The token as the vocabulary writes it; empty for special tokens.
        kind: ``start``, ``text``, ``end`` (the first end-of-text) or ``padding``.
        start: First character of the prompt that it stands for.
        end: One past the last; equal to ``start`` where it stands for none.
    """

    text: str
    kind: Literal["start", "text", "end", "padding"]
    start: int = 0
    end: int = 0


@runtime_checkable
class Vocabulary(Protocol):
    """A target that knows which words lie close to a word."""

    def neighbors(self, words: list[str], k: int, among: Collection[str] | None = None) -> list[list[str]]:
        """The k words nearest to each word, nearest first; among those given, or in the whole vocabulary."""
        ...


@runtime_checkable
class EndMaps(Protocol):
    """Attention to the end of a prompt, of the last forward that was watched."""

    def maps(self) -> Float[Tensor, "batch height width"]:
        """In the resolution of the layers it comes from, on the device."""
        ...


@runtime_checkable
class AttendsToEnd(Protocol):
    """A target whose denoiser pays attention to the end token of a prompt, and can be watched doing so."""

    def end_token_attention(self, ends: Sequence[int]) -> AbstractContextManager[EndMaps]:
        """Watch forwards inside the block; ``ends`` is the position of the end token of each row of the batch."""
        ...


@runtime_checkable
class Lexicon(Protocol):
    """A target whose vocabulary can be drawn from."""

    @property
    def entries(self) -> int:
        """How many tokens the vocabulary has, special ones left out."""
        ...

    def entry(self, index: int) -> str:
        """What token number ``index`` (0 to ``entries`` - 1) spells; may be blank, or a part of a character that is no text alone."""
        ...


@runtime_checkable
class Pads(Protocol):
    """A target that fills up short prompts with a token, and may be told to take another one."""

    def encode_padded(self, prompts: list[str], pad: str) -> Condition:
        """Encode prompts with the token ``pad`` after their end; the positions up to the end are those of ``encode``."""
        ...


ATTENTION = "attention"
"""Key of ``Condition.extra`` under which a :class:`ScalesAttention` target looks for changes to its attention."""


@runtime_checkable
class AttentionMass(Protocol):
    """How much attention each token was paid, in the last forward that was watched."""

    def mass(self) -> Float[Tensor, "batch token"]:
        """Mean attention probability over places, heads and the layers down to the middle of the network; on the device."""
        ...


@runtime_checkable
class ScalesAttention(Protocol):
    """A target whose attention to single tokens can be measured and changed.

    Where a condition has ``extra["attention"]``, ``[batch, block (down, mid, up), 2 (factor, bias), token]``, ``output`` turns each
    logit of a row's attention to a token into factor·logit + bias, in the layers of that block. Factor 1 and bias 0 are neutral.
    """

    def token_attention(self) -> AbstractContextManager[AttentionMass]:
        """Watch forwards inside the block; their output stays as it is."""
        ...


@runtime_checkable
class Trained(Protocol):
    """A target that knows at which times it was trained."""

    def training_times(self, u: Float[Tensor, " batch"]) -> Tensor:
        """The time at share u of its training times, 0 ≤ u < 1: uniform u, uniform over what training drew from."""
        ...

    def whole_schedule(self, steps: int) -> Schedule:
        """A fresh sampler run that begins at the last training time, whatever ``schedule`` leaves out."""
        ...


@runtime_checkable
class SoftText(Protocol):
    """A target that reads mixtures of tokens: prompts that nobody can type."""

    @property
    def mixture_shape(self) -> tuple[int, int]:
        """How many tokens fit between start and end, and how many tokens there are to mix."""
        ...

    def encode_mixture(self, shares: Float[Tensor, "batch slot token"]) -> Condition:
        """Encode prompts whose token embeddings are Σ share · embedding; differentiable in ``shares``."""
        ...


@runtime_checkable
class Schedule(Protocol):
    """One sampler run: its own timesteps and its own state, so that two runs on one target never meet."""

    timesteps: Tensor

    def start(self, noise: Latents) -> Latents:
        """x_T from unit-variance noise."""
        ...

    def scale(self, x: Latents, t: Tensor) -> Latents:
        """What the denoiser is shown at time ``t`` when the state is ``x``."""
        ...

    def step(self, output: Latents, t: Tensor, x: Latents) -> Latents:
        """The next state, from the denoiser's *raw* (already guided) output."""
        ...


@runtime_checkable
class Target(Protocol):
    """A model under audit.

    ``output`` is the denoiser's raw answer in its own dtype and parameterization (ε, v, x₀, u); ``to_space`` turns it into
    ``space``, in float32 or better. Both are differentiable in ``x`` and in ``cond.tokens``. Weights are frozen.
    """

    name: str
    space: Space
    has_text: bool
    guidance: float
    """The guidance scale this model is meant to be used with."""
    latent_shape: tuple[int, int, int]
    forwards: int
    """Denoiser forwards of one latent so far (F); ``output`` adds its batch size."""

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the denoiser."""
        ...

    def identity(self) -> dict[str, Any]:
        """Plain values that say which model this is: weight hashes, adapters, scheduler config, dtype, resolution."""
        ...

    def encode(self, prompts: list[str]) -> Condition:
        """Encode prompts; the empty string gives the null condition. Raises CannotAudit on a model without text."""
        ...

    def tokens(self, prompt: str) -> list[str]:
        """The prompt's tokens as the encoder sees them, without start, end and padding."""
        ...

    def pieces(self, prompt: str) -> list[Piece]:
        """What each position of ``encode([prompt]).tokens`` stands for, in order."""
        ...

    def dropped(self, prompt: str) -> int:
        """How many tokens of the prompt the encoder cannot see because the prompt is too long (0: none)."""
        ...

    def noise(self, seeds: Sequence[int], base: int = 0) -> Latents:
        """Unit-variance starting noise; row j depends on (base, seeds[j]) alone."""
        ...

    def schedule(self, steps: int) -> Schedule:
        """A fresh sampler run of that many steps."""
        ...

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise scale of x_t = α x₀ + σ ε (what ``output`` is shown) at times ``t``, same shape as ``t``, float32."""
        ...

    def output(self, x: Latents, t: Tensor, cond: Condition | None) -> Latents:
        """The denoiser's raw output at times ``t`` (a scalar, or one per sample)."""
        ...

    def to_space(self, output: Latents, x: Latents, t: Tensor) -> Latents:
        """The raw output as a prediction in ``space``, float32 (float64 for a float64 model); ``x`` is what ``output`` was shown."""
        ...

    def predict(self, x: Latents, t: Tensor, cond: Condition | None) -> Latents:
        """``to_space(output(x, t, cond), x, t)``."""
        ...

    def encode_images(self, images: Float[Tensor, "batch 3 rows columns"]) -> Latents:
        """x₀ of pictures in [0, 1]: the latents the diffusion model is trained on (the mean, no draw)."""
        ...

    def decode(self, x: Latents) -> Float[Tensor, "batch 3 rows columns"]:
        """Pictures in [0, 1], float32, on the CPU."""
        ...


def noise_from_seeds(seeds: Sequence[int], base: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, float32 on the CPU; row j depends on (base, seeds[j]) alone.

    Returns ``[len(seeds), *shape]``. Base and seed are mixed by hashing, so that (0, 1) and (1, 0) differ and no global seed
    is ever set. Base 0 is the plain ``torch.Generator().manual_seed(seed)`` that diffusers users write themselves.
    """
    rows = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(mix(base, s))) for s in seeds]
    return torch.stack(rows) if rows else torch.empty((0, *shape))


def mix(base: int, seed: int) -> int:
    """One 63-bit seed from two; ``mix(0, s) == s``."""
    if base == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{base}/{seed}".encode()).digest()[:8], "big") >> 1
