"""What a model folder says of itself: read as data, and checked before a library builds anything from it.

diffusers and transformers take class names, programs, numbers and file names from these documents at their word: they import what a
document names, run what lies beside it, and allocate what it asks for. Here a name must be that of a class which is installed and is what
its place needs, a number must be finite, and a network must have about as many weights as its files hold. Links are followed, because the
hub's cache consists of them.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import CannotAudit, MnemoscopeError, ModelFault
from ..parsing import parse_json
from ..records.files import read_regular

Shapes: TypeAlias = Mapping[str, Sequence[int]]
"""Tensor name → its shape, of the files of one component."""

UNNEEDED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that no audit needs: not downloaded, not loaded."""

LARGEST = 8 << 20
"""Bytes that a document may have which is read here."""

LARGEST_VOCABULARY = 256 << 20
"""Bytes that the files of a tokenizer may have, each."""

MOST_TIMESTEPS = 100_000
"""Training timesteps that a scheduler may have; published models have 1000, a few 4000."""

LARGEST_NUMBER = 1_000_000
"""The largest whole number in a scheduler's settings: some of them become lists of that length."""

MOST_LABELS = 1000
"""Classes that a text encoder's settings may count, each of which gets a name in memory."""

MOST_NORMALIZERS = 16
"""Steps of a tokenizer's normalizer."""

MOST_GROWING = 4
"""Of these, how many may make a text longer: each of them multiplies its length."""

LONGEST_INSERTION = 16
"""Characters that such a step may put in place of one."""

_PRIVATE = frozenset({"_class_name", "_diffusers_version", "_name_or_path", "_ignore_files"})
_SLOTS: dict[str, tuple[type, str]] = {
    "scheduler": (SchedulerMixin, "a scheduler of diffusers"),
    "tokenizer": (PreTrainedTokenizerBase, "a tokenizer of transformers"),
    "text_encoder": (PreTrainedModel, "a model of transformers that reads text"),
    "unet": (ModelMixin, "a model of diffusers"),
    "transformer": (ModelMixin, "a model of diffusers"),
    "vae": (ModelMixin, "a model of diffusers"),
    "vqvae": (ModelMixin, "a model of diffusers"),
}
"""What each component must be, in code and in words; ``text_encoder_2`` is what ``text_encoder`` is."""

_SPACINGS = ("leading", "trailing", "linspace")
"""What ``timestep_spacing`` may be; a scheduler reads it only when it takes its steps."""

_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_SETTINGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "generation_config.json")
_SHARDS = re.compile(r"\w+(?:\.([\w-]+))?\.safetensors\.index(?:\.([\w-]+))?\.json")
"""A list of weight files; its variant stands in one of two places."""

_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")
_PLAIN_WORDS = "names must consist of letters, digits, points, hyphens and underscores"
_PROVENANCE = ("base_model_name_or_path", "revision")
"""What a LoRA's metadata says of where it comes from, which nothing is loaded from."""

_RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""What early versions of diffusers called parts of an attention layer, and what they are loaded as."""


@contextmanager
def opening(name: str) -> Iterator[None]:
    """Turns whatever libraries raise on a damaged or foreign model into a sentence; the cause stays attached."""
    try:
        yield
    except MnemoscopeError:
        raise
    except BaseException as e:
        if not (isinstance(e, Exception) or is_panic(e)):
            raise
        raise CannotAudit(f"{name} could not be opened: {first_line(e)}") from e


@contextmanager
def computing(name: str) -> Iterator[None]:
    """Turns what a network raises into a sentence: some settings do not fit what it computes, and libraries look at them only then."""
    try:
        yield
    except (MnemoscopeError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as e:
        raise ModelFault(
            f"{name} cannot be computed with ({type(e).__name__}: {first_line(e)}); if its files are damaged, download or copy it again."
        ) from e


def is_panic(e: BaseException) -> bool:
    """Whether a library that is written in Rust gave up: in a class that no module exports, outside of Exception."""
    return type(e).__name__ == "PanicException"


def first_line(e: BaseException) -> str:
    """The first line of an error that says anything, with the next one where it ends in a colon."""
    first, *others = [line.strip() for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
    return f"{first} {others[0]}" if first.endswith(":") and others else first


# Documents ----------------------------------------------------------------------------------------------------------------


def read_document(path: Path, limit: int = LARGEST) -> Any:
    """A JSON document of at most ``limit`` bytes and of bounded depth, all numbers of which are finite.

    Raises:
        FileNotFoundError: there is none.
        CannotAudit: it is no regular file, too large, no JSON, or holds a number that is not finite.
    """
    try:
        document = parse_json(read_regular(path, limit), lenient=True)
        for name, value in _parts(document):
            # The one setting of diffusers whose default is infinite: no bound.
            if isinstance(value, float) and not math.isfinite(value) and name != "lambda_min_clipped":
                raise ValueError(f"{_short(name)} is {value}, which is no number to compute with")
    except FileNotFoundError:
        raise
    except OSError as e:
        raise CannotAudit(f"{path} cannot be read ({e.strerror or e}); download or copy it again.") from e
    except ValueError as e:
        raise CannotAudit(f"{path} is damaged ({first_line(e)}); download or copy it again.") from e
    return document


def _parts(document: Any) -> Iterator[tuple[str, Any]]:
    """Everything in a document: the name that it stands under, and its value."""
    waiting: list[tuple[str, Any]] = [("it", document)]
    while waiting:
        name, value = part = waiting.pop()
        yield part
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(name, v) for v in value]


def read_settings(path: Path, limit: int = LARGEST) -> dict[str, Any]:
    """As :func:`read_document`, for a document that must be there and hold named settings.

    Raises:
        CannotAudit: as there, or there is none, or it is of another form.
    """
    try:
        settings = read_document(path, limit)
    except FileNotFoundError:
        raise CannotAudit(f"there is no {path}; download or copy the model again, completely.") from None
    if not isinstance(settings, dict):
        raise CannotAudit(f"{path} is damaged (it holds no named settings); download or copy it again.")
    return settings


def require_part(name: str, kind: type, folder: Path, variant: str | None = None) -> None:
    """Refuse a component's folder as :func:`require_data` does, and settings of a scheduler or tokenizer that are not sound.

    Raises:
        CannotAudit: naming the file.
    """
    require_data(folder, variant)
    if name == "scheduler":
        require_schedule(folder / "scheduler_config.json")
    elif issubclass(kind, PreTrainedTokenizerBase):
        require_tokenizer(kind, folder)


def require_data(folder: Path, variant: str | None = None) -> None:
    """Refuse a component's folder that holds more than data, or whose documents name programs or files elsewhere.

    Args:
        folder: For instance ``model/unet``.
        variant: Which weights will be loaded, for instance ``"fp16"``; only their list must be complete.

    Raises:
        CannotAudit: naming the file.
    """
    if not any(f".{variant}" in p.name for p in folder.glob("*.safetensors")):
        variant = None  # a component without such files is loaded from the plain ones
    for file in sorted(folder.iterdir()):
        try:
            facts = file.stat()
        except OSError:
            continue  # a link that leads nowhere; whoever needs the file will say that there is none
        if stat.S_ISDIR(facts.st_mode):
            continue
        if not stat.S_ISREG(facts.st_mode):
            raise CannotAudit(f"{file} is no regular file; download or copy the model again.")
        if file.suffix == ".py":
            raise CannotAudit(
                f"{file} is a program; code that a model brings is not run, so audit one that needs none."
            )
        if file.name == "adapter_config.json":
            raise CannotAudit(
                f"{file} names another model to be loaded in this one's place; give the adapter as lora=, or merge it."
            )
        if file.suffix in (".json", ".txt", ".model") and facts.st_size > LARGEST_VOCABULARY:
            raise CannotAudit(f"{file} has {facts.st_size:,} bytes, and the limit is {LARGEST_VOCABULARY:,}.")
        if file.name in _SETTINGS:
            _require_no_programs(read_settings(file), file)
        elif match := _SHARDS.fullmatch(file.name):
            _require_shards(read_settings(file), file, (match[1] or match[2]) == variant)


def _require_no_programs(settings: Mapping[str, Any], file: Path) -> None:
    """Refuse settings that have transformers fetch code or read another file, and a class that diffusers does not have."""
    for name, value in _parts(settings):
        # A name with a slash is that of a repository on the hub, whose code computes the attention.
        if name == "auto_map" or (
            "_implementation" in name and any("/" in v for _, v in _parts(value) if isinstance(v, str))
        ):
            raise CannotAudit(f"{file} names code of its own ({name}); code that a model brings is not run.")
        if name == "configuration_files":
            raise CannotAudit(
                f"{file} names other files to be read in its place (configuration_files); put the right one in its place."
            )
    kind = settings.get("_class_name")
    if kind is not None and not isinstance(_attribute(diffusers, kind), type):
        raise CannotAudit(
            f"{file} is of a {_short(kind)}, which is no class of diffusers; code that a model brings is not run."
        )


def _require_shards(settings: Mapping[str, Any], file: Path, needed: bool) -> None:
    """Refuse a list of weight files that are not safetensors beside it; they may be absent where the list is not needed."""
    shards = settings.get("weight_map")
    names = set(map(str, shards.values())) if isinstance(shards, dict) else {"nothing"}
    here = {p.name for p in file.parent.glob("*.safetensors")}
    absent = {name for name in names - here if needed or not (_is_file_name(name) and name.endswith(".safetensors"))}
    if strange := sorted(absent):
        raise CannotAudit(
            f"{file} names {_short(strange[0])}, which is no safetensors file beside it; download or copy the model again."
        )


def _is_file_name(value: Any) -> bool:
    """Whether a value names a file in the folder where it is written."""
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & set("/\\\0")


# Tokenizers ---------------------------------------------------------------------------------------------------------------


def require_tokenizer(kind: type, folder: Path) -> None:
    """Refuse a tokenizer that reads files elsewhere, has no vocabulary, or makes a text longer without bound.

    Args:
        kind: Its class, of transformers.
        folder: For instance ``model/tokenizer``.

    Raises:
        CannotAudit: naming the file.
    """
    file = folder / "tokenizer_config.json"
    settings = read_settings(file) if file.exists() else {}
    for name, value in settings.items():
        # transformers writes the place of this one and does not read it.
        if not name.endswith(("_file", "_files")) or name == "special_tokens_map_file":
            continue
        for entry in value if isinstance(value, list) else [value]:
            if entry is not None and not _is_file_name(entry):
                raise CannotAudit(f"{file}: {name} is {_short(value)}; it must name files beside it.")
    fast = settings.get("fast_tokenizer_files") or []
    whole = [folder / name for name in {"tokenizer.json", *(fast if isinstance(fast, list) else [fast])}]
    whole = [path for path in whole if path.is_file()]
    names = getattr(kind, "vocab_files_names", {})
    parts = [name for part, name in names.items() if part != "tokenizer_file"]
    if names and not whole and not (parts and all((folder / name).is_file() for name in parts)):
        raise CannotAudit(
            f"{folder} holds no vocabulary ({' and '.join(parts) or 'tokenizer.json'}); download or copy the model again, completely."
        )
    for path in whole:
        _require_bounded(read_settings(path, LARGEST_VOCABULARY).get("normalizer"), path)


def _require_bounded(normalizer: Any, file: Path) -> None:
    """Refuse a normalizer that would make a short text very long."""
    steps = [value for name, value in _parts(normalizer) if isinstance(value, dict) and name != "pattern"]
    growing = 0
    for step in steps:
        text = str(step.get("prepend") or step.get("content") or "")
        pattern = step.get("pattern")
        fixed = str(pattern.get("String", "")) if isinstance(pattern, dict) else ""  # an expression may match nothing
        growing += len(text) > len(fixed)
        if len(text) > LONGEST_INSERTION:
            raise CannotAudit(
                f"{file}: its normalizer inserts {_short(text)}; at most {LONGEST_INSERTION} characters are taken."
            )
    if len(steps) > MOST_NORMALIZERS + 1 or growing > MOST_GROWING:  # one for the sequence itself
        raise CannotAudit(
            f"{file}: its normalizer has {len(steps)} steps, of which {growing} make a text longer; at most {MOST_NORMALIZERS} and "
            f"{MOST_GROWING} are taken."
        )


# Adapters -----------------------------------------------------------------------------------------------------------------


def require_adapter(file: Path) -> None:
    """Refuse a LoRA file whose names or metadata would be taken for regular expressions, modules to import, or huge ranks.

    Raises:
        CannotAudit: it cannot be read, or naming the setting.
    """
    with opening(str(file)), safe_open(str(file), "pt") as tensors:
        text = (tensors.metadata() or {}).get("lora_adapter_metadata")
    shapes = shapes_of([file])
    for name in shapes:
        if "lora" in name and not _PLAIN.fullmatch(name):
            raise CannotAudit(f"{file} has a tensor named {_short(name)}; {_PLAIN_WORDS}.")
    if text is None:
        return
    try:
        if len(text) > LARGEST:
            raise ValueError(f"it has {len(text):,} characters, and the limit is {LARGEST:,}")
        settings = parse_json(text, lenient=True)
        if not isinstance(settings, dict):
            raise ValueError("it holds no named settings")
    except ValueError as e:
        raise CannotAudit(f"the metadata of {file} is damaged ({first_line(e)}); download or copy it again.") from e
    widest = max((max(shape, default=0) for shape in shapes.values()), default=0)
    for name, value in settings.items():
        if reason := _wrong_setting(name.rsplit(".", 1)[-1], value, widest):
            raise CannotAudit(f"the metadata of {file} gives {_short(name)} as {_short(value)}; {reason}.")


def _wrong_setting(name: str, value: Any, widest: int) -> str:
    """Why a setting of a LoRA's metadata is not taken; empty: it is."""
    if value is None or isinstance(value, bool) or name in _PROVENANCE:
        return "" if not (value and name.endswith("_config")) else "no further configuration is taken"
    if name == "init_lora_weights":  # other ways compute new weights of the model that the adapter is added to
        return "" if value == "gaussian" else 'it must be true, false, null or "gaussian"'
    ranks = (
        [value] if name == "r" else list(value.values()) if name == "rank_pattern" and isinstance(value, dict) else []
    )
    if not all(_is_whole(rank) and 1 <= rank <= widest for rank in ranks):
        return f"a rank must be a whole number from 1 to {widest:,}, the largest size of its tensors"
    if isinstance(value, dict):
        if value and name not in ("rank_pattern", "alpha_pattern"):
            return "no further configuration is taken"
        plain = all(map(_PLAIN.fullmatch, value)) and all(_is_number(v) and math.isfinite(v) for v in value.values())
        return "" if plain else f"{_PLAIN_WORDS}, and its numbers must be finite"
    if isinstance(value, list | str):
        entries = [value] if isinstance(value, str) else value
        plain = all(isinstance(entry, str) and _PLAIN.fullmatch(entry) for entry in entries)
        return "" if plain else _PLAIN_WORDS
    return "" if _is_whole(value) or math.isfinite(value) else "it must be a finite number"


