"""An embedding between two others."""

from __future__ import annotations

from comfy_api.latest import io

from ..kernels import algebra
from ..kernels.cells import ALL, parse_levels
from . import queue, types
from .host.versions import schema


class BlendEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDABlendEmbeddings",
            display_name="Blend Embeddings",
            description="Mix two semantic embeddings of the same adapter and preset.",
            search_aliases=["interpolate", "slerp", "mix"],
            advanced=["mode"],
            inputs=[
                types.Embedding.Input("embedding_a", tooltip="The embedding at amount 0."),
                types.Embedding.Input("embedding_b", tooltip="The embedding at amount 1."),
                io.Float.Input(
                    "amount", default=0.5, min=0.0, max=1.0, step=0.01, tooltip="0 is embedding_a, 1 is embedding_b."
                ),
                io.Combo.Input(
                    "mode",
                    options=["slerp", "lerp"],
                    default="slerp",
                    tooltip="slerp turns each token from one direction to the other and keeps its length; lerp goes in a "
                    "straight line, which makes the middle weaker.",
                ),
                io.String.Input(
                    "levels",
                    default=ALL,
                    tooltip="Which levels are mixed, the others stay embedding_a's: all, or numbers such as 0 (the whole "
                    "image: style and content) or 1,2 (the cells: layout and detail).",
                ),
            ],
            outputs=[types.Embedding.Output(display_name="embedding", tooltip="The blend.")],
        )

    @classmethod
    def validate_inputs(cls, levels=None) -> bool | str:
        return queue.verdict((parse_levels, levels))

    @classmethod
    def execute(cls, embedding_a, embedding_b, amount, mode, levels) -> io.NodeOutput:
        return io.NodeOutput(algebra.blend(embedding_a, embedding_b, amount, mode, parse_levels(levels)))
