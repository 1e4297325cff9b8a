"""What a node tells its canvas widget after it ran."""

from __future__ import annotations

import torch

from ..kernels.embedding import SemanticEmbedding
from ..kernels.regions import cells


def shown(embedding: SemanticEmbedding) -> dict[str, list]:
    """The node's `ui`: `layout`, the grids to draw as [[rows, columns, tokens per cell], ...]; where there are none, `cells`."""
    try:
        hierarchy = embedding.hierarchy()
    except ValueError:
        return {"cells": cells(embedding)}
    # Regional prompts may spell a grid without being its level 0, and the canvas counts a layout's levels from 0.
    plain = torch.equal(embedding.levels.cpu(), hierarchy.level_ids())
    return {"layout": hierarchy.to_json()} if plain else {"cells": cells(embedding)}
