"""What an audit is asked for, resolved: model, detectors, prompts, settings, samples. Nothing has been computed yet."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..bounds import shown
from ..detect import calibrate
from ..detect.base import AnyDetector, build
from ..errors import CannotAudit, RunError, UnknownName, UsageError
from ..models import identity
from ..models.base import Target
from ..records.checkout import checkout
from ..records.schema import Manifest
from ..records.store import Run, differences, digest, sample_id
from .batch import Reference, Sample
from .config import AuditConfig
from .generations import LEAST
from .prompts import Prompt, PromptSet
from .variants import with_controls

__all__ = ["Request", "choose_detectors", "load", "read_prompts_for", "require_known", "require_possible"]

MOST = 100_000_000
"""Samples of one run, all of which are listed in memory."""

PACKAGES = ("mnemoscope", "torch", "diffusers", "transformers", "safetensors", "numpy", "pillow")


@dataclass(frozen=True)
class Request:
    """An audit, resolved.

    Attributes:
        config: What was asked.
        target: The model.
        detectors: Fresh detectors by the name of their score.
        prompts: The prompts.
        setting: Everything that every score depends on, as plain values.
        samples: Every prompt with every seed.
        share: Those of them that are this process' to do.
        shard: Number of this process' file; None: the whole run.
        calibration: Threshold to judge by, if one was given.
        accepted: Where its setting differs from this one, if that was accepted.
        reference: What pictures are compared with, in plain values.
        notes: What a reader of the run must know.
    """

    config: AuditConfig
    target: Target
    detectors: dict[str, AnyDetector]
    prompts: PromptSet
    setting: dict[str, Any]
    samples: list[Sample]
    share: list[Sample]
    shard: int | None
    calibration: calibrate.Calibration | None
    accepted: list[str]
    reference: dict[str, Any] | None
    notes: list[str]

    @classmethod
    def of(
        cls,
        config: AuditConfig,
        target: Target | None = None,
        detectors: Sequence[AnyDetector] | None = None,
        reference: Reference | None = None,
    ) -> Request:
        """Resolve a configuration; objects that are handed in stand for what it names.

        Raises:
            MnemoscopeError: it cannot be carried out; the sentence says why.
        """
        if target is None:
            require_known(config, detectors)
            target = load(config)
        watching, prompts, calibration, accepted = _possible(config, target, detectors, reference)
        setting = setting_of(config, target, watching)
        samples, share, shard = samples_for(config, prompts, setting)
        return cls(
            config=config,
            target=target,
            detectors=watching,
            prompts=prompts,
            setting=setting,
            samples=samples,
            share=share,
            shard=shard,
            calibration=calibration,
            accepted=accepted,
            reference=described(reference),
            notes=[*config.notes, *prompts.notes],
        )

    @property
    def folder(self) -> Path:
        """``config.out``, or a folder under ``runs/`` that the same request always gets."""
        if self.config.out:
            return Path(self.config.out)
        asked = [self.setting, self.config.seeds, self._folder_keys(), [p.text for p in self.prompts]]
        name = re.sub(r"[^A-Za-z0-9.]+", "-", self.target.name).strip("-.") or "model"
        return Path("runs") / f"{name}-{digest(asked)[:8]}"

    def open(self, kind: str, command: str) -> Run:
        """The run folder: a new one, or the one that this request began.

        Raises:
            RunError: the folder belongs to another request; the message names the difference.
        """
        fresh = self._manifest(kind, command)
        run = Run.open(self.folder, fresh)
        was, now = (
            {**m.setting, "kind": m.kind, **{k: m.config.get(k) for k in self._folder_keys()}}
            for m in (run.manifest, fresh)
        )
        if found := differences(was, now):
            raise RunError(
                f"{run.folder} was made under other settings ({'; '.join(found[:3])}); ask for the same ones to continue it, or "
                f"use a new folder (--fresh)."
            )
        strange = run.outcomes().keys() - {s.id for s in self.samples}
        if strange:
            raise RunError(
                f"{run.folder} holds {len(strange)} samples that are not asked for now (it had more prompts or seeds); ask for at "
                f"least the same ones to continue it, or use a new folder (--fresh)."
            )
        keep = {"config", "setting", "target", "versions", "git", "machine", "asked", "command", "accepted"}
        run.update(status="running", ended=None, **fresh.model_dump(include=keep))
        return run

    def _folder_keys(self) -> dict[str, Any]:
        """Settings on which no score depends, but which rows of one folder must share."""
        return {"images": self.config.images, "reference": self.reference}

    def _manifest(self, kind: str, command: str) -> Manifest:
        return Manifest.model_validate(
            {
                "kind": kind,
                "command": command,
                "config": self.config.stored() | {"reference": self.reference},
                "setting": self.setting,
                "target": identity.plain(self.target.identity()),
                "versions": versions(),
                "git": checkout(),
                "machine": machine(self.target),
                "started": now(),
                "asked": len(self.samples),
                "notes": self.notes,
                "accepted": self.accepted,
            }
        )


def require_known(config: AuditConfig, detectors: Sequence[AnyDetector] | None = None) -> PromptSet | None:
    """Refuse what can be known to be wrong before gigabytes are read; the prompts, where a configuration has some.

    Raises:
        UsageError: a share, a detector or the prompts cannot be as they were asked for.
        RunError: the calibration cannot be read, or is none.
    """
    share_of(config.shard)
    _read_calibration(config, choose_detectors(config, detectors))
    return None if config.prompts is None else read_prompts_for(config)


def load(config: AuditConfig) -> Target:
    """The model that a configuration names."""
    if config.model is None:
        raise UsageError("no model was named; give a hub id, a folder or a checkpoint as model.")
    from ..models import load as opener  # here, because it brings diffusers, which a target in memory may not need

    return opener.load(config.model, dtype=config.dtype, device=config.device, **config.model_options)


def choose_detectors(config: AuditConfig, detectors: Sequence[AnyDetector] | None = None) -> dict[str, AnyDetector]:
    """Fresh detectors by the name of their score."""
    if detectors is None:
        found = [(spec.label, build(spec.name, spec.options)) for spec in config.detectors]
    else:
        found = [(d.name, d) for d in detectors]
    if len(dict(found)) < len(found) or not found:
        raise UsageError("detectors need different names, and at least one is needed; hand in one object per name.")
    for name, detector in found:
        if detector.steps_needed > config.steps:
            raise UsageError(
                f"{name} looks at {detector.steps_needed} steps and the schedule has {config.steps}; set steps to "
                f"{detector.steps_needed} or shorten its window."
            )
    return dict(found)


def read_prompts_for(config: AuditConfig, target: Target | None = None) -> PromptSet:
    """The prompts, and those that controls need besides; a model without text has one, which is empty."""
    if target is not None and not target.has_text:
        if config.prompts is not None:
            raise CannotAudit(f"{target.name} takes no text, so there are no prompts to audit; leave prompts out.")
        if config.controls:
            raise CannotAudit(
                f"{target.name} takes no text, so there are no prompts to make controls of; leave controls out."
            )
        return PromptSet((Prompt("unconditional", ""),), "a model without text")
    if config.prompts is None:
        raise UsageError("no prompts were given; name a file or give a list as prompts.")
    return with_controls(config.prompts.read(config.limit), config.controls)


def setting_of(config: AuditConfig, target: Target, detectors: Mapping[str, AnyDetector]) -> dict[str, Any]:
    """Everything that every score depends on, as plain values. Not the device, the batch size, or where a model came from."""
    return {
        "target": identity_of(target),
        "detectors": {name: calibrate.method_of(d) for name, d in detectors.items()},
        "guidance": float(target.guidance if config.guidance is None else config.guidance),
        "steps": config.steps,
        "base_seed": config.base_seed,
        "seed_mode": config.seed_mode,
    }


def identity_of(target: Target) -> dict[str, Any]:
    """A target's identity without where it came from."""
    return {k: v for k, v in identity.plain(target.identity()).items() if k not in calibrate.PROVENANCE}


