"""Pictures of an evaluation side by side, to be looked at beside its figures."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE, GAP, LABEL, CAPTION = 96, 4, 20, 76  # px
PAPER, INK = (250, 250, 250), (30, 30, 34)


def sheet(rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str], captions: Sequence[str]) -> Image.Image:
    """Rows of pictures uint8 [H, W, 3], each row with its caption, under the labels of the columns."""
    step = TILE + GAP
    made = Image.new("RGB", (CAPTION + len(labels) * step, LABEL + len(rows) * step), PAPER)
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(13)
    for column, label in enumerate(labels):
        draw.text((CAPTION + column * step + TILE / 2, LABEL / 2), label, INK, font, anchor="mm")
    for row, (pictures, caption) in enumerate(zip(rows, captions)):
        top = LABEL + row * step
        draw.text((GAP, top + TILE / 2), caption, INK, font, anchor="lm")
        for column, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((TILE, TILE), Image.Resampling.LANCZOS)
            made.paste(tile, (CAPTION + column * step, top))
    return made
