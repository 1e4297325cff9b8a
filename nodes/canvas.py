"""What a node tells its canvas widget after it ran."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfy_api.latest import ui
from torch import Tensor

from ..kernels.cells import cells
from ..kernels.embedding import SemanticEmbedding


def shown(embedding: SemanticEmbedding) -> dict[str, list]:
    """The node's `ui`: `layout`, the grids to draw as [[rows, columns, tokens per cell], ...], or else `cells`."""
    try:
        hierarchy = embedding.hierarchy()
    except ValueError:
        return {"cells": cells(embedding)}
    # Regional prompts may spell a grid without being its level 0, and the canvas counts a layout's levels from 0.
    plain = torch.equal(embedding.levels.cpu(), hierarchy.level_ids())
    return {"layout": hierarchy.to_json()} if plain else {"cells": cells(embedding)}


def region(box: Sequence[float], mask: Tensor | None) -> dict[str, list]:
    """Where the region was, for a node's `ui`: `box` [x0, y0, x1, y1] in 0..1, and `mask`, the picture of its mask.

    mask: [H, W] in 0..1. The picture is white, as opaque as the mask, and listed as core lists a node's images.
    """
    if mask is None:
        return {"box": list(box), "mask": []}
    white = torch.ones(1, *mask.shape, 3)
    picture = torch.cat([white, mask.cpu()[None, ..., None]], dim=-1)
    return {"box": list(box), "mask": ui.PreviewImage(picture).as_dict()["images"]}
