"""Everything that happens before the first step: the folder, the model, the pictures, what is cached of them, and the protection."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..errors import RunError, UnknownName, UsageError
from ..mitigate.timesteps import TimestepThresholds
from ..mitigate.training import MemorizationFilter
from ..records.documents import read_json
from ..records.store import differences, digest, explained, locked, write_whole
from ..similarity.reading import Anything
from .cache import Captions, LatentCache, encode_pictures
from .config import TrainConfig
from .data import TrainingSet, read_training_set, write_problems
from .protect import Split, augmentation, clean_thresholds, memorization_filter, split
from .repeats import Repeats, find_repeats, read_repeats, without_repeats, write_repeats
from .trainee import Objective, Trainee, open_trainee

__all__ = ["Prepared", "Say", "looked_at", "new_accelerator", "prepare", "sole_trainer"]

Say = Callable[[str], None]
"""Is told sentences."""

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "comet_ml": "comet_ml", "aim": "aim"}
"""Names of accelerate's trackers and the packages they need."""


@dataclass
class Prepared:
    """What a training works with.

    Attributes:
        config: Its settings.
        folder: Where it writes.
        trainee: The model.
        objective: Its loss.
        data: The pictures.
        found: The same before near-duplicates were dropped, with what is wrong with the others.
        repeats: Near-duplicates; None: not looked for.
        split: What each picture is for.
        latents: Of all pictures.
        captions: Of all pictures.
        memory: The filter; None: none.
        clean: Its thresholds; None: none.
        settings: What the result depends on, as ``train.json`` has it.
    """

    config: TrainConfig
    folder: Path
    trainee: Trainee
    objective: Objective
    data: TrainingSet
    found: TrainingSet
    repeats: Repeats | None
    split: Split
    latents: LatentCache
    captions: Captions
    memory: MemorizationFilter | None
    clean: TimestepThresholds | None
    settings: dict[str, Any]


def new_accelerator(config: TrainConfig) -> Accelerator:
    """The processes and devices that train together, as accelerate was launched.

    Raises:
        UsageError: the tracker's package, peft or a kind of sharding that is not supported is asked for.
    """
    if config.lora is not None and importlib.util.find_spec("peft") is None:
        raise UsageError("a LoRA needs peft, which is not installed; install it with: pip install 'mnemoscope[train]'")
    if config.tracker is not None:
        if config.tracker not in TRACKERS:
            raise UnknownName("tracker", config.tracker, TRACKERS)
        if importlib.util.find_spec(TRACKERS[config.tracker]) is None:
            raise UsageError(
                f"tracker {config.tracker} is not installed; pip install {TRACKERS[config.tracker]}, or leave it out."
            )
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            cpu=config.device == "cpu",
            log_with=config.tracker,
            project_dir=str(Path(config.out) / "tracked") if config.tracker else None,
        )
    except ValueError as e:
        raise UsageError(f"accelerate cannot start with mixed-precision {config.mixed_precision} here: {e}") from e
    if accelerator.distributed_type.value in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        raise UsageError(
            f"{accelerator.distributed_type.value} splits weights over processes, which this training does not support; launch "
            f"accelerate with several GPUs or one."
        )
    return accelerator


@contextmanager
def sole_trainer(folder: Path, main: bool) -> Iterator[None]:
    """Hold a folder, so that no second command writes into it."""
    if not main:
        yield
        return
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock-train"):
        yield


def looked_at(config: TrainConfig, side: int, data: Anything = None) -> TrainingSet:
    """The pictures of a training, or of other data, looked at one by one.

    Raises:
        UsageError: none of them can be trained on.
    """
    found = read_training_set(
        config.data if data is None else data,
        min_side=config.min_side or side,
        max_aspect=config.max_aspect,
        caption_column=config.caption_column,
        image_column=config.image_column,
    )
    if not found.pictures:
        first = f" (the first: {found.problems[0].id}, {found.problems[0].reason})" if found.problems else ""
        raise UsageError(
            f"{data if isinstance(data, str) else config.data} holds no picture that can be trained on{first}."
        )
    return found


