"""Finding and opening what a user named: hub repositories, pipeline folders, single files, UNets and LoRA given apart.

Everything that can go wrong here becomes one sentence with the cure; the cause stays attached.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from logging import LogRecord
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from packaging.version import Version
from safetensors import safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from ..errors import CannotAudit, UnknownName, UsageError
from ..plugins import BUNDLED
from ..records.files import folder_name, open_regular
from .host import Origin
from .identity import PICKLES, weight_files

_verbosity = transformers_logging.get_verbosity()
transformers_logging.set_verbosity_error()  # on import it complains of a missing torchvision, which nothing here needs
from diffusers import DiffusionPipeline, StableDiffusionPipeline  # noqa: E402

from . import folders  # noqa: E402
from .folders import UNNEEDED, first_line, opening  # noqa: E402

transformers_logging.set_verbosity(_verbosity)

OPTIONAL = ("text_encoder_3", "tokenizer_3")
"""Components that a user may leave out with None: not downloaded either."""

PARTS = frozenset({"text_encoder_2", "tokenizer_2", *OPTIONAL, "transformer"})
"""Components of some pipelines only. Given to another, diffusers would log it and open the base model."""

DTYPE_KEY = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"

LoRA: TypeAlias = str | Path | Sequence[str | Path] | Mapping[str, float] | None

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_UNETS = ("UNet2DConditionModel", "UNet2DModel")

_IN_ONE_FILE = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
"""How the names of each component's weights begin in the original Stable Diffusion layout."""


def locate(source: str, where: Mapping[str, Any], hub: Mapping[str, Any]) -> tuple[Path, Origin]:
    """A local file or folder for ``source``, downloaded if need be."""
    if source in BUNDLED:
        path = Path(str(files("mnemoscope"))) / "demo" / "assets" / BUNDLED[source]
        if not path.is_dir():
            raise CannotAudit(
                f"the bundled model {source!r} is missing from this installation ({path}); reinstall mnemoscope."
            )
        return path, Origin(name=source, source=source)
    path = _local(source)
    if path.exists():
        return path, Origin(name=folder_name(path), source=source)
    if path.suffix in PICKLES | {".safetensors"} or source[0] in "./~" or source.count("/") > 1:
        raise CannotAudit(f"there is no file or folder {source}; check the path.")
    if not _HUB_ID.fullmatch(source):
        raise UnknownName("folder or bundled model", source, BUNDLED)
    path = _download(
        source, DiffusionPipeline.download, {**where, "use_safetensors": True, **dict.fromkeys(UNNEEDED), **hub}
    )
    commit = path.name if path.parent.name == "snapshots" else where["revision"]
    return path, Origin(name=source, source=source, revision=commit)


def _local(source: str | Path) -> Path:
    """The path that a source names on this machine, whether or not there is anything.

    Raises:
        CannotAudit: the system cannot look it up, for instance because it is too long.
    """
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, RuntimeError) as e:
        text = str(source)
        name = text if len(text) <= 80 else f"{text[:79]}…"
        raise CannotAudit(f"{name} cannot be looked up ({getattr(e, 'strerror', None) or e}); check the path.") from e
    return path


def _download(source: str, fetch: Callable[..., Any], options: Mapping[str, Any]) -> Path:
    """A hub repository as a local folder; what goes wrong becomes one sentence."""
    keep = {k: v for k, v in options.items() if v is not None or k in UNNEEDED + OPTIONAL}
    try:
        return Path(fetch(source, **keep))
    except GatedRepoError as e:
        raise CannotAudit(f"{source} is gated: accept its license on its hub page, then run `hf auth login`.") from e
    except RepositoryNotFoundError as e:
        raise CannotAudit(
            f"there is no folder and no hub repository {source}; a private one needs `hf auth login`."
        ) from e
    except RevisionNotFoundError as e:
        raise CannotAudit(f"{source} has no revision {options.get('revision')!r} on the hub.") from e
    except Exception as e:
        if "safetensors" in str(e):
            raise CannotAudit(
                f"{source} offers its weights as pickle only, which can run code when opened; choose one with safetensors."
            ) from e
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub was not to be asked"
        if not (constants.HF_HUB_OFFLINE or options.get("local_files_only")):
            offline = f"the hub did not answer ({first_line(e)})"
        cache = options.get("cache_dir") or constants.HF_HUB_CACHE
        raise CannotAudit(f"{source} is not in the cache and {offline}. Looked in {cache}.") from e


