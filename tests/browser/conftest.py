"""One headless browser for this folder, with the real page open twice: on the classic canvas and in Nodes 2.0."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from semantic_diffusion_adapter.runner.server import PACK, Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

OUT = Path(__file__).resolve().parents[2] / "out"
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
VIEW = {"width": 1900, "height": 1000}
PACE = 80  # milliseconds between two changes: what follows within 50 the page takes for the same change
RENDERERS = {"classic canvas": False, "Nodes 2.0": True}
FIT = """() => {
    const [left, top, right, bottom] = [0, 1, 2, 3].map(side => app.graph.nodes.map(({ boundingRect: [x, y, width, height] }) =>
        [-x, -y, x + width, y + height][side]).reduce((a, b) => Math.max(a, b)));
    app.canvas.ds.fitToBounds([-left, -top, right + left, bottom + top], { zoom: 0.9 });
    app.canvas.setDirty(true, true);
}"""
# The first of the two names since frontend 1.58 at the latest, the second before.
NO_TOASTS = "(({ dismissAll, removeAll }) => (dismissAll ?? removeAll)())(app.extensionManager.toast)"
# A new node, known to the page's undo.
ADD = """type => {
    const node = LiteGraph.createNode(type);
    node.pos = [0, 0];
    app.canvas.emitBeforeChange();
    app.graph.add(node);
    app.canvas.emitAfterChange();
    window.added = node;
}"""
LOOK = "app.canvas.ds.scale = 1; app.canvas.ds.offset[0] = 500; app.canvas.ds.offset[1] = 120; app.canvas.setDirty(true, true);"
READY = "window.app?.graph && window.app.extensionManager?.command"


class Desk:
    """The page in one renderer. `complaints`: what it reports as an error and that has to do with this pack; others' are
    ComfyUI's own: with --disable-api-nodes it forbids its page the registry that the page then asks."""

    def __init__(self, page: Page, url: str, modern: bool) -> None:
        self.page, self.url, self.modern, self.complaints = page, url, modern, []
        self._cdp = page.context.new_cdp_session(page)
        page.on("console", lambda m: self._note(f"{m.text} ({m.location})") if m.type == "error" else None)
        page.on("pageerror", lambda error: self._note(f"{error} {error.stack}"))

    def _note(self, text: str) -> None:
        if PACK in text:
            self.complaints.append(text)

    def rest(self, resting: bool) -> None:
        """Stop what the page does by itself, or let it go on: an idle page draws its canvas on and on."""
        self._cdp.send("Page.setWebLifecycleState", {"state": "frozen" if resting else "active"})

    def resize(self, size: dict[str, int]) -> None:
        """While it rests."""
        self.rest(False)  # the size of a page at rest never settles
        self.page.set_viewport_size(size)
        self.rest(True)

    def settings(self, **values: object) -> None:
        """Of this user; a page reads them when it is opened."""
        data = {f"Comfy.{name}": value for name, value in values.items()}
        assert self.page.request.post(f"{self.url}/settings", data=data).ok

    def open(self) -> None:
        """Load the page, with an empty workflow."""
        # Without Persist the page starts with no workflow of its own, which could come after the test's.
        self.settings(**{"VueNodes.Enabled": self.modern, "Workflow.Persist": False, "TutorialCompleted": True})
        # Nodes in full, however far away: their pictures and texts are looked at.
        self.page.request.post(f"{self.url}/settings", data={"LiteGraph.Canvas.MinFontSizeForLOD": 0})
        self.page.goto(self.url)
        self.page.wait_for_function(READY, timeout=60_000)
        self.clear()

    def clear(self) -> None:
        """An empty workflow in the page that is open."""
        self.page.keyboard.press("Escape")
        self.page.evaluate(NO_TOASTS)
        self.page.wait_for_function("!document.querySelector('.p-toast-message')")  # they fade
        self.page.evaluate("app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
        self.page.wait_for_function("app.graph.nodes.length === 0")

    def load(self, workflow: dict | str) -> None:
        text = workflow if isinstance(workflow, str) else json.dumps(workflow)
        self.page.evaluate("async text => { await app.loadGraphData(JSON.parse(text)); }", text)
        self.page.wait_for_function("count => app.graph.nodes.length === count", arg=len(json.loads(text)["nodes"]))
        self.fit()

    def fit(self) -> None:
        """All of the workflow in view: the page draws nothing else. At once: Nodes 2.0 misplaces nodes that grow during
        the flight of the page's own command."""
        self.page.evaluate(FIT)
        self.page.wait_for_timeout(300)

    def until(self, expression: str, expected: object) -> None:
        """The page soon says so."""
        until = time.monotonic() + 20
        while (found := self.page.evaluate(expression)) != expected and time.monotonic() < until:
            self.page.wait_for_timeout(100)
        assert found == expected

    def run(self) -> None:
        """Queue the workflow, and wait for its end."""
        errors = self.page.evaluate("async () => { await app.queuePrompt(0); return app.lastNodeErrors ?? {}; }")
        assert errors == {}
        until = time.monotonic() + 300
        while any(self.page.request.get(f"{self.url}/queue").json().values()):
            assert time.monotonic() < until, "the workflow does not end"
            self.page.wait_for_timeout(100)

    def red(self) -> list[str]:
        """The titles of the nodes that the page marks as wrong."""
        wrong = "app.graph.nodes.filter(node => node.has_errors || app.lastNodeErrors?.[node.id]).map(node => node.title)"
        return self.page.evaluate(wrong)

    def photograph(self, name: str) -> None:
        OUT.mkdir(exist_ok=True)
        name = re.sub(r"[^\w ,.-]", "", name)  # a parameter may hold what no file name may
        self.page.screenshot(path=OUT / f"{name}.png")


class Artist:
    """A hand on the canvas widget of the one node in the graph. Points are shares of a square picture's sides."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.page = desk, desk.page
        self.canvas, self.status = self.page.locator(".sda-editor canvas >> visible=true"), self.page.locator(".sda-editor [role=status]")

    def add(self, kind: str) -> None:
        self.page.evaluate(ADD, kind)
        self.settle()

    def settle(self) -> None:
        self.page.evaluate(LOOK)
        self.canvas.last.wait_for(state="visible", timeout=20_000)
        self.page.wait_for_timeout(500)  # for the node to find its size

    def values(self) -> dict:
        return self.page.evaluate(
            "Object.fromEntries(app.graph.nodes.at(-1).widgets.filter(w => w.name !== 'sda_canvas').map(w => [w.name, w.value]))"
        )

    def box(self) -> list[float]:
        values = self.values()
        return [round(values[name], 4) for name in ("x", "y", "width", "height")]

    def cells(self) -> str:
        return self.values()["cells"]

    def settles_on(self, expected: list[float] | str) -> None:
        """After the page's undo, which loads the workflow anew and takes a moment."""
        self.page.wait_for_timeout(200)  # the page begins with its next frame
        self.page.wait_for_function("!app.extensionManager.workflow.activeWorkflow.changeTracker._restoringState")
        assert (self.cells() if isinstance(expected, str) else self.box()) == expected
        self.canvas.last.wait_for(state="visible", timeout=20_000)
        self.page.wait_for_timeout(200)  # for the first drawing of the new node

    def says(self) -> str:
        self.page.wait_for_timeout(100)  # for one more drawing
        return self.status.last.inner_text()

    def at(self, x: float, y: float) -> tuple[float, float]:
        room = self.canvas.bounding_box()
        side = min(room["width"], room["height"]) - 12
        return (
            room["x"] + (room["width"] - side) / 2 + x * side,
            room["y"] + (room["height"] - side) / 2 + y * side,
        )

    def colour(self, x: float, y: float) -> list[int]:
        """[red, green, blue] of what the last canvas shows there, once it is drawn."""
        self.page.wait_for_timeout(100)
        script = """(canvas, [x, y]) => {
            const [width, height, margin] = [canvas.width, canvas.height, (6 * canvas.width) / canvas.clientWidth];
            const side = Math.min(width, height) - 2 * margin;
            const [left, top] = [(width - side) / 2 + x * side, (height - side) / 2 + y * side];
            return [...canvas.getContext('2d').getImageData(Math.round(left), Math.round(top), 1, 1).data.slice(0, 3)];
        }"""
        return self.canvas.last.evaluate(script, [x, y])

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.pull(self.at(*start), self.at(*end))

    def pull(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.page.mouse.move(*start)
        self.page.mouse.down()
        self.page.mouse.move(*end, steps=6)
        self.page.mouse.up()
        self.page.wait_for_timeout(PACE)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)
            self.page.wait_for_timeout(PACE)

    def undo(self, keys: str = "Control+z") -> None:
        """By the page's keys, held until it has begun: what they do when they rise disturbs an undo on older frontends."""
        self.page.keyboard.press(keys, delay=400)

    def reload(self) -> dict:
        """Save the workflow, load the page anew and open it; returns what was saved of the node."""
        saved = self.page.evaluate("JSON.stringify(app.graph.serialize())")
        self.desk.open()
        self.desk.load(saved)
        self.settle()
        return self.page.evaluate("text => JSON.parse(text).nodes[0]", saved)


def chromium() -> str | None:
    """The path of a Chromium or Chrome on this machine."""
    found = [path for path in map(shutil.which, NAMES) if path] + [path for path in PLACES if os.path.exists(path)]
    return next(iter(found), None)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = chromium()
    if path is None:
        pytest.skip("no Chromium or Chrome was found")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, headless=True, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@pytest.fixture(scope="package")
def desks(server: Server, nodes: dict, browser: Browser) -> dict[str, Desk]:
    """The page in either renderer, each loaded once."""
    made = {name: Desk(browser.new_page(viewport=VIEW), server.url, modern) for name, modern in RENDERERS.items()}
    for desk in made.values():
        desk.open()
        desk.rest(True)
    return made


@pytest.fixture(params=RENDERERS)
def desk(desks: dict[str, Desk], request: pytest.FixtureRequest) -> Iterator[Desk]:
    """An empty workflow; at the end a picture of the page in out/, and nothing of ours in its list of errors."""
    desk = desks[request.param]
    desk.complaints.clear()
    desk.rest(False)
    desk.page.bring_to_front()
    desk.clear()
    yield desk
    desk.photograph(request.node.name)
    desk.rest(True)
    assert desk.complaints == []


@pytest.fixture
def artist(desk: Desk, nodes: dict) -> Artist:
    return Artist(desk)
