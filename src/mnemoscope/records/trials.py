"""What a comparison of mitigations leaves: cases, and what became of them under each method. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import UsageError
from .documents import read_json
from .schema import Finite, Truth, Whole
from .store import first_error, write_whole

NONE = "none"
"""The name of doing nothing."""

Size = Annotated[Finite, Field(ge=0)]
"""A norm, a time, a distance: 0 or more."""

Similarity = Annotated[Finite, Field(ge=-1 - 1e-5, le=1 + 1e-5)]
"""A cosine, rounding aside."""

STORED = ConfigDict(extra="forbid", allow_inf_nan=False)
"""How documents are read: unknown keys are errors, and numbers are numbers."""


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

    __pydantic_config__ = STORED

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

    __pydantic_config__ = STORED

    method: str
    options: dict[str, Any]
    strength: Finite | None
    similarity: list[Similarity]
    copied: list[Truth]
    template: list[Truth]
    fidelity: list[Finite]
    change: list[Size]
    sizes: dict[str, list[Size]]
    frechet: Finite | None
    seconds: Size
    forwards: Size
    backwards: Size
    peak: Size | None

    @classmethod
    def parse(cls, content: Any, samples: int) -> Cell:
        """From plain values.

        Args:
            content: As :func:`dataclasses.asdict` gives them.
            samples: How many samples its lists run over.

        Raises:
            ValueError: it is something else; one line, which names the key.
        """
        cell: Cell = _checked(cls, content)
        cell.require(samples)
        return cell

    def require(self, samples: int) -> None:
        """Refuse lists of another length than the samples; raises ValueError, which names the list."""
        lists: dict[str, list[Any]] = {
            name: getattr(self, name) for name in ("similarity", "copied", "template", "fidelity", "change")
        }
        lists |= {f"sizes.{steps}": values for steps, values in self.sizes.items()}
        for name, values in lists.items():
            if len(values) != samples:
                raise ValueError(f"{name} of {self.label} has {len(values):,} values for {samples:,} samples")

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

    __pydantic_config__ = STORED

    method: str
    options: dict[str, Any]
    strength: Finite | None
    before: list[Truth]
    after: list[Truth]
    controls: list[Truth]
    size: list[Size]


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

    __pydantic_config__ = STORED

    model: str
    cases: list[Case]
    seeds: Annotated[Whole, Field(ge=1)]
    steps: Annotated[Whole, Field(ge=1)]
    guidance: Finite
    ordinary: dict[str, list[Size]]
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
            trial: Trial = _checked(cls, read_json(path))
            trial._require_whole()
        except (OSError, ValueError) as e:
            raise UsageError(
                f"{path} is no comparison of mitigations ({e}); write one with `mnemoscope bench mitigations`."
            ) from None
        return trial

    def _require_whole(self) -> None:
        """Refuse parts that do not fit each other; raises ValueError, which names the key."""
        if not self.cells or self.cells[0].method != NONE:
            raise ValueError(f"cells does not begin with {NONE!r}, what comes out without any method")
        for cell in self.cells:
            cell.require(len(self.cases) * self.seeds)
            if cell.sizes.keys() != self.ordinary.keys():
                raise ValueError(f"sizes of {cell.label} are for other numbers of steps than those of ordinary prompts")
        for attack in self.attacks:
            if not len(attack.before) == len(attack.after) == len(attack.size):
                raise ValueError(f"before, after and size of the attack on {attack.method} are not equally long")


def _checked(kind: Any, content: Any) -> Any:
    """Content as what a kind of dataclass or container says; raises ValueError, which names the key."""
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as e:
        raise ValueError(first_error(e)) from None


def parse_sizes(content: Any, steps: set[str], samples: int) -> dict[str, list[float]]:
    """Magnitudes of ordinary prompts by the number of leading steps, from plain values.

    Raises:
        ValueError: they are something else, or of other steps or another number of samples; one line, which names the key.
    """
    sizes: dict[str, list[float]] = _checked(dict[str, list[Size]], content)
    if sizes.keys() != steps:
        raise ValueError(
            f"it has sizes over {', '.join(sorted(sizes)) or 'no'} steps, and {', '.join(sorted(steps))} are needed"
        )
    for name, values in sizes.items():
        if len(values) != samples:
            raise ValueError(f"{name} has {len(values):,} values for {samples:,} samples")
    return sizes
