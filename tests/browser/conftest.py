"""The browser of the browser tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from semantic_diffusion_adapter.runner.server import PACK, Server

if TYPE_CHECKING:
    from playwright.sync_api import Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@pytest.fixture
def page(server: Server) -> Iterator[Page]:
    playwright = pytest.importorskip("playwright.sync_api")
    found = [path for path in map(shutil.which, NAMES) if path] + [path for path in PLACES if os.path.exists(path)]
    if not found:
        pytest.skip("no Chromium or Chrome was found")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found[0], headless=True, args=list(FLAGS))
        try:
            yield browser.new_page(viewport={"width": 1900, "height": 1000})
        finally:
            browser.close()


@pytest.fixture
def complaints(page: Page) -> list[str]:
    """What the page reports as an error and that has to do with this pack. Others' are ComfyUI's own: with --disable-api-nodes
    it forbids its page the registry that the page then asks."""
    found: list[str] = []

    def note(text: str) -> None:
        if PACK in text:
            found.append(text)

    page.on("console", lambda m: note(f"{m.text} ({m.location})") if m.type == "error" else None)
    page.on("pageerror", lambda error: note(f"{error} {error.stack}"))
    return found
