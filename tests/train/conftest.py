"""A tiny model in a folder, pictures of its size with captions, and a training that takes a second."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from train_worlds import NUMBER, picture


@pytest.fixture(scope="session")
def tiny_folder(build_pipe, tmp_path_factory) -> Path:
    """The tiny Stable Diffusion pipeline, saved."""
    folder = tmp_path_factory.mktemp("model")
    build_pipe("sd").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def captioned(tmp_path_factory) -> Path:
    """24 different pictures with captions in metadata.jsonl."""
    folder = tmp_path_factory.mktemp("captioned")
    lines = []
    for i in range(NUMBER):
        picture(i).save(folder / f"{i:02d}.png")
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": f"picture of thing {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def settings(tiny_folder, captioned, tmp_path) -> Callable[..., Any]:
    """``settings(**changes)``: a short training of the tiny model on the CPU."""
    from mnemoscope.train.config import TrainConfig

    plain = {
        "model": str(tiny_folder), "data": str(captioned), "out": str(tmp_path / "out"), "device": "cpu", "steps": 4,
        "batch_size": 2, "save_every": 2, "log_every": 1, "lr": 1e-3,
    }  # fmt: skip
    return lambda **changes: TrainConfig(**{**plain, **changes})


@pytest.fixture
def train() -> Callable[..., Any]:
    """``train(config, **more)``: the training itself."""
    from mnemoscope.train import fine_tune

    def run(config: Any, **more: Any) -> Any:
        with warnings.catch_warnings():
            # accelerate asks whether a GPU of another maker is there; torch warns of what it looks at.
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(accelerate|torch)\.")
            return fine_tune(config, **more)

    return run
