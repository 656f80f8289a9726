"""Near-duplicates of a training set, before it is trained on: they are the main cause of memorization.

Clusters are those of ``mnemoscope duplicates`` (:mod:`mnemoscope.similarity.duplicates`): joined above a similarity, directly or through
others, or by equal bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from ..errors import UsageError
from ..records.documents import read_json
from ..records.schema import Finite
from ..records.store import first_error, short, write_whole
from ..similarity.base import build
from ..similarity.duplicates import find_clusters
from ..similarity.index import ReferenceIndex
from .data import Picture, TrainingSet

__all__ = ["Repeats", "find_repeats", "read_repeats", "without_repeats", "write_repeats"]


@dataclass(frozen=True)
class Repeats:
    """Clusters of two or more pictures of a training set.

    Attributes:
        clusters: Numbers of pictures, the first of the data first.
        threshold: Similarity above which two pictures were joined.
        descriptor: By name.
    """

    clusters: tuple[tuple[int, ...], ...]
    threshold: float
    descriptor: str

    @property
    def pictures(self) -> int:
        """Pictures that have a near-duplicate."""
        return sum(map(len, self.clusters))

    @property
    def redundant(self) -> int:
        """Pictures that could go."""
        return self.pictures - len(self.clusters)


def find_repeats(data: TrainingSet, folder: str | Path, *, descriptor: str, threshold: float | None = None) -> Repeats:
    """Cluster the pictures of a training set.

    Args:
        data: The set.
        folder: Where the index of descriptors is kept, and continued.
        descriptor: Name of an installed one.
        threshold: Similarity above which two pictures are joined; default: the descriptor's.

    Raises:
        UsageError: the descriptor states none, and none is given.
    """
    joined = getattr(build(descriptor), "near_duplicate", None) if threshold is None else threshold
    if joined is None:
        raise UsageError(f"{descriptor} states no similarity of near-duplicates; give one as dedupe-threshold.")
    index = ReferenceIndex.build(data.source, folder, descriptor).files
    found = find_clusters(index, joined)
    rows = {p.id: i for i, p in enumerate(data.pictures)}
    clusters = []
    for cluster in range(found.repeated):
        names = [index.row(int(number)).id for number in found.members(cluster)]
        if len(members := sorted(rows[name] for name in names if name in rows)) > 1:
            clusters.append(tuple(members))
    return Repeats(tuple(sorted(clusters)), float(joined), index.manifest.descriptor.name)


def without_repeats(data: TrainingSet, repeats: Repeats, *, merge: bool) -> TrainingSet:
    """The set with the first picture of each cluster; with ``merge`` it has the captions of all of them."""
    gone = {row for cluster in repeats.clusters for row in cluster[1:]}
    firsts = {cluster[0]: cluster for cluster in repeats.clusters} if merge else {}

    def merged(row: int, picture: Picture) -> Picture:
        texts = (t for member in firsts.get(row, (row,)) for t in data.pictures[member].captions)
        return replace(picture, captions=tuple(dict.fromkeys(texts)))

    return data.choose(merged(row, p) for row, p in enumerate(data.pictures) if row not in gone)


def write_repeats(path: str | Path, data: TrainingSet, repeats: Repeats, action: str) -> Path:
    """JSON: what was kept of each cluster, and what was dropped."""
    names = [[data.pictures[row].id for row in cluster] for cluster in repeats.clusters]
    document: dict[str, Any] = {
        "action": action,
        "data": data.digest(),
        "descriptor": repeats.descriptor,
        "threshold": repeats.threshold,
        "pictures": len(data),
        "dropped": repeats.redundant,
        "clusters": [{"kept": first, "dropped": rest} for first, *rest in names],
    }
    return write_whole(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def read_repeats(path: Path, data: TrainingSet) -> Repeats | None:
    """What :func:`write_repeats` wrote about exactly these pictures; None: nothing.

    Raises:
        UsageError: the file holds something else; the message names the key.
    """
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        if isinstance(content, dict) and content.get("data") != data.digest():
            return None
        stored = _Stored.model_validate(content)
        return Repeats(_clusters(stored, data), stored.threshold, stored.descriptor)
    except (OSError, ValueError) as e:
        why = first_error(e) if isinstance(e, ValidationError) else str(e)
        raise UsageError(f"{path} is no list of near-duplicates ({why}); delete it, and it is made again.") from None


class _Cluster(BaseModel):
    kept: str
    dropped: list[str] = Field(min_length=1)


class _Stored(BaseModel):
    """The file; later versions may write more."""

    descriptor: str
    threshold: Annotated[Finite, Field(ge=-1, le=1)]
    clusters: list[_Cluster]


def _clusters(stored: _Stored, data: TrainingSet) -> tuple[tuple[int, ...], ...]:
    """The clusters by rows of the data; raises ValueError where they name others, or one of them twice."""
    rows = {p.id: i for i, p in enumerate(data.pictures)}
    clusters = [[c.kept, *c.dropped] for c in stored.clusters]
    names = [name for cluster in clusters for name in cluster]
    if strangers := [name for name in names if name not in rows]:
        raise ValueError(f"clusters names {short(repr(strangers[0]))}, which is no picture of the data")
    if len(set(names)) < len(names):
        raise ValueError("clusters names a picture twice")
    return tuple(tuple(rows[name] for name in cluster) for cluster in clusters)
