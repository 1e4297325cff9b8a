"""How many frames a second the canvas of Regions draws with 60 regions in it, half of them painted, while one is dragged or
painted: in the node, and in the window of its own, where the picture is 1,024 pixels high.

    python tests/browser/frames.py

Prints the table and writes benchmarks/canvas.md. Headless Chromium draws on the CPU: a page with a graphics card is faster.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import torch
from conftest import FLAGS, RENDERERS, Desk, chromium
from playwright.sync_api import sync_playwright
from semantic_diffusion_adapter.kernels.region_list import runs
from semantic_diffusion_adapter.runner.environment import prepare
from semantic_diffusion_adapter.runner.server import serve
from semantic_diffusion_adapter.training.miniature.evaluation.table import machine, rows

PAGE = Path(__file__).resolve().parents[2] / "benchmarks" / "canvas.md"
VIEW = {"width": 1900, "height": 1190}  # the picture in the window of its own is then 1,024 pixels high
REGIONS = 60
ADD = """text => {
    const node = LiteGraph.createNode('SDARegions');
    app.graph.add(node);
    const widget = node.widgets.find(({ name }) => name === 'regions');
    widget.value = text;
    widget.callback?.(text);
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [500, 120];
    app.canvas.setDirty(true, true);
}"""
# Three seconds of a drag, one move for each frame; [frames a second, height of the picture].
DRAG = """async () => {
    const canvas = document.querySelector('.sda-editor canvas');
    const { left, top, width, height } = canvas.getBoundingClientRect();
    canvas.setPointerCapture = () => {};
    const send = (type, x, y, buttons) => canvas.dispatchEvent(new PointerEvent(type, { clientX: left + width * x,
        clientY: top + height * y, button: 0, buttons, isPrimary: true, pointerId: 1, bubbles: true }));
    const frame = () => new Promise(requestAnimationFrame);
    await frame();
    const start = performance.now();
    let frames = 0;
    send('pointerdown', 0.3, 0.5, 1);
    for (let now = 0; now < 3000; now = performance.now() - start) {
        send('pointermove', 0.3 + 0.4 * now / 3000, 0.5 + 0.2 * Math.sin(now / 150), 1);
        await frame();
        frames += 1;
    }
    send('pointerup', 0.7, 0.5, 0);
    return [frames / (performance.now() - start) * 1000, Math.min(width, height) - 12];
}"""


def crowd() -> str:
    draw = torch.Generator().manual_seed(0)
    pixels, made = torch.arange(256), []
    for number in range(REGIONS):
        x, y, radius = (int(torch.randint(low, high, (), generator=draw)) for low, high in ((20, 236), (20, 236), (10, 60)))
        disc = (pixels - x) ** 2 + (pixels[:, None] - y) ** 2 <= radius**2
        shape = {"mask": runs(disc.float())} if number % 2 else {"box": [x / 512, y / 512, radius / 128, radius / 128]}
        made.append({"name": str(number), **shape})
    return json.dumps({"version": 1, "regions": made})


def main() -> None:
    found = []
    with serve(prepare()) as server, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), headless=True, args=list(FLAGS))
        for renderer, modern in RENDERERS.items():
            desk = Desk(browser.new_page(viewport=VIEW), server.url, modern)
            desk.open()
            desk.page.evaluate(ADD, crowd())
            desk.page.wait_for_timeout(1_500)
            for place in ("node", "window"):
                if place == "window":
                    desk.page.locator(".sda-editor button[aria-label^='Larger']").click()
                    desk.page.wait_for_timeout(500)
                for number, way in enumerate(("drag", "paint")):
                    desk.page.locator(".sda-editor [role=group] button").nth(number).click()
                    desk.page.locator(".sda-panel [role=listitem] input[type=text]").nth(1).click()
                    desk.page.wait_for_timeout(200)
                    frames, height = desk.page.evaluate(DRAG)
                    found.append([renderer, place, str(round(height)), way, f"{frames:.0f}"])
            desk.page.close()
    text = "\n".join([
        "# Frames of the Regions canvas",
        "",
        f"{machine()}; headless Chromium without a graphics card; {date.today()}; `python tests/browser/frames.py`",
        "",
        f"{REGIONS} regions, half of them painted. Frames a second while one painted region is dragged or painted on, one move of "
        "the pointer for each frame, over three seconds.",
        "",
        *rows(["renderer", "where", "picture's height", "what", "frames a second"], found),
        "",
    ])  # fmt: skip
    PAGE.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
