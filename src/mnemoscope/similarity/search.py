"""Nearest descriptors: exact in chunks of numpy, and with faiss (extra ``[index]``) faster for large sets.

Both only propose: similarities are computed anew from the stored vectors in float64 and rounded to six digits, and of equally
similar pictures the one that was added first counts, so that both answer alike. Faiss proposes from all pictures below
:data:`FLAT` of them; above that from an inverted file with product quantization, which may miss the nearest: how often is
measured when it is built.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ..errors import RunError

__all__ = ["FLAT", "PLACES", "Found", "Searcher", "build_inverted", "exact", "has_faiss"]

FLAT = 100_000
"""From so many pictures on, faiss searches an inverted file."""

PLACES = 6
"""Digits of a similarity that are kept."""

SPARE = 16
"""Candidates beyond those asked for: float32 sums, which depend on the order of summation, may swap neighbors."""

CELLS = 1 << 23
"""Similarities that are computed at a time."""

TRAINING = 200_000
"""Vectors that an inverted file is trained on, at most."""

PROBED = 32
"""Lists of the inverted file that a query looks into."""

_SHIFT = 40
_LAST = (1 << _SHIFT) - 1
_NONE = np.iinfo(np.int64).min

Stored = Float[np.ndarray, "n dim"]
Queries = Float[np.ndarray, "q dim"]
Keys = Int[np.ndarray, "q k"]


@dataclass(frozen=True, eq=False, slots=True)
class Found:
    """The k nearest of q queries, most similar first.

    Attributes:
        similarity: Rounded to :data:`PLACES` digits.
        number: Row of the stored vectors; −1 where there are fewer than k.
    """

    similarity: Float[np.ndarray, "q k"]
    number: Int[np.ndarray, "q k"]


def exact(vectors: Stored, queries: Queries, k: int, alive: Bool[np.ndarray, " n"] | None = None) -> Found:
    """Compare with everything, a chunk of ``vectors`` in memory at a time.

    Args:
        vectors: Any float type; may be memory-mapped.
        queries: One per row.
        k: How many are wanted.
        alive: Rows that count; None: all.
    """
    k = min(k, len(vectors))
    return _settled(vectors, queries, _decoded(_exact_keys(vectors, queries, k + SPARE, alive, 0)).number, k)


def has_faiss() -> bool:
    """Whether faiss is installed."""
    return importlib.util.find_spec("faiss") is not None


def _faiss() -> Any:
    with warnings.catch_warnings():  # its bindings are older than Python's opinion of them
        warnings.simplefilter("ignore")
        import faiss
    return faiss


# A similarity and the number it belongs to as one integer, so that one partition ranks both: larger is more similar, and of
# equals the smaller number comes first.


def _keys(similarity: Float[np.ndarray, "*shape"], number: Int[np.ndarray, "*last"]) -> Int[np.ndarray, "*shape"]:
    return (np.rint(similarity.astype(np.float64) * 10**PLACES).astype(np.int64) << _SHIFT) + (_LAST - number)


def _decoded(keys: Keys) -> Found:
    none = keys == _NONE
    similarity = np.where(none, -np.inf, (keys >> _SHIFT) / 10**PLACES)
    return Found(similarity, np.where(none, -1, _LAST - (keys & _LAST)))


def _top(keys: Keys, k: int) -> Int[np.ndarray, "q top"]:
    if keys.shape[1] > k:
        keys = np.partition(keys, keys.shape[1] - k, axis=1)[:, -k:]
    return np.sort(keys, axis=1)[:, ::-1]


def _exact_keys(vectors: Stored, queries: Queries, k: int, alive: Bool[np.ndarray, " n"] | None, first: int) -> Keys:
    best = np.empty((len(queries), 0), np.int64)
    step = max(1, CELLS // max(len(queries), 1))
    for start in range(first, len(vectors), step):
        block = np.asarray(vectors[start : start + step], np.float32)
        keys = _keys(queries @ block.T, np.arange(start, start + len(block)))
        if alive is not None:
            keys[:, ~alive[start : start + step]] = _NONE
        best = _top(np.concatenate([best, _top(keys, k)], axis=1), k)
    return best


def _settled(vectors: Stored, queries: Queries, number: Int[np.ndarray, "q c"], k: int) -> Found:
    """The k nearest of some candidates (−1: none), by similarities that do not depend on how these were found."""
    keys = np.full(number.shape, _NONE, np.int64)
    for row, (query, candidates) in enumerate(zip(queries.astype(np.float64), number, strict=True)):
        chosen = np.sort(candidates[candidates >= 0])  # in the order of the file, which is read
        keys[row, : len(chosen)] = _keys((vectors[chosen].astype(np.float64) * query).sum(1), chosen)
    return _decoded(_top(keys, k))


class Searcher:
    """Finds the nearest of stored vectors.

    Args:
        vectors: ``[n, dim]``, usually memory-mapped.
        alive: Rows that count; None: all.
        inverted: File of :func:`build_inverted`; it may be older than the last vectors, which are then compared one by one. Faiss
            trusts what it loads: give a file that this user built, see ``IndexFolder.usable_inverted``.
        use_faiss: Whether to use faiss; None: if it is installed.
    """

    def __init__(
        self,
        vectors: Stored,
        alive: Bool[np.ndarray, " n"] | None = None,
        inverted: Path | None = None,
        use_faiss: bool | None = None,
    ):
        self.vectors, self.alive = vectors, None if alive is None or alive.all() else alive
        self._index: Any = None
        self.kind = "exact, numpy"
        if not len(vectors) or not (has_faiss() if use_faiss is None else use_faiss):
            return
        if inverted is not None and inverted.is_file():
            self._index, self.kind = _load(inverted, vectors), "inverted file, faiss"
        elif len(vectors) < FLAT:
            self._index, self.kind = _flat(vectors), "exact, faiss"

    def top(self, queries: Queries, k: int) -> Found:
        """The k nearest of each query, or all where there are fewer."""
        k = min(k, len(self.vectors))
        queries = np.ascontiguousarray(queries, np.float32)
        if self._index is None or not k:
            return exact(self.vectors, queries, k, self.alive)
        dead = 0 if self.alive is None else int((~self.alive).sum())
        wide = (max(10 * k, 100) if self.kind.startswith("inverted") else k + SPARE) + dead
        _, number = self._index.search(queries, min(wide, self._index.ntotal))
        if self.alive is not None:
            number = np.where((number >= 0) & self.alive[number], number, -1)
        # What was added since faiss last looked is compared one by one.
        rest = _decoded(_exact_keys(self.vectors, queries, k + SPARE, self.alive, self._index.ntotal)).number
        return _settled(self.vectors, queries, np.concatenate([number, rest], axis=1), k)


def _flat(vectors: Stored) -> Any:
    index = _faiss().IndexFlatIP(vectors.shape[1])
    _add(index, vectors, 0)
    return index


def _add(index: Any, vectors: Stored, first: int) -> None:
    step = max(1, CELLS // vectors.shape[1])
    for start in range(first, len(vectors), step):
        index.add(np.ascontiguousarray(vectors[start : start + step], np.float32))


def _load(path: Path, vectors: Stored) -> Any:
    """An inverted file for searching; its lists stay on the disk."""
    index = _read(path, vectors.shape[1], _faiss().IO_FLAG_MMAP)
    if index.ntotal > len(vectors):
        raise RunError(
            f"{path} knows {index.ntotal} pictures of {len(vectors)}; delete it, and the next build makes it again."
        )
    return index


def _read(path: Path, dim: int, flags: int = 0) -> Any:
    """An inverted file as :func:`build_inverted` writes it, and nothing else that faiss can read."""
    try:
        index = _faiss().read_index(str(path), flags)
    except RuntimeError as e:
        raise RunError(f"{path} cannot be read; delete it, and the next build makes it again.") from e
    if not _is_inverted(index, dim):
        raise RunError(
            f"{path} is no inverted file of {dim} numbers per picture; delete it, and the next build makes it again."
        )
    return index


def _is_inverted(index: Any, dim: int) -> bool:
    """Whether it is an IVF-PQ whose lists are in its own file and hold each picture once, by the number of its vector."""
    faiss = _faiss()
    if type(index) is not faiss.IndexIVFPQ or (index.d, index.metric_type) != (dim, faiss.METRIC_INNER_PRODUCT):
        return False
    quantizer, lists = faiss.downcast_index(index.quantizer), faiss.downcast_InvertedLists(index.invlists)
    if type(quantizer) is not faiss.IndexFlatIP or (quantizer.d, quantizer.ntotal) != (dim, index.nlist):
        return False
    # Mapped into memory, lists of the same file are of the class of those in another file, whose name they lack.
    if type(lists) is not faiss.ArrayInvertedLists and getattr(lists, "filename", None) != "":
        return False
    if lists.nlist != index.nlist or sum(map(lists.list_size, range(index.nlist))) != index.ntotal:
        return False
    seen = np.zeros(index.ntotal, bool)
    for k in range(index.nlist):
        if size := lists.list_size(k):
            numbers = faiss.rev_swig_ptr(lists.get_ids(k), size)
            if numbers.min() < 0 or numbers.max() >= index.ntotal:
                return False
            seen[numbers] = True
    return bool(seen.all())


def build_inverted(vectors: Stored, path: Path, old: Path | None = None, *, seed: int = 0) -> dict[str, Any]:
    """Write the inverted file of ``vectors`` to ``path``, and say what it is.

    Args:
        vectors: ``[n, dim]``.
        path: Where to write.
        old: An inverted file of the first of these vectors, built by this user; it is added to as long as it does not have to more
            than double.
        seed: Of the sample that it is trained and measured on.

    Returns:
        Its parameters, and ``recall``: of how many of 200 stored pictures it finds the same nearest other picture as the exact
        search does, as ``(found, of)``.
    """
    faiss, (n, dim) = _faiss(), vectors.shape
    rng = np.random.default_rng(seed)
    index = None if old is None or not old.is_file() else _read(old, dim)
    if index is None or not index.ntotal <= n <= 2 * index.ntotal:
        lists = max(1, int(4 * n**0.5))
        parts = next(m for m in (64, 48, 32, 16, 8, 4, 2, 1) if dim % m == 0)
        sample = np.sort(rng.choice(n, min(n, TRAINING), replace=False))
        index = faiss.IndexIVFPQ(faiss.IndexFlatIP(dim), dim, lists, parts, 8, faiss.METRIC_INNER_PRODUCT)
        index.train(np.ascontiguousarray(vectors[sample], np.float32))
    index.nprobe = PROBED
    _add(index, vectors, index.ntotal)
    faiss.write_index(index, str(path))
    facts = {
        "kind": "IVF-PQ",
        "lists": index.nlist,
        "parts": index.pq.M,
        "bits": 8,
        "probed": PROBED,
        "pictures": n,
        "dim": dim,
    }
    return facts | {"recall": _recall(vectors, path, rng)}


def _recall(vectors: Stored, path: Path, rng: np.random.Generator) -> tuple[int, int]:
    chosen = rng.choice(len(vectors), min(200, len(vectors)), replace=False)
    queries = np.ascontiguousarray(vectors[np.sort(chosen)], np.float32)
    # The second nearest: the first is the picture itself, which any index finds.
    truth = exact(vectors, queries, 2).similarity[:, -1]
    found = Searcher(vectors, inverted=path, use_faiss=True).top(queries, 2).similarity[:, -1]
    return int((found >= truth).sum()), len(chosen)
