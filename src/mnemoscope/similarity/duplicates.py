"""Near-duplicates of a training set, and what they have to do with what a model reproduces.

Two pictures are joined when their similarity is above a threshold or their files are the same bytes; a cluster is what is
joined, directly or through others (single linkage). Duplicates are the main cause of memorization, so the other half of this
module joins the clusters of a training set with the audit of a model that was trained on it: *cluster size → share of its
captions above threshold → copies found* (:func:`by_cluster_size`). No torch.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..bounds import AMOUNT, COUNT, SIMILARITY, within
from ..errors import UsageError
from ..records.schema import Row
from ..records.store import write_whole
from ..records.table import prompt_scores
from ..stats import Interval, clopper_pearson
from .search import CELLS, Searcher
from .storage import IndexFolder

__all__ = [
    "Clusters",
    "Exposure",
    "Level",
    "Membership",
    "Share",
    "by_cluster_size",
    "cohesion",
    "contact_sheet",
    "find_clusters",
    "memberships",
    "write_clusters",
]

NEIGHBORS = 64
"""Nearest pictures that are looked at for each one, where not all pairs are compared."""

PENDING = 1 << 22
"""Joined pairs that are held before they are reduced to the clusters they make."""

Labels = Int[np.ndarray, " n"]
Pairs = Int[np.ndarray, "pair 2"]


@dataclass(frozen=True)
class Membership:
    """Where a picture belongs."""

    cluster: int
    """Number of its cluster; the largest is 0."""
    size: int


@dataclass(frozen=True, eq=False)
class Clusters:
    """Clusters of the pictures of an index.

    Attributes:
        numbers: The index's vectors that belong to pictures, ascending.
        labels: The cluster of each, the largest cluster first; a picture without near-duplicates is a cluster of one.
        threshold: Similarity above which two pictures were joined.
        search: How pairs were found, in words.
        identical: Pictures whose file has the same bytes as that of an earlier one.
    """

    numbers: Labels
    labels: Labels
    threshold: float
    search: str
    identical: int

    @cached_property
    def sizes(self) -> Int[np.ndarray, " cluster"]:
        """Pictures in each cluster, descending."""
        return np.bincount(self.labels)

    @cached_property
    def _starts(self) -> Labels:
        """Where each cluster begins in ``_order``."""
        return np.cumsum(self.sizes) - self.sizes

    @cached_property
    def _order(self) -> Labels:
        return np.argsort(self.labels, kind="stable")

    def members(self, cluster: int) -> Labels:
        """The vectors of one cluster, ascending."""
        start = int(self._starts[cluster])
        return self.numbers[self._order[start : start + int(self.sizes[cluster])]]

    @property
    def repeated(self) -> int:
        """Clusters of two or more."""
        return int((self.sizes > 1).sum())

    def summary(self) -> dict[str, Any]:
        """The counts, as plain values."""
        many = self.sizes[self.sizes > 1]
        return {
            "pictures": len(self.labels),
            "clusters": len(many),
            "in_clusters": int(many.sum()),
            "redundant": int((many - 1).sum()),
            "identical_files": self.identical,
            "largest": int(self.sizes[0]) if len(self.sizes) else 0,
            "sizes": {str(size): n for size, n in sorted(Counter(self.sizes.tolist()).items())},
            "threshold": self.threshold,
            "search": self.search,
        }


@within(threshold=SIMILARITY)
def find_clusters(
    index: IndexFolder,
    threshold: float,
    *,
    every_pair: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Clusters:
    """Cluster the pictures of an index.

    Args:
        index: Where the vectors are.
        threshold: Similarity above which two pictures are joined, in (−1, 1).
        every_pair: Compare every picture with every other (exact; n²/2 similarities), instead of with its 64 nearest. Default:
            below 100,000 pictures, or where this user has built no inverted file.
        progress: Called with pictures done and asked.

    Raises:
        UsageError: the threshold is none.
    """
    vectors, numbers = index.vectors, np.flatnonzero(index.alive)
    if every_pair is None:
        every_pair = index.usable_inverted() is None
    blocks = _every_pair(index, threshold) if every_pair else _nearest_pairs(index, threshold)
    identical = _same_bytes(index)
    joined, pending = identical, 0
    waiting: list[Pairs] = []
    for done, pairs in blocks:
        waiting.append(pairs)
        pending += len(pairs)
        if pending > PENDING:
            joined, waiting, pending = _tree(np.concatenate([joined, *waiting]), len(vectors)), [], 0
        if progress is not None:
            progress(done, len(vectors))
    labels = _components(np.concatenate([joined, *waiting]), len(vectors))[index.alive]
    how = "exact" if index.usable_inverted() is None else "inverted file"
    words = "every pair" if every_pair else f"the {NEIGHBORS} nearest of each, {how}"
    return Clusters(numbers, _largest_first(labels), threshold, words, len(identical))


def _every_pair(index: IndexFolder, threshold: float) -> Iterator[tuple[int, Pairs]]:
    vectors, alive, step = index.vectors, index.alive, max(1, int(CELLS**0.5))
    for i in range(0, len(vectors), step):
        rows = np.asarray(vectors[i : i + step], np.float32)
        for j in range(i, len(vectors), step):
            a, b = np.nonzero(rows @ np.asarray(vectors[j : j + step], np.float32).T > threshold)
            pairs = np.stack([a + i, b + j], axis=1)
            yield min(i + step, len(vectors)), pairs[(pairs[:, 0] < pairs[:, 1]) & alive[pairs].all(1)]


def _nearest_pairs(index: IndexFolder, threshold: float) -> Iterator[tuple[int, Pairs]]:
    vectors, step = index.vectors, 1024
    search = Searcher(vectors, index.alive, index.usable_inverted())
    for i in range(0, len(vectors), step):
        found = search.top(np.asarray(vectors[i : i + step], np.float32), NEIGHBORS + 1)
        a, b = np.nonzero(found.similarity > threshold)
        yield min(i + step, len(vectors)), np.stack([a + i, found.number[a, b]], axis=1)


def _same_bytes(index: IndexFolder) -> Pairs:
    """Each picture whose file was met before, with the first that has these bytes. A descriptor may be blind for it."""
    hashes = np.zeros((len(index.vectors), 4), np.uint64)
    for row in index.rows():
        if row.vector is not None and row.sha256 is not None:
            hashes[row.vector] = np.frombuffer(bytes.fromhex(row.sha256), np.uint64)
    numbers = np.flatnonzero(index.alive)
    _, first, inverse = np.unique(hashes[numbers], axis=0, return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)  # numpy 2.0 gave it another shape
    earliest = numbers[first[inverse]]
    again = earliest != numbers
    return np.stack([earliest[again], numbers[again]], axis=1)


def _components(pairs: Pairs, n: int) -> Labels:
    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _tree(pairs: Pairs, n: int) -> Int[np.ndarray, "fewer 2"]:
    """Fewer pairs that join the same pictures: each with the first of its cluster."""
    labels = _components(pairs, n)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    star = np.stack([first[inverse], np.arange(n)], axis=1)
    return star[star[:, 0] != star[:, 1]]


def _largest_first(labels: Labels) -> Labels:
    """Cluster numbers in order of size; of equal ones, the one that appears first."""
    _, first, inverse, sizes = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    rank = np.empty(len(sizes), np.int64)
    rank[np.lexsort((first, -sizes))] = np.arange(len(sizes))
    return rank[inverse]


def cohesion(index: IndexFolder, members: Labels, most: int = 1000) -> float:
    """The least similarity between two members of a cluster (of its first 1000): how far single linkage has wandered."""
    vectors = np.asarray(index.vectors[members[:most]], np.float32)
    return min(round(float((vectors @ vectors.T).min()), 4), 1.0)


# What people look at ------------------------------------------------------------------------------------------------------


@within(sheets=AMOUNT, shown=COUNT)
def write_clusters(
    index: IndexFolder, clusters: Clusters, folder: str | Path, *, sheets: int = 12, shown: int = 24
) -> list[dict[str, Any]]:
    """Write ``clusters.jsonl`` (a line per cluster of two or more), ``summary.json``, and contact sheets of the largest.

    Args:
        index: What was clustered.
        clusters: Its clusters.
        folder: Where to write.
        sheets: How many clusters get a contact sheet.
        shown: Pictures on a sheet, at most.

    Returns:
        The clusters with a sheet: number, size, least similarity, first id, and the file.
    """
    folder, lines, worst = Path(folder), [], []
    for old in (folder / "sheets").glob("cluster-*.webp"):
        old.unlink()
    for cluster in range(clusters.repeated):
        members = clusters.members(cluster)
        rows = [index.row(int(i)) for i in members]
        fact = {"cluster": cluster, "size": len(members), "least_similarity": cohesion(index, members)}
        lines.append(json.dumps(fact | {"ids": [row.id for row in rows]}, ensure_ascii=False))
        if cluster < sheets:
            title = f"{len(members)} pictures, similarity {fact['least_similarity']:.3f} or more"
            sheet = contact_sheet([(row.id, index.picture(row)) for row in rows[:shown]], title)
            file = write_whole(folder / "sheets" / f"cluster-{cluster}.webp", sheet)
            worst.append(fact | {"first": rows[0].id, "sheet": str(file)})
    write_whole(folder / "clusters.jsonl", "".join(line + "\n" for line in lines).encode())
    summary = {"descriptor": index.manifest.descriptor.name, **clusters.summary()}
    write_whole(folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    return worst


def contact_sheet(
    pictures: Sequence[tuple[str, Image.Image | None]], title: str, *, side: int = 128, across: int = 6
) -> bytes:
    """Pictures beside each other under their ids, as WebP. A picture that is gone leaves an empty frame."""
    gap, text = 10, 16
    rows = math.ceil(len(pictures) / across)
    width = gap + min(across, max(len(pictures), 3)) * (side + gap)
    sheet = Image.new("RGB", (width, 2 * text + gap + rows * (side + text + gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    draw.text((gap, gap), title, "black", font)
    for i, (name, picture) in enumerate(pictures):
        x, y = gap + i % across * (side + gap), 2 * text + gap + i // across * (side + text + gap)
        draw.rectangle((x - 1, y - 1, x + side, y + side), outline="#cccccc")
        if picture is None:
            draw.text((x + 8, y + side // 2), "gone or changed", "#888888", font)
        else:
            small = ImageOps.contain(picture, (side, side))
            sheet.paste(small, (x + (side - small.width) // 2, y + (side - small.height) // 2))
        draw.text((x, y + side + 2), _fitting(name, draw, font, side), "black", font)
    data = BytesIO()
    sheet.save(data, "WEBP", quality=85, method=4)
    return data.getvalue()


def _fitting(name: str, draw: ImageDraw.ImageDraw, font: Any, width: int) -> str:
    """The end of a name, which tells it from its neighbors, as far as there is room; the font knows Latin-1 only."""
    shown = "".join(c if c.isprintable() and ord(c) < 256 else "?" for c in name)
    if draw.textlength(shown, font) <= width:
        return shown
    while shown and draw.textlength("..." + shown, font) > width:
        shown = shown[1:]
    return "..." + shown


# Clusters and an audit ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """k of n captions, with the interval of their share."""

    k: int
    n: int
    interval: Interval


@dataclass(frozen=True)
class Level:
    """Captions whose pictures stand in clusters of one size.

    Attributes:
        low: Smallest cluster size of this level.
        high: Largest.
        clusters: Different clusters: the independent cases that the intervals are for.
        captions: Captions with a result.
        above: Share of captions above the score's threshold; None: not tested.
        copies: Share of captions with a copy found in at least one seed; None: not tested.
        own: Captions with a copy found of a picture of their own cluster; None: not tested.
    """

    low: int
    high: int
    clusters: int
    captions: int
    above: Share | None
    copies: Share | None
    own: int | None

    @property
    def size(self) -> str:
        """``1``, or ``4–7``."""
        return str(self.low) if self.low == self.high else f"{self.low}–{self.high}"


@dataclass(frozen=True)
class Exposure:
    """Cluster size against what a model gave back.

    Attributes:
        levels: By cluster size, ascending.
        unmatched: Captions of the audit that belong to no picture of the set.
        untested: Captions with failed samples only.
    """

    levels: list[Level]
    unmatched: int
    untested: int


@dataclass
class _Caption:
    """What the rows of one caption say."""

    cluster: Membership | None
    ok: bool = False
    compared: bool = False
    copied: bool = False
    own: bool = False
    score: float | None = None


def memberships(index: IndexFolder, clusters: Clusters) -> dict[str, Membership]:
    """Where each picture of an index belongs, by its id."""
    sizes = clusters.sizes
    found = {int(n): Membership(int(c), int(sizes[c])) for n, c in zip(clusters.numbers, clusters.labels, strict=True)}
    return {row.id: found[row.vector] for row in index.rows() if row.vector is not None}


def by_cluster_size(
    rows: Iterable[Row],
    members: Mapping[str, Membership],
    pictures_of: Mapping[str, Sequence[str]] | None = None,
    *,
    detector: str = "magnitude",
    threshold: float | None = None,
    confidence: float = 0.95,
) -> Exposure:
    """Cluster size → share of captions above threshold → copies found.

    Captions of one cluster are not independent, so the intervals are exact binomial ones for as many cases as there are
    clusters, around the share of captions.

    Args:
        rows: Of an audit of the captions.
        members: Where each picture belongs, by its id (:func:`memberships`).
        pictures_of: Ids of the pictures of a caption, by prompt id or by the caption itself; default: a caption's prompt id is
            its picture's id. Of several pictures, the one in the largest cluster counts.
        detector: The score.
        threshold: A caption is above it when its mean score is greater; None: not tested.
        confidence: Of the intervals.

    Raises:
        UsageError: no caption belongs to a picture of the set.
        UnknownName: no row has that score.
    """
    captions: dict[str, _Caption] = {}

    def noted() -> Iterator[Row]:
        for row in rows:
            if row.prompt_id not in captions:
                captions[row.prompt_id] = _Caption(_cluster_of(row, members, pictures_of))
            _note(captions[row.prompt_id], row, members)
            yield row

    if threshold is None:
        for _ in noted():
            pass
    else:
        for prompt in prompt_scores(noted(), detector):
            captions[prompt.prompt_id].score = prompt.score
    matched = [c for c in captions.values() if c.cluster is not None]
    if not matched:
        raise UsageError(
            f"none of {len(captions)} captions belongs to a picture of the set; prompt ids must be picture ids (--id-column of the "
            f"audit), or name the captions' pictures."
        )
    tested = [c for c in matched if c.ok]
    levels = [_level(low, high, group, confidence, threshold) for low, high, group in _grouped(tested)]
    return Exposure(levels, len(captions) - len(matched), len(matched) - len(tested))


def _cluster_of(
    row: Row, members: Mapping[str, Membership], pictures_of: Mapping[str, Sequence[str]] | None
) -> Membership | None:
    if pictures_of is None:
        return members.get(row.prompt_id)
    pictures = pictures_of.get(row.prompt_id) or pictures_of.get(row.prompt) or ()
    found = [members[p] for p in pictures if p in members]
    return max(found, key=lambda m: (m.size, -m.cluster), default=None)


def _note(caption: _Caption, row: Row, members: Mapping[str, Membership]) -> None:
    caption.ok |= row.status == "ok"
    if row.nearest is None or row.nearest.copy_found is None:
        return
    caption.compared = True
    caption.copied |= row.nearest.copy_found
    found = members.get(row.nearest.reference)
    caption.own |= row.nearest.copy_found and found is not None and found == caption.cluster


def _grouped(captions: Sequence[_Caption], most: int = 10) -> list[tuple[int, int, list[_Caption]]]:
    """Captions by the size of their cluster: each size for itself, or where these are many, 1, 2–3, 4–7, 8–15, …"""
    sizes = sorted({c.cluster.size for c in captions if c.cluster is not None})
    groups: dict[tuple[int, int], list[_Caption]] = {}
    for caption in captions:
        size = caption.cluster.size if caption.cluster is not None else 0
        low = high = size
        if len(sizes) > most:
            low = 1 << (size.bit_length() - 1)
            high = 2 * low - 1
        groups.setdefault((low, high), []).append(caption)
    return [(low, high, groups[low, high]) for low, high in sorted(groups)]


def _level(low: int, high: int, captions: Sequence[_Caption], confidence: float, threshold: float | None) -> Level:
    def share(hit: Callable[[_Caption], bool], asked: Sequence[_Caption]) -> Share | None:
        cases = len({c.cluster for c in asked})
        return _share(sum(map(hit, asked)), len(asked), cases, confidence) if asked else None

    scored = [c for c in captions if c.score is not None]
    compared = [c for c in captions if c.compared]
    return Level(
        low,
        high,
        len({c.cluster for c in captions}),
        len(captions),
        None if threshold is None else share(lambda c: c.score is not None and c.score > threshold, scored),
        share(lambda c: c.copied, compared),
        sum(c.own for c in compared) if compared else None,
    )


def _share(k: int, n: int, cases: int, confidence: float) -> Share:
    """k of n captions, with the exact interval that the same share of ``cases`` independent ones would have."""
    whole = k * cases / n
    low = clopper_pearson(math.floor(whole), cases, confidence).low
    high = clopper_pearson(math.ceil(whole), cases, confidence).high
    note = "" if cases == n else f"for {cases} clusters as independent cases"
    return Share(k, n, Interval(k / n, low, high, confidence, "Clopper–Pearson", note))
