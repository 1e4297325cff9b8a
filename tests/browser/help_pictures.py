"""Makes the pictures of the help pages: nodes of the templates as the page shows them after a run on the miniature; and the
whole template in the README.

    python tests/browser/help_pictures.py

Writes web/docs/<node id>.png, each at most 12 KB, and assets/template.jpg.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

from conftest import FLAGS, VIEW, Desk, chromium
from PIL import Image
from playwright.sync_api import sync_playwright
from semantic_diffusion_adapter.runner.environment import prepare
from semantic_diffusion_adapter.runner.server import serve

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "web" / "docs"
LIMIT = 12 * 1024
GAP = 8
WITH_PLACE = ", with Place for Compose"  # no template has Place: it does nothing good on the miniature
README = "01 Reconstruct and edit (miniature)"
SEE, OFF = "02 Tour, see an embedding (miniature)", "03 Tour, switch a quarter off (miniature)"
TELL = "04 Tour, prompt a corner (miniature)"
KEEP = "14 Edit and keep the rest (miniature)"
COMPOSE = "08 Compose two images (miniature)"
# The page's picture: the template, and the ids of its nodes from left to right.
PICTURES = {
    "SDAAttributeEdit": ("18 Attribute slider (miniature)", 18, 14, 27),
    "SDABlendEmbeddings": ("07 Blend two images (miniature)", 8, 21, 12),
    "SDABuildEmbedding": (SEE, 9, 17),
    "SDAChangeMask": (KEEP, 22, 27, 26),
    "SDACompose": (COMPOSE, 17, 21),
    "SDAEditEmbedding": (README, 18, 22),
    "SDAEditGuider": ("05 Edit strength (miniature)", 24, 26, 28),
    "SDAFitEmbedding": ("12 Fit a picture (miniature)", 7, 8, 12),
    "SDAFlowEditGuider": (KEEP, 22, 24, 26),
    "SDAKeepOutsideMask": ("06 Edit inside a mask (miniature)", 23, 12, 25),
    "SDALoadEmbedding": ("09 Save and reuse an embedding (miniature)", 12),
    "SDAPlace": (COMPOSE + WITH_PLACE, 17),
    "SDAPreviewEmbedding": (OFF, 11),
    "SDARegionalPrompt": (TELL, 10, 16),
    "SDARegions": ("20 Regions (miniature)", 10, 16),
    "SDAStrength": (OFF, 10, 16),
    "SDAVisiblePatches": (SEE, 11, 13),
}
# Brings one node into the middle of the page; the corner and the size of what is seen of it.
SHOW = """id => {
    const { canvas, graph } = app;
    const [x, y, width, height] = graph.getNodeById(id).boundingRect;
    canvas.ds.scale = 1;
    canvas.ds.offset[0] = 700 - x;
    canvas.ds.offset[1] = 150 - y;
    canvas.setDirty(true, true);
    const { left, top } = canvas.canvas.getBoundingClientRect();
    return { x: left + 700, y: top + 150, width, height };
}"""


# What a workflow takes up of the page once all of it is in view.
EXTENT = """() => {
    const { canvas, graph } = app;
    const boxes = graph.groups.map(group => [...group.pos, ...group.size]);
    const [x, y] = [0, 1].map(axis => Math.min(...boxes.map(box => box[axis])));
    const [right, bottom] = [0, 1].map(axis => Math.max(...boxes.map(box => box[axis] + box[axis + 2])));
    const { left, top } = canvas.canvas.getBoundingClientRect();
    const { scale, offset } = canvas.ds;
    return { x: left + (x + offset[0]) * scale, y: top + (y + offset[1]) * scale, width: (right - x) * scale,
             height: (bottom - y) * scale };
}"""


def workflow(name: str) -> dict:
    """A template, or the one with Place, which takes the very inputs and widgets of Compose."""
    loaded = json.loads((ROOT / "example_workflows" / f"{name.removesuffix(WITH_PLACE)}.json").read_text(encoding="utf-8"))
    if name.endswith(WITH_PLACE):
        node = next(node for node in loaded["nodes"] if node["type"] == "SDACompose")
        node |= {"type": "SDAPlace", "title": "Place Embedding", "widgets_values": [0.0, 0.55, 0.45, 0.45, "replace"]}
    return loaded


def photograph(desk: Desk, node: int) -> Image.Image:
    area = desk.page.evaluate(SHOW, node)
    desk.page.mouse.move(5, 500)  # nothing is pointed at
    desk.page.wait_for_timeout(500)
    return Image.open(io.BytesIO(desk.page.screenshot(clip=area))).convert("RGB")


def beside(parts: list[Image.Image]) -> Image.Image:
    whole = Image.new("RGB", (sum(part.width + GAP for part in parts) - GAP, max(part.height for part in parts)), (34, 34, 34))
    for at, part in enumerate(parts):
        whole.paste(part, (sum(each.width + GAP for each in parts[:at]), 0))
    return whole


def small(picture: Image.Image) -> bytes:
    """A PNG of few colours, at most LIMIT bytes."""
    for width in (720, 640, 560, 480, 400):
        size = (min(width, picture.width), round(picture.height * min(width, picture.width) / picture.width))
        for colours in (64, 32):
            data = io.BytesIO()
            picture.resize(size, Image.Resampling.LANCZOS).quantize(colours, Image.Quantize.FASTOCTREE).save(data, "PNG", optimize=True)
            if data.tell() <= LIMIT:
                return data.getvalue()
    raise ValueError("The picture does not fit the limit: show fewer nodes.")


def main() -> None:
    with serve(prepare()) as server, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), headless=True, args=list(FLAGS))
        desk = Desk(browser.new_page(viewport=VIEW), server.url, modern=False)
        desk.settings(**{"Minimap.Visible": False})
        desk.open()
        for template in dict.fromkeys(template for template, *_ in PICTURES.values()):
            desk.load(workflow(template))
            desk.run()
            desk.page.wait_for_timeout(1_000)  # for the pictures to come
            if template == README:
                desk.fit()
                desk.page.wait_for_timeout(9_000)  # until the page's word of the finished job is gone
                shot = Image.open(io.BytesIO(desk.page.screenshot(clip=desk.page.evaluate(EXTENT)))).convert("RGB")
                shot.thumbnail((1400, 1400), Image.Resampling.LANCZOS)
                shot.save(ROOT / "assets" / "template.jpg", quality=80)
            for name, (source, *ids) in PICTURES.items():
                if source == template:
                    data = small(beside([photograph(desk, id) for id in ids]))
                    (DOCS / f"{name}.png").write_bytes(data)
                    print(f"{name}.png: {len(data) / 1024:.1f} KB")


if __name__ == "__main__":
    main()