# Opening it


def pipeline_class(path: Path) -> str:
    """Name of the diffusers pipeline class that a folder or single file holds, without opening its weights."""
    if path.is_dir():
        return _index(path)["_class_name"]
    if path.suffix in PICKLES:
        raise CannotAudit(
            f"{path} is a pickle, which can run code when opened; ask its author for safetensors, or convert it in a sandbox with "
            f"safetensors.torch.save_file."
        )
    if path.suffix != ".safetensors":
        raise CannotAudit(f"{path} is no model: give a pipeline folder or a .safetensors checkpoint.")
    with opening(str(path)), safe_open(str(path), "pt") as file:
        keys = list(file.keys())
    if any(key.startswith("cond_stage_model.") for key in keys):
        return StableDiffusionPipeline.__name__
    if any(".joint_blocks." in key for key in keys):
        raise CannotAudit(
            f"{path} looks like a Stable Diffusion 3 checkpoint in one file: give its pipeline folder or hub id."
        )
    if any("lora" in key for key in keys):
        raise CannotAudit(f"{path} looks like a LoRA: give its base model here, and the file as lora=.")
    raise CannotAudit(f"{path} is not a Stable Diffusion 1 or 2 checkpoint (it has no cond_stage_model weights).")


def open_pipeline(path: Path, variant: str | None, hub: Mapping[str, Any]) -> tuple[Any, dict[str, list[Path]]]:
    """The pipeline in a folder or file, and the weight files of each component that was loaded from there.

    The key ``""`` stands for a single file that holds them all.
    """
    name = pipeline_class(path)
    parameters = inspect.signature(folders.pipeline_type(name).__init__).parameters
    if foreign := sorted(hub.keys() & PARTS - parameters.keys()):
        raise UsageError(f"{foreign[0]}=…: a {name} has no such part; leave it out.")
    skip: dict[str, Any] = {k: None for k in UNNEEDED if k in parameters}
    if path.is_file():
        return _from_file(path, {**skip, **hub}), {"": [path]}
    if "requires_safety_checker" in parameters:
        skip["requires_safety_checker"] = False
    # A pipeline that was saved without a part says so with null, which diffusers wants to be told again.
    absent = {k: None for k, spec in _index(path).items() if spec == [None, None] and k in parameters}
    options = {**absent, **skip, **hub}
    known = _component_files(path, variant, options)
    with quiet(), opening(str(path)):
        pipe = DiffusionPipeline.from_pretrained(str(path), variant=variant, use_safetensors=True, **options)
    folders.require_loaded(pipe, str(path))
    return pipe, known


def recommended(path: Path) -> dict[str, Any]:
    """What a model's maker recommends for auditing it: ``mnemoscope.json`` in its folder (so far ``guidance``)."""
    file = path / "mnemoscope.json"
    if not file.is_file():
        return {}
    settings = folders.read_settings(file)
    try:
        found = {"guidance": float(settings["guidance"])} if "guidance" in settings else {}
        if not all(map(math.isfinite, found.values())):
            raise ValueError("its guidance is no finite number")
        return found
    except (ValueError, TypeError, OverflowError) as e:
        raise CannotAudit(f"{file} is damaged ({first_line(e)}); repair or delete it.") from e


