"""HOW to train so that less is memorized: a fine-tuning of text-to-image models with protection, resumable to the step.

from mnemoscope.train import TrainConfig, fine_tune

fine_tune(TrainConfig(model="MODEL", data="pictures", out="trained", filter="auto"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TrainConfig as TrainConfig
    from .loop import Trained as Trained
    from .run import fine_tune as fine_tune
    from .run import plan as plan

_HOME = {"TrainConfig": ".config", "Trained": ".loop", "fine_tune": ".run", "plan": ".run"}

__all__ = ["TrainConfig", "Trained", "fine_tune", "plan"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(__all__)}.")
    module = import_module(_HOME[name], __name__)
    return getattr(module, name)
