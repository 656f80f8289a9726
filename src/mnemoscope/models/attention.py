"""A UNet's attention to the tokens of its prompt: watched by attention processors, changed by hooks, both taken out again.

**Watching.** Chen et al., ICLR 2025, *Exploring Local Memorization in Diffusion Models via Bright Ending Attention*: at the last step,
cross-attention to the end token glows where a picture is memorized. The layers of highest resolution in the down path are averaged.
Zhao et al., ICML 2026 (GUARD): at the first step, memorized prompts spend their attention on few tokens. All layers down to the
middle of the network are averaged.

**Changing.** The logits a_ij = q_i·k_j/√d of place i and token j become f_j·a_ij + b_j: keys are multiplied by f_j as they leave their
projection, and b_j joins the attention mask. Whatever processor computes attention from them does so as before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import CannotAudit, UsageError
from ..types import precise

BLOCKS = ("down", "mid", "up")
"""Parts of a UNet, in the order in which ``scaled_attention`` is given them."""


class EndAttention:
    """Attention maps of the last forward that ran under :func:`end_token_attention`."""

    def __init__(self, ends: Sequence[int], latent_size: tuple[int, int]):
        self.ends, self.latent_size = torch.tensor(list(ends)), latent_size
        self._seen: dict[str, Tensor] = {}

    def add(self, layer: str, paid: Float[Tensor, "batch place token"]) -> None:
        """What each place of a layer pays to each token, mean over its heads; what it pays to the end is kept."""
        end = self.ends.to(paid.device)[:, None, None].expand(-1, paid.shape[1], 1)
        self._seen[layer] = paid.gather(2, end)[..., 0]

    def maps(self) -> Float[Tensor, "batch height width"]:
        """Mean over the layers of highest resolution, in their resolution; float32 or better, on the device."""
        most = max(seen.shape[1] for seen in self._seen.values())
        mean = torch.stack([seen for seen in self._seen.values() if seen.shape[1] == most]).mean(0)
        height, width = self.latent_size
        down = round((height * width / most) ** 0.5)
        return mean.unflatten(1, (-(-height // down), -(-width // down)))


class TokenAttention:
    """What each token was paid in the last forward that ran under :func:`token_attention`."""

    def __init__(self) -> None:
        self._seen: dict[str, Tensor] = {}

    def add(self, layer: str, paid: Float[Tensor, "batch place token"]) -> None:
        """What each place of a layer pays to each token, mean over its heads; the mean over places is kept."""
        self._seen[layer] = paid.mean(1)

    def mass(self) -> Float[Tensor, "batch token"]:
        """M_i, the mean over places, heads and layers; sums to 1 over the tokens. Float32 or better, on the device."""
        if not self._seen:
            raise UsageError("No attention seen: the model ran outside `with token_attention(…)`, or has not run yet.")
        return torch.stack(list(self._seen.values())).mean(0)


class _Watching:
    """An attention processor that does what another one does, and takes notes."""

    def __init__(self, inner: Any, name: str, notes: EndAttention | TokenAttention):
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
                self.notes.add(self.name, self._paid(attn, hidden_states, encoder_hidden_states, attention_mask))
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **options)

    def _paid(self, attn: Any, hidden: Tensor, text: Tensor, mask: Tensor | None) -> Float[Tensor, "batch place token"]:
        """softmax(q kᵀ/√d + mask), mean over heads; the mask is ``[batch, 1, token]``."""
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        query, key = (
            part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in (attn.to_q(hidden), attn.to_k(text))
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        logits = precise(query) @ precise(key).transpose(2, 3) * attn.scale
        return (logits if mask is None else logits + mask[:, None]).softmax(3).mean(1)


def _cross_attention(unet: Any, *blocks: str) -> dict[str, Any]:
    """The UNet's cross-attention layers, those of ``blocks`` only, by name."""
    return {
        name: module
        for name, module in unet.named_modules()
        if name.split("_")[0] in blocks and getattr(module, "is_cross_attention", False)
    }


