"""The page in a real browser, on the bundled model, as a visitor uses it: by keyboard, with the network watched.

Driven by Playwright on the distribution's Chromium; where there is neither, these tests skip and say so.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from mnemoscope.records.store import Run
from mnemoscope.report.html import write_report
from mnemoscope.report.summary import read_summary

pytest.importorskip("gradio", reason="gradio is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium, chromium-browser or google-chrome")

WAIT = 120_000
"""Milliseconds before a missing element is a failure; machines under load are slow, and a model is at work."""

KNOWN = "oncoming police car"
"""A caption whose picture stood 48 times in every epoch of training."""


CONTRAST = """() => {
  const linear = (x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const light = (color) => {
    const whole = color.startsWith("color(") ? 1 : 255; // what color-mix gives counts from 0 to 1
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((x) => linear(x / whole));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)|transparent/.test(color)) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const read = ".m h1, .m h2, .m p, .m small, .m .score, .m button";
  return [...document.querySelectorAll(read)].filter((e) => e.innerText && e.getClientRects().length).map((e) => {
    const both = [light(getComputedStyle(e).color), light(behind(e))];
    return [(Math.max(...both) + 0.05) / (Math.min(...both) + 0.05), e.innerText.slice(0, 30)];
  });
}"""
"""Contrast of each text that is seen, as WCAG 2 counts it."""


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def address(out) -> Iterator[str]:
    """The command on a free port, as a user starts it, for a machine whose network is off."""
    code = "import typer; from mnemoscope.cli.studio import studio; typer.run(studio)"
    command = [sys.executable, "-c", code, "--port", "0", "--out", str(out), "--steps", "50"]
    environment = {name: value for name, value in os.environ.items() if name != "MNEMOSCOPE_STUDIO_TOKEN"}
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**environment, **nowhere}) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A page whose every request, message and error is watched: there must be no stranger and no complaint."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
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
    strangers = {urlsplit(url).hostname for url in asked if not url.startswith(("data:", "blob:"))} - {"127.0.0.1"}
    assert strangers == set()
    assert asked
    assert complaints == []


def score(page) -> float:
    found = re.search(r"Score ([\d.]+);", page.locator(".card").inner_text())
    assert found is not None
    return float(found[1])


def ask(page, prompt: str) -> None:
    page.locator("#prompt textarea").fill(prompt)
    page.keyboard.press("Enter")
    page.locator(".asked", has_text=prompt).wait_for()


def test_a_visitor_scores_edits_draws_exports_and_opens_again(page, address, out):
    page.goto(address)
    ask(page, KNOWN)
    assert page.title() == "mnemoscope studio"
    before = score(page)
    assert "This prompt pulls unusually hard" in page.locator("#verdict").inner_text()
    assert "(p = 0.0025)" in page.locator(".card").inner_text()

    # A word is dropped with the keyboard alone, and the score falls at once.
    page.get_by_role("button", name=re.compile("^police, .* % of the pull, drop or replace$")).focus()
    page.keyboard.press("Enter")
    page.locator("#chosen").wait_for()
    assert page.evaluate("document.activeElement.id") == "chosen"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator(".change").wait_for()
    assert score(page) < before
    assert page.locator("#prompt textarea").input_value() == "oncoming car"
    assert "drop 'police': score" in page.locator("[role=status] .say").inner_text()

    # Pictures of both, with the same seeds, beside the nearest training pictures, which stay blurred until clicked.
    page.locator("#draw").click()
    page.locator(".cards").wait_for()
    assert page.locator(".seed .pair").count() == 4
    assert page.locator(".pair img[alt^='picture drawn for: oncoming']").count() == 8
    told = page.locator(".told").inner_text()
    assert re.search(r"As typed: Copy found in [1-4] of 4 seeds", told)
    assert "After the edit: No copy found in 4 seeds" in told
    assert page.locator(f".shaded img[alt='picture drawn for: {KNOWN}']").count() >= 1
    assert page.locator(".shaded img[alt='picture drawn for: oncoming car']").count() == 0
    nearest = page.locator(".pair img[alt^='training picture']")
    assert nearest.count() == 8
    assert page.locator("img[alt='training picture 1f694-fluent']").count() >= 1
    blurs = "all => all.map(image => getComputedStyle(image).filter)"
    assert all("blur" in blur for blur in nearest.evaluate_all(blurs))
    page.locator(".cards .uncover input").first.check()
    assert nearest.evaluate_all(blurs)[:2] == ["none", "none"]
    assert all("blur" in blur for blur in nearest.evaluate_all(blurs)[2:])
    page.locator("#where").get_by_role("checkbox").check()
    page.locator(".where img").first.wait_for()
    assert "where the prompt pulls" in (page.locator(".where img").first.get_attribute("alt") or "")

    # The session as a run folder, which the report reads, and as a file, from which it goes on.
    page.locator("#export").click()
    page.locator("a.download").wait_for()
    run = Run(out / "studio")
    assert run.manifest.status == "done"
    found = read_summary(run.folder).findings
    assert {f.prompt: f"{f.score:.2f}" for f in found} == {KNOWN: f"{before:.2f}", "oncoming car": f"{score(page):.2f}"}
    assert write_report(run.folder).stat().st_size > 10_000
    with page.expect_download() as download:
        page.locator("a.download").click()
    file = out / "session.zip"
    download.value.save_as(file)
    link = page.url
    after = score(page)
    page.goto(address)
    page.locator("#prompt textarea").wait_for()
    page.locator("input[type=file]").set_input_files(file)
    page.locator(".steps li").nth(1).wait_for()
    assert score(page) == after
    assert page.locator(".steps li").all_inner_texts()[1].startswith("oncoming car drop 'police'")

    # The address is a link to the same.
    assert parse_qs(urlsplit(link).query)["edited"] == ["oncoming car"]
    page.goto(link)
    page.locator(".change").wait_for()
    assert score(page) == after
    page.locator("#undo").click()
    page.locator(".asked", has_text=KNOWN).wait_for()
    assert score(page) == before


def test_drawing_is_cancelled_and_the_page_goes_on(page, address):
    page.goto(address)
    ask(page, "a red apple")
    # Once, as soon as it can be seen: a model may be faster than a test, and a second click would have nothing to stop.
    page.evaluate(
        "const wait = setInterval(() => { const stop = document.querySelector('#stop');"
        " if (stop?.offsetParent) { stop.click(); clearInterval(wait); } }, 20)"
    )
    page.locator("#draw").click()
    page.locator(".alert", has_text="Stopped").wait_for()
    page.locator("#stop").wait_for(state="hidden")
    assert page.locator(".cards").count() == 0
    ask(page, "a green apple")
    assert "no harder than ordinary ones" in page.locator("#verdict").inner_text()


def test_hostile_text_and_wrong_files_do_nothing(page, address, tmp_path):
    hostile = "apple <img src=x onerror=window.hit=1> ${window.hit=2} {{value}} '\"><b>"
    page.goto(address)
    ask(page, hostile)
    assert page.locator(".steps bdi").first.inner_text() == hostile
    page.get_by_role("button", name=re.compile("^apple, ")).click()
    page.locator("input[name=text]").fill(hostile)
    page.keyboard.press("Enter")
    page.locator(".change").wait_for()
    assert page.evaluate("window.hit") is None
    wrong = tmp_path / "picture<b>.png"
    wrong.write_bytes(b"x")
    page.locator("input[type=file]").set_input_files(wrong)
    page.get_by_role("alert").filter(has_text="neither a samples.jsonl nor a packet").wait_for()
    large = tmp_path / "samples.jsonl"
    large.write_bytes(b" " * (9 << 20))
    page.locator("input[type=file]").set_input_files(large)
    page.get_by_role("alert").filter(has_text="more than 8 MB").wait_for()
    assert page.evaluate("window.hit") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read(page, address, scheme):
    page.set_viewport_size({"width": 400, "height": 800})
    page.emulate_media(color_scheme=scheme)
    page.goto(address + "?prompt=a+red+apple")
    page.locator(".card").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    found = [pair for pair in page.evaluate(CONTRAST) if pair[0] < 4.5]
    assert found == []
    names = page.locator("button:visible, a:visible, input:visible").evaluate_all(
        "all => all.map(e => (e.ariaLabel || e.innerText || e.labels?.[0]?.innerText || '').trim())"
    )
    assert all(names)
