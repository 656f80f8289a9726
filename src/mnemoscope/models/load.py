"""A hub id, a folder, a file or a ready pipeline → a Target."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import interrupts
from ..bounds import GUIDANCE, LORA_SCALE, SIDE, shown
from ..errors import CannotAudit, UnknownName, UsageError
from . import sources
from .base import Target
from .host import DiffusersTarget, Origin
from .sources import DiffusionPipeline, LoRA
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3
from .unconditional import Unconditional

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float64": torch.float64,
}

HUB = frozenset({
    "cache_dir", "config", "device_map", "disable_mmap", "feature_extractor",
    "force_download", "image_encoder", "load_connected_pipeline", "low_cpu_mem_usage", "max_memory",
    "mirror", "offload_folder", "offload_state_dict", "original_config", "proxies",
    "quantization_config", "requires_safety_checker", "safety_checker", "scheduler", "subfolder",
    "text_encoder", "text_encoder_2", "text_encoder_3", "token", "tokenizer", "tokenizer_2", "tokenizer_3",
    "transformer", "use_safetensors", "vae", "vqvae",
})  # fmt: skip
"""Keywords that are handed to diffusers unread. Others are refused: diffusers only logs them, and a misspelt ``unet`` would audit
the base model."""

UNSUPPORTED = {
    "Flux": "its guidance is distilled, so one call makes no prediction without the prompt",
    "LatentConsistency": "it was distilled with guidance inside and makes no prediction without the prompt",
    "StableDiffusionXL": "Stable Diffusion XL comes later",
    "StableDiffusion3Inpaint": "inpainting models need a picture as input",
    "StableDiffusion3ControlNet": "its denoiser needs a picture beside the prompt",
    "StableDiffusionInpaint": "inpainting models need a picture as input",
}
"""Beginnings of pipeline class names that people will try, and why they cannot be audited yet."""


def load(
    source: Any,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    unet: str | Path | nn.Module | None = None,
    lora: LoRA = None,
    revision: str | None = None,
    variant: str | None = None,
    guidance: float | None = None,
    resolution: int | tuple[int, int] | None = None,
    sampler: str | None = None,
    local_files_only: bool | None = None,
    torch_dtype: str | torch.dtype | None = None,
    **hub: Any,
) -> Target:
    """Open a model for auditing.

    Args:
        source: ``"demo"`` or ``"demo-unconditional"`` (the bundled models), a hub id, a pipeline folder, a single-file
            ``.safetensors`` checkpoint, a ready diffusers pipeline (its modules are shared and frozen), or a Target.
        dtype: Precision, by name or as torch.dtype. Default: float32 on the CPU, float16 on a GPU that is fast at it. The
            target's ``dtype_reason`` says which and why.
        device: Default: the first GPU, or the CPU.
        unet: A fine-tuned denoiser that replaces the pipeline's own UNet: folder, hub id or module.
        lora: LoRA files or hub ids to load and activate: one, several, or ``{file: scale}``.
        revision: Branch, tag or commit on the hub.
        variant: For instance ``"fp16"``.
        guidance: Guidance scale; default is what ``mnemoscope.json`` in the model's folder recommends, else 7.5 (Stable
            Diffusion 3: 7).
        resolution: Side in pixels, or (height, width); default is the size the model was trained on.
        sampler: ``"ddim"`` (default; deterministic; of a rectified flow: Euler's steps) or ``"own"`` (the checkpoint's scheduler).
        local_files_only: Never ask the hub.
        torch_dtype: The older name of ``dtype``.
        **hub: Handed to diffusers' ``from_pretrained`` (or ``from_single_file``) unread.

    Returns:
        The adapter that accepts the model's pipeline class: :class:`StableDiffusion`, :class:`StableDiffusion3`,
        :class:`Unconditional`, or one that a plugin registered under the entry-point group ``mnemoscope.targets``.

    Raises:
        CannotAudit: the model is incomplete, pickled, not in the cache, or of a kind that cannot be audited; or its folder names
            other classes or programs than those that are installed, or numbers that do not fit its weights (:mod:`.folders`).
        UsageError: an argument makes no sense for this source.
    """
    _refuse_unknown(hub, load)
    _require_numbers(guidance, resolution)
    options = {
        k: v for k, v in {"guidance": guidance, "resolution": resolution, "sampler": sampler}.items() if v is not None
    }
    wanted = torch_dtype if dtype is None else dtype
    changes = {"dtype": wanted, "device": device, "unet": unet, "lora": lora, "revision": revision, "variant": variant}
    if isinstance(source, DiffusionPipeline):
        _as_given(source, {**changes, **hub})
        pipe: Any = source
        name = _short(pipe.name_or_path) or type(pipe).__name__
        return build(pipe, Origin(name=name), **options)
    if isinstance(source, Target):
        _as_given(source, {**changes, **options, **hub})
        return source
    if not isinstance(source, str | Path):
        raise UsageError(
            f"a {type(source).__name__} is not a model: give a hub id, a folder, a .safetensors file or a pipeline."
        )

    pipe, origin, recommended = open_pipeline(
        source, dtype=wanted, device=device, unet=unet, lora=lora, revision=revision, variant=variant,
        local_files_only=local_files_only, **hub,
    )  # fmt: skip
    return build(pipe, origin, **{**recommended, **options})


def _require_numbers(guidance: Any, resolution: Any) -> None:
    """Refuse numbers that no model has, before gigabytes are read for them."""
    if guidance is not None:
        GUIDANCE.judge("guidance", guidance)
    if resolution is not None:
        sides = resolution if isinstance(resolution, (list, tuple)) else [resolution]
        if len(sides) > 2 or not sides or not all(map(SIDE.admits, sides)):
            raise UsageError(
                f"resolution is {shown(resolution)}, and must be {SIDE.words}, or a list of two: height and width."
            )


@interrupts.loading()
def open_pipeline(
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    unet: str | Path | nn.Module | None = None,
    lora: LoRA = None,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool | None = None,
    **hub: Any,
) -> tuple[Any, Origin, dict[str, Any]]:
    """The diffusers pipeline of a bundled model, hub id, folder or file, for whoever runs it by its own methods.

    The arguments are those of :func:`load`.

    Returns:
        The pipeline on its device; what is known of where it came from; what its maker recommends, as options of :func:`build`.

    Raises:
        CannotAudit: as :func:`load`.
        UsageError: as :func:`load`.
    """
    for file, scale in lora.items() if isinstance(lora, Mapping) else ():
        LORA_SCALE.judge(f"the scale of the LoRA {file}", scale)
    _refuse_unknown(hub, open_pipeline)
    place = _device(device)
    precision, reason = _precision(dtype, place)
    where = {"revision": revision, "variant": variant, "local_files_only": local_files_only}
    hub |= {sources.DTYPE_KEY: precision}
    path, origin = sources.locate(str(source), where, hub)
    adapter = adapter_for(sources.pipeline_class(path))
    if unet is not None and adapter.denoiser != "unet":
        raise UsageError(
            f"unet={unet}: {origin.name} has a {adapter.denoiser} in its place; give that as {adapter.denoiser}=."
        )
    origin = replace(origin, dtype_reason=reason)
    if unet is not None:
        hub["unet"], unet_files = sources.open_unet(unet, precision, where, hub)
        origin = replace(origin, files=unet_files)
    pipe, known = sources.open_pipeline(path, variant, hub)
    origin = replace(origin, files={**known, **origin.files})
    pipe.to(place)
    if lora is not None:
        origin = replace(origin, adapter_files=sources.add_lora(pipe, lora, where, hub))
    return pipe, origin, sources.recommended(path)


def build(pipe: Any, origin: Origin, **options: Any) -> Target:
    """The pipeline in the adapter that accepts it."""
    adapter = adapter_for(type(pipe))
    if "guidance" in options and not adapter.has_text:
        raise UsageError(
            f"guidance={options['guidance']:g}: {origin.name} takes no text, so there is nothing to guide; leave it out."
        )
    return adapter(pipe, origin=origin, **options)


def adapters() -> Iterator[type[DiffusersTarget]]:
    """Adapter classes: the built-in ones, then those that plugins register. Targets that are no adapters are passed over."""
    yield StableDiffusion
    yield StableDiffusion3
    yield Unconditional
    for entry in entry_points(group="mnemoscope.targets"):
        if not entry.value.startswith("mnemoscope."):
            cls = entry.load()
            if hasattr(cls, "accepts"):
                yield cls


def adapter_for(pipeline: str | type) -> type[DiffusersTarget]:
    """The adapter for a pipeline class (or one it derives from) or its name.

    Raises:
        CannotAudit: nobody accepts it.
    """
    names = [pipeline] if isinstance(pipeline, str) else [c.__name__ for c in pipeline.__mro__]
    for name in names:
        for adapter in adapters():
            if adapter.accepts(name):
                return adapter
    why = next((reason for start, reason in UNSUPPORTED.items() if names[0].startswith(start)), None)
    known = sorted(set().union(*(adapter.pipelines for adapter in adapters())))
    raise CannotAudit(f"{names[0]} cannot be audited yet{f': {why}' if why else ''}. Supported: {', '.join(known)}.")


def _refuse_unknown(hub: Mapping[str, Any], function: Callable[..., Any]) -> None:
    if unknown := sorted(hub.keys() - HUB):
        own = set(inspect.signature(function).parameters) - {"source", "hub"}
        raise UnknownName(f"option of {function.__name__}", unknown[0], own | HUB)


# Precision and place


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UsageError(
            f"device {str(device)!r} cannot be used here ({sources.first_line(e)}); use cpu, or leave it out."
        ) from e
    return place


def _precision(dtype: str | torch.dtype | None, device: torch.device) -> tuple[torch.dtype, str]:
    """The precision to load in, and why, in words."""
    if dtype is not None:
        name = str(dtype).removeprefix("torch.").lower()
        if name not in DTYPES:
            raise UnknownName("dtype", name, DTYPES)
        return DTYPES[name], f"{str(DTYPES[name]).removeprefix('torch.')}: asked for"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
        # bfloat16's 8 bits would add a rounding floor of about 0.27 to a 16,384-element norm; float16's is negligible.
        return torch.float16, "float16: fast on this GPU, and finer than bfloat16, whose rounding blurs low scores"
    return (
        torch.float32,
        f"float32: half precision gains nothing on {'this GPU' if device.type == 'cuda' else device.type}",
    )


def _as_given(source: Any, changes: Mapping[str, Any]) -> None:
    """A model that is already in memory is audited as it is."""
    asked = [k for k, v in changes.items() if v is not None]
    if asked:
        raise UsageError(
            f"{asked[0]}={changes[asked[0]]}: a {type(source).__name__} in memory is audited as it is; change it before."
        )


def _short(name_or_path: str | None) -> str:
    """A folder's last part; a hub id whole."""
    path = Path(name_or_path or "")
    return path.name if path.exists() else str(name_or_path or "")
