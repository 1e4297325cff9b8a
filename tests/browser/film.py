"""Makes the film in the README from the real page: regions are drawn and painted on a picture, and the miniature paints them.

    python tests/browser/film.py

Writes assets/regions.webp.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

from conftest import FLAGS, VIEW, Artist, Desk, chromium
from PIL import Image
from playwright.sync_api import sync_playwright
from semantic_diffusion_adapter.runner.environment import prepare
from semantic_diffusion_adapter.runner.server import serve

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "example_workflows" / "20 Regions (miniature).json"
WIDTH = 720  # pixels
HELD = 2200  # milliseconds of the last frame


def main() -> None:
    workflow = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    (node,) = (each for each in workflow["nodes"] if each["type"] == "SDARegions")
    (saving,) = (each for each in workflow["nodes"] if each.get("title") == "With the regions")
    node["widgets_values"] = [""]
    workflow["groups"] = []
    for each in workflow["nodes"]:
        each["pos"] = [each["pos"][0] - 3000, each["pos"][1]] if each not in (node, saving) else each["pos"]
    saving["pos"] = [node["pos"][0] + node["size"][0] + 20, node["pos"][1] + 120]
    frames: list[tuple[Image.Image, int]] = []
    with serve(prepare()) as server, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), headless=True, args=list(FLAGS))
        desk = Desk(browser.new_page(viewport=VIEW), server.url, modern=True)
        desk.settings(**{"Minimap.Visible": False})
        desk.open()
        artist = Artist(desk)
        desk.load(workflow)
        desk.run()  # empty: the picture as it is
        left, top = (-place for place in node["pos"])
        desk.page.evaluate("([x, y]) => { app.canvas.ds.scale = 1; app.canvas.ds.offset = [x, y]; app.canvas.setDirty(true, true); }",
                           [left + 200, top + 140])
        desk.page.wait_for_timeout(9_000)  # until the page's word of the finished job is gone
        whole = desk.page.evaluate("""ids => {
            const boxes = ids.map(id => document.querySelector(`[data-node-id="${id}"]`).getBoundingClientRect());
            const [left, top] = [Math.min(...boxes.map(b => b.left)), Math.min(...boxes.map(b => b.top))];
            return { x: left - 8, y: top - 8, width: Math.max(...boxes.map(b => b.right)) - left + 16,
                     height: Math.max(...boxes.map(b => b.bottom)) - top + 16 };
        }""", [node["id"], saving["id"]])

        def shoot(milliseconds: int) -> None:
            shot = Image.open(io.BytesIO(desk.page.screenshot(clip=whole))).convert("RGB")
            frames.append((shot.resize((WIDTH, round(WIDTH * shot.height / shot.width)), Image.Resampling.LANCZOS), milliseconds))

        def draw(*points: tuple[float, float]) -> None:
            artist.page.mouse.move(*artist.at(*points[0]))
            artist.page.mouse.down()
            for point in points[1:]:
                artist.page.mouse.move(*artist.at(*point))
                artist.page.wait_for_timeout(60)
                shoot(90)
            artist.page.mouse.up()
            artist.page.wait_for_timeout(120)

        def speak(text: str) -> None:
            field = artist.page.locator(".sda-panel [aria-label='Prompt']")
            for end in range(8, len(text) + 8, 8):
                field.fill(text[:end])
                artist.page.wait_for_timeout(60)
                shoot(90)
            artist.page.locator(".sda-panel [aria-label='Mode']").select_option("join")

        shoot(900)
        draw((0.03, 0.62), (0.15, 0.7), (0.3, 0.85), (0.42, 0.93), (0.5, 0.99))
        speak("a small yellow square at the bottom left")
        artist.page.locator(".sda-editor [role=group] button").nth(1).click()
        artist.page.locator(".sda-panel button[aria-label^='Add']").click()
        artist.page.locator(".sda-panel [aria-label='Brush size']").fill("0.14")
        draw((0.16, 0.14), (0.2, 0.17), (0.25, 0.2), (0.2, 0.24), (0.15, 0.2), (0.18, 0.16))
        speak("a small blue triangle at the top left")
        shoot(500)
        desk.run()
        desk.page.wait_for_timeout(1_500)
        shoot(HELD)
    pictures, times = zip(*frames)
    file = ROOT / "assets" / "regions.webp"
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=times, loop=0, quality=60, method=6)
    print(f"{file.name}: {len(frames)} frames, {file.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
