"""Levels and cells by name: the text forms of the widgets, and the cells that they can name."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor

from .algebra import of_levels, with_strength
from .embedding import SemanticEmbedding

ALL = "all"
STRONGEST = 2.0


def parse_levels(text: str) -> set[int] | None:
    """None for "all", else the numbers. ValueError for anything else."""
    if text.strip().lower() in (ALL, ""):
        return None
    try:
        return {int(part) for part in text.split(",")}
    except ValueError:
        raise ValueError(f"The levels {text!r} are not numbers: write `all`, or numbers with commas such as `1,2`.") from None


class CellStrength(NamedTuple):
    """One entry of the text form. level None: all tokens; cell (row, column) None: the whole level."""

    level: int | None
    cell: tuple[int, int] | None
    factor: float


_ENTRY = re.compile(r"(?:\*|(\d+)(?:\s*:\s*(\d+)\s*,\s*(\d+))?)\s*=\s*(\d+\.?\d*|\.\d+)")


def parse_cells(text: str) -> list[CellStrength]:
    """The entries of a text such as `1:0,1=0.5; 2:3,3=0; 2=0.7; *=0.5`.

    They are level:row,column=factor, level=factor and everything=factor, with factors from 0 (off) to 2. ValueError
    for anything else.
    """
    found = []
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        match = _ENTRY.fullmatch(entry)
        if match is None or float(match[4]) > STRONGEST:
            raise ValueError(
                f"The cell strength {entry!r} is not understood: write level:row,column=factor with a factor from 0 to 2, "
                "such as `1:0,1=0.5`, with semicolons between."
            )
        level, row, col, factor = match.groups()
        cell = None if row is None else (int(row), int(col))
        found.append(CellStrength(None if level is None else int(level), cell, float(factor)))
    return found


def strength_cells(e: SemanticEmbedding, text: str) -> SemanticEmbedding:
    """`e` with the factors of the text form (`parse_cells`). A token that several entries name gets all of them."""
    for level, cell, factor in parse_cells(text):
        boxes = None if cell is None else _cell(e, level, *cell)
        e = with_strength(e, factor, None if level is None else {level}, boxes)
    return e


def cells(e: SemanticEmbedding) -> list[tuple[int, int, int, float, float, float, float]]:
    """Every cell that the text form can name: (level, row, column, x0, y0, x1, y1), coarse to fine, row by row."""
    found = []
    for level in e.levels.unique().tolist():
        boxes, rows, cols = _spans(e, level)
        places = {
            (rows.index([y0, y1]), cols.index([x0, x1]), x0, y0, x1, y1) for x0, y0, x1, y1 in boxes.unique(dim=0).tolist()
        }
        found += [(level, *place) for place in sorted(places)]
    return found


def _spans(e: SemanticEmbedding, level: int) -> tuple[Tensor, list, list]:
    """(boxes [N, 4] of a level, its rows, its columns): the distinct spans of the boxes, from the top left on."""
    boxes = e.boxes[of_levels(e, {level})]
    return boxes, boxes[:, [1, 3]].unique(dim=0).tolist(), boxes[:, [0, 2]].unique(dim=0).tolist()


def _cell(e: SemanticEmbedding, level: int, row: int, col: int) -> Tensor:
    """[1, 4], the box of a cell."""
    boxes, rows, cols = _spans(e, level)
    if row < len(rows) and col < len(cols):
        box = boxes.new_tensor([cols[col][0], rows[row][0], cols[col][1], rows[row][1]])
        if (boxes == box).all(-1).any():
            return box[None]
    raise ValueError(
        f"Level {level} of the embedding has no cell {row},{col}: it has {len(rows)} rows and {len(cols)} columns, counted from 0."
    )
