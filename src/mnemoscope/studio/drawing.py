"""Pictures of a prompt, kept as files: what a visitor takes of memory stays small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..explain.overlay import Overlay, overlay
from ..explain.regions import Regions
from ..similarity.decoding import KEPT, decode

__all__ = ["Drawn", "Shot"]


@dataclass(frozen=True)
class Shot:
    """One picture of a prompt.

    Attributes:
        seed: Its seed.
        picture: A WebP file.
        nearest: The nearest reference picture (:class:`~mnemoscope.similarity.base.Match`); None: not tested.
    """

    seed: int
    picture: bytes
    nearest: Any = None

    @property
    def copy_found(self) -> bool:
        """Whether the reference set calls it a copy."""
        return self.nearest is not None and bool(self.nearest.copy_found)


@dataclass(frozen=True, eq=False)
class Drawn:
    """The pictures of a prompt.

    Attributes:
        prompt: The prompt.
        shots: One for each seed.
        references: The reference pictures that are nearest, as WebP files by id.
        maps: Where the prompt pulls at the last step, ``[seed, height, width]`` in latent pixels.
        steps: Length of the sampler's schedule.
    """

    prompt: str
    shots: tuple[Shot, ...]
    references: Mapping[str, bytes]
    maps: Float[Tensor, "seed height width"]
    steps: int

    @property
    def copies(self) -> int:
        """In how many pictures a copy was found."""
        return sum(shot.copy_found for shot in self.shots)

    @property
    def compared(self) -> bool:
        """Whether copies were looked for: there is a reference set, and it has a threshold."""
        return any(shot.nearest is not None and shot.nearest.copy_found is not None for shot in self.shots)

    @cached_property
    def overlay(self) -> Overlay:
        """The maps over the pictures; made when somebody asks."""
        images = torch.stack([_pixels(shot.picture) for shot in self.shots])
        seeds = tuple(shot.seed for shot in self.shots)
        return overlay(Regions(self.prompt, "score", self.maps, images, seeds, (self.steps - 1,), 0, 0))


def _pixels(file: bytes) -> Float[Tensor, "3 height width"]:
    """A picture file as a tensor in [0, 1]."""
    read = decode(file, KEPT)
    assert read.picture is not None, read.reason  # it was drawn and encoded here
    return torch.from_numpy(np.array(read.picture)).permute(2, 0, 1).float() / 255
