"""Where an edit changes the picture."""

from __future__ import annotations

from comfy_api.latest import io

from ..kernels import change_map
from .host import change
from .host.versions import schema
from .see import PATCH, PIXELS


class ChangeMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDAChangeMask",
            display_name="Change Mask",
            description="Ask the model where two conditionings paint differently: a mask of what an edit changes, for Set "
            "Latent Noise Mask or Flow Edit Guider.",
            search_aliases=["difference mask", "auto mask", "diffedit", "what changes"],
            advanced=["noises", "seed"],
            inputs=[
                io.Model.Input("model", tooltip="The model that paints; for embeddings the one from Masked Attention (Flux)."),
                io.Conditioning.Input("source", tooltip="What the picture shows: the unedited embedding, or a prompt."),
                io.Conditioning.Input("edited", tooltip="What it shall show. The same references and ControlNets as the source."),
                io.Latent.Input("latent", tooltip="The source picture through VAE Encode."),
                io.Float.Input(
                    "threshold", default=0.03, min=0.0, max=1.0, step=0.005, round=False,
                    tooltip="From which part of the greatest change a patch counts as changed. Higher: a smaller mask.",
                ),
                io.Int.Input("grow", default=1, min=0, max=32, tooltip="By how many patches (16 pixels) the mask grows."),
                io.Float.Input(
                    "feather", default=0.0, min=0.0, max=32.0, step=0.25,
                    tooltip="Within how many patches around itself the mask fades out. 0 is a hard edge.",
                ),
                io.Int.Input(
                    "noises", default=4, min=1, max=64,
                    tooltip="In how many noisy versions of the source the two are compared. Each costs two evaluations.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="Of the noise in which they are compared.",
                ),
            ],
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="White where the edit changes the picture, at its size."),
                io.Mask.Output(display_name="change", tooltip="The change itself, 0 to 1 of each picture's greatest."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, source, edited, latent, threshold, grow, feather, noises, seed) -> io.NodeOutput:
        found = change.change_map(model, source, edited, latent, noises, seed)
        side = PATCH * PIXELS
        height, width = (cells * PIXELS for cells in latent["samples"].shape[-2:])
        mask, raw = (
            change_map.enlarge(patches, height, width, side) for patches in (change_map.changed(found, threshold, grow), found)
        )
        return io.NodeOutput(change_map.soften(mask, round(feather * side / 2)), raw)
