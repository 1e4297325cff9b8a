"""The canvas of the Regions node in the real page: boxes and brush, by mouse and by keys, in both renderers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from semantic_diffusion_adapter.kernels import region_list
from semantic_diffusion_adapter.training.miniature.parser import parse

if TYPE_CHECKING:
    from .conftest import Artist

pytestmark = pytest.mark.browser
TEMPLATES = Path(__file__).resolve().parents[2] / "example_workflows"


def listed(artist: Artist) -> tuple[region_list.Region, ...]:
    """The list in the node's widget, as the node itself reads it."""
    return region_list.parse(artist.values()["regions"])


def panel(artist: Artist, label: str):
    return artist.page.locator(f".sda-panel [aria-label='{label}']")


def test_regions_are_drawn_chosen_filled_in_and_kept(artist: Artist) -> None:
    artist.add("SDARegions")
    assert artist.says() == "No region is selected: drag in the picture for a new one."
    artist.drag((0.05, 0.1), (0.4, 0.6))
    artist.drag((0.6, 0.35), (0.9, 0.8))
    first, second = listed(artist)
    assert first.box == pytest.approx((0.05, 0.1, 0.35, 0.5), abs=0.03) and second.name == "Region 2"
    assert first.colour != second.colour and artist.says().startswith("2/2 · Region 2")

    artist.page.mouse.click(*artist.at(0.2, 0.3))
    assert artist.says().startswith("1/2 · Region 1")
    panel(artist, "Prompt").fill("a red circle")
    panel(artist, "Strength").fill("1.5")
    panel(artist, "Start").fill("0.25")
    panel(artist, "Start").blur()
    panel(artist, "Name").nth(0).fill("sun")
    panel(artist, "On").nth(1).uncheck()
    panel(artist, "Shows").select_option("1s")
    first, second = listed(artist)
    # Whatever was touched last in a row is the selected region.
    assert (first.prompt, first.strength, first.start, first.name, first.on) == ("a red circle", 1.5, 0.25, "sun", True)
    assert (second.on, second.speaks, second.placed) == (False, 1, True)

    artist.drag((0.2, 0.3), (0.3, 0.35))
    moved = listed(artist)[0].box
    assert moved[:2] == pytest.approx((first.box[0] + 0.1, first.box[1] + 0.05), abs=0.03) and moved[2:] == first.box[2:]
    artist.press("Shift+ArrowRight", "Control+ArrowDown")
    assert listed(artist)[0].box == pytest.approx((moved[0], moved[1] + 0.1, moved[2] + 0.01, moved[3]), abs=1e-6)
    artist.undo()
    artist.page.wait_for_timeout(600)
    assert listed(artist)[0].box == pytest.approx((moved[0], moved[1], moved[2] + 0.01, moved[3]), abs=1e-6)

    kept = artist.values()
    artist.reload()
    assert artist.values() == kept
    prompt = artist.page.evaluate("async () => Object.values((await app.graphToPrompt()).output)[0].inputs")
    assert prompt["regions"] == kept["regions"] and "sda_canvas" not in prompt
    assert json.loads(kept["regions"])["version"] == 1


