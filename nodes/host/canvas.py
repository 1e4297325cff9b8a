"""What a node tells its canvas widget after it ran."""

from __future__ import annotations

from ...kernels.embedding import SemanticEmbedding
from ...kernels.regions import cells


def shown(embedding: SemanticEmbedding) -> dict[str, list]:
    """The node's `ui`: `layout`, the grids to draw as [[rows, columns, tokens per cell], ...]; where there are none, `cells`."""
    try:
        return {"layout": embedding.hierarchy().to_json()}
    except ValueError:
        return {"cells": cells(embedding)}
