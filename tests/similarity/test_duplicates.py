"""Clusters of near-duplicates, and what a model made of them."""

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_pictures import encoded, fill, smooth

from mnemoscope.errors import UnknownName, UsageError
from mnemoscope.records.schema import Nearest, Row, Score
from mnemoscope.similarity import duplicates as module
from mnemoscope.similarity import search
from mnemoscope.similarity.duplicates import (
    Membership,
    by_cluster_size,
    cohesion,
    contact_sheet,
    find_clusters,
    memberships,
    write_clusters,
)
from mnemoscope.similarity.index import ReferenceIndex
from mnemoscope.similarity.pixels import Pixels
from mnemoscope.similarity.search import build_inverted, has_faiss
from mnemoscope.similarity.storage import (
    DescriptorRecord,
    IndexFolder,
    IndexManifest,
    IndexRow,
    IndexWriter,
    built_inverted,
)
from mnemoscope.stats import clopper_pearson


def index_of(folder, vectors, hashes=None):
    """An index with these vectors, whatever pictures they are of."""
    record = DescriptorRecord(name="made", identity={})
    files = IndexFolder.create(
        folder, IndexManifest(descriptor=record, dim=vectors.shape[1], sources=[{"kind": "files"}])
    )
    rows = [
        IndexRow(id=str(i), status="ok", vector=i, sha256=f"{(hashes or range(len(vectors)))[i]:064x}")
        for i in range(len(vectors))
    ]
    with IndexWriter(files) as writer:
        writer.append(rows, vectors.astype(np.float32))
    return IndexFolder(folder)


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)


def by_hand(vectors, threshold, hashes):
    """Union by walking: the partition as a set of sets."""
    near = (vectors.astype(np.float32) @ vectors.astype(np.float32).T > threshold) | (hashes[:, None] == hashes[None])
    left, found = set(range(len(vectors))), set()
    while left:
        cluster, edge = set(), {left.pop()}
        while edge:
            cluster |= edge
            edge = {int(j) for i in edge for j in np.flatnonzero(near[i])} - cluster
        found.add(frozenset(cluster))
        left -= cluster
    return found


@given(
    n=st.integers(1, 40),
    families=st.integers(1, 6),
    threshold=st.sampled_from([0.5, 0.9, 0.99]),
    seed=st.integers(0, 1000),
    cells=st.sampled_from([1, 30, 10_000]),
    pending=st.sampled_from([0, 5, 10_000]),
)
@settings(deadline=None, max_examples=40)
def test_clusters_are_the_components(tmp_path_factory, n, families, threshold, seed, cells, pending):
    rng = np.random.default_rng(seed)
    vectors = unit(rng.normal(size=(families, 4))[rng.integers(families, size=n)] + 0.3 * rng.normal(size=(n, 4)))
    hashes = rng.integers(0, 2 * n, size=n)
    index = index_of(tmp_path_factory.mktemp("index") / "i", vectors, hashes.tolist())
    kept = module.CELLS, module.PENDING
    module.CELLS, module.PENDING = cells, pending
    try:
        clusters = find_clusters(index, threshold)
    finally:
        module.CELLS, module.PENDING = kept
    found = [frozenset(clusters.members(c).tolist()) for c in range(len(clusters.sizes))]
    assert set(found) == by_hand(vectors, threshold, hashes)
    assert clusters.sizes.tolist() == sorted(map(len, found), reverse=True)
    assert clusters.summary()["redundant"] == n - len(found)
    assert clusters.identical == n - len(set(hashes.tolist()))
    where = memberships(index, clusters)
    assert all(where[str(i)].size == len(next(c for c in found if i in c)) for i in range(n))


