"""Other words, or noise on their embedding: Somepalli et al., NeurIPS 2023, *Understanding and Mitigating Copying in Diffusion Models*.

A memorized caption is a key that must fit exactly; so change it before it is used. These are the baselines that every other method
is compared with:

    random tokens     RTA   one token of the vocabulary, drawn uniformly
    random numbers    RNA   a number, uniform in [0, 100000)
    repeated words    CWR   one of the prompt's own words
    embedding noise   GNI   e + λ·N(0, I)

The first three go into a gap between words drawn uniformly (before the first and after the last included), ``count`` times, one after
the other. Draws come from the sample's key alone: more insertions begin with the fewer, and stronger noise is the weaker one, scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ..bounds import AMOUNT, SIZE, within
from ..errors import CannotAudit
from ..models.base import Lexicon, Target
from ..types import precise
from .base import Generation, generator, require

NUMBERS = 100_000
"""Random numbers are below this."""


def insert(prompt: str, count: int, draw: Callable[[torch.Generator], str], source: torch.Generator) -> str:
    """``count`` words, drawn one after the other, each put into a random gap of what is there by then."""
    words = prompt.split()
    for _ in range(count):
        word = draw(source)
        words.insert(_below(len(words) + 1, source), word)
    return " ".join(words)


def _below(stop: int, source: torch.Generator) -> int:
    """A uniform integer of 0 … stop - 1."""
    return int(torch.randint(stop, (), generator=source))


class _Insertion:
    """What the three have in common: other prompts, encoded as one batch."""

    name: str
    changes = frozenset({"prompt"})
    needs = frozenset({"prompts"})
    costs = "nothing"
    strength, strengths = "count", (1, 2, 4, 6, 8)

    @within(count=AMOUNT)
    def __init__(self, count: int = 4):
        self.count = count

    def prepare(self, target: Target, generation: Generation) -> Generation:
        """The same generation with changed prompts, and their embeddings."""
        require(self, generation)
        g = generation
        prompts = tuple(
            insert(p, self.count, self.word(target, p), generator(key, self.name)) if self.can_draw(p) else p
            for p, key in zip(g.prompts or (), g.keys, strict=True)
        )
        different = list(dict.fromkeys(prompts))
        place = torch.tensor([different.index(p) for p in prompts], dtype=torch.long)
        return replace(g, prompts=prompts, cond=target.encode(different).select(place), first_cond=None)

    def can_draw(self, prompt: str) -> bool:
        """Whether there is a word to draw."""
        return True

    def word(self, target: Target, prompt: str) -> Callable[[torch.Generator], str]:
        """How a word is drawn."""
        raise NotImplementedError


class RandomTokens(_Insertion):
    """Insert random tokens of the model's vocabulary, each as a word of its own.

    Args:
        count: How many.

    Tokens that spell nothing by themselves (a blank, a part of a character) are drawn again.
    """

    name = "random-tokens"

    def word(self, target: Target, prompt: str) -> Callable[[torch.Generator], str]:
        """A token of the vocabulary."""
        if not isinstance(target, Lexicon):
            raise CannotAudit(
                f"{target.name} does not tell its vocabulary, from which random tokens are drawn; use random-numbers or repeated-words."
            )
        return partial(_token, target)


def _token(lexicon: Lexicon, source: torch.Generator) -> str:
    while True:
        text = lexicon.entry(_below(lexicon.entries, source)).strip()
        if text and "\ufffd" not in text:
            return text


class RandomNumbers(_Insertion):
    """Insert random numbers.

    Args:
        count: How many.
    """

    name = "random-numbers"

    def word(self, target: Target, prompt: str) -> Callable[[torch.Generator], str]:
        """A number."""
        return lambda source: str(_below(NUMBERS, source))


class RepeatedWords(_Insertion):
    """Insert words of the prompt once more. An empty prompt has none and stays empty.

    Args:
        count: How many.
    """

    name = "repeated-words"

    def can_draw(self, prompt: str) -> bool:
        """Whether it has words."""
        return bool(prompt.split())

    def word(self, target: Target, prompt: str) -> Callable[[torch.Generator], str]:
        """A word of the prompt as it was given."""
        words = prompt.split()
        return lambda source: words[_below(len(words), source)]


def noised(
    tokens: Float[Tensor, "batch token dim"], scale: float, keys: Sequence[int]
) -> Float[Tensor, "batch token dim"]:
    """e + λ·N(0, I) at every position, each row's noise from its key; float32 or better."""
    shape = tokens.shape[1:]
    rows = [torch.randn(shape, generator=generator(key, EmbeddingNoise.name)) for key in keys]
    return precise(tokens) + scale * torch.stack(rows).to(tokens.device)


class EmbeddingNoise:
    """Add Gaussian noise to the prompts' embeddings.

    Args:
        scale: λ, in the units of the text encoder's output, whose elements are about 1 in CLIP's. The authors' example is 0.1; it takes
            noise of about the embedding's own size to change what is drawn.
    """

    name = "embedding-noise"
    changes = frozenset({"embedding"})
    needs: frozenset[str] = frozenset()
    costs = "nothing"
    strength, strengths = "scale", (0.1, 0.5, 1.0, 2.0, 4.0)

    @within(scale=SIZE)
    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def prepare(self, target: Target, generation: Generation) -> Generation:
        """The same generation with noised embeddings."""
        g = generation
        return g.with_tokens(noised(g.cond.tokens, self.scale, g.keys))
