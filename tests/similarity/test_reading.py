"""Sources of pictures: every kind of file, archive and table, and every way in which they are broken."""

import ast
import contextlib
import gc
import hashlib
import json
import os
import shutil
import struct
import tarfile
import threading
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_pictures import encoded, fill, png, smooth

import mnemoscope
from mnemoscope.errors import UnknownName, UsageError
from mnemoscope.similarity import reading
from mnemoscope.similarity.decoding import COLLECTED, KEPT, MAX_PIXELS, MAX_SCANS, decode
from mnemoscope.similarity.reading import CHUNK, Entry, open_source, picture_of, read, reopened


def keep(picture: Image.Image) -> Image.Image:
    return picture


def everything(source, **options):
    return list(read(open_source(source, **options), keep, workers=2))


# Decoding -----------------------------------------------------------------------------------------------------------------


def with_alpha(mode: str) -> Image.Image:
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    return image.quantize() if mode == "P" else image.convert(mode)


def animated(kind: str) -> bytes:
    frames = [smooth(i) for i in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)


@pytest.mark.parametrize(
    ("data", "note", "pixel"),
    [
        (encoded(Image.new("RGB", (8, 8), (10, 20, 30))), None, (10, 20, 30)),
        (encoded(Image.new("L", (8, 8), 77)), "grayscale", (77, 77, 77)),
        (encoded(Image.new("1", (8, 8), 1)), "black and white", (255, 255, 255)),
        (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), "CMYK", (255, 0, 0)),
        (encoded(Image.new("RGB", (8, 8), (1, 2, 3)).quantize()), "palette", (1, 2, 3)),
        (encoded(with_alpha("RGBA")), "transparency on white", (255, 255, 255)),
        (encoded(with_alpha("LA")), "transparency on white", (255, 255, 255)),
        (encoded(with_alpha("P")), "transparency on white", (255, 255, 255)),
        (encoded(Image.new("RGBA", (8, 8), (9, 9, 9, 255))), None, (9, 9, 9)),
        (encoded(Image.fromarray(np.full((8, 8), 65535, np.uint16))), "read as 8 bits", (255, 255, 255)),
        (encoded(Image.fromarray(np.full((8, 8), 32896, np.uint16)), "TIFF"), "0 to 65535 read as 8 bits", (128,) * 3),
        (encoded(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF"), "0 to 1 read as 8 bits", (128,) * 3),
        (encoded(Image.fromarray(np.full((8, 8), 100_000, np.int32)), "TIFF"), "read as 8 bits", (0, 0, 0)),
        (png(1, 1, 16, b"\0" + struct.pack(">HHH", 65535, 32768, 0)), "16 bits per channel", (255, 128, 0)),
    ],
)  # fmt: skip
def test_odd_pictures_become_rgb_with_a_note(data, note, pixel):
    found = decode(data)
    assert found.reason is None
    assert found.picture.mode == "RGB"
    assert np.allclose(found.picture.getpixel((0, 0)), pixel, atol=1)
    assert found.note is None if note is None else note in found.note


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    found = decode(animated(kind))
    assert "the first of 3 frames" in found.note
    distance = np.abs(np.asarray(found.picture, float) - np.asarray(smooth(0), float)).mean()
    assert distance < 0.5 * np.abs(np.asarray(smooth(1), float) - np.asarray(smooth(0), float)).mean()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture_upright(orientation):
    image = Image.new("RGB", (8, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded(image, "JPEG", exif=exif))
    assert found.picture.size == ((8, 4) if orientation < 5 else (4, 8))
    assert (found.note is None) == (orientation == 1)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow says so; where warnings are no errors it goes on
def test_damaged_exif_does_not_lose_the_picture():
    found = decode(encoded(smooth(0), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage"))
    assert found.picture is not None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"no picture at all, but some bytes", "unknown"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unknown"),
        (encoded(smooth(0))[:-60], "damaged"),
        (encoded(smooth(0, 64), "JPEG")[:-200], "damaged"),
        (encoded(smooth(0, 64), "WEBP")[:-200], ""),
        (png(8, 8), "damaged"),
        (png(10_000, 10_000), f"too large: 100,000,000 pixels; the limit is {MAX_PIXELS:,}"),
        (png(60_000, 60_000), "too large: 3,600,000,000 pixels"),
    ],
)
def test_what_cannot_be_read_gets_a_reason(data, reason):
    found = decode(data)
    assert found.picture is None
    assert found.reason.startswith(reason)
    assert "0x" not in found.reason, "an address would make two builds differ"
    assert decode(data) == found


@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]), st.data())
def test_no_damage_ever_raises(kind, data):
    whole = bytearray(encoded(smooth(1), kind))
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=8)):
        whole[at] = data.draw(st.integers(0, 255))
    found = decode(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    assert (found.picture is None) == (found.reason is not None)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "JPEG2000"])
