"""Measuring many pictures: one file for each finished picture, so that an interrupted run goes on with the missing ones."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_tensors

from .. import redaction
from ..bounds import COUNT, within
from ..measure.base import Measure, spec_of
from ..measure.invmm import Course, InvMM, Stored
from ..parsing import through_json
from ..records.documents import read_json
from ..records.measures import NAME, Result, read_entry
from ..records.places import spelled
from ..records.store import OutFolder, digest, locked, write_whole
from .companions import Screen, Values, compared, require_no_captions
from .pictures import Picture, opened, picture_bytes, picture_lines, pictures_in, size_of
from .shown import begin, keep_pictures

__all__ = ["Measured", "Picture", "measured", "picture_lines", "pictures_in", "size_of"]

MEASURED, OUT = "measured", "screened out"

LOCK = ".lock-measure"
"""Held by whoever measures into a folder, because what it was asked for stands in one file."""


@dataclass(frozen=True)
class Measured:
    """What is kept of one picture: the result, without its noise, which stands in a file beside it.

    Attributes:
        id: From the picture's content, its caption and the setting; names its files.
        image: Where it was.
        caption: Empty: the empty prompt. None: a prompt was learned, or the model takes no text.
        result: Fields of :class:`~mnemoscope.measure.invmm.Stored`; empty (in the file: null) where InvMM was not tried.
        companions: What cheap measures say of it, by name; None: not finite.
        status: ``measured``, or ``screened out``: a screen left it out, and how strongly it is stored is not known.
        screen: What left it out: the measure's name and options, and the share that it kept. With ``checked`` true: the screen would
            have left it out, and it was measured by chance, to see what the screen misses.
    """

    id: str
    image: str
    caption: str | None
    result: dict[str, Any]
    companions: Values = field(default_factory=dict)
    status: str = MEASURED
    screen: dict[str, Any] | None = None

    @property
    def checked(self) -> bool:
        """Whether a screen would have left it out, and it was measured all the same."""
        return self.status == MEASURED and bool(self.screen and self.screen.get("checked"))

    @property
    def score(self) -> float:
        """Nats per dimension; infinity where the picture was not reproduced; NaN where it was not tried."""
        if self.status == OUT:
            return math.nan
        return math.inf if self.result["score"] is None else float(self.result["score"])


KEPT = frozenset(f.name for f in fields(Measured))
"""Keys of what is kept of a picture."""

NO_RESULT = Result().model_dump()
"""What stands for numbers that a result lacks."""


@within(batch_size=COUNT)
def measured(
    method: InvMM, pictures: Sequence[Picture], out: str | Path, *, batch_size: int = 8,
    progress: Callable[[int, int, Measured], object] | None = None, command: str = "", companions: Sequence[Measure] = (),
    screen: Screen | None = None, compare: Callable[[str, int, int], object] | None = None,
    watch: Callable[[Course], object] | None = None,
) -> list[Measured]:  # fmt: skip
    """Measure what has not been measured yet, in the order given; results of all.

    Args:
        method: Model, descriptor and preset.
        pictures: What to measure.
        out: Folder; ``pictures/<id>.json`` and the noise found as ``<id>.safetensors``. Ids come from content and settings, so that
            another setting never overwrites. Companions and screens are none of these settings.
        batch_size: Pictures at a time; what is not finished when a batch is interrupted is begun anew.
        progress: Told of each picture that is done.
        command: The command line that repeats it, for the record.
        companions: Cheap measures to keep beside each picture's result.
        screen: Measure only what a cheap measure finds most suspicious. What was measured before stays measured, and what was
            screened out before is measured once a screen lets it through, or there is none.
        compare: Told how the cheap measures get on; see :func:`~mnemoscope.audit.companions.compared`.
        watch: Told how the pictures of a batch get on.

    Raises:
        CannotAudit: captions are given to a model without text, or it lacks what a companion needs.
        RunError: another process measures into the folder, it cannot be written, or somebody deletes it meanwhile.
    """
    require_no_captions(method.target, pictures)
    standing = OutFolder(out)
    with locked(standing.folder / LOCK):
        return _measured(method, pictures, standing, batch_size, progress, command, companions, screen, compare, watch)


def _measured(
    method: InvMM, pictures: Sequence[Picture], standing: OutFolder, batch_size: int,
    progress: Callable[[int, int, Measured], object] | None, command: str, companions: Sequence[Measure], screen: Screen | None,
    compare: Callable[[str, int, int], object] | None, watch: Callable[[Course], object] | None,
) -> list[Measured]:  # fmt: skip
    out = standing.folder
    folder = out / "pictures"
    setting = redaction.cleaned({
        "target": method.target.identity(), "preset": asdict(method.preset), "descriptor": method.descriptor.identity(),
        "beta": method.beta,
    })  # fmt: skip
    ids = [digest([hashlib.sha256(picture_bytes(p.file)).hexdigest(), p.caption, setting]) for p in pictures]
    begin(method, setting, ids, out, command)
    cheap = {m.name: m for m in [*companions, *([screen.measure] if screen else [])]}
    values = compared(list(cheap.values()), method.target, pictures, out, batch_size=batch_size, progress=compare)
    chosen, checked = _chosen(screen, values, ids)
    before = [_read(folder / f"{name}.json") for name in ids]
    known = {i for i, m in enumerate(before) if m is not None and m.status == MEASURED}
    missing = sorted(chosen - known)
    for i in sorted(set(range(len(pictures))) - set(missing)):
        _settle(folder, ids[i], pictures[i], before[i], values[i], screen, checked=i in checked)
    done, asked = len(known), len(known) + len(missing)
    for rows in _batches(missing, pictures, batch_size):
        some = [pictures[i] for i in rows]
        images = opened([p.file for p in some], size_of(method.target))
        captions = None if some[0].caption is None else [p.caption or "" for p in some]
        # Draws come from the content, so that a picture's result does not depend on its place.
        found = method(images, prompts=captions, keys=[int(ids[i][:12], 16) for i in rows], watch=watch)
        standing.require(LOCK, NAME)
        keep_pictures(method, images, captions, found, out, [ids[i] for i in rows])
        for i, result in zip(rows, found, strict=True):
            by = _by(screen, checked=True) if i in checked else None
            kept = _keep(folder, ids[i], pictures[i], result, _joined(before[i], values[i]), by)
            done += 1
            if progress is not None:
                progress(done, asked, kept)
    return [m for name in ids if (m := _read(folder / f"{name}.json")) is not None]


def _chosen(screen: Screen | None, values: Sequence[Values], ids: Sequence[str]) -> tuple[set[int], set[int]]:
    """Places of the pictures to measure, and which of them the screen would have left out."""
    every = set(range(len(ids)))
    if screen is None:
        return every, set()
    kept = screen.kept(values)
    checked = screen.drawn({i: ids[i] for i in every - kept})
    return kept | checked, checked


def _batches(rows: Sequence[int], pictures: Sequence[Picture], n: int) -> Iterator[list[int]]:
    """Pictures with captions and those whose prompts are learned, apart, some at a time."""
    for given in (True, False):
        same = [i for i in rows if (pictures[i].caption is not None) == given]
        for start in range(0, len(same), n):
            yield same[start : start + n]


def _settle(
    folder: Path,
    name: str,
    picture: Picture,
    before: Measured | None,
    values: Values,
    screen: Screen | None,
    *,
    checked: bool,
) -> None:
    """Write down a picture that will not be measured now: it has been, or a screen leaves it out."""
    by = _by(screen, checked=checked)
    if before is not None and before.status == MEASURED:
        now = replace(before, companions=_joined(before, values), screen=by if checked else None)
    else:
        now = Measured(name, spelled(picture.file), picture.caption, {}, _joined(before, values), OUT, by)
    if now != before:
        _write(folder, now)


def _by(screen: Screen | None, *, checked: bool) -> dict[str, Any] | None:
    """A screen as it is kept beside a picture that it leaves out."""
    if screen is None:
        return None
    return {**spec_of(screen.measure), "share": screen.share} | ({"checked": True} if checked else {})


def _joined(before: Measured | None, values: Values) -> Values:
    return {**(before.companions if before is not None else {}), **values}


def _keep(
    folder: Path, name: str, picture: Picture, result: Stored, companions: Values, screen: dict[str, Any] | None
) -> Measured:
    facts = {k: v for k, v in vars(result).items() if k not in ("mu", "s", "tokens", "rate")}
    facts |= {"score": _finite(result.score), "nats": _finite(result.nats)}
    facts["rate"] = None if result.rate is None else [result.rate.value, result.rate.low, result.rate.high]
    plain = through_json(facts)
    kept = Measured(name, spelled(picture.file), picture.caption, plain, companions, screen=screen)
    tensors = {"mu": result.mu, "s": result.s, "tokens": result.tokens}
    noise = {k: v.float().cpu().contiguous() for k, v in tensors.items() if v is not None}
    write_whole(folder / f"{name}.safetensors", save_tensors(noise))
    _write(folder, kept)
    return kept


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _write(folder: Path, m: Measured) -> None:
    facts = asdict(m) | {"result": m.result or None}
    write_whole(folder / f"{m.id}.json", (json.dumps(facts, ensure_ascii=False) + "\n").encode())


def _read(file: Path) -> Measured | None:
    """What is kept of a picture; None: nothing yet.

    Raises:
        RunError: it is damaged.
    """
    if not os.path.exists(file):
        return None
    read_entry(file.parent, file)
    facts = {key: value for key, value in read_json(file, file.parent).items() if key in KEPT}
    result = facts.get("result")
    return Measured(**facts | {"caption": facts.get("caption"), "result": {} if result is None else NO_RESULT | result})
