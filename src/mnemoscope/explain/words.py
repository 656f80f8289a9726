"""Words as people see them: tokens merged, punctuation apart, repeated words kept apart by their place."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..models.base import Piece

_SHAPES = re.compile(r"a+(?:'a+)*|([^a\s])\1*")
_MARKUP = re.compile(r"</?\w+[^<>]*>|&\w+;")


@dataclass(frozen=True, slots=True)
class Word:
    """One word of a prompt, and what an explanation says of it.

    Attributes:
        text: As it stands in the prompt.
        start: Its first character in the prompt.
        end: One past its last.
        positions: Its places in the encoded prompt.
        value: Its share in the explanation, in the method's unit.
    """

    text: str
    start: int
    end: int
    positions: tuple[int, ...]
    value: float = 0.0


def words_of(prompt: str, pieces: Sequence[Piece]) -> list[Word]:
    """The words the encoder sees, in order; a word it cannot see, because the prompt is too long, is left out.

    Letters, marks and numbers make words, with the apostrophes inside them; other signs stand alone, or in a row with
    their like. Where one token covers two of these, they are one word.
    """
    groups: list[tuple[int, int, list[int]]] = []
    for start, end in _segments(prompt):
        inside = [i for i, p in enumerate(pieces) if p.kind == "text" and p.start < end and p.end > start]
        if groups and set(groups[-1][2]) & set(inside):
            begun, _, before = groups.pop()
            groups.append((begun, end, sorted({*before, *inside})))
        elif inside:
            groups.append((start, end, inside))
    return [Word(prompt[start:end], start, end, tuple(positions)) for start, end, positions in groups]


def rest_of(prompt: str, pieces: Sequence[Piece]) -> Word:
    """End-of-text and padding as one extra word: they see the whole prompt, and carry much of what it does."""
    positions = tuple(i for i, p in enumerate(pieces) if p.kind in ("end", "padding"))
    return Word("end and padding", len(prompt), len(prompt), positions)


def without(prompt: str, words: Iterable[Word], put: str = "") -> str:
    """The prompt with these words dropped, or replaced by ``put``; white space is closed up where a word was dropped."""
    for word in sorted(words, key=lambda w: w.start, reverse=True):
        left, right, middle = prompt[: word.start], prompt[word.end :], put
        if not put and (not right or right[0].isspace() or right[0] in ",.;:!?"):
            left = left.rstrip()
        elif not put and left[-1:].isalnum() and right[0].isalnum():
            middle = (
                " "  # dropping a sign must not glue its neighbors together: "<i>Beauty" without ">" is not "<iBeauty"
            )
        prompt = left + middle + right
    return prompt.strip()


def without_markup(prompt: str) -> str:
    """The prompt without HTML tags and entities; the same prompt if it has none."""
    bare = _MARKUP.sub(" ", prompt)
    return prompt if bare == prompt else " ".join(bare.split())


def without_signs(prompt: str) -> str:
    """The prompt without anything but letters, numbers and the apostrophes inside words."""
    kept = [prompt[start:end] for start, end in _segments(prompt) if _shape(prompt[start]) == "a"]
    return " ".join(kept)


def _segments(prompt: str) -> list[tuple[int, int]]:
    return [found.span() for found in _SHAPES.finditer("".join(map(_shape, prompt)))]


def _shape(c: str) -> str:
    """``a`` for what words are made of, one apostrophe for all, and everything else as it is."""
    if unicodedata.category(c)[0] in "LNM":
        return "a"
    return " " if c.isspace() else "'" if c == "’" else c
