"""What an audit will cost, before it starts."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..detect.base import AnyDetector
from ..models.base import Target
from .batch import batch_size, needs_null, steps_run
from .config import AuditConfig
from .prompts import PromptSet
from .request import choose_detectors, read_prompts_for, samples_for, setting_of, share_of
from .stored import Job

__all__ = ["Plan", "measure_speed", "plan"]

log = logging.getLogger(__name__)

PICTURE_BYTES = 40_000

LISTED = 1_000_000
"""Samples of an audit up to which those of a share are counted one by one."""


@dataclass(frozen=True)
class Plan:
    """The cost of an audit.

    Attributes:
        prompts: Different prompts of the whole audit.
        seeds: Seeds of each.
        samples: Rows that will be written: prompts × seeds, or with ``shard`` this process' share of them. The rest is theirs.
        forwards: Denoiser forwards of one latent (F): exact, unless something fails or is known already, or the share is one of more than
            a million samples.
        pictures: Pictures that will be decoded.
        bytes: Disk, roughly.
        seconds: Time of the prompts, from a measured time per forward; None: not measured.
        measured: Pictures that will be measured.
        most_forwards: F of these together, at most.
        most_backwards: Their backward passes (B), at most.
    """

    prompts: int
    seeds: int
    samples: int
    forwards: int
    pictures: int
    bytes: int
    seconds: float | None
    measured: int = 0
    most_forwards: int = 0
    most_backwards: int = 0


def plan(
    config: AuditConfig,
    target: Target | None = None,
    detectors: Sequence[AnyDetector] | None = None,
    *,
    seconds_per_forward: float | None = None,
) -> Plan:
    """Count, without computing anything.

    Args:
        config: What is asked.
        target: The model; without it, a text model with guidance is assumed, a shard is about as large as it will be, and pictures
            that will be measured are not counted.
        detectors: As for :func:`~mnemoscope.audit.run.audit`.
        seconds_per_forward: From :func:`measure_speed`.
    """
    watching = choose_detectors(config, detectors)
    prompts = read_prompts_for(config, target)
    steps = steps_run(config, watching)
    if steps is None:
        steps = config.steps if target is None else len(target.schedule(config.steps).timesteps)
    pairs = target is None or needs_null(config, target, watching)
    # All prompts share the null prediction of the first step on the bank of n noises.
    shared = pairs and config.seed_mode == "shared"
    samples, seeds, text = _counts(config, prompts, target, watching)
    forwards = samples * ((2 if pairs else 1) * steps - shared) + seeds * shared
    rows = samples * (400 + 20 * sum(d.steps_needed for d in watching.values()))
    pictures = samples if config.images else 0
    seconds = None if seconds_per_forward is None else forwards * seconds_per_forward
    job = None if target is None else Job.of(config, target)
    return Plan(
        len(prompts), config.seeds, samples, forwards, pictures, text + rows + pictures * PICTURE_BYTES, seconds,
        *((0, 0, 0) if job is None else (len(job.pictures), *job.most)),
    )  # fmt: skip


def _counts(
    config: AuditConfig, prompts: PromptSet, target: Target | None, watching: Mapping[str, AnyDetector]
) -> tuple[int, int, int]:
    """Samples of this process, different seeds among them, and bytes of their prompts."""
    part = share_of(config.shard)
    samples, text = len(prompts) * config.seeds, config.seeds * sum(len(p.text.encode()) for p in prompts)
    if part is None:
        return samples, config.seeds, text
    if samples > LISTED:
        return samples // part[1], config.seeds, text // part[1]
    # Which samples a shard has depends on their ids, and these on the model, whose weights are not hashed without need.
    setting = {} if target is None else setting_of(config, target, watching)
    _, share, _ = samples_for(config, prompts, setting)
    return len(share), len({s.seed for s in share}), sum(len(s.prompt.text.encode()) for s in share)


def measure_speed(config: AuditConfig, target: Target) -> float:
    """Seconds per denoiser forward of one latent, measured at the batch size the audit would start with (two batches)."""
    batch = batch_size(config, target)
    noise = target.noise(list(range(batch)))
    cond = target.encode([""]).expand(batch) if target.has_text else None
    schedule = target.schedule(config.steps)
    t = schedule.timesteps[0]
    x = schedule.scale(schedule.start(noise), t)
    with torch.no_grad():
        target.output(x, t, cond).sum().item()  # once for warming up; the sum waits for the device
        began = time.perf_counter()
        target.output(x, t, cond).sum().item()
    seconds = (time.perf_counter() - began) / batch
    log.info("one forward takes %.3g s of each sample at batch size %d", seconds, batch)
    return seconds
