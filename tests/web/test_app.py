"""The pages without a browser: the report's numbers, live, filtered, sorted, compared; nobody else looks, and nothing runs."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tracemalloc
import urllib.request
from html import unescape
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
import typer
from parsed import Parsed
from PIL import Image
from small_runs import HOSTILE, row, write, write_hostile
from starlette.testclient import TestClient
from synthetic_run import make_run

from mnemoscope.cli.view import view
from mnemoscope.errors import RunError, UnknownName, UsageError
from mnemoscope.records.schema import Row
from mnemoscope.records.store import Run
from mnemoscope.report.summary import Summary, read_summary
from mnemoscope.web import listing, reading
from mnemoscope.web.app import create_app
from mnemoscope.web.listing import Query
from mnemoscope.web.reading import Library

LOOPBACK = "http://127.0.0.1:7347"


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch):
    """A run that grows is read again at once, however slow the machine is."""
    monkeypatch.setattr(reading, "REST", 0.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two runs that differ in one prompt, in whether pictures were kept, and in where they lie."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "first", labels=True)
    make_run(folder / "more" / "second", prompts={0: "a prompt of its own"}, pictures=False, seeds=2)
    return folder


@pytest.fixture(scope="module")
def report(runs) -> Summary:
    return read_summary(runs / "first")


@pytest.fixture(scope="module")
def client(runs) -> TestClient:
    return TestClient(create_app(runs), base_url=LOOPBACK)


class Listed(Parsed):
    """Which knows the lines of its list."""

    @property
    def lines(self) -> list[str]:
        return [str(a["data-key"]) for tag, a in self.tags if tag == "a" and a.get("class") == "open"]

    @property
    def opens(self) -> list[str]:
        return [str(a["href"]) for tag, a in self.tags if tag == "a" and a.get("class") == "open"]

    def link(self, relation: str) -> str | None:
        return next((a["href"] for tag, a in self.tags if tag == "a" and a.get("rel") == relation), None)


def get(client: TestClient, address: str, status: int = 200) -> Listed:
    answer = client.get(address)
    assert answer.status_code == status, answer.text
    return Listed(answer.text)


# Numbers ------------------------------------------------------------------------------------------------------------------


def test_a_run_says_what_its_report_says(runs, report):
    seen = Library(runs).run("first").summary
    assert (seen.headline, seen.subline, seen.seeds, seen.rows) == (
        report.headline,
        report.subline,
        report.seeds,
        report.rows,
    )
    assert [f.words for f in seen.figures] == [f.words for f in report.figures]
    assert seen.groups == report.groups
    for one, other in zip(seen.findings, report.findings, strict=True):
        assert one.to_dict() | {"label": None, "nearest": None} == other.to_dict() | {"label": None, "nearest": None}
    assert set(seen.untested) <= set(report.untested)


def test_pages_lead_from_runs_to_a_sample(client, report):
    home = get(client, "/")
    assert home.lines == ["first", "more/second"]
    run = get(client, home.opens[0])
    assert report.headline.replace(" %", "\u00a0%") in " ".join(run.words)
    assert len(run.lines) == len(report.findings) == 72
    sample = get(client, run.opens[0])
    worst = report.findings[0]
    assert worst.prompt in sample.text
    assert worst.copy_words in sample.text.replace("\u00a0", " ")
    assert worst.score_words in sample.text.replace("\u00a0", " ")
    assert f"seed {worst.shots[0].seed}" in sample.text
    assert sample.link(
        "up",
    ).startswith("/run/first")
    assert get(client, sample.link("up")).lines == run.lines


def test_pictures_are_blurred_until_clicked_and_carry_no_metadata(client):
    page = client.get(get(client, "/run/first").opens[0]).text
    covered = re.findall(r'<label class="shade.*?</label>', page, re.S)
    pictures = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    assert len(pictures) == 6  # the pair, and the four seeds
    assert sum(len(re.findall("<img", c)) for c in covered) == len(re.findall("<img", page)) == 6
    assert all('type="checkbox"' in c and "checked" not in c for c in covered)
    for data in pictures:
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.format == "WEBP"
            assert not image.getexif()
    style = client.get("/style.css").text
    assert re.search(r"\.shade img\{filter:blur\(\d+px\)", style)
    assert ".shade:hover" not in style


def test_a_sample_shows_its_seeds_steps_and_record(client, runs):
    stored = next(Run(runs / "first").rows())
    page = get(client, "/sample/first?" + urlencode({"id": stored.id}))
    seeds = [r for r in Run(runs / "first").rows() if r.prompt == stored.prompt]
    assert all(f"id={r.id}" in " ".join(str(a.get("href")) for _, a in page.tags) for r in seeds)
    assert any(tag == "polyline" for tag, _ in page.tags)
    record = json.loads(next(w for w in page.words if w.startswith("{\n")))
    assert Row.model_validate(record) == stored


def test_a_failed_sample_says_why(client, runs):
    failed = [r for r in Run(runs / "first").rows() if r.status == "error"]
    page = get(client, "/sample/first?" + urlencode({"id": failed[0].id}))
    assert f"this seed failed: {failed[0].error}" in page.text


def test_a_run_folder_itself_can_be_viewed(runs):
    client = TestClient(create_app(runs / "first"), base_url=LOOPBACK)
    assert get(client, "/").lines == ["first"]
    get(client, "/run/first")


def test_broken_runs_are_listed_with_their_sentence(tmp_path):
    write(tmp_path / "fine", [row("a")])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    client = TestClient(create_app(tmp_path), base_url=LOOPBACK)
    home = get(client, "/")
    with pytest.raises(RunError) as caught:
        Run(tmp_path / "broken")
    assert home.lines == ["fine"]
    assert str(caught.value) in home.text
    assert str(caught.value) in get(client, "/run/broken", 500).text


def test_an_empty_folder_waits_for_its_first_run(tmp_path):
    client = TestClient(create_app(tmp_path), base_url=LOOPBACK)
    assert "mnemoscope demo" in get(client, "/").text
    write(tmp_path / "new", [])
    assert get(client, "/").lines == ["new"]
    assert "0 prompts" in get(client, "/run/new").text


# Filtering and sorting ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def snapshot(runs) -> reading.Snapshot:
    return Library(runs).run("first")


def ids(page: listing.Page) -> list[str]:
    return [line.id for line in page.lines]


def test_filters_keep_what_they_name(snapshot):
    def matching(**asked):
        return listing.listed(snapshot, Query(**asked)).lines

    everything = matching()
    assert len(everything) == len(snapshot.prompts)
    assert {line.group for line in matching(group="planted ×8")} == {"planted ×8"}
    red = matching(q="RED drawn")
    assert red
    assert {line.prompt for line in red} == {line.prompt for line in everything if "red" in line.prompt}
    assert [line.id for line in matching(q=everything[3].id)] == [everything[3].id]
    copies, above = matching(show="copies"), matching(show="above")
    assert {line.id for line in copies} == {line.id for line in everything if line.copies}
    assert {line.id for line in above} == {line.id for line in everything if line.above}
    assert 0 < len(copies) < len(everything)
    assert [line.failed for line in matching(show="failed")] == [1]
    assert matching(q="no such words") == []


@pytest.mark.parametrize("sort", [*listing.SORT, *(f"-{name}" for name in listing.SORT)])
@pytest.mark.parametrize("by", ["prompt", "sample"])
def test_orders_lose_nothing_and_put_missing_values_last(snapshot, by, sort):
    lines = snapshot.prompts if by == "prompt" else snapshot.samples
    pages = [listing.listed(snapshot, Query(by=by, sort=sort, page=n)) for n in (1, 2, 3)]
    together = [line for page in pages[: pages[0].pages] for line in page.lines]
    assert sorted(line.id for line in together) == sorted(line.id for line in lines)
    value = {"score": lambda line: line.score, "nearest": lambda line: line.similarity}.get(sort.lstrip("-"))
    if value is not None:
        values = [value(line) for line in together]
        known = [v for v in values if v is not None]
        assert values[: len(known)] == sorted(known, reverse=not sort.startswith("-"))


def test_worst_is_the_order_of_the_report(snapshot, report):
    shown = listing.listed(snapshot, Query()).lines
    assert [line.prompt for line in shown] == [f.prompt for f in report.findings]


def test_pages_are_cut_and_a_number_beyond_the_last_is_the_last(snapshot):
    first, last = (listing.listed(snapshot, Query(by="sample", page=n)) for n in (1, 999))
    assert (len(first.lines), first.pages, first.matching, first.first) == (100, 3, 288, 1)
    assert (last.number, len(last.lines), last.first) == (3, 88, 201)


def test_neighbors_follow_the_filtered_list(client):
    address = "/run/first?" + urlencode({"q": "red", "sort": "-score"})
    run = get(client, address)
    sample = get(client, run.opens[1])
    assert sample.link("prev") == run.opens[0]
    assert sample.link("next") == run.opens[2]
    assert get(client, run.opens[0]).link("prev") is None
    # Back up is the same list, at the line that one came from.
    up, _, line = str(sample.link("up")).partition("#")
    assert get(client, up).lines == run.lines
    assert line == run.lines[1]


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        ("/run/firts", 404, "no run named 'firts'. Did you mean 'first'?"),
        ("/run/first?sort=scor", 404, "Did you mean 'score'?"),
        ("/run/first?show=cpies", 404, "Did you mean 'copies'?"),
        ("/run/first?by=seed", 404, "no unit named 'seed'"),
        ("/run/first?page=0x1", 400, "page = '0x1': give a number from 1."),
        ("/sample/first?id=nothing", 404, "no sample in first named 'nothing'."),
        ("/sample/first", 404, "no sample in first named ''."),
        ("/compare?run=first", 400, "1 runs were named; mark the two that should be compared."),
        ("/pair?run=first&run=first", 400, "0 samples were named"),
        ("/nowhere", 404, "there is no page /nowhere"),
    ],
)
def test_errors_are_sentences(client, asked, status, said):
    page = get(client, asked, status)
    assert said in page.text
    assert "Traceback" not in page.text


# Two runs -----------------------------------------------------------------------------------------------------------------


def test_two_runs_are_compared_prompt_by_prompt(tmp_path):
    write(
        tmp_path / "a",
        [row("same", similarity=0.95), row("gone"), row("other id", prompt_id="1", similarity=0.1)],
        setting={"steps": 50},
    )
    write(
        tmp_path / "b",
        [row("same", similarity=0.2), row("new"), row("other id", prompt_id="2", similarity=0.1)],
        setting={"steps": 20},
    )
    library = Library(tmp_path)
    page = listing.compared(library.run("a"), library.run("b"), Query())
    found = {pair.either.prompt: pair for pair in page.lines}
    assert found.keys() == {"same", "gone", "new", "other id"}
    assert page.lines[0].either.prompt == "same"
    assert [found[p].changed for p in ("same", "gone", "new", "other id")] == [True, False, False, False]
    assert found["gone"].b is None
    assert found["new"].a is None
    assert found["other id"].a is not None
    assert found["other id"].b is not None
    counts = {
        show: listing.compared(library.run("a"), library.run("b"), Query(show=show)).matching
        for show in listing.SHOW_PAIRS
    }
    assert counts == {"all": 4, "changed": 1, "both": 2, "only the first": 1, "only the second": 1}
    client = TestClient(create_app(tmp_path), base_url=LOOPBACK)
    page = get(client, "/compare?run=a&run=b")
    assert "steps: was 50, now 20" in page.text
    for address in page.opens:
        opened = get(client, address)
        assert "First" in opened.text
        assert get(client, opened.link("up")).lines == page.lines
    assert "This run does not have the prompt." in get(client, page.opens[page.lines.index("new-0".rjust(6))]).text


@pytest.mark.parametrize("sort", [*listing.SORT_PAIRS, *(f"-{name}" for name in listing.SORT_PAIRS)])
def test_orders_of_pairs_lose_nothing(client, runs, sort):
    page = get(client, "/compare?" + urlencode([("run", "first"), ("run", "more/second"), ("sort", sort)]))
    assert len(page.lines) == len(set(page.lines)) == 73
    assert page.text.count("only in the first") == 1
    assert page.text.count("only in the second") == 1


# Live ---------------------------------------------------------------------------------------------------------------------


def test_only_what_was_appended_is_read(tmp_path, monkeypatch):
    read: list[bytes] = []
    original = reading.parse_json
    monkeypatch.setattr(reading, "parse_json", lambda raw: (read.append(raw), original(raw))[1])
    write(tmp_path / "r", [row(f"prompt {i}") for i in range(5)])
    library = Library(tmp_path)
    library.run("r")
    assert len(read) == 5
    library.run("r")
    assert len(read) == 5
    write(tmp_path / "r", [row("late"), row("later")])
    assert {line.prompt for line in library.run("r").prompts} == {*(f"prompt {i}" for i in range(5)), "late", "later"}
    assert len(read) == 7


def test_a_page_that_has_seen_everything_gets_nothing(tmp_path):
    write(tmp_path / "r", [row("a")])
    client = TestClient(create_app(tmp_path), base_url=LOOPBACK)
    for address in ("/", "/run/r", "/compare?run=r&run=r"):
        version = next(a["data-version"] for tag, a in get(client, address).tags if tag == "main")
        seen = address + ("&" if "?" in address else "?") + f"seen={version}"
        assert client.get(seen).status_code == 204
        write(tmp_path / "r", [row(f"new for {address}")])
        assert client.get(seen).status_code == 200
    assert get(client, "/run/r").text.count("new for") >= 3


def test_a_running_audit_is_looked_at_often(tmp_path):
    run = write(tmp_path / "r", [row("a")])
    client = TestClient(create_app(tmp_path), base_url=LOOPBACK)
    every = lambda: int(next(a["data-every"] for tag, a in get(client, "/run/r").tags if tag == "main"))  # noqa: E731
    assert every() == 2000
    assert "This run is running: 1 of 100 samples are there." in get(client, "/run/r").text
    run.update(status="done")
    assert every() == 10000


def test_a_torn_line_waits_until_it_is_whole(tmp_path):
    run = write(tmp_path / "r", [row("a")])
    library = Library(tmp_path)
    line = (row("b").model_dump_json(exclude_none=True) + "\n").encode()
    with (run.folder / "samples.jsonl").open("ab") as file:
        file.write(line[:40])
    assert [p.prompt for p in library.run("r").prompts] == ["a"]
    assert library.run("r").damaged == ()
    with (run.folder / "samples.jsonl").open("ab") as file:
        file.write(line[40:])
    assert {p.prompt for p in library.run("r").prompts} == {"a", "b"}


def test_a_torn_line_that_the_next_writer_cuts_off_is_forgotten(tmp_path):
    run = write(tmp_path / "r", [row("a")])
    library = Library(tmp_path)
    with (run.folder / "samples.jsonl").open("ab") as file:
        file.write(b'{"id": "half')
    library.run("r")
    write(run.folder, [row("b")])
    assert {p.prompt for p in library.run("r").prompts} == {"a", "b"}
    assert library.run("r").damaged == ()


def test_a_damaged_line_is_named_and_the_others_are_shown(tmp_path):
    run = write(tmp_path / "r", [row("a")])
    with (run.folder / "samples.jsonl").open("ab") as file:
        file.write(b'{"id": 7}\n')
    library = Library(tmp_path)
    assert library.run("r").damaged == ()  # nothing follows it: a kill may leave that behind
    with (run.folder / "samples.jsonl").open("ab") as file:
        file.write((row("b").model_dump_json() + "\n").encode())
    found = library.run("r")
    assert {p.prompt for p in found.prompts} == {"a", "b"}
    assert [re.findall(r"Line (\d+) of .*samples.jsonl is damaged", s) for s in found.damaged] == [["2"]]
    assert found.damaged[0] in get(TestClient(create_app(tmp_path), base_url=LOOPBACK), "/run/r").text


def test_a_second_attempt_replaces_a_failed_one_and_never_a_good_one(tmp_path):
    failed = row("a", status="error", scores={}, error="ModelFault: NaN")
    write(tmp_path / "r", [failed])
    library = Library(tmp_path)
    assert [(s.failed, s.score) for s in library.run("r").samples] == [(1, None)]
    write(tmp_path / "r", [row("a", score=2.0)])
    write(tmp_path / "r", [row("a", score=3.0), failed])
    assert [(s.failed, s.score) for s in library.run("r").samples] == [(0, 2.0)]
    assert library.sample("r", "a-0").scores["magnitude"].value == 2.0


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    run = write(tmp_path / "r", [row("a"), row("b")])
    library = Library(tmp_path)
    library.run("r")
    path = run.folder / "samples.jsonl"
    # In place and longer, so that neither the inode nor the size gives it away.
    path.write_text("".join(row(f"c{i}").model_dump_json() + "\n" for i in range(9)))
    assert {p.prompt for p in library.run("r").prompts} == {f"c{i}" for i in range(9)}
    path.unlink()
    assert library.run("r").prompts == []


def test_shards_that_grow_at_once_become_one_run(tmp_path):
    library = None
    for n in range(3):
        for shard in (0, 1):
            write(tmp_path / "r", [row(f"p{n}", seed=shard)], shard=shard)
            library = library or Library(tmp_path)
            library.run("r")
    assert library is not None
    found = library.run("r")
    assert {(p.prompt, p.seeds) for p in found.prompts} == {("p0", 2), ("p1", 2), ("p2", 2)}
    assert library.sample("r", "p2-1").seed == 1


def test_a_growing_run_is_not_summarized_more_often_than_it_is_worth(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "REST", 1e6)
    write(tmp_path / "r", [row("a")])
    library = Library(tmp_path)
    first = library.run("r")
    write(tmp_path / "r", [row("b")])
    assert library.run("r") is first


def test_memory_holds_no_per_step_values(tmp_path):
    def held(name: str, steps: int) -> int:
        scores = {"magnitude": {"value": 1.0, "space": "eps", "per_step": [0.123456789] * steps}}
        write(tmp_path / name, [row(f"prompt {i}", scores=scores) for i in range(60)])
        tracemalloc.start()
        library = Library(tmp_path)
        library.run(name)
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return size

    held("warm", 1)
    few, many = held("few", 1), held("many", 400)
    assert many < 1.2 * few + 20_000  # the values themselves would take a megabyte


def test_only_a_few_runs_stay_in_memory(tmp_path):
    library = Library(tmp_path)
    for i in range(reading.KEPT + 3):
        write(tmp_path / f"r{i}", [row("a")])
        library.run(f"r{i}")
    assert list(library._readers) == [f"r{i}" for i in range(3, reading.KEPT + 3)]


# Who may look -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "localhost:9000", "LOCALHOST:7347", "[::1]:7347", "[::1]"])
def test_this_machine_is_answered(client, host):
    assert client.get("/", headers={"host": host}).status_code == 200


STRANGERS = [
    *(
        "evil.example",
        "evil.example:7347",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "localhost@evil.example",
    ),
    *("10.0.0.1", "[::1", "a:b:c", "localhost:", ""),
]


@pytest.mark.parametrize("host", STRANGERS)
def test_a_name_that_is_not_ours_is_refused(client, host):
    answer = client.get("/run/first", headers={"host": host})
    assert answer.status_code == 421
    assert "first" not in answer.text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_there_is_nothing_to_change(client, method):
    assert client.request(method, "/").status_code == 405


@pytest.mark.parametrize(
    "address", ["/", "/run/first", "/nowhere", "/style.css", "/view.js", "/run/first?page=x", "/compare?run=first&run=first"]
)  # fmt: skip
def test_every_answer_forbids_what_no_page_needs(client, address):
    headers = client.get(address).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "data:"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in headers


def test_pages_ask_nobody_else(client):
    for address in ("/", "/run/first", get(client, "/run/first").opens[0], "/compare?run=first&run=first"):
        for tag, attributes in get(client, address).tags:
            for name in ("src", "href", "action"):
                value = attributes.get(name)
                assert value is None or value.startswith(("/", "?", "#", "data:")), (tag, value)
                assert not str(value).startswith("//")
    assert not re.search(r"https?://|//[a-z]|@import|url\(", client.get("/style.css").text)
    assert not re.search(r"https?://|eval\(|innerHTML", client.get("/view.js").text)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", ""])
def test_others_need_a_token(runs, host):
    with pytest.raises(UsageError, match="MNEMOSCOPE_VIEW_TOKEN"):
        create_app(runs, host=host)
    with pytest.raises(UsageError, match="the token is empty"):
        create_app(runs, host=host, token=" ")
    with pytest.raises(UsageError, match="the token has bytes that are no UTF-8"):
        create_app(runs, host=host, token="\udcff")
    create_app(runs, host=host, token="a-long-word")


@pytest.fixture
def guarded(runs) -> TestClient:
    app = create_app(runs, host="0.0.0.0", token="tres-secret")
    return TestClient(app, base_url="http://192.168.0.7:7347", follow_redirects=False)


@pytest.mark.parametrize(
    "address", ["/", "/run/first", "/style.css", "/view.js", "/nowhere", "/?token=", "/?token=tres-secres"]
)
def test_without_the_token_nothing_is_shown(guarded, address):
    answer = guarded.get(address)
    assert answer.status_code == 401
    assert "token" in answer.text
    assert "first" not in answer.text
    assert guarded.get(address, headers={"authorization": "Bearer wrong"}).status_code == 401
    assert guarded.get(address, headers={"cookie": "mnemoscope-view=tres-secret"}).status_code == 401


def test_the_token_opens_once_and_stays_in_no_address(guarded):
    answer = guarded.get("/run/first", params={"token": "tres-secret", "q": "red & blue"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/run/first?q=red+%26+blue")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=lax" in cookie.lower()
    assert "secret" not in cookie
    assert guarded.get(answer.headers["location"]).status_code == 200


def test_the_token_may_be_a_bearer(guarded, runs):
    assert guarded.get("/", headers={"authorization": "Bearer tres-secret"}).status_code == 200
    # On loopback a token may be asked for as well: other people have accounts on this machine.
    here = TestClient(create_app(runs, token="word"), base_url=LOOPBACK)
    assert here.get("/").status_code == 401
    assert here.get("/", headers={"authorization": "bearer word"}).status_code == 200


def test_the_way_in_leads_to_no_other_host(guarded):
    answer = guarded.get("http://192.168.0.7:7347//evil.example/", params={"token": "tres-secret"})
    assert answer.headers["location"].startswith("/evil.example")


def test_with_a_token_a_strange_name_is_still_refused(guarded):
    assert guarded.get("/?token=tres-secret", headers={"host": "evil.example"}).status_code == 421


# Hostile runs -------------------------------------------------------------------------------------------------------------


OURS = set(
    """html head meta title link script body nav span a bdi button kbd main h1 h2 p div dl dt dd section form label input select
    option table thead tbody tr th td small ul li details summary pre code article figure img figcaption footer dialog progress br
    svg g rect line polyline polygon circle path text desc""".split()  # noqa: SIM905 (a wall of quotes is no clearer)
)
"""Every element that our templates use; anything else came in through a run."""


def hostile_pages(client: TestClient) -> dict[str, Listed]:
    """Every page that can be reached from the first, and one that is asked for hostile things."""
    home = get(client, "/")
    run = get(client, home.opens[0])
    pages = {"/": home, home.opens[0]: run, "by sample": get(client, home.opens[0] + "?by=sample")}
    for address in [*run.opens, *pages["by sample"].opens]:
        pages[address] = get(client, address)
    name = home.lines[0]
    compared = get(client, "/compare?" + urlencode([("run", name), ("run", name)]))
    pages |= {"compare": compared, "pair": get(client, compared.opens[0])}
    for text in HOSTILE.values():
        asked = urlencode({"q": text[:500], "group": text[:500]})
        pages[asked] = get(client, f"{home.opens[0]}?{asked}")
        pages["missing" + asked] = get(client, "/run/" + (quote(text[:200]) or "x"), 404)
        pages["sort" + asked] = get(client, f"{home.opens[0]}?" + urlencode({"sort": text[:500] or "x"}), 404)
    return pages


def test_hostile_text_stays_text(tmp_path):
    write_hostile(tmp_path)
    client = TestClient(create_app(tmp_path), base_url=LOOPBACK)
    pages = hostile_pages(client)
    assert len(pages) > 40
    for address, page in pages.items():
        for tag, attributes in page.tags:
            assert tag in OURS, (address, tag)
            assert not [name for name in attributes if name.startswith("on")], (address, attributes)
            assert not str(attributes.get("href", "")).startswith(("javascript:", "//", "http")), (address, attributes)
            assert "style" not in attributes
        assert [a for tag, a in page.tags if tag == "script"] == [{"src": "/view.js", "defer": None}]
        assert "\u202e" not in page.text
        assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f]", "".join(page.words)), address
    shown = get(client, get(client, "/").opens[0]).text
    assert HOSTILE["tag"] in shown
    assert HOSTILE["template"] in shown


OUTWARD = [
    *("/run/%2e%2e/%2e%2e/etc/passwd", "/run/..%2f..%2fetc", "/run//etc/passwd", "/run/%00", "/run/first/images"),
    *("/sample/..%2f..%2fetc?id=passwd", "/sample/first?id=..%2f..%2fetc%2fpasswd", "/sample/first?id=%00"),
    *("/../../etc/passwd", "/..%2f..%2fetc%2fpasswd", "/style.css/../../app.py", "/%2e%2e/app.py", "/page.html.jinja"),
    *("/compare?run=..&run=../..", "/pair?run=first&run=first&id=../x&id=", "/run/first%2fimages"),
]


@pytest.mark.parametrize("address", OUTWARD)
def test_no_path_leads_out(client, address):
    answer = client.get(address)
    assert answer.status_code in (400, 404), answer.text[:300]
    assert "root:" not in answer.text
    assert "import " not in answer.text


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../runs", "/etc", "first/..", "first/images", "more", "a\x00b", "first/"]
)
def test_only_names_that_were_found_are_runs(runs, name):
    with pytest.raises(UnknownName):
        Library(runs).run(name)


def test_pictures_outside_the_run_are_not_shown(tmp_path):
    secret = Image.new("RGB", (8, 8), "red")
    secret.save(tmp_path / "secret.png")
    folder = tmp_path / "runs" / "r"
    names = [
        "../../secret.png",
        str(tmp_path / "secret.png"),
        "images/link.png",
        "images/../../../secret.png",
        "a\x00b",
    ]
    write(folder, [row(f"p{i}", image=name) for i, name in enumerate(names)])
    (folder / "images").mkdir()
    (folder / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    client = TestClient(create_app(tmp_path / "runs"), base_url=LOOPBACK)
    for i in range(len(names)):
        page = get(client, f"/sample/r?id=p{i}-0")
        assert not [tag for tag, _ in page.tags if tag == "img"]
        assert "image lies outside the run folder" in page.text or "image has an impossible name" in page.text
    # The same picture inside the run is shown: it is the place that was refused.
    secret.save(folder / "images" / "fine.png")
    write(folder, [row("fine", image="images/fine.png")])
    assert [tag for tag, _ in get(client, "/sample/r?id=fine-0").tags if tag == "img"]


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    write(tmp_path / "elsewhere" / "r", [row("a")])
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    library = Library(tmp_path / "runs")
    assert library.names() == []
    with pytest.raises(UnknownName):
        library.run("link/r")


# The command --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["mnemoscope.web.app", "mnemoscope.cli.view"])
def test_viewing_needs_no_torch(module):
    code = (
        f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_without_the_extra_one_sentence_says_what_to_install(tmp_path, monkeypatch, missing):
    for name in [
        name
        for name in sys.modules
        if name.startswith(("mnemoscope.web.a", "mnemoscope.web.connections")) or name.partition(".")[0] == missing
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UsageError, match=rf"needs {missing}, .*pip install 'mnemoscope\[view\]'"):
        view(tmp_path, host="127.0.0.1", port=0, token=None)


def test_usage_errors_are_sentences(tmp_path):
    with pytest.raises(UsageError, match=r"there is no folder .*nowhere"):
        view(tmp_path / "nowhere", host="127.0.0.1", port=0, token=None)
    with pytest.raises(UsageError, match="MNEMOSCOPE_VIEW_TOKEN"):
        view(tmp_path, host="0.0.0.0", port=0, token=None)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match="is in use"):
        view(tmp_path, host="127.0.0.1", port=taken.getsockname()[1], token=None)
    with pytest.raises(UsageError, match=r"cannot listen on 203\.0\.113\.7"):
        view(tmp_path, host="203.0.113.7", port=0, token="word")


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_command_serves_until_it_is_interrupted(tmp_path):
    write(tmp_path / "mine", [row("a prompt")])
    code = "import typer; from mnemoscope.cli.view import view; typer.run(view)"
    command = [sys.executable, "-c", code, str(tmp_path), "--port", "0"]
    environment = {**os.environ, "MNEMOSCOPE_VIEW_TOKEN": "word"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            address = process.stdout.readline().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address), process.stderr.read()
            asked = urllib.request.Request(address + "run/mine", headers={"Authorization": "Bearer word"})
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=60) as answer:
                assert "a prompt" in unescape(answer.read().decode())
                assert "server" not in {name.lower() for name in answer.headers}
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        talk = process.stderr.read()
    assert "word" not in talk
    assert "Traceback" not in talk


def test_typer_takes_the_command():
    app = typer.Typer(rich_markup_mode=None, add_completion=False)
    app.command()(view)
    from typer.testing import CliRunner

    shown = CliRunner().invoke(app, ["--help"]).output
    assert "Example: mnemoscope view runs" in shown
    for option in ("--host", "--port", "--token"):
        assert option in shown
