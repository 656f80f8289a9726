"""Does a picture show what its caption says? Image–text scores: CLIP's, and an offline one for the bundled world.

A mitigation that turns every picture into noise copies nothing, so copying is only half of the story; fidelity to the prompt is
the other. The numbers of two scores are not comparable, and none of them is about copying.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .. import plugins
from ..errors import UsageError
from ..models.identity import hash_tensors
from ..records.files import hash_file
from ..types import PerSample
from .base import Pictures
from .fingerprint import ASSETS, FingerprintNetwork, resized, with_weights

__all__ = ["CLIP", "CaptionScore", "WorldCaptions", "WorldCaptionsNetwork", "build"]


@runtime_checkable
class CaptionScore(Protocol):
    """How well pictures fit captions, pair by pair; higher is better, in [−1, 1]."""

    @property
    def name(self) -> str:
        """Different for whatever gives different numbers."""
        ...

    def identity(self) -> dict[str, Any]:
        """What its numbers depend on, as plain values."""
        ...

    def __call__(self, images: Pictures, captions: Sequence[str]) -> PerSample:
        """One number per picture in [0, 1] and its caption."""
        ...


def build(name: str, options: dict[str, Any] | None = None) -> CaptionScore:
    """An installed score from plain values: :func:`mnemoscope.plugins.build`."""
    return plugins.build("caption_score", name, options)


class CLIP:
    """Cosine of CLIP's image and text embeddings (Radford et al., ICML 2021), not scaled and not clipped at 0.

    Args:
        model: Hub id or folder of a CLIP model with its tokenizer, safetensors only.
        device: Where it runs; default: where the pictures are.
    """

    MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, model: str = "openai/clip-vit-large-patch14", device: str | None = None):
        self.model, self.device = model, device
        with warnings.catch_warnings():  # about image processors, which are not used
            warnings.simplefilter("ignore")
            from transformers import AutoTokenizer, CLIPModel
        try:
            self._network = CLIPModel.from_pretrained(model, use_safetensors=True).eval().requires_grad_(False)
            self._tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        except (OSError, ValueError) as e:
            raise UsageError(
                f"{model} cannot be loaded as a CLIP model ({' '.join(str(e).split())[:160]}); name a hub id, or a folder with "
                f"safetensors weights and a tokenizer."
            ) from e
        self._hash = hash_tensors(self._network.state_dict().items())

    @property
    def name(self) -> str:
        """The model, and the beginning of its weights' hash."""
        return f"clip:{Path(self.model).name}-{self._hash[:6]}"

    def identity(self) -> dict[str, Any]:
        """What the numbers depend on."""
        side = self._network.config.vision_config.image_size
        rule = f"short side {side}, bicubic, antialiased, center crop, CLIP statistics"
        return {"score": "clip", "weights": f"sha256:{self._hash}", "preprocessing": rule}

    def __call__(self, images: Pictures, captions: Sequence[str]) -> PerSample:
        """Cosine similarities, ``[batch]``, float32."""
        _require_pairs(images, captions)
        device = torch.device(self.device) if self.device else images.device
        network = self._network.to(device)
        limit = network.config.text_config.max_position_embeddings
        with torch.no_grad():
            pixels = network.vision_model(pixel_values=self._prepared(images.to(device))).pooler_output
            tokens = self._tokenizer(
                list(captions), padding="max_length", truncation=True, max_length=limit, return_tensors="pt"
            ).to(device)
            texts = network.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
            seen, said = network.visual_projection(pixels), network.text_projection(texts)
        return F.cosine_similarity(seen.float(), said.float()).to(images.device)

    def _prepared(self, images: Pictures) -> Tensor:
        side = self._network.config.vision_config.image_size
        scale = side / min(images.shape[-2:])
        height, width = (max(side, round(n * scale)) for n in images.shape[-2:])
        x = F.interpolate(images.float(), (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (height - side) // 2, (width - side) // 2
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (self.MEAN, self.STD))
        return (x[..., top : top + side, left : left + side] - mean) / std


class WorldCaptionsNetwork(nn.Module):
    """Two towers into one space: the convolutions of the fingerprint, smaller, and the mean of hashed words' vectors."""

    WORDS = 4096

    def __init__(self, widths: tuple[int, int, int, int] = (24, 48, 96, 128), dim: int = 96):
        super().__init__()
        self.picture = FingerprintNetwork(widths, dim)
        self.words = nn.EmbeddingBag(self.WORDS, dim, mode="mean")
        self.project = nn.Linear(dim, dim)

    def texts(self, captions: Sequence[str]) -> Float[Tensor, "n dim"]:
        """Unit vectors of captions: a bag of their words, lower case, order not kept."""
        numbers = [
            [zlib.crc32(w.encode()) % self.WORDS for w in re.findall(r"\w+", c.lower())] or [0] for c in captions
        ]
        starts = torch.tensor([0, *map(len, numbers[:-1])]).cumsum(0)
        device = self.words.weight.device
        bags = self.words(torch.tensor([n for line in numbers for n in line], device=device), starts.to(device))
        return F.normalize(self.project(F.silu(bags)), dim=1)


class WorldCaptions:
    """The bundled world's own image–text score: a small network trained by contrast on its pictures and captions.

    It knows this world's words and nothing else: a judge for experiments on the bundled models, not a CLIP score. How often
    it finds the right caption for pictures in a style it was not shown: ``docs/descriptors.md``.
    """

    def __init__(self, weights: str | None = None):
        self.weights = weights
        self._file = Path(weights) if weights else ASSETS / "world-captions.safetensors"
        if not self._file.is_file():
            raise UsageError(f"{self._file} does not exist; name a .safetensors file of world-captions weights.")

    @property
    def name(self) -> str:
        """Ends with the beginning of its weights' hash."""
        return f"world-captions-{hash_file(self._file)[:6]}"

    def identity(self) -> dict[str, Any]:
        """What the numbers depend on."""
        return {"score": "world-captions", "weights": f"sha256:{hash_file(self._file)}", "preprocessing": "64 x 64"}

    def __call__(self, images: Pictures, captions: Sequence[str]) -> PerSample:
        """Cosine similarities, ``[batch]``, float32."""
        _require_pairs(images, captions)
        return (self.pictures(images) * self.texts(captions).to(images.device)).sum(1)

    def pictures(self, images: Pictures) -> Float[Tensor, "batch dim"]:
        """Unit vectors of pictures."""
        with torch.no_grad():
            return _loaded(self._file, images.device).picture(resized(images))

    def texts(self, captions: Sequence[str]) -> Float[Tensor, "n dim"]:
        """Unit vectors of captions, on the CPU."""
        with torch.no_grad():
            return _loaded(self._file, torch.device("cpu")).texts(captions)


@lru_cache(maxsize=8)
def _loaded(file: Path, device: torch.device) -> WorldCaptionsNetwork:
    return with_weights(WorldCaptionsNetwork(), file, "world-captions").to(device)


def _require_pairs(images: Pictures, captions: Sequence[str]) -> None:
    if len(images) != len(captions):
        raise UsageError(f"{len(images)} pictures for {len(captions)} captions; give one caption per picture.")
