"""Regions: many of them in one node, each with a shape, what speaks there, and when."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from ..kernels import region_list, regions
from ..kernels.area import resample, snap_ends
from ..kernels.embedding import MASK_SIDE, SemanticEmbedding
from . import boxes, prompt, queue, types
from .host.versions import schema

# The page shows those that are connected and one more (web/js/grow.js). No Autogrow: its names are others than those of cores
# that have none, and a workflow is to open in both.
OTHERS = tuple(f"other_{number}" for number in range(1, region_list.OTHERS + 1))


class Regions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDARegions",
            display_name="Regions",
            description="All regions of a picture in one canvas: draw boxes or paint, and give each a prompt or an embedding, a "
            "strength and a schedule. Works with plain FLUX.1, without a checkpoint of this pack.",
            has_intermediate_output=True,
            search_aliases=["regional prompting", "attention couple", "area prompt", "layers", "paint mask", "region canvas"],
            inputs=[
                io.String.Input(
                    "regions", default="",
                    tooltip="The regions as text, which the canvas writes: JSON that can be copied from one node to another.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="The CLIP of the Flux model: its own T5 reads the prompts of the regions."),
                types.Embedding.Input(
                    "embedding", optional=True, tooltip="What is seen where no region is: a picture's embedding, or a prompt's."
                ),
                io.Image.Input("image", optional=True, tooltip="The picture to draw on. The masks come out in its size."),
                io.Mask.Input(
                    "masks", optional=True,
                    tooltip="Shapes from SAM or another detector, one for each region in the order of the list, instead of those drawn.",
                ),
                types.BoundingBox.Input(
                    "bboxes", optional=True, extra_dict={"forceInput": True},  # without it the page makes a widget of the type
                    tooltip="The same as boxes, in pixels of image; masks go before them.",
                ),
                *(types.Embedding.Input(name, optional=True, tooltip="An embedding that regions can show.") for name in OTHERS),
            ],
            outputs=[
                types.Embedding.Output(display_name="embedding", tooltip="All regions, on what was there."),
                io.Mask.Output(display_name="masks", tooltip="The shapes of the regions that are on, one mask for each."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, regions=None) -> bool | str:
        return queue.verdict((_check, regions))

    @classmethod
    def execute(cls, regions, clip=None, embedding=None, image=None, masks=None, bboxes=None, **others) -> io.NodeOutput:
        found, shapes = _found(masks, bboxes, image), []
        for place, region in enumerate(region_list.parse(regions)):
            if not region.on:
                continue
            box, shape = region.shape(found[place] if place < len(found) else None)
            shapes.append(shape)
            embedding = region.laid_on(embedding, _spoken(region, clip, others, box), shape)
        if embedding is None:
            raise ValueError("No region is on: draw one and say what it shows, or connect an embedding.")
        shown = [{"box": _sides(box), "mask": None if mask is None else region_list.runs(mask)} for box, mask in found[: region_list.MOST]]
        return io.NodeOutput(embedding, _sized(shapes, image), ui={"found": shown})


def _check(text: str) -> None:
    for region in region_list.parse(text):
        if region.on and region.speaks == 0 and not region.prompt.strip():
            raise ValueError(f"The {region} has an empty prompt: write what it shows, choose an embedding for it, or switch it off.")


def _found(masks: Tensor | None, bboxes: object, image: Tensor | None) -> list[tuple[tuple, Tensor | None]]:
    """(box, mask [256, 256] or None for all of the box) of everything that a detector gave, in its order."""
    if masks is not None:
        return [regions.region((), mask) for mask in (masks if masks.ndim == 3 else masks[None])]
    return [(regions.region([box])[0], None) for box in ([] if bboxes is None else boxes.shares(bboxes, image))]


def _spoken(region: region_list.Region, clip: object, others: dict[str, SemanticEmbedding], box: tuple) -> SemanticEmbedding:
    if region.speaks:
        other = others.get(f"other_{region.speaks}")
        if other is None:
            raise ValueError(f"The {region} shows other_{region.speaks} and nothing is connected there: connect an embedding.")
        return regions.move_into(other, box) if region.placed else other
    if clip is None:
        raise ValueError(f"The {region} has a prompt, and no CLIP is connected to read it: connect the one of the Flux model.")
    tokens, pooled = prompt.words(clip, region.prompt)
    return regions.region_tokens(tokens, box, pooled, {"prompt": region.prompt, "pooled_width": pooled.shape[-1]})


def _sides(box: tuple) -> list[float]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]


def _sized(shapes: list[Tensor], image: Tensor | None) -> Tensor:
    """[N, H, W] as large as the picture, else 256 x 256; one black mask where there is none."""
    masks = torch.stack(shapes) if shapes else torch.zeros(1, MASK_SIDE, MASK_SIDE)
    return masks if image is None else snap_ends(resample(masks, *image.shape[1:3])).float()