def prepare(config: TrainConfig, accelerator: Accelerator, say: Say, data: Anything = None) -> Prepared:
    """Open and look at everything, and write down what was found. ``data`` stands for ``config.data`` where it is in memory.

    Raises:
        RunError: the folder belongs to another training.
        UsageError: the data cannot be trained on, or settings do not fit it.
    """
    folder, main = Path(config.out), accelerator.is_main_process
    named = _named_thresholds(config)
    _refuse_others(folder, config.identity())
    trainee = open_trainee(config, accelerator.device)
    side = side_of(trainee, config)
    found = looked_at(config, side, data)
    settings = {
        **config.identity(), "resolution": side, "pictures": found.digest(), "processes": accelerator.num_processes,
        "revision": trainee.origin.revision, "thresholds": None if named is None else digest(named.record.model_dump()),
    }  # fmt: skip
    accelerator.wait_for_everyone()
    _refuse_others(
        folder, settings
    )  # before anything is written: what is refused must leave the other training as it is
    _say_problems(found, config, say)
    if main:
        write_problems(folder / "problems.jsonl", found.problems)
        write_whole(folder / "train.json", (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())
    kept, repeats = _deduped(config, found, folder, say)
    texts = [p.captions for p in kept.pictures]
    parts = split(config, texts)
    if main and parts.plan is not None:
        parts.plan.save(folder / "canaries.json")
    say(f"Encoding {len(kept):,} pictures …")
    latents = encode_pictures(
        trainee.target, kept, side, flip=config.flip, file=folder / "latents.bin",
        gigabytes=config.cache_gigabytes, tell=_now_and_then(say, len(kept)),
    )  # fmt: skip
    noise = config.augment_scale if config.augment == "embedding-noise" else 0.0
    captions = Captions(
        trainee.target, texts, augmentation(config, trainee), noise=noise, gigabytes=config.cache_gigabytes
    )
    objective = Objective(trainee.scheduler, config.snr_gamma)
    prepared = Prepared(
        config, folder, trainee, objective, kept, found, repeats, parts, latents, captions, None, None, settings
    )
    prepared.clean = named or _fitted_thresholds(prepared, side, accelerator, say)
    prepared.memory = memorization_filter(config, trainee, captions.null.tokens, prepared.clean, len(kept))
    return prepared


def side_of(trainee: Trainee, config: TrainConfig) -> int:
    """In pixels."""
    _, height, width = trainee.target.latent_shape
    if height != width:
        raise UsageError(
            f"{trainee.target.name} draws {height * trainee.target.factor}×{width * trainee.target.factor} pixels, and pictures are cut "
            f"to squares; give a resolution."
        )
    return height * trainee.target.factor


def _refuse_others(folder: Path, settings: dict[str, Any]) -> None:
    """A folder holds one training.

    Args:
        folder: Of the training.
        settings: Its own, or those that are known before anything is opened.
    """
    path = folder / "train.json"
    if not path.is_file():
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        if strangers := [name for name in there if name not in OURS and not name.startswith(".")]:
            raise RunError(f"{folder} holds {strangers[0]!r} and no training; choose a new folder.")
        return
    try:
        stored = read_json(path)
    except ValueError as e:
        raise RunError(f"{path} is damaged ({e}); restore it, or start in a new folder.") from None
    asked = {k: v for k, v in settings.items() if k != "resolution" or v is not None}
    known = {k: v for k, v in stored.items() if k in asked}
    if found := differences(known, asked):
        raise RunError(
            f"{folder} holds a training with other settings ({found[0]}); repeat its command, or choose a new folder."
        )


OURS = frozenset({"problems.jsonl", "duplicates.json", "duplicates", "tracked"})
"""What stands in the folder of a training that was killed before it had settings."""


def _now_and_then(say: Say, of: int, every: float = 10.0) -> Callable[[int], None]:
    last = time.monotonic()

    def tell(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= every:
            last = time.monotonic()
            say(f"  {done:,} of {of:,}")

    return tell


def _say_problems(found: TrainingSet, config: TrainConfig, say: Say) -> None:
    if not found.left_out:
        return
    counts: dict[str, int] = {}
    for problem in found.problems:
        kind = problem.reason.partition(":")[0]
        counts[kind] = counts.get(kind, 0) + 1
    listing = ", ".join(f"{n:,} {kind}" for kind, n in counts.items())
    if config.strict:
        raise UsageError(
            f"{found.left_out:,} of {config.data} cannot be trained on ({listing}); see {config.out}/problems.jsonl, or leave "
            f"strict out."
        )
    say(f"Left out: {listing}; see {config.out}/problems.jsonl")


def _deduped(config: TrainConfig, found: TrainingSet, folder: Path, say: Say) -> tuple[TrainingSet, Repeats | None]:
    """The set that is trained on, and what was found of near-duplicates."""
    if config.dedupe == "off":
        return found, None
    path = folder / "duplicates.json"
    with locked(folder / ".lock-duplicates", wait=-1.0):  # of several processes the first one looks
        known = read_repeats(path, found)
        if known is None:
            say(f"Looking for near-duplicates among {len(found):,} pictures …")
            index = folder / "duplicates"
            known = find_repeats(found, index, descriptor=config.descriptor, threshold=config.dedupe_threshold)
            write_repeats(path, found, known, config.dedupe)
    say(f"Near-duplicates: {known.redundant:,} of {len(found):,} pictures dropped, listed in {path}")
    return without_repeats(found, known, merge=config.dedupe == "merge"), known


def _named_thresholds(config: TrainConfig) -> TimestepThresholds | None:
    """τ(t) of a file; None: none is named."""
    return (
        TimestepThresholds.load(config.filter) if isinstance(config.filter, str) and config.filter != "auto" else None
    )


def _fitted_thresholds(prepared: Prepared, side: int, accelerator: Accelerator, say: Say) -> TimestepThresholds | None:
    """τ(t) that this training fits before its first step, once; None: nobody needs them."""
    path = prepared.folder / "tau.json"
    if not prepared.config.needs_clean:
        return None
    missing = not path.is_file()
    accelerator.wait_for_everyone()  # so that all have seen the same
    if missing:
        say("Taking magnitudes of clean pictures …")
        with accelerator.autocast():  # by every process: a filter counts over all of them
            fitted = _fit(prepared, side)
        if accelerator.is_main_process:
            fitted.save(path)
        accelerator.wait_for_everyone()
    return TimestepThresholds.load(path)


def _fit(prepared: Prepared, side: int) -> TimestepThresholds:
    config, trainee = prepared.config, prepared.trainee
    if config.clean is None:
        rows, source = prepared.split.heldout, f"{len(prepared.split.heldout)} pictures held out of {config.data}"
        latents, captions = prepared.latents, prepared.captions
    else:
        clean = looked_at(config, side, config.clean)
        rows, source = tuple(range(len(clean))), f"{len(clean)} pictures of {config.clean}"
        latents = encode_pictures(
            trainee.target, clean, side, flip=False, file=prepared.folder / "latents-clean.bin",
            gigabytes=config.cache_gigabytes,
        )  # fmt: skip
        captions = Captions(
            trainee.target, [p.captions for p in clean.pictures], prepared.captions.augment, noise=prepared.captions.noise,
            gigabytes=config.cache_gigabytes,
        )  # fmt: skip
    source += f"; {trainee.target.name} before its first step"
    return clean_thresholds(config, trainee, prepared.objective, latents, captions, rows, source)
