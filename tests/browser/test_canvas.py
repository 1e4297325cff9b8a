"""The canvas widget in the real page, by mouse and by keys, on the classic canvas and in Nodes 2.0."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest
from semantic_diffusion_adapter.kernels.regions import parse_cells
from semantic_diffusion_adapter.runner.server import PACK

if TYPE_CHECKING:
    from .conftest import Desk

pytestmark = pytest.mark.browser

NODES = ("SDACompose", "SDAPlace", "SDARegionalPrompt", "SDAStrength")
ADD = """type => {
    const node = LiteGraph.createNode(type);
    node.pos = [0, 0];
    app.graph.add(node);
    window.added = node;
}"""
LOOK = "app.canvas.ds.scale = 1; app.canvas.ds.offset[0] = 500; app.canvas.ds.offset[1] = 120; app.canvas.setDirty(true, true);"


class Artist:
    """A hand on the canvas widget of the one node in the graph. Points are shares of a square picture's sides."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.page = desk, desk.page
        self.canvas, self.keys = self.page.locator(".sda-editor canvas"), self.page.locator(".sda-editor .sda-keys")

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

    def says(self) -> str:
        self.page.wait_for_timeout(100)  # for one more drawing
        return self.keys.input_value()

    def at(self, x: float, y: float) -> tuple[float, float]:
        room = self.canvas.bounding_box()
        side = min(room["width"], room["height"]) - 12
        return (
            room["x"] + (room["width"] - side) / 2 + x * side,
            room["y"] + (room["height"] - side) / 2 + y * side,
        )

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.pull(self.at(*start), self.at(*end))

    def pull(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.page.mouse.move(*start)
        self.page.mouse.down()
        self.page.mouse.move(*end, steps=6)
        self.page.mouse.up()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def reload(self) -> dict:
        """Save the workflow, load the page anew and open it; returns what was saved of the node."""
        saved = self.page.evaluate("JSON.stringify(app.graph.serialize())")
        self.desk.open()
        self.desk.load(saved)
        self.settle()
        return self.page.evaluate("text => JSON.parse(text).nodes[0]", saved)


@pytest.fixture
def artist(desk: Desk, nodes: dict) -> Artist:
    absent = [name for name in NODES if name not in nodes]
    assert not absent, f"not registered: {absent}"
    return Artist(desk)


def test_a_box_is_dragged_moved_by_keys_undone_and_kept(artist: Artist) -> None:
    artist.add("SDARegionalPrompt")
    assert artist.box() == [0.25, 0.25, 0.5, 0.5]
    assert artist.says() == "x 0.25 · y 0.25 · width 0.50 · height 0.50"

    artist.drag((0.5, 0.5), (0.6, 0.55))
    assert artist.box() == pytest.approx([0.35, 0.30, 0.5, 0.5], abs=0.011)
    moved = artist.box()
    artist.drag((moved[0] + 0.5, moved[1] + 0.5), (0.95, 0.95))
    assert artist.box() == pytest.approx([*moved[:2], 0.95 - moved[0], 0.95 - moved[1]], abs=0.021)
    resized = artist.box()

    artist.press("ArrowLeft", "Control+ArrowUp", "Shift+ArrowLeft")
    nudged = [round(value, 4) for value in (resized[0] - 0.01, resized[1] - 0.1, resized[2] - 0.01, resized[3])]
    assert artist.box() == nudged

    artist.press("Control+z", "Control+z", "Control+z")
    assert artist.box() == resized
    artist.press("Control+z", "Control+z")
    assert artist.box() == [0.25, 0.25, 0.5, 0.5]
    artist.press("Control+Shift+z")
    assert artist.box() == moved
    artist.page.wait_for_timeout(300)
    assert artist.page.evaluate("app.graph.nodes[0] === window.added"), "the page's own undo ran as well"

    artist.press("Delete")
    assert artist.box() == [0.25, 0.25, 0.5, 0.5]
    artist.drag((0.05, 0.1), (0.2, 0.2))  # outside the box: a new one
    assert artist.box() == pytest.approx([0.05, 0.1, 0.15, 0.1], abs=0.011)

    drawn = artist.values()
    saved = artist.reload()
    assert artist.values() == drawn
    assert len(saved["widgets_values"]) == len(drawn)
    assert artist.says().startswith(f"x {drawn['x']:.2f} · y {drawn['y']:.2f}")


def test_cells_are_picked_and_dragged_and_kept(artist: Artist) -> None:
    artist.add("SDAStrength")
    choices = artist.page.locator(".sda-editor [role=group] button")
    assert choices.all_inner_texts() == ["1×1", "2×2", "4×4"]

    choices.nth(2).click()
    artist.page.mouse.click(*artist.at(0.9, 0.1))
    assert artist.says() == "Level 2 · row 0 · column 3 · strength 1.00"
    x, y = artist.at(0.9, 0.1)
    artist.pull((x, y), (x, y + 50))
    assert artist.cells() == "2:0,3=0.5"

    artist.press("ArrowDown", "+", "+")
    assert artist.cells() == "2:0,3=0.5; 2:1,3=1.1"
    artist.press("[")
    assert artist.says() == "Level 1 · row 0 · column 1 · strength 1.00"
    artist.press("-")
    assert artist.cells() == "1:0,1=0.95; 2:0,3=0.5; 2:1,3=1.1"
    artist.press("Delete")
    assert artist.cells() == "2:0,3=0.5; 2:1,3=1.1"
    artist.press("Control+z", "Control+z", "Control+z", "Control+z")
    assert artist.cells() == "2:0,3=0.5"
    artist.press("Control+y")
    assert artist.cells() == "2:0,3=0.5; 2:1,3=1.05"

    x, y = artist.at(0.9, 0.1)
    artist.page.mouse.move(x, y)
    scale = artist.page.evaluate("app.canvas.ds.scale")
    artist.page.mouse.wheel(0, -120)  # the widget has the focus: the wheel is its own
    artist.page.wait_for_timeout(200)
    assert artist.cells() == "1:0,1=1.05; 2:0,3=0.5; 2:1,3=1.05"
    assert artist.page.evaluate("app.canvas.ds.scale") == scale

    kept = artist.values()
    artist.reload()
    assert artist.values() == kept
    prompt = artist.page.evaluate("async () => Object.values((await app.graphToPrompt()).output)[0].inputs")
    assert prompt["cells"] == kept["cells"] and "sda_canvas" not in prompt


def test_typed_text_and_the_nodes_answer_are_drawn(artist: Artist) -> None:
    artist.add("SDAStrength")
    write = "text => { const cells = added.widgets.find(w => w.name === 'cells'); cells.value = text; cells.callback?.(text); }"
    artist.page.evaluate(write, "1=0.5; 1:0,0=0.5")
    assert artist.says() == "Level 1 · row 0 · column 0 · strength 0.25"
    artist.page.evaluate(write, "1:0,0=lots")
    assert "1:0,0=lots" in artist.says()
    artist.canvas.click()
    artist.press("-")
    assert artist.cells() == "1:0,0=lots"  # a text that cannot be read is not written over

    artist.page.evaluate("added.onExecuted({ layout: [[1, 1, 16], [2, 3, 4]] })")
    artist.page.evaluate(write, "")
    artist.says()
    choices = artist.page.locator(".sda-editor [role=group] button")
    assert choices.all_inner_texts() == ["1×1", "2×3"]

    artist.page.evaluate("added.onExecuted({ cells: [[0, 0, 0, 0, 0, 1, 1], [1, 0, 0, 0.5, 0, 0.75, 1], [1, 0, 1, 0.75, 0, 1, 1]] })")
    artist.says()
    assert choices.all_inner_texts() == ["1×1", "1×2"]
    choices.nth(1).click()
    artist.page.mouse.click(*artist.at(0.9, 0.5))
    assert artist.says() == "Level 1 · row 0 · column 1 · strength 1.00"


def test_every_node_with_a_canvas_shows_one(artist: Artist) -> None:
    for at, kind in enumerate(NODES):
        artist.add(kind)
        artist.page.evaluate("at => { added.pos = [at * 360, 0]; app.canvas.setDirty(true, true); }", at)
    assert artist.page.locator(".sda-editor canvas").count() == len(NODES)


def test_the_picture_above_is_drawn(artist: Artist) -> None:
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (128, 64), (230, 20, 20)).save(data, "PNG")
    picture = {"name": "canvas_red.png", "mimeType": "image/png", "buffer": data.getvalue()}
    uploaded = artist.page.request.post(f"{artist.desk.url}/upload/image", multipart={"image": picture, "overwrite": "true"})
    assert uploaded.ok

    artist.add("SDAStrength")
    artist.page.evaluate(
        """() => {
            const strength = window.added;
            const chain = ['SDABuildEmbedding', 'SDAEncodeImage', 'LoadImage'].map((type, at) => {
                const node = LiteGraph.createNode(type);
                node.pos = [400, at * 300];
                app.graph.add(node);
                return node;
            });
            const link = (from, to, name) => from.connect(0, to, to.inputs.findIndex(input => input.name === name));
            link(chain[0], strength, 'embedding');
            link(chain[1], chain[0], 'features');
            link(chain[2], chain[1], 'image');
            const file = chain[2].widgets.find(widget => widget.name === 'image');
            file.value = 'canvas_red.png';
            file.callback?.('canvas_red.png');
        }"""
    )
    artist.page.mouse.move(*artist.at(0.5, 0.5))  # the pointer that comes in looks again
    artist.page.wait_for_function(
        """() => {
            const canvas = document.querySelector('.sda-editor canvas');
            const [x, y] = [Math.round(canvas.width * 0.85), Math.round(canvas.height * 0.58)];
            const [red, green, blue] = canvas.getContext('2d').getImageData(x, y, 1, 1).data;
            return red > 200 && green < 60 && blue < 60;
        }""",
        timeout=20_000,
    )


def test_the_text_of_the_cells_reads_as_python_does(desks: dict[str, Desk]) -> None:
    texts = ["1:0,1=0.5; 2:3,3=0", " 2 = .7 ;; *=1. ", "1 : 0 , 1 = 2", "1:0=1", "1:0,0=2.1", "1:0,0=-1", "", "1:0,0", "x=1"]
    script = """async ([pack, texts]) => {
        const { parseCells } = await import(`/extensions/${pack}/js/regions.js`);
        return texts.map(text => { try { return Object.fromEntries(parseCells(text)); } catch { return null; } });
    }"""

    def python(text: str) -> dict | None:
        try:
            rules = parse_cells(text)
        except ValueError:
            return None
        names = ("*" if level is None else f"{level}" if cell is None else f"{level}:{cell[0]},{cell[1]}" for level, cell, _ in rules)
        return dict(zip(names, (rule.factor for rule in rules)))

    assert desks["classic canvas"].page.evaluate(script, [PACK, texts]) == [python(text) for text in texts]
