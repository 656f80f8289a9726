"""Reference sets on disk: the same search as in memory, whatever happens while they are built."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small_pictures import encoded, fill, smooth

from mnemoscope.audit.batch import Reference
from mnemoscope.errors import ModelFault, RunError, UnknownName, UsageError
from mnemoscope.records import once
from mnemoscope.records.schema import Nearest
from mnemoscope.similarity import index as indexing
from mnemoscope.similarity import search, storage
from mnemoscope.similarity.base import Descriptor, build
from mnemoscope.similarity.duplicates import find_clusters
from mnemoscope.similarity.index import ReferenceIndex
from mnemoscope.similarity.pixels import Pixels
from mnemoscope.similarity.reference import ReferenceSet
from mnemoscope.similarity.search import PLACES, Searcher, build_inverted, exact, has_faiss
from mnemoscope.similarity.storage import IndexFolder, IndexWriter, Ledger

needs_faiss = pytest.mark.skipif(not has_faiss(), reason="faiss is not installed (extra [index])")


def build_index(source, folder, descriptor="pixels", **more):
    """An index by thumbnails, whose bytes do not depend on how pictures are batched."""
    return ReferenceIndex.build(source, folder, descriptor, **more)


@pytest.fixture
def pictures(tmp_path):
    return fill(tmp_path / "pictures", 20)


def tensor(*seeds: int) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(smooth(s))).permute(2, 0, 1).float() / 255 for s in seeds])


def content(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "rows.jsonl").read_bytes(), (folder / "vectors.bin").read_bytes()


# Building and asking ------------------------------------------------------------------------------------------------------


def test_it_is_a_reference_set(pictures, tmp_path):
    index = build_index(pictures, tmp_path / "index", batch=7)
    assert isinstance(index, Reference)
    assert (index.name, len(index), index.threshold) == ("pixels-16", 20, None)
    files = sorted(pictures.rglob("*.png"), key=lambda p: p.relative_to(pictures).as_posix())
    names = [p.relative_to(pictures).as_posix() for p in files]
    seeds = [int(p.stem) for p in files]
    plain = ReferenceSet.of(names, tensor(*seeds), Pixels())
    noise = 0.05 * torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    asked = (tensor(*range(20)) + noise).clamp(0, 1)
    for here, there in zip(index.nearest(asked), plain.nearest(asked), strict=True):
        assert here.reference == there.reference
        assert here.similarity == pytest.approx(there.similarity, abs=2e-6)
        assert here.copy_found is None
        Nearest.model_validate(here, from_attributes=True)
    again = ReferenceIndex(tmp_path / "index")
    assert again.nearest(asked[:2]) == index.nearest(asked[:2])
    assert again.descriptor.identity() == Pixels().identity()


def test_queries_give_the_k_nearest_in_order(pictures, tmp_path):
    index = build_index(pictures, tmp_path / "index")
    (tmp_path / "bad.png").write_bytes(b"")
    answers = list(index.query([pictures / "004.png", tmp_path / "bad.png", pictures / "005.png"], 3))
    assert [a.matches[0].reference if a.matches else None for a in answers] == ["004.png", None, "005.png"]
    assert answers[1].reason.startswith("empty")
    for a in (answers[0], answers[2]):
        similarity = [m.similarity for m in a.matches]
        assert len(similarity) == 3
        assert similarity == sorted(similarity, reverse=True)
        assert similarity[0] == pytest.approx(1, abs=1e-5)
    assert [a.matches for a in index.query(tmp_path / "bad.png")] == [[]]
    with pytest.raises(UsageError, match="k is 0, and must be a whole number from 1"):
        next(index.query(pictures, 0))


def test_calibration_is_of_the_whole_search_and_ends_when_pictures_are_added(pictures, tmp_path):
    index = build_index(pictures, tmp_path / "index")
    different = tensor(*range(1000, 1120))
    threshold = index.calibrate(different, fmr=0.05)
    assert sum(m.copy_found for m in index.nearest(different)) <= 6
    assert all(m.copy_found and m.threshold == threshold for m in index.nearest(tensor(1, 2, 3)))
    stored = ReferenceIndex(tmp_path / "index")
    assert stored.threshold == threshold
    assert stored.files.manifest.calibration.model_dump() == {
        "fmr": 0.05,
        "different": 120,
        "references": 20,
        "source": "",
    }
    with pytest.raises(UsageError, match="give at least 99"):
        index.calibrate(different[:50], fmr=0.01)
    # From files the same threshold comes out.
    others = fill(tmp_path / "others", 120, first=1000)
    assert index.calibrate(others, fmr=0.05) == pytest.approx(threshold, abs=1e-5)
    # Nothing new: it stays. Something new: a larger set finds more that is similar.
    assert build_index(pictures, tmp_path / "index").threshold is not None
    fill(pictures, 1, first=50)
    grown = build_index(pictures, tmp_path / "index")
    assert (len(grown), grown.threshold) == (21, None)
    assert "calibrate again" in grown.files.manifest.notes[0]


def test_reference_pictures_are_shown_as_long_as_they_are_what_they_were(pictures, tmp_path):
    index = build_index(pictures, tmp_path / "index", prefix="mine/")
    name = index.nearest(tensor(4))[0].reference
    assert name == "mine/004.png"
    assert torch.equal(index.image(name), tensor(4)[0])
    assert torch.equal(ReferenceIndex(tmp_path / "index").image("mine/005.png"), tensor(5)[0])
    (pictures / "004.png").write_bytes(encoded(smooth(99)))
    (pictures / "005.png").unlink()
    assert index.image("mine/004.png") is None
    assert index.image("mine/005.png") is None
    shutil.rmtree(pictures)
    assert ReferenceIndex(tmp_path / "index").image("mine/007.png") is None
    with pytest.raises(UsageError, match="has no picture 'nobody'"):
        index.image("nobody")


@pytest.mark.parametrize("moment", ["before the lock", "between batches", "before the end"])
def test_an_index_that_is_deleted_while_it_is_built_is_said(pictures, tmp_path, monkeypatch, moment):
    folder = tmp_path / "index"
    owner, name = {
        "before the lock": (storage.IndexWriter, "__enter__"),
        "between batches": (storage.IndexWriter, "append"),
        "before the end": (storage.IndexFolder, "update"),
    }[moment]
    ordinary = getattr(owner, name)

    def delete_first(*args: object, **more: object) -> object:
        shutil.rmtree(folder, ignore_errors=True)
        return ordinary(*args, **more)

    monkeypatch.setattr(owner, name, delete_first)
    with pytest.raises(RunError, match="was deleted or emptied while this command wrote to it"):
        build_index(pictures, folder)
    assert not folder.exists()


def test_bad_pictures_are_counted_by_reason(pictures, tmp_path):
    (pictures / "zero.png").write_bytes(b"")
    (pictures / "junk.png").write_bytes(b"junk")
    (pictures / "cut.png").write_bytes((pictures / "001.png").read_bytes()[:-60])
    (pictures / "gone.png").symlink_to(tmp_path / "nothing")
    (pictures / "tiny.png").write_bytes(encoded(smooth(0, 8)))
    (pictures / "gray.png").write_bytes(encoded(smooth(70).convert("L")))
    index = build_index(pictures, tmp_path / "index")
    assert len(index) == 21
    assert index.files.manifest.skipped == {"damaged": 1, "empty": 1, "link": 1, "not described": 1, "unknown": 1}
    rows = {row.id: row for row in index.files.rows()}
    assert rows["gray.png"].note == "grayscale"
    assert rows["tiny.png"].error == "not described: pixels-16 needs pictures of at least 16 px; got (8, 8)."
    assert rows["tiny.png"].vector is None
    # Again: nothing is new, and no file changes.
    before = content(tmp_path / "index")
    build_index(pictures, tmp_path / "index")
    assert content(tmp_path / "index") == before
    # What could not be read, or was not yet whole, is tried again.
    (pictures / "gone.png").unlink()
    (pictures / "gone.png").write_bytes(encoded(smooth(71)))
    (pictures / "zero.png").write_bytes(encoded(smooth(72)))
    index = build_index(pictures, tmp_path / "index")
    assert len(index) == 23
    assert index.files.manifest.skipped == {"damaged": 1, "not described": 1, "unknown": 1}


def test_changed_and_repeated_pictures_are_named(pictures, tmp_path):
    build_index(pictures, tmp_path / "index")
    (pictures / "004.png").write_bytes(encoded(smooth(4, 64)))
    index = build_index(pictures, tmp_path / "index")
    assert len(index) == 20
    # Nothing was appended, so the manifest stands; with the next picture it says so.
    fill(pictures, 1, first=40)
    index = build_index(pictures, tmp_path / "index")
    assert (
        "1 files changed since they were indexed and were not indexed again (first: 004.png)"
        in index.files.manifest.notes[0]
    )
    twice = build_index([pictures / "001.png"] * 2, tmp_path / "twice")
    assert len(twice) == 1
    assert "1 pictures have the id of an earlier one" in twice.files.manifest.notes[0]


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 12), st.sampled_from([1, 3, 64]))
def test_two_parts_are_one_whole(tmp_path_factory, first, batch):
    folder = tmp_path_factory.mktemp("parts")
    paths = sorted(fill(folder / "p", 12).rglob("*.png"))
    build_index(paths, folder / "whole")
    if first:
        build_index(paths[:first], folder / "parts", batch=batch)
    index = build_index(paths, folder / "parts", batch=batch)
    (rows, vectors), (more_rows, more_vectors) = content(folder / "whole"), content(folder / "parts")
    assert rows == more_rows
    assert np.allclose(np.frombuffer(vectors, "<f4"), np.frombuffer(more_vectors, "<f4"), atol=1e-6)
    assert index.files.manifest.hashes["rows.jsonl"] == IndexFolder(folder / "whole").manifest.hashes["rows.jsonl"]


def test_half_precision_takes_half_of_the_disk_and_moves_little(pictures, tmp_path):
    full = build_index(pictures, tmp_path / "full")
    half = build_index(pictures, tmp_path / "half", dtype="float16")
    assert 2 * len(content(tmp_path / "half")[1]) == len(content(tmp_path / "full")[1])
    for a, b in zip(full.nearest(tensor(3, 30)), half.nearest(tensor(3, 30)), strict=True):
        assert (a.reference, a.similarity) == (b.reference, pytest.approx(b.similarity, abs=1e-3))
    with pytest.raises(UsageError, match="stores float16, not float32"):
        build_index(pictures, tmp_path / "half", dtype="float32")


def test_prepared_and_given_pictures_are_described_alike():
    pixels, large = Pixels(), smooth(3, 1200)
    given_ = torch.from_numpy(np.array(large)).permute(2, 0, 1)[None].float() / 255
    assert torch.allclose(pixels(pixels.prepare(large)[None]), pixels(given_), atol=2e-3)
    small = smooth(3, 50)
    given_ = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() / 255
    assert torch.allclose(pixels(pixels.prepare(small)[None]), pixels(given_), atol=1e-6)


# Whose index --------------------------------------------------------------------------------------------------------------


def test_another_descriptor_is_refused_by_name(pictures, tmp_path):
    build_index(pictures, tmp_path / "index", options={"side": 8})
    assert ReferenceIndex(tmp_path / "index").name == "pixels-8"
    for attempt in (
        lambda: ReferenceIndex(tmp_path / "index", Pixels()),
        lambda: build_index(pictures, tmp_path / "index", Pixels()),
    ):
        with pytest.raises(UsageError, match=r"made with another descriptor \(identity.*was .*8.* now .*16"):
            attempt()
    with pytest.raises(UnknownName, match="Did you mean 'pixels'"):
        build_index(pictures, tmp_path / "other", "pixel")
    with pytest.raises(UnknownName, match="no option of descriptor pixels named 'size'"):
        build("pixels", {"size": 8})


def test_a_descriptor_that_was_handed_in_must_be_handed_in_again(pictures, tmp_path):
    build_index(pictures, tmp_path / "index", Pixels(side=8))
    with pytest.raises(UsageError, match="hand in the same one"):
        ReferenceIndex(tmp_path / "index")
    assert len(ReferenceIndex(tmp_path / "index", Pixels(side=8))) == 20


def test_a_second_source_needs_a_prefix(pictures, tmp_path):
    build_index(pictures, tmp_path / "index")
    other = fill(tmp_path / "other", 3, first=100)
    with pytest.raises(UsageError, match="give its pictures a prefix of their own"):
        build_index(other, tmp_path / "index")
    index = build_index(other, tmp_path / "index", prefix="other/")
    assert len(index) == 23
    assert index.nearest(tensor(101))[0].reference == "other/101.png"
    assert torch.equal(index.image("other/101.png"), tensor(101)[0])
    assert [s.get("prefix") for s in index.files.manifest.sources] == [None, "other/"]


def test_foreign_and_damaged_folders_are_refused(pictures, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(RunError, match=r"holds 'thesis\.txt' and no index"):
        build_index(pictures, tmp_path / "full")
    with pytest.raises(RunError, match="holds no index"):
        ReferenceIndex(tmp_path / "nowhere")
    build_index(pictures, tmp_path / "index")
    manifest = tmp_path / "index" / "manifest.json"
    good = json.loads(manifest.read_bytes())
    for change, sentence in (
        ({"format": 2}, "update mnemoscope"),
        ({"dtype": "int8"}, "is no index"),
        ({"colour": 1}, "is no index"),
    ):
        manifest.write_text(json.dumps(good | change))
        with pytest.raises(RunError, match=sentence):
            IndexFolder(tmp_path / "index")
    manifest.write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        IndexFolder(tmp_path / "index")


def test_one_writer_at_a_time(pictures, tmp_path):
    index = build_index(pictures, tmp_path / "index")
    with IndexWriter(index.files), pytest.raises(RunError, match="being written by another process"):
        build_index(pictures, tmp_path / "index")
    build_index(pictures, tmp_path / "index")


def test_an_empty_index_says_so(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_bytes(b"")
    index = build_index(tmp_path / "p", tmp_path / "index")
    assert len(index) == 0
    with pytest.raises(UsageError, match="holds no picture with a descriptor"):
        index.nearest(tensor(0))


# Somebody else's index ----------------------------------------------------------------------------------------------------


def edited(folder: Path, **manifest) -> dict:
    """Change an index by hand, as a stranger may before sending it."""
    path = folder / "manifest.json"
    facts = json.loads(path.read_bytes()) | manifest
    path.write_text(json.dumps(facts))
    return facts


def edit_rows(folder: Path, change) -> None:
    """Change rows, and the manifest so that it fits them."""
    rows = [change(json.loads(line)) for line in (folder / "rows.jsonl").read_bytes().splitlines()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seal(folder)


def seal(folder: Path) -> None:
    """State the hashes of the files as they are now."""
    names = ("rows.jsonl", "vectors.bin")
    edited(folder, hashes={name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names})


def unseal(folder: Path) -> None:
    """Leave out what the manifest of an earlier version lacks."""
    edited(folder, hashes={}, rows=None, vectors=None)


def unfinish(folder: Path) -> None:
    """The manifest as it is while an index is built, and after a kill."""
    edited(folder, hashes={}, status="building", ended=None)


def test_an_index_from_elsewhere_answers_and_shows_no_pictures_until_their_place_is_named(pictures, tmp_path):
    mine = build_index(pictures, tmp_path / "index", prefix="mine/")
    assert mine.files.cautions() == []
    sources = mine.files.manifest.sources
    for source in (
        {k: v for k, v in sources[0].items() if k != "mark"},
        sources[0] | {"mark": "0" * 64},
        sources[0] | {"path": str(tmp_path)},
    ):
        edited(tmp_path / "index", sources=[source])
        index = ReferenceIndex(tmp_path / "index")
        match = index.nearest(tensor(4))[0]
        assert (match.reference, match.layout, index.image("mine/004.png")) == ("mine/004.png", None, None)
        assert "mnemoscope index locate" in index.files.cautions()[0]
    others = fill(tmp_path / "others", 3, first=100)
    with pytest.raises(UsageError, match="holds none of the first 16 pictures"):
        index.files.locate(others, "mine/")
    with pytest.raises(UnknownName, match="prefix"):
        index.files.locate(pictures)
    moved = pictures.rename(tmp_path / "moved")
    index.files.locate(moved, "mine/")
    index = ReferenceIndex(tmp_path / "index")
    assert torch.equal(index.image("mine/004.png"), tensor(4)[0])
    assert index.files.cautions() == []


def test_building_an_index_from_elsewhere_again_confirms_what_was_named(pictures, tmp_path):
    build_index(pictures, tmp_path / "index")
    edited(tmp_path / "index", sources=[{"kind": "folder", "path": str(pictures.resolve())}])
    assert ReferenceIndex(tmp_path / "index").image("004.png") is None
    build_index(pictures, tmp_path / "index")
    assert ReferenceIndex(tmp_path / "index").image("004.png") is not None


@pytest.mark.parametrize("listed", [True, False], ids=["files", "folder"])
def test_rows_open_only_what_was_named(pictures, tmp_path, listed):
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(smooth(77)))
    index = build_index([pictures / "001.png", pictures / "002.png"] if listed else pictures, tmp_path / "index")
    names = [row.id for row in index.files.rows()]
    assert index.image(names[0]) is not None
    sha256 = hashlib.sha256(secret.read_bytes()).hexdigest()
    for at in (str(secret), "../secret.png"):
        edit_rows(tmp_path / "index", lambda row, at=at: row | {"at": at, "sha256": sha256})
        assert ReferenceIndex(tmp_path / "index").image(names[0]) is None
    for source in (7, -1):
        edit_rows(tmp_path / "index", lambda row, source=source: row | {"source": source})
        assert ReferenceIndex(tmp_path / "index").image(names[0]) is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"vector": -1}, "names neither a vector nor an error"),
        ({"vector": None}, "names neither a vector nor an error"),
        ({"vector": "0"}, "names neither a vector nor an error"),
        ({"vector": 10_000_000_000}, "holds 20 of 10000000001 descriptors"),
        ({"color": "red"}, r"line 1 of .*rows\.jsonl is damaged \(it has an unknown key 'color'\)"),
        ({"error": "empty"}, "names both a vector and an error"),
        ({"status": "error", "error": "empty"}, "names both a vector and an error"),
        ({"vector": 2}, "has two rows for one vector, the second for '004.png'"),
        ({"sha256": "../.."}, "holds a damaged row"),
    ],
)
def test_rows_that_do_not_fit_are_one_sentence(pictures, tmp_path, change, sentence):
    build_index(pictures, tmp_path / "index")
    edit_rows(tmp_path / "index", lambda row: row | change if row["id"] == "001.png" else row)
    with pytest.raises(RunError, match=sentence):
        ReferenceIndex(tmp_path / "index").nearest(tensor(1))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"dim": 0}, "is no index"), ({"dim": 64}, "of length 64"), ({"dtype": "float16"}, "in float16")],
)
def test_vectors_that_do_not_fit_the_manifest_are_one_sentence(pictures, tmp_path, change, sentence):
    build_index(pictures, tmp_path / "index")
    edited(tmp_path / "index", **change)
    with pytest.raises(RunError, match=sentence):
        ReferenceIndex(tmp_path / "index")


# What the manifest says and what the files hold -----------------------------------------------------------------------------


def rewrite(name: str, change):
    """A change of the bytes of one file."""

    def apply(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return apply


def of_rows(change):
    return rewrite("rows.jsonl", lambda data: b"".join(change(data.splitlines(keepends=True))))


def of_vectors(change):
    return rewrite(
        "vectors.bin", lambda data: change(np.frombuffer(data, "<f4").reshape(20, -1)).astype("<f4").tobytes()
    )


ROWS_GONE = {
    "first row": of_rows(lambda lines: lines[1:]),
    "row in the middle": of_rows(lambda lines: [*lines[:7], *lines[8:]]),
    "last row": of_rows(lambda lines: lines[:-1]),
    "half of the last row": rewrite("rows.jsonl", lambda data: data[:-40]),
    "all rows": rewrite("rows.jsonl", lambda data: b""),
}
OTHER_ROWS = {
    "rows in another order": of_rows(lambda lines: lines[::-1]),
    "names swapped": rewrite(
        "rows.jsonl",
        lambda data: data.replace(b"001.png", b"x").replace(b"002.png", b"001.png").replace(b"x", b"002.png"),
    ),
    "a row twice": of_rows(lambda lines: [*lines, b'{"id": "001.png", "status": "error", "error": "empty"}\n']),
    "bytes after the rows": rewrite("rows.jsonl", lambda data: data + b"x"),
}
OTHER_VECTORS = {
    "not numbers": of_vectors(lambda v: v * np.nan),
    "huge": of_vectors(lambda v: v * 0 + 1e30),
    "in another order": of_vectors(lambda v: v[::-1]),
    "zero": of_vectors(lambda v: v * 0),
    "half as long": of_vectors(lambda v: v / 2),
    "one bit": rewrite("vectors.bin", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "one more": of_vectors(lambda v: np.concatenate([v, v[:1]])),
    "bytes after them": rewrite("vectors.bin", lambda data: data + b"x" * 5000),
    "cut off": rewrite("vectors.bin", lambda data: data[:-4]),
    "none": rewrite("vectors.bin", lambda data: b""),
    "no file": lambda folder: (folder / "vectors.bin").unlink(),
}
LONG_VECTORS = {
    "not numbers": of_vectors(lambda v: np.where(np.arange(20)[:, None] == 3, np.nan, v)),
    "infinite": of_vectors(lambda v: np.where(np.arange(20)[:, None] == 3, np.inf, v)),
    "huge": of_vectors(lambda v: np.where(np.arange(20)[:, None] == 3, 1e30, v)),
    "twice as long": of_vectors(lambda v: v * (1 + (np.arange(20) == 3))[:, None]),
    "a little longer": of_vectors(lambda v: v * (1 + 0.002 * (np.arange(20) == 3))[:, None]),
}


def refused(folder: Path, sentence: str) -> None:
    """Whatever asks the index gets the same sentence."""
    for attempt in (
        lambda: ReferenceIndex(folder).nearest(tensor(1)),
        lambda: find_clusters(IndexFolder(folder), 0.9),
        lambda: IndexFolder(folder).cautions(),
    ):
        with pytest.raises(RunError, match=sentence) as caught:
            attempt()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("finish", [lambda folder: None, unseal], ids=["hashes", "earlier version"])
@pytest.mark.parametrize("change", ROWS_GONE.values(), ids=ROWS_GONE)
def test_rows_that_are_gone_are_noticed_and_described_again(pictures, tmp_path, change, finish):
    before = build_index(pictures, tmp_path / "index")
    before.calibrate(tensor(*range(1000, 1040)), fmr=0.1)
    finish(tmp_path / "index")
    change(tmp_path / "index")
    refused(tmp_path / "index", r"rows\.jsonl holds \d+ of 20 rows.*repeat the command that builds the index")
    after = build_index(pictures, tmp_path / "index")
    assert len(after) == 20
    assert [Path(m.reference).stem for m in after.nearest(tensor(*range(20)))] == [f"{i:03}" for i in range(20)]
    assert after.threshold == before.threshold
    assert ReferenceIndex(tmp_path / "index").files.manifest.has_hashes


@pytest.mark.parametrize("change", [*OTHER_ROWS.values(), *OTHER_VECTORS.values()], ids=[*OTHER_ROWS, *OTHER_VECTORS])
def test_files_of_a_finished_index_are_those_that_the_build_left(pictures, tmp_path, change):
    build_index(pictures, tmp_path / "index")
    change(tmp_path / "index")
    sentence = "restore it, or build the index anew in another folder"
    refused(tmp_path / "index", sentence)
    manifest = (tmp_path / "index/manifest.json").read_bytes()
    with pytest.raises(RunError, match=sentence):  # or the next build would vouch for it
        build_index(fill(pictures, 1, first=50), tmp_path / "index")
    assert (tmp_path / "index/manifest.json").read_bytes() == manifest


@pytest.mark.parametrize("finish", [seal, unseal, unfinish], ids=["sealed", "earlier version", "unfinished"])
@pytest.mark.parametrize("change", LONG_VECTORS.values(), ids=LONG_VECTORS)
def test_vectors_that_are_no_descriptors_are_refused_whatever_the_manifest_says(pictures, tmp_path, change, finish):
    build_index(pictures, tmp_path / "index")
    change(tmp_path / "index")
    finish(tmp_path / "index")
    refused(tmp_path / "index", r"vectors\.bin is damaged \(vector 3 has the length [\w.+]+, and a descriptor has 1\)")


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 21},
        {"rows": 3},
        {"vectors": 21},
        {"vectors": 0},
        {"pictures": 19},
        {"rows": -1},
        {"vectors": "many"},
        {"dim": "long"},
        {"dim": -1},
        {"dim": 10**30},
        {"dim": None},
        {"format": 0},
        {"format": "new"},
        {"kind": "run"},
        {"status": "ready"},
        {"dtype": "<f4"},
        {"dtype": None},
        {"hashes": {"rows.jsonl": "0" * 64}},
        {"hashes": {"vectors.bin": 7}},
        {"hashes": ["rows.jsonl"]},
        {"threshold": 7.0},
        {"layout_threshold": -1e9},
        {"descriptor": "pixels"},
        {"sources": {}},
        {"skipped": [1]},
    ],
    ids=json.dumps,
)
def test_a_manifest_that_does_not_fit_is_one_sentence(pictures, tmp_path, change):
    build_index(pictures, tmp_path / "index")
    edited(tmp_path / "index", **change)
    refused(tmp_path / "index", "restore it, or")


def test_an_index_of_an_earlier_version_answers_and_gets_its_hashes(pictures, tmp_path):
    build_index(pictures, tmp_path / "index")
    of_vectors(lambda v: v * (np.arange(20) != 3)[:, None])(tmp_path / "index")  # a plain picture
    unseal(tmp_path / "index")
    index = ReferenceIndex(tmp_path / "index")
    assert index.nearest(tensor(4))[0].reference == "004.png"
    (caution,) = index.files.cautions()
    assert "records no hash of its rows and vectors" in caution
    assert "1 vectors are shorter than 1" in caution
    assert index.files.checks.endswith("no hash is recorded")
    files = build_index(pictures, tmp_path / "index").files
    assert files.cautions() == []
    assert (files.manifest.rows, files.manifest.vectors, len(files.manifest.hashes)) == (20, 20, 2)
    OTHER_VECTORS["one bit"](tmp_path / "index")
    refused(tmp_path / "index", "SHA-256 differs")


def test_an_index_that_is_not_finished_says_so(pictures, tmp_path):
    build_index(pictures, tmp_path / "index")
    unfinish(tmp_path / "index")
    (caution,) = ReferenceIndex(tmp_path / "index").files.cautions()
    assert "is not finished: it answers from 20 pictures" in caution


@pytest.mark.parametrize("read", [False, True], ids=["opened", "rows read"])
@pytest.mark.parametrize("ended", [False, True], ids=["still built", "built"])
def test_an_index_may_grow_while_it_is_read(pictures, tmp_path, read, ended):
    build_index(pictures, tmp_path / "index")
    files = IndexFolder(tmp_path / "index")
    if read:
        assert len(files) == 20
    build_index(fill(pictures, 3, first=40), tmp_path / "index")
    if not ended:
        unfinish(tmp_path / "index")
    assert files.vectors.shape == (23, 768)
    assert len(files) == 23


def test_rows_that_were_replaced_while_an_index_is_open_are_not_mistaken(pictures, tmp_path):
    index = build_index(pictures, tmp_path / "index")
    ROWS_GONE["row in the middle"](tmp_path / "index")
    with pytest.raises(RunError, match=r"has changed since it was opened|holds a damaged row"):
        index.nearest(tensor(*range(20)))


def test_a_file_that_stands_still_is_looked_at_once(pictures, tmp_path, monkeypatch):
    build_index(pictures, tmp_path / "index")
    looked: list[str] = []
    hash_file, examine = storage.hash_file, storage.examine
    monkeypatch.setattr(storage, "hash_file", lambda path: looked.append(path.name) or hash_file(path))
    monkeypatch.setattr(storage, "examine", lambda vectors: looked.append("lengths") or examine(vectors))
    monkeypatch.setattr(once, "SETTLED", -1.0)
    monkeypatch.setattr(once, "LARGE", 0)
    first, second = (ReferenceIndex(tmp_path / "index").nearest(tensor(4)) for _ in range(2))
    assert first == second
    assert looked == ["rows.jsonl", "vectors.bin", "lengths"]
    OTHER_VECTORS["one bit"](tmp_path / "index")
    refused(tmp_path / "index", "SHA-256 differs")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_no_similarity_is_above_1(pictures, tmp_path, dtype):
    build_index(pictures, tmp_path / "index", dtype=dtype)
    files = IndexFolder(tmp_path / "index")
    longest = (files.vectors.astype(np.float32) * np.float32(1.0009)).astype(files.dtype)
    (tmp_path / "index/vectors.bin").write_bytes(longest.tobytes())
    seal(tmp_path / "index")
    matches = ReferenceIndex(tmp_path / "index").nearest(tensor(*range(20)))
    assert max(m.similarity for m in matches) == 1
    with pytest.raises(ModelFault, match="longer than 1"):
        ReferenceIndex(tmp_path / "index", Odd("long")).nearest(tensor(1))


@pytest.mark.parametrize("name", ["manifest.json", "rows.jsonl", "vectors.bin"])
@pytest.mark.parametrize("pipe", [True, False], ids=["pipe", "link"])
def test_files_of_an_index_lie_in_it(pictures, tmp_path, name, pipe):
    build_index(pictures, tmp_path / "index")
    path, elsewhere = tmp_path / "index" / name, tmp_path / "elsewhere"
    path.rename(elsewhere)
    before = elsewhere.read_bytes()
    if pipe:
        os.mkfifo(path)
    else:
        path.symlink_to(elsewhere)
    for attempt in (
        lambda: ReferenceIndex(tmp_path / "index"),
        lambda: build_index(fill(pictures, 1, first=50), tmp_path / "index"),
    ):
        with pytest.raises(RunError):
            attempt()
    assert elsewhere.read_bytes() == before, "nothing is written through the link"


# What happens to a build --------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import mnemoscope.similarity.index as indexing
from mnemoscope.similarity.pixels import Pixels

class Doomed(Pixels):
    calls = 0
    def __call__(self, images):
        Doomed.calls += 1
        if Doomed.calls == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(images)

indexing.COMMIT_EVERY = 0
indexing.ReferenceIndex.build(sys.argv[1], sys.argv[2], Doomed(), batch=4)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system knows no kill -9")
def test_after_kill_9_the_same_call_gives_the_same_index(pictures, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, pictures, tmp_path / "killed"])
    assert done.returncode == -signal.SIGKILL
    half = IndexFolder(tmp_path / "killed")
    assert half.manifest.status == "building"
    assert len(half) == 12, "three batches of four were on the disk"
    build_index(pictures, tmp_path / "killed", Pixels())
    build_index(pictures, tmp_path / "whole", Pixels())
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    one, other = (IndexFolder(tmp_path / name).manifest for name in ("killed", "whole"))
    assert one.hashes == other.hashes
    assert one.status == "done"


@given(cut=st.integers(1, 400), torn=st.sampled_from([b"", b'{"id": "x', b"\x00\x00"]))
@settings(max_examples=10, deadline=None)
def test_torn_ends_are_cut_off(tmp_path_factory, cut, torn):
    folder = tmp_path_factory.mktemp("torn")
    source = fill(folder / "p", 6)
    build_index(source, folder / "index")
    whole = content(folder / "index")
    rows = folder / "index" / "rows.jsonl"
    rows.write_bytes(whole[0][:-cut] + torn)
    (folder / "index" / "vectors.bin").write_bytes(whole[1] + b"half a vector")
    unfinish(folder / "index")
    assert len(IndexFolder(folder / "index")) <= 6, "a reader sees what is whole"
    index = build_index(source, folder / "index")
    assert content(folder / "index") == whole
    assert index.nearest(tensor(2))[0].reference == "002.png"


def test_damage_in_the_middle_is_named(pictures, tmp_path):
    build_index(pictures, tmp_path / "index")
    rows = tmp_path / "index" / "rows.jsonl"
    lines = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(b"".join([*lines[:3], b"{\n", *lines[4:]]))
    with pytest.raises(RunError, match=r"line 4 of .*rows\.jsonl is damaged"):
        ReferenceIndex(tmp_path / "index")
    # As the message says: without that line, only its picture is described again.
    rows.write_bytes(b"".join([*lines[:3], *lines[4:]]))
    with pytest.raises(RunError, match=r"holds 19 of 20 rows.*repeat the command that builds the index"):
        ReferenceIndex(tmp_path / "index")
    lost = json.loads(lines[3])["id"]
    index = build_index(pictures, tmp_path / "index")
    assert len(index) == 20
    assert len(index.files.vectors) == 21
    assert "1 rows of the last build were gone" in index.files.manifest.notes[0]
    (match,) = index.nearest(tensor(int(Path(lost).stem)))
    assert match.reference == lost
    assert match.similarity == pytest.approx(1, abs=1e-5)


def test_missing_vectors_are_named(pictures, tmp_path):
    build_index(pictures, tmp_path / "index")
    with (tmp_path / "index" / "vectors.bin").open("r+b") as file:
        file.truncate(5 * 768 * 4 + 1)
    for attempt in (
        lambda: ReferenceIndex(tmp_path / "index"),
        lambda: build_index(pictures, tmp_path / "index"),
    ):
        with pytest.raises(RunError, match=r"vectors\.bin holds 5 of 20 descriptors"):
            attempt()


@pytest.mark.parametrize("room", [0, 100, 13_000, 40_000])
def test_a_full_disk_keeps_what_was_written(pictures, tmp_path, monkeypatch, room):
    left = room

    def full(file: int, data: bytes) -> None:
        nonlocal left
        os.write(file, data[: max(left, 0)])
        left -= len(data)
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(indexing, "COMMIT_EVERY", 0)
    monkeypatch.setattr(storage, "write_all", full)
    with pytest.raises(RunError, match="is full; everything written so far is kept"):
        build_index(pictures, tmp_path / "index", batch=4)
    assert len(IndexFolder(tmp_path / "index")) == 4 * (room // 13_000)
    monkeypatch.undo()
    build_index(pictures, tmp_path / "index")
    build_index(pictures, tmp_path / "whole")
    assert content(tmp_path / "index") == content(tmp_path / "whole")


class Odd(Pixels):
    """A descriptor that misbehaves as it is told."""

    def __init__(self, fault: str, side: int = 16):
        super().__init__(side)
        self.fault = fault

    def prepare(self, picture):
        shown = super().prepare(picture)
        if self.fault == "proportions":  # of as many shapes as there are rests
            return shown.repeat_interleave(1 + np.asarray(picture)[0, 0, 0] % 3, dim=1)
        return shown

    def __call__(self, images):
        found = super().__call__(images)
        if self.fault == "nan":
            found[::2] = torch.nan
        if self.fault == "rows":
            return found[:-1]
        if self.fault == "stop":
            raise KeyboardInterrupt
        return 2 * found if self.fault == "long" else found


def test_a_descriptor_may_keep_proportions(pictures, tmp_path):
    mixed = build_index(pictures, tmp_path / "mixed", Odd("proportions"))
    plain = build_index(pictures, tmp_path / "plain", Pixels())
    assert len({tuple(Odd("proportions").prepare(smooth(i)).shape) for i in range(20)}) > 1
    assert np.allclose(mixed.files.vectors, plain.files.vectors, atol=1e-6)


@pytest.mark.parametrize(("fault", "sentence"), [("rows", "gives shape"), ("long", "longer than 1")])
def test_a_descriptor_that_misbehaves_is_named(pictures, tmp_path, fault, sentence):
    with pytest.raises(ModelFault, match=f"pixels-16.*{sentence}"):
        build_index(pictures, tmp_path / "index", Odd(fault))


def test_vectors_that_are_not_finite_are_rows_with_a_reason(pictures, tmp_path):
    index = build_index(pictures, tmp_path / "index", Odd("nan"))
    assert (len(index), index.files.skipped()) == (10, {"not described": 10})
    assert np.isfinite(index.files.vectors).all()
    with pytest.raises(ModelFault, match="gives NaN"):
        index.nearest(tensor(1))


def test_ctrl_c_says_what_is_saved(pictures, tmp_path):
    with pytest.raises(KeyboardInterrupt, match="stopped; 0 pictures are indexed; the same command continues"):
        build_index(pictures, tmp_path / "index", Odd("stop"))
    assert len(build_index(pictures, tmp_path / "index", Pixels())) == 20


def test_progress_counts_what_is_known(pictures, tmp_path):
    seen = []
    build_index(pictures, tmp_path / "index", batch=8, progress=seen.append)
    assert [p.done for p in seen] == [8, 16, 20]
    assert {p.asked for p in seen} == {20}
    fill(pictures, 2, first=60)
    seen.clear()
    build_index(pictures, tmp_path / "index", progress=seen.append)
    assert seen[-1].done == seen[-1].asked == 22


def test_memory_of_a_build_does_not_grow_with_the_set(tmp_path):
    class Wide(Pixels):
        """Vectors as long as pictures are large: holding them would be seen."""

        def __init__(self):
            super().__init__(side=64)

    source = tmp_path / "p"
    source.mkdir()
    data = [encoded(smooth(i, 64)) for i in range(8)]

    def peak(n: int) -> int:
        for i in range(n):
            (source / f"{i:04}.png").write_bytes(data[i % 8])
        tracemalloc.start()
        build_index(source, tmp_path / f"index-{n}", Wide(), workers=1, batch=16)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    saved, indexing.COMMIT_EVERY = indexing.COMMIT_EVERY, 0.0
    try:
        peak(48)
        assert peak(400) < peak(96) + 100 * 64 * 64 * 3 * 4, "304 more vectors of 49 kB"
    finally:
        indexing.COMMIT_EVERY = saved


# The ledger ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.text(max_size=2), st.none() | st.integers(0, 9), st.integers(0, 2)), max_size=60))
def test_the_ledger_is_a_dictionary(entries):
    ledger, plain = Ledger(), {}
    ledger.MERGE = 5
    for name, size, state in entries:
        ledger[name] = size, state
        plain[name] = size, state
    assert {name: ledger.get(name) for name in plain} == plain
    assert ledger.get("never entered") is None


# Search -------------------------------------------------------------------------------------------------------------------


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)).astype(np.float32)


def by_hand(vectors, queries, k, alive):
    """Everything against everything, in float64."""
    similarity = np.round(queries.astype(np.float64) @ vectors.astype(np.float64).T, PLACES)
    order = [sorted(np.flatnonzero(alive), key=lambda i: (-row[i], i))[:k] for row in similarity]
    return [[(i, row[i]) for i in chosen] for row, chosen in zip(similarity, order, strict=True)]


values = st.integers(-3, 3).map(float)


@given(
    vectors=arrays(np.float32, st.tuples(st.integers(1, 40), st.just(3)), elements=values),
    queries=arrays(np.float32, st.tuples(st.integers(1, 5), st.just(3)), elements=values),
    k=st.integers(1, 9),
    cells=st.sampled_from([1, 7, 100]),
    data=st.data(),
)
@settings(deadline=None)
def test_chunked_search_is_brute_force(vectors, queries, k, cells, data):
    """Few different values, so that ties abound: of equals the first must come first."""
    vectors, queries = unit(vectors), unit(queries)
    alive = np.array(data.draw(st.lists(st.booleans(), min_size=len(vectors), max_size=len(vectors))))
    kept, search.CELLS = search.CELLS, cells
    try:
        found = exact(vectors, queries, k, alive)
    finally:
        search.CELLS = kept
    for row, truth in enumerate(by_hand(vectors, queries, k, alive)):
        there = found.number[row] >= 0
        assert there.sum() == len(truth)
        assert np.allclose(found.similarity[row][there], [s for _, s in truth], atol=2e-6)
        # Products that round differently may swap neighbors; those that are clearly apart may not.
        for number, similarity in zip(found.number[row][there], found.similarity[row][there], strict=True):
            assert queries[row].astype(float) @ vectors[number] == pytest.approx(similarity, abs=6e-7)
            assert alive[number]
        assert found.number[row][0] == (truth[0][0] if truth else -1), "of equals the first"


def test_of_equal_pictures_the_first_counts():
    vectors = unit(np.random.default_rng(0).normal(size=(50, 8)))
    vectors[30] = vectors[10]
    vectors[40] = vectors[10]
    for use in (False, True) if has_faiss() else (False,):
        assert Searcher(vectors, use_faiss=use).top(vectors[[10]], 4).number[0, :3].tolist() == [10, 30, 40]


@needs_faiss
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_faiss_and_numpy_agree(dtype):
    rng = np.random.default_rng(1)
    vectors, queries = unit(rng.normal(size=(3000, 24))).astype(dtype), unit(rng.normal(size=(40, 24)))
    alive = rng.random(3000) > 0.02
    for mask in (None, alive):
        one = Searcher(vectors, mask, use_faiss=False).top(queries, 12)
        other = Searcher(vectors, mask, use_faiss=True).top(queries, 12)
        assert np.array_equal(one.number, other.number)
        assert np.array_equal(one.similarity, other.similarity)


def clustered(n: int, dim: int = 16) -> np.ndarray:
    """Pictures come in families; a quantizer trained on pure noise has nothing to learn."""
    rng = np.random.default_rng(2)
    return unit(rng.normal(size=(n // 10, dim))[rng.integers(n // 10, size=n)] + 0.3 * rng.normal(size=(n, dim)))


@needs_faiss
def test_an_inverted_file_finds_nearly_all_with_exact_similarities(tmp_path):
    vectors = clustered(6000)
    facts = build_inverted(vectors[:4000], tmp_path / "a.faiss")
    found, of = facts["recall"]
    assert of == 200
    assert found >= 180
    # Vectors that came later are compared one by one until the file is built again, which adds them.
    search_ = Searcher(vectors, inverted=tmp_path / "a.faiss", use_faiss=True)
    assert search_.kind == "inverted file, faiss"
    assert (search_.top(vectors[4000:4100], 1).number[:, 0] == np.arange(4000, 4100)).all()
    more = build_inverted(vectors, tmp_path / "b.faiss", tmp_path / "a.faiss")
    assert (more["lists"], more["pictures"]) == (facts["lists"], 6000)
    truth = exact(vectors, vectors[:100], 5)
    got = Searcher(vectors, inverted=tmp_path / "b.faiss", use_faiss=True).top(vectors[:100], 5)
    assert (got.number == truth.number).mean() > 0.9
    same = got.number == truth.number
    assert np.array_equal(got.similarity[same], truth.similarity[same])
    with pytest.raises(RunError, match="delete it, and the next build makes it again"):
        Searcher(vectors[:100], inverted=tmp_path / "b.faiss", use_faiss=True)


@needs_faiss
def test_a_large_set_gets_an_inverted_file(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "FLAT", 300)
    monkeypatch.setattr(search, "FLAT", 300)
    source = fill(tmp_path / "p", 320)
    index = build_index(source, tmp_path / "index", Pixels(side=4))
    assert index.files.manifest.search["kind"] == "IVF-PQ"
    assert index.files.manifest.search["pictures"] == 320
    plain = ReferenceIndex(tmp_path / "index", Pixels(side=4), use_faiss=False)
    mine, theirs = index.nearest(tensor(*range(50))), plain.nearest(tensor(*range(50)))
    assert sum(a == b for a, b in zip(mine, theirs, strict=True)) >= 48
    assert isinstance(Pixels(), Descriptor)


@needs_faiss
def test_an_inverted_file_is_used_only_where_this_user_built_it(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "FLAT", 300)
    monkeypatch.setattr(search, "FLAT", 300)
    folder, source = tmp_path / "index", fill(tmp_path / "p", 320)
    good = build_index(source, folder, Pixels(side=4)).files
    facts, data = good.manifest.search, good.inverted.read_bytes()
    assert (good.usable_inverted(), good.cautions()) == (good.inverted, [])
    assert facts["dim"] == good.manifest.dim
    assert facts["size"] == len(data)

    def opened() -> ReferenceIndex:
        index = ReferenceIndex(folder, Pixels(side=4))
        assert index.nearest(tensor(7))[0].reference == "007.png"
        return index

    assert opened()._search.kind == "inverted file, faiss"
    for search_, content in (
        (None, data),
        (facts | {"mark": None}, data),
        (facts | {"probed": 1}, data),
        (facts, data[:-1] + bytes([data[-1] ^ 1])),
        (facts, data + b"x"),
    ):
        edited(folder, search=search_)
        good.inverted.write_bytes(content)
        index = opened()
        assert index._search.kind == "exact, numpy"
        assert "is not used" in index.files.cautions()[0]
    # The next build makes it again, and does not go on from the file that it does not know.
    index = build_index(source, folder, Pixels(side=4))
    assert index._search.kind == "inverted file, faiss"
    assert index.files.cautions() == []
    # Below the size from which it pays, nobody opens it.
    monkeypatch.setattr(search, "FLAT", 400)
    index.files.inverted.write_bytes(b"junk")
    assert opened()._search.kind == "exact, faiss"


@needs_faiss
@pytest.mark.parametrize("kind", ["map", "twice", "disk", "metric", "dim", "junk"])
def test_of_faiss_only_inverted_files_of_ours_are_searched(tmp_path, kind):
    import faiss

    vectors = clustered(3000)
    build_inverted(vectors, tmp_path / "a.faiss")
    index = faiss.read_index(str(tmp_path / "a.faiss"))
    if kind == "map":
        index = faiss.IndexIDMap(faiss.IndexFlatIP(16))
        index.add_with_ids(vectors, np.full(3000, 5))
    if kind == "twice":
        index.add_with_ids(vectors[:1], np.array([7]))
    if kind == "disk":
        lists = faiss.OnDiskInvertedLists(index.nlist, index.code_size, str(tmp_path / "lists"))
        lists.merge_from_1(index.invlists)
        index.replace_invlists(lists)
    if kind == "metric":
        index.metric_type = faiss.METRIC_L2
    faiss.write_index(index, str(tmp_path / "b.faiss"))
    if kind == "junk":
        (tmp_path / "b.faiss").write_bytes(b"junk")
    asked = clustered(3000, 8) if kind == "dim" else np.concatenate([vectors, vectors])
    for attempt in (
        lambda: Searcher(asked, inverted=tmp_path / "b.faiss", use_faiss=True),
        lambda: build_inverted(asked, tmp_path / "c.faiss", tmp_path / "b.faiss"),
    ):
        with pytest.raises(RunError, match="delete it, and the next build makes it again"):
            attempt()


def test_an_audit_takes_an_index_for_its_reference_set(pictures, tmp_path, target_of):
    from mnemoscope.audit.config import AuditConfig
    from mnemoscope.audit.run import audit

    index = build_index(pictures, tmp_path / "index", Pixels(side=4))
    index.calibrate(tensor(*range(500, 700)), fmr=0.05)
    config = AuditConfig(model="tiny", prompts=["a", "b"], seeds=2, steps=2, images=True, out=str(tmp_path / "run"))
    run = audit(config, target=target_of("sd"), reference=index)
    rows = list(run.rows())
    assert [row.status for row in rows] == ["ok"] * 4
    for row in rows:
        assert row.nearest.descriptor == "pixels-4"
        assert row.nearest.threshold == index.threshold
        assert (pictures / row.nearest.reference).is_file()
        assert (run.folder / row.nearest.file).is_file(), "the reference picture is kept beside the generated one"
