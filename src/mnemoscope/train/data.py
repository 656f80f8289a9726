"""Captioned pictures: a folder, a data set that ``datasets`` saved, or Parquet; looked at as a whole before anything is trained.

Captions stand in ``metadata.jsonl`` (or ``.csv``) beside the pictures, with ``file_name`` and ``text``, as ``datasets`` reads them;
in a ``.txt`` (or ``.caption``) file named like the picture, as Kohya's scripts read them; or in a column of the table. A value
that is a list holds several captions of one picture. What cannot be trained on is left out with a reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ..audit.prompts import read_rows
from ..errors import UnknownName, UsageError
from ..records.files import leads_out, open_inside
from ..records.store import digest, write_whole
from ..similarity.reading import Anything, Source, open_source, read, table_values

__all__ = ["Picture", "Problem", "TrainingSet", "read_training_set", "square", "write_problems"]

KEYS = ("text", "caption", "captions", "prompt")
"""Where the caption is found when no column is named."""

BESIDE = (".txt", ".caption")
"""Endings of a file that holds the caption of the picture beside it."""


@dataclass(frozen=True)
class Picture:
    """A picture that can be trained on.

    Attributes:
        id: Its name in the data.
        captions: One or more.
        sha256: Of the file's bytes.
    """

    id: str
    captions: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class Problem:
    """Something that the data's owner should know.

    Attributes:
        id: Which picture, or which entry of the metadata.
        reason: A kind, and after a colon what exactly.
        left_out: Whether the picture is not trained on.
    """

    id: str
    reason: str
    left_out: bool = True


@dataclass(frozen=True)
class TrainingSet:
    """Pictures in the order of their source, and what is wrong with the others."""

    source: Source
    pictures: tuple[Picture, ...]
    problems: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def left_out(self) -> int:
        """How many pictures cannot be trained on."""
        return sum(p.left_out for p in self.problems)

    def digest(self) -> str:
        """Stands for ids, captions and bytes."""
        return digest([[p.id, list(p.captions), p.sha256] for p in self.pictures])

    def choose(self, pictures: Iterable[Picture]) -> TrainingSet:
        """The same source with other pictures: some of them, or with other captions, in the same order."""
        return replace(self, pictures=tuple(pictures))

    def pixels(self, side: int) -> Iterator[tuple[int, Float[Tensor, "3 side side"]]]:
        """Number and pixels in [0, 1] of every picture, in order; decoded ahead in other threads.

        Raises:
            UsageError: a picture is no longer what it was.
        """
        rows = {p.id: i for i, p in enumerate(self.pictures)}
        found = 0
        for r in read(self.source, lambda image: square(image, side), fresh=lambda es: [e for e in es if e.id in rows]):
            row = rows[r.entry.id]
            if r.sha256 != self.pictures[row].sha256:
                raise UsageError(
                    f"{r.entry.id} changed while it was read; leave the data alone and repeat the command."
                )
            found += 1
            yield row, r.prepared
        if found != len(rows):
            raise UsageError(
                f"{len(rows) - found} pictures vanished while they were read; leave the data alone and repeat."
            )


def square(picture: Image.Image, side: int) -> Float[Tensor, "3 side side"]:
    """The middle of a picture in [0, 1], its short side scaled to ``side``."""
    width, height = picture.size
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    cut = picture.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + short, top + short))
    return torch.from_numpy(np.array(cut, np.uint8)).permute(2, 0, 1).float() / 255


def read_training_set(
    data: Anything,
    *,
    min_side: int,
    max_aspect: float,
    caption_column: str | None = None,
    image_column: str | None = None,
) -> TrainingSet:
    """Look at every picture and caption.

    Args:
        data: See the module, and :func:`~mnemoscope.similarity.reading.open_source`.
        min_side: Pictures whose short side has fewer pixels are left out.
        max_aspect: Pictures whose sides differ by more than this factor are left out.
        caption_column: Key of the caption; default: the first of :data:`KEYS` that there is.
        image_column: Of a table.

    Raises:
        UsageError: there are no pictures, or the captions' file cannot be read.
    """
    source = open_source(data, column=image_column)
    captions, strangers = _captions(data, source, caption_column)
    pictures, problems, seen = [], [], set()
    for r in read(source, lambda image: None):
        seen.add(r.entry.id)
        given = captions.get(r.entry.id, ())
        if r.reason is not None:
            reason: str | None = r.reason
        else:
            assert r.width is not None  # what could be decoded has a size
            assert r.height is not None
            reason = _unfit(r.width, r.height, min_side, max_aspect) or _speechless(r.entry.id in captions, given)
        if reason is None:
            assert r.sha256 is not None
            pictures.append(Picture(r.entry.id, given, r.sha256))
        else:
            problems.append(Problem(r.entry.id, reason))
    problems += [Problem(name, f"no picture: {where} names it") for name, where in strangers if name not in seen]
    return TrainingSet(source, tuple(pictures), tuple(problems))


def write_problems(path: str | Path, problems: Sequence[Problem]) -> Path:
    """JSON lines, in the order of the data."""
    return write_whole(path, "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in problems).encode())


def _unfit(width: int, height: int, min_side: int, max_aspect: float) -> str | None:
    if min(width, height) < min_side:
        return f"too small: {width} × {height} pixels, and the short side should have {min_side}"
    if max(width, height) > max_aspect * min(width, height):
        return f"too long: {width} × {height} pixels, of which a square would show little"
    return None


def _speechless(known: bool, captions: tuple[str, ...]) -> str | None:
    if captions:
        return None
    return "empty caption: there is nothing in it" if known else "no caption: nothing says what it shows"


def _captions(
    data: Anything, source: Source, column: str | None
) -> tuple[dict[str, tuple[str, ...]], list[tuple[str, str]]]:
    """Captions by id, and names that captions were given to with the file that did so."""
    tabled = table_values(source, (column,) if column else KEYS)
    if tabled is not None:
        return {name: _texts(value) for name, value in tabled}, []
    path = Path(data) if isinstance(data, str | Path) else None
    if path is None or not path.is_dir():
        return {}, []
    found, named = {}, []
    for file in sorted(path.rglob("*")):
        if file.name in ("metadata.jsonl", "metadata.csv"):
            if leads_out(path, file):
                raise UsageError(
                    f"{file} is a link that leads out of {path}, and is not followed; put the file itself there."
                )
            for name, texts in _metadata(file, path, column):
                found[name] = texts
                named.append((name, file.relative_to(path).as_posix()))
    with source.opened() as entries:
        for entry in entries:
            if entry.id not in found and (text := _beside(path, entry.id)) is not None:
                found[entry.id] = _texts(text)
    return found, named


def _metadata(file: Path, root: Path, column: str | None) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names relative to the data's folder, as sources call pictures."""
    inside = file.parent.relative_to(root)
    for number, row in enumerate(read_rows(file), 1):
        if not row.get("file_name"):
            raise UsageError(f"row {number} of {file} lacks file_name; name the picture that it describes.")
        yield (inside / str(row["file_name"])).as_posix(), _texts(_caption_of(row, column, file))


def _caption_of(row: Mapping[str, Any], column: str | None, file: Path) -> Any:
    if column is not None and column not in row:
        raise UnknownName(f"key in {file}", column, row)
    return row[column] if column is not None else next((row[k] for k in KEYS if row.get(k) is not None), None)


def _beside(folder: Path, picture: str) -> str | None:
    """The text in the file of captions beside a picture of a folder; None: there is no such file."""
    for ending in BESIDE:
        file = (folder / picture).with_suffix(ending)
        if file.is_file():
            try:
                with TextIOWrapper(open_inside(folder, file.relative_to(folder).as_posix()), "utf-8-sig") as text:
                    return text.read()
            except OSError as e:
                raise UsageError(f"{file} cannot be read ({e.strerror or e}); put the file itself there.") from None
            except UnicodeDecodeError as e:
                raise UsageError(f"{file} cannot be read as UTF-8 text ({e}); save it as UTF-8.") from None
    return None


def _texts(value: Any) -> tuple[str, ...]:
    """Captions in a value, blank ones left out."""
    given = value if isinstance(value, list | tuple) else [value]
    return tuple(dict.fromkeys(t for t in (str(v).strip() for v in given if v is not None and v == v) if t))
