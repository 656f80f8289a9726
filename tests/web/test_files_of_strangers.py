"""Run folders with files that would start a program, fill the memory or never end, and many visitors who open them at once."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_runs import row, write
from starlette.testclient import TestClient

from mnemoscope.errors import RunError
from mnemoscope.records.schema import Row
from mnemoscope.records.store import write_whole
from mnemoscope.report import pictures
from mnemoscope.report.html import write_report
from mnemoscope.report.packet import pack
from mnemoscope.web import reading
from mnemoscope.web.app import create_app
from mnemoscope.web.reading import Library

LOOPBACK = "http://127.0.0.1:7347"

SEEDS = 24
"""As many as a sample's page shows."""

PATIENCE = 20.0
"""Seconds after which an answer counts as none; what is right takes far less than one."""


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch):
    monkeypatch.setattr(reading, "REST", 0.0)


def soon(*works: Callable[[], Any]) -> list[Any]:
    """What works return that run at once, each in a thread that nobody waits for longer than that."""
    answers: list[Future[Any]] = [Future() for _ in works]

    def run(answer: Future[Any], work: Callable[[], Any]) -> None:
        try:
            answer.set_result(work())
        except BaseException as e:
            answer.set_exception(e)

    for answer, work in zip(answers, works, strict=True):
        threading.Thread(target=run, args=(answer, work), daemon=True).start()
    return [answer.result(PATIENCE) for answer in answers]


def visitor(folder: Path) -> TestClient:
    return TestClient(create_app(folder), base_url=LOOPBACK, raise_server_exceptions=False)


def seeds(image: str) -> list[Row]:
    """Rows of one prompt that all name one picture."""
    return [row("a", seed=i, image=image, similarity=0.95) for i in range(SEEDS)]


# Pictures -----------------------------------------------------------------------------------------------------------------


def test_postscript_behind_a_picture_s_name_starts_nothing(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ntouch "{tmp_path}/started"\n[ "$1" = --version ] && echo 10.0\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # as if nothing had asked for it yet
    run = write(tmp_path / "runs" / "r", seeds("images/a.webp"))
    (run.folder / "images").mkdir()
    (run.folder / "images" / "a.webp").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    )
    reason = "image unreadable: unknown: in none of the formats"
    answer = visitor(tmp_path / "runs").get("/sample/r?id=a-0")
    assert answer.status_code == 200
    assert answer.text.count(reason) == 1 + SEEDS
    assert reason in write_report(run.folder).read_text()
    assert pack([run.folder], tmp_path / "r.zip").path.is_file()
    assert not (tmp_path / "started").exists()


def test_a_small_file_of_a_huge_picture_costs_nothing(tmp_path):
    run = write(tmp_path / "r", seeds("images/a.png"))
    (run.folder / "images").mkdir()
    Image.new("1", (9400, 9400)).save(run.folder / "images" / "a.png")
    client = visitor(tmp_path)
    client.get("/")
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    answer = client.get("/sample/r?id=a-0")
    assert answer.text.count("image unreadable: too large: 88,360,000 pixels; the limit is 16,777,216") == 1 + SEEDS
    assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_one_file_is_decoded_once_for_all_rows_and_visitors(tmp_path, monkeypatch):
    decoded: list[int | None] = []
    original = pictures.decode

    def slow(*data: Any, side: int) -> Any:
        decoded.append(side)
        time.sleep(0.05)  # so that the others come while it is at work
        return original(*data, side=side)

    monkeypatch.setattr(pictures, "decode", slow)
    run = write(tmp_path / "r", seeds("images/a.webp"))
    (run.folder / "images").mkdir()
    Image.new("RGB", (64, 64), "red").save(run.folder / "images" / "a.webp")
    app = create_app(tmp_path)
    visits = [lambda: TestClient(app, base_url=LOOPBACK).get("/sample/r?id=a-0").text.count("<img")] * 16
    assert set(soon(*visits)) == {1 + SEEDS}
    assert sorted(decoded) == [128, 512], "once for each size that the page shows"


# Files that never end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["samples.jsonl", "samples-3.jsonl", "run.json", "thresholds.json", "images/a.webp"])
def test_a_pipe_stops_no_page(tmp_path, name):
    write(tmp_path / "sound", [row("b")])
    run = write(tmp_path / "r", seeds("images/a.webp"))
    (run.folder / "images").mkdir()
    (run.folder / name).unlink(missing_ok=True)
    os.mkfifo(run.folder / name)
    client = visitor(tmp_path)

    def look() -> list[int]:
        pages = ("/", "/run/r", "/sample/r?id=a-0", "/compare?run=r&run=sound", "/run/sound", "/sample/sound?id=b-0")
        answers = [client.get(address) for address in pages]
        assert all("<main" in answer.text for answer in answers), "a page with a sentence, and no bare error"
        return [answer.status_code for answer in answers]

    (statuses,) = soon(look)
    assert (statuses[0], *statuses[4:]) == (200, 200, 200)
    assert statuses[1:4] == {"images/a.webp": [200] * 3, "run.json": [404] * 3}.get(name, [500] * 3)


