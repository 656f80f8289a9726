"""The list of runs where there are many: in pages, read by stamp, seen at the next look; and pages of runs that are large in one way."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from small_runs import row, write
from starlette.testclient import TestClient
from test_app import Listed, get

from mnemoscope.errors import UnknownName
from mnemoscope.records.files import open_regular
from mnemoscope.records.schema import Score
from mnemoscope.web import listing, reading, runs
from mnemoscope.web.app import create_app
from mnemoscope.web.reading import Library

LOOPBACK = "http://127.0.0.1:7347"

MANY = 2 * listing.SIZE + 50


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch):
    """Runs are looked for again at once, however slow the machine is."""
    monkeypatch.setattr(reading, "REST", 0.0)


@pytest.fixture
def opened(monkeypatch) -> Iterator[list[str]]:
    """Names of all files of runs that are opened from now on."""
    names: list[str] = []

    def watched(path: str | Path) -> Any:
        names.append("/".join(Path(path).parts[-2:]))
        return open_regular(path)

    monkeypatch.setattr("mnemoscope.records.files.open_regular", watched)
    return names


def manifest(number: int, **facts: object) -> str:
    """What a run says about itself; the larger its number, the later it started."""
    started = f"2026-01-01T00:00:00.{number:06}+00:00"
    return json.dumps(
        {"status": "done", "asked": 1, "started": started, "target": {"name": f"model {number % 3}"}} | facts
    )


def place(folder: Path, number: int, **facts: object) -> Path:
    run = folder / f"run-{number:04}"
    run.mkdir(parents=True)
    (run / "run.json").write_text(manifest(number, **facts))
    (run / "samples.jsonl").write_text(row(f"prompt {number}").model_dump_json() + "\n")
    return run


def place_many(folder: Path) -> Path:
    for number in range(MANY):
        place(folder / f"day-{number % 2}", number)
    return folder


@pytest.fixture
def many(tmp_path) -> Path:
    """Many runs in two folders."""
    return place_many(tmp_path / "runs")


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> TestClient:
    """Who looks at such runs, which do not change."""
    return visitor(place_many(tmp_path_factory.mktemp("many") / "runs"))


def names(numbers: Iterator[int] | range) -> list[str]:
    return [f"day-{n % 2}/run-{n:04}" for n in numbers]


def visitor(folder: Path) -> TestClient:
    return TestClient(create_app(folder), base_url=LOOPBACK, raise_server_exceptions=False)


def version(page: Listed) -> str:
    return next(str(a["data-version"]) for tag, a in page.tags if tag == "main")


# Pages --------------------------------------------------------------------------------------------------------------------


def test_runs_are_shown_in_pages_the_newest_first(client):
    pages, address = [], "/"
    while address:
        pages.append(get(client, address))
        address = (pages[-1].link("next") or "").replace("?", "/?")
    assert [name for page in pages for name in page.lines] == names(reversed(range(MANY)))
    assert [len(page.lines) for page in pages] == [listing.SIZE, listing.SIZE, 50]
    assert "101–200 of 250 runs" in pages[1].text
    assert get(client, "/" + str(pages[2].link("prev"))).lines == pages[1].lines
    assert pages[0].link("prev") is None


@pytest.mark.parametrize(
    ("asked", "first"),
    [("1", 249), ("3", 49), ("0", 249), ("000000002", 149), ("4", 49), ("999999999", 49)],
)
def test_a_page_that_is_a_number_is_shown_or_the_nearest(client, asked, first):
    assert get(client, f"/?page={asked}").lines[0] == f"day-1/run-{first:04}"


@pytest.mark.parametrize("asked", ["-1", "x", "", "1.5", "1e3", "²", "٣", "9999999999", " 1", "1\x00", "<b>"])
def test_a_page_that_is_no_number_is_refused_in_a_sentence(client, asked):
    page = Listed((answer := client.get("/", params={"page": asked})).text)
    assert answer.status_code == 400
    assert "give a number from 1." in page.text


@pytest.mark.parametrize(
    ("asked", "numbers"),
    [("run-0007", [7]), ("DAY-1 model 2 run-000", [5]), ("done", range(249, 149, -1)), ("nothing", [])],
)
def test_runs_are_filtered_by_words(client, asked, numbers):
    page = Listed(client.get("/", params={"q": asked}).text)
    assert page.lines == names(iter(numbers))
    if page.lines and len(page.lines) < listing.SIZE:
        assert "that match, of 250" in page.text
    following = page.link("next")
    assert (following is None) == (len(page.lines) < listing.SIZE)
    assert following is None or "q=done" in following


def test_a_run_among_many_offers_no_list_of_all_others(client):
    page = client.get("/run/day-0/run-0000").text
    assert len(page) < 20_000
    assert "run-0077" not in page
    assert '<input name="run" required' in page
    assert client.get("/compare?run=day-0/run-0000&run=day-1/run-0077").status_code == 200
    assert client.get("/compare?run=day-0/run-0000&run=day-1/run-9").status_code == 404


def test_a_name_that_is_wrong_is_not_answered_with_all_names(many):
    with pytest.raises(UnknownName) as caught:
        Library(many).run("day-1/run-00777")
    assert "Did you mean 'day-1/run-0" in str(caught.value)
    assert str(caught.value).endswith("and 200 more.")
    assert len(str(caught.value)) < 1500


# By stamp -----------------------------------------------------------------------------------------------------------------


def test_what_did_not_change_is_not_read_again(many, opened):
    client = visitor(many)
    first = get(client, "/")
    assert sorted(name for name in opened if name.endswith("run.json")) == [f"run-{n:04}/run.json" for n in range(MANY)]
    assert len(opened) == MANY + listing.SIZE, "rows are counted of the runs on the page"
    opened.clear()
    assert get(client, "/").lines == first.lines
    assert client.get(f"/?seen={version(first)}").status_code == 204
    assert opened == []
    get(client, "/?page=2")
    assert len(opened) == listing.SIZE


def test_a_poll_of_a_run_reads_nothing(many, opened):
    client = visitor(many)
    page = get(client, "/run/day-0/run-0000")
    opened.clear()
    assert client.get(f"/run/day-0/run-0000?seen={version(page)}").status_code == 204
    assert opened == []


def changed_status(folder: Path) -> None:
    (folder / "run.json").write_text(manifest(MANY - 1, status="running"))


def changed_but_for_size_and_time(folder: Path) -> None:
    facts = (folder / "run.json").stat()
    new = folder / "new"
    new.write_text(manifest(MANY - 1, target={"name": "Model 0"}))
    os.utime(new, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    new.replace(folder / "run.json")


def grown(folder: Path) -> None:
    write(folder, [row("late")])


def led_out(folder: Path) -> None:
    elsewhere = folder.parent.parent.parent / "elsewhere.jsonl"
    elsewhere.write_text("{}\n")
    (folder / "samples-1.jsonl").symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed_status, "running"),
        (changed_but_for_size_and_time, "Model 0"),
        (grown, "2"),
        (led_out, "samples-1.jsonl cannot be read (it leads out of its folder)"),
    ],
)
def test_a_run_that_changed_is_seen_at_the_next_look(many, opened, change, words):
    client = visitor(many)
    before = get(client, "/")
    opened.clear()
    folder = many / "day-1" / f"run-{MANY - 1:04}"
    change(folder)
    opened.clear()
    answer = client.get(f"/?seen={version(before)}")
    assert answer.status_code == 200
    assert any(words in text for text in Listed(answer.text).words)
    assert {name.partition("/")[0] for name in opened} <= {folder.name}, "the others are not read again"


def test_a_run_that_breaks_is_a_row_with_a_reason_until_it_is_mended(many):
    folder = many / "day-1" / f"run-{MANY - 1:04}"
    client = visitor(many)
    assert len(get(client, "/?page=3").lines) == 50
    (folder / "run.json").write_text("{")
    last = get(client, "/?page=3")
    assert len(last.lines) == 49
    assert f"{folder.name}/run.json cannot be read" in last.text
    (folder / "run.json").write_text(manifest(MANY - 1))
    assert get(client, "/").lines[0] == f"day-1/{folder.name}"


def test_runs_that_appear_and_disappear_are_seen_at_the_next_look(many):
    client = visitor(many)
    seen = version(get(client, "/"))
    place(many / "day-0", MANY)
    page = Listed(client.get(f"/?seen={seen}").text)
    assert page.lines[0] == f"day-0/run-{MANY:04}"
    (many / "day-0" / f"run-{MANY:04}").rename(many.parent / "gone")
    assert get(client, "/").lines == names(range(MANY - 1, MANY - 1 - listing.SIZE, -1))
    assert client.get(f"/?seen={seen}").status_code == 204, "everything is as it was"
    assert client.get(f"/run/day-0/run-{MANY:04}").status_code in (404, 500)


def test_many_who_come_first_read_every_manifest_once(many, opened):
    library, answers = Library(many), []
    threads = [
        Thread(target=lambda: answers.append(library.count_rows(library.runs().entries[:10]))) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 16
    assert all(answer == answers[0] for answer in answers)
    assert len([name for name in opened if name.endswith("run.json")]) == MANY


def test_looking_often_takes_no_more_memory(tmp_path):
    for number in range(20):
        place(tmp_path, number)
    library = Library(tmp_path)
    library.count_rows(library.runs().entries)
    tracemalloc.start()
    try:
        for _ in range(3):
            library.count_rows(library.runs().entries)
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(10):
            library.count_rows(library.runs().entries)
        assert tracemalloc.get_traced_memory()[0] - before < 20_000
    finally:
        tracemalloc.stop()


def test_the_list_keeps_of_a_manifest_what_it_shows(tmp_path):
    for number in range(4):
        place(tmp_path, number, config={"a": "x" * 20_000}, target={"name": "n" * 20_000}, notes=["w" * 20_000])
    library = Library(tmp_path)
    library.runs()
    tracemalloc.start()
    try:
        library._memory = {}
        entries = library.runs().entries
        assert tracemalloc.get_traced_memory()[0] < 4 * 20_000
    finally:
        tracemalloc.stop()
    assert {len(entry.model) for entry in entries} == {runs.LONGEST}


# Folders ------------------------------------------------------------------------------------------------------------------


def test_runs_are_looked_for_so_deep_and_no_deeper(tmp_path):
    deep = tmp_path
    for depth in range(1, runs.DEPTH + 2):
        deep = deep / f"level-{depth}"
        place(deep.parent, depth)
    place(deep, 99)
    (tmp_path / "level-1" / "circle").symlink_to(tmp_path, target_is_directory=True)
    place(tmp_path / ".hidden", 50)
    shown = {name.rpartition("/")[2] for name in Library(tmp_path).names()}
    assert shown == {f"run-{depth:04}" for depth in range(1, runs.DEPTH + 1)}


def test_a_folder_with_too_much_in_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "MOST_NAMES", 30)
    place(tmp_path, 1)
    for number in range(40):
        (tmp_path / "pictures" / f"{number}").mkdir(parents=True)
    page = get(visitor(tmp_path), "/")
    assert page.lines == ["run-0001"]
    assert "There is too much in this folder" in page.text
    monkeypatch.setattr(runs, "MOST_NAMES", 300)
    assert "too much" not in get(visitor(tmp_path), "/").text


@pytest.mark.skipif(os.name != "posix", reason="names that are bytes")
def test_a_folder_whose_name_is_no_text_is_a_row_with_a_reason(tmp_path):
    place(tmp_path, 1)
    try:
        place(tmp_path, 2).rename(os.fsdecode(os.fsencode(tmp_path) + b"/name-\xff"))
    except OSError:
        pytest.skip("this disk takes text only")
    page = get(visitor(tmp_path), "/")
    assert page.lines == ["run-0001"]
    assert "The name of this folder is no text" in page.text
    assert "name-\ufffd" in page.text


# Runs that are large in one way -------------------------------------------------------------------------------------------

LARGE = 500


def with_groups(folder: Path) -> None:
    write(folder, [row(f"prompt {i}", group=f"group {i} {'x' * 900}") for i in range(LARGE)])


def with_endless_names(folder: Path) -> None:
    write(folder, [row("a", group="g" * 200_000, prompt_id="i" * 200_000, seed=i) for i in range(4)])


def with_endless_ids(folder: Path) -> None:
    write(folder, [row("a"), *[row("b", id=f"{i}" * 100_000) for i in range(4)], row("c")])


def with_damage(folder: Path) -> None:
    write(folder, [row("a")])
    with (folder / "samples.jsonl").open("a") as file:
        file.write("{}\n" * LARGE)
        file.write(row("b").model_dump_json() + "\n")


def with_notes(folder: Path) -> None:
    write(folder, [row("a")], notes=["word " * 200] * LARGE, command="c" * 500_000, config={"a": ["x" * 2000] * LARGE})


def with_settings(folder: Path) -> None:
    write(folder, [row("a")], setting={f"k{i}": i for i in range(LARGE)})


def with_scores(folder: Path) -> None:
    write(folder, [row("a", scores={f"d{i}": Score(value=1.0, space="eps") for i in range(LARGE)})])


def with_steps(folder: Path) -> None:
    score = Score(value=1.0, space="eps", per_step=[1.0] * 30_000)
    write(folder, [row("a", seed=i, scores={"magnitude": score}) for i in range(3)])


def with_words(folder: Path) -> None:
    write(folder, [row("w" * 500_000, id="a", error="e" * 500_000, note="n" * 500_000, status="error", scores={})])


def with_seeds(folder: Path) -> None:
    write(folder, [row("a", seed=i) for i in range(LARGE)])


@pytest.mark.parametrize(
    "make",
    [
        with_groups, with_endless_names, with_endless_ids, with_damage, with_notes, with_settings, with_scores, with_steps, with_words,
        with_seeds,
    ],
)  # fmt: skip
def test_every_page_of_a_large_run_is_of_bounded_size(tmp_path, make: Callable[[Path], None]):
    make(tmp_path / "r")
    write(tmp_path / "s", [row("a")], setting={"steps": 50})
    client = visitor(tmp_path)
    addresses = ["/", "/run/r", "/run/r?by=sample", "/compare?run=r&run=s", "/compare?run=r&run=r"]
    sample = get(client, "/run/r").opens[0]
    pair = get(client, "/compare?run=r&run=r").opens[0]
    for address in [*addresses, sample, pair]:
        answer = client.get(address)
        assert answer.status_code == 200, address[:200]
        assert len(answer.content) < 250_000, address[:200]


@pytest.mark.parametrize(
    ("make", "address", "words"),
    [
        (with_damage, "/run/r", "and 400 more damaged lines"),
        (with_notes, "/run/r", "more notes"),
        (with_settings, "/compare?run=r&run=s", "and 400 more differences"),
        (with_scores, "/sample/r?id=a-0", "and 400 more scores"),
        (with_steps, "/sample/r?id=a-0", "The first 1,000 of 30,000 steps."),
        (with_seeds, "/sample/r?id=a-0", "The first 24 of 500."),
        (with_groups, "/run/r", "name of a group"),
        (with_endless_ids, "/run/r", "Line 2 of"),
    ],
)
def test_what_is_left_out_of_a_page_is_said(tmp_path, make, address, words):
    make(tmp_path / "r")
    write(tmp_path / "s", [row("a")])
    assert words in visitor(tmp_path).get(address).text


def test_damaged_lines_at_the_end_are_named_but_for_the_last(tmp_path):
    run = write(tmp_path / "r", [row("a")])
    library = Library(tmp_path)
    with (run.folder / "samples.jsonl").open("a") as file:
        file.write("{}\n{}\n{}\n")
    for _ in range(2):
        assert library.run("r").losses == 2, "the last one may be torn"
    write(tmp_path / "r", [row("b")], shard=1)
    assert library.run("r").losses == 2
    with (run.folder / "samples.jsonl").open("a") as file:
        file.write(row("c").model_dump_json() + "\n")
    assert [s.split(" of ")[0] for s in library.run("r").damaged] == ["Line 2", "Line 3", "Line 4"]
