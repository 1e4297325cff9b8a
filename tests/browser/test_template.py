"""What an artist does: open the page, pick the template, press Run, see the picture."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from semantic_diffusion_adapter.runner.server import PACK, Server
from semantic_diffusion_adapter.runner.workflow import to_prompt

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "Reconstruct and edit (miniature)"
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


def test_the_template_runs_from_the_template_browser(server: Server, nodes: dict, miniature: Path, page: Page) -> None:
    complaints = []
    page.on("console", lambda m: complaints.append(f"{m.text} ({m.location})") if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(f"{error} {error.stack}"))

    page.goto(server.url)
    page.wait_for_function("window.app?.graph && window.app.extensionManager?.command", timeout=60_000)
    pack = page.get_by_text(PACK, exact=True).first
    try:  # a first visit opens the template browser by itself
        pack.wait_for(timeout=15_000)
    except Exception:
        page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    pack.click()
    page.get_by_text(TEMPLATE, exact=True).first.click()

    page.wait_for_function("app.graph.nodes.some(node => node.type === 'SDALoadMiniature')", timeout=60_000)
    missing = "app.graph.nodes.map(node => node.type).filter(type => !(type in LiteGraph.registered_node_types))"
    assert page.evaluate(missing) == []

    exported = page.evaluate("async () => (await app.graphToPrompt()).output")
    for node in exported.values():
        node.pop("_meta", None)
    ours = to_prompt(json.loads((ROOT / "example_workflows" / f"{TEMPLATE}.json").read_text(encoding="utf-8")), nodes)
    assert ours == exported

    page.get_by_role("button", name="Run", exact=True).first.click()
    page.wait_for_function(
        """() => {
            const shown = title => app.graph.nodes.find(node => node.title === title)?.imgs?.[0];
            return ['Source', 'Reconstruction', 'Edited'].every(title => shown(title)?.naturalWidth === 128);
        }""",
        timeout=300_000,
    )
    page.wait_for_timeout(1_000)  # for one more drawing of the canvas
    (ROOT / "out").mkdir(exist_ok=True)
    page.screenshot(path=ROOT / "out" / "browser.png")

    assert page.evaluate("app.graph.nodes.filter(node => node.has_errors).map(node => node.title)") == []
    # Others' are ComfyUI's own: with --disable-api-nodes it forbids its page the registry that the page then asks.
    assert [text for text in complaints if PACK in text] == []
