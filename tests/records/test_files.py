"""Files that documents of others name: inside their folder, regular, and never waited for."""

import hashlib
import os

import pytest

from mnemoscope.records import files
from mnemoscope.records.files import (
    file_inside,
    files_below,
    folder_name,
    hash_file,
    leads_out,
    open_regular,
    open_to_append,
    read_inside,
    read_regular,
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    inside = tmp_path / "inside"
    (inside / "deep").mkdir(parents=True)
    (inside / "deep" / "a").write_bytes(b"four")
    return inside


def test_a_file_inside_is_read_also_through_a_link_that_stays_inside(folder):
    (folder / "link").symlink_to("deep/a")
    assert read_inside(folder, "deep/a") == read_inside(folder, "link") == b"four"
    assert file_inside(folder, "link") == (folder / "deep" / "a").resolve()


@pytest.mark.parametrize("name", ["../secret", "deep/../../secret", "link", "linked/secret"])
def test_what_leads_out_is_refused(folder, name):
    (folder / "link").symlink_to(folder.parent / "secret")
    (folder / "linked").symlink_to(folder.parent)
    assert leads_out(folder, folder / name)
    with pytest.raises(OSError, match="leads out"):
        read_inside(folder, name)


def test_an_absolute_name_is_refused(folder):
    with pytest.raises(OSError, match="leads out"):
        read_inside(folder, str(folder.parent / "secret"))


@pytest.mark.parametrize("name", ["", ".", "deep", "none", "a\0b", "loop", "deep/a/b"])
def test_what_is_no_file_is_an_os_error(folder, name):
    (folder / "loop").symlink_to("loop")
    with pytest.raises(OSError):  # noqa: PT011 (each system says it in its own words)
        file_inside(folder, name)


def test_a_pipe_is_refused_at_once(folder):
    os.mkfifo(folder / "pipe")
    for read in (lambda: open_regular(folder / "pipe"), lambda: read_inside(folder, "pipe")):
        with pytest.raises(OSError, match="no regular file"):
            read()


def test_a_device_is_refused():
    with pytest.raises(OSError, match="no regular file"):
        read_regular("/dev/zero")


def test_a_file_over_the_limit_is_not_read(folder):
    assert read_regular(folder / "deep" / "a", 4) == b"four"
    with pytest.raises(OSError, match="4 bytes, and the limit is 3"):
        read_regular(folder / "deep" / "a", 3)


def test_the_files_below_a_folder_are_those_that_may_be_copied(folder):
    (folder / "deep" / "b").symlink_to("a")
    assert [name for name, _ in files_below(folder, "deep")] == ["deep/a", "deep/b"]
    assert list(files_below(folder, "none")) == []
    (folder / "deep" / "up").symlink_to(folder)
    with pytest.raises(OSError, match="no regular file"):
        list(files_below(folder, "deep"))
    (folder / "elsewhere").symlink_to(folder.parent)
    with pytest.raises(OSError, match="leads out"):
        list(files_below(folder, "elsewhere"))


def test_a_hash_is_of_what_the_file_is_now(folder):
    before = hash_file(folder / "deep" / "a")
    (folder / "deep" / "a").write_bytes(b"five")
    assert hash_file(folder / "deep" / "a") != before


def test_files_are_read_once_while_they_stand_still(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"one")
    first = hash_file(file)
    hits = files._hash_file.cache_info().hits
    assert hash_file(file) == first == hashlib.sha256(b"one").hexdigest()
    assert files._hash_file.cache_info().hits == hits + 1
    file.write_bytes(b"three")
    assert hash_file(file) == hashlib.sha256(b"three").hexdigest()


def test_lines_are_appended_and_a_pipe_that_nobody_reads_is_not_waited_for(folder):
    for _ in range(2):
        with open_to_append(folder / "log") as file:
            file.write("ä\n")
    assert (folder / "log").read_text(encoding="utf-8") == "ä\nä\n"
    os.mkfifo(folder / "pipe")
    with pytest.raises(OSError):  # noqa: PT011 (each system says it in its own words)
        open_to_append(folder / "pipe")
    reader = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with open_to_append(folder / "pipe") as file:
        file.write("a\n")
    assert os.read(reader, 10) == b"a\n"
    os.close(reader)


@pytest.mark.parametrize(
    ("name", "kept"), [(b"v2", "v2"), ("ärger 1".encode(), "ärger 1"), (b"v\xff\xfe2", "v__2"), (b"a\\b", "a_b")]
)
def test_a_record_calls_a_folder_what_every_system_can_call_one(name, kept, tmp_path):
    folder = tmp_path / os.fsdecode(name)
    assert folder_name(folder) == kept
    assert len(folder_name(folder).encode()) <= len(name)
