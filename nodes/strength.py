"""How much an embedding, its levels and its cells count."""

from __future__ import annotations

from comfy_api.latest import io

from ..kernels.algebra import with_strength
from ..kernels.cells import ALL, parse_cells, parse_levels, strength_cells
from . import canvas, queue, types
from .host.versions import schema


class EmbeddingStrength(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDAStrength",
            display_name="Embedding Strength",
            description="How much an embedding counts: all of it, some levels, or single cells. 1 is as trained, 0 is off.",
            has_intermediate_output=True,
            search_aliases=["weight", "attention bias", "level"],
            inputs=[
                types.Embedding.Input("embedding", tooltip="The embedding to weigh."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=2.0, step=0.05,
                    tooltip="Factor on the attention that the tokens get: less than 1 lets a prompt count for more, 0 is off.",
                ),
                io.String.Input(
                    "levels", default=ALL,
                    tooltip="Which levels the strength is for: all, or numbers such as 0 (the whole image) or 1,2 (the cells).",
                ),
                io.String.Input(
                    "cells", default="",
                    tooltip="Factors of single cells on top of it, as level:row,column=factor, such as 1:0,1=0.5; 2:3,3=0. Also 2=0.7 "
                    "for a level. Click the cells in the picture instead of writing.",
                ),
            ],
            outputs=[types.Embedding.Output(display_name="embedding", tooltip="The weighed embedding.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, levels=None, cells=None) -> bool | str:
        return queue.verdict((parse_levels, levels), (parse_cells, cells))

    @classmethod
    def execute(cls, embedding, strength, levels, cells) -> io.NodeOutput:
        weighed = strength_cells(with_strength(embedding, strength, parse_levels(levels)), cells)
        return io.NodeOutput(weighed, ui=canvas.shown(embedding))