def calibration_setting(config: AuditConfig, target: Target, detector: AnyDetector) -> dict[str, Any]:
    """What a calibrated score of this detector depends on."""
    return calibrate.setting_of(
        identity.plain(target.identity()),
        guidance=float(target.guidance if config.guidance is None else config.guidance),
        steps=config.steps,
        window=getattr(detector, "window", (0, detector.steps_needed)),
        seeds=config.seeds,
        seed_mode=config.seed_mode,
        base_seed=config.base_seed,
        method=calibrate.method_of(detector),
    )


def require_possible(config: AuditConfig, target: Target, reference: Reference | None = None) -> None:
    """Refuse what :meth:`Request.of` would refuse, without listing the samples.

    Raises:
        MnemoscopeError: it cannot be carried out; the sentence says why.
    """
    _possible(config, target, None, reference)


def _possible(
    config: AuditConfig, target: Target, detectors: Sequence[AnyDetector] | None, reference: Reference | None
) -> tuple[dict[str, AnyDetector], PromptSet, calibrate.Calibration | None, list[str]]:
    """Detectors, prompts, and the calibration with what was accepted of it, once they fit together."""
    watching = choose_detectors(config, detectors)
    _require_fitting(config, target, watching, reference)
    prompts = read_prompts_for(config, target)
    return watching, prompts, *_calibration(config, target, watching)


