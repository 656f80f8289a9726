"""The comparison of mitigations on the bundled world: which captions it samples, and which it takes its threshold from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import plugins
from ..audit.mitigations import Protocol
from ..audit.redteam import RedTeam
from ..bounds import AMOUNT, COUNT, SEEDS, STEPS, within
from ..detect.magnitude import per_dimension
from ..errors import CannotAudit
from ..models.base import Target
from ..records.trials import Attack, Case, Trial
from ..similarity.captions import WorldCaptions
from .world import Row, World

LEVELS = (48, 24)
"""Levels of copies that come back."""
PER_GROUP = 24
ORDINARY_SCORES = 400
"""Ordinary captions, none of them a case, that the gate's threshold is taken from."""
TARGETS = (0.99, 0.9, 0.5, 0.25, 0.05)
"""Quantiles of ordinary first-step magnitudes at which the optimization of the prompt stops."""
REAL = 400
"""Pictures that the Fréchet distance is taken to."""


def cases(world: World, per_group: int = PER_GROUP) -> list[Case]:
    """Captions of every group, evenly spread over it: ``per_group`` of the most repeated pictures, half as many of each other group."""
    groups: dict[str, Sequence[Row]] = {f"planted × {n}": world.of("planted", copies=n) for n in LEVELS}
    groups |= {
        "template": [r for r in world.of("template") if r.copies],
        "recaptioned": world.of("recaptioned"),
        "ordinary": world.captions("ordinary")[1::2],  # the bundled thresholds were made from the others
        "heldout": world.captions("heldout"),
    }
    most = f"planted × {LEVELS[0]}"
    return [
        Case(r.id, r.caption, group, r.family or r.picture, r.picture if r.copies else None)
        for group, rows in groups.items()
        for r in _spread(rows, per_group if group == most else -(-per_group // 2))
    ]


def protocol(
    target: Target,
    folder: str | Path,
    *,
    seeds: int = 4,
    steps: int = 50,
    per_group: int = PER_GROUP,
    batch_size: int = 32,
) -> Protocol:
    """The protocol on the bundled text-to-image world."""
    world = World()
    ordinary = [r.caption for r in _spread(world.captions("ordinary")[::2], ORDINARY_SCORES)]
    real = world.pictures(r.picture for r in _spread(world.of("ordinary"), REAL))
    return Protocol(
        target, cases(world, per_group), ordinary, world.reference, WorldCaptions(), folder=folder, real=real, seeds=seeds,
        steps=steps, batch_size=batch_size,
    )  # fmt: skip


@within(seeds=SEEDS, steps=STEPS, per_group=COUNT, batch_size=COUNT)
def red_team(
    target: Target, *, seeds: int = 2, steps: int = 50, per_group: int = PER_GROUP, batch_size: int = 32
) -> RedTeam:
    """The attack on the pictures of the highest level, with held-out pictures as controls."""
    world = World()
    attacked = [c for c in cases(world, per_group) if c.group == f"planted × {LEVELS[0]}"]
    heldout = _spread(world.captions("heldout"), len(attacked))
    controls = [Case(r.id, r.caption, "heldout", r.picture, r.picture) for r in heldout]
    return RedTeam(
        target, attacked, world.pictures(str(c.picture) for c in attacked), controls, world.pictures(r.picture for r in heldout),
        world.reference, seeds=seeds, steps=steps, batch_size=batch_size,
    )  # fmt: skip


def settings(run: Protocol, methods: Sequence[str] | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Every method at all its strengths, as name and options; all installed ones when none is named.

    Where to stop an optimization of the prompt depends on the model: published targets are of Stable Diffusion 1. Here they are
    quantiles of what ordinary prompts have.
    """
    made = []
    for name in methods or sorted(plugins.installed("mitigation")):
        method: Any = plugins.find("mitigation", name)
        values = method.strengths if name != "prompt" else _targets(run)
        made += [(name, {method.strength: value}) for value in values]
    return made


def _targets(run: Protocol) -> list[float]:
    sizes = torch.tensor(run.ordinary_sizes["1"])
    at = per_dimension(sizes.quantile(torch.tensor(TARGETS)), run.target.latent_shape)
    return [round(v, 2) for v in at.tolist()]


@within(seeds=SEEDS, steps=STEPS, per_group=COUNT, batch_size=COUNT, attack_seeds=AMOUNT)
def compare(
    target: Target, folder: str | Path, methods: Sequence[str] | None = None, *, seeds: int = 4, steps: int = 50,
    per_group: int = PER_GROUP, batch_size: int = 32, attack_seeds: int = 2,
    progress: Callable[[str, int, int], object] = lambda what, done, asked: None, skip: Callable[[str], object] = lambda why: None,
) -> Trial:  # fmt: skip
    """Everything: each method at each strength on all cases, then the attack against each method as it comes.

    Args:
        target: The model.
        folder: Where finished parts are kept; the same call continues.
        methods: Names; all installed ones when none is given.
        seeds, steps, per_group, batch_size: Of the protocol.
        attack_seeds: Generations of each attacked picture; 0: no attack.
        progress: Told what is running, and how many of its samples are done.
        skip: Told which methods this model cannot be given, and why.
    """
    run = protocol(target, folder, seeds=seeds, steps=steps, per_group=per_group, batch_size=batch_size)
    n = len(run.samples)
    wanted = settings(run, methods)
    cells = [run.without(lambda done: progress("without any method", done, n))]
    for i, (name, options) in enumerate(wanted):
        what = f"{i + 1} of {len(wanted)}: {name} {', '.join(f'{k} = {v}' for k, v in options.items())}"
        try:
            cells.append(run.cell(name, options, lambda done, what=what: progress(what, done, n)))  # type: ignore[misc]
        except CannotAudit as e:
            skip(str(e))
    trial = Trial(
        target.name, run.cases, seeds, steps, target.guidance, run.ordinary_sizes,
        f"{run.reference.name}, copies above {run.reference.threshold:.3f}", run.captions.name, list(run.plain), cells,
    )  # fmt: skip
    return replace(trial, attacks=list(_attacks(target, trial, attack_seeds, steps, per_group, batch_size, progress)))


def _attacks(
    target: Target, trial: Trial, seeds: int, steps: int, per_group: int, batch_size: int,
    progress: Callable[[str, int, int], object],
) -> Iterator[Attack]:  # fmt: skip
    if not seeds:
        return
    team = red_team(target, seeds=seeds, steps=steps, per_group=per_group, batch_size=batch_size)
    n = (2 * len(team.cases) + len(team.controls)) * seeds
    for method in dict.fromkeys(cell.method for cell in trial.cells):
        cells = [cell for cell in trial.cells if cell.method == method]
        options = cells[len(cells) // 2].options  # the strength in the middle
        yield team.against(method, options, lambda done, method=method: progress(f"attack on {method}", done, n))  # type: ignore[misc]


def _spread(rows: Sequence[Row], n: int) -> list[Row]:
    """At most n of them, evenly spread."""
    return [rows[len(rows) * i // n] for i in range(n)] if len(rows) > n else list(rows)