def test_only_the_formats_that_a_caller_takes_are_tried(kind):
    data = encoded(smooth(0), kind)
    assert decode(data).picture is not None
    assert decode(data, KEPT).reason == "unknown: in none of the formats WEBP, PNG, JPEG"


def test_a_limit_of_pixels_is_asked_before_anything_is_decoded():
    small = encoded(Image.new("1", (4097, 4096)))
    assert decode(small).picture is not None
    assert decode(small, KEPT).reason == "too large: 16,781,312 pixels; the limit is 16,777,216"
    assert decode(b"\0" * (KEPT.bytes + 1), KEPT).reason == "too large: 67,108,865 bytes; the limit is 67,108,864"


def test_a_smaller_copy_of_a_jpeg_is_read_at_a_smaller_scale():
    data = encoded(smooth(0, 512), "JPEG")
    assert decode(data, side=64).picture.size == (64, 64)
    assert decode(data, side=4000).picture.size == (512, 512)


def test_a_jpeg_of_many_scans_is_refused_however_they_are_hidden():
    whole = encoded(smooth(0, 64), "JPEG", progressive=True)
    assert decode(whole).picture is not None
    last = whole[whole.rindex(b"\xff\xda") : -2]
    alone = b"\xff\x01\xff\xff"  # markers and fill bytes without a length
    for piece in (last, alone + last):
        found = decode(whole[:-2] + piece * MAX_SCANS + whole[-2:])
        assert found.reason == f"too slow: {MAX_SCANS + 1} scans or more; the limit is {MAX_SCANS}"
    exif = b"Exif\0\0" + b"\xff\xda" * 1000
    assert decode(encoded(smooth(0, 64), "JPEG", exif=exif)).picture is not None, "no scans, but bytes of a segment"


OUR_OWN = {"demo/build.py", "demo/train.py", "demo/train_judges.py"}
"""What builds the bundled world opens only pictures that it has made itself, or whose sums it knows."""


def test_pictures_are_opened_in_one_place():
    root = Path(mnemoscope.__file__).parent
    opens = {p.relative_to(root).as_posix() for p in root.rglob("*.py") if _opens_pictures(ast.parse(p.read_bytes()))}
    assert opens == {"similarity/decoding.py", *OUR_OWN}


def _opens_pictures(tree: ast.AST) -> bool:
    """Whether code speaks of ``Image.open``, by whatever path, or imports it by itself."""
    nodes = list(ast.walk(tree))
    called = any(
        isinstance(n, ast.Attribute) and n.attr == "open" and ast.unparse(n.value).endswith("Image") for n in nodes
    )
    imported = [
        a.name for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "") == "PIL.Image" for a in n.names
    ]
    renamed = [a for n in nodes if isinstance(n, ast.ImportFrom) and n.module == "PIL" for a in n.names if a.asname]
    return called or "open" in imported or bool(renamed)


def test_nothing_that_is_collected_starts_a_program():
    assert not {"EPS", "WMF", "PDF", "FPX", "MIC"} & {*COLLECTED.formats}
    assert {*KEPT.formats} <= {*COLLECTED.formats}


# Folders ------------------------------------------------------------------------------------------------------------------


