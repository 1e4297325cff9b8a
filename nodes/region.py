"""Regions: text, another image or a placed image, each in boxes or in a soft mask of an embedding."""

from __future__ import annotations

from comfy_api.latest import io

from ..kernels import regions
from . import boxes, canvas, prompt, queue, types
from .host.versions import schema


def _where(x: float, y: float, width: float, height: float) -> list:
    """The widgets that every node with a region has, in this order; the canvas widget drags the same values."""

    def side(name: str, value: float, tooltip: str):
        return io.Float.Input(name, default=value, min=0.0, max=1.0, step=0.01, tooltip=tooltip)

    return [
        side("x", x, "Left edge of the box, as a share of the picture's width."),
        side("y", y, "Top edge of the box, as a share of the picture's height."),
        side("width", width, "Width of the box, as a share of the picture's; what reaches outside the picture is cut off."),
        side("height", height, "Height of the box, as a share of the picture's; what reaches outside the picture is cut off."),
        io.Combo.Input(
            "mode",
            options=["replace", "join"],
            default="replace",
            tooltip="replace: inside the region only the new tokens are seen. join: the tokens that are there stay beside them.",
        ),
    ]


def _instead() -> list:
    """The inputs that say in other ways where the region is."""
    return [
        io.Mask.Input(
            "mask",
            optional=True,
            tooltip="A region of any shape and size, soft edges too. When connected it is used instead of the box.",
        ),
        types.BoundingBox.Input(
            "bboxes",
            optional=True,
            extra_dict={"forceInput": True},  # without it the page makes a widget of the type
            tooltip="Boxes from a detector such as SAM3 Detect, all of them one region. When connected they are used "
            "instead of the box; a mask goes before them.",
        ),
        io.Image.Input("image", optional=True, tooltip="The picture that bboxes were found in; only its size counts."),
    ]


def _region(x: float, y: float, width: float, height: float, mask, bboxes, image) -> tuple:
    box = [(x, y, width, height)] if bboxes is None or mask is not None else boxes.shares(bboxes, image)
    return regions.region(box, mask)


class RegionalPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDARegionalPrompt",
            display_name="Regional Prompt",
            description="A prompt that only one region of the picture reads. Chain as many as you like, on an embedding or on "
            "nothing; works with plain FLUX.1, without a checkpoint of this pack.",
            has_intermediate_output=True,
            search_aliases=["regional prompting", "area prompt", "attention couple", "region"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of the Flux model: its own T5 reads the prompt."),
                io.String.Input("text", multiline=True, default="", tooltip="What the region shows."),
                *_where(0.25, 0.25, 0.5, 0.5),
                types.Embedding.Input(
                    "embedding", optional=True, tooltip="What to add the prompt to: an image's embedding or other regional prompts."
                ),
                *_instead(),
            ],
            outputs=[types.Embedding.Output(display_name="embedding", tooltip="With the prompt's tokens in their region.")],
        )

    @classmethod
    def validate_inputs(cls, text=None) -> bool | str:
        return queue.verdict((prompt.check, text))

    @classmethod
    def execute(
        cls, clip, text, x, y, width, height, mode, embedding=None, mask=None, bboxes=None, image=None
    ) -> io.NodeOutput:  # fmt: skip
        box, region = _region(x, y, width, height, mask, bboxes, image)
        tokens, pooled = prompt.words(clip, text)
        source = {"prompt": text, "pooled_width": pooled.shape[-1]}
        worded = regions.region_tokens(tokens, box, pooled, source)
        return _result(embedding, worded, box, region, mode, drawn=(mask, bboxes) == (None, None))


class PlaceEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDAPlace",
            display_name="Place Embedding",
            description="Shrink a whole embedding into a region of another: a picture inside the picture.",
            has_intermediate_output=True,
            search_aliases=["insert image", "paste region", "picture in picture"],
            inputs=[
                types.Embedding.Input("embedding", tooltip="The embedding that is placed into."),
                types.Embedding.Input("other", tooltip="The embedding that is moved into the region, as a whole."),
                *_where(0.5, 0.5, 0.5, 0.5),
                *_instead(),
            ],
            outputs=[types.Embedding.Output(display_name="embedding", tooltip="Both, decoded together.")],
        )

    @classmethod
    def execute(cls, embedding, other, x, y, width, height, mode, mask=None, bboxes=None, image=None) -> io.NodeOutput:
        box, region = _region(x, y, width, height, mask, bboxes, image)
        return _result(embedding, regions.move_into(other, box), box, region, mode, drawn=(mask, bboxes) == (None, None))


class ComposeEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDACompose",
            display_name="Compose Embeddings",
            description="Take one region of the picture from another embedding; everything stays where it is. Chain for more.",
            has_intermediate_output=True,
            search_aliases=["combine regions", "collage", "join embeddings"],
            inputs=[
                types.Embedding.Input("embedding", tooltip="What is seen outside the region."),
                types.Embedding.Input("other", tooltip="What is seen inside the region."),
                *_where(0.5, 0.0, 0.5, 1.0),
                *_instead(),
            ],
            outputs=[types.Embedding.Output(display_name="embedding", tooltip="Both, decoded together.")],
        )

    @classmethod
    def execute(cls, embedding, other, x, y, width, height, mode, mask=None, bboxes=None, image=None) -> io.NodeOutput:
        box, region = _region(x, y, width, height, mask, bboxes, image)
        return _result(embedding, other, box, region, mode, drawn=(mask, bboxes) == (None, None))


def _result(base, other, box, region, mode: str, drawn: bool) -> io.NodeOutput:
    """drawn: the region is the box of the widgets, so the page knows its shape."""
    joined = regions.insert(base, other, region, mode)
    shown = canvas.shown(other if base is None else base) | canvas.region(box, None if drawn else region)
    return io.NodeOutput(joined, ui=shown)
