"""The state of a training on disk, so that a kill at any instant loses what came after the last checkpoint and nothing else.

A checkpoint is a folder that appears at once, complete: weights, optimizer, average and running scores as safetensors, and
``state.json``. No pickle. Logs are cut back to the checkpoint that a training goes on from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import RunError
from ..parsing import parse_json
from ..records.documents import read_json
from ..records.store import explained, write_whole

__all__ = ["Checkpoints", "StepLog", "optimizer_tensors", "restore_optimizer"]

NAME = re.compile(r"step-(\d+)")


class Checkpoints:
    """The checkpoints of one training, oldest first.

    Args:
        folder: Where they are.
        keep: How many are kept.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def found(self) -> list[tuple[int, Path]]:
        """Steps and folders."""
        there = self.folder.iterdir() if self.folder.is_dir() else ()
        named = ((NAME.fullmatch(p.name), p) for p in there)
        return sorted((int(m[1]), p) for m, p in named if m and (p / "state.json").is_file())

    def latest(self) -> tuple[int, Path] | None:
        """The one to go on from; None: start at the beginning."""
        return max(self.found(), default=None)

    def write(self, step: int, fill: Callable[[Path], Mapping[str, Any]]) -> Path:
        """Write one, and remove those that are too many.

        Args:
            step: How many steps are done.
            fill: Writes files into a folder, and returns what else is to be known, as plain values.

        Raises:
            RunError: the disk is full, or cannot be written to; earlier checkpoints are as they were.
        """
        place = self.folder / f"step-{step:07d}"
        half = self.folder / f".{place.name}.{os.getpid()}"
        with weights_explained(self.folder):
            self._sweep()
            half.mkdir(parents=True)
            try:
                state = {"step": step, **fill(half)}
                (half / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
                _to_disk(half)
                shutil.rmtree(place, ignore_errors=True)
                half.replace(place)
            except BaseException:
                shutil.rmtree(half, ignore_errors=True)  # half a checkpoint would hold what a full disk lacks
                raise
            for _, old in self.found()[: -self.keep]:
                shutil.rmtree(old)
        return place

    def _sweep(self) -> None:
        """Remove what killed processes left."""
        for old in self.folder.glob(".step-*"):
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def weights_explained(folder: Path) -> Iterator[None]:
    """As :func:`~mnemoscope.records.store.explained`; safetensors reports what the disk says by an error of its own.

    Raises:
        RunError: the folder cannot be written.
    """
    with explained(folder):
        try:
            yield
        except SafetensorError as e:
            if (number := re.search(r"\(os error (\d+)\)", str(e))) is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from e


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A file of a checkpoint, on the CPU.

    Raises:
        RunError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise RunError(
            f"{path} cannot be read ({e}); remove {path.parent}, and the command goes on from an earlier one."
        ) from e


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        RunError: it is damaged.
    """
    try:
        return read_json(folder / "state.json")
    except (OSError, ValueError) as e:
        raise RunError(
            f"{folder}/state.json cannot be read ({e}); remove {folder}, and the command goes on without."
        ) from e


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments and counts as named tensors: ``"3.exp_avg"`` is of the fourth parameter."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": t.contiguous() for i, tensors in state.items() for name, t in tensors.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take up what :func:`optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


class StepLog:
    """JSON lines that belong to steps, such as ``losses.jsonl``.

    Args:
        path: The file.
    """

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All lines but one that was cut off by a kill."""
        if not self.path.is_file():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]
        return [parse_json(line) for line in lines]

    def cut(self, step: int) -> None:
        """Forget what came after a step."""
        kept = [line for line in self.read() if line["step"] <= step]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add lines."""
        with explained(self.path.parent), self.path.open("ab") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def _to_disk(folder: Path) -> None:
    """A machine that loses power must not keep the name of a folder and lose its content."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)