def test_a_folder_is_listed_in_one_order_with_relative_ids(tmp_path):
    fill(tmp_path, 7)
    (tmp_path / "captions.jsonl").write_text("{}")
    (tmp_path / ".hidden.png").write_bytes(b"")
    found = everything(tmp_path)
    ids = ["001.png", "002.png", "004.png", "005.png", "deep/0/000.png", "deep/0/006.png", "deep/1/003.png"]
    assert [r.entry.id for r in found] == ids
    assert all(r.reason is None and len(r.sha256) == 64 and (r.width, r.height) == (32, 32) for r in found)
    assert open_source(tmp_path).count() == 7


def test_every_fault_of_a_folder_is_a_row(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(smooth(0)))
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "c.jpg").write_bytes(b"junk")
    (tmp_path / "d.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "e.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "f").symlink_to(tmp_path)
    (tmp_path / "i.png").symlink_to("i.png")
    os.mkfifo(tmp_path / "g.png")
    (tmp_path / "h.png").mkdir()
    found = {r.entry.id: r for r in everything(tmp_path)}
    assert found["a.png"].reason is None
    assert found["b.png"].reason.startswith("empty")
    assert found["c.jpg"].reason.startswith("unknown")
    assert found["d.png"].reason is None
    assert found["d.png"].note == "a symbolic link"
    assert found["e.png"].reason.startswith("link: to nothing")
    assert found["f"].reason == "link: to a folder, not followed"
    assert found["i.png"].reason.startswith("link: ")
    assert found["g.png"].reason == "unreadable: not a file"
    assert "h.png" not in found, "a folder whose name ends like a picture's is a folder"
    assert found["e.png"].sha256 is None, "what could not be read has no hash, so that it is tried again"


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_names_that_are_no_utf8_are_written_as_such(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(encoded(smooth(0)))
    (found,) = everything(tmp_path)
    assert found.reason is None
    found.entry.id.encode()


def test_files_beyond_the_limit_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_BYTES", 100)
    fill(tmp_path / "p", 1)
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as z:
        z.writestr("a.png", bytes(101))
    for source in (tmp_path / "p", tmp_path / "p.zip"):
        (found,) = everything(source)
        assert found.reason.startswith("too large")
        assert "the limit is 100" in found.reason


def test_a_list_of_paths(tmp_path):
    fill(tmp_path, 3)
    paths = [tmp_path / "002.png", str(tmp_path / "001.png"), tmp_path / "gone.png"]
    found = everything(paths)
    assert [r.entry.id for r in found] == [(tmp_path / n).as_posix() for n in ("002.png", "001.png", "gone.png")]
    assert [r.reason is None for r in found] == [True, True, False]


# Archives -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def archives(tmp_path):
    fill(tmp_path / "p", 4)
    files = sorted((tmp_path / "p").rglob("*.png"))
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as z, tarfile.open(tmp_path / "p.tar.gz", "w:gz") as t:
        for file in files:
            z.write(file, file.relative_to(tmp_path / "p").as_posix())
            t.add(file, file.relative_to(tmp_path / "p").as_posix())
        z.writestr("notes.txt", "no picture")
        z.writestr("__MACOSX/._001.png", "no picture")
    return tmp_path


@pytest.mark.parametrize("name", ["p.zip", "p.tar.gz"])
def test_archives_hold_what_the_folder_holds(archives, name):
    of_folder = {r.entry.id: r.sha256 for r in everything(archives / "p")}
    assert {r.entry.id: r.sha256 for r in everything(archives / name)} == of_folder
    source = open_source(archives / name)
    for at, sha256 in of_folder.items():
        assert picture_of(source, at, sha256).size == (32, 32)
        assert picture_of(source, at, "0" * 64) is None
    assert picture_of(source, "gone.png", "0" * 64) is None


def test_a_folder_of_shards(archives):
    (archives / "shards").mkdir()
    for n in (0, 1):
        with tarfile.open(archives / "shards" / f"{n}.tar", "w") as t:
            t.add(archives / "p" / f"00{n + 1}.png", "x.png")
    source = open_source(archives / "shards")
    assert [r.entry.id for r in everything(archives / "shards")] == ["0.tar/x.png", "1.tar/x.png"]
    assert source.count() == 2
    assert source.fetch("1.tar/x.png") == (archives / "p/002.png").read_bytes()


def test_links_and_cut_archives_are_rows(archives):
    with tarfile.open(archives / "a.tar", "w") as t:
        t.add(archives / "p/001.png", "a.png")
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        t.addfile(link)
        t.add(archives / "p/002.png", "c.png")
    found = everything(archives / "a.tar")
    assert [r.reason for r in found] == [None, "link: inside an archive, not followed", None]
    whole = (archives / "a.tar").read_bytes()
    for cut in (1500, len(whole) // 4):
        (archives / "cut.tar").write_bytes(whole[:cut])
        found = everything(archives / "cut.tar")
        assert found[-1].reason.startswith("archive: cut.tar is damaged")
    packed = (archives / "p.tar.gz").read_bytes()
    (archives / "cut.tar.gz").write_bytes(packed[: len(packed) // 2])
    assert everything(archives / "cut.tar.gz")[-1].reason.startswith("archive: cut.tar.gz is damaged")


def test_damage_inside_a_zip_is_a_row_and_a_damaged_zip_an_error(archives):
    data = bytearray((archives / "p.zip").read_bytes())
    data[data.index(b"PNG") + 40] ^= 0xFF
    (archives / "bad.zip").write_bytes(data)
    reasons = [r.reason for r in everything(archives / "bad.zip")]
    assert sum(reason is not None for reason in reasons) == 1
    assert "Bad CRC" in next(filter(None, reasons))
    (archives / "none.zip").write_bytes(bytes(data[:100]))
    with pytest.raises(UsageError, match=r"none\.zip cannot be read as a zip archive"):
        open_source(archives / "none.zip")


# Tables -------------------------------------------------------------------------------------------------------------------


def table(n: int, first: int = 0, **more):
    cells = [{"bytes": encoded(smooth(i)), "path": f"{i}.png"} for i in range(first, first + n)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({"image": pa.array(cells, kind), "text": [f"picture {i}" for i in range(n)], **more})


def test_parquet_as_datasets_writes_it(tmp_path):
    (tmp_path / "data").mkdir()
    pq.write_table(table(40), tmp_path / "data" / "a.parquet", row_group_size=7)
    pq.write_table(table(3, 40), tmp_path / "data" / "b.parquet")
    found = everything(tmp_path / "data")
    assert [r.entry.id for r in found] == [f"a.parquet#{i}" for i in range(40)] + [f"b.parquet#{i}" for i in range(3)]
    assert all(r.reason is None for r in found)
    source = open_source(tmp_path / "data")
    assert source.count() == 43
    assert picture_of(source, "a.parquet#33", found[33].sha256) is not None
    assert picture_of(reopened(source.describe()), "b.parquet#2", found[42].sha256) is not None


def test_plain_bytes_with_an_id_column(tmp_path):
    cells = [encoded(smooth(0)), None, b"junk"]
    pq.write_table(pa.table({"jpg": pa.array(cells, pa.binary()), "key": ["x", "y", "z"]}), tmp_path / "a.parquet")
    found = everything(tmp_path / "a.parquet", id_column="key")
    assert [(r.entry.id, r.entry.at) for r in found] == [
        ("x", "a.parquet#0"),
        ("y", "a.parquet#1"),
        ("z", "a.parquet#2"),
    ]
    assert found[0].reason is None
    assert found[1].reason == "empty: the cell holds nothing"
    assert found[2].reason.startswith("unknown")


def test_a_table_cannot_choose_files_outside_its_folder(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "secret.png").write_bytes(encoded(smooth(0)))
    (tmp_path / "t/own.png").write_bytes(encoded(smooth(1)))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    paths = ["own.png", "../secret.png", str(tmp_path / "secret.png"), "gone.png"]
    cells = [{"bytes": None, "path": p} for p in paths]
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), tmp_path / "t/a.parquet")
    reasons = [r.reason for r in everything(tmp_path / "t/a.parquet")]
    assert reasons[0] is None
    assert [r.partition(":")[0] for r in reasons[1:]] == ["elsewhere", "elsewhere", "unreadable"]


def test_a_damaged_table_does_not_hide_the_next(tmp_path):
    for name in "abc":
        pq.write_table(table(2), tmp_path / f"{name}.parquet")
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    found = everything(tmp_path)
    assert [r.entry.id for r in found] == ["a.parquet#0", "a.parquet#1", "b.parquet#0!", "c.parquet#0", "c.parquet#1"]
    assert found[2].reason.startswith("table: b.parquet is damaged")
    assert open_source(tmp_path).count() is None


def test_columns_are_found_or_asked_for(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(table(2, mask=[b"1", b"2"]), path)
    with pytest.raises(UsageError, match=r"several columns of bytes \(image, mask\)"):
        open_source(path)
    with pytest.raises(UnknownName, match="Did you mean 'image'"):
        open_source(path, column="imgae")
    with pytest.raises(UsageError, match=r"column 'text' of .* holds string"):
        open_source(path, column="text")
    with pytest.raises(UnknownName, match=r"no column in .* named 'key'"):
        open_source(path, column="image", id_column="key")
    assert len(everything(path, column="image")) == 2


def save_as_datasets_does(folder, parts):
    folder.mkdir(parents=True)
    names = []
    for i, part in enumerate(parts):
        names.append(f"data-{i:05}-of-{len(parts):05}.arrow")
        with pa.OSFile(str(folder / names[-1]), "wb") as file, pa.ipc.new_stream(file, part.schema) as stream:
            stream.write_table(part, max_chunksize=5)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_saved_data_set_is_read_without_the_library(tmp_path):
    save_as_datasets_does(tmp_path / "one", [table(20), table(4, 20)])
    found = everything(tmp_path / "one")
    assert len(found) == 24
    assert found[20].entry.id == "data-00001-of-00002.arrow#0"
    assert all(r.reason is None for r in found)
    assert picture_of(open_source(tmp_path / "one"), found[23].entry.id, found[23].sha256) is not None
    save_as_datasets_does(tmp_path / "all/train", [table(2)])
    save_as_datasets_does(tmp_path / "all/test", [table(1)])
    (tmp_path / "all/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [r.entry.id.split("/")[0] for r in everything(tmp_path / "all")] == ["train", "train", "test"]
    (tmp_path / "all/test/state.json").write_text("{}")
    with pytest.raises(UsageError, match="does not list the files of a data set"):
        open_source(tmp_path / "all")


def test_data_sets_of_the_library(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed (extra [train])")
    fill(tmp_path / "p", 5)
    paths = sorted(map(str, (tmp_path / "p").rglob("*.png")))
    data = datasets.Dataset.from_dict({"image": paths, "key": [f"k{i}" for i in range(5)]})
    data = data.cast_column("image", datasets.Image())
    found = everything(data, id_column="key")
    assert [r.entry.id for r in found] == [f"k{i}" for i in range(5)]
    assert all(r.reason is None for r in found)
    assert open_source(data).count() == 5
    shuffled = everything(data.select([3, 1]), id_column="key")
    assert [r.sha256 for r in shuffled] == [found[3].sha256, found[1].sha256]
    data.save_to_disk(tmp_path / "saved")
    assert [r.sha256 for r in everything(tmp_path / "saved")] == [r.sha256 for r in found]
    data.to_parquet(tmp_path / "t.parquet")
    assert [r.sha256 for r in everything(tmp_path / "t.parquet")] == [r.sha256 for r in found]
    assert [r.sha256 for r in everything(data.to_iterable_dataset())] == [r.sha256 for r in found]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: p / "nowhere", "does not exist"),
        (lambda p: p / "notes.txt", "is neither a folder nor"),
        (lambda p: p / "empty", "holds no pictures"),
        (lambda p: 3, "int is no source of pictures"),
        (lambda p: [], "the list of pictures is empty"),
    ],
)
def test_what_is_no_source_is_said(tmp_path, make, sentence):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=sentence):
        open_source(make(tmp_path))


# Reading ahead ------------------------------------------------------------------------------------------------------------


class Endless:
    """A source that counts how far it has been asked."""

    def __init__(self, n: int, data: bytes):
        self.n, self.data, self.listed, self.closed = n, data, 0, False

    def describe(self):
        return {"kind": "endless"}

    def count(self):
        return None

    def fetch(self, at):
        return self.data

    @contextlib.contextmanager
    def opened(self):
        yield self._entries()
        self.closed = True

    def _entries(self):
        for i in range(self.n):
            self.listed += 1
            yield Entry(str(i), lambda: bytes(self.data))


def test_reading_is_in_order_and_only_so_far_ahead():
    source = Endless(10 * CHUNK, encoded(smooth(0)))
    readings = read(source, keep, workers=2)
    for i in range(5 * CHUNK):
        assert next(readings).entry.id == str(i)
        assert source.listed <= (i // CHUNK + 1 + 3) * CHUNK
    assert [r.entry.id for r in readings] == [str(i) for i in range(5 * CHUNK, 10 * CHUNK)]
    assert source.closed


def test_stopping_early_ends_the_threads():
    before = threading.active_count()
    readings = read(Endless(1000, encoded(smooth(0))), keep, workers=3)
    next(readings)
    readings.close()
    assert threading.active_count() == before


def test_known_entries_are_not_touched():
    def refuse():
        raise AssertionError("read although it is known")

    class Known(Endless):
        def _entries(self):
            yield from (Entry(str(i), refuse) for i in range(100))
            yield Entry("new", lambda: self.data)

    found = read(Known(0, encoded(smooth(0))), keep, fresh=lambda some: [e for e in some if e.id == "new"])
    assert [r.entry.id for r in found] == ["new"]


def test_memory_does_not_grow_with_the_set():
    picture = encoded(smooth(0, 128), "BMP")

    def peak(n: int) -> int:
        gc.collect()
        tracemalloc.start()
        for _ in read(Endless(n, picture), lambda p: np.asarray(p).copy(), workers=1):
            pass
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    peak(64)
    held = (
        CHUNK * 3
    )  # what reading promises for one worker; each holds the file and the picture, which in BMP are of one size
    assert peak(1024) < 2 * held * len(picture) < 2 * 1024 * len(picture) / 10


# What leads elsewhere -----------------------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path):
    """Files of the reader, beside the folder that he was sent."""
    fill(tmp_path / "private", 2)
    with tarfile.open(tmp_path / "private/p.tar", "w") as t:
        t.add(tmp_path / "private/001.png", "a.png")
    table = pa.table({"image": [encoded(smooth(0))]})
    pq.write_table(table, tmp_path / "private/p.parquet")
    with pa.OSFile(str(tmp_path / "private/p.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    (tmp_path / "sent").mkdir()
    return tmp_path / "private"


def test_links_that_lead_out_of_a_folder_are_rows(outside, tmp_path):
    sent = fill(tmp_path / "sent", 3)
    (sent / "in.png").symlink_to("001.png")
    (sent / "out.png").symlink_to(outside / "001.png")
    found = {r.entry.id: r for r in everything(sent)}
    assert (found["in.png"].reason, found["in.png"].note) == (None, "a symbolic link")
    assert found["out.png"].reason == "link: leads out of the folder, not followed"
    sha256 = hashlib.sha256((outside / "001.png").read_bytes()).hexdigest()
    for name in ("out.png", "../private/001.png", str(outside / "001.png")):
        assert picture_of(open_source(sent), name, sha256) is None
    (tmp_path / "mine").symlink_to(sent)
    assert len(everything(tmp_path / "mine")) == 5, "a folder that the reader names may be a link"


@pytest.mark.parametrize("ending", ["tar", "parquet"])
def test_shards_that_lead_out_or_are_no_files_are_rows(outside, tmp_path, ending):
    sent = tmp_path / "sent"
    (sent / f"a.{ending}").symlink_to(outside / f"p.{ending}")
    os.mkfifo(sent / f"b.{ending}")
    shutil.copy(outside / f"p.{ending}", sent / f"c.{ending}")
    reasons = [r.reason for r in everything(sent)]
    assert reasons[0] == "link: leads out of the folder, not followed"
    assert "it is no regular file" in reasons[1]
    assert reasons[2:] == [None]
    (tmp_path / f"mine.{ending}").symlink_to(outside / f"p.{ending}")
    assert [r.reason for r in everything(tmp_path / f"mine.{ending}")] == [None], "the reader may name a link"


@pytest.mark.parametrize("name", ["../private/p.arrow", "{private}/p.arrow", "link.arrow", "pipe.arrow"])
def test_a_saved_data_set_names_files_of_its_own(outside, tmp_path, name):
    sent, facts = tmp_path / "sent", {"_data_files": [{"filename": name.format(private=outside)}]}
    (sent / "link.arrow").symlink_to(outside / "p.arrow")
    os.mkfifo(sent / "pipe.arrow")
    (sent / "state.json").write_text(json.dumps(facts))
    with pytest.raises(UsageError, match="does not list the files of a data set that lie in it"):
        open_source(sent)
    (sent / "state.json").rename(outside / "state.json")
    (sent / "dataset_dict.json").write_text('{"splits": ["../private"]}')
    with pytest.raises(UsageError, match="leads out"):
        open_source(sent)


def test_a_saved_data_set_lists_each_file_once(outside, tmp_path):
    shutil.copy(outside / "p.arrow", tmp_path / "p.arrow")
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "p.arrow"}] * 2}))
    with pytest.raises(UsageError, match=r"'p\.arrow' is listed twice"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["p.zip", "p.tar", "p.parquet"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UsageError, match="no regular file") if name != "p.tar" else contextlib.nullcontext():
        assert "no regular file" in everything(tmp_path / name)[0].reason


NAN = float("nan")


@pytest.mark.parametrize(
    ("ids", "names", "notes"),
    [
        (["x", "y", "z"], ["x", "y", "z"], [None, None, None]),
        ([1.0, 2.0, NAN], ["1", "2", "a.parquet#2"], [None, None, "without an id"]),
        ([1, None, 3], ["1", "a.parquet#1", "3"], [None, "without an id", None]),
        (
            ["x", "", "x"],
            ["x", "a.parquet#1", "a.parquet#2"],
            [None, "without an id", "its id 'x' stands above already"],
        ),
    ],
)
def test_a_row_without_an_id_of_its_own_is_known_by_its_number(tmp_path, ids, names, notes):
    pq.write_table(
        pa.table({"image": [encoded(smooth(i)) for i in range(3)], "key": ids, "text": ["a", "b", "c"]}),
        tmp_path / "a.parquet",
    )
    source = open_source(tmp_path / "a.parquet", id_column="key")
    found = list(read(source, keep))
    assert [r.entry.id for r in found] == names
    assert [r.entry.note for r in found] == notes
    assert all(r.prepared is not None for r in found)
    assert list(reading.table_values(source, ["text"])) == list(zip(names, ["a", "b", "c"], strict=True))


def test_a_column_that_cannot_be_read_matters_only_where_it_is_needed(tmp_path):
    odd = pa.array([10**9, 1], pa.date32())
    pq.write_table(
        pa.table({"image": [encoded(smooth(i)) for i in range(2)], "day": odd, "text": ["a", "b"]}),
        tmp_path / "a.parquet",
    )
    source = open_source(tmp_path / "a.parquet")
    assert [r.reason for r in read(source, keep)] == [None, None]
    assert dict(reading.table_values(source, ["text"])) == {"a.parquet#0": "a", "a.parquet#1": "b"}
    with pytest.raises(UsageError, match=r"column 'day' of a\.parquet cannot be read"):
        list(reading.table_values(source, ["day"]))
    (row,) = read(open_source(tmp_path / "a.parquet", id_column="day"), keep)
    assert row.reason.startswith("table: a.parquet is damaged (OverflowError")
