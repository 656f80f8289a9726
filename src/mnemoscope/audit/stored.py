"""Pictures that an audit measures after its prompts, with the same model: how strongly is each stored?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..measure.invmm import InvMM, varied
from ..models.base import Target
from ..records.measures import DRAWS
from ..records.store import MEASURES
from ..similarity.base import build
from .config import AuditConfig
from .measures import Measured, measured
from .pictures import Picture, pictures_in

__all__ = ["Job", "asked", "in_words"]


def asked(config: AuditConfig) -> list[Picture] | None:
    """The pictures that an audit is to measure; None: none. What is cheap to refuse is refused here.

    Raises:
        UsageError: with what to do.
    """
    if config.measure is None:
        if config.captions is not None:
            raise UsageError(
                "captions are those of pictures to measure, and none were named; give a picture or a folder as measure."
            )
        return None
    spec = config.measure_preset
    if spec.beta is None:
        raise UsageError(
            f"only the bundled model has a calibrated similarity from which a draw is the picture, by the fingerprint; for "
            f"{config.model or 'this model'} and {spec.descriptor} write measure_preset: {{name: {spec.name}, beta: 0.85}} in the "
            f"config file."
        )
    if config.shard is not None:
        raise UsageError(
            f"pictures are measured by one process, and shard is {config.shard}; leave measure out of the shards, and afterwards use "
            f"`mnemoscope measure` with --out RUN/{MEASURES}."
        )
    return pictures_in([Path(config.measure)], None if config.captions is None else Path(config.captions))


@dataclass(frozen=True)
class Job:
    """Pictures, and what measures them."""

    method: InvMM
    pictures: list[Picture]

    @classmethod
    def of(cls, config: AuditConfig, target: Target) -> Job | None:
        """What an audit is to measure; None: nothing.

        Raises:
            UsageError, UnknownName: it cannot be measured as it was asked for.
            CannotAudit: the model does not say at which times it was trained.
        """
        pictures = asked(config)
        if pictures is None:
            return None
        spec = config.measure_preset
        chosen = varied(target, spec.name, updates=spec.updates, steps=spec.steps, scales=spec.scales)
        return cls(InvMM(target, build(spec.descriptor), chosen, beta=spec.beta), pictures)

    def measure(
        self, out: Path, *, command: str = "", progress: Callable[[int, int, Measured], object] | None = None
    ) -> list[Measured]:
        """Measure those that have not been; see :func:`~mnemoscope.audit.measures.measured`."""
        return measured(self.method, self.pictures, out, progress=progress, command=command)

    @property
    def most(self) -> tuple[int, int]:
        """F and B of all pictures, at most: every look finds something in the short sampler and nothing in the full one."""
        preset, text = self.method.preset, self.method.target.has_text
        forwards, backwards = preset.most(text=text)
        shown = (2 if text else 1) * DRAWS * preset.steps
        return len(self.pictures) * (forwards + shown), len(self.pictures) * backwards


def in_words(m: Measured) -> str:
    """A picture's name and its score; of one that was not reached, what the score is more than."""
    found = m.result
    if found.get("score") is not None:
        return f"{Path(m.image).name}: {m.score:.4f} nats per dimension"
    paid = found.get("paid")
    return f"{Path(m.image).name}: " + ("not tried" if paid is None else f"> {paid:.4f}, not reproduced")