@contextmanager
def _watched(layers: dict[str, Any], notes: EndAttention | TokenAttention) -> Iterator[None]:
    """Layers take notes while it is open; the processors that were there are put back however the block ends."""
    before = {name: layer.processor for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.set_processor(_Watching(before[name], name, notes))
        yield
    finally:
        for name, layer in layers.items():
            layer.set_processor(before[name])


@contextmanager
def end_token_attention(unet: Any, ends: Sequence[int], latent_size: tuple[int, int]) -> Iterator[EndAttention]:
    """While it is open, forwards of the UNet leave their attention to each sample's end token; their output stays as it is.

    Args:
        unet: A conditional UNet of diffusers.
        ends: Position of the end token of each row of the batch.
        latent_size: Height and width of the latents.

    The processors that were there are put back however the block ends.
    """
    notes = EndAttention(ends, latent_size)
    with _watched(_cross_attention(unet, "down"), notes):
        yield notes


@contextmanager
def token_attention(unet: Any) -> Iterator[TokenAttention]:
    """While it is open, forwards of the UNet leave what its down path and middle pay to each token; their output stays as it is.

    The processors that were there are put back however the block ends.
    """
    notes = TokenAttention()
    with _watched(_cross_attention(unet, "down", "mid"), notes):
        yield notes


@contextmanager
def scaled_attention(unet: Any, change: Float[Tensor, "batch block two token"]) -> Iterator[None]:
    """While it is open, this thread's forwards of the UNet pay other attention to the tokens of their prompts.

    Args:
        unet: A conditional UNet of diffusers: a target's, or that of a pipeline of your own, whose batch with classifier-free guidance
            is [without prompts; with prompts].
        change: Factor and bias of the logits, ``[batch, block, 2, token]``, blocks as in :data:`BLOCKS`; a bias may be -∞ where
            some other token of the row is left. Factor 1 and bias 0 leave a row as it is, up to float rounding.

    Works on the layers' own processors, by hooks that are gone however the block ends.

    Raises:
        CannotAudit: the UNet has no cross-attention, or its projections are fused.
    """
    with ExitStack() as stack:
        layers = _cross_attention(unet, *BLOCKS)
        if not layers:
            raise CannotAudit(f"{type(unet).__name__} has no cross-attention to a prompt: use a text-to-image model.")
        for name, layer in layers.items():
            if getattr(layer, "fused_projections", False):
                raise CannotAudit(
                    f"{name} makes its keys and values in one: call unfuse_qkv_projections() before its attention is changed."
                )
            factor, bias = change[:, BLOCKS.index(name.split("_")[0])].unbind(1)
            one = _Scaling(factor, bias)
            stack.callback(_keys(layer).register_forward_hook(one.scale_keys).remove)
            stack.callback(layer.register_forward_pre_hook(one.add_bias, with_kwargs=True).remove)
        yield


def _keys(layer: Any) -> Any:
    """The last module that a layer's keys of the prompt pass through."""
    added = getattr(layer, "add_k_proj", None)  # where keys of the prompt join keys of the picture itself
    return next(module for module in (layer.norm_k, added, layer.to_k) if module is not None)


class _Scaling:
    """The two hooks of one layer. Other threads run the same modules and must not notice."""

    def __init__(self, factor: Float[Tensor, "batch token"], bias: Float[Tensor, "batch token"]):
        self.factor, self.bias, self.thread = factor, bias, threading.get_ident()

    def scale_keys(self, module: Any, args: Any, keys: Tensor) -> Tensor | None:
        """f_j k_j, of keys ``[batch, (head,) token, dim]``."""
        if threading.get_ident() != self.thread:
            return None
        rows = self._rows(self.factor, len(keys)).to(keys)
        return keys * rows.view(len(rows), *[1] * (keys.ndim - 3), -1, 1)

    def add_bias(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """b_j on top of the mask that there is, ``[batch, 1, token]``, one for all places."""
        if threading.get_ident() != self.thread:
            return None
        given = dict(zip(("hidden_states", "encoder_hidden_states", "attention_mask"), args, strict=False)) | kwargs
        hidden, mask = given["hidden_states"], given.get("attention_mask")
        bias = self._rows(self.bias, len(hidden))[:, None].to(hidden)
        return (), given | {"attention_mask": bias if mask is None else mask + bias}

    def _rows(self, change: Float[Tensor, "rows token"], batch: int) -> Float[Tensor, "rows token"]:
        if len(change) != batch:
            raise UsageError(
                f"changes of attention for {len(change)} rows, and the UNet is given {batch}: one per row."
            )
        return change
