"""Other captions at every visit: Somepalli et al., NeurIPS 2023, *Understanding and Mitigating Copying in Diffusion Models*.

An image that comes with one caption, again and again, is stored under it. So the caption is changed while training; these are the
baselines that :mod:`.training` is compared with.

    random tokens       RTA   tokens of the vocabulary, inserted as words
    replaced tokens     RT    words exchanged for tokens of the vocabulary
    random numbers      RNA   numbers below 100,000, inserted
    repeated words      CWR   words of the caption, inserted once more
    several captions    MC    one of an image's captions, drawn uniformly
    embedding noise     GNI   e + λ·N(0, I)

Insertions are those of :mod:`.perturb`. Every draw depends on (seed, sample, step) alone: whatever the batch, the order and the number
of processes, and a resumed training draws on as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UnknownName, UsageError
from ..models.base import Lexicon
from .base import generator, key_of
from .perturb import NUMBERS, _below, _token, insert, noised

__all__ = [
    "STYLES",
    "CaptionAugmentation",
    "TokenizerWords",
    "add_numbers",
    "add_tokens",
    "choose",
    "noise_embeddings",
    "repeat_words",
    "replace_tokens",
    "visit_key",
]


def visit_key(seed: int, sample: int, step: int) -> int:
    """One number for one visit to one sample."""
    return key_of(str(sample), step, seed)


class TokenizerWords:
    """A tokenizer's vocabulary to draw from, special tokens left out.

    Args:
        tokenizer: As transformers has them: a length, ``all_special_ids`` and ``decode``.
    """

    def __init__(self, tokenizer: Any):
        special = set(tokenizer.all_special_ids)
        self._tokenizer = tokenizer
        self._ids = [i for i in range(len(tokenizer)) if i not in special]

    @property
    def entries(self) -> int:
        """How many tokens there are to draw from."""
        return len(self._ids)

    def entry(self, index: int) -> str:
        """What token number ``index`` of them spells."""
        return str(self._tokenizer.decode([self._ids[index]])).strip()


def add_tokens(caption: str, count: int, vocabulary: Lexicon, source: torch.Generator) -> str:
    """``count`` random tokens, each as a word of its own in a random gap."""
    return insert(caption, count, partial(_token, vocabulary), source)


def replace_tokens(caption: str, count: int, vocabulary: Lexicon, source: torch.Generator) -> str:
    """``count`` words at different random places, or all if there are fewer, each exchanged for a random token."""
    words = caption.split()
    places = torch.randperm(len(words), generator=source)[:count]
    for place in places.tolist():
        words[place] = _token(vocabulary, source)
    return " ".join(words)


def add_numbers(caption: str, count: int, source: torch.Generator) -> str:
    """``count`` random numbers below 100,000, each in a random gap."""
    return insert(caption, count, lambda source: str(_below(NUMBERS, source)), source)


def repeat_words(caption: str, count: int, source: torch.Generator) -> str:
    """``count`` of the caption's own words, each once more in a random gap; an empty caption has none and stays empty."""
    words = caption.split()
    return insert(caption, count, lambda source: words[_below(len(words), source)], source) if words else caption


def choose(captions: Sequence[str], source: torch.Generator) -> str:
    """One of an image's captions."""
    if not captions:
        raise UsageError("there is no caption to choose from: give one or more for each image.")
    return captions[_below(len(captions), source)]


def noise_embeddings(
    tokens: Float[Tensor, "batch token dim"], scale: float, *, seed: int, samples: Sequence[int], step: int
) -> Float[Tensor, "batch token dim"]:
    """e + λ·N(0, I), each row's noise from its own visit; in the dtype of ``tokens``, on their device."""
    return noised(tokens, scale, [visit_key(seed, sample, step) for sample in samples]).to(tokens.dtype)


STYLES = ("random-tokens", "replaced-tokens", "random-numbers", "repeated-words")
"""Changes of a caption's words."""


class CaptionAugmentation:
    """Changes a batch of captions.

    Args:
        style: One of :data:`STYLES`; None: only draws among an image's captions.
        count: How many words are inserted or replaced.
        vocabulary: Where tokens are drawn from, for ``random-tokens`` and ``replaced-tokens``: a target, or :class:`TokenizerWords`.
        seed: Of all draws.
    """

    def __init__(self, style: str | None = None, count: int = 4, *, vocabulary: Lexicon | None = None, seed: int = 0):
        if style is not None and style not in STYLES:
            raise UnknownName("change of captions", style, STYLES)
        if count < 0:
            raise UsageError(f"count={count}: give how many words to change, for instance 4.")
        if style in ("random-tokens", "replaced-tokens") and vocabulary is None:
            raise UsageError(f"{style} draws tokens: give vocabulary=, for instance TokenizerWords(tokenizer).")
        self.style, self.count, self.vocabulary, self.seed = style, count, vocabulary, seed

    def __call__(
        self, captions: Sequence[str | Sequence[str]], samples: Sequence[int], step: int
    ) -> list[str]:  # fmt: skip
        """The captions of one batch as they are trained on.

        Args:
            captions: One per sample, or several, of which one is drawn.
            samples: Each sample's number in the training set.
            step: Training step, or whatever else counts visits.
        """
        if len(captions) != len(samples):
            raise UsageError(f"{len(captions)} captions for {len(samples)} samples: give one, or one list, for each.")
        return [self._changed(given, visit_key(self.seed, i, step)) for given, i in zip(captions, samples, strict=True)]

    def _changed(self, given: str | Sequence[str], key: int) -> str:
        caption = given if isinstance(given, str) else choose(given, generator(key, "several captions"))
        return caption if self.style is None else self._change()(caption, self.count, generator(key, self.style))

    def _change(self) -> Callable[[str, int, torch.Generator], str]:
        if self.style == "random-numbers":
            return add_numbers
        if self.style == "repeated-words":
            return repeat_words
        change = add_tokens if self.style == "random-tokens" else replace_tokens
        vocabulary = self.vocabulary
        return lambda caption, count, source: change(caption, count, vocabulary, source)  # type: ignore[arg-type]
