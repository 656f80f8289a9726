"""Template copies: most of a reference returns, a part of it does not.

The similarity of whole pictures cannot tell "one detail is another" from "all of it is a little different". So a picture is also
compared with its nearest references while one quarter of both is covered, and the best of the four coverings counts: the layout
similarity. It is high where three quarters return, whatever stands in the fourth. It is always by the bundled fingerprint, whichever
descriptor finds the candidates. How it separates the bundled world's template families from other pictures, and what
else was tried: ``docs/descriptors.md``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from .base import Match, Pictures, as_tensor
from .fingerprint import SIDE, Fingerprint, resized

__all__ = ["CANDIDATES", "Layouts", "covered", "layout_similarity", "quarters", "thumbnail", "with_layouts"]

CANDIDATES = 4
"""References that are looked at for each picture: the most similar ones as wholes. More of them changed nothing."""

REMEMBERED = 8192
"""References whose quarters are kept: 2 kB each."""

Quarters = Float[Tensor, "4 dim"]


def thumbnail(picture: Image.Image) -> Float[Tensor, "3 64 64"]:
    """A picture that was just read, at the size at which layouts are compared."""
    return resized(as_tensor(picture))[0]


def covered(images: Pictures) -> Float[Tensor, "batch 4 3 64 64"]:
    """Each picture four times at 64 × 64 pixels, each time with another quarter of it covered by its mean color."""
    small, half = resized(images), SIDE // 2
    four = small[:, None].repeat(1, 4, 1, 1, 1)
    mean = small.mean((2, 3))[:, :, None, None]
    for k in range(4):
        y, x = half * (k // 2), half * (k % 2)
        four[:, k, :, y : y + half, x : x + half] = mean
    return four


def quarters(images: Pictures) -> Float[Tensor, "batch 4 dim"]:
    """Descriptors of the four covered versions of each picture."""
    return Fingerprint()(covered(images).flatten(0, 1)).unflatten(0, (-1, 4))


def layout_similarity(a: Quarters, b: Float[Tensor, "n 4 dim"]) -> Float[Tensor, " n"]:
    """max_k ⟨a_k, b_k⟩ over the covered quarter k, in [−1, 1]."""
    return (a * b).sum(-1).amax(-1)


class Layouts:
    """Finds, among each picture's candidates, the reference whose layout it shares most. Remembers what it has looked at.

    Args:
        picture: From a reference's id to its picture, ``[3, height, width]`` in [0, 1]; None: it cannot be shown.
    """

    def __init__(self, picture: Callable[[str], Tensor | None]):
        self._picture = picture
        self._known: OrderedDict[str, Quarters | None] = OrderedDict()

    def best(self, images: Pictures, candidates: Sequence[Sequence[Match]]) -> list[tuple[str, float] | None]:
        """For each picture its best candidate and their layout similarity; None: no candidate has a picture."""
        described = quarters(images).cpu()
        self._learn(dict.fromkeys(m.reference for some in candidates for m in some))
        best = [self._best(one, [m.reference for m in some]) for one, some in zip(described, candidates, strict=True)]
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return best

    def _best(self, described: Quarters, names: list[str]) -> tuple[str, float] | None:
        shown = [(name, q) for name in names if (q := self._known[name]) is not None]
        if not shown:
            return None
        values = layout_similarity(described, torch.stack([q for _, q in shown])).tolist()
        value, name = max(zip(values, (name for name, _ in shown), strict=True), key=lambda pair: pair[0])
        return name, round(value, 6)

    def _learn(self, names: Iterable[str]) -> None:
        """Describe, together, what is not known yet."""
        new: dict[str, Tensor] = {}
        for name in names:
            if name in self._known:
                self._known.move_to_end(name)
            elif (picture := self._picture(name)) is None:
                self._known[name] = None
            else:
                new[name] = resized(picture[None])[0]
        if new:
            self._known |= dict(zip(new, quarters(torch.stack(list(new.values()))).cpu(), strict=True))


def with_layouts(
    matches: Sequence[Sequence[Match]], found: Sequence[tuple[str, float] | None], threshold: float | None
) -> list[Match]:
    """The first match of each picture, with what :class:`Layouts` found among all of them."""
    return [_judged(some[0], best, threshold) for some, best in zip(matches, found, strict=True)]


def _judged(match: Match, best: tuple[str, float] | None, threshold: float | None) -> Match:
    if best is None:
        return match
    name, value = best
    called = None if threshold is None or match.copy_found is None else value > threshold and not match.copy_found
    return replace(match, layout=value, layout_reference=name, layout_threshold=threshold, template_found=called)