def test_there_is_always_one_more_embedding_to_connect(artist: Artist) -> None:
    """In the page alone: the server knows all sixteen, so a workflow is the same with and without this."""
    page, others = artist.page, "added.inputs.map(({ name }) => name).filter(name => name.startsWith('other_'))"
    artist.add("SDARegions")
    artist.drag((0.1, 0.1), (0.4, 0.4))
    shows = panel(artist, "Shows").locator("option")
    assert page.evaluate(others) == ["other_1"] and shows.count() == 3
    link = """name => {
        const from = LiteGraph.createNode('SDALoadEmbedding');
        app.graph.add(from);
        from.connect(0, added, added.inputs.findIndex(input => input.name === name));
    }"""
    for number in range(1, 17):
        page.evaluate(link, f"other_{number}")
    assert page.evaluate(others) == [f"other_{number}" for number in range(1, 17)]
    artist.says()
    assert shows.count() == 33
    panel(artist, "Shows").select_option("12s")
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output[added.id].inputs")
    assert [name for name in prompt if name.startswith("other_")] == [f"other_{number}" for number in range(1, 17)]

    page.evaluate("added.disconnectInput(added.inputs.findIndex(input => input.name === 'other_16'))")
    assert page.evaluate(others)[-1] == "other_16"
    for number in (15, 14, 3):
        page.evaluate("name => added.disconnectInput(added.inputs.findIndex(input => input.name === name))", f"other_{number}")
    assert page.evaluate(others) == [f"other_{number}" for number in range(1, 15)], "a gap stays"
    saved = page.evaluate("JSON.stringify(app.graph.serialize())")
    page.evaluate("async text => { await app.loadGraphData(JSON.parse(text)); }", saved)
    page.evaluate("window.added = app.graph.nodes.find(node => node.type === 'SDARegions')")
    assert page.evaluate(others) == [f"other_{number}" for number in range(1, 15)]
    linked = page.evaluate("async () => Object.keys((await app.graphToPrompt()).output[added.id].inputs)")
    assert {f"other_{number}" for number in range(1, 14) if number != 3} == {name for name in linked if name.startswith("other_")}
    assert artist.desk.complaints == []


def test_a_shape_is_painted_and_erased(artist: Artist) -> None:
    artist.add("SDARegions")
    modes = artist.page.locator(".sda-editor [role=group] button")
    modes.nth(1).click()
    artist.drag((0.2, 0.5), (0.8, 0.5))
    (region,) = listed(artist)
    shape = region.painted()
    assert region.box is None and shape[128, 64:192].min() == 1 and shape[:80].max() == 0
    # A brush of radius 0.06: a bar 0.6 long with round ends.
    assert shape.mean().item() == pytest.approx(0.6 * 0.12 + 3.14159 * 0.06**2, rel=0.1)
    modes.nth(2).click()
    artist.drag((0.5, 0.3), (0.5, 0.7))
    cut = listed(artist)[0].painted()
    assert cut[128, 128] == 0 and cut[128, 70] == 1 and cut[128, 186] == 1
    artist.undo()
    artist.page.wait_for_timeout(600)
    assert (listed(artist)[0].painted() == shape).all()
    artist.page.mouse.click(*artist.at(0.05, 0.95))  # the focus is in the canvas again; nothing is there to erase
    artist.press("b")
    artist.drag((0.5, 0.5), (0.5, 0.75))
    lower = listed(artist)[0].painted()
    assert lower[192, 128] == 1 and lower[128, 128] == 0 and lower.sum() == shape.sum()


def test_everything_can_be_done_by_keys(artist: Artist) -> None:
    artist.add("SDARegions")
    artist.page.locator(".sda-editor .sda-stage").focus()
    artist.press("n", "n", "ArrowLeft")
    first, second = listed(artist)
    assert second.box == pytest.approx((0.24, 0.25, 0.5, 0.5)) and first.box == (0.25, 0.25, 0.5, 0.5)
    artist.press("[", "Delete")
    assert [region.name for region in listed(artist)] == [second.name]
    artist.press("p", "Control+ArrowLeft", "Control+ArrowUp", "Control+ArrowUp", "Control+ArrowUp", "Space")
    assert listed(artist)[0].painted()[26:60, 90:110].max() == 1
    before = listed(artist)[0].painted().sum()
    artist.press("e", "Space")
    assert listed(artist)[0].painted().sum() < before


def test_the_canvas_is_enlarged_and_comes_back(artist: Artist) -> None:
    artist.add("SDARegions")
    small = artist.canvas.bounding_box()["height"]
    artist.page.locator(".sda-editor button[aria-label^='Larger']").click()
    artist.page.wait_for_timeout(300)
    assert artist.canvas.bounding_box()["height"] > 1.5 * small
    artist.drag((0.1, 0.1), (0.3, 0.3))
    artist.desk.photograph(f"regions enlarged {artist.desk.modern}")
    panel(artist, "Prompt").click()
    artist.press("Escape")  # from a field as well
    artist.page.wait_for_timeout(300)
    assert artist.page.locator(".sda-window").count() == 0 and abs(artist.canvas.bounding_box()["height"] - small) < 3
    assert len(listed(artist)) == 1 and artist.says().startswith("1/1")


