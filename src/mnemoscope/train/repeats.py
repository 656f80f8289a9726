"""Near-duplicates of a training set, before it is trained on: they are the main cause of memorization.

Clusters are those of ``mnemoscope duplicates`` (:mod:`mnemoscope.similarity.duplicates`): joined above a similarity, directly or through
others, or by equal bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..records.documents import read_json
from ..records.store import write_whole
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
    """What :func:`write_repeats` wrote about exactly these pictures; None: nothing."""
    if not path.is_file():
        return None
    found = read_json(path)
    if found["data"] != data.digest():
        return None
    rows = {p.id: i for i, p in enumerate(data.pictures)}
    clusters = tuple(tuple(rows[name] for name in [c["kept"], *c["dropped"]]) for c in found["clusters"])
    return Repeats(clusters, found["threshold"], found["descriptor"])
