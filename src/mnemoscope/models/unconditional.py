"""Models without text: pixel DDPMs, and diffusion in the latents of a KL or VQ autoencoder.

Ho et al. 2020, *Denoising Diffusion Probabilistic Models*; sampled with DDIM, η = 0 (Song et al. 2021).
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from ..errors import CannotAudit
from ..types import Latents
from .base import Condition, Piece
from .folders import computing
from .host import DiffusersTarget, Origin


class Unconditional(DiffusersTarget):
    """A DDPM, DDIM or LDM pipeline as a :class:`~mnemoscope.models.base.Target`, in ε-space.

    Args:
        pipe: The pipeline: ``unet`` and ``scheduler``, and ``vqvae`` (VQModel or AutoencoderKL) for a latent model.
        sampler: ``"ddim"`` or ``"own"``; see :class:`~mnemoscope.models.host.DiffusersTarget`.
        resolution: Side in pixels, or (height, width).
        origin: What a loader knows about the model.

    Raises:
        CannotAudit: the model is class-conditional, or is not a discrete-time diffusion model.
    """

    kind = "unconditional"
    pipelines = frozenset({"DDPMPipeline", "DDIMPipeline", "LDMPipeline"})
    has_text = False
    guidance = 1.0

    def __init__(
        self,
        pipe: Any,
        *,
        sampler: str = "ddim",
        resolution: int | tuple[int, int] | None = None,
        origin: Origin | None = None,
    ):
        super().__init__(pipe, sampler=sampler, resolution=resolution, origin=origin)
        if (classes := self.unet.config.num_class_embeds) is not None:
            raise CannotAudit(
                f"{self.name} is conditioned on {classes} classes; only text-to-image and unconditional models are supported so far."
            )
        if self.vae is None and self.unet.config.in_channels not in (1, 3):
            raise CannotAudit(
                f"{self.name} works on {self.unet.config.in_channels} channels and has no autoencoder to turn them into a picture; "
                f"load the whole pipeline."
            )

    @staticmethod
    def guided(pipe: Any) -> bool:
        """Never: there is no condition to drop."""
        return False

    def _size_unit(self) -> int:
        # Each halving inside the UNet must come out even, or its skip connections do not fit.
        return self.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def _no_text(self) -> NoReturn:
        raise CannotAudit(f"{self.name} takes no text; use a measure of images instead of prompts.")

    def encode(self, prompts: list[str]) -> Condition:
        """Not possible: the model takes no text."""
        self._no_text()

    def tokens(self, prompt: str) -> list[str]:
        """Not possible: the model takes no text."""
        self._no_text()

    def pieces(self, prompt: str) -> list[Piece]:
        """Not possible: the model takes no text."""
        self._no_text()

    def dropped(self, prompt: str) -> int:
        """Not possible: the model takes no text."""
        self._no_text()

    def output(self, x: Latents, t: Tensor, cond: Condition | None = None) -> Latents:
        """The UNet's raw output, in its own dtype; differentiable in ``x``."""
        if cond is not None:
            self._no_text()
        self.forwards += len(x)
        (seen,) = self._here(x)
        with computing(self.name):
            out = self.unet(seen, t, return_dict=False)[0]
        # Models that learn their variance predict it in a second half of the channels.
        return out[:, : x.shape[1]]

    def _encode(self, pixels: Tensor) -> Tensor:
        if self.vae is not None:
            return super()._encode(pixels)
        return pixels if self.latent_shape[0] == 3 else pixels.mean(1, keepdim=True)

    def _decode(self, z: Tensor) -> Tensor:
        if self.vae is not None:
            return super()._decode(z)
        return z.expand(-1, 3, -1, -1) if z.shape[1] == 1 else z
