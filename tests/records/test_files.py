"""Files that documents of others name: inside their folder, regular, and never waited for."""

import os

import pytest

from mnemoscope.records.files import file_inside, leads_out, open_regular, read_inside, read_regular


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