# Classes ------------------------------------------------------------------------------------------------------------------


def pipeline_type(name: str) -> type[DiffusionPipeline]:
    """The pipeline class of diffusers that has this name.

    Raises:
        CannotAudit: there is none.
    """
    kind = _attribute(diffusers, name)
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        raise CannotAudit(
            f"{_short(name)} is no pipeline class of diffusers {diffusers.__version__}; custom pipeline code is not run."
        )
    return kind


def component_types(index: Mapping[str, Any], file: Path) -> dict[str, type]:
    """Component → its class, of what a ``model_index.json`` names and an audit needs. Nothing is imported but diffusers and transformers.

    Args:
        index: Its content.
        file: Where it lies, for sentences.

    Raises:
        CannotAudit: an entry is neither null, nor a plain setting, nor a known class that is what its place needs.
    """
    found = {}
    for name, entry in index.items():
        if isinstance(entry, str) and name.isidentifier() and name[0] != "_" and _is_unused(name, index, file):
            continue
        if name in _PRIVATE or (name.isidentifier() and name[0] != "_" and isinstance(entry, bool | int | float)):
            continue
        if reason := _wrong(name, entry):
            raise CannotAudit(
                f"{file} gives {_short(name)} as {_short(entry)}: {reason}; code that a model brings is not run."
            )
        if entry[0] is not None and name not in UNNEEDED:
            found[name] = getattr(_LIBRARIES[entry[0]], entry[1])
    return found


