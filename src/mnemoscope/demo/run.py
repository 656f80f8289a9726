"""The demonstration: calibrate on ordinary prompts, audit others, look for copies of training pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..audit.config import AuditConfig
from ..audit.run import audit, calibrate
from ..models.load import load
from ..records.store import Run
from .world import Row, World

CALIBRATION_PROMPTS = 400
FPR = 0.01


def demo(
    folder: str | Path,
    *,
    progress: Callable[[Any], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
    command: str = "mnemoscope demo",
    seeds: int = 4,
    steps: int = 50,
    batch_size: int = 32,
) -> Run:
    """Audit the bundled text-to-image model over a mix of prompts whose past is known.

    A threshold comes from ordinary prompts that are not audited; copies are looked for among all pictures the model was
    shown. What it teaches: a score needs a threshold, a threshold needs ordinary prompts of the same model, and a copy needs
    a reference picture.

    Args:
        folder: Run folder; the calibration is kept beside it in ``<folder>-calibration``.
        progress: Called after every batch.
        say: Called with a line of talk now and then.
        command: The command line that repeats it.
        seeds, steps, batch_size: As in :class:`~mnemoscope.audit.config.AuditConfig`.
    """
    folder = Path(folder)
    world = World()
    target = load("demo")
    ordinary = world.captions("ordinary")
    audited = mix(world)
    kept = {r.caption for r in audited}
    calibration = [r for r in ordinary if r.caption not in kept][:CALIBRATION_PROMPTS]

    say(
        f"Auditing the bundled model: {len(audited)} prompts × {seeds} seeds, {target.device}, {getattr(target, 'dtype_reason', '')}"
    )
    say(f"1/2  threshold from {len(calibration)} ordinary prompts, first step only")
    common: dict[str, Any] = {"model": "demo", "seeds": seeds, "steps": steps, "batch_size": batch_size}
    beside = folder.with_name(folder.name + "-calibration")
    config = AuditConfig(**common, prompts=[_item(r, world) for r in calibration], out=str(beside))
    calibrate(config, fpr=FPR, target=target, progress=progress, command=command)

    say("2/2  whole trajectories and pictures")
    config = AuditConfig(
        **common,
        prompts=[_item(r, world) for r in audited],
        images=True,
        calibration=str(beside / "thresholds.json"),
        out=str(folder),
        notes=[
            "The bundled model is small and was trained to have copies in it; its figures say nothing about other models.",
            "Copies were looked for by the bundled fingerprint, which was trained on pictures of this kind.",
        ],
    )
    run = audit(config, target=target, reference=world.reference, progress=progress, kind="demo", command=command)
    run.update(doses={group_name(r): r.copies for r in audited if r.group == "planted"})
    return run


def mix(world: World, planted: int = 5, others: int = 8) -> list[Row]:
    """Prompts of every group, evenly spaced through the manifest: ``planted`` of each level, ``others`` of each other group."""
    chosen = [r for level in world.levels[::-1] for r in _spread(world.of("planted", copies=level), planted)]
    chosen += _spread(world.of("recaptioned"), others)
    chosen += _spread([r for r in world.of("template") if r.copies], others)
    chosen += _spread([r for r in world.of("template") if not r.copies], others // 2)
    return chosen + _spread(world.captions("heldout"), others) + _spread(world.captions("ordinary"), 2 * others)


def _spread(rows: list[Row], n: int) -> list[Row]:
    return [rows[i * len(rows) // n] for i in range(n)]


def group_name(row: Row) -> str:
    """What the report calls the row's group: ``planted × 48``, ``template, never shown``, ``ordinary``."""
    if row.group == "planted":
        return f"planted × {row.copies}"
    return f"{row.group}, never shown" if row.group == "template" and not row.copies else row.group


def _item(row: Row, world: World) -> dict[str, Any]:
    """A prompt with its group, and the ground truth where the world has one: the most repeated pictures, and none at all."""
    most = row.group == "planted" and row.copies == world.levels[-1]
    label = True if most else False if row.group in ("ordinary", "heldout") else None
    return {"prompt": row.caption, "id": row.id, "group": group_name(row), "label": label}
