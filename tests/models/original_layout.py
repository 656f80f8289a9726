"""A tiny pipeline as the single file that the original Stable Diffusion code wrote (for a UNet with one layer per block)."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

TIME = {"linear_1": "0", "linear_2": "2"}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def to_single_file(pipe: Any) -> dict[str, Tensor]:
    """All tensors under their original names."""
    found = {f"model.diffusion_model.{_unet(k)}": v for k, v in pipe.unet.state_dict().items()}
    blocks = len(pipe.vae.config.block_out_channels)
    for key, value in pipe.vae.state_dict().items():
        name = _vae(key, blocks)
        square = re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight", name)
        found[f"first_stage_model.{name}"] = value[:, :, None, None] if square else value
    for key, value in pipe.text_encoder.state_dict().items():
        inner = key if key.startswith("text_model.") else f"text_model.{key}"
        found[f"cond_stage_model.transformer.{inner}"] = value
    return {k: v.contiguous().clone() for k, v in found.items()}


def _unet(key: str) -> str:
    """diffusers' UNet name → the original's. Each level has one layer and, but for the last, one sampler: stride 2."""
    part, _, rest = key.partition(".")
    if part == "time_embedding":
        layer, _, kind = rest.partition(".")
        return f"time_embed.{TIME[layer]}.{kind}"
    if part in ENDS:
        return f"{ENDS[part]}.{rest}"
    if part == "mid_block":
        kind, i, rest = rest.split(".", 2)
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(i)}.{_inside(kind, rest)}"
    level, kind, i, rest = rest.split(".", 3)
    if part == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{2 * int(level) + 2}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{2 * int(level) + int(i) + 1}.{int(kind == 'attentions')}.{_inside(kind, rest)}"
    if kind == "upsamplers":
        return f"output_blocks.{2 * int(level) + 1}.1.{rest}"
    return f"output_blocks.{2 * int(level) + int(i)}.{int(kind == 'attentions')}.{_inside(kind, rest)}"


def _inside(kind: str, rest: str) -> str:
    if kind != "resnets":
        return rest
    layer, _, leaf = rest.partition(".")
    return f"{RESNET[layer]}.{leaf}"


def _vae(key: str, blocks: int) -> str:
    """diffusers' autoencoder name → the original's, whose decoder counts its levels from the other end."""
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"mid_block\.attentions\.0\.(.*)\.(\w+)$", lambda m: f"mid.attn_1.{VAE_ATTENTION[m[1]]}.{m[2]}", key)
    key = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{blocks - 1 - int(m[1])}.block.", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key)
    return key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
