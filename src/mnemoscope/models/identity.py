"""Which model is this? Hashes and settings, as plain JSON values.

Two runs may be compared only if their targets' fingerprints agree. Where a model came from (a path, a hub id, the hashes of
its files) is written down beside the fingerprint and is not part of it: a folder, a single file and a pipeline in memory
that hold the same weights are the same model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CannotAudit
from ..parsing import parse_json
from ..records.files import hash_file
from ..records.schema import PROVENANCE as PROVENANCE

PICKLES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl"})
"""Suffixes of checkpoints that run code when they are opened."""


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files that diffusers or transformers load from one component's folder, shards in order.

    Args:
        folder: For instance ``model/unet``.
        variant: For instance ``"fp16"``; where the component has no such files, the plain ones are loaded.

    Raises:
        CannotAudit: there are no safetensors: only pickles, or nothing at all.
    """
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    plain = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors")
    tagged = re.compile(
        rf"(diffusion_pytorch_model|model)(\.{v}(-\d+-of-\d+)?|-\d+-of-\d+\.{v})\.safetensors"
        if (v := re.escape(variant or ""))
        else r"(?!)"
    )
    chosen = [n for n in names if tagged.fullmatch(n)] or [n for n in names if plain.fullmatch(n)]
    if chosen:
        return [folder / n for n in chosen]
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES) if folder.is_dir() else []
    if pickles:
        raise CannotAudit(
            f"{folder} holds its weights as pickle only ({pickles[0]}), which can run code when opened; "
            f"ask its author for safetensors, or convert it in a sandbox with safetensors.torch.save_file."
        )
    raise CannotAudit(
        f"{folder} has no weights ({_instead(names, variant)}); download or copy the model again, completely."
    )


def _instead(names: Sequence[str], variant: str | None) -> str:
    """What a folder has instead of the weights that were looked for, in words."""
    if not names:
        return "no .safetensors file"
    return f"only {', '.join(names)}; perhaps another variant than {variant!r}"


def hash_bytes(data: bytes) -> str:
    """sha256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def vocabulary(tokenizer: Any) -> str:
    """sha256 of a tokenizer's tokens and their numbers."""
    words = "".join(f"{i} {token}\n" for token, i in sorted(tokenizer.get_vocab().items()))
    return hash_bytes(words.encode("utf-8", "surrogatepass"))


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """sha256 over names, dtypes, shapes and bytes in order of the names.

    Each tensor is hashed by itself, in threads: a model of several gigabytes takes seconds.
    """
    ordered = sorted(tensors, key=lambda item: item[0])
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_hash_tensor, (tensor for _, tensor in ordered))
        lines = [f"{name} {t.dtype} {list(t.shape)} {d}\n" for (name, t), d in zip(ordered, digests, strict=True)]
    return hash_bytes("".join(lines).encode())


def _hash_tensor(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()


def weights(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Component name → sha256 of the weights as they are loaded, without adapters."""
    return {name: hash_tensors(_own_tensors(module)) for name, module in modules.items()}


_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|base_layer|text_model)\.")
"""Parts of a tensor's name that say how a module is wrapped (by torch.compile, by peft, by some transformers versions)."""


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((_WRAPPERS.sub("", k), v) for k, v in module.state_dict().items() if "lora_" not in k)


def files(components: Mapping[str, Sequence[Path]], adapters: Mapping[str, Path]) -> dict[str, str]:
    """sha256 of every file that weights were loaded from: what the hub shows for it. Empty for a model made in memory.

    Args:
        components: Component name → its weight files. The key ``""`` is a single-file checkpoint.
        adapters: LoRA name → file.
    """
    found = {f"{name}/{p.name}" if name else p.name: p for name, paths in components.items() for p in paths}
    found |= {f"lora/{name}/{p.name}": p for name, p in adapters.items()}
    return {name: hash_file(path) for name, path in found.items()}


def adapters(modules: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
    """Every LoRA that sits in the model: name, scale, whether it is active, and a hash of its tensors.

    Read from the layers themselves, so that adapters a user loaded by hand are seen as well.
    """
    scales: dict[str, set[float]] = {}
    active: set[str] = set()
    for _, layer in _lora_layers(modules):
        for name, scaling in layer.scaling.items():
            scales.setdefault(name, set()).add(round(scaling / _factor(layer, name), 6))
        if not layer.disable_adapters:
            active |= set(layer.active_adapters)
    return [
        {
            "name": name,
            "scale": sorted(scales[name]) if len(scales[name]) > 1 else next(iter(scales[name])),
            "active": name in active,
            "sha256": _hash_adapter(modules, name),
        }
        for name in sorted(scales)
    ]


def _lora_layers(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    for part, module in modules.items():
        for path, layer in module.named_modules():
            if hasattr(layer, "lora_A"):
                yield f"{part}.{path}", layer


def _factor(layer: Any, name: str) -> float:
    """What peft multiplies a user's scale by: alpha / r (alpha / √r for rank-stabilized LoRA)."""
    return layer.lora_alpha[name] / layer.r[name] ** (0.5 if layer.use_rslora.get(name) else 1)


def _hash_adapter(modules: Mapping[str, nn.Module], name: str) -> str:
    """Over its tensors and their factors, whatever the adapter is called here."""
    tensors = {
        f"{part}.{_WRAPPERS.sub('', key)}".replace(f".{name}.", "."): tensor
        for part, module in modules.items()
        for key, tensor in module.state_dict().items()
        if "lora_" in key and f".{name}." in key
    }
    factors = {
        f"{_WRAPPERS.sub('', path)}.factor": torch.tensor(_factor(layer, name))
        for path, layer in _lora_layers(modules)
        if name in layer.scaling
    }
    return hash_tensors({**tensors, **factors}.items())


def scheduler_fields(scheduler: Any) -> dict[str, Any]:
    """Class and settings of a diffusers scheduler, without what only says which release wrote them."""
    known = type(scheduler)._get_init_keys(type(scheduler)) - {"self", "kwargs"}
    fields = {k: v for k, v in scheduler.config.items() if k in known and not k.startswith("_")}
    return {"class": type(scheduler).__name__, **plain(fields)}


def plain(value: Any) -> Any:
    """``value`` as JSON would give it back (tuples become lists, arrays become lists)."""
    return parse_json(json.dumps(value, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v)), lenient=True)


def with_fingerprint(identity: dict[str, Any]) -> dict[str, Any]:
    """``identity`` with a short hash over all of it but its provenance."""
    matter = {k: v for k, v in identity.items() if k not in PROVENANCE}
    digest = hashlib.sha256(json.dumps(plain(matter), sort_keys=True).encode()).hexdigest()
    return {**identity, "fingerprint": digest[:16]}
