"""Values of large files: computed once, as long as the file stands still and the user's own folder says so."""

import json
import os
import time

import pytest

from mnemoscope.records import marks, once
from mnemoscope.records.files import hash_file
from mnemoscope.records.once import compute_once


@pytest.fixture
def state(tmp_path, monkeypatch):
    """A state folder of its own, and files that count as large and settled at once."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(once, "LARGE", 0)
    monkeypatch.setattr(once, "SETTLED", -1.0)
    marks._key.cache_clear()
    yield tmp_path / "state" / "mnemoscope" / "computed"
    marks._key.cache_clear()


class Counted:
    """Computes the hash of a file, and counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self, path):
        self.calls += 1
        return hash_file(path)

    def calls_for(self, path, what="sha256"):
        """How often it was called for one question, whose answer is right."""
        before = self.calls
        assert compute_once(path, what, self) == hash_file(path)
        return self.calls - before


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "vectors.bin"
    path.write_bytes(b"0123456789")
    return path


def test_a_value_is_kept_for_what_it_is_and_for_this_file(state, file, tmp_path):
    counted = Counted()
    assert [counted.calls_for(file), counted.calls_for(file)] == [1, 0]
    assert counted.calls_for(file, "another value") == 1
    (tmp_path / "link").symlink_to(file)
    assert counted.calls_for(tmp_path / "link") == 0, "the file is what its path leads to"
    (tmp_path / "copy").write_bytes(file.read_bytes())
    assert counted.calls_for(tmp_path / "copy") == 1
    assert state.stat().st_mode & 0o777 == 0o700


def change_content(file):
    file.write_bytes(b"9876543210")


def change_and_set_times_back(file):
    facts = file.stat()
    change_content(file)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def replace(file):
    facts = file.stat()
    other = file.with_name("other")
    other.write_bytes(b"9876543210")
    os.utime(other, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    os.replace(other, file)


def append(file):
    file.write_bytes(file.read_bytes() + b"x")


@pytest.mark.parametrize("change", [change_content, change_and_set_times_back, replace, append])
def test_a_file_that_changed_is_read_again(state, file, change):
    counted = Counted()
    counted.calls_for(file)
    time.sleep(0.02)  # clocks of file systems are coarse: this is what SETTLED is for
    change(file)
    assert counted.calls_for(file) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: kept | {"value": "0" * 64},
        lambda kept: {k: v for k, v in kept.items() if k != "mark"},
        lambda kept: kept | {"mark": "0" * 64},
        lambda kept: [],
        lambda kept: None,
    ],
)
def test_a_value_that_this_user_did_not_keep_counts_nothing(state, file, change):
    counted = Counted()
    counted.calls_for(file)
    (kept,) = state.iterdir()
    kept.write_text(json.dumps(change(json.loads(kept.read_bytes()))))
    assert counted.calls_for(file) == 1
    kept.write_bytes(b"\xff{")
    assert counted.calls_for(file) == 1
    assert counted.calls_for(file) == 0, "it has been put right"


@pytest.mark.parametrize("name", ["LARGE", "SETTLED"])
def test_small_files_and_those_that_just_changed_are_read_each_time(state, file, monkeypatch, name):
    monkeypatch.setattr(once, name, 1e6)
    counted = Counted()
    assert [counted.calls_for(file), counted.calls_for(file)] == [1, 1]
    assert not state.exists()


def test_a_file_that_changes_while_it_is_read_is_not_kept(state, file):
    def read_slowly(path):
        append(path)
        return "half of it"

    assert compute_once(file, "sha256", read_slowly) == "half of it"
    assert Counted().calls_for(file) == 1


def test_old_values_go(state, tmp_path, monkeypatch):
    monkeypatch.setattr(once, "KEPT", 3)
    for i in range(5):
        (tmp_path / str(i)).write_bytes(b"x")
        Counted().calls_for(tmp_path / str(i))
    assert len(list(state.iterdir())) == 3


def test_without_a_place_it_is_computed_each_time(state, file, tmp_path):
    (tmp_path / "state").write_text("a file where the folder should be")
    counted = Counted()
    assert [counted.calls_for(file), counted.calls_for(file)] == [1, 1]


def test_a_file_that_is_missing_is_an_error_of_the_system(state, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        compute_once(tmp_path / "nowhere", "sha256", hash_file)