def _is_unused(name: str, index: Mapping[str, Any], file: Path) -> bool:
    """Whether a name in ``model_index.json`` is that of no component, so that diffusers passes its value over."""
    parameters = inspect.signature(pipeline_type(index["_class_name"]).__init__).parameters
    return name not in parameters and not (file.parent / name).exists()


def _wrong(name: str, entry: Any) -> str:
    """Why an entry of ``model_index.json`` is not taken; empty: it is."""
    if not name.isidentifier() or name[0] == "_":
        return "that is no name of a component"
    if not isinstance(entry, list) or len(entry) != 2:
        return "it must be [null, null], or a library and a class"
    if entry == [None, None]:
        return ""
    library, kind = entry
    if name in UNNEEDED:  # never loaded, and named by old versions as what is not there anymore
        modules = Path(diffusers.__file__).parent / "pipelines"
        known = library in _LIBRARIES or (_is_name(library) and (modules / library).is_dir())
        return "" if known and _is_name(kind) else "it must be a class of diffusers or transformers"
    found = _attribute(_LIBRARIES.get(library) if isinstance(library, str) else None, kind)
    slot = next((s for s in _SLOTS if name == s or name.startswith(f"{s}_")), None)
    base, words = (
        _SLOTS[slot]
        if slot
        else ((SchedulerMixin, PreTrainedTokenizerBase, PreTrainedModel, ModelMixin), "a known class")
    )
    if type(found).__name__ == "DummyObject":
        return f"it needs a package that is not installed ({', '.join(map(str, getattr(found, '_backends', [])))})"
    if not (isinstance(found, type) and issubclass(found, base)):
        return f"it must be {words}, as installed here"
    if slot == "text_encoder" and getattr(found, "main_input_name", None) != "input_ids":
        return f"it must be {words}, as installed here"
    return ""