def _component_files(folder: Path, variant: str | None, given: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Weight files of each component that ``model_index.json`` names and that is not given apart; all must be there, and sound."""
    known = {}
    for name, kind in folders.component_types(_index(folder), folder / "model_index.json").items():
        if name in given:
            continue
        place = folder / name
        if not place.is_dir():
            raise CannotAudit(
                f"{folder} has no {name}, which its model_index.json names; download or copy the model again, completely."
            )
        folders.require_part(name, kind, place, variant)
        if issubclass(kind, nn.Module):
            known[name] = weight_files(place, variant)
            folders.require_weights(name, kind, place, known[name])
    return known


def _from_file(path: Path, options: Mapping[str, Any]) -> Any:
    """A checkpoint in the original Stable Diffusion layout."""
    with opening(str(path)):
        stored = folders.shapes_of([path])
    if "config" in options:
        options = {**options, "config": str(_configuration(path, stored, options))}
    pipe = _from_single_file(path, options)
    folders.require_loaded(pipe, str(path))
    for name, prefix in _IN_ONE_FILE.items():
        if name not in options and sum(p.numel() for p in getattr(pipe, name).parameters()) > folders.numbers_in(
            stored, prefix
        ):
            raise CannotAudit(
                f"{path} lacks weights of the {name.replace('_', ' ')}; download or copy it again, completely."
            )
    return pipe


def _configuration(path: Path, stored: folders.Shapes, options: Mapping[str, Any]) -> Path:
    """The folder of a pipeline's documents for a single file, sound and of about the same size."""
    source = str(options["config"])
    folder = _local(source)
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(source):
            raise CannotAudit(f"there is no folder {source} to take the configuration from; check the path.")
        hub = {k: options.get(k) for k in ("cache_dir", "token", "local_files_only")}
        patterns = ["*.json", "*/*.json", "*/*.txt", "*/*.model"]
        folder = _download(source, snapshot_download, {**hub, "allow_patterns": patterns})
    for name, kind in folders.component_types(_index(folder), folder / "model_index.json").items():
        place = folder / name
        if name in options or not place.is_dir():
            continue
        folders.require_part(name, kind, place)
        if name in _IN_ONE_FILE:
            if any(p.suffix in PICKLES for p in place.iterdir()):
                weight_files(place)  # what the file lacks would be taken from here, and must not be a pickle
            keys = [key for key in stored if key.startswith(_IN_ONE_FILE[name])]
            held = folders.numbers_in(stored, _IN_ONE_FILE[name])
            try:
                folders.outline(kind, folders.read_settings(place / "config.json"), place, held, len(keys))
            except CannotAudit as e:
                raise CannotAudit(f"{path} could not be opened with the configuration in {source}: {e}") from e
    return folder


def _from_single_file(path: Path, options: Mapping[str, Any]) -> Any:
    try:
        with quiet():
            return StableDiffusionPipeline.from_single_file(str(path), **options)
    except Exception as e:
        if "config" in options:
            raise CannotAudit(
                f"{path} could not be opened with the configuration in {options['config']}: {first_line(e)}"
            ) from e
        raise CannotAudit(
            f"{path} holds weights only, and its configuration is neither in the cache nor to be had from the hub; give a local "
            f"pipeline folder of the same family as config=."
        ) from e


def _index(folder: Path) -> dict[str, Any]:
    """``model_index.json``, or a sentence that says what the folder is instead."""
    try:
        index = folders.read_document(folder / "model_index.json")
    except FileNotFoundError:
        kind = _config_class(folder)
        if kind in _UNETS:
            raise CannotAudit(
                f"{folder} is a UNet alone: give the pipeline it belongs to, and this folder as unet=."
            ) from None
        raise CannotAudit(f"{folder} is no pipeline folder: it has no model_index.json.") from None
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise CannotAudit(
            f"{folder / 'model_index.json'} names no diffusers pipeline class; custom pipeline code is not run."
        )
    return index


def open_unet(
    unet: str | Path | nn.Module, dtype: torch.dtype, where: Mapping[str, Any], hub: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, list[Path]]]:
    """A denoiser given apart, and its weight files where it has any."""
    if isinstance(unet, nn.Module):
        return unet, {}
    folder = _local(unet)
    if not folder.exists():
        if not _HUB_ID.fullmatch(str(unet)):
            raise CannotAudit(f"there is no folder {unet} to take the UNet from; check the path.")
        patterns = ["*.json", "unet/*.safetensors", "diffusion_pytorch_model*.safetensors"]
        folder = _download(str(unet), snapshot_download, {**_hub_only(where, hub), "allow_patterns": patterns})
    if (folder / "unet").is_dir():
        folder /= "unet"
    kind = _config_class(folder)
    if kind not in _UNETS:
        raise CannotAudit(f"{folder} holds no UNet ({kind or 'no config.json'}).")
    folders.require_data(folder, where["variant"])
    found = weight_files(folder, where["variant"])
    folders.require_weights("unet", getattr(diffusers, kind), folder, found)
    tagged = where["variant"] if where["variant"] and f".{where['variant']}" in found[0].name else None
    with quiet(), opening(str(folder)):
        options = {"variant": tagged, "use_safetensors": True, DTYPE_KEY: dtype}
        return getattr(diffusers, kind).from_pretrained(str(folder), **options), {"unet": found}


