"""The model card of a fine-tuned model, and the captions that an audit of it starts from.

The card says what was done against memorization and what was counted while training. It gives no verdict: whether the model copies
is what the audit that it names finds out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import redaction
from ..records.canaries import Reading
from ..records.files import folder_name
from ..records.store import write_whole
from .data import TrainingSet
from .protect import Split

if TYPE_CHECKING:
    from .loop import Trained
    from .prepare import Prepared

__all__ = ["write_captions", "write_card"]

SHOWN = 10
"""Images in the card's list of the worst."""


def write_captions(path: Path, data: TrainingSet, split: Split) -> Path:
    """Every caption with its picture's id and group, as ``mnemoscope audit --prompts`` reads it."""
    groups = dict.fromkeys(split.heldout, "held out")
    for canary in split.plan.canaries if split.plan else ():
        groups[canary.row] = f"canary, {canary.copies} copies"
    lines = [
        {"id": p.id if k == 0 else f"{p.id}#{k}", "prompt": text, "group": groups.get(row, "trained")}
        for row, p in enumerate(data.pictures)
        for k, text in enumerate(p.captions)
    ]
    return write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def write_card(prepared: Prepared, trained: Trained, readings: Sequence[Reading], processes: int, command: str) -> Path:
    """``README.md`` of the folder, with a section on memorization."""
    parts = [
        _front(prepared),
        f"# {folder_name(prepared.folder)}",
        _training(prepared, trained, processes, command),
        "## Memorization",
        _protection(prepared),
        _pictures(prepared, trained),
        _filtered(prepared, trained),
        _canaries(readings, trained, prepared.config.canary_screen),
        _worst(prepared, trained),
        _audit(prepared, trained),
    ]
    card = redaction.text("\n\n".join(p for p in parts if p) + "\n")
    return write_whole(prepared.folder / "README.md", card.encode())


def _front(prepared: Prepared) -> str:
    """What model hubs read. A bundled model or a folder has no address there."""
    config = prepared.config
    base = [f"base_model: {config.model}"] if "/" in config.model and not Path(config.model).exists() else []
    tags = ["text-to-image", "diffusers", *(["lora"] if config.lora else [])]
    return "\n".join(["---", *base, "library_name: diffusers", "tags:", *(f"- {tag}" for tag in tags), "---"])


def _training(prepared: Prepared, trained: Trained, processes: int, command: str) -> str:
    config, revision = prepared.config, prepared.trainee.origin.revision
    what = f"a LoRA of rank {config.lora}" if config.lora else "the whole UNet"
    batch = config.batch_size * config.accumulate * processes
    rows = [
        ("base model", f"{config.model}{f' at {revision}' if revision else ''}"),
        ("trained", what),
        ("steps", f"{trained.steps:,} of {batch} samples{', ended by its canaries' if trained.stopped else ''}"),
        ("resolution", f"{prepared.settings['resolution']} pixels"),
        ("learning rate", f"{config.learning_rate:g}, {config.schedule}, {config.warmup} steps of warm-up"),
        ("precision", {"no": "float32"}.get(config.mixed_precision, config.mixed_precision)),
        ("moving average", f"{config.ema_decay:g}; the averaged weights are those saved" if config.ema else "none"),
        ("caption dropout", f"{config.caption_dropout:g}"),
        ("Min-SNR γ", "none" if config.snr_gamma is None else f"{config.snr_gamma:g}"),
        ("loss", f"{trained.loss:.4g} over the last tenth of the steps"),
        ("seed", str(config.seed)),
        ("made with", f"mnemoscope {version('mnemoscope')}"),
    ]
    told = f"\n\nCommand: `{_plain(command)}`" if command else ""
    return _table(("setting", "value"), rows) + told


