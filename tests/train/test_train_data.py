"""Captioned pictures in every layout, and what is said of those that cannot be trained on."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from train_worlds import picture

from mnemoscope.errors import UnknownName, UsageError
from mnemoscope.train.data import read_training_set, square, write_problems


def read(path, **options):
    return read_training_set(path, **{"min_side": 16, "max_aspect": 3.0, **options})


def png(seed: int) -> bytes:
    data = io.BytesIO()
    picture(seed).save(data, "PNG")
    return data.getvalue()


def test_metadata_of_a_folder_and_of_a_folder_within(tmp_path):
    (tmp_path / "more").mkdir()
    picture(0).save(tmp_path / "a.png")
    picture(1).save(tmp_path / "more" / "b.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ["one", "two", "one"]}\n')
    (tmp_path / "more" / "metadata.csv").write_text("file_name,caption\nb.png,three\n")
    found = read(tmp_path)
    assert [(p.id, p.captions) for p in found.pictures] == [("a.png", ("one", "two")), ("more/b.png", ("three",))]
    assert found.problems == ()


def test_a_text_file_beside_each_picture(tmp_path):
    for name, ending in (("a", ".txt"), ("b", ".caption")):
        picture(0).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}{ending}").write_text(f"caption {name}\n")
    assert [p.captions for p in read(tmp_path).pictures] == [("caption a",), ("caption b",)]


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl"])
def test_captions_are_not_read_through_links_that_lead_out(tmp_path, name):
    data, secret = tmp_path / "data", tmp_path / "secret"
    data.mkdir()
    picture(0).save(data / "a.png")
    secret.write_text('{"file_name": "a.png", "text": "secret"}')
    (data / name).symlink_to(secret)
    with pytest.raises(UsageError, match="put the file itself there"):
        read(data)


def test_parquet_with_a_column_of_another_name(tmp_path):
    table = {"image": [png(0), png(1)], "says": ["one", None]}
    pq.write_table(pa.table(table), tmp_path / "set.parquet")
    found = read(tmp_path / "set.parquet", caption_column="says")
    assert [p.captions for p in found.pictures] == [("one",)]
    assert [p.reason.split(":")[0] for p in found.problems] == ["empty caption"]
    with pytest.raises(UnknownName, match="text"):
        read(tmp_path / "set.parquet")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_data_set_saved_and_in_memory(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(i), "path": None} for i in range(3)], "text": ["a", "b", "c"]}
    ).cast_column("image", datasets.Image())
    data.save_to_disk(tmp_path / "saved", num_proc=None)
    saved, loose = read(tmp_path / "saved"), read(data)
    assert [p.captions for p in saved.pictures] == [p.captions for p in loose.pictures] == [("a",), ("b",), ("c",)]
    assert [p.sha256 for p in saved.pictures] == [p.sha256 for p in loose.pictures]
    assert [row for row, _ in saved.pixels(16)] == [0, 1, 2]


def test_every_fault_is_listed_with_its_reason(tmp_path):
    picture(0).save(tmp_path / "good.png")
    picture(1, 15, 40).save(tmp_path / "small.png")
    picture(2, 80, 16).save(tmp_path / "long.png")
    picture(3).save(tmp_path / "mute.png")
    picture(4).save(tmp_path / "blank.png")
    (tmp_path / "torn.png").write_bytes(png(5)[:100])
    names = ["good", "small", "long", "torn", "gone"]
    lines = [json.dumps({"file_name": f"{name}.png", "text": name}) for name in names]
    lines.append(json.dumps({"file_name": "blank.png", "text": "  "}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    found = read(tmp_path)
    assert [p.id for p in found.pictures] == ["good.png"]
    kinds = {p.id: p.reason.partition(":")[0] for p in found.problems}
    assert kinds == {
        "blank.png": "empty caption", "gone.png": "no picture", "long.png": "too long", "mute.png": "no caption",
        "small.png": "too small", "torn.png": "damaged",
    }  # fmt: skip
    written = [
        json.loads(line) for line in write_problems(tmp_path / "p.jsonl", found.problems).read_text().splitlines()
    ]
    assert [line["id"] for line in written] == [p.id for p in found.problems]


def test_metadata_without_file_names_is_refused(tmp_path):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UsageError, match="lacks file_name"):
        read(tmp_path)


def test_the_middle_of_a_picture():
    wide = picture(0, 40, 20)
    assert (square(wide, 20) * 255).round().byte().permute(1, 2, 0).numpy().tolist() == [
        row[10:30] for row in np.array(wide).tolist()
    ]


def test_pictures_that_change_are_noticed(tmp_path):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    found = read(tmp_path)
    picture(1).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="changed while it was read"):
        list(found.pixels(16))
