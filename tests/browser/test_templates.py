"""What an artist does: pick a template, read it, press Run, see the pictures; every template, in either renderer, on a small screen."""

from __future__ import annotations

import json
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from semantic_diffusion_adapter.runner.server import PACK, Server
from semantic_diffusion_adapter.runner.workflow import to_prompt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser

    from .conftest import Desk

pytestmark = pytest.mark.browser

FOLDER = Path(__file__).resolve().parents[2] / "example_workflows"
TEMPLATES = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
FIRST = next(iter(TEMPLATES))
VIEW = {"width": 1900, "height": 1000}  # of the other files
SMALL = {"width": 1366, "height": 768}
READABLE = 0.59  # of its full size; below 8/14 the page draws no text
PUBLIC = [name for name in TEMPLATES if "miniature" not in name.lower()]  # need files that nobody ships

UNKNOWN = "app.graph.nodes.map(node => node.type).filter(type => !(type in LiteGraph.registered_node_types))"
# As the template browser opens it.
OPEN = """async ([name, text]) => {
    await app.loadGraphData(JSON.parse(text), true, true, name, { openSource: 'template' });
}"""
# What the page cannot show in the places that the template gives: nodes over nodes or out of their groups, text or widgets
# out of their nodes.
CROWDED = """([modern, ids]) => {
    const found = [], { ds, canvas } = app.canvas, page = canvas.getBoundingClientRect();
    const nodes = app.graph.nodes.filter(node => ids.includes(node.id));
    const groups = app.graph.groups.map(group => [...group.pos, ...group.size]);
    const element = node => modern ? document.querySelector(`[data-node-id="${node.id}"]`) : null;
    const boxes = nodes.map(node => {
        if (!modern) return [...node.boundingRect];
        const { left, top, width, height } = element(node).getBoundingClientRect();
        return [(left - page.left) / ds.scale - ds.offset[0], (top - page.top) / ds.scale - ds.offset[1],
                width / ds.scale, height / ds.scale];
    });
    const shared = (a, b, axis) => Math.min(a[axis] + a[axis + 2], b[axis] + b[axis + 2]) - Math.max(a[axis], b[axis]);
    nodes.forEach((node, at) => {
        for (let other = 0; other < at; other++) {
            const [across, down] = [0, 1].map(axis => Math.round(shared(boxes[at], boxes[other], axis)));
            if (across > 0 && down > 0) found.push(`${node.title} over ${nodes[other].title}: ${across} x ${down}`);
        }
        const held = group => [0, 1].every(axis => shared(boxes[at], group, axis) > boxes[at][axis + 2] - 5);
        if (node.type !== 'MarkdownNote' && !groups.some(held)) found.push(`${node.title} out of its group`);
        const inside = modern ? element(node) : node.type === 'MarkdownNote' ? node.widgets[0].element : null;
        for (const part of inside?.querySelectorAll('*') ?? []) {
            const scrolls = part.clientHeight > 8 && part.scrollHeight > part.clientHeight + 2;
            const unseen = !part.checkVisibility() || (node.type === 'MarkdownNote' && part.tagName === 'TEXTAREA');
            if (scrolls && !unseen && getComputedStyle(part).overflowY !== 'visible') {
                found.push(`${node.title}: ${part.scrollHeight} pixels of ${part.tagName} in ${part.clientHeight}`);
            }
        }
    });
    return found;
}"""
# The page has really drawn a picture on each of these nodes.
PICTURES = """([modern, ids]) => ids.every(id => {
    const picture = modern ? document.querySelector(`[data-node-id="${id}"] img`) : app.graph.getNodeById(id).imgs?.[0];
    return app.nodeOutputs?.[id]?.images?.length && picture?.naturalWidth;
})"""
# The miniature in place of the public files, at its own size, linked as an artist would on the page.
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
    if (app.graph.nodes.some(node => node.type === 'SDAEncodeRedux')) {
        const [encode, build] = [add('SDAEncodeImage'), add('SDABuildEmbedding')];
        const files = { encoder_1: 'miniature_clip.safetensors', encoder_2: 'miniature_dinov2.safetensors' };
        link(add('SDALoadVisionEncoders', files), 0, encode, 'vision');
        link(add('SDALoadAdapter'), 0, build, 'adapter');
        link(load, 7, encode, 'image');
        link(encode, 0, build, 'features');
        instead.SDAEncodeRedux = [build, 0];
    }
    for (const node of [...app.graph.nodes]) {
        for (const target of instead[node.type] ? node.getOutputNodes(0) ?? [] : []) {
            target.inputs.forEach((_, at) => {
                if (target.getInputNode(at) === node) instead[node.type][0].connect(instead[node.type][1], target, at);
            });
        }
        if (!['EmptySD3LatentImage', 'ImageScale'].includes(node.type)) continue;
        for (const widget of node.widgets) {
            if (['width', 'height'].includes(widget.name)) widget.value = 128;
        }
    }
    const gone = [...Object.keys(instead), 'CLIPVisionLoader', 'StyleModelLoader'];
    app.graph.nodes.filter(node => gone.includes(node.type)).forEach(node => app.graph.remove(node));
}"""
# What is painted and fitted has its own tests; here it only has to end and be shown.
SHORT = """() => app.graph.nodes.filter(node => ['SDAFitEmbedding', 'KSampler', 'BasicScheduler'].includes(node.type))
    .forEach(node => { node.widgets.find(widget => widget.name === 'steps').value = 3; })"""


@pytest.fixture(params=TEMPLATES)
def name(request: pytest.FixtureRequest) -> str:
    """Of a template. As a fixture, so that both renderers follow one another and the second finds the first's results."""
    return request.param


