"""``mnemoscope train``: fine-tune a text-to-image model with protection from memorization."""

from __future__ import annotations

import os
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..bounds import AMOUNT, COUNT, FACTOR, POSITIVE, RATE, REST, SEED, SIDE, SIMILARITY, SIZE
from ..errors import UsageError
from ..parsing import json_lines, lines_of
from ..records.files import open_regular
from . import places, screen
from .pairs import model_options, number_option
from .pairs import option as _option

if TYPE_CHECKING:
    from ..train.config import TrainConfig
    from ..train.loop import Trained
    from ..train.run import Plan

SHOWN = 12
"""Rows of a table on the terminal."""


def train(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder or .safetensors file of the model; 'demo' is the bundled one.")
    ],
    data: Annotated[
        Path,
        typer.Argument(
            help="Folder of pictures with captions, data set that `datasets` saved, or Parquet.",
            parser=places.file_or_folder,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Where everything is written; the same command continues.", parser=places.written_folder),
    ] = Path("runs/train"),
    steps: Annotated[int | None, number_option(COUNT, "Steps of the optimizer; default 1000.")] = None,
    batch_size: Annotated[int | None, number_option(COUNT, "Pictures per pass of one process; default 4.")] = None,
    accumulate: Annotated[int | None, number_option(COUNT, "Passes whose gradients make one step; default 1.")] = None,
    lr: Annotated[
        float | None, number_option(POSITIVE, "Learning rate; default 1e-4 with --lora, 1e-5 without.")
    ] = None,
    schedule: Annotated[str | None, _option("constant (default), linear or cosine.")] = None,
    warmup: Annotated[int | None, number_option(AMOUNT, "Steps over which the learning rate rises.")] = None,
    lora: Annotated[int | None, number_option(COUNT, "Rank of a LoRA; default: the whole UNet is trained.")] = None,
    resolution: Annotated[int | None, number_option(SIDE, "Side in pixels; default: the model's own.")] = None,
    flip: Annotated[bool | None, _option("Mirror half of the visits.", "--flip/--no-flip")] = None,
    min_side: Annotated[
        int | None, number_option(COUNT, "Leave out pictures with a shorter side than this; default: the resolution.")
    ] = None,
    max_aspect: Annotated[
        float | None,
        number_option(FACTOR, "Leave out pictures that are longer than this many times their width; default 3."),
    ] = None,
    ema: Annotated[bool | None, _option("Save a moving average of the weights.", "--ema/--no-ema")] = None,
    mixed_precision: Annotated[str | None, _option("no (default), fp16 or bf16.")] = None,
    gradient_checkpointing: Annotated[
        bool | None, _option("Less memory, more time.", "--gradient-checkpointing/--no-gradient-checkpointing")
    ] = None,
    caption_dropout: Annotated[
        float | None, number_option(REST, "Share of visits with the empty prompt, for guidance; default 0.")
    ] = None,
    snr_gamma: Annotated[
        float | None, number_option(POSITIVE, "γ of Min-SNR weights, for instance 5; default: none.")
    ] = None,
    seed: Annotated[int | None, number_option(SEED, "Of all draws; default 0.")] = None,
    filter: Annotated[
        str | None, _option("Leave memorized samples out of the loss: a threshold, auto, or a tau.json.")
    ] = None,
    filter_drop: Annotated[
        float | None, number_option(RATE, "Share of clean samples that an automatic filter may drop; default 0.05.")
    ] = None,
    clean: Annotated[
        Path | None,
        _option(
            "Captioned pictures known to be clean; default: a part of DATA is held out.", parser=places.file_or_folder
        ),
    ] = None,
    heldout: Annotated[float | None, number_option(RATE, "How large a part; default 0.1.")] = None,
    running_scores: Annotated[
        str | None, _option("Keep a record of every picture: flag, down-weight or drop those that stand out.")
    ] = None,
    augment: Annotated[
        str | None,
        _option(
            "Change captions at every visit: random-tokens, replaced-tokens, random-numbers, repeated-words or embedding-noise."
        ),
    ] = None,
    augment_count: Annotated[int | None, number_option(COUNT, "Words that are changed; default 4.")] = None,
    augment_scale: Annotated[float | None, number_option(POSITIVE, "λ of embedding-noise; default 0.1.")] = None,
    canaries: Annotated[
        str | None, _option("Plant pictures of DATA: copies:number, for instance 0:20,1:20,16:20,64:20.")
    ] = None,
    canaries_every: Annotated[
        int | None, number_option(COUNT, "Steps between looks at them; default --save-every.")
    ] = None,
    canary_threshold: Annotated[
        float | None,
        number_option(SIMILARITY, "Similarity of a copy; with it pictures are made, and copies end the training."),
    ] = None,
    canary_screen: Annotated[
        str | None, _option("A cheap measure of how strongly each is stored, for instance denoising-loss.")
    ] = None,
    dedupe: Annotated[
        str | None, _option("Near-duplicates: off (default), drop all but one, or merge their captions.")
    ] = None,
    dedupe_threshold: Annotated[
        float | None, number_option(SIMILARITY, "Similarity of near-duplicates; default: the descriptor's.")
    ] = None,
    descriptor: Annotated[str | None, _option("What says how similar two pictures are; default fingerprint.")] = None,
    save_every: Annotated[int | None, number_option(COUNT, "Steps between checkpoints; default 500.")] = None,
    keep: Annotated[int | None, number_option(COUNT, "Checkpoints that are kept; default 2.")] = None,
    log_every: Annotated[int | None, number_option(COUNT, "Steps between lines of progress; default 10.")] = None,
    validation_prompts: Annotated[
        list[str] | None, _option("Draw and score this prompt while training; repeatable.", "--validation-prompt")
    ] = None,
    validate_every: Annotated[int | None, number_option(COUNT, "Steps between these; default --save-every.")] = None,
    tracker: Annotated[str | None, _option("tensorboard, wandb, mlflow, …: where losses go too.")] = None,
    caption_column: Annotated[
        str | None, _option("Column or key of the caption; default: text, caption or prompt.")
    ] = None,
    image_column: Annotated[str | None, _option("Column of the pictures; default: the only one that can.")] = None,
    strict: Annotated[bool | None, _option("Refuse data with any fault.", "--strict/--no-strict")] = None,
    cache_gigabytes: Annotated[
        float | None, number_option(SIZE, "Memory for latents and captions; default 8. More latents go to a file.")
    ] = None,
    device: Annotated[str | None, _option("cpu; default: what accelerate chooses.")] = None,
    model_option: Annotated[
        list[str] | None, _option("name=value handed to the loader: revision, variant; repeatable.", "--model-option")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Look at model and data, print the resolved settings; train nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Fine-tune a text-to-image model with protection from memorization; the same command continues an interrupted training.

    Example: mnemoscope train MODEL pictures --out runs/mine --lora 8 --dedupe merge --filter auto --running-scores flag

    On several GPUs: accelerate launch --multi_gpu -m mnemoscope train MODEL pictures …
    """
    given = {k: v for k, v in locals().items() if k not in ("dry_run", "as_json", "model_option") and v is not None}
    from ..train.config import TrainConfig

    settings = TrainConfig(**given, model_options=model_options(model_option))
    if isinstance(settings.filter, str) and settings.filter != "auto":
        places.file(settings.filter)
    main = os.environ.get("RANK", "0") == "0"
    if not main:
        screen.QUIET = True
    screen.say_loading(f"Loading {model} …")
    try:
        from ..train.run import fine_tune, plan
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        if package not in ("accelerate", "peft", "datasets"):
            raise
        raise UsageError(
            f"`mnemoscope train` needs {package}, which is not installed; install it with: pip install 'mnemoscope[train]'"
        ) from e
    if dry_run:
        planned = plan(settings)
        if main:
            _show_plan(planned, as_json=as_json)
        return
    with screen.stoppable(), screen.progress("train") as progress:
        trained = fine_tune(settings, progress=progress, say=screen.say, command=screen.command())
    if main:
        _show(trained, settings, as_json=as_json)


def _show_plan(plan: Plan, *, as_json: bool) -> None:
    if as_json:
        screen.show_json(asdict(plan))
        return
    screen.table(
        ["setting", "value"], [[k, _value(v)] for k, v in plan.settings.items() if v not in (None, {}, [], ())]
    )
    if plan.problems:
        screen.show()
        shown = plan.problems[:SHOWN]
        screen.table(["left out", "reason"], [[p["id"], p["reason"]] for p in shown])
        if len(plan.problems) > SHOWN:
            screen.show(f"… and {len(plan.problems) - SHOWN} more")
    screen.show()
    screen.show(
        f"{plan.pictures:,} pictures, {plan.batch} per step, each visited {plan.epochs:.1f} times; {plan.parameters:,} weights; "
        f"{plan.forwards:,} forwards (F) and {plan.backwards:,} backward passes (B)"
    )


def _show(trained: Trained, settings: TrainConfig, *, as_json: bool) -> None:
    if as_json:
        document = asdict(trained) | {"folder": str(trained.folder), "result": str(trained.result)}
        document["worst"] = [w._asdict() for w in trained.worst]
        screen.show_json(document)
        return
    _show_problems(trained.folder / "problems.jsonl")
    ended = ", ended by copies of its canaries" if trained.stopped else ""
    kept = f", {100 * trained.kept:.1f} % of samples kept" if settings.filter or settings.running_scores else ""
    screen.show(
        f"{trained.steps:,} steps on {trained.pictures:,} pictures{ended}; loss {trained.loss:.4f} over the last tenth{kept}"
    )
    screen.show(f"Result: {trained.result}   Card: {trained.folder / 'README.md'}")


def _show_problems(path: Path) -> None:
    with open_regular(path) as file:
        problems = [problem for _, problem in islice(json_lines(file), SHOWN)]
        more = sum(1 for _ in lines_of(file))
    if not problems:
        return
    screen.table(["left out", "reason"], [[p["id"], p["reason"]] for p in problems])
    if more:
        screen.show(f"… and {more} more in {path}")
    screen.show()


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
