"""What frozen parts of a model make of pictures and captions, computed once: latents and prompt embeddings.

A picture is kept as mean and standard deviation of the autoencoder's posterior, so that each visit still draws its own latent from
it (as the training of Rombach et al., CVPR 2022, does); a mirrored picture is encoded for itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..mitigate.captions import CaptionAugmentation, noise_embeddings
from ..models.host import DiffusersTarget
from ..records.files import hash_file, read_regular
from ..records.once import compute_once
from ..records.store import digest, explained, locked, whole, write_whole
from ..types import Latents
from .data import TrainingSet

__all__ = ["Captions", "LatentCache", "encode_pictures"]

TOGETHER = 8
"""Pictures that pass through the autoencoder at a time."""


@dataclass(frozen=True)
class LatentCache:
    """Posteriors ``[picture, mirrored or not, mean or standard deviation, channel, height, width]``, float32, in memory or mapped."""

    moments: Any

    def draw(self, rows: Int[Tensor, " batch"], mirrored: Bool[Tensor, " batch"], noise: Latents) -> Latents:
        """x₀ = mean + standard deviation · noise, on the CPU."""
        found = torch.from_numpy(self.moments[rows.numpy(), mirrored.long().numpy()])
        return found[:, 0] + found[:, 1] * noise


def encode_pictures(
    target: DiffusersTarget,
    data: TrainingSet,
    side: int,
    *,
    flip: bool,
    file: Path,
    gigabytes: float,
    tell: Callable[[int], None] = lambda done: None,
) -> LatentCache:
    """Encode every picture once.

    Args:
        target: The model; its autoencoder is used as it is.
        data: The pictures.
        side: In pixels.
        flip: Encode mirrored pictures too.
        file: Where latents are kept when they take more memory than ``gigabytes``; a finished one that still has its bytes is used again.
        gigabytes: 0 writes the file in any case.
        tell: Called with the number of pictures done.

    Costs one pass of the autoencoder's encoder per picture, two with ``flip``.
    """
    channels, factor = target.latent_shape[0], target.factor
    shape = (len(data), 1 + flip, 2, channels, side // factor, side // factor)
    if 4 * np.prod(shape, dtype=float) <= gigabytes * 1e9:
        moments = np.empty(shape, np.float32)
        _fill(moments, target, data, side, tell)
        return LatentCache(moments)
    key = digest([data.digest(), shape, str(target.vae.dtype), target.origin.source, target.origin.revision])
    record = file.with_suffix(".key")
    with explained(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.with_name(f".lock-{file.stem}"), wait=-1.0):  # of several processes the first one encodes
        size = 4 * math.prod(shape)
        if not _holds(file, record, key, size):
            record.unlink(missing_ok=True)
            with explained(file.parent), whole(file) as half:
                _reserve(half, size)
                moments = np.memmap(half, np.float32, "r+", shape=shape)
                _fill(moments, target, data, side, tell)
                moments.flush()
            write_whole(record, _recorded(file, key))
    return LatentCache(np.memmap(file, np.float32, "r", shape=shape))


def _holds(file: Path, record: Path, key: str, size: int) -> bool:
    """Whether a file of latents is the one that was written for this key: an altered one would train on other pictures."""
    try:
        return file.stat().st_size == size and read_regular(record, limit=1024) == _recorded(file, key)
    except OSError:
        return False


def _recorded(file: Path, key: str) -> bytes:
    """What is kept beside a file of latents: what it was made from, and its hash."""
    return f"{key} {compute_once(file, 'sha256', hash_file)}".encode()


def _reserve(path: str, size: int) -> None:
    """Make a file of that many bytes, on the disk: where a disk is full, writing to mapped memory ends the process without a word."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


def _fill(moments: Any, target: DiffusersTarget, data: TrainingSet, side: int, tell: Callable[[int], None]) -> None:
    rows: list[int] = []
    waiting: list[Tensor] = []

    def encode() -> None:
        images = torch.stack(waiting)
        for mirrored in range(moments.shape[1]):
            moments[rows, mirrored] = _posterior(target, images.flip(-1) if mirrored else images)

    for done, (row, pixels) in enumerate(data.pixels(side), 1):
        rows.append(row)
        waiting.append(pixels)
        if len(rows) == TOGETHER or done == len(data):
            encode()
            rows.clear()
            waiting.clear()
            tell(done)


@torch.no_grad()
def _posterior(target: DiffusersTarget, images: Float[Tensor, "batch 3 side side"]) -> Any:
    """Mean and standard deviation of scaled latents."""
    vae = target.vae
    found = vae.encode(images.to(target.device, vae.dtype) * 2 - 1).latent_dist
    return (torch.stack([found.mean, found.std], 1) * vae.config.scaling_factor).float().cpu().numpy()


class Captions:
    """The captions of a training set as the denoiser is given them.

    Args:
        target: The model; its text encoder is used as it is.
        texts: One or several captions per picture.
        augment: Draws among several, and changes what it draws.
        noise: λ of noise on the embeddings; 0: none.
        gigabytes: Captions that do not change are encoded once, if they take no more memory than that.
    """

    def __init__(
        self,
        target: DiffusersTarget,
        texts: Sequence[tuple[str, ...]],
        augment: CaptionAugmentation,
        *,
        noise: float = 0.0,
        gigabytes: float = 8.0,
    ):
        self.target, self.texts, self.augment, self.noise = target, list(texts), augment, noise
        self.null = target.encode([""])
        self._known: dict[str, int] = {}
        self._table: Tensor | None = None
        different = list(dict.fromkeys(text for several in texts for text in several))
        size = self.null.tokens[0].numel() * self.null.tokens.element_size() * len(different)
        if augment.style is None and size <= gigabytes * 1e9:
            self._table = target.encode(different).tokens.cpu()
            self._known = {text: i for i, text in enumerate(different)}

    def tokens(
        self, rows: Int[Tensor, " batch"], blank: Bool[Tensor, " batch"], places: Sequence[int]
    ) -> Float[Tensor, "batch token dim"]:
        """Embeddings for one batch, on the model's device; those of dropped captions are the empty prompt's, bit for bit.

        ``places`` number the visits of the whole training: a picture that comes twice in one step has two draws of its own.
        """
        words = self.augment([self.texts[row] for row in rows.tolist()], places, 0)
        found = self._encoded(words)
        if self.noise:
            found = noise_embeddings(found, self.noise, seed=self.augment.seed, samples=places, step=0)
        return torch.where(blank.to(found.device, non_blocking=True)[:, None, None], self.null.tokens, found)

    def _encoded(self, words: list[str]) -> Tensor:
        if self._table is None:
            return self.target.encode(words).tokens
        chosen = self._table[[self._known[text] for text in words]]
        return chosen.to(self.null.tokens.device, non_blocking=True)