def _attribute(library: Any, name: Any) -> Any:
    """What a library has under a name that somebody wrote; None where it has nothing, or the name is no public one."""
    return getattr(library, name, None) if library is not None and _is_name(name) else None


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier() and not value.startswith("_")


# Numbers ------------------------------------------------------------------------------------------------------------------


def require_schedule(file: Path) -> None:
    """Refuse settings of a scheduler that it would compute or allocate nonsense from.

    Raises:
        CannotAudit: naming the setting and its value.
    """
    settings = read_settings(file)
    steps = settings.get("num_train_timesteps", 1000)
    if not _is_whole(steps) or not 1 <= steps <= MOST_TIMESTEPS:
        raise CannotAudit(
            f"{file}: num_train_timesteps is {_short(steps)}; it must be a whole number from 1 to {MOST_TIMESTEPS:,}."
        )
    order = settings.get("solver_order", 1)
    if not _is_whole(order) or not 1 <= order <= 3:
        raise CannotAudit(f"{file}: solver_order is {_short(order)}; it must be 1, 2 or 3.")
    for name, value in _parts(settings):
        if _is_whole(value) and abs(value) > LARGEST_NUMBER:
            raise CannotAudit(f"{file}: {name} is {_short(value)}; it must be at most {LARGEST_NUMBER:,}.")
    for name in ("shift", "flow_shift"):
        value = settings.get(name, 1.0)
        if not _is_number(value) or not value > 0:
            raise CannotAudit(f"{file}: {name} is {_short(value)}; it must be a number above 0.")
    betas = settings.get("trained_betas")
    if betas is not None and not (isinstance(betas, list) and all(map(_is_number, betas))):
        raise CannotAudit(f"{file}: trained_betas is {_short(betas)}; it must be null or a list of numbers.")
    spacing = settings.get("timestep_spacing", "leading")
    if spacing not in _SPACINGS:
        raise CannotAudit(f"{file}: timestep_spacing is {_short(spacing)}; it must be one of {', '.join(_SPACINGS)}.")
    ratio = settings.get("dynamic_thresholding_ratio", 1)
    if settings.get("thresholding") and (not _is_number(ratio) or not 0 < ratio <= 1):
        raise CannotAudit(
            f"{file}: dynamic_thresholding_ratio is {_short(ratio)}; it must be a number above 0 and at most 1."
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_weights(name: str, kind: type, folder: Path, files: Sequence[Path]) -> None:
    """Refuse a component whose ``config.json`` does not describe what its weight files hold, before it is built in memory.

    What its files lack would be filled with random numbers, or left without any, and a library only logs that.

    Raises:
        CannotAudit: it describes far more weights than are stored, or one of them is missing.
    """
    settings = read_settings(folder / "config.json")
    with opening(str(folder)):
        stored = shapes_of(files)
    packed = settings.get("quantization_config") is not None  # several weights in a number, under other names
    held = 8 * sum(p.stat().st_size for p in files) if packed else numbers_in(stored)
    network = outline(kind, settings, folder, held, len(stored))
    if missing := _missing(network, stored):
        raise CannotAudit(
            f"{files[0]} lacks {len(missing)} of the {name.replace('_', ' ')}'s weights ({missing[0]}, …), which would be filled with "
            f"random numbers; save the {name.replace('_', ' ')} again with the libraries that are installed here."
        )


def shapes_of(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in safetensors files, from their heads alone."""
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safe_open(str(path), "pt") as file:
            found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
    return found


def numbers_in(stored: Shapes, prefix: str = "") -> int:
    """How many numbers the tensors hold whose names begin so."""
    return sum(math.prod(shape) for key, shape in stored.items() if key.startswith(prefix))


def outline(kind: Any, settings: Mapping[str, Any], folder: Path, held: int, tensors: int) -> nn.Module:
    """The network that settings describe, without memory for its weights.

    Args:
        kind: Its class, of diffusers or transformers.
        settings: Its ``config.json``.
        folder: Where it lies, for sentences.
        held: How many numbers its files hold.
        tensors: In how many tensors.

    Raises:
        CannotAudit: it would have more than about twice as many, or its weights are quantized.
    """
    # Twice, because files that lack something are a case of their own; and room for what is computed in place of stored.
    most, most_tensors = 2 * held + (1 << 20), 4 * tensors + 1000
    described = CannotAudit(
        f"{folder} could not be opened: its config.json describes far more weights than its files hold ({held:,} numbers in {tensors:,} "
        f"tensors); download or copy it again."
    )
    # No width, length or number of layers is larger than all of it; some become lists before a layer is made.
    if any(isinstance(value, int) and value > most for _, value in _parts(settings)):
        raise described
    for name, value in _parts(settings):
        if name in ("num_labels", "_num_labels") and isinstance(value, int) and value > MOST_LABELS:
            raise CannotAudit(f"{folder / 'config.json'}: {name} is {value}; it must be at most {MOST_LABELS:,}.")
    with opening(str(folder)), _silent(), torch.device("meta"), _at_most(most_tensors, described):
        if issubclass(kind, PreTrainedModel):
            # As the library reads it: of the settings of a whole CLIP it takes those of the text encoder.
            network = kind(kind.config_class.from_pretrained(str(folder), local_files_only=True))
        else:
            network = kind.from_config(dict(settings))
    if sum(tensor.numel() for tensor in [*network.parameters(), *network.buffers()]) > most:
        raise described
    # Packed weights have other names and shapes than the network, so nobody can say here that none is missing.
    if any(name == "quantization_config" and value is not None for name, value in _parts(settings)):
        raise CannotAudit(
            f"{folder} holds quantized weights, which cannot be compared with its config.json; load the component with its own library, "
            f"and give it as an object."
        )
    return network


@contextmanager
def _at_most(tensors: int, error: CannotAudit) -> Iterator[None]:
    """Ends a construction in this thread that registers more parameters: settings may ask for a billion layers."""
    here, count = threading.get_ident(), 0

    def registered(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal count
        if threading.get_ident() == here:
            count += 1
            if count > tensors:
                raise error

    handle = nn.modules.module.register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _silent() -> Iterator[None]:
    """diffusers remarks on settings that it does not know when the model is loaded, and need not do so twice."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)


def _missing(network: nn.Module, stored: Shapes) -> list[str]:
    """Parameters that no file holds under any of their names.

    ``text_model.`` is dropped by some versions of transformers on saving and expected by others; a tensor that several layers share
    is stored under one of their names.
    """
    held = {_spelled(key) for key in stored}
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [shared[0] for shared in names.values() if not any(_spelled(name) in held for name in shared)]


def _spelled(key: str) -> str:
    key = key.removeprefix("text_model.")
    for old, new in _RENAMED.items():
        key = key.replace(old, new)
    return key


def require_loaded(pipe: Any, name: str) -> None:
    """Refuse a pipeline some weight of which was left without memory.

    Raises:
        CannotAudit: naming the component and the weight.
    """
    for part, module in pipe.components.items():
        if not isinstance(module, nn.Module):
            continue
        for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_meta:
                raise CannotAudit(
                    f"{name} could not be opened: {part} was loaded without {key}; download or copy the model again, completely."
                )


def _short(value: Any) -> str:
    """A value of somebody's document in a sentence."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:79]}…"