@pytest.fixture(scope="module", autouse=True)
def small(desks: dict[str, Desk]) -> Iterator[None]:
    for desk in desks.values():
        desk.resize(SMALL)
    yield
    for desk in desks.values():
        desk.resize(VIEW)


def missing(desk: Desk) -> str:
    """What the page says of files that are not there; closes it. In a dialog, and since frontend 1.4x in a panel."""
    page, panel = desk.page, desk.page.get_by_test_id("properties-panel")
    dialog, details = page.locator(".p-dialog"), page.get_by_test_id("error-overlay-see-errors")
    dialog.or_(details).first.wait_for()
    if not details.count():
        text = dialog.inner_text()
        page.keyboard.press("Escape")
        dialog.wait_for(state="hidden")
        return text
    details.click()
    text = panel.inner_text()
    panel.get_by_role("button", name="Toggle properties panel").click()
    panel.wait_for(state="hidden")
    return text


def test_a_first_visit_ends_in_a_picture(server: Server, nodes: dict, miniature: Path, browser: Browser) -> None:
    """The template browser, and then by clicks alone: the pack, the template, Run."""
    page = browser.new_page(viewport=VIEW)
    settings = {"TutorialCompleted": True, "VueNodes.Enabled": False, "Workflow.Persist": True}
    page.request.post(f"{server.url}/settings", data={f"Comfy.{key}": value for key, value in settings.items()})
    page.goto(server.url)
    page.wait_for_function("window.app?.graph && window.app.extensionManager?.command", timeout=60_000)
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
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
    page.evaluate(OPEN, [name, served.text()])
    page.wait_for_function(f"app.graph.nodes.length === {len(TEMPLATES[name]['nodes'])}")
    page.wait_for_function(f"app.canvas.ds.scale >= {READABLE}")
    assert page.evaluate(UNKNOWN) == []
    if name in PUBLIC:
        offered = missing(desk)  # the page offers to download them
        assert [model for node in listed for model in node["properties"].get("models", []) if model["name"] not in offered] == []
    else:
        assert desk.red() == []
    complaints = page.locator(".p-dialog, [data-testid=error-overlay], .p-toast-message")
    assert not complaints.count() or name in PUBLIC, complaints.all_inner_texts()
    desk.fit()
    crowded = f"({CROWDED})({json.dumps([desk.modern, [node['id'] for node in TEMPLATES[name]['nodes']]])})"
    desk.until(crowded, [])
    if name in PUBLIC:
        page.evaluate(ON_THE_MINIATURE)
    page.evaluate(SHORT)

    desk.run()
    shown = [node for node in listed if nodes[node["type"]]["output_node"] and node["type"] != "SDASaveEmbedding"]
    page.wait_for_function(PICTURES, arg=[desk.modern, [node["id"] for node in shown]], timeout=20_000)
    assert desk.red() == []
    desk.until(crowded, [])


def test_the_first_template_is_an_app_where_the_page_knows_apps(desk: Desk, miniature: Path) -> None:
    page = desk.page
    page.evaluate(OPEN, [FIRST, json.dumps(TEMPLATES[FIRST])])
    kept = page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize())).extra.linearData")
    assert kept == TEMPLATES[FIRST]["extra"]["linearData"]
    if not page.get_by_test_id("view-mode-toggle").count():
        return  # an older page, which only keeps it
    page.evaluate("app.extensionManager.command.execute('Comfy.ToggleLinear')")
    try:
        for name in ("instruction", "preset", "seed"):
            page.get_by_text(name, exact=True).locator("visible=true").first.wait_for()
        desk.run()
        page.locator("img[src*=edited_]").locator("visible=true").first.wait_for()
        desk.photograph(f"app, {'Nodes 2.0' if desk.modern else 'classic canvas'}")
    finally:
        page.evaluate("app.extensionManager.command.execute('Comfy.ToggleLinear')")
