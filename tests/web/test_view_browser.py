"""The pages in a real browser: keys, live rows, ten thousand rows, blurred pictures, and hostile text that stays text.

Driven by Playwright on the distribution's Chromium; where there is neither, these tests skip and say so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest
from small_runs import HOSTILE, row, write, write_hostile
from synthetic_run import make_run

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium, chromium-browser or google-chrome")

WAIT = 60_000
"""Milliseconds before a missing element is a failure; machines under load are slow."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The command on a free port, as a user starts it; yields its address."""
    code = "import typer; from mnemoscope.cli.view import view; typer.run(view)"
    command = [sys.executable, "-c", code, str(folder), "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "MNEMOSCOPE_VIEW_TOKEN"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "first")
    make_run(folder / "second", pictures=False, seeds=2)
    make_run(folder / "large", pictures=False, per_group=417, prompts={2501: "a zebra"})  # 10,008 rows
    return folder


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    with served(folder) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A page whose every request, message and error is watched: there must be no stranger and no complaint."""
    context = chromium.new_context(viewport={"width": 1200, "height": 800})
    context.set_default_timeout(WAIT)
    page = context.new_page()
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    yield page
    context.close()
    assert {urlsplit(url).hostname for url in asked if not url.startswith("data:")} == {"127.0.0.1"}
    assert complaints == []


def lines(page) -> list[str]:
    return page.locator("a.open").evaluate_all("all => all.map(line => line.dataset.key)")


def focused(page) -> str | None:
    return page.evaluate("document.activeElement.dataset.key ?? null")


def press(page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def follow(page, key: str) -> None:
    """Press a key that leads to another page, and wait for it: a key that comes before a page's script is lost."""
    with page.expect_navigation():
        page.keyboard.press(key)


def matching(page, words: str) -> None:
    page.locator(".pager", has_text=words).first.wait_for()


def test_keys_lead_through_runs_samples_and_back(page, address):
    page.goto(address)
    names = lines(page)
    assert sorted(names) == ["first", "large", "second"]
    page.goto(address + "run/first")
    shown = lines(page)
    press(page, "j", "j", "j", "k")
    assert focused(page) == shown[1]
    press(page, "G")
    assert focused(page) == shown[-1]
    press(page, "g", "k")
    assert focused(page) == shown[0]
    press(page, "j")
    follow(page, "Enter")
    assert f"id={shown[1]}" in page.url
    follow(page, "j")
    assert f"id={shown[2]}" in page.url
    follow(page, "k")
    assert f"id={shown[1]}" in page.url
    follow(page, "Escape")
    assert urlsplit(page.url).path == "/run/first"
    assert focused(page) == shown[1]
    follow(page, "Escape")
    assert page.url == address


def test_the_question_mark_lists_every_key(page, address):
    page.goto(address)
    assert not page.locator("dialog").is_visible()
    press(page, "?")
    page.locator("dialog").wait_for(state="visible")
    told = set(page.locator("dialog kbd").all_inner_texts())
    assert told == {"j", "k", "Enter", "Esc", "n", "p", "g", "G", "/", "b", "x", "c", "?"}
    press(page, "Escape")
    page.locator("dialog").wait_for(state="hidden")
    assert page.url == address


def test_filtering_and_sorting(page, address):
    page.goto(address + "run/first")
    everything = lines(page)
    press(page, "/")
    page.keyboard.type("RED")
    matching(page, "that match, of 72")
    some = lines(page)
    assert 0 < len(some) < len(everything)
    assert all("red" in text for text in page.locator("a.open").all_inner_texts())
    assert "q=RED" in page.url
    page.reload()
    assert lines(page) == some
    assert page.locator("input[type=search]").input_value() == "RED"
    with page.expect_navigation():
        page.locator("th a", has_text="Score").click()
    falling = lines(page)
    with page.expect_navigation():
        page.locator("th a", has_text="Score").click()
    assert sorted(falling) == sorted(some)
    scores = page.locator("tbody td:nth-child(4)").evaluate_all("all => all.map(cell => parseFloat(cell.textContent))")
    assert scores == sorted(scores)
    page.locator("select[name=show]").select_option("copies")
    page.wait_for_url("**show=copies**")
    page.locator("input[type=search]").fill("no such words")
    matching(page, "No prompts")
    assert lines(page) == []


def test_pictures_stay_blurred_until_clicked(page, address):
    def blurs() -> list[str]:
        return page.locator(".shade img").evaluate_all("all => all.map(image => getComputedStyle(image).filter)")

    page.goto(address + "run/first")
    press(page, "j")
    follow(page, "Enter")
    page.locator(".shade").first.wait_for()
    assert len(blurs()) == 6
    assert all("blur" in blur for blur in blurs())
    page.locator(".shade .frame").first.hover()
    assert all("blur" in blur for blur in blurs())
    page.locator(".shade .frame").first.click()
    assert blurs()[:2] == ["none", "none"]
    assert all("blur" in blur for blur in blurs()[2:])
    press(page, "b")
    assert set(blurs()) == {"none"}
    press(page, "b")
    assert all("blur" in blur for blur in blurs())


def test_two_runs_are_marked_compared_and_opened(page, address):
    page.goto(address)
    for name in ("first", "second"):
        page.locator(f"a.open[data-key={name}]").focus()
        press(page, "x")
    follow(page, "c")
    assert "Memorization audits, compared" in page.locator("main").inner_text()
    press(page, "j")
    follow(page, "Enter")
    page.locator("h2", has_text="First: ").wait_for()
    headings = page.locator("main h2").all_inner_texts()
    assert {heading.split(": ")[1] for heading in headings} == {"first", "second"}
    follow(page, "j")
    follow(page, "Escape")
    assert urlsplit(page.url).path == "/compare"
    assert focused(page) == lines(page)[1]


def test_ten_thousand_rows_are_a_hundred_at_a_time(page, address):
    page.goto(address + "run/large?by=sample")
    matching(page, "1–100 of 10,008 samples")
    assert len(lines(page)) == 100
    first = lines(page)
    follow(page, "n")
    matching(page, "101–200 of 10,008 samples")
    assert not set(first) & set(lines(page))
    follow(page, "p")
    matching(page, "1–100 of 10,008 samples")
    assert lines(page) == first
    # What the browser has to lay out does not grow with the run.
    assert page.evaluate("document.querySelectorAll('*').length") < 2500
    page.locator("input[type=search]").fill("zebra")
    matching(page, "1–4 of 4 samples that match, of 10,008")
    assert len(page.content()) < 50_000


def test_many_runs_are_a_hundred_at_a_time(page, tmp_path):
    for number in range(120):
        write(
            tmp_path / f"run-{number:03}", [row("a")], started=f"2026-01-01T00:00:00.{number:03}+00:00", status="done"
        )
    with served(tmp_path) as address:
        page.goto(address)
        matching(page, "1–100 of 120 runs")
        follow(page, "n")
        matching(page, "101–120 of 120 runs")
        assert lines(page)[-1] == "run-000"
        press(page, "/")
        page.keyboard.type("run-11")
        matching(page, "1–10 of 10 runs that match, of 120")
        assert "q=run-11" in page.url
        assert "page=" not in page.url
        press(page, "Escape", "j", "x", "j", "x")
        follow(page, "c")
        page.locator("h1", has_text="compared").wait_for()
        page.close()


def test_rows_appear_while_an_audit_writes(page, tmp_path):
    run = write(tmp_path / "live", [row("first prompt", score=3.0), row("second prompt", score=1.0)])
    with served(tmp_path) as address:
        page.goto(address + "run/live")
        page.evaluate("window.mark = 1")
        page.locator("input[type=search]").fill("prompt")
        matching(page, "1–2 of 2")
        press(page, "Escape", "j", "j")
        assert focused(page) == "second promp-0"
        write(tmp_path / "live", [row("a new prompt", score=2.0), row("something else")])
        matching(page, "1–3 of 3 prompts that match, of 4")
        assert lines(page) == ["first prompt-0", "a new prompt-0", "second promp-0"]
        assert focused(page) == "second promp-0"
        assert page.locator("input[type=search]").input_value() == "prompt"
        assert "4 of 100 samples" in page.locator("main").inner_text()
        run.update(status="done")
        page.locator("text=This run is running").wait_for(state="detached")
        assert page.evaluate("window.mark") == 1  # the page was never loaded again
        # The list of runs is alive as well, and keeps what is marked.
        page.goto(address)
        press(page, "j", "x")
        write(tmp_path / "other", [row("a")])
        page.locator("a.open[data-key=other]").wait_for()
        assert page.locator("input:checked").count() == 1
        page.close()  # before the server is gone, which it would complain about


def test_hostile_text_does_nothing(page, tmp_path):
    write_hostile(tmp_path)
    with served(tmp_path) as address:
        page.goto(address)
        assert page.locator("a.open").count() == 1
        press(page, "j")
        follow(page, "Enter")
        assert page.locator("a.open").count() == len(HOSTILE)
        assert page.evaluate("window.hit") is None
        opened = page.locator("a.open").evaluate_all("all => all.map(line => line.href)")
        name = page.evaluate("document.querySelector('.crumbs bdi').textContent")
        for href in opened:
            page.goto(href)
            page.locator(".said").wait_for()
            press(page, "b")
            assert page.evaluate("window.hit") is None
        page.goto(f"{address}compare?" + urlencode([("run", name), ("run", name)]))
        press(page, "j")
        follow(page, "Enter")
        for text in (HOSTILE["tag"], HOSTILE["attribute"], HOSTILE["single"]):
            page.goto(address)
            press(page, "j")
            follow(page, "Enter")
            page.locator("input[type=search]").fill(text)
            matching(page, "that match")
            page.reload()
            assert page.locator("input[type=search]").input_value() == text
            assert page.evaluate("window.hit") is None
        page.close()
