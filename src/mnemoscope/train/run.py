"""A training from its settings to its result: what callers call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from .. import redaction
from ..similarity.reading import Anything
from .config import TrainConfig
from .loop import Loop, Progress, Trained
from .prepare import Say, looked_at, new_accelerator, prepare, side_of, sole_trainer
from .trainee import open_trainee

__all__ = ["Plan", "fine_tune", "plan"]


@dataclass(frozen=True)
class Plan:
    """What a training would do.

    Attributes:
        settings: As they hold, defaults filled in.
        pictures: How many can be trained on.
        problems: What is wrong with others: id and reason.
        batch: Samples per step.
        epochs: How often each picture is visited, near-duplicates not yet looked for.
        parameters: How many are trained.
        forwards: Of one sample (F), the filter's included.
        backwards: Of one sample.
    """

    settings: dict[str, Any]
    pictures: int
    problems: list[dict[str, Any]]
    batch: int
    epochs: float
    parameters: int
    forwards: int
    backwards: int


def plan(config: TrainConfig) -> Plan:
    """Open the model and look at the pictures, and train nothing. Writes nothing."""
    with _accelerated(config) as accelerator:
        trainee = open_trainee(config, accelerator.device)
        side = side_of(trainee, config)
        found = looked_at(config, side)
        batch = config.batch_size * config.accumulate * accelerator.num_processes
        filtered = config.filter is not None or config.running_scores is not None
        return Plan(
            settings=redaction.cleaned(
                {**config.model_dump(mode="json"), "resolution": side, "lr": config.learning_rate}
            ),
            pictures=len(found),
            problems=[{"id": p.id, "reason": p.reason} for p in found.problems],
            batch=batch,
            epochs=config.steps * batch / len(found),
            parameters=sum(p.numel() for p in trainee.weights().values()),
            forwards=config.steps * batch * (2 if filtered else 1),
            backwards=config.steps * batch,
        )


def fine_tune(
    config: TrainConfig,
    *,
    progress: Callable[[Progress], None] = lambda p: None,
    say: Say = lambda text: None,
    command: str = "",
    data: Anything = None,
) -> Trained:
    """Train, or go on with the training in ``config.out``. Several processes of ``accelerate launch`` train together.

    Args:
        config: All settings.
        progress: Called after every reading of losses, by the main process.
        say: Told what is being prepared.
        command: What repeats the training, for the model card.
        data: A ``datasets`` data set in memory with pictures and captions, instead of what ``config.data`` names.

    Raises:
        RunError: the folder belongs to another training, or is in use.
        UsageError: the data or the settings cannot be trained with.
        CannotAudit: the model cannot be opened.
        ModelFault: the loss is not finite.
    """
    with _accelerated(config) as accelerator:
        main = accelerator.is_main_process
        with sole_trainer(Path(config.out), main):
            accelerator.wait_for_everyone()
            prepared = prepare(config, accelerator, say if main else lambda text: None, data)
            return Loop(prepared, accelerator, progress if main else lambda p: None).run(command)


@contextmanager
def _accelerated(config: TrainConfig) -> Iterator[Accelerator]:
    """An accelerator whose state ends with it, so that a process can train again with other settings."""
    accelerator = new_accelerator(config)
    try:
        yield accelerator
    finally:
        alone = accelerator.num_processes == 1
        accelerator.end_training()
        accelerator.free_memory()
        if alone:
            AcceleratorState._reset_state(reset_partial_state=True)
