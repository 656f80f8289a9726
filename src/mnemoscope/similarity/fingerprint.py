"""Fingerprint: a small copy-detection network of our own, the descriptor that commands use when none is named.

Trained by contrast, as Pizzi et al., CVPR 2022 (SSCD) did on photographs: two distorted versions of one picture must be nearer to each
other than to any other picture (InfoNCE), and different pictures are kept apart by an entropy term (KoLeo, Sablayrolles et
al., ICLR 2019). The distortions are those that a generated copy suffers (an autoencoder's blur, a latent that is not quite
right) and those of copies on the web (JPEG, blur, noise, crops, mirroring, small turns, changes of color). Its training:
:mod:`mnemoscope.demo.train_descriptor`; what it is worth: ``docs/descriptors.md``.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UsageError
from ..records.files import hash_file
from .base import Pictures, Vectors, as_tensor

__all__ = ["SIDE", "Fingerprint", "FingerprintNetwork", "resized", "with_weights"]

SIDE = 64
"""Pixels along each side of what the network sees."""

PLAIN = 0.01
"""Standard deviation of every channel below which a picture has no content: two or three grey levels."""

Network = TypeVar("Network", bound=nn.Module)

ASSETS = Path(__file__).parent / "assets"


class FingerprintNetwork(nn.Module):
    """Eight convolutions from 64 × 64 pixels to 4 × 4 cells, whose places are kept, and a projection to ``dim`` numbers."""

    def __init__(self, widths: tuple[int, int, int, int] = (32, 64, 128, 192), dim: int = 128):
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for i, width in enumerate(widths):
            layers += _block(before, width, kernel=5 if i == 0 else 3, stride=2)
            if i:
                layers += _block(width, width)
            before = width
        self.cells = nn.Sequential(*layers, *_block(before, 64, kernel=1))
        self.project = nn.Linear(64 * 16, dim)

    def forward(self, images: Float[Tensor, "batch 3 64 64"]) -> Float[Tensor, "batch dim"]:
        """Unit vectors of pictures in [0, 1]."""
        return F.normalize(self.project(self.cells(images * 2 - 1).flatten(1)), dim=1)


def _block(before: int, after: int, *, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(after), nn.SiLU()]


class Fingerprint:
    """Vectors of the bundled network, unit length; similarity is their dot product, in [−1, 1].

    Args:
        weights: Another ``.safetensors`` file of :class:`FingerprintNetwork`; default: the bundled one.

    Raises:
        UsageError: the file is missing or holds other weights.
    """

    near_duplicate = 0.95
    """Similarity above which two pictures of a set are called near-duplicates. Of the bundled world's 637,594 pairs of never-shown and
    shown pictures, only look-alikes (two pens, two speech bubbles) come this close."""

    def __init__(self, weights: str | None = None):
        self.weights = weights
        self._file = Path(weights) if weights else ASSETS / "fingerprint.safetensors"
        if not self._file.is_file():
            raise UsageError(f"{self._file} does not exist; name a .safetensors file of fingerprint weights.")

    @property
    def name(self) -> str:
        """Stored with every number this descriptor gives; ends with the beginning of its weights' hash."""
        return f"fingerprint-{hash_file(self._file)[:6]}"

    def identity(self) -> dict[str, Any]:
        """What the numbers depend on."""
        rule = f"whole picture to {SIDE} x {SIDE} RGB, bilinear, antialiased, proportions not kept"
        return {"descriptor": "fingerprint", "weights": f"sha256:{hash_file(self._file)}", "preprocessing": rule}

    def prepare(self, picture: Image.Image) -> Float[Tensor, "3 height width"]:
        """The picture at the network's size. Large ones are first reduced by a whole factor."""
        return resized(as_tensor(picture))[0]

    def __call__(self, images: Pictures) -> Vectors:
        """Descriptors of pictures in [0, 1] of any size, float32, on the pictures' device; zero for a plain card."""
        small = resized(images)
        with torch.no_grad():
            vectors = _loaded(self._file, small.device)(small)
        # What the network says of a picture without content is the same for all of them: every card would be a copy of every other.
        content = small.flatten(2).std(2).amax(1) > PLAIN
        return vectors * content[:, None]


@lru_cache(maxsize=8)
def _loaded(file: Path, device: torch.device) -> FingerprintNetwork:
    return with_weights(FingerprintNetwork(), file, "fingerprint").to(device)


def with_weights(network: Network, file: Path, what: str) -> Network:
    """The network with the weights of a file, frozen, in float32, for inference.

    Raises:
        UsageError: the file is damaged, or holds other weights than ``what``.
    """
    fixed = {k: v for k, v in network.state_dict().items() if not v.is_floating_point()}  # counters of training
    try:
        network.load_state_dict(load_file(file) | fixed)
    except (SafetensorError, RuntimeError) as e:
        raise UsageError(
            f"{file} holds no {what} weights ({' '.join(str(e).split())[:120]}); name another file."
        ) from e
    return network.float().eval().requires_grad_(False)


def resized(images: Pictures) -> Float[Tensor, "batch 3 64 64"]:
    """Pictures of any size at the network's size, whole and without regard to their proportions; antialiased."""
    if tuple(images.shape[-2:]) == (SIDE, SIDE):
        return images.float()
    return F.interpolate(images.float(), (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