def test_rows_that_lie_elsewhere_are_not_read(tmp_path):
    elsewhere = write(tmp_path / "elsewhere", [row("private")])
    run = write(tmp_path / "runs" / "r", [row("b")])
    (run.folder / "samples-1.jsonl").symlink_to(elsewhere.folder / "samples.jsonl")
    client = visitor(tmp_path / "runs")
    for address in ("/", "/run/r", "/sample/r?id=private-0"):
        page = client.get(address).text
        assert "samples-1.jsonl cannot be read (it leads out of its folder)" in page
        assert "private" not in page.replace(address, "")


def test_a_slow_disk_keeps_nobody_else_waiting(tmp_path, monkeypatch):
    write(tmp_path / "slow", [row("a")])
    write(tmp_path / "sound", [row("b")])
    library, original, gate, entered = Library(tmp_path), reading.open_inside, threading.Event(), threading.Event()
    known = library.run("slow")
    write(tmp_path / "slow", [row("late")])

    def opened(folder: Path, name: str) -> Any:
        if folder.name == "slow":
            entered.set()
            assert gate.wait(PATIENCE)
        return original(folder, name)

    monkeypatch.setattr(reading, "open_inside", opened)
    waiting = threading.Thread(target=library.run, args=("slow",), daemon=True)
    waiting.start()
    assert entered.wait(PATIENCE)
    assert soon(lambda: library.run("sound").samples[0].prompt) == ["b"]
    assert soon(lambda: library.run("slow")) == [known], "while it is read: as it was a moment ago"
    gate.set()
    waiting.join(PATIENCE)
    assert {line.prompt for line in library.run("slow").samples} == {"a", "late"}


# Many at once -------------------------------------------------------------------------------------------------------------


def test_those_who_come_first_at_once_read_a_run_once(tmp_path, monkeypatch):
    read: list[bytes] = []
    original = reading.parse_json
    monkeypatch.setattr(reading, "parse_json", lambda raw: (read.append(raw), original(raw))[1])
    write(tmp_path / "r", [row(f"prompt {i}") for i in range(200)])
    library = Library(tmp_path)
    snapshots = soon(*[lambda: library.run("r")] * 16)
    assert all(snapshot is snapshots[0] for snapshot in snapshots)
    assert len(read) == 200


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_that_grows_while_many_read_it_stays_whole(tmp_path, replaced):
    write(tmp_path / "r", rows_of(0))
    library, done = Library(tmp_path), threading.Event()
    faults: list[str] = []

    def grow() -> None:
        try:
            for k in range(1, 25):
                if replaced and k % 8 == 0:  # begun anew under the readers' hands, with more rows than before
                    write_whole(
                        tmp_path / "r" / "samples.jsonl",
                        b"".join(r.model_dump_json().encode() + b"\n" for j in range(k) for r in rows_of(j)),
                    )
                write(tmp_path / "r", rows_of(k), shard=k % 3 or None)
        finally:
            done.set()

    def watch() -> None:
        while not done.is_set():
            snapshot = library.run("r")
            ids = [line.id for line in snapshot.samples]
            if len(set(ids)) != len(ids):
                faults.append("a sample is there twice")
            for line in snapshot.samples[-3:]:
                try:
                    found = library.sample("r", line.id)
                except RunError:  # "changed while it was read": said, not shown
                    continue
                if (found.prompt, found.seed) != (line.prompt, line.seed):
                    faults.append(f"{line.id} opened {found.id}")

    soon(grow, *[watch] * 6)
    assert not faults
    seen, fresh = library.run("r"), Library(tmp_path).run("r")
    facts = lambda lines: sorted((line.id, line.prompt, line.seeds, line.score, line.failed) for line in lines)  # noqa: E731
    assert facts(seen.samples) == facts(fresh.samples)
    assert facts(seen.prompts) == facts(fresh.prompts)
    assert {library.sample("r", line.id).id for line in seen.samples} == {line.id for line in seen.samples}


def rows_of(k: int) -> Sequence[Row]:
    return [row(f"prompt {k} {'x' * k}", seed=i, score=k + i / 10, id=f"{k}-{i}") for i in range(5)]


def test_a_reading_that_breaks_off_is_continued_where_it_was(tmp_path, monkeypatch):
    write(tmp_path / "r", [row(f"p{i}") for i in range(6)])
    library, taken = Library(tmp_path), []
    original = reading._Columns.take

    def breaking(columns: Any, *facts: Any) -> None:
        original(columns, *facts)
        taken.append(facts)
        if len(taken) == 3:
            raise OSError(5, "the disk fails")

    monkeypatch.setattr(reading._Columns, "take", breaking)
    with pytest.raises(OSError, match="the disk fails"):
        library.run("r")
    assert [line.prompt for line in library.run("r").samples] == [f"p{i}" for i in range(6)]
    assert [library.sample("r", f"p{i}-0").prompt for i in range(6)] == [f"p{i}" for i in range(6)]


def test_counts_of_many_visitors_are_right(tmp_path):
    write(tmp_path / "r", [row(f"p{i}") for i in range(50)])
    library = Library(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        entries = pool.map(lambda _: library.count_rows(library.runs().entries), range(32))
        assert {entry.rows for (entry,) in entries} == {50}
