"""Marks: only this user can make them, and where no key can be kept they hold for the process."""

import subprocess
import sys

import pytest

from mnemoscope.records import marks
from mnemoscope.records.marks import has_mark, mark_of

FACTS = {"kind": "folder", "path": "/data/pictures"}


@pytest.fixture
def state(tmp_path, monkeypatch):
    """A state folder of its own, and a process that has not read its key yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    marks._key.cache_clear()
    yield tmp_path / "state" / "mnemoscope"
    marks._key.cache_clear()


def in_another_process():
    code = f"from mnemoscope.records.marks import mark_of; print(mark_of('source', {FACTS}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_a_mark_is_of_these_facts_of_this_kind_and_of_this_user(state):
    mark = mark_of("source", FACTS)
    assert has_mark("source", FACTS | {"mark": mark})
    assert mark == in_another_process()
    for facts in (FACTS, FACTS | {"mark": None}, FACTS | {"mark": "é"}, FACTS | {"mark": mark, "path": "/data"}):
        assert not has_mark("source", facts)
    assert not has_mark("file", FACTS | {"mark": mark})
    (state / "key").unlink()
    marks._key.cache_clear()
    assert not has_mark("source", FACTS | {"mark": mark}), "another user's key makes another mark"


def test_the_key_is_the_users_alone(state):
    mark_of("source", FACTS)
    assert (state / "key").stat().st_mode & 0o777 == 0o600
    (state / "key").chmod(0o644)
    marks._key.cache_clear()
    assert mark_of("source", FACTS) != in_another_process(), "a key that others may have read marks nothing for good"


def test_without_a_place_for_the_key_marks_hold_until_the_process_ends(state):
    state.parent.write_text("a file where the folder should be")
    mark = mark_of("source", FACTS)
    assert has_mark("source", FACTS | {"mark": mark})
    assert mark != in_another_process()