def test_near_duplicates_of_real_pictures(tmp_path):
    source = fill(tmp_path / "p", 12)
    rng = np.random.default_rng(0)
    for i in range(4):
        noisy = np.asarray(smooth(5), float) + rng.normal(0, 4, (32, 32, 3))
        (source / f"near-{i}.png").write_bytes(encoded(Image.fromarray(noisy.clip(0, 255).astype(np.uint8))))
    (source / "same.png").write_bytes((source / "007.png").read_bytes())
    # A plain card has no descriptor, and is found by its bytes alone.
    for name in ("card-a", "card-b"):
        (source / f"{name}.png").write_bytes(encoded(Image.new("RGB", (32, 32), "red")))
    index = ReferenceIndex.build(source, tmp_path / "index").files
    clusters = find_clusters(index, Pixels.near_duplicate)
    names = [[index.row(int(i)).id for i in clusters.members(c)] for c in range(clusters.repeated)]
    assert names == [
        ["005.png", "near-0.png", "near-1.png", "near-2.png", "near-3.png"],
        ["007.png", "same.png"],
        ["card-a.png", "card-b.png"],
    ]
    assert clusters.identical == 2
    assert 0.98 < cohesion(index, clusters.members(0)) < 1
    assert clusters.summary()["sizes"] == {"1": 10, "2": 2, "5": 1}
    worst = write_clusters(index, clusters, tmp_path / "out", sheets=2, shown=3)
    assert [w["size"] for w in worst] == [5, 2]
    lines = [json.loads(line) for line in (tmp_path / "out/clusters.jsonl").read_text().splitlines()]
    assert [line["ids"] for line in lines] == names
    assert sorted(p.name for p in (tmp_path / "out/sheets").iterdir()) == ["cluster-0.webp", "cluster-1.webp"]
    with Image.open(tmp_path / "out/sheets/cluster-0.webp") as sheet:
        assert sheet.format == "WEBP"
        shown = np.asarray(sheet.convert("RGB").crop((10, 42, 138, 170)).resize((32, 32)), float)
    assert np.abs(shown - np.asarray(smooth(5), float)).mean() < 12, "the first picture is where it should be"
    # Asked again with another threshold, no sheet of the first time stays.
    write_clusters(index, find_clusters(index, 0.9999), tmp_path / "out", sheets=1)
    assert len(list((tmp_path / "out/sheets").iterdir())) == 1


def test_pictures_without_a_row_join_nobody(tmp_path):
    """Two pictures near a third whose row was deleted, and not near each other."""
    angle = np.radians([0, 20, 40])
    vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    threshold = np.cos(np.radians(25))
    index = index_of(tmp_path / "i", vectors)
    assert find_clusters(index, threshold).sizes.tolist() == [3]
    rows = (tmp_path / "i/rows.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "i/rows.jsonl").write_bytes(rows[0] + rows[2])
    clusters = find_clusters(IndexFolder(tmp_path / "i"), threshold)
    assert clusters.sizes.tolist() == [1, 1]
    assert clusters.numbers.tolist() == [0, 2]


@pytest.mark.skipif(not has_faiss(), reason="faiss is not installed (extra [index])")
def test_the_nearest_of_each_give_the_same_clusters_where_these_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "FLAT", 1500)
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(300, 16))[np.arange(1500) % 300] + 0.02 * rng.normal(size=(1500, 16)))
    index = index_of(tmp_path / "i", vectors)
    facts = build_inverted(index.vectors, index.inverted)
    index.update(search=built_inverted(index.inverted, facts))
    whole, near = (find_clusters(index, 0.9, every_pair=e) for e in (True, False))
    assert near.search.endswith("inverted file")
    assert near.search != whole.search
    assert (near.labels == whole.labels).mean() > 0.99
    assert whole.sizes.tolist() == [5] * 300


@pytest.mark.parametrize("threshold", [1.0, -1.0, 2.5])
def test_a_threshold_that_joins_all_or_none_is_refused(tmp_path, threshold):
    with pytest.raises(UsageError, match="must be a similarity above -1 and below 1"):
        find_clusters(index_of(tmp_path / "i", np.eye(3)), threshold)


def test_no_pictures_no_clusters(tmp_path):
    record = DescriptorRecord(name="made", identity={})
    index = IndexFolder.create(tmp_path / "i", IndexManifest(descriptor=record))
    clusters = find_clusters(index, 0.9)
    assert clusters.summary()["pictures"] == clusters.repeated == 0
    assert write_clusters(index, clusters, tmp_path / "out") == []


def test_contact_sheets_hold_any_name_and_missing_pictures():
    pictures = [("a" * 300, smooth(0)), ("名前‮.png", smooth(1, 500)), ("gone", None)]
    with Image.open(io.BytesIO(contact_sheet(pictures, "three"))) as sheet:
        assert (sheet.format, sheet.width) == ("WEBP", 10 + 3 * 138)
    assert contact_sheet([], "none")


# Clusters and an audit ----------------------------------------------------------------------------------------------------


