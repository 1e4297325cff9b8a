"""Seeing an embedding: where its tokens are and what they weigh, and which patches really see them."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..kernels import picture
from ..kernels.visibility import patch_grid
from . import types
from .host.versions import schema

PATCH = 2  # latent cells to a side of Flux's patch
PIXELS = 8  # pixels to a latent cell


class PreviewEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDAPreviewEmbedding",
            display_name="Preview Embedding",
            description="Draw the boxes of an embedding over its image and tint each by a measure: blue is less than "
            "ordinary, orange more, no tint as trained. Each place shows the finest level that is there.",
            search_aliases=["show regions", "quadtree", "visualize tokens", "heatmap"],
            inputs=[
                types.Embedding.Input("embedding", tooltip="The embedding to look at."),
                io.Combo.Input(
                    "measure",
                    options=list(picture.MEASURES),
                    default=picture.MEASURES[0],
                    tooltip="strength: blue is weaker than trained (full blue is off), orange stronger. token norm: the tokens' "
                    "length against the median. change: how far the tokens are from those of compare, orange.",
                ),
                io.Image.Input("image", optional=True, tooltip="The image to draw on, any size. Grey without it."),
                types.Embedding.Input(
                    "compare", optional=True, tooltip="What the change is measured against: the embedding before an edit."
                ),
                io.Mask.Input(
                    "change_map",
                    optional=True,
                    tooltip="A map to show instead of the measure, orange where it is white: the change of Change Mask, at any size.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The picture that the node shows.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, embedding, measure, image=None, compare=None, change_map=None) -> io.NodeOutput:
        if change_map is None:
            values = picture.measure(embedding, measure, compare)
        else:
            values = change_map.reshape(-1, *change_map.shape[-2:])
        drawn = picture.draw(embedding, values, image)
        return io.NodeOutput(drawn, ui=ui.PreviewImage(drawn, cls=cls))


class VisiblePatches(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDAVisiblePatches",
            display_name="Visible Patches",
            description="The mask that Masked Attention really uses for a latent of this size: white where a patch sees the "
            "chosen tokens as trained, darker where it sees fewer of them or sees them weakened, black where it sees none.",
            search_aliases=["region mask", "token mask", "attention mask"],
            inputs=[
                types.Embedding.Input("embedding", tooltip="The embedding whose tokens are looked for."),
                io.Latent.Input("latent", tooltip="The latent to be sampled; only its size counts."),
                io.Int.Input("level", default=-1, min=-1, max=8, tooltip="Only tokens of this level, 0 the coarsest; -1 is all."),
                io.Int.Input(
                    "token",
                    default=-1,
                    min=-1,
                    max=65535,
                    tooltip="Only this token, counted from 0 within the chosen level (or all of them); -1 is any.",
                ),
            ],
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="Patch by patch, at the size of the picture that the latent becomes.")
            ],
        )

    @classmethod
    def execute(cls, embedding, latent, level, token) -> io.NodeOutput:
        height, width = latent["samples"].shape[-2:]
        chosen = (None if number < 0 else number for number in (level, token))
        mask = picture.seen(embedding, patch_grid(height, width, PATCH), *chosen)
        for axis in (0, 1):
            mask = mask.repeat_interleave(PATCH * PIXELS, dim=axis)
        return io.NodeOutput(mask[None, : height * PIXELS, : width * PIXELS])
