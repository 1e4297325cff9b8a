"""A style model's tokens (FLUX.1 Redux) as a semantic embedding. Needs public weights only."""

from __future__ import annotations

from comfy_api.latest import io

from ..kernels import regions
from ..kernels.hierarchy import PRESETS
from . import types
from .host.versions import schema


class FromStyleModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDAFromStyleModel",
            display_name="Embedding from Style Model (Redux)",
            description="Redux that keeps the layout: the style model's grid of tokens, pooled cell by cell. Needs no "
            "checkpoint of this pack.",
            search_aliases=["redux", "style model", "image prompt"],
            inputs=[
                io.StyleModel.Input("style_model", tooltip="From Load Style Model: FLUX.1 Redux or Flex Redux."),
                io.ClipVisionOutput.Input(
                    "clip_vision_output",
                    tooltip="From CLIP Vision Encode with crop none, so that the cells lie where the picture shows them.",
                ),
                io.Combo.Input(
                    "preset", options=list(PRESETS), default="tree128",
                    tooltip="How many tokens, and in which grids. Fewer leave your prompt more freedom; more keep the layout closer.",
                ),
            ],
            outputs=[types.Embedding.Output(display_name="embedding", tooltip="The image as a semantic embedding.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, style_model, clip_vision_output, preset) -> io.NodeOutput:
        tokens = style_model.get_cond(clip_vision_output)
        return io.NodeOutput(regions.pool_grid(tokens.float(), PRESETS[preset], {"style_model": preset}))
