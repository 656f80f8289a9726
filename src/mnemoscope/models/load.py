"""A hub id, a folder, a file or a ready pipeline → a Target."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from ..errors import CannotAudit, UnknownName, UsageError
from .base import Target
from .host import DiffusersTarget, Origin
from .identity import PICKLES, weight_files
from .stable_diffusion import StableDiffusion
from .unconditional import Unconditional

BUNDLED = {"demo": "text-to-image", "demo-unconditional": "unconditional"}
"""Names of the models that come with mnemoscope, and their folders under ``demo/assets``."""

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

UNSUPPORTED = {
    "Flux": "its guidance is distilled, so one call makes no prediction without the prompt",
    "LatentConsistency": "it was distilled with guidance inside and makes no prediction without the prompt",
    "StableDiffusionXL": "Stable Diffusion XL comes later",
    "StableDiffusion3": "rectified-flow models come later",
    "StableDiffusionInpaint": "inpainting models need a picture as input",
}
"""Beginnings of pipeline class names that people will try, and why they cannot be audited yet."""

LoRA: TypeAlias = str | Path | Sequence[str | Path] | Mapping[str, float] | None

_DTYPE_KEY = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_OPENING = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError)


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
        unet: A fine-tuned denoiser that replaces the pipeline's own: folder, hub id or module.
        lora: LoRA files or hub ids to load and activate: one, several, or ``{file: scale}``.
        revision: Branch, tag or commit on the hub.
        variant: For instance ``"fp16"``.
        guidance: Guidance scale; default 7.5.
        resolution: Side in pixels, or (height, width); default is the size the model was trained on.
        sampler: ``"ddim"`` (default; deterministic) or ``"own"`` (the checkpoint's scheduler).
        local_files_only: Never ask the hub.
        torch_dtype: The older name of ``dtype``.
        **hub: Handed to diffusers' ``from_pretrained`` (or ``from_single_file``) unread.

    Returns:
        The adapter that accepts the model's pipeline class: :class:`StableDiffusion`, :class:`Unconditional`, or one that a
        plugin registered under the entry-point group ``mnemoscope.targets``.

    Raises:
        CannotAudit: the model is incomplete, pickled, not in the cache, or of a kind that cannot be audited.
        UsageError: an argument makes no sense for this source.
    """
    options = {k: v for k, v in {"guidance": guidance, "resolution": resolution, "sampler": sampler}.items() if v is not None}
    wanted = torch_dtype if dtype is None else dtype
    changes = {"dtype": wanted, "device": device, "unet": unet, "lora": lora, "revision": revision, "variant": variant}
    if isinstance(source, DiffusionPipeline):
        _as_given(source, {**changes, **hub})
        return build(source, Origin(name=_short(source.name_or_path) or type(source).__name__), **options)
    if isinstance(source, Target):
        _as_given(source, {**changes, **options, **hub})
        return source
    if not isinstance(source, str | Path):
        raise UsageError(f"a {type(source).__name__} is not a model: give a hub id, a folder, a .safetensors file or a pipeline.")

    place = _device(device)
    precision, reason = _precision(wanted, place)
    where = {"revision": revision, "variant": variant, "local_files_only": local_files_only}
    hub |= {_DTYPE_KEY: precision}
    path, origin = _locate(str(source), where, hub)
    origin = replace(origin, dtype_reason=reason)
    if unet is not None:
        hub["unet"], unet_files = _open_unet(unet, precision, where, hub)
        origin = replace(origin, files={**origin.files, **unet_files})
    with _quiet(), _opening(origin.name):
        pipe, known = (_open_file if path.is_file() else _open_folder)(path, variant, hub)
    origin = replace(origin, files={**known, **origin.files})
    pipe.to(place)
    if lora is not None:
        origin = replace(origin, adapter_files=_add_lora(pipe, lora, where, hub))
    return build(pipe, origin, **options)


