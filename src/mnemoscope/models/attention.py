"""What a UNet's picture pays to the end of its prompt: attention processors that watch, put in and taken out again.

Chen et al., ICLR 2025, *Exploring Local Memorization in Diffusion Models via Bright Ending Attention*: at the last step, cross-attention
to the end token glows where a picture is memorized. The layers of highest resolution in the down path are averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..types import precise


class EndAttention:
    """Attention maps of the last forward that ran under :func:`end_token_attention`."""

    def __init__(self, ends: Sequence[int], latent_size: tuple[int, int]):
        self.ends, self.latent_size = torch.tensor(list(ends)), latent_size
        self._seen: dict[str, Tensor] = {}

    def add(self, layer: str, seen: Float[Tensor, "batch place"]) -> None:
        """Attention to the end token at each place of a layer, mean over its heads."""
        self._seen[layer] = seen

    def maps(self) -> Float[Tensor, "batch height width"]:
        """Mean over the layers of highest resolution, in their resolution; float32 or better, on the device."""
        most = max(seen.shape[1] for seen in self._seen.values())
        mean = torch.stack([seen for seen in self._seen.values() if seen.shape[1] == most]).mean(0)
        height, width = self.latent_size
        down = round((height * width / most) ** 0.5)
        return mean.unflatten(1, (-(-height // down), -(-width // down)))


class _Watching:
    """An attention processor that does what another one does, and takes notes."""

    def __init__(self, inner: Any, name: str, notes: EndAttention):
        self.inner, self.name, self.notes = inner, name, notes

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            with torch.no_grad():
                self.notes.add(self.name, self._to_end(attn, hidden_states, encoder_hidden_states))
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **options)

    def _to_end(self, attn: Any, hidden: Tensor, text: Tensor) -> Float[Tensor, "batch place"]:
        """softmax(q kᵀ/√d) at each sample's end token, mean over heads."""
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        query, key = (
            part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in (attn.to_q(hidden), attn.to_k(text))
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        paid = (precise(query) @ precise(key).transpose(2, 3) * attn.scale).softmax(3).mean(1)
        end = self.notes.ends.to(paid.device)[:, None, None].expand(-1, paid.shape[1], 1)
        return paid.gather(2, end)[..., 0]


@contextmanager
def end_token_attention(unet: Any, ends: Sequence[int], latent_size: tuple[int, int]) -> Iterator[EndAttention]:
    """While it is open, forwards of the UNet leave their attention to each sample's end token; their output stays as it is.

    Args:
        unet: A conditional UNet of diffusers.
        ends: Position of the end token of each row of the batch.
        latent_size: Height and width of the latents.

    The processors that were there are put back however the block ends.
    """
    layers = {
        name: module
        for name, module in unet.down_blocks.named_modules()
        if getattr(module, "is_cross_attention", False) and hasattr(module, "set_processor")
    }
    before = {name: layer.processor for name, layer in layers.items()}
    notes = EndAttention(ends, latent_size)
    try:
        for name, layer in layers.items():
            layer.set_processor(_Watching(before[name], name, notes))
        yield notes
    finally:
        for name, layer in layers.items():
            layer.set_processor(before[name])
