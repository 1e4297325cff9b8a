"""What an artist does: open the page, pick a template, press Run, see the pictures; every template, in either renderer."""

from __future__ import annotations

import json
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from semantic_diffusion_adapter.runner.server import PACK, Server
from semantic_diffusion_adapter.runner.workflow import to_prompt

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from .conftest import Desk

pytestmark = pytest.mark.browser

FOLDER = Path(__file__).resolve().parents[2] / "example_workflows"
TEMPLATES = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
FIRST = "Reconstruct and edit (miniature)"
PUBLIC = [name for name in TEMPLATES if "miniature" not in name.lower()]  # need files that nobody ships

UNKNOWN = "app.graph.nodes.map(node => node.type).filter(type => !(type in LiteGraph.registered_node_types))"
# The page has really drawn a picture on each of these nodes.
PICTURES = """([modern, ids]) => ids.every(id => {
    const picture = modern ? document.querySelector(`[data-node-id="${id}"] img`) : app.graph.getNodeById(id).imgs?.[0];
    return app.nodeOutputs?.[id]?.images?.length && picture?.naturalWidth;
})"""
# The miniature in place of the public files, at its own size and in few steps, linked as an artist would on the page.
# There is no style model of its width, so its adapter stands in for Redux.
ON_THE_MINIATURE = """() => {
    const add = (type, values = {}) => {
        const node = LiteGraph.createNode(type);
        app.graph.add(node);
        for (const widget of node.widgets ?? []) widget.value = values[widget.name] ?? widget.value;
        return node;
    };
    const link = (from, slot, to, name) => from.connect(slot, to, to.inputs.findIndex(input => input.name === name));
    const load = add('SDALoadMiniature');
    const instead = { UNETLoader: [load, 0], DualCLIPLoader: [load, 1], VAELoader: [load, 2], LoadImage: [load, 7] };
    if (app.graph.nodes.some(node => node.type === 'SDAFromStyleModel')) {
        const [encode, build] = [add('SDAEncodeImage'), add('SDABuildEmbedding')];
        const files = { encoder_1: 'miniature_clip.safetensors', encoder_2: 'miniature_dinov2.safetensors' };
        link(add('SDALoadVisionEncoders', files), 0, encode, 'vision');
        link(add('SDALoadAdapter'), 0, build, 'adapter');
        link(load, 7, encode, 'image');
        link(encode, 0, build, 'features');
        instead.SDAFromStyleModel = [build, 0];
    }
    for (const node of [...app.graph.nodes]) {
        for (const target of instead[node.type] ? node.getOutputNodes(0) ?? [] : []) {
            target.inputs.forEach((_, at) => {
                if (target.getInputNode(at) === node) instead[node.type][0].connect(instead[node.type][1], target, at);
            });
        }
        const [size, steps] = [node.type === 'EmptySD3LatentImage', node.type === 'KSampler'];
        for (const widget of node.widgets ?? []) {
            if (size && widget.name !== 'batch_size') widget.value = 128;
            if (steps && widget.name === 'steps') widget.value = 4;
        }
    }
    const gone = [...Object.keys(instead), 'CLIPVisionLoader', 'StyleModelLoader', 'CLIPVisionEncode'];
    app.graph.nodes.filter(node => gone.includes(node.type)).forEach(node => app.graph.remove(node));
}"""


@pytest.fixture(params=TEMPLATES)
def name(request: pytest.FixtureRequest) -> str:
    """Of a template. As a fixture, so that both renderers follow one another and the second finds the first's results."""
    return request.param


def test_a_first_visit_ends_in_a_picture(server: Server, nodes: dict, miniature: Path, browser: Browser) -> None:
    """By clicks alone: the template browser that opens by itself, the pack, the template, Run."""
    page = browser.new_page(viewport={"width": 1900, "height": 1000})
    settings = {"TutorialCompleted": False, "VueNodes.Enabled": False, "Workflow.Persist": True}
    page.request.post(f"{server.url}/settings", data={f"Comfy.{key}": value for key, value in settings.items()})
    page.goto(server.url)
    page.get_by_text(PACK, exact=True).first.click()
    page.get_by_text(FIRST, exact=True).first.click()
    page.wait_for_function("window.app?.graph?.nodes.some(node => node.type === 'SDALoadMiniature')", timeout=60_000)

    exported = page.evaluate("async () => (await app.graphToPrompt()).output")
    for node in exported.values():
        node.pop("_meta", None)
    assert to_prompt(TEMPLATES[FIRST], nodes) == exported

    page.get_by_role("button", name="Run", exact=True).first.click()
    page.wait_for_function(
        """() => {
            const shown = title => app.graph.nodes.find(node => node.title === title)?.imgs?.[0];
            return ['Source', 'Reconstruction', 'Edited'].every(title => shown(title)?.naturalWidth === 128);
        }""",
        timeout=300_000,
    )
    page.close()


def test_a_template_opens_runs_and_shows_its_pictures(name: str, desk: Desk, nodes: dict, miniature: Path) -> None:
    page, listed = desk.page, [node for node in TEMPLATES[name]["nodes"] if node["type"] in nodes]
    served = page.request.get(f"{desk.url}/api/workflow_templates/{PACK}/{urllib.parse.quote(name)}.json")
    desk.load(served.text())
    assert page.evaluate(UNKNOWN) == [] and desk.red() == []
    dialog = page.locator(".p-dialog")
    if name in PUBLIC:
        dialog.wait_for()
        offered = dialog.inner_text()  # the page offers to download what is missing
        assert [model for node in listed for model in node["properties"].get("models", []) if model["name"] not in offered] == []
        page.keyboard.press("Escape")
        dialog.wait_for(state="hidden")
        page.evaluate(ON_THE_MINIATURE)
    assert not dialog.count(), dialog.inner_text()

    desk.run()
    shown = [node for node in listed if nodes[node["type"]]["output_node"] and node["type"] != "SDASaveEmbedding"]
    page.wait_for_function(PICTURES, arg=[desk.modern, [node["id"] for node in shown]], timeout=20_000)
    assert desk.red() == []