def build(pipe: DiffusionPipeline, origin: Origin, **options: Any) -> Target:
    """The pipeline in the adapter that accepts it."""
    adapter = adapter_for(type(pipe))
    if "guidance" in options and not adapter.has_text:
        raise UsageError(f"guidance={options['guidance']:g}: {origin.name} takes no text, so there is nothing to guide; leave it out.")
    return adapter(pipe, origin=origin, **options)


def adapters() -> Iterator[type[DiffusersTarget]]:
    """Adapter classes: the built-in ones, then those that plugins register. Targets that are no adapters are passed over."""
    yield StableDiffusion
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


# Where the model is


def _locate(source: str, where: Mapping[str, Any], hub: Mapping[str, Any]) -> tuple[Path, Origin]:
    """A local file or folder for ``source``, downloaded if need be."""
    if source in BUNDLED:
        path = Path(str(files("mnemoscope"))) / "demo" / "assets" / BUNDLED[source]
        if not path.is_dir():
            raise CannotAudit(f"the bundled model {source!r} is missing from this installation ({path}); reinstall mnemoscope.")
        return path, Origin(name=source, source=source)
    path = Path(source).expanduser()
    if path.exists():
        return path, Origin(name=path.resolve().name, source=source)
    if path.suffix in PICKLES | {".safetensors"} or source[0] in "./~" or source.count("/") > 1:
        raise CannotAudit(f"there is no file or folder {source}; check the path.")
    if not _HUB_ID.fullmatch(source):
        raise UnknownName("folder or bundled model", source, BUNDLED)
    path = _download(source, DiffusionPipeline.download, {**where, "use_safetensors": True, **_unneeded(), **hub})
    commit = path.name if path.parent.name == "snapshots" else where["revision"]
    return path, Origin(name=source, source=source, revision=commit)


def _unneeded() -> dict[str, None]:
    """Components that no audit needs: not downloaded, not loaded."""
    return {"safety_checker": None, "feature_extractor": None, "image_encoder": None}


def _download(source: str, fetch: Callable[..., Any], options: Mapping[str, Any]) -> Path:
    """A hub repository as a local folder; what goes wrong becomes one sentence."""
    keep = {k: v for k, v in options.items() if v is not None or k in _unneeded()}
    try:
        return Path(fetch(source, **keep))
    except GatedRepoError as e:
        raise CannotAudit(f"{source} is gated: accept its licence on its hub page, then run `hf auth login`.") from e
    except RepositoryNotFoundError as e:
        raise CannotAudit(f"there is no folder and no hub repository {source}; a private one needs `hf auth login`.") from e
    except RevisionNotFoundError as e:
        raise CannotAudit(f"{source} has no revision {options.get('revision')!r} on the hub.") from e
    except Exception as e:
        if "safetensors" in str(e):
            raise CannotAudit(f"{source} offers its weights as pickle only, which can run code when opened; use one with safetensors.") from e
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub was not to be asked"
        if not (constants.HF_HUB_OFFLINE or options.get("local_files_only")):
            offline = f"the hub did not answer ({_first_line(e)})"
        cache = options.get("cache_dir") or constants.HF_HUB_CACHE
        raise CannotAudit(f"{source} is not in the cache and {offline}. Looked in {cache}.") from e


# Opening it


def _open_folder(folder: Path, variant: str | None, hub: Mapping[str, Any]) -> tuple[DiffusionPipeline, dict[str, list[Path]]]:
    """The pipeline in a folder, and the weight files of each component that is loaded from there."""
    index = _index(folder)
    adapter_for(index["_class_name"])
    parameters = _parameters(index["_class_name"])
    skip = {k: None for k in _unneeded() if k in parameters and k not in hub}
    if "requires_safety_checker" in parameters:
        skip["requires_safety_checker"] = False  # type: ignore[assignment]
    known = {}
    for name, spec in index.items():
        if name.startswith("_") or name in hub or name in skip or not isinstance(spec, list) or spec[0] is None:
            continue
        if not (folder / name).is_dir():
            raise CannotAudit(f"{folder} has no {name}, which its model_index.json names; download or copy the model again, completely.")
        if (folder / name / "config.json").is_file():
            known[name] = weight_files(folder / name, variant)
    pipe = DiffusionPipeline.from_pretrained(str(folder), **{"variant": variant, "use_safetensors": True, **skip, **hub})
    return pipe, known