def test_after_an_undo_the_hand_goes_on_where_it_was(artist: Artist) -> None:
    """The page's undo puts another node there: the window stays, with the brush in it, and what is drawn is that node's."""
    artist.add("SDARegions")
    artist.page.locator(".sda-editor button[aria-label^='Larger']").click()
    artist.page.wait_for_timeout(300)
    artist.press("p")
    artist.page.locator(".sda-panel [aria-label='Brush size']").fill("0.1")
    artist.page.locator(".sda-editor .sda-stage").focus()
    artist.drag((0.2, 0.2), (0.4, 0.2))
    before = listed(artist)
    artist.drag((0.2, 0.6), (0.4, 0.6))
    artist.undo()
    artist.page.wait_for_timeout(800)
    assert listed(artist) == before and artist.page.locator(".sda-window .sda-editor").count() == 1
    artist.page.locator(".sda-window .sda-stage").focus()
    artist.drag((0.6, 0.6), (0.8, 0.6))
    (region,) = listed(artist)
    shape = region.painted()
    assert shape[154, 180] == 1 and shape[51, 75] == 1 and shape[154, 75] == 0, "painted on what the undo left, in the new node"
    assert shape[154 - 22, 180] == 1, "with the brush as it was"
    artist.press("Escape")
    artist.page.wait_for_timeout(300)
    assert artist.page.locator(".sda-window").count() == 0 and artist.canvas.last.is_visible()
    artist.drag((0.5, 0.9), (0.6, 0.9))
    assert listed(artist)[0].painted()[230, 140] == 1


WRITE = "text => { const list = added.widgets.find(w => w.name === 'regions'); list.value = text; list.callback?.(text); }"
HOSTILE = [
    '{"regions": [' + "0," * 300_000 + "0]}",
    '{"regions": [{"box": [0, 0, 1e999, 1]}]}',
    '{"version": 7}',
    '{"regions": [{"box": [0, 0, 1, 1], "name": 3}]}',
    '{"regions": [{"box": [0, 0, 1, 1], "colour": "red"}]}',
    '{"regions": [{"mask": [65536, 1]}]}',
    "[" * 50_000,
]


def test_a_hostile_list_is_one_sentence_and_is_not_written_over(artist: Artist) -> None:
    artist.add("SDARegions")
    for text in HOSTILE:
        artist.page.evaluate(WRITE, text)
        said = artist.says()
        assert said.startswith("The list of regions cannot be read") and len(said) < 200, text[:40]
        artist.drag((0.1, 0.1), (0.3, 0.3))
        assert artist.values()["regions"] == text