def _config_class(folder: Path) -> str | None:
    try:
        return folders.read_settings(folder / "config.json").get("_class_name")
    except CannotAudit:
        return None


def add_lora(pipe: Any, lora: LoRA, where: Mapping[str, Any], hub: Mapping[str, Any]) -> dict[str, Path]:
    """Load and activate LoRA files; adapter name → file."""
    if not hasattr(pipe, "load_lora_weights"):
        raise UsageError(f"lora={lora}: a {type(pipe).__name__} takes no LoRA.")
    if not diffusers.utils.is_peft_available():
        raise UsageError("LoRA needs peft: pip install peft.")
    if isinstance(lora, str | Path):
        lora = [lora]
    scales = {
        str(k): float(v) for k, v in (lora if isinstance(lora, Mapping) else dict.fromkeys(lora or (), 1.0)).items()
    }
    found: dict[str, Path] = {}
    for source in scales:
        file = _lora_file(source, where, hub)
        # peft keeps adapters as submodules, whose names cannot hold a dot.
        name = re.sub(r"\W", "_", file.stem if file.stem != "pytorch_lora_weights" else file.parent.name)
        name = name if name not in found else f"{name}_{len(found)}"
        with quiet(), opening(str(file)):
            pipe.load_lora_weights(
                str(file.parent), weight_name=file.name, adapter_name=name, use_safetensors=True, local_files_only=True
            )
        found[name] = file
    pipe.set_adapters(list(found), list(scales.values()))
    return found


def _lora_file(source: str, where: Mapping[str, Any], hub: Mapping[str, Any]) -> Path:
    path = _local(source)
    if path.suffix in PICKLES:
        raise CannotAudit(
            f"{path} is a pickle, which can run code when opened; convert it to safetensors in a sandbox."
        )
    if not path.exists():
        if not _HUB_ID.fullmatch(source):
            raise CannotAudit(f"there is no LoRA {source}; check the path.")
        path = _download(source, snapshot_download, {**_hub_only(where, hub), "allow_patterns": ["*.safetensors"]})
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            names = ", ".join(p.name for p in found) or "none"
            raise CannotAudit(
                f"{source} should hold one LoRA file and holds {len(found)} ({names}); give the file itself."
            )
        (path,) = found
    if path.suffix != ".safetensors":
        raise CannotAudit(f"{path} is no LoRA: give a .safetensors file.")
    with opening(str(path)):
        open_regular(path).close()
    folders.require_adapter(path)
    return path


def _hub_only(where: Mapping[str, Any], hub: Mapping[str, Any]) -> dict[str, Any]:
    """What a plain download understands. The revision belongs to the pipeline, not to what is put into it."""
    return {"local_files_only": where["local_files_only"], "cache_dir": hub.get("cache_dir"), "token": hub.get("token")}


# Helpers


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars for opening local files, whoever calls reports progress; and no surprise at what is as it should be."""
    loud = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    checks = [
        diffusers_logging.get_logger(f"diffusers.{name}") for name in ("pipelines.pipeline_utils", "loaders.lora_base")
    ]
    for log in loud:
        log.disable_progress_bar()
    for check in checks:
        check.addFilter(_unsurprised)
    try:
        yield
    finally:
        for log in loud:
            log.enable_progress_bar()
        for check in checks:
            check.removeFilter(_unsurprised)


def _unsurprised(record: LogRecord) -> bool:
    """Whether a message is worth showing: an LDMPipeline works with another autoencoder than it names, a LoRA may be of the UNet alone."""
    return not record.getMessage().startswith(("Expected types for vqvae", "No LoRA keys associated to CLIPTextModel"))
