"""What a comparison of mitigations leaves: cases, and what became of them under each method. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .documents import read_json
from .store import write_whole

NONE = "none"
"""The name of doing nothing."""


@dataclass(frozen=True)
class Case:
    """A prompt, and what is known about it.

    Attributes:
        id: Its name.
        prompt: Its text; fidelity is always to this text, whatever a method makes of it.
        group: What it is there for.
        cluster: Cases of one cluster are not independent: of one picture, of one family.
        picture: Name of its training picture in the reference set; None: it has none.
    """

    id: str
    prompt: str
    group: str
    cluster: str
    picture: str | None = None


@dataclass(frozen=True)
class Cell:
    """One method at one strength, on all cases and seeds; lists run over samples, case by case and seed by seed.

    Attributes:
        method: Name of the mitigation.
        options: What it was built with.
        strength: Value of its strength option; None for doing nothing.
        similarity: Of each picture to its nearest reference.
        copied: Whether that is above the copy threshold; of a reference of any name.
        template: Whether the picture repeats the layout of a reference, not being a copy.
        fidelity: Image–text score with the case's own prompt.
        change: 1 − similarity of each picture to the one that the same noise gives without the method.
        sizes: ‖ε_c − ε_∅‖₂ with the unchanged prompt and noise, mean over the first steps, by how many: what a gate decides by.
        frechet: Fréchet distance of the ordinary cases' pictures to real ones.
        seconds: For each sample, preparing and sampling, without judging.
        forwards: Denoiser forwards for each sample.
        backwards: Backward passes for each sample.
        peak: Largest memory while sampling, in MB; None where it is not known.
    """

    method: str
    options: dict[str, Any]
    strength: float | None
    similarity: list[float]
    copied: list[bool]
    template: list[bool]
    fidelity: list[float]
    change: list[float]
    sizes: dict[str, list[float]]
    frechet: float | None
    seconds: float
    forwards: float
    backwards: float
    peak: float | None

    @property
    def label(self) -> str:
        """The method with its strength."""
        return self.method if self.strength is None else f"{self.method} {self.strength:g}"


@dataclass(frozen=True)
class Attack:
    """What an attack on embeddings brings back under one method; lists run over attacked pictures and seeds.

    Attributes:
        method, options, strength: As in :class:`Cell`.
        before: Whether the picture came out as a copy of its own training picture, under the method, without the attack.
        after: The same with the attacked embedding.
        controls: The same for pictures that were never trained on, attacked alike.
        size: First-step magnitude of each attacked sample: what a gate sees.
    """

    method: str
    options: dict[str, Any]
    strength: float | None
    before: list[bool]
    after: list[bool]
    controls: list[bool]
    size: list[float]


@dataclass(frozen=True)
class Trial:
    """A comparison of mitigations, whole.

    Attributes:
        model: Its name.
        cases: What was sampled, each with ``seeds`` seeds; lists of a cell run case by case, seed by seed.
        seeds, steps, guidance: Of the sampling.
        ordinary: The same magnitudes of ordinary prompts, each with each seed: the gate's null distributions.
        reference: The descriptor's name and its thresholds, in words.
        captions: Name of the image–text score.
        plain: Groups without a repeated picture.
        cells: Doing nothing first.
        attacks: What an attack brings back.
        machine: What it was measured on.
        command: What made it.
    """

    model: str
    cases: list[Case]
    seeds: int
    steps: int
    guidance: float
    ordinary: dict[str, list[float]]
    reference: str
    captions: str
    plain: list[str]
    cells: list[Cell]
    attacks: list[Attack] = field(default_factory=list)
    machine: str = ""
    command: str = ""

    def save(self, path: str | Path) -> Path:
        """One JSON document, written whole."""
        return write_whole(path, (json.dumps(asdict(self)) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Trial:
        """Read it back.

        Raises:
            UsageError: it is not there, or is no such document.
        """
        try:
            content = read_json(path)
            made: dict[str, Any] = {
                "cases": [Case(**c) for c in content.pop("cases")],
                "cells": [Cell(**c) for c in content.pop("cells")],
                "attacks": [Attack(**a) for a in content.pop("attacks")],
            }
            return cls(**content, **made)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UsageError(
                f"{path} is no comparison of mitigations ({e}); write one with `mnemoscope bench mitigations`."
            ) from None
