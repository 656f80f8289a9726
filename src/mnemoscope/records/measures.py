"""A folder of measured pictures, as ``mnemoscope measure`` leaves it, read without torch.

    measure.json                 what was asked: model, preset, descriptor, command, ids
    pictures/<id>.json           the result for one picture; there as soon as it is finished
    pictures/<id>.safetensors    the noise that was found
    pictures/<id>-target.webp    the picture as the model was given it
    pictures/<id>-draw-k.webp    what noise number k of those found leads to

A result names its preset, and scores of different presets or models are never put on one axis: whoever asks for levels to compare with
(scores of pictures of which the dose is known) gets them only where they were measured under the same setting.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..errors import RunError
from .documents import read_json
from .files import file_inside, is_file_inside, leads_out
from .schema import FORMAT, Finite, Share, Truth, Whole
from .store import MEASURES, differences, read_document, write_whole

__all__ = [
    "DRAWS",
    "NAME",
    "Entry",
    "Levels",
    "Measures",
    "Request",
    "Result",
    "draw_file",
    "is_measures",
    "keep_levels",
    "kept_files",
    "measured_with",
    "read_entry",
    "read_request",
    "target_file",
]

NAME = "measure.json"
"""The file that makes a folder one of measured pictures."""

DRAWS = 4
"""Pictures that are kept of what the noise found leads to."""

Status: TypeAlias = Literal["reproduced", "censored", "screened out"]
"""``censored``: not reached within the budget. ``screened out``: not tried, because cheap measures spoke against it."""

Prompts: TypeAlias = Literal["none", "caption", "empty", "learned"]
"""What a picture was prompted with: nothing (a model without text), its caption, the empty prompt, a prompt that was learned."""

CheckPoint: TypeAlias = tuple[int, float, float, float, float]
"""Update, mean loss, λ, KL per dimension, how near a test came so far, at best."""


Id: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{1,64}$")]
"""Names files, so it must not lead anywhere else."""


def target_file(name: str) -> str:
    """The measured picture, inside the folder."""
    return f"pictures/{name}-target.webp"


def draw_file(name: str, number: int) -> str:
    """What the noise found leads to, inside the folder."""
    return f"pictures/{name}-draw-{number}.webp"


def is_measures(folder: str | Path) -> bool:
    """Whether a folder holds measured pictures, and no audit."""
    return os.path.isfile(Path(folder) / NAME) and not os.path.isfile(Path(folder) / "run.json")


def measured_with(run: str | Path) -> Path | None:
    """The folder of the pictures that were measured with a run; None: none were.

    Raises:
        RunError: it is a link that leads out of the run folder.
    """
    folder = Path(run) / MEASURES
    if not os.path.isfile(folder / NAME):
        return None
    if leads_out(run, folder):
        raise RunError(f"{folder} is a link that leads out of the run folder; take it out, or put the folder there.")
    return folder


class _Stored(BaseModel):
    """Later versions may write more; what is needed here must be finite."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, frozen=True)


class Result(_Stored):
    """Numbers of :class:`mnemoscope.measure.invmm.Stored`, whose attributes say what they are; None where there is none."""

    preset: str = ""
    passed: Truth = False
    score: Finite | None = None
    nats: Finite | None = None
    paid: Finite | None = None
    similarity: Finite | None = None
    prompt: str | None = None
    scale: Finite | None = None
    update: Whole = 0
    succeeded: tuple[Whole, Whole] | None = None
    rate: tuple[Share, Share, Share] | None = None
    at_least: Share | None = None
    forwards: Whole = 0
    backwards: Whole = 0
    curve: list[CheckPoint] = Field(default_factory=list)

    @field_validator("succeeded")
    @classmethod
    def _of_so_many(cls, succeeded: tuple[int, int] | None) -> tuple[int, int] | None:
        if succeeded is not None and succeeded[0] > succeeded[1]:
            raise ValueError(f"{succeeded[0]} of {succeeded[1]} draws is no share")
        return succeeded

    @field_validator("rate")
    @classmethod
    def _in_order(cls, rate: tuple[float, float, float] | None) -> tuple[float, float, float] | None:
        if rate is not None and not rate[1] <= rate[0] <= rate[2]:
            raise ValueError(f"{rate[0]:g} lies outside of its own interval, {rate[1]:g} to {rate[2]:g}")
        return rate


