"""The rest of the kit in the page: upload, blueprint, help pages, languages, and mistakes as the artist reads them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from semantic_diffusion_adapter.kernels import embedding_file
from semantic_diffusion_adapter.kernels.embedding import from_hierarchy
from semantic_diffusion_adapter.kernels.hierarchy import hierarchy
from semantic_diffusion_adapter.runner.server import PACK
from semantic_diffusion_adapter.training.miniature.parser import parse

if TYPE_CHECKING:
    from .conftest import Artist, Desk

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[2]
# Adds nodes as [class, {widget: value}], linked as [from, output, to, input] by their places in that list.
BUILD = """([nodes, links]) => {
    const made = nodes.map(([type, values], at) => {
        const node = LiteGraph.createNode(type);
        node.pos = [at * 440, 0]; // before it is there: Nodes 2.0 does not follow later
        app.graph.add(node);
        for (const [name, value] of Object.entries(values)) node.widgets.find(widget => widget.name === name).value = value;
        return node;
    });
    for (const [from, slot, to, name] of links) {
        made[from].connect(slot, made[to], made[to].inputs.findIndex(input => input.name === name));
    }
}"""

# Of a page that collects its errors in a panel.
DETAILS, INFO = "error-overlay-see-errors", "[data-testid=properties-panel] button[aria-controls][aria-expanded=false]"
CHOSEN = "app.graph.nodes.find(node => node.type === 'SDALoadEmbedding').widgets[0].value"


def build(desk: Desk, nodes: list, links: list = ()) -> None:
    desk.page.evaluate(BUILD, [nodes, list(links)])
    desk.fit()


def save_embedding(path: Path, width: int = 24, **source: object) -> Path:
    grids = hierarchy("tree64")
    tokens = torch.randn(1, grids.token_count, width, generator=torch.Generator().manual_seed(0))
    embedding_file.save(path, from_hierarchy(tokens, grids, None, source))
    return path


def read(desk: Desk, sentence: str) -> None:
    """The artist can read it: in a dialog, or (since frontend 1.4x) in the panel of errors, where it may have to be unfolded."""
    page = desk.page
    text, details = page.get_by_text(sentence).first, page.get_by_test_id(DETAILS)
    details.or_(text).first.wait_for()
    if details.count():
        details.click()
        text.or_(page.locator(INFO).first).first.wait_for()
        while not text.count() and page.locator(INFO).count():
            page.locator(INFO).first.click()
            page.wait_for_timeout(300)
        desk.photograph(f"error, {sentence[:30]}")
    text.wait_for()
    page.keyboard.press("Escape")


def press_upload(desk: Desk) -> None:
    page = desk.page
    if desk.modern:
        page.get_by_role("button", name="choose file to upload").click()
        return
    x, y = page.evaluate(
        """() => {
            const { left, top } = app.canvas.canvas.getBoundingClientRect();
            const [node] = app.graph.nodes;
            const [x, y] = app.canvas.ds.convertOffsetToCanvas([node.pos[0] + 60, node.pos[1] + node.widgets[1].last_y + 10]);
            return [left + x, top + y];
        }"""
    )
    page.mouse.click(x, y)


def test_an_embedding_is_uploaded_chosen_and_kept(desk: Desk, tmp_path: Path) -> None:
    name = f"shared by {'an artist' if desk.modern else 'a friend'}.safetensors"
    build(desk, [["SDALoadEmbedding", {}], ["SDAPreviewEmbedding", {}]], [[0, 0, 1, "embedding"]])
    with desk.page.expect_file_chooser() as chooser:
        press_upload(desk)
    chooser.value.set_files(save_embedding(tmp_path / name))
    desk.until(CHOSEN, f"embeddings/{name}")
    prompt = desk.page.evaluate("async () => (await app.graphToPrompt()).output")
    assert [node["inputs"] for node in prompt.values() if node["class_type"] == "SDALoadEmbedding"] == [{"file": f"embeddings/{name}"}]
    desk.run()
    desk.until("app.nodeOutputs[app.graph.nodes.find(node => node.type === 'SDAPreviewEmbedding').id]?.images?.length", 1)
    saved = desk.page.evaluate("JSON.stringify(app.graph.serialize())")
    desk.clear()
    desk.load(saved)
    assert desk.page.evaluate(CHOSEN) == f"embeddings/{name}"
    (node,) = (node for node in json.loads(saved)["nodes"] if node["type"] == "SDALoadEmbedding")
    assert node["widgets_values"] == [f"embeddings/{name}"]


def test_an_upload_that_fails_is_told(desk: Desk, tmp_path: Path) -> None:
    build(desk, [["SDALoadEmbedding", {}]])
    desk.page.route("**/upload/image", lambda route: route.fulfill(status=413, body=""))
    with desk.page.expect_file_chooser() as chooser:
        press_upload(desk)
    chooser.value.set_files(save_embedding(tmp_path / "large.safetensors"))
    desk.page.get_by_text("large.safetensors was not uploaded (413").first.wait_for()
    desk.page.unroute("**/upload/image")
    assert desk.page.evaluate(CHOSEN) != "embeddings/large.safetensors"


def place(desk: Desk, blueprint: str) -> None:
    """As an artist does: double-click, search, choose."""
    page, search = desk.page, desk.page.locator(".comfy-vue-node-search-container, #results-list")  # the second since 1.4x
    for _ in range(3):  # two clicks are not always near enough in time
        page.mouse.dblclick(950, 500)
        page.wait_for_timeout(500)
        if search.is_visible():
            break
    page.keyboard.type(blueprint)
    search.locator("li, [role=option]").filter(has_text=blueprint).first.click()
    desk.until("app.graph.nodes.length", 1)
    page.mouse.move(950, 500)  # newer pages hang it on the pointer first, which it follows from frame to frame
    page.wait_for_timeout(300)
    page.mouse.click(950, 500)
    desk.until("app.canvas.state?.ghostNodeId ?? null", None)


def test_the_blueprint_is_found_placed_and_runs(desk: Desk, miniature: Path) -> None:
    page = desk.page
    place(desk, "Encode, edit, decode")
    page.evaluate(
        """() => {
            const [blueprint] = app.graph.nodes;
            for (const [name, value] of Object.entries({ width: 128, height: 128, steps: 4, instruction: 'remove the red circle' })) {
                blueprint.widgets.find(widget => widget.name === name).value = value;
            }
        }"""
    )
    files = {"encoder_1": "miniature_clip.safetensors", "encoder_2": "miniature_dinov2.safetensors"}
    loaders = [["SDALoadMiniature", {}], ["SDALoadVisionEncoders", files], ["SDALoadAdapter", {}], ["SDALoadEditDecoder", {}]]
    build(desk, [*loaders, ["PreviewImage", {}]])
    page.evaluate(
        """() => {
            const [blueprint, miniature, vision, adapter, editor, shown] = app.graph.nodes;
            const give = (from, slot, name) => from.connect(slot, blueprint, blueprint.inputs.findIndex(input => input.name === name));
            [['model', 0], ['clip', 1], ['vae', 2], ['image', 7]].forEach(([name, slot]) => give(miniature, slot, name));
            give(vision, 0, 'vision');
            give(adapter, 0, 'adapter');
            give(editor, 0, 'edit_decoder');
            blueprint.connect(0, shown, 0);
            blueprint.pos = [0, 400];
        }"""
    )
    desk.fit()
    desk.run()
    desk.until("app.nodeOutputs[app.graph.nodes.at(-1).id]?.images?.length", 1)
    assert desk.red() == []


def test_redux_with_layout_is_found_placed_and_linked(desk: Desk) -> None:
    """Its dials are on its face, and what they say reaches the nodes inside. tests/nodes runs them."""
    place(desk, "Redux with layout")
    build(desk, [["SDALoadMiniature", {}], ["SDAPreviewEmbedding", {}]])
    desk.page.evaluate(
        """() => {
            const [blueprint, miniature, shown] = app.graph.nodes;
            const give = (slot, name) => miniature.connect(slot, blueprint, blueprint.inputs.findIndex(input => input.name === name));
            [['model', 0], ['image', 7]].forEach(([name, slot]) => give(slot, name));
            blueprint.connect(blueprint.outputs.findIndex(output => output.name === 'embedding'), shown, 0);
            const dials = { preset: 'quad64', whole: 0.5, quarters: 0.75, sixteenths: 0 };
            for (const [name, value] of Object.entries(dials)) blueprint.widgets.find(widget => widget.name === name).value = value;
            blueprint.pos = [0, 400];
        }"""
    )
    desk.fit()
    prompt = desk.page.evaluate("async () => (await app.graphToPrompt()).output")
    (encode,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "SDAEncodeRedux")
    assert [encode[name] for name in ("preset", "whole", "quarters", "sixteenths")] == ["quad64", 0.5, 0.75, 0]
    assert {node["class_type"] for node in prompt.values()} >= {"SDAMaskedAttention", "SDAEmbeddingToConditioning"}
    assert prompt[encode["image"][0]]["class_type"] == "SDALoadMiniature"


def corner(desk: Desk) -> None:
    """Show the blueprint where there is room for it: Nodes 2.0 does not let it be moved."""
    desk.page.evaluate(
        """() => {
            const { ds, graph } = app.canvas;
            const [x, y] = graph.nodes.find(node => node.isSubgraphNode()).pos;
            [ds.offset[0], ds.offset[1]] = [500 - x, 120 - y];
            app.canvas.setDirty(true, true);
        }"""
    )
    desk.page.wait_for_timeout(500)


def test_regional_prompts_are_drawn_on_the_blueprints_own_face(desk: Desk, artist: Artist, miniature: Path) -> None:
    """The canvas of the node inside; what is drawn and said there is painted."""
    page = desk.page
    place(desk, "Regional prompts")
    build(desk, [["SDALoadMiniature", {}], ["CLIPTextEncode", {}], ["EmptyLatentImage", {"width": 128, "height": 128}],
                 ["KSampler", {"steps": 4, "cfg": 1}], ["VAEDecode", {}], ["SaveImage", {}]])  # fmt: skip
    page.evaluate(
        """() => {
            const [blueprint, miniature, text, latent, sampler, decode, shown] = app.graph.nodes;
            const give = (from, slot, to, name) => from.connect(slot, to, to.inputs.findIndex(input => input.name === name));
            const out = name => blueprint.outputs.findIndex(output => output.name === name);
            give(miniature, 0, blueprint, 'model');
            give(miniature, 1, blueprint, 'clip');
            give(miniature, 1, text, 'clip');
            give(text, 0, blueprint, 'text');
            give(blueprint, out('model'), sampler, 'model');
            ['positive', 'negative'].forEach(name => give(blueprint, out('positive'), sampler, name));
            give(latent, 0, sampler, 'latent_image');
            give(sampler, 0, decode, 'samples');
            give(miniature, 2, decode, 'vae');
            give(decode, 0, shown, 'images');
            text.widgets[0].value = 'a large red circle at the top left on a brown ground';
        }"""
    )
    artist.settle()
    corner(desk)
    prompt = page.locator(".sda-panel [aria-label=Prompt]").last
    page.mouse.click(*artist.at(0.2, 0.5))
    artist.press("Delete", "Delete")
    artist.drag((0.5, 0.5), (0.98, 0.98))
    prompt.fill("a large yellow square at the bottom right")
    desk.photograph(f"blueprint, {'Nodes 2.0' if desk.modern else 'classic canvas'}")
    desk.run()
    saved = "app.nodeOutputs[app.graph.nodes.find(({ type }) => type === 'SaveImage').id]?.images?.[0]"  # not the last: a click raises
    desk.until(f"Boolean({saved})", True)
    assert desk.red() == []
    file = page.evaluate(saved)
    data = page.request.get(f"{desk.url}/view", params=file).body()
    seen = {thing.name: thing for thing in parse(np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).things}
    assert seen["yellow square"].x > 64 and seen["yellow square"].y > 64 and "red circle" in seen


FACE = "app.graph.nodes.find(node => node.isSubgraphNode())"


def test_what_is_drawn_on_a_face_is_undone_and_kept(desk: Desk, artist: Artist) -> None:
    """And the canvas goes when the widget that it draws leaves the face."""
    page, names = desk.page, f"JSON.parse({FACE}.widgets[0].value).regions.map(({{ name }}) => name)"
    place(desk, "Regional prompts")
    artist.settle()
    corner(desk)
    page.mouse.click(*artist.at(0.2, 0.5))
    artist.press("Delete")
    desk.until(names, ["right"])
    artist.undo()
    desk.until(names, ["left", "right"])
    artist.canvas.last.wait_for(state="visible", timeout=20_000)
    page.wait_for_timeout(500)
    page.mouse.click(*artist.at(0.2, 0.5))
    artist.press("Delete")
    desk.until(names, ["right"])
    saved = page.evaluate("JSON.stringify(app.graph.serialize())")
    assert "sda_canvas" not in json.dumps(json.loads(saved)["nodes"][0]["widgets_values"])
    desk.clear()
    desk.load(saved)
    desk.until(names, ["right"])
    artist.settle()
    assert artist.canvas.count() == 1
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    (node,) = (node for node in prompt.values() if node["class_type"] == "SDARegions")
    assert [region["name"] for region in json.loads(node["inputs"]["regions"])["regions"]] == ["right"]
    page.evaluate(f"{FACE}.subgraph.inputs.at(-1).disconnect(); app.canvas.emitBeforeChange(); app.canvas.emitAfterChange()")
    desk.until(f"{FACE}.widgets.length", 0)
    assert artist.canvas.count() == 0


# A node of ours made into a subgraph, and its box put on the face while the page is inside.
OWN = """async () => {
    const { subgraph, node } = app.graph.convertToSubgraph(new Set(app.graph.nodes));
    app.canvas.openSubgraph(subgraph, node);
    const inner = subgraph.nodes[0];
    for (const name of ['x', 'y', 'width', 'height']) {
        const slot = inner.inputs.find(({ widget }) => widget?.name === name);
        subgraph.addInput(name, 'FLOAT').connect(slot, inner);
    }
    app.canvas.emitBeforeChange();
    app.canvas.emitAfterChange();
    app.canvas.setGraph(app.graph);
}"""


def test_a_subgraph_of_the_artists_own_has_the_canvas_and_every_place_its_own_box(desk: Desk, artist: Artist) -> None:
    page = desk.page
    artist.add("SDAPlace")
    page.evaluate(OWN)
    desk.until(f"{FACE}.widgets.some(({{ name }}) => name === 'sda_canvas')", True)
    artist.settle()
    corner(desk)
    box = f"['x', 'y', 'width', 'height'].map(name => {FACE}.widgets.find(widget => widget.name === name).value)"
    artist.drag((0.5, 0.5), (0.6, 0.7))  # by its corner
    assert page.evaluate(box) == pytest.approx([0.6, 0.7, 0.4, 0.3])
    page.evaluate(f"(() => {{ const other = LiteGraph.createNode({FACE}.type); other.pos = [0, 900]; app.graph.add(other); }})()")
    page.evaluate("app.graph.nodes.at(-1).widgets.find(({ name }) => name === 'width').value = 0.11")
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    widths = sorted(round(node["inputs"]["width"], 2) for node in prompt.values() if node["class_type"] == "SDAPlace")
    assert widths == [0.11, 0.4]


@pytest.mark.parametrize("desk", ["classic canvas"], indirect=True)
def test_every_help_page_is_shown_in_the_help_panel(desk: Desk, nodes: dict) -> None:
    page, content = desk.page, desk.page.locator(".node-help-content")
    ours = [name for name, node in nodes.items() if node["python_module"].endswith(PACK)]
    pictures = 0
    for name in ours:
        page.evaluate("app.graph.clear()")
        build(desk, [[name, {}]])
        page.evaluate("app.canvas.ds.changeScale(0.5); app.canvas.selectNode(app.graph.nodes[0])")  # its tools in reach
        page.get_by_test_id("info-button").click()
        content.get_by_role("heading", level=1, name=nodes[name]["display_name"], exact=True).wait_for(timeout=10_000)
        page.wait_for_function("[...document.querySelectorAll('.node-help-content img')].every(image => image.complete)")
        widths = page.evaluate("[...document.querySelectorAll('.node-help-content img')].map(image => image.naturalWidth)")
        assert all(widths), name
        pictures += len(widths)
    desk.photograph("help page")
    desk.complaints[:] = [text for text in desk.complaints if "/en.md" not in text]  # it asks for each language first
    assert pictures == len(list((ROOT / "web" / "docs").glob("*.png")))


@pytest.mark.parametrize("desk", ["Nodes 2.0"], indirect=True)
@pytest.mark.parametrize("language", ("zh", "ja"))
def test_nodes_and_canvas_speak_the_language_of_the_page(language: str, desk: Desk) -> None:
    node = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))["SDAStrength"]
    try:
        desk.settings(Locale=language)
        desk.open()
        build(desk, [["SDAStrength", {}]])
        texts = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))["semanticDiffusion"]
        desk.page.get_by_text(texts["cellHint"]).wait_for()
        desk.page.get_by_role("button", name=texts["undoTip"]).wait_for()
        desk.page.get_by_text(node["display_name"], exact=True).first.wait_for()
        for socket in (*node["inputs"].values(), *node["outputs"].values()):
            desk.page.get_by_text(socket["name"], exact=True).first.wait_for()
        desk.page.get_by_text(node["display_name"], exact=True).first.hover()
        desk.page.get_by_text(node["description"]).first.wait_for()
        desk.photograph(f"language {language}")
    finally:
        desk.settings(Locale="en")
        desk.open()


def test_a_mistake_that_is_known_when_queued_is_read_in_the_page(desk: Desk) -> None:
    build(
        desk,
        [["SDALoadAdapter", {"adapter": "absent.safetensors"}], ["SDABuildEmbedding", {}], ["SDAPreviewEmbedding", {}]],
        [[0, 0, 1, "adapter"], [1, 0, 2, "embedding"]],
    )
    desk.page.evaluate("app.queuePrompt(0)")
    read(desk, "There is no 'absent.safetensors' in models/semantic_adapters: put the file there")
    assert "Load Semantic Adapter" in desk.red()


def test_words_that_the_miniature_does_not_know_are_named_in_the_node(desk: Desk) -> None:
    word = "much" if desk.modern else "far"  # or the second page's run finds the first one's result
    build(
        desk,
        [["SDALoadMiniature", {}], ["CLIPTextEncode", {"text": f"a teal circle, {word} bigger"}], ["PreviewAny", {}]],
        [[0, 1, 1, "clip"], [1, 0, 2, "source"]],
    )
    desk.run()
    read(desk, f"The miniature is a toy and does not know: teal, {word}, bigger. It knows: a, add, at,")


def test_a_mistake_that_only_a_run_can_show_is_read_in_the_page(desk: Desk, tmp_path: Path) -> None:
    for name in ("one", "other"):
        path = save_embedding(tmp_path / f"{name}.safetensors", adapter=f"{name}_adapter.safetensors")
        file = {"name": path.name, "mimeType": "application/octet-stream", "buffer": path.read_bytes()}
        assert desk.page.request.post(f"{desk.url}/upload/image", multipart={"image": file, "overwrite": "true"}).ok
    build(
        desk,
        [
            ["SDALoadEmbedding", {"file": "one.safetensors"}],
            ["SDALoadEmbedding", {"file": "other.safetensors"}],
            ["SDABlendEmbeddings", {}],
            ["SDAPreviewEmbedding", {}],
        ],
        [[0, 0, 2, "embedding_a"], [1, 0, 2, "embedding_b"], [2, 0, 3, "embedding"]],
    )
    desk.run()
    sentence = "Embeddings of different adapters (one_adapter.safetensors and other_adapter.safetensors) cannot be combined"
    read(desk, sentence)
