"""The picture work of the demo, run by the environment's Python, which has Pillow (run.py's own need not)."""

from __future__ import annotations

import sys

from PIL import Image, ImageDraw, ImageFont, ImageOps

TILE, MARGIN, LABEL = 384, 24, 64
INK, FAINT, PAPER = (24, 24, 27), (113, 113, 122), (250, 250, 249)


def check(source: str, target: str) -> None:
    """Writes any readable picture as an upright RGB PNG, over white where it is transparent, as training does."""
    with Image.open(source) as image:
        image = ImageOps.exif_transpose(image)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image.convert("RGB").save(target)


def sheet(target: str, instruction: str, *paths: str) -> None:
    """Source, reconstruction and edit side by side, each under its label."""
    labels = [("Source", ""), ("Reconstruction", "encoded, then painted by the frozen Flux"), ("Edited", instruction)]
    width, height = MARGIN + len(paths) * (TILE + MARGIN), LABEL + TILE + 2 * MARGIN
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    for index, (path, (title, note)) in enumerate(zip(paths, labels, strict=True)):
        left = MARGIN + index * (TILE + MARGIN)
        draw.text((left, MARGIN - 6), title, INK, ImageFont.load_default(22))
        draw.text((left, MARGIN + 24), _fit(draw, note), FAINT, ImageFont.load_default(15))
        with Image.open(path) as image:
            tile = ImageOps.pad(image.convert("RGB"), (TILE, TILE), Image.Resampling.LANCZOS, PAPER)
        page.paste(tile, (left, MARGIN + LABEL))
    page.save(target)


def _fit(draw: ImageDraw.ImageDraw, text: str) -> str:
    font, whole = ImageFont.load_default(15), text
    while draw.textlength(text, font) > TILE:
        whole = whole[:-1]
        text = whole.rstrip() + "…"
    return text


if __name__ == "__main__":
    try:
        {"check": check, "sheet": sheet}[sys.argv[1]](*sys.argv[2:])
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        sys.exit(str(error))