class Entry(_Stored):
    """One picture: where it was, its caption, what was found, and companion measures by their name."""

    id: Id
    image: str
    caption: str | None = None
    result: Result | None = None
    companions: dict[str, Finite | None] = Field(default_factory=dict)
    screen: dict[str, Any] | None = None
    """What left the picture out: a cheap measure's ``name`` and options, and the share that it kept; ``checked`` if it was measured
    all the same."""
    status_: str | None = Field(None, alias="status")

    @property
    def status(self) -> Status:
        """What became of it."""
        if self.result is None or self.status_ == "screened out":
            return "screened out"
        return "reproduced" if self.result.passed else "censored"

    @property
    def checked(self) -> bool:
        """Whether a screen would have left it out, and it was measured to see what the screen misses."""
        return self.status != "screened out" and bool(self.screen and self.screen.get("checked"))

    @property
    def numbers(self) -> Result:
        """The result; an empty one for a picture that was screened out."""
        return self.result if self.result is not None and self.status != "screened out" else Result()

    @property
    def prompted(self) -> Prompts | None:
        """What it was prompted with; None: it was not measured."""
        found = self.numbers.prompt
        if found == "given":
            return "caption" if self.caption else "empty"
        return "none" if found == "none" else "learned" if found == "learned" else None

    @property
    def key(self) -> tuple[int, float, str]:
        """Sorts the most strongly stored first, then what was not reached, by what had been paid, then what was not tried."""
        value = self.numbers.score if self.status == "reproduced" else self.numbers.paid
        return (
            ("reproduced", "censored", "screened out").index(self.status),
            math.inf if value is None else value,
            self.image,
        )


class Request(_Stored):
    """``measure.json``: the setting that every score depends on, and how it was asked for."""

    format: int = FORMAT
    target: dict[str, Any]
    preset: dict[str, Any]
    descriptor: dict[str, Any]
    beta: Finite
    asked: list[Id] | None = None
    """Ids of the pictures, in the order they were asked for; None: those of the folder that name the preset."""
    under: str | None = None
    """Stands for the whole setting: pictures asked for under another one are not of this request."""
    levels: dict[Annotated[int, Field(ge=0)], list[Finite | None]] | str | None = None
    """Scores by dose (copies in training), measured under this very setting, None where a picture was not reached; or the file,
    relative to the folder, that holds them beside their own setting."""
    prompts: Prompts | None = None
    """How the pictures of ``levels`` were prompted; None: not said."""
    guidance: Finite | None = None
    """Guidance scale of the draws that are shown of pictures that no scale reached."""
    command: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    git: dict[str, Any] | None = None
    started: str = ""

    @field_validator("preset")
    @classmethod
    def _scales(cls, preset: dict[str, Any]) -> dict[str, Any]:
        scales = preset.get("scales")
        numbers = isinstance(scales, list) and all(isinstance(s, int | float) and math.isfinite(s) for s in scales)
        if not (scales is None or numbers):
            raise ValueError("its guidance scales are no list of numbers")
        return preset

    @property
    def model(self) -> str:
        """What to call the model in sentences."""
        return str(self.target.get("name") or "the model")

    @property
    def fingerprint(self) -> str | None:
        """The weights and all that matters about the model, as 16 digits; None: it has none."""
        found = self.target.get("fingerprint")
        return None if found is None else str(found)

    def setting(self) -> dict[str, Any]:
        """What two measurements must share for their scores to compare."""
        model = self.fingerprint or self.target
        return {"model": model, "preset": self.preset, "descriptor": self.descriptor, "beta": self.beta}


@dataclass(frozen=True)
class Levels:
    """Scores of pictures of known dose, or why there are none.

    Attributes:
        scores: By copies in training, most first; None where a picture was not reached.
        why: One sentence; empty where there are scores.
    """

    scores: dict[int, list[float | None]]
    why: str = ""


