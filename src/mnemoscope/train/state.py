"""Everything that a step changes, as files of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..mitigate.visits import RunningScores
from .checkpoint import optimizer_tensors, read_state, read_tensors, restore_optimizer
from .trainee import Average, Trainee

__all__ = ["State"]


@dataclass
class State:
    """What a training goes on from.

    Attributes:
        trainee: The model.
        weights: What is trained, by name.
        optimizer: Its optimizer, bare.
        average: Of the weights; None: none.
        scores: Of every picture; None: none.
        scaler: Of float16 gradients; None: none.
        stopped: Whether the training has ended before its time.
    """

    trainee: Trainee
    weights: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: Average | None
    scores: RunningScores | None
    scaler: Any
    stopped: bool = False

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the model is as it is sampled from and saved."""
        return nullcontext() if self.average is None else self.average.inside()

    def fill(self, folder: Path) -> dict[str, Any]:
        """Write all of it into a folder; returns what is no tensor."""
        if self.trainee.rank is None:
            (folder / "unet").mkdir()
            self.trainee.pipe.unet.save_config(folder / "unet")
        else:
            with self.averaged():
                self.trainee.save_lora(folder)
        save_file(_plain(self.weights), folder / self._weights_file())
        save_file(optimizer_tensors(self.optimizer), folder / "optimizer.safetensors")
        if self.average is not None:
            save_file(_plain(self.average.shadow), folder / "average.safetensors")
        if self.scores is not None:
            self.scores.save(folder / "scores.safetensors")
        return {"stopped": self.stopped, "scaler": None if self.scaler is None else self.scaler.state_dict()}

    def restore(self, folder: Path) -> None:
        """Take up what :meth:`fill` wrote.

        Raises:
            RunError: it is damaged.
        """
        state = read_state(folder)
        _put(self.weights, read_tensors(folder / self._weights_file()))
        restore_optimizer(self.optimizer, read_tensors(folder / "optimizer.safetensors"))
        if self.average is not None:
            _put(self.average.shadow, read_tensors(folder / "average.safetensors"))
        if self.scores is not None:
            self.scores.load(folder / "scores.safetensors")
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.stopped = state["stopped"]

    def _weights_file(self) -> str:
        """A whole UNet is kept as diffusers names it, so that an audit can open a checkpoint."""
        return "weights.safetensors" if self.trainee.rank else "unet/diffusion_pytorch_model.safetensors"


@torch.no_grad()
def _put(into: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(tensors[name])


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().contiguous() for name, t in tensors.items()}
