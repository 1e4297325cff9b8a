"""The canvas widget in the real page, by mouse and by keys, on the classic canvas and in Nodes 2.0."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from semantic_diffusion_adapter.kernels.cells import parse_cells
from semantic_diffusion_adapter.runner.server import PACK

if TYPE_CHECKING:
    from .conftest import Artist, Desk

pytestmark = pytest.mark.browser

WRITE = "text => { const cells = added.widgets.find(w => w.name === 'cells'); cells.value = text; cells.callback?.(text); }"
NODES = ("SDACompose", "SDAPlace", "SDARegionalPrompt", "SDAStrength")


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

    for before in (
        [round(value, 4) for value in (resized[0] - 0.01, resized[1] - 0.1, *resized[2:])],
        [round(resized[0] - 0.01, 4), *resized[1:]],
        resized,
        moved,
    ):
        artist.undo()
        artist.settles_on(before)
    artist.undo("Control+Shift+z")
    artist.settles_on(resized)
    artist.undo()
    artist.settles_on(moved)
    artist.press("ArrowRight")  # the page has put a new node there, and the focus is in its canvas again
    assert artist.box() == [round(moved[0] + 0.01, 4), *moved[1:]]

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
    for before in ("1:0,1=0.95; 2:0,3=0.5; 2:1,3=1.1", "2:0,3=0.5; 2:1,3=1.1", "2:0,3=0.5; 2:1,3=1.05"):
        artist.undo()
        artist.settles_on(before)
    assert artist.says() == "Level 1 · row 0 · column 1 · strength 1.00"  # as selected before the page's undo

    kept = artist.values()
    artist.reload()
    assert artist.values() == kept
    prompt = artist.page.evaluate("async () => Object.values((await app.graphToPrompt()).output)[0].inputs")
    assert prompt["cells"] == kept["cells"] and "sda_canvas" not in prompt


def test_a_cells_strength_is_painted_over_others(artist: Artist) -> None:
    artist.add("SDAStrength")
    artist.page.locator(".sda-editor [role=group] button").nth(2).click()
    artist.page.mouse.click(*artist.at(0.1, 0.1))
    artist.press(*["-"] * 10)
    assert artist.cells() == "2:0,0=0.5"
    artist.page.keyboard.down("Shift")
    artist.pull(artist.at(0.4, 0.1), artist.at(0.9, 0.1))
    artist.pull(artist.at(0.4, 0.6), artist.at(0.4, 0.6))
    artist.page.keyboard.up("Shift")
    assert artist.cells() == "2:0,0=0.5; 2:0,1=0.5; 2:0,2=0.5; 2:0,3=0.5; 2:2,1=0.5"
    assert artist.says() == "Level 2 · row 0 · column 0 · strength 0.50", "the brush is the cell that was selected"
    artist.undo()
    artist.settles_on("2:0,0=0.5; 2:0,1=0.5; 2:0,2=0.5; 2:0,3=0.5")


def test_typed_text_and_the_nodes_answer_are_drawn(artist: Artist) -> None:
    artist.add("SDAStrength")
    artist.page.evaluate(WRITE, "1=0.5; 1:0,0=0.5")
    assert artist.says() == "Level 1 · row 0 · column 0 · strength 0.25"
    artist.page.evaluate(WRITE, "1:0,0=lots")
    assert "1:0,0=lots" in artist.says()
    artist.canvas.click()
    artist.press("-")
    assert artist.cells() == "1:0,0=lots"  # a text that cannot be read is not written over

    artist.page.evaluate("added.onExecuted({ layout: [[1, 1, 16], [2, 3, 4]] })")
    artist.page.evaluate(WRITE, "")
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


def test_undo_is_the_pages_own(artist: Artist) -> None:
    artist.add("SDARegionalPrompt")
    # As if opened: adding the node cannot be undone.
    artist.page.evaluate("app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length = 0")
    artist.page.mouse.move(*artist.at(0.5, 0.5))  # the pointer that comes in looks again
    undo, reset = (artist.page.get_by_role("button", name=tip) for tip in ("Undo the last change", "Back to the values"))

    def are_offered(offered: bool) -> None:
        buttons = "[...document.querySelectorAll('.sda-bar > button')].slice(0, 2)"
        artist.desk.until(f"{buttons}.map(button => !button.disabled)", [offered, offered])

    are_offered(False)
    artist.drag((0.5, 0.5), (0.6, 0.55))
    moved = artist.box()
    are_offered(True)
    reset.click()
    assert artist.box() == [0.25, 0.25, 0.5, 0.5]
    undo.click()
    artist.settles_on(moved)
    are_offered(True)
    artist.page.evaluate("app.extensionManager.command.execute('Comfy.Undo')")
    artist.settles_on([0.25, 0.25, 0.5, 0.5])
    are_offered(False)
    artist.page.evaluate("app.extensionManager.command.execute('Comfy.Redo')")
    artist.settles_on(moved)
    are_offered(True)


@pytest.mark.parametrize("kind", ["SDARegionalPrompt", "SDAStrength"])
def test_the_wheel_zooms_the_graph(kind: str, artist: Artist) -> None:
    artist.add(kind)
    artist.drag((0.4, 0.4), (0.5, 0.3))  # the focus is in the canvas
    for place in (artist.at(0.5, 0.5), (artist.at(0.5, 1)[0], artist.at(0.5, 1)[1] + 20)):  # the picture, and the lines below
        before, scale = artist.values(), artist.page.evaluate("app.canvas.ds.scale")
        artist.page.mouse.move(*place)
        artist.page.mouse.wheel(0, 120)
        artist.page.wait_for_timeout(200)
        assert artist.values() == before
        assert artist.page.evaluate("app.canvas.ds.scale") < scale


def test_a_canvas_that_is_seen_from_afar_can_be_used(artist: Artist) -> None:
    detail = "LiteGraph.Canvas.MinFontSizeForLOD"
    artist.add("SDARegionalPrompt")
    try:
        artist.page.evaluate("name => app.extensionManager.setting.set(name, 8)", detail)  # the page's own value on the classic canvas
        artist.page.evaluate("app.canvas.ds.scale = 0.5; app.canvas.setDirty(true, true)")
        artist.page.wait_for_timeout(500)
        assert artist.canvas.is_visible() == artist.desk.modern
        if artist.desk.modern:
            artist.drag((0.5, 0.5), (0.6, 0.55))
            assert artist.box() == pytest.approx([0.35, 0.30, 0.5, 0.5], abs=0.021)
    finally:
        artist.page.evaluate("name => app.extensionManager.setting.set(name, 0)", detail)


@pytest.mark.parametrize("language", ["en", "zh", "ja"])
def test_the_hint_is_read_in_one_line(language: str, artist: Artist) -> None:
    speak = """async ([pack, language]) => {
        const [{ api }, { speak }] = await Promise.all([import('/scripts/api.js'), import(`/extensions/${pack}/js/texts.js`)]);
        speak(await api.getCustomNodesI18n(), language);
    }"""
    try:
        artist.page.evaluate(speak, [PACK, language])
        for kind in ("SDARegionalPrompt", "SDAStrength"):
            artist.add(kind)
            artist.says()
            lines = artist.page.locator(".sda-editor").last.locator(".sda-line")
            sizes = lines.evaluate_all("all => all.map(line => [line.scrollWidth - line.clientWidth, line.clientHeight])")
            assert all(hidden <= 0 and height < 20 for hidden, height in sizes)
            assert "Ctrl" in lines.last.get_attribute("title")
    finally:
        artist.page.evaluate(speak, [PACK, "en"])


def test_what_a_workflow_says_is_no_markup(artist: Artist) -> None:
    artist.add("SDAStrength")
    text = "<img src=x onerror='window.injected = true'>"
    artist.page.evaluate(WRITE, text)
    assert text in artist.says()
    assert artist.page.evaluate("window.injected") is None


@pytest.mark.parametrize("desk", ["classic canvas"], indirect=True)
def test_the_text_of_the_cells_reads_as_python_does(desk: Desk) -> None:
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

    assert desk.page.evaluate(script, [PACK, texts]) == [python(text) for text in texts]
