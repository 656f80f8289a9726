"""Facts about this installation, for bug reports."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .screen import enabled, size

PACKAGES = (
    "mnemoscope",
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "numpy",
    "scipy",
    "scikit-learn",
    "pillow",
)


def examine() -> dict[str, Any]:
    """What was found, in words; nothing is loaded but torch."""
    facts: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "missing: pip install mnemoscope"
    facts |= _devices()
    home = Path(
        os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    )
    facts["model cache"] = f"{home} ({'exists' if home.is_dir() else 'empty'})"
    facts["offline"] = "yes (HF_HUB_OFFLINE)" if enabled("HF_HUB_OFFLINE") else "no"
    facts["free disk here"] = size(shutil.disk_usage(Path.cwd()).free)
    facts["bundled models"] = _bundled()
    return facts


def _devices() -> dict[str, Any]:
    try:
        import torch
    except ImportError as e:
        return {"devices": f"torch cannot be imported ({e})"}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    mps = ["Apple GPU (mps)"] if torch.backends.mps.is_available() else []
    return {"devices": ", ".join([*gpus, *mps, f"CPU with {torch.get_num_threads()} threads"])}


def _bundled() -> str:
    assets = Path(__file__).parent.parent / "demo" / "assets"
    found = [name for name in ("text-to-image", "unconditional") if (assets / name / "model_index.json").is_file()]
    return ", ".join(found) or "missing: reinstall mnemoscope"
