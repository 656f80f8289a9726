"""Make the screenshot of the studio in the docs, with Chromium and Playwright.

python bench/screenshots.py
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile

from PIL import Image
from playwright.sync_api import Page, sync_playwright

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


def main() -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as out:
        code = "import typer; from mnemoscope.cli.studio import studio; typer.run(studio)"
        command = [sys.executable, "-c", code, "--port", "0", "--out", out]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as driver:
            assert server.stdout is not None
            try:
                address = server.stdout.readline().strip()
                browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                page = browser.new_page(viewport={"width": 1120, "height": 900}, color_scheme="light")
                page.set_default_timeout(WAIT)
                visit(page, address)
                shot(page).save(DOCS / "images" / "studio.webp", quality=78, method=6)
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
