"""What the page of measured pictures shows of each: the picture as the model was given it, and what the noise found leads to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import redaction
from ..measure.invmm import InvMM, Stored
from ..models import identity
from ..models.base import Condition, mix
from ..records.checkout import checkout
from ..records.measures import DRAWS, NAME, draw_file, is_measures, read_request, target_file
from ..records.store import digest, write_whole
from .batch import webp
from .request import machine, now, versions

__all__ = ["begin", "keep_pictures"]


def begin(method: InvMM, setting: dict[str, Any], ids: Sequence[str], out: str | Path, command: str = "") -> None:
    """Write ``measure.json``: the setting, and how it was asked for. Pictures asked for earlier under the same setting stay asked for.

    Args:
        method: What measures.
        setting: What every score depends on.
        ids: Of the pictures, in order.
        out: The folder.
        command: The command line.

    Raises:
        RunError: there is a damaged ``measure.json``.
    """
    plain = identity.plain(setting)
    before = read_request(out) if is_measures(out) else None
    kept: dict[str, Any] = {"started": now()}
    if before is not None and before.under == digest(plain):
        ids = [*(before.asked or ()), *ids]
        kept = {"started": before.started or now(), "levels": before.levels, "command": before.command}
    kept["command"] = redaction.text(command or kept.get("command", ""))
    facts = {
        **plain, "under": digest(plain), "asked": list(dict.fromkeys(ids)), "guidance": _usual(method), "versions": versions(),
        "machine": machine(method.target), "git": checkout(), **kept,
    }  # fmt: skip
    write_whole(Path(out) / NAME, (json.dumps(facts, indent=1, default=str) + "\n").encode())


def keep_pictures(
    method: InvMM, images: Float[Tensor, "batch 3 height width"], captions: Sequence[str] | None, found: Sequence[Stored],
    out: str | Path, ids: Sequence[str],
) -> None:  # fmt: skip
    """Write each picture, and what :data:`DRAWS` noises of those found lead to, as WebP.

    Noises come from the picture's id, and are none of those that the search or its confirmation used. Where no guidance scale led to the
    picture, the model's own is shown; where its learned prompt was not kept, nothing is.

    Args:
        method: What measured them.
        images: As they were measured, in [0, 1].
        captions: Given captions; None: a model without text, or learned prompts.
        found: The results.
        out: The folder that holds ``pictures/``.
        ids: Of the pictures.
    """
    for i, (name, result) in enumerate(zip(ids, found, strict=True)):
        write_whole(Path(out) / target_file(name), webp(images[i]))
        for k, drawn in enumerate(
            _drawn(method, result, None if captions is None else captions[i], int(name[:12], 16))
        ):
            write_whole(Path(out) / draw_file(name, k), webp(drawn))


def _drawn(method: InvMM, result: Stored, caption: str | None, key: int) -> Sequence[Tensor]:
    """Pictures that fresh noises of q lead to."""
    target, cond = method.target, None
    if target.has_text:
        if caption is None and result.tokens is None:
            return []
        cond = Condition(result.tokens) if result.tokens is not None else target.encode([caption or ""])
        cond = cond.expand(DRAWS)
    eps = torch.randn(DRAWS, *result.mu.shape, generator=torch.Generator("cpu").manual_seed(mix(4, key)))
    noise = result.mu + (result.s / 2).exp() * eps.to(result.mu)
    return list(method.drawn(noise, cond, result.scale if result.passed else _usual(method)))


def _usual(method: InvMM) -> float | None:
    """The model's own guidance scale; None for a model without text."""
    return float(method.target.guidance) if method.target.has_text else None
