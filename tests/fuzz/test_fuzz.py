"""A slice of `make fuzz`, and what its parts promise."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")

from fuzz import changes, children, forgeries, table  # noqa: E402

ROOT = Path(__file__).parents[2]
DOCUMENT = b'{"a": [1, 2.5, {"b": "x"}], "c": null, "d": true}'


def test_a_slice_of_all_kinds_finds_nothing(tmp_path):
    slice_ = ("--inputs", "240", "--workers", "1", "--minutes", "9")
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fuzz", *slice_, "--folder", tmp_path / "all", "--json", tmp_path / "result.json"],
        cwd=ROOT, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-20000:] + ended.stderr[-5000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["complete"]
    assert all(row["inputs"] for row in result["rows"])
    assert result["total"]["kills"] >= 3


@pytest.mark.parametrize(
    "change", [changes.change_json, changes.change_lines, changes.change_yaml, changes.change_bytes], ids=lambda f: f.__name__
)  # fmt: skip
def test_the_same_seed_makes_the_same_input(change):
    for seed in range(200):
        assert change(random.Random(seed), DOCUMENT) == change(random.Random(seed), DOCUMENT)


def test_documents_are_equal_by_what_they_say():
    assert changes.equal_documents(DOCUMENT, json.dumps(json.loads(DOCUMENT), indent=4).encode())
    assert not changes.equal_documents(DOCUMENT, DOCUMENT.replace(b"true", b"1"))
    assert not changes.equal_documents(b'{"a": 1}', b'{"a": 1, "a": 1}')
    assert changes.stands_twice(b'{"b": [{"a": 1, "a": 2}]}')
    assert changes.stands_twice_in_yaml(b"b:\n  - {a: 1, a: 2}\n")
    assert not changes.stands_twice_in_yaml(b"b:\n  - {a: 1}\n  - {a: 2}\n")


def test_packets_are_equal_by_what_they_hold(tmp_path):
    members = {"a": b"1", "b": b"2"}
    one, other = tmp_path / "one.zip", tmp_path / "other.zip"
    forgeries.write_archive(members, one)
    for name, change in forgeries.ARCHIVE_CHANGES:
        change(random.Random(0), dict(members), other)
        assert forgeries.equal_packets(one, other) is (name in ("packed otherwise", "another order")), name


def _raise() -> None:
    raise ValueError("nobody catches this")


def _end_silently() -> None:
    raise SystemExit(2)


def _kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _take_memory() -> None:
    bytearray(children.MEMORY + (1 << 30))


def _wait_for_a_pipe() -> None:
    os.mkfifo("pipe")
    Path("pipe").read_bytes()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # multi-threaded, and forked
@pytest.mark.parametrize(
    ("work", "column"),
    [(_raise, "tracebacks"), (_end_silently, "tracebacks"), (_kill_itself, "tracebacks"), (_take_memory, "tracebacks"),
     (_wait_for_a_pipe, "hangs"), (dict, None)],
)  # fmt: skip
def test_an_end_that_is_not_documented_is_told(work, column, tmp_path, monkeypatch):
    monkeypatch.setattr(children, "IDLE_SECONDS", 0.5)
    fault = children.fault_of(children.Child(work, tmp_path).wait())
    assert (fault and fault[0]) == column


def test_the_table_counts_inputs_and_names_the_shortest_one(capsys, tmp_path):
    kind = type("Kind", (), {"name": "packets"})
    facts = {"kind": "packets", "kills": 1, "seconds": 0.5}
    results = [
        {**facts, "number": 0, "words": [], "faults": []},
        {**facts, "number": 1, "words": ["a long way"], "faults": [["hangs", "no end after 12 s"]]},
        {**facts, "number": 2, "words": ["short"], "faults": [["hangs", "no end after 13 s"], ["hangs", "none"]]},
    ]
    document = table.show(results, [kind], 4, 7, 60.0)
    assert (document["clean"], document["complete"]) == (False, False)
    assert (document["total"]["inputs"], document["total"]["kills"], document["total"]["hangs"]) == (3, 3, 2)
    assert (document["faults"][0]["times"], document["faults"][0]["number"]) == (2, 2)
    assert "| packets | 3 | 3 | 0 | 2 | 0 | 0 |" in table.markdown(document)
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n<!-- fuzz -->\nold\n<!-- /fuzz -->\n\nThe end.\n")
    table.put_in("new\n", page)
    assert page.read_text() == "# A page\n\n<!-- fuzz -->\nnew\n<!-- /fuzz -->\n\nThe end.\n"
    assert "There was time for 3 of 4 inputs." in capsys.readouterr().out
