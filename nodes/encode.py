"""From an image to its semantic embedding."""

from __future__ import annotations

from comfy_api.latest import io

from ..kernels.hierarchy import PRESETS
from . import types
from .host import running
from .host.versions import schema

FULL = "full"


class EncodeImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDAEncodeImage",
            display_name="Encode Image (Semantic)",
            description="Look at an image through the vision encoders: one vector per patch and encoder.",
            inputs=[
                types.Vision.Input("vision", tooltip="From Load Vision Encoders."),
                io.Image.Input(
                    "image",
                    tooltip="Any size and aspect; every encoder resizes the whole image to its own square. A batch gives "
                    "a batch of embeddings.",
                ),
            ],
            outputs=[types.Features.Output(display_name="features", tooltip="Patch features, for Build Hierarchical Embedding.")],
        )

    @classmethod
    def execute(cls, vision, image) -> io.NodeOutput:
        return io.NodeOutput(running.encode_image(vision, image))


class BuildEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDABuildEmbedding",
            display_name="Build Hierarchical Embedding",
            description="Turn patch features into a semantic embedding: tokens that Flux reads like a prompt, each owning "
            "a box of the image.",
            inputs=[
                types.Adapter.Input("adapter", tooltip="From Load Semantic Adapter."),
                types.Features.Input("features", tooltip="From Encode Image (Semantic)."),
                io.Combo.Input(
                    "preset",
                    options=[FULL, *PRESETS],
                    default=FULL,
                    tooltip="How many tokens, and in which grids. Fewer tokens leave Flux and your prompt more freedom; "
                    "more keep the layout closer. full: everything that the adapter has.",
                ),
            ],
            outputs=[types.Embedding.Output(display_name="embedding", tooltip="The image as a semantic embedding.")],
        )

    @classmethod
    def execute(cls, adapter, features, preset) -> io.NodeOutput:
        return io.NodeOutput(running.build_embedding(adapter, features, None if preset == FULL else preset))
