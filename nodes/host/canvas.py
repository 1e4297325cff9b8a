"""What a node tells its canvas widget after it ran."""

from __future__ import annotations

from ...kernels.embedding import SemanticEmbedding


def shown(embedding: SemanticEmbedding) -> dict[str, list]:
    """The node's `ui`: `layout`, the grids to draw as [[rows, columns, tokens per cell], ...]; empty for a free layout."""
    try:
        return {"layout": embedding.hierarchy().to_json()}
    except ValueError:
        return {"layout": []}