def rows_of(caption, score, copies, reference="x", ok=True, prompt_id=None):
    """A caption with one seed per entry of ``copies``."""
    for seed, copied in enumerate(copies):
        nearest = None
        if copied is not None:
            nearest = Nearest(
                reference=reference, similarity=0.9, descriptor="pixels-16", threshold=0.8, copy_found=copied
            )
        yield Row(
            id=f"{caption}-{seed}",
            prompt_id=prompt_id or caption,
            prompt=caption,
            seed=seed,
            status="ok" if ok else "error",
            scores={"magnitude": Score(value=score, space="eps", per_step=[score])} if ok else {},
            nearest=nearest if ok else None,
            error=None if ok else "it failed",
        )


def test_the_table_by_hand():
    # Sizes: a, b, c alone; d1 d2 d3 one cluster of 3; e of another cluster of 3.
    members = {n: Membership(10 + i, 1) for i, n in enumerate("abc")}
    members |= {f"d{i}": Membership(0, 3) for i in range(3)} | {"e": Membership(1, 3)}
    rows = [
        *rows_of("a", 1.0, [False, False]),
        *rows_of("b", 9.0, [False, True], reference="a"),
        *rows_of("c", 0.0, [None, None], ok=False),
        *rows_of("d0", 9.0, [True, True], reference="d2"),
        *rows_of("d1", 9.0, [True, False], reference="e"),
        *rows_of("d2", 4.0, [False, False], reference="d2"),
        *rows_of("e", 9.0, [None, None]),
        *rows_of("of nobody", 9.0, [True]),
    ]
    found = by_cluster_size(iter(rows), members, threshold=4.0)
    assert (found.unmatched, found.untested) == (1, 1)
    one, three = found.levels
    assert (one.size, one.clusters, one.captions) == ("1", 2, 2)
    assert (one.above.k, one.above.n) == (1, 2)
    assert (one.copies.k, one.copies.n, one.own) == (1, 2, 0), "b's copy is of a, which is another cluster"
    assert (three.size, three.clusters, three.captions) == ("3", 2, 4)
    assert (three.above.k, three.above.n) == (3, 4), "4.0 is not above 4.0"
    assert (three.copies.k, three.copies.n, three.own) == (2, 3, 1), "e was compared with nothing"
    # Four captions of two clusters: 3/4 of two cases lies between 1 and 2 of them.
    assert three.above.interval.low == clopper_pearson(1, 2).low
    assert three.above.interval.high == clopper_pearson(2, 2).high
    assert three.above.interval.value == 0.75
    assert three.above.interval.note == "for 2 clusters as independent cases"
    assert one.above.interval.note == ""
    assert (one.above.interval.low, one.above.interval.high) == (clopper_pearson(1, 2).low, clopper_pearson(1, 2).high)


def test_without_threshold_or_references_that_is_not_tested():
    members = {"a": Membership(0, 1)}
    (level,) = by_cluster_size(rows_of("a", 1.0, [None]), members).levels
    assert (level.above, level.copies, level.own) == (None, None, None)


def test_captions_may_have_several_pictures():
    members = {"p": Membership(3, 1), "q": Membership(0, 5), "r": Membership(2, 2)}
    pictures = {"by text": ["p", "q", "unknown"], "id-7": ["r"]}
    rows = [
        *rows_of("by text", 1.0, [True], reference="q", prompt_id="h"),
        *rows_of("x", 1.0, [True], prompt_id="id-7"),
    ]
    two, five = by_cluster_size(rows, members, pictures, threshold=0.5).levels
    assert (two.low, five.low, five.own) == (2, 5, 1)
    with pytest.raises(UsageError, match="none of 2 captions belongs to a picture"):
        by_cluster_size(rows, members)
    with pytest.raises(UnknownName, match="magnitude"):
        by_cluster_size(rows, members, pictures, detector="magnitud", threshold=1.0)


@given(st.lists(st.integers(1, 300), min_size=11, max_size=40, unique=True))
@settings(deadline=None, max_examples=30)
def test_many_sizes_are_grouped_by_powers_of_two(sizes):
    members = {str(s): Membership(i, s) for i, s in enumerate(sizes)}
    rows = [row for s in sizes for row in rows_of(str(s), float(s), [None])]
    levels = by_cluster_size(rows, members, threshold=50.0).levels
    assert sum(level.captions for level in levels) == len(sizes)
    for level in levels:
        inside = [s for s in sizes if level.low <= s <= level.high]
        assert level.captions == len(inside)
        assert level.high == 2 * level.low - 1
        assert level.above.k == sum(s > 50 for s in inside)
        assert level.above.interval.low <= level.above.interval.value <= level.above.interval.high


def test_clusters_need_no_torch():
    import subprocess
    import sys

    code = "import sys, mnemoscope.similarity.duplicates; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert search.FLAT == 100_000
