"""Picture files of folders: regular ones that lie inside, and one sentence for anything else."""

import os

import pytest
from PIL import Image

from mnemoscope.audit.pictures import opened, pictures_in
from mnemoscope.errors import UsageError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sent").mkdir()
    for name in ("sent/a.png", "mine.png"):
        Image.new("RGB", (16, 16), "red").save(tmp_path / name)
    return tmp_path / "sent"


def test_links_are_followed_as_long_as_they_stay_inside(folder, tmp_path):
    (folder / "b.png").symlink_to("a.png")
    (tmp_path / "named").symlink_to(folder)
    assert [p.file.name for p in pictures_in([tmp_path / "named"])] == ["a.png", "b.png"]
    (folder / "c.png").symlink_to(tmp_path / "mine.png")
    with pytest.raises(UsageError, match=r"c\.png is a link that leads out of"):
        pictures_in([folder])
    assert [p.file.name for p in pictures_in([folder / "c.png"])] == ["c.png"], "a file that is named may be a link"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_pipe_is_one_sentence_and_is_not_waited_for(folder):
    os.mkfifo(folder / "b.png")
    with pytest.raises(UsageError, match=r"b\.png cannot be read \(it is no regular file\)"):
        opened([p.file for p in pictures_in([folder])], (16, 16))


@pytest.mark.parametrize("caption", ["null", "NaN", "true", '["a"]', "{}"])
def test_what_is_no_text_is_no_caption(folder, caption):
    (folder / "c.jsonl").write_text(f'{{"image": "a.png", "caption": {caption}}}\n')
    with pytest.raises(UsageError, match=r"line 1.*write"):
        pictures_in([folder], folder / "c.jsonl")


def test_a_number_is_a_caption(folder):
    (folder / "c.jsonl").write_text('{"image": "a.png", "caption": 1984}\n')
    assert [p.caption for p in pictures_in([folder], folder / "c.jsonl")] == ["1984"]
