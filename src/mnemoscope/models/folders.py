"""What a model folder says of itself: read as data, and checked before a library builds anything from it.

diffusers and transformers take class names, programs, numbers and file names from these documents at their word: they import what a
document names, run what lies beside it, and allocate what it asks for. Here a name must be that of a class which is installed and is what
its place needs, a number must be finite, and a network must have about as many weights as its files hold. Links are followed, because the
hub's cache consists of them.
"""

from __future__ import annotations

import json
import math
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
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import CannotAudit
from ..records.files import read_regular

Shapes: TypeAlias = Mapping[str, Sequence[int]]
"""Tensor name → its shape, of the files of one component."""

UNNEEDED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that no audit needs: not downloaded, not loaded."""

LARGEST = 8 << 20
"""Bytes that a document may have which is read here."""

LARGEST_VOCABULARY = 256 << 20
"""Bytes that the files of a tokenizer may have, each."""

DEEPEST = 50
"""Levels of lists and objects within each other that a document may have."""

MOST_TIMESTEPS = 100_000
"""Training timesteps that a scheduler may have; published models have 1000, a few 4000."""

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

_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_SETTINGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "generation_config.json")
_SHARDS = ".safetensors.index.json"
_RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""What early versions of diffusers called parts of an attention layer, and what they are loaded as."""

_OPENING = (
    OSError, ValueError, RuntimeError, LookupError, ArithmeticError, TypeError, AttributeError, AssertionError, ImportError,
    MemoryError, SafetensorError,
)  # fmt: skip


@contextmanager
def opening(name: str) -> Iterator[None]:
    """Turns what diffusers raises on a damaged or foreign model into a sentence; the cause stays attached."""
    try:
        yield
    except _OPENING as e:
        raise CannotAudit(f"{name} could not be opened: {first_line(e)}") from e


def first_line(e: BaseException) -> str:
    """The first line of an error that says anything."""
    return next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)


# Documents ----------------------------------------------------------------------------------------------------------------


def read_document(path: Path) -> Any:
    """A JSON document of bounded size and depth, all numbers of which are finite.

    Raises:
        FileNotFoundError: there is none.
        CannotAudit: it is no regular file, too large, no JSON, or holds a number that is not finite.
    """
    try:
        document = json.loads(read_regular(path, LARGEST))
        for name, value, depth in _parts(document):
            if depth > DEEPEST:
                raise ValueError(f"its parts lie more than {DEEPEST} deep in each other")
            # The one setting of diffusers whose default is infinite: no bound.
            if isinstance(value, float) and not math.isfinite(value) and name != "lambda_min_clipped":
                raise ValueError(f"{_short(name)} is {value}, which is no number to compute with")
    except FileNotFoundError:
        raise
    except OSError as e:
        raise CannotAudit(f"{path} cannot be read ({e.strerror or e}); download or copy it again.") from e
    except (ValueError, RecursionError) as e:
        raise CannotAudit(f"{path} is damaged ({first_line(e)}); download or copy it again.") from e
    return document


def _parts(document: Any) -> Iterator[tuple[str, Any, int]]:
    """Everything in a document: the name that it stands under, its value, and how deep it lies."""
    waiting: list[tuple[str, Any, int]] = [("it", document, 1)]
    while waiting:
        name, value, depth = part = waiting.pop()
        yield part
        if depth > DEEPEST:
            continue
        if isinstance(value, dict):
            waiting += [(k, v, depth + 1) for k, v in value.items()]
        elif isinstance(value, list):
            waiting += [(name, v, depth + 1) for v in value]


def read_settings(path: Path) -> dict[str, Any]:
    """As :func:`read_document`, for a document that must be there and hold named settings.

    Raises:
        CannotAudit: as there, or there is none, or it is of another form.
    """
    try:
        settings = read_document(path)
    except FileNotFoundError:
        raise CannotAudit(f"there is no {path}; download or copy the model again, completely.") from None
    if not isinstance(settings, dict):
        raise CannotAudit(f"{path} is damaged (it holds no named settings); download or copy it again.")
    return settings


def require_data(folder: Path) -> None:
    """Refuse a component's folder that holds more than data, or whose documents name programs or files elsewhere.

    Raises:
        CannotAudit: naming the file.
    """
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
        elif file.name.endswith(_SHARDS):
            _require_shards(read_settings(file), file)


def _require_no_programs(settings: Mapping[str, Any], file: Path) -> None:
    """Refuse settings that have transformers fetch code, and a class of its own that diffusers does not have."""
    for name, value, _ in _parts(settings):
        kernels = value.values() if isinstance(value, dict) else [value]
        # A name with a slash is that of a repository on the hub, whose code computes the attention.
        if name == "auto_map" or (
            name.endswith("_implementation") and any("/" in k for k in kernels if isinstance(k, str))
        ):
            raise CannotAudit(f"{file} names code of its own ({name}); code that a model brings is not run.")
    kind = settings.get("_class_name")
    if kind is not None and not isinstance(_attribute(diffusers, kind), type):
        raise CannotAudit(
            f"{file} is of a {_short(kind)}, which is no class of diffusers; code that a model brings is not run."
        )


def _require_shards(settings: Mapping[str, Any], file: Path) -> None:
    """Refuse a list of weight files that are not safetensors beside it."""
    shards = settings.get("weight_map")
    names = set(map(str, shards.values())) if isinstance(shards, dict) else {"nothing"}
    here = {p.name for p in file.parent.glob("*.safetensors")}
    if strange := sorted(names - here):
        raise CannotAudit(
            f"{file} names {_short(strange[0])}, which is no safetensors file beside it; download or copy the model again."
        )


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
        if name in _PRIVATE or (name.isidentifier() and name[0] != "_" and isinstance(entry, bool | int | float)):
            continue
        if reason := _wrong(name, entry):
            raise CannotAudit(
                f"{file} gives {_short(name)} as {_short(entry)}: {reason}; code that a model brings is not run."
            )
        if entry[0] is not None and name not in UNNEEDED:
            found[name] = getattr(_LIBRARIES[entry[0]], entry[1])
    return found


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
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_TIMESTEPS:
        raise CannotAudit(
            f"{file}: num_train_timesteps is {_short(steps)}; it must be a whole number from 1 to {MOST_TIMESTEPS:,}."
        )
    for name in ("shift", "flow_shift"):
        value = settings.get(name, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise CannotAudit(f"{file}: {name} is {_short(value)}; it must be a number above 0.")


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
    if not packed and (missing := _missing(network, stored)):
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
        CannotAudit: it would have more than about twice as many.
    """
    # Twice, because files that lack something are a case of their own; and room for what is computed in place of stored.
    most, most_tensors = 2 * held + (1 << 20), 4 * tensors + 1000
    described = CannotAudit(
        f"{folder} could not be opened: its config.json describes far more weights than its files hold ({held:,} numbers in {tensors:,} "
        f"tensors); download or copy it again."
    )
    # No width, length or number of layers is larger than all of it; some become lists before a layer is made.
    if any(isinstance(value, int) and value > most for _, value, _ in _parts(settings)):
        raise described
    with opening(str(folder)), _silent(), torch.device("meta"), _at_most(most_tensors, described):
        if issubclass(kind, PreTrainedModel):
            network = kind(kind.config_class.from_dict(dict(settings)))
        else:
            network = kind.from_config(dict(settings))
    if sum(tensor.numel() for tensor in [*network.parameters(), *network.buffers()]) > most:
        raise described
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
