"""A style model's tokens (FLUX.1 Redux) as a semantic embedding. Needs public weights only."""

from __future__ import annotations

from comfy_api.latest import io

from ..kernels.hierarchy import PRESETS
from ..kernels.redux import embed
from . import types
from .host import redux
from .host.versions import schema

STYLE_MODEL = io.StyleModel.Input("style_model", tooltip="From Load Style Model: FLUX.1 Redux or Flex Redux.")
PRESET = io.Combo.Input(
    "preset", options=list(PRESETS), default="tree128",
    tooltip="How many tokens, and in which grids. Fewer leave your prompt more freedom; more keep the layout closer.",
)  # fmt: skip
EMBEDDING = types.Embedding.Output(display_name="embedding", tooltip="The image as a semantic embedding.")


def _strength(name: str, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=1.0, min=0.0, max=2.0, step=0.05, tooltip=tooltip)


class EncodeRedux(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDAEncodeRedux",
            display_name="Encode with Redux",
            description="A picture as a semantic embedding by FLUX.1 Redux, in one node: the whole picture is seen, the layout "
            "is kept, and the prompt still counts. Needs no checkpoint of this pack.",
            search_aliases=["redux", "style model", "image prompt", "SigLIP"],
            inputs=[
                io.Image.Input(
                    "image", tooltip="Any size and aspect: the whole of it is resized to the encoder's square. A batch gives a batch "
                    "of embeddings.",
                ),
                STYLE_MODEL,
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="From Load CLIP Vision: sigclip_vision_patch14_384 for FLUX.1 Redux, SigLIP2 512 for Flex Redux.",
                ),
                PRESET,
                _strength("whole", "Factor on the attention that the tokens of the whole picture get, which every place reads. 0 is off."),
                _strength("quarters", "The same for the tokens of the 2 x 2 quarters. Without effect in a preset that has none."),
                _strength("sixteenths", "The same for the tokens of the 4 x 4 cells. Without effect in a preset that has none."),
            ],
            outputs=[EMBEDDING],
        )  # fmt: skip

    @classmethod
    def execute(cls, image, style_model, clip_vision, preset, whole, quarters, sixteenths) -> io.NodeOutput:
        tokens = redux.encode(style_model, clip_vision, image)
        return io.NodeOutput(embed(tokens, preset, (whole, quarters, sixteenths)))


class FromStyleModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDAFromStyleModel",
            display_name="Embedding from Style Model (Redux)",
            description="Redux that keeps the layout, from core's CLIP Vision Encode: the style model's grid of tokens, pooled cell "
            "by cell. Encode with Redux does both steps.",
            search_aliases=["redux", "style model", "image prompt"],
            inputs=[
                STYLE_MODEL,
                io.ClipVisionOutput.Input(
                    "clip_vision_output",
                    tooltip="From CLIP Vision Encode with crop none, so that the cells lie where the picture shows them.",
                ),
                PRESET,
            ],
            outputs=[EMBEDDING],
        )

    @classmethod
    def execute(cls, style_model, clip_vision_output, preset) -> io.NodeOutput:
        return io.NodeOutput(embed(redux.project(style_model, clip_vision_output), preset))