def _index(folder: Path) -> dict[str, Any]:
    """``model_index.json``, or a sentence that says what the folder is instead."""
    try:
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
    except FileNotFoundError:
        kind = _config_class(folder)
        if kind in ("UNet2DConditionModel", "UNet2DModel"):
            raise CannotAudit(f"{folder} is a UNet alone: give the pipeline it belongs to, and this folder as unet=.") from None
        raise CannotAudit(f"{folder} is no pipeline folder: it has no model_index.json.") from None
    except ValueError as e:
        raise CannotAudit(f"{folder / 'model_index.json'} is damaged ({_first_line(e)}); download or copy it again.") from e
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise CannotAudit(f"{folder / 'model_index.json'} names no diffusers pipeline class; custom pipeline code is not run.")
    return index


def _parameters(pipeline: str) -> set[str]:
    return set(inspect.signature(getattr(diffusers, pipeline, DiffusionPipeline).__init__).parameters)


def _open_file(path: Path, variant: str | None, hub: Mapping[str, Any]) -> tuple[DiffusionPipeline, dict[str, list[Path]]]:
    """A single-file checkpoint in the original Stable Diffusion layout."""
    if path.suffix in PICKLES:
        raise CannotAudit(
            f"{path} is a pickle, which can run code when opened; ask its author for safetensors, or convert it in a sandbox with "
            f"safetensors.torch.save_file."
        )
    if path.suffix != ".safetensors":
        raise CannotAudit(f"{path} is no model: give a pipeline folder or a .safetensors checkpoint.")
    with safe_open(str(path), "pt") as file:
        keys = list(file.keys())
    if not any(key.startswith("cond_stage_model.") for key in keys):
        what = "looks like a LoRA: give it as lora=, beside its base model" if any("lora" in k for k in keys) else (
            "is not a Stable Diffusion 1 or 2 checkpoint (it has no cond_stage_model weights)"
        )
        raise CannotAudit(f"{path} {what}.")
    try:
        pipe = StableDiffusionPipeline.from_single_file(str(path), **{"safety_checker": None, "feature_extractor": None, **hub})
    except Exception as e:
        if "config" in hub:
            raise
        raise CannotAudit(
            f"{path} holds weights only, and its configuration is neither in the cache nor to be had from the hub; give a local "
            f"pipeline folder of the same family as config=."
        ) from e
    return pipe, {"": [path]}


def _open_unet(
    unet: str | Path | nn.Module, dtype: torch.dtype, where: Mapping[str, Any], hub: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, list[Path]]]:
    """A denoiser given apart, and its weight files where it has any."""
    if isinstance(unet, nn.Module):
        return unet, {}
    folder = Path(unet).expanduser()
    if not folder.exists():
        if not _HUB_ID.fullmatch(str(unet)):
            raise CannotAudit(f"there is no folder {unet} to take the UNet from; check the path.")
        patterns = ["*.json", "unet/*.safetensors", "diffusion_pytorch_model*.safetensors"]
        folder = _download(str(unet), snapshot_download, {**_hub_only(where, hub), "allow_patterns": patterns})
    if (folder / "unet").is_dir():
        folder /= "unet"
    kind = _config_class(folder)
    if kind not in ("UNet2DConditionModel", "UNet2DModel"):
        raise CannotAudit(f"{folder} holds no UNet ({kind or 'no config.json'}).")
    found = weight_files(folder, where["variant"])
    tagged = where["variant"] if where["variant"] and f".{where['variant']}" in found[0].name else None
    with _quiet(), _opening(str(folder)):
        cls = getattr(diffusers, kind)
        return cls.from_pretrained(str(folder), variant=tagged, use_safetensors=True, **{_DTYPE_KEY: dtype}), {"unet": found}