@dataclass(frozen=True)
class Measures:
    """All that a folder holds.

    Attributes:
        folder: Where it is.
        request: What was asked.
        entries: Finished pictures, the most strongly stored first.
        waiting: Pictures that were asked for and are not finished.
    """

    folder: Path
    request: Request
    entries: list[Entry]
    waiting: int

    @classmethod
    def read(cls, folder: str | Path) -> Measures:
        """Read a folder.

        Raises:
            RunError: it holds no measured pictures, or a file of it is damaged (named).
        """
        folder = Path(folder)
        request = read_request(folder)
        if request.asked is None:
            files = sorted((folder / "pictures").glob("*.json"))
        else:
            every = (folder / "pictures" / f"{name}.json" for name in request.asked)
            files = [file for file in every if file.exists()]
        return cls.of(folder, request, (read_entry(folder, file) for file in files))

    @classmethod
    def of(cls, folder: Path, request: Request, entries: Iterable[Entry]) -> Measures:
        """From what was read: of the entries those that the request is about."""
        if request.asked is None:
            found = [e for e in entries if e.result is None or e.result.preset == request.preset.get("name")]
        else:
            names = set(request.asked)
            found = [e for e in entries if e.id in names]
        waiting = 0 if request.asked is None else len(request.asked) - len(found)
        return cls(folder, request, sorted(found, key=lambda e: e.key), waiting)

    def _inside(self, named: str) -> Path:
        """A file that ``measure.json`` names: whoever wrote it may not name what lies elsewhere."""
        try:
            return file_inside(self.folder, named)
        except FileNotFoundError as e:
            path = self.folder / named
            raise RunError(f"{path}, which holds scores of known dose, is missing; restore it, or leave it out.") from e
        except OSError as e:
            raise RunError(
                f"{self.folder / NAME} names scores of known dose outside of its folder ({named}); keep the file in {self.folder}."
            ) from e

    def count(self, status: Status) -> int:
        """How many pictures became that."""
        return sum(e.status == status for e in self.entries)

    def levels(self, file: str | Path | None = None) -> Levels:
        """Scores of pictures of known dose, measured under the same setting.

        Args:
            file: What ``measure.json`` would hold for them: their setting, and ``levels``. Default: what this folder names.

        Raises:
            RunError: the file is missing or damaged.
        """
        named = self.request.levels if file is None else str(Path(file).absolute())
        if named is None:
            return Levels({}, "No pictures of known dose were measured with this model and preset, so it is open where these scores lie "
                              "among those of pictures that were trained on often, once or never.")  # fmt: skip
        if isinstance(named, dict):
            return Levels(_descending(named))
        path = self._inside(named) if file is None else Path(named)
        other = _request(path, f"{path}, which holds scores of known dose, is missing; restore it, or leave it out.")
        if apart := differences(other.setting(), self.request.setting()):
            return Levels({}, f"Scores of known dose were given, and they do not compare: they were measured under another setting "
                              f"({apart[0]}).")  # fmt: skip
        here = {e.prompted for e in self.entries} - {None}
        if other.prompts is not None and here - {other.prompts}:
            return Levels({}, f"Scores of known dose were given, and they do not compare: their prompts were of another kind "
                              f"({other.prompts} there, {', '.join(sorted(filter(None, here)))} here).")  # fmt: skip
        if not isinstance(other.levels, dict):
            return Levels({}, f"{path.name} holds no levels, so there is nothing to compare these scores with.")
        return Levels(_descending(other.levels))


def keep_levels(folder: str | Path, file: str | Path) -> None:
    """Write the scores of known dose of ``file`` into a folder's ``measure.json``, if they were measured under its setting.

    Raises:
        RunError: one of the files is missing or damaged.
    """
    found = Measures.read(folder).levels(file)
    if found.scores:
        path = Path(folder) / NAME
        facts = read_json(path, path.parent) | {"levels": found.scores}
        write_whole(path, (json.dumps(facts, indent=1) + "\n").encode())


def kept_files(folder: str | Path) -> tuple[list[str], list[str]]:
    """Names of the files that the numbers of a folder rest on, and those of its pictures and of the noises that lead to them.

    They are relative to the folder. Other errors as :meth:`Measures.read`.

    Raises:
        RunError: the levels are in a file that is not in the folder.
    """
    folder, found = Path(folder), Measures.read(folder)
    records, others = [NAME], []
    if isinstance(named := found.request.levels, str):
        path = found._inside(named)
        records.append(path.relative_to(folder.resolve()).as_posix())
    for e in found.entries:
        records.append(f"pictures/{e.id}.json")
        # From the noise that was found a model makes the picture again.
        others += [f"pictures/{e.id}.safetensors", target_file(e.id), *(draw_file(e.id, k) for k in range(DRAWS))]
    return records, [f for f in others if is_file_inside(folder, f)]


def read_request(folder: str | Path) -> Request:
    """What a folder of measured pictures was asked for; errors as :meth:`Measures.read`."""
    missing = f"{folder} holds no {NAME}; give the folder that `mnemoscope measure` wrote."
    return _request(Path(folder) / NAME, missing, Path(folder))


def _request(path: Path, missing: str, folder: Path | None = None) -> Request:
    cure = "delete it, and repeat the command"
    return read_document(path, Request, FORMAT, missing, "no record of measured pictures", cure, folder=folder)


def read_entry(folder: Path, path: Path) -> Entry:
    """What is kept of one picture.

    Raises:
        RunError: it is missing or damaged, or leads out of the folder.
    """
    gone = f"{path} is missing; the same `mnemoscope measure` measures this picture again."
    cure = "delete it, and the same `mnemoscope measure` measures this picture again"
    return read_document(path, Entry, FORMAT, gone, "no result of a picture", cure, folder=folder)


def _descending(levels: dict[int, list[float | None]]) -> dict[int, list[float | None]]:
    return {copies: levels[copies] for copies in sorted(levels, reverse=True)}