def _require_fitting(
    config: AuditConfig, target: Target, detectors: Mapping[str, AnyDetector], reference: Reference | None
) -> None:
    guidance = target.guidance if config.guidance is None else config.guidance
    for name, detector in detectors.items():
        if unmet := detector.needs - {"uncond", "pictures"}:
            raise CannotAudit(
                f"{name} needs {', '.join(sorted(unmet))}, which an audit does not offer; run it by itself."
            )
        if "pictures" in detector.needs and not config.images:
            raise CannotAudit(f"{name} compares generated pictures, and none are made; set images to true (--images).")
        if "pictures" in detector.needs and config.seeds < LEAST:
            raise CannotAudit(
                f"{name} compares the generations of a prompt with each other, and there is {config.seeds}; set seeds to "
                f"{LEAST} or more."
            )
        if "uncond" in detector.needs and not target.has_text:
            raise CannotAudit(
                f"{name} compares predictions with and without a prompt, and {target.name} takes no text; use a detector that "
                f"needs none (mnemoscope ls detectors)."
            )
        if "uncond" in detector.needs and not guidance > 1:
            raise CannotAudit(
                f"Guidance is off ({guidance:g}), so there is nothing to compare; set guidance above 1, for instance 7.5."
            )
    if reference is None and config.reference is not None:
        raise UsageError(f"reference {config.reference!r} was named but not opened; hand in the opened reference set.")
    if reference is not None and not config.images:
        raise UsageError("a reference set is compared with pictures, and none are made; set images to true.")


def _calibration(
    config: AuditConfig, target: Target, detectors: Mapping[str, AnyDetector]
) -> tuple[calibrate.Calibration | None, list[str]]:
    calibration = _read_calibration(config, detectors)
    if calibration is None:
        return None, []
    setting = calibration_setting(config, target, detectors[calibration.record.detector])
    return calibration, calibration.check(setting, accept=config.accept_threshold)


def _read_calibration(config: AuditConfig, detectors: Mapping[str, AnyDetector]) -> calibrate.Calibration | None:
    """The calibration that a configuration names, which has to be of one of the detectors."""
    if config.calibration is None:
        return None
    calibration = calibrate.Calibration.load(config.calibration)
    if calibration.record.detector not in detectors:
        scores = f"score in this audit, as {config.calibration} was made for,"
        raise UnknownName(scores, calibration.record.detector, detectors)
    return calibration


def samples_for(
    config: AuditConfig, prompts: PromptSet, setting: Mapping[str, Any]
) -> tuple[list[Sample], list[Sample], int | None]:
    """Every prompt with every seed, those of them that are this process' to do, and the number of its file."""
    if len(prompts) * config.seeds > MOST:
        raise UsageError(
            f"{len(prompts):,} prompts with {config.seeds:,} seeds are {len(prompts) * config.seeds:,} samples, and one run holds at most "
            f"{MOST:,}; ask for fewer prompts or seeds, and for the others in another run."
        )
    key = digest(setting)
    samples = [Sample(sample_id(p.text, seed, key), p, seed) for p in prompts for seed in range(config.seeds)]
    return samples, *_share(samples, config.shard)


def share_of(shard: str | None) -> tuple[int, int] | None:
    """k and m of share k of m; None: everything.

    Raises:
        UsageError: it is no share.
    """
    if shard == "env":
        rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        shard = f"{rank}/{size}" if rank is not None and size not in (None, "1") else None
    if shard is None:
        return None
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard)
    if found is None or not int(found[1]) < int(found[2]):
        raise UsageError(f"shard is {shown(shard)}, and must be k/m with 0 ≤ k < m, such as 0/4.")
    return int(found[1]), int(found[2])


def _share(samples: list[Sample], shard: str | None) -> tuple[list[Sample], int | None]:
    """Share k of m by the samples' ids, which are hashes: even, and the same whatever the order."""
    part = share_of(shard)
    if part is None:
        return samples, None
    k, m = part
    return [s for s in samples if int(s.id, 16) % m == k], k


def described(reference: Reference | None) -> dict[str, Any] | None:
    """A reference set in plain values: what a run remembers of it."""
    if reference is None:
        return None
    size = len(reference) if isinstance(reference, Sized) else None
    return {"name": reference.name, "pictures": size, "threshold": getattr(reference, "threshold", None)}


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Installed versions of what a score may depend on."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine(target: Target) -> dict[str, Any]:
    """Where a model runs, and in what precision."""
    dtype = str(target.dtype).removeprefix("torch.")
    reason = getattr(target, "dtype_reason", "")
    facts = {
        "device": str(target.device),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
    return facts | ({"dtype_reason": reason} if reason else {})


def now() -> str:
    """This second, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