def test_two_regions_drawn_in_the_page_are_painted_where_they_are(artist: Artist) -> None:
    """On the miniature: the template without its regions, one drawn as a box and one painted, each with a prompt, and run."""
    template = json.loads((TEMPLATES / "20 Regions (miniature).json").read_text(encoding="utf-8"))
    (node,) = (node for node in template["nodes"] if node["type"] == "SDARegions")
    (saving,) = (node["id"] for node in template["nodes"] if node.get("title") == "With the regions")
    node["widgets_values"] = [""]
    artist.desk.load(template)
    artist.page.evaluate("app.canvas.ds.scale = 1; app.canvas.ds.offset[0] = -200; app.canvas.ds.offset[1] = 60")
    artist.page.evaluate("app.canvas.setDirty(true, true)")
    artist.canvas.last.wait_for(state="visible")
    artist.page.wait_for_timeout(500)
    read = f"app.graph.getNodeById({node['id']}).widgets.find(w => w.name === 'regions').value"

    artist.drag((0.03, 0.63), (0.5, 0.99))
    panel(artist, "Prompt").fill("a small yellow square at the bottom left")
    panel(artist, "Mode").select_option("join")
    artist.page.locator(".sda-editor .sda-stage").focus()
    artist.press("p", "n")
    panel(artist, "Brush size").fill("0.18")
    artist.drag((0.18, 0.16), (0.24, 0.2))
    panel(artist, "Prompt").fill("a small blue triangle at the top left")
    panel(artist, "Mode").select_option("join")
    box, painted = region_list.parse(artist.page.evaluate(read))
    assert box.box[1:] == pytest.approx((0.63, 0.47, 0.37), abs=0.02) and 0.08 < painted.painted().mean() < 0.2

    artist.desk.run()
    url = f"Object.values(app.nodeOutputs[{saving}].images)[0]"
    artist.desk.until(f"Boolean(app.nodeOutputs[{saving}]?.images?.length)", True)
    file = artist.page.evaluate(url)
    data = artist.page.request.get(f"{artist.desk.url}/view", params=file).body()
    seen = {thing.name: thing for thing in parse(np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).things}
    assert {"red cross", "red circle", "cyan cross"} <= set(seen), "the picture's own things are there"
    assert (seen["yellow square"].x < 64, seen["yellow square"].y > 64) == (True, True)
    assert (seen["blue triangle"].x < 64, seen["blue triangle"].y < 64) == (True, True)

    # The canvas goes on on what was painted, if it is asked to: at the yellow square's middle the source is brown.
    artist.page.locator(".sda-panel [aria-label=On]").nth(0).uncheck()
    artist.page.locator(".sda-panel [aria-label=On]").nth(1).uncheck()
    middle = (seen["yellow square"].x / 128, seen["yellow square"].y / 128)
    brown = artist.colour(*middle)
    artist.page.get_by_role("button", name="Draw on the latest picture").click()
    artist.page.wait_for_timeout(500)
    yellow = artist.colour(*middle)
    assert yellow[1] - yellow[2] > brown[1] - brown[2] + 60


def test_what_a_detector_found_becomes_regions_by_one_click(artist: Artist) -> None:
    artist.add("SDARegions")
    take = artist.page.get_by_role("button", name="Make a region of everything")
    assert not take.is_visible()
    half = [0, 256 * 128, 256 * 128]
    found = [{"box": [0.1, 0.1, 0.3, 0.4], "mask": None}, {"box": [0, 0, 1, 0.5], "mask": half}]
    artist.page.evaluate("found => added.onExecuted({ found })", found)
    artist.says()
    take.click()
    boxed, masked = listed(artist)
    assert boxed.box == (0.1, 0.1, 0.3, 0.4) and boxed.mask is None and boxed.name == "Region 1"
    assert masked.painted()[:128].min() == 1 and masked.painted()[128:].max() == 0


def test_a_finger_draws_and_a_pens_pressure_is_the_brush(artist: Artist) -> None:
    artist.add("SDARegions")
    touch = """([points, kind, pressure]) => {
        const canvas = document.querySelector('.sda-editor canvas');
        points.forEach(([clientX, clientY], at) => {
            const type = at === 0 ? 'pointerdown' : at === points.length - 1 ? 'pointerup' : 'pointermove';
            const buttons = type === 'pointerup' ? 0 : 1;
            canvas.dispatchEvent(new PointerEvent(type, { clientX, clientY, pointerType: kind, pressure, button: 0, buttons,
                isPrimary: true, bubbles: true, pointerId: 7 }));
        });
    }"""
    artist.page.evaluate("document.querySelector('.sda-editor canvas').setPointerCapture = () => {}")
    path = [artist.at(*point) for point in ((0.1, 0.2), (0.3, 0.4), (0.5, 0.7), (0.5, 0.7))]
    artist.page.evaluate(touch, [path, "touch", 0.5])
    artist.says()
    assert listed(artist)[0].box == pytest.approx((0.1, 0.2, 0.4, 0.5), abs=0.06)
    artist.page.locator(".sda-editor .sda-stage").focus()
    artist.press("Delete", "p")
    areas = []
    for pressure in (0.1, 1.0):
        artist.press("n")
        artist.page.evaluate(touch, [[artist.at(0.5, 0.5)] * 2, "pen", pressure])
        artist.says()
        areas.append(float(listed(artist)[-1].painted().mean()))
    assert 0 < areas[0] < areas[1] / 4