def _config_class(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text("utf-8")).get("_class_name")
    except (OSError, ValueError):
        return None


def _add_lora(pipe: Any, lora: LoRA, where: Mapping[str, Any], hub: Mapping[str, Any]) -> dict[str, Path]:
    """Load and activate LoRA files; adapter name → file."""
    if not hasattr(pipe, "load_lora_weights"):
        raise UsageError(f"lora={lora}: a {type(pipe).__name__} takes no LoRA.")
    if not diffusers.utils.is_peft_available():
        raise UsageError("LoRA needs peft: pip install peft.")
    if isinstance(lora, str | Path):
        lora = [lora]
    scales = {str(k): float(v) for k, v in lora.items()} if isinstance(lora, Mapping) else {str(k): 1.0 for k in lora or ()}
    found: dict[str, Path] = {}
    for source in scales:
        file = _lora_file(source, where, hub)
        # peft keeps adapters as submodules, whose names cannot hold a dot.
        name = re.sub(r"\W", "_", file.stem if file.stem != "pytorch_lora_weights" else file.parent.name)
        name = name if name not in found else f"{name}_{len(found)}"
        with _quiet(), _opening(str(file)):
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        found[name] = file
    pipe.set_adapters(list(found), list(scales.values()))
    return found


def _lora_file(source: str, where: Mapping[str, Any], hub: Mapping[str, Any]) -> Path:
    path = Path(source).expanduser()
    if path.suffix in PICKLES:
        raise CannotAudit(f"{path} is a pickle, which can run code when opened; convert it to safetensors in a sandbox.")
    if not path.exists():
        if not _HUB_ID.fullmatch(source):
            raise CannotAudit(f"there is no LoRA {source}; check the path.")
        path = _download(source, snapshot_download, {**_hub_only(where, hub), "allow_patterns": ["*.safetensors"]})
    if path.is_file():
        return path
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise CannotAudit(f"{source} should hold one LoRA file and holds {len(found)} ({names}); give the file itself.")
    return found[0]


def _hub_only(where: Mapping[str, Any], hub: Mapping[str, Any]) -> dict[str, Any]:
    """What a plain download understands. The revision belongs to the pipeline, not to what is put into it."""
    return {"local_files_only": where["local_files_only"], "cache_dir": hub.get("cache_dir"), "token": hub.get("token")}


# Precision and place


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UsageError(f"device {str(device)!r} cannot be used here ({_first_line(e)}); use cpu, or leave it out.") from e
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
    return torch.float32, f"float32: half precision gains nothing on {'this GPU' if device.type == 'cuda' else device.type}"


def _as_given(source: Any, changes: Mapping[str, Any]) -> None:
    """A model that is already in memory is audited as it is."""
    asked = [k for k, v in changes.items() if v is not None]
    if asked:
        raise UsageError(f"{asked[0]}={changes[asked[0]]}: a {type(source).__name__} in memory is audited as it is; change it before.")


# Small helpers


@contextmanager
def _opening(name: str) -> Iterator[None]:
    """Turns what diffusers raises on a damaged or foreign model into a sentence; the cause stays attached."""
    try:
        yield
    except _OPENING as e:
        raise CannotAudit(f"{name} could not be opened: {_first_line(e)}") from e


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars for opening local files; whoever calls reports progress."""
    loud = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in loud:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in loud:
            log.enable_progress_bar()


def _first_line(e: BaseException) -> str:
    return next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)


def _short(name_or_path: str | None) -> str:
    """A folder's last part; a hub id whole."""
    path = Path(name_or_path or "")
    return path.name if path.is_absolute() else str(name_or_path or "")
