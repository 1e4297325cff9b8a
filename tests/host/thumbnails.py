"""Makes the thumbnails of the miniature's templates from what they paint, and the picture in the README.

    python tests/host/thumbnails.py

Writes example_workflows/<template>.jpg and assets/demo.png.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from semantic_diffusion_adapter.runner.client import Client
from semantic_diffusion_adapter.runner.environment import prepare
from semantic_diffusion_adapter.runner.server import serve
from semantic_diffusion_adapter.runner.workflow import to_prompt

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "example_workflows"
TILE, MARGIN, LABEL = 256, 12, 36
PAPER, INK = (30, 30, 34), (232, 232, 236)


def labels(workflow: dict) -> dict[str, str]:
    """The title of every node that saves a picture, by its id, in the order of the page: left to right, then downwards."""
    saving = [node for node in workflow["nodes"] if node["type"] == "SaveImage"]
    return {str(node["id"]): node["title"] for node in sorted(saving, key=lambda node: node["pos"])}


def strip(pictures: dict[str, Image.Image]) -> Image.Image:
    """Pictures side by side, each under its label."""
    sheet = Image.new("RGB", (MARGIN + len(pictures) * (TILE + MARGIN), LABEL + TILE + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (label, picture) in enumerate(pictures.items()):
        left = MARGIN + index * (TILE + MARGIN)
        draw.text((left, LABEL / 2), label, INK, ImageFont.load_default(17), anchor="lm")
        sheet.paste(picture.resize((TILE, TILE), Image.Resampling.LANCZOS), (left, LABEL))
    return sheet


def main() -> None:
    with serve(prepare()) as server:
        client = Client(server.url)
        nodes = client.json("/object_info")
        for file in sorted(TEMPLATES.glob("*.json")):
            if "miniature" not in file.stem.lower():
                continue  # those of FLUX.1 have drawings
            workflow = json.loads(file.read_text(encoding="utf-8"))
            outputs = client.run(to_prompt(workflow, nodes))
            found = {label: client.image(outputs[node]["images"][0]) for node, label in labels(workflow).items()}
            painted = {label: Image.open(io.BytesIO(data)).convert("RGB") for label, data in found.items()}
            strip(painted).save(file.with_suffix(".jpg"), quality=88)
            print(file.with_suffix(".jpg").name)
    subprocess.run([sys.executable, str(ROOT / "run.py"), "demo"], check=True)
    shutil.copy(ROOT / "out" / "demo.png", ROOT / "assets" / "demo.png")


if __name__ == "__main__":
    main()
