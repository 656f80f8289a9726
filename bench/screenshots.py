"""Make the screenshots of the docs, with Chromium and Playwright: the studio, and the first screen of the demo's report.

python bench/screenshots.py                   the studio
python bench/screenshots.py runs/demo         the report of that run: `make demo` writes it
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from common import DOCS

WAIT = 600_000
"""Milliseconds: a machine may have other work."""


def visit(page: Page, address: str) -> None:
    """A prompt, an edit, and the pictures of both."""
    page.goto(address)
    page.locator("#prompt textarea").fill("oncoming police car")
    page.keyboard.press("Enter")
    page.get_by_role("button", name=re.compile("^police, ")).click()
    page.get_by_role("button", name="Drop it").click()
    page.locator(".change").wait_for()
    page.locator("#draw").click()
    page.locator(".cards").wait_for()
    for box in page.locator(".uncover input").all()[:2]:
        box.check()
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")


def shot(page: Page) -> Image.Image:
    """The page down to its pictures."""
    image = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    box = page.locator(".cards").bounding_box()
    assert box is not None
    return image.crop((0, 0, image.width, round(box["y"] + page.evaluate("scrollY") + box["height"] + 24)))


def report(browser: Browser, run: Path) -> None:
    """The first screen of a run's report."""
    page = browser.new_page(viewport={"width": 1060, "height": 1180}, color_scheme="light")
    page.goto((run / "report.html").resolve().as_uri())
    image = Image.open(io.BytesIO(page.screenshot()))
    image.save(DOCS / "images" / "report.webp", quality=80, method=6)


def studio(browser: Browser) -> None:
    """The studio after an edit."""
    code = "import typer; from mnemoscope.cli.studio import studio; typer.run(studio)"
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-c", code, "--port", "0", "--out", out]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                address = server.stdout.readline().strip()
                page = browser.new_page(viewport={"width": 1120, "height": 900}, color_scheme="light")
                page.set_default_timeout(WAIT)
                visit(page, address)
                shot(page).save(DOCS / "images" / "studio.webp", quality=78, method=6)
            finally:
                server.terminate()


def main() -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        if len(sys.argv) > 1:
            report(browser, Path(sys.argv[1]))
        else:
            studio(browser)


if __name__ == "__main__":
    main()