def _protection(prepared: Prepared) -> str:
    config = prepared.config
    threshold = "none"
    if isinstance(config.filter, float):
        threshold = f"samples of magnitude {config.filter:g} or more are left out of the loss"
    elif config.filter is not None and prepared.clean is not None:
        record = prepared.clean.record
        threshold = (
            f"{len(record.thresholds)} thresholds τ(t), at each of which at most {100 * record.drop:g} % of clean samples are dropped; "
            f"clean: {record.source or 'not stated'}"
        )
    augment = {
        None: "none",
        "embedding-noise": f"noise of {config.augment_scale:g} on embeddings",
    }.get(config.augment, f"{config.augment}, {config.augment_count} words")
    repeats = {
        "off": "not looked for",
        "drop": "one picture of each cluster is kept",
        "merge": "one picture of each cluster is kept, with the captions of all",
    }
    rows = [
        ("filter of the loss", threshold),
        ("running scores", config.running_scores or "none"),
        ("changes of captions", augment),
        ("near-duplicates", repeats[config.dedupe]),
        ("canaries", _planted(prepared.split) or "none"),
    ]
    return _table(("protection", "setting"), rows)


def _planted(split: Split) -> str:
    if split.plan is None:
        return ""
    levels: dict[int, int] = {}
    for canary in split.plan.canaries:
        levels[canary.copies] = levels.get(canary.copies, 0) + 1
    return ", ".join(f"{n} pictures {copies} times" for copies, n in levels.items())


def _pictures(prepared: Prepared, trained: Trained) -> str:
    text = f"Trained on {trained.pictures:,} pictures of `{_plain(prepared.config.data)}`"
    if trained.left_out:
        text += f"; {trained.left_out:,} could not be used (`problems.jsonl`)"
    if prepared.split.heldout:
        text += f"; {len(prepared.split.heldout):,} were held out"
    text += "."
    if (repeats := prepared.repeats) is not None:
        text += (
            f" {repeats.pictures:,} of {len(prepared.found):,} had a near-duplicate ({repeats.descriptor} above {repeats.threshold:g}), "
            f"in {len(repeats.clusters):,} clusters; {repeats.redundant:,} were dropped (`duplicates.json`)."
        )
    return text


def _filtered(prepared: Prepared, trained: Trained) -> str:
    if prepared.memory is None:
        return ""
    return f"Of all samples, {100 * trained.kept:.1f} % were in the loss (`losses.jsonl` has the share of every step)."


def _canaries(readings: Sequence[Reading], trained: Trained, measure: str | None) -> str:
    if not readings:
        return ""
    last = readings[-1]
    rows = [
        (
            str(level.copies),
            str(level.n),
            f"{level.magnitude:.4g}",
            "not tested" if level.copied is None else f"{level.copied} of {level.n}",
            *(() if measure is None else (f"{level.screen:.4g}",)),
        )
        for level in last.levels
    ]
    stopped = " Copies of the most repeated ended the training." if trained.stopped else ""
    stored = () if measure is None else (f"mean {measure}",)
    table = _table(("copies", "canaries", "mean magnitude", "copied", *stored), rows)
    return f"Canaries at step {last.step:,} (`canary-history.jsonl` has all looks).{stopped}\n\n{table}"


def _worst(prepared: Prepared, trained: Trained) -> str:
    """The images that stood out most, as something to look at."""
    if not trained.worst:
        return ""
    pictures = prepared.data.pictures
    rows = [
        (f"`{_plain(pictures[w.id].id)}`", f"{w.score:.2f}", str(w.visits), "yes" if w.flagged else "no")
        for w in trained.worst[:SHOWN]
    ]
    return (
        "Images with the highest running scores, in standard deviations of clean data (`worst.jsonl` has more). They are images to "
        "look at, not copies.\n\n" + _table(("image", "score", "visits", "flagged"), rows)
    )


def _audit(prepared: Prepared, trained: Trained) -> str:
    folder = prepared.folder
    model: list[str] = [str(trained.result)]
    if prepared.config.lora is not None:
        model = [prepared.config.model, "--lora", str(trained.result)]
        model += [word for k, v in prepared.config.model_options.items() for word in ("--model-option", f"{k}={v}")]
    if prepared.config.resolution is not None:
        model += ["--model-option", f"resolution={prepared.config.resolution}"]
    command = [
        "mnemoscope",
        "audit",
        *model,
        "--prompts",
        str(folder / "captions.jsonl"),
        "--out",
        str(folder / "audit"),
    ]
    return (
        "Whether the model copies its training pictures has not been tested. This scores all of its captions:\n\n"
        f"    {redaction.command_line(command)}\n\nand `--reference`, with an index of the pictures, looks for copies among its "
        f"generations."
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Without what would end inline code."""
    return " ".join(text.replace("`", "'").split())
